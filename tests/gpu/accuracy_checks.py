"""Where a float32 TensorRT 8.5 engine loses accuracy: checks with the table of layer_taps.py as their facts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from checks import Checks, Finished
from layer_taps import FUNCTIONS, accuracy_table, function_errors, function_model, tapped_model, with_tanh
from references import PreparedModel

from hstu_compile.artifacts import Profile
from hstu_compile.compare import error_bound, row_error
from hstu_compile.engine import engine_from_onnx
from hstu_compile.runtime.session import open_session

#: Models whose values are compared inside the layers, with the feed (by index) on which float32 is hardest.
TAPPED_FEEDS = {"deep-fp32": 3, "cycled-fp32": 1}
#: As the engine stage spells SiLU, and, as a control, as TensorRT 8.5 spells a Sigmoid by itself.
SPELLINGS = ("shipped", "tanh")
_SILU_TENSORS = ("u", "v", "q", "k")


def tapped_graph(model: PreparedModel, spelling: str, engine: Path) -> Path:
    """Write the graph with layer values as outputs beside where its engine will lie."""
    graph = onnx.load(model.onnx)
    path = engine.with_suffix(".onnx")
    onnx.save(tapped_model(with_tanh(graph) if spelling == "tanh" else graph), path)
    return path


def silu_expression(layers: Path) -> list[str]:
    """How the inspector writes the first pointwise layer that has an exponential or a tanh; empty if none has."""
    entries = json.loads(layers.read_text(encoding="utf-8"))["Layers"]
    expressions = [entry["Operations"] for entry in entries if entry.get("ParameterType") == "PointWise"]
    return next((steps for steps in expressions if any("Tanh" in step or "Exp" in step for step in steps)), [])


def check_layers(
    checks: Checks, model: PreparedModel, spelling: str, engine: Path, done: Finished, plugin: Path
) -> None:
    """Row errors of every value of every layer; as shipped, each SiLU alone must meet the float32 bound."""
    index = TAPPED_FEEDS[model.name]
    feed, exact = model.reference.feeds[index], model.reference.exact[index]["user_embeddings"]
    with checks.check(f"{model.name}, SiLU {spelling}: accuracy inside the layers") as check:
        check.facts |= {"feed": feed.name, "exit_code": done.exit_code, "stderr": done.stderr[-2000:]}
        with open_session("tensorrt", engine=engine, plugin_library=plugin) as session:
            outputs = session.run(feed.arrays)
        table = accuracy_table(onnx.load(model.onnx), feed.arrays, outputs)
        worst_silu = max(row["own_worst"] for row in table if row["tensor"] in _SILU_TENSORS)
        check.facts |= {
            "silu": silu_expression(engine.with_suffix(".layers.json")),
            "user_embeddings": row_error(outputs["user_embeddings"], exact).error,
            "worst_silu": worst_silu,
            "table": table,
        }
        is_complete = len(table) == 7 * model.num_layers and np.isfinite(worst_silu)
        check.passed = bool(is_complete and (spelling == "tanh" or worst_silu <= error_bound(0.0, "fp32")))


def check_functions(checks: Checks) -> None:
    """Accuracy of what pointwise layers are made of; SiLU as shipped must be accurate relative to its own value."""
    with checks.check("accuracy of exp, tanh and both spellings of SiLU") as check:
        half = np.geomspace(1e-4, 30, 4000, dtype=np.float32)
        x = np.concatenate([-half, half])
        profile = Profile("functions", {"x": (1,)}, {"x": x.shape}, {"x": x.shape})
        engine = engine_from_onnx(function_model(), backend="tensorrt", profiles=(profile,))
        with open_session("tensorrt", engine=engine.plan) as session:
            errors = function_errors(x, session.run({"x": x}))
        check.facts["functions"] = errors
        check.passed = set(errors) == set(FUNCTIONS) and errors["silu_by_exp"]["worst"] <= error_bound(0.0, "fp32")
