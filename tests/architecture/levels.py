"""The level of every module: what it may import. A module may import only from lower levels, never sideways.

Modules that are one stage split over files are one group: inside a group imports are free of levels, and only the
group's own order matters. A module that is missing here fails the test, so that a new one is given a level on purpose.
"""

from __future__ import annotations

LEVELS: dict[str, int] = {
    # Standard library only, or data.
    "errors": 0,
    "config": 0,
    "environment": 0,
    "_report_text": 0,
    "graph_names": 0,
    "axis_sizes": 0,
    # One noun each.
    "files": 1,
    "compare": 1,
    "op_schema": 1,
    "quantized": 1,
    "kernel_timeline": 1,
    "_report_html": 1,
    "model": 1,
    "plugins": 1,
    # What the stages exchange, and what several of them need.
    "artifacts": 2,
    "metrics": 2,
    "native_checkpoint": 2,
    "npz": 2,
    "profiles": 2,
    "plan_kernels": 2,
    "tensorrt_api": 2,
    "trt_options": 2,
    "plugin_library": 2,
    "_report_figures": 2,
    "_report_quantization": 2,
    "_report_fused": 2,
    "_report_ladder": 2,
    "_report_kernels": 2,
    "calibration": 2,
    "served": 2,
    # The stages.
    "checkpoint": 3,
    "export": 3,
    "rewrite": 3,
    "engine": 3,
    "runtime": 3,
    "session_check": 3,
    "graph_facts": 3,
    "graph_limits": 3,
    "graph_plugin": 3,
    "report": 3,
    "doctor": 3,
    "labelled_requests": 3,
    # What joins stages.
    "verify": 4,
    "bundle": 4,
    "segment_engines": 4,
    "fused_plan": 4,
    "polygraphy_files": 4,
    "quality": 4,
    "build_quantization": 4,
    "build_plan": 4,
    "m_falcon_check": 4,
    "incremental_check": 4,
    "session_timing": 4,
    # The order of the stages.
    "engine_stage": 5,
    "plugin_stage": 5,
    "inspection": 5,
    "bundle_profile": 5,
    "recheck": 5,
    "calibrate": 5,
    "ranking_bundle": 5,
    "retrieval_bundle": 5,
    "build_report": 5,
    "sensitivity": 5,
    "pipeline": 5,
    "serving": 5,
    # The command line.
    "cli": 6,
    "__main__": 6,
    "": 7,  # the package itself: a lazy list of public names, which imports nothing when it is imported
}

#: Sideways imports that are meant: a lower part of the same level, with the reason.
SIDEWAYS: dict[tuple[str, str], str] = {
    ("environment", "errors"): "refuses an absent backend",
    ("model", "quantized"): "rounds as the graphs do",
    ("model", "plugins"): "the eager operator runs the fused kernel on a GPU, imported when it is called",
    ("engine", "rewrite"): "lowers the graph to what the builder's parser reads",
    ("runtime", "rewrite"): "widens bfloat16 for a runtime without it, and gives an attention its body",
    ("graph_plugin", "rewrite"): "asks which norms run between the segments of a graph that is cut",
    ("rewrite", "graph_facts"): "names the inputs and outputs of the graphs that it cuts",
    ("export", "graph_facts"): "names the inputs and outputs of what it made",
    ("session_check", "runtime"): "runs the sessions that it compares",
    ("served", "artifacts"): "names the taps",
    ("profiles", "artifacts"): "Profile is what it makes",
    ("trt_options", "artifacts"): "Profile is what the options describe",
    ("plan_kernels", "artifacts"): "EngineKernel is what it makes",
    ("build_plan", "build_quantization"): "resolves the products that are quantised",
    ("build_plan", "fused_plan"): "resolves the segments and kernels of graphs that are cut",
    ("labelled_requests", "runtime"): "reads them as `run` reads its inputs",
    ("_report_quantization", "_report_ladder"): "shows how the products were chosen",
    ("pipeline", "build_report"): "writes what it says",
    ("pipeline", "sensitivity"): "chooses the products that are quantised",
    ("plugin_stage", "engine_stage"): "builds the plugin beside the engine",
    ("serving", "ranking_bundle"): "opens what the Python backend serves",
    ("serving", "retrieval_bundle"): "opens what the Python backend serves",
    ("__main__", "cli"): "runs it",
}
