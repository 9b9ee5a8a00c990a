"""Stage 5: every artifact against the eager model. Level 4.

Input: the checkpoint, the shipped graph and engine. Output: a `VerifyReport` and the `Reference` that goes into the
bundle, so that the same check can be repeated without the checkpoint, without torch, and by Polygraphy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hstu_compile.artifacts import TAP_PREFIX, CheckpointSpec, EngineArtifact, Feed, OnnxGraph, Precision
from hstu_compile.checkpoint import model_from_spec
from hstu_compile.compare import row_error
from hstu_compile.errors import VerifyError
from hstu_compile.export import TORCH_DTYPES
from hstu_compile.model.retrieval import RetrievalModel
from hstu_compile.runtime.session import Session, open_session
from hstu_compile.session_check import (
    Outputs,
    Progress,
    Reference,
    RuntimeCheck,
    VerifyReport,
    check_session,
    guarded_check,
    report_of,
)


def _eager_outputs(model: RetrievalModel, feed: Feed, top_k: int) -> Outputs:
    arguments = {name: torch.from_numpy(array) for name, array in feed.arrays.items()}
    activations = model.layer_activations(**arguments)
    users = model.user_embeddings(activations[-1], arguments["seq_offsets"])
    outputs = {"user_embeddings": users}
    if top_k:
        items = model.top_items(users, model.item_vectors(), arguments["item_ids"], arguments["seq_offsets"], top_k)
        outputs |= {"top_items": items.ids, "top_scores": items.scores}
    outputs |= {f"{TAP_PREFIX}{i}": activation for i, activation in enumerate(activations)}
    return {
        name: (value.float() if value.dtype in (torch.float16, torch.bfloat16) else value).numpy()
        for name, value in outputs.items()
    }


def reference_from_spec(
    spec: CheckpointSpec, precision: Precision, feeds: Sequence[Feed], top_k: int, progress: Progress
) -> Reference:
    """Run the eager model in float64 and in the build's precision on every feed."""
    exact_model = model_from_spec(spec, torch.float64)
    eager_model = model_from_spec(spec, TORCH_DTYPES[precision])
    exact, eager = [], []
    for index, feed in enumerate(feeds):
        progress("eager model", index, len(feeds))
        with torch.inference_mode():
            exact.append(_eager_outputs(exact_model, feed, top_k))
            eager.append(_eager_outputs(eager_model, feed, top_k))
    progress("eager model", len(feeds), len(feeds))
    float_tensors = [name for name in exact[0] if name not in ("top_items", "top_scores")]
    eager_error = {
        name: max(row_error(low[name], high[name]).error for low, high in zip(eager, exact, strict=True))
        for name in float_tensors
    }
    return Reference(tuple(feeds), tuple(exact), tuple(eager), eager_error, exact_model.item_vectors().numpy())


def verify_artifacts(
    graph: OnnxGraph,
    engine: EngineArtifact | None,
    reference: Reference,
    plugin_library: Path | None,
    progress: Progress,
) -> VerifyReport:
    """Check the shipped graph in ONNX Runtime, layer by layer, and the engine where it can run.

    Args:
        graph: as it is written to the bundle.
        engine: as it is written to the bundle, or None.
        reference: of the same checkpoint and precision.
        plugin_library: plugin that the engine needs, or None.
        progress: called with (what, done, total).

    Raises:
        VerifyError: HSTU-E602, if ONNX Runtime is not installed: then nothing could be verified.
    """
    taps = [name for name in reference.exact[0] if name.startswith(TAP_PREFIX)]

    def check(artifact: str) -> Callable[[Session], RuntimeCheck]:
        return lambda session: check_session(session, artifact, reference, graph.precision, progress)

    runs = [
        guarded_check(
            "onnxruntime",
            "model.onnx",
            lambda: open_session("onnxruntime", onnx=graph.model, taps=taps),
            check("model.onnx"),
        )
    ]
    if runs[0].status == "NOT RUN":
        raise VerifyError(
            "HSTU-E602",
            "model.onnx could not be run",
            runs[0].reason or "",
            "install onnxruntime (pip install 'hstu-compile[cpu]'), or build with --no-verify",
        )
    if engine is not None:
        runs.append(
            guarded_check(
                engine.backend,
                "model.engine",
                lambda: open_session(
                    engine.backend,
                    engine=engine.plan,
                    plugin_library=plugin_library if engine.backend == "tensorrt" else None,
                    allow_tf32=graph.precision != "fp32",
                ),
                check("model.engine"),
            )
        )
    return report_of(runs, reference, graph.precision)
