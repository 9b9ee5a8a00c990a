"""Where an engine loses accuracy: values inside every layer against float64, each by itself and all together.

NumPy and onnx alone, so that it runs beside TensorRT 8.5. A tapped graph gives these values of each layer as further
outputs: the uvqk projection, its SiLU (u, v, q, k), the attention, and the layer's result. Each has two errors:

- own: against float64 arithmetic on the inputs that the engine itself gave that step, so only this step's error;
- total: against a float64 run from the engine's embeddings on, so with everything that earlier steps did wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.compare import row_errors
from tests.oracle import AttentionAttrs, attention_ref64

Array = NDArray[Any]

#: Functions that an engine's layers are made of, as one graph over a vector.
FUNCTIONS = ("exp", "tanh", "sigmoid_by_tanh", "silu_by_tanh", "silu_by_exp")


@dataclasses.dataclass(frozen=True)
class LayerTaps:
    """Names of one layer's values in the shipped graph.

    Attributes:
        projection: [L, P] before SiLU.
        silu: [L, P] after it: u, v, q, k side by side.
        widths: of u, v, q, k.
        attention: [L, H, linear_dim].
        result: [L, D] -- the residual stream after the layer.
    """

    projection: str
    silu: str
    widths: tuple[int, ...]
    attention: str
    result: str


def _constants(model: onnx.ModelProto) -> dict[str, Array]:
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return values


def layer_taps(model: onnx.ModelProto) -> tuple[LayerTaps, ...]:
    """The values of every layer, found from its attention node."""
    producers = {name: node for node in model.graph.node for name in node.output}
    constants = _constants(model)
    layers = []
    for node in model.graph.node:
        if node.op_type != "HstuAttention":
            continue
        split = producers[producers[node.input[0]].input[0]]
        silu = producers[split.input[0]]
        if (split.op_type, silu.op_type) != ("Split", "Mul"):
            raise ValueError(f"{node.name} reads {split.op_type} of {silu.op_type}; Split of Mul (SiLU) was expected")
        widths = tuple(int(width) for width in constants[split.input[1]])
        projection = next(name for name in silu.input if producers[name].op_type != "Sigmoid")
        layers.append(LayerTaps(projection, silu.output[0], widths, node.output[0], f"layer_{len(layers) + 1}"))
    return tuple(layers)


def tapped_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that also gives `layer_0`, the embeddings, and every value of `layer_taps`."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    values = {value.name: value for value in copy.graph.value_info}
    given = {value.name for value in copy.graph.output}
    taps = [name for t in layer_taps(model) for name in (t.projection, t.silu, t.attention, t.result)]
    copy.graph.output.extend(values[name] for name in ["layer_0", *taps] if name not in given)
    return copy


def with_tanh(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose sigmoids are 0.5 + 0.5 * tanh(0.5 * x), as TensorRT 8 writes a Sigmoid by itself."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes += _tanh_nodes(node.input[0], node.output[0]) if node.op_type == "Sigmoid" else [node]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    copy.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "half"))
    return copy


def _norm(attributes: Mapping[str, Any], inputs: Sequence[Array]) -> Array:
    """hstu::HstuNorm as research models have it: a layer norm, gated or not."""
    beyond = ("num_groups", 1), ("gate_silu", 0), ("concat", 0), ("has_shift", 0)
    if attributes["activation"] == 2 or any(attributes[name] != value for name, value in beyond):
        raise ValueError(f"an HstuNorm of {attributes} is not part of a research layer")
    x, scale, *rest = inputs
    centred = x - x.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + attributes["epsilon"]) * scale
    if attributes["has_bias"]:
        normed = normed + rest.pop(0)
    return rest[0] * normed if attributes["activation"] == 1 else normed


def _tanh_nodes(x: str, output: str) -> list[onnx.NodeProto]:
    steps = (
        ("Mul", [x, "half"], f"{output}/scaled"),
        ("Tanh", [f"{output}/scaled"], f"{output}/tanh"),
        ("Mul", [f"{output}/tanh", "half"], f"{output}/halved"),
        ("Add", [f"{output}/halved", "half"], output),
    )
    return [helper.make_node(op, inputs, [result], name=result) for op, inputs, result in steps]


def function_model() -> onnx.ModelProto:
    """`FUNCTIONS` of a float32 vector x."""
    nodes = [
        helper.make_node("Exp", ["x"], ["exp"]),
        helper.make_node("Tanh", ["x"], ["tanh"]),
        *_tanh_nodes("x", "sigmoid_by_tanh"),
        helper.make_node("Mul", ["x", "sigmoid_by_tanh"], ["silu_by_tanh"]),
        helper.make_node("Neg", ["x"], ["negated"]),
        helper.make_node("Exp", ["negated"], ["exp_negated"]),
        helper.make_node("Add", ["exp_negated", "one"], ["denominator"]),
        helper.make_node("Div", ["x", "denominator"], ["silu_by_exp"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["L"]) for name in ("x", *FUNCTIONS)]
    constants = [numpy_helper.from_array(np.array(v, np.float32), n) for n, v in (("half", 0.5), ("one", 1.0))]
    graph = helper.make_graph(nodes, "functions", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def function_errors(x: Array, outputs: Mapping[str, Array]) -> dict[str, dict[str, float]]:
    """Error of each function relative to its own value: median, worst, and where the worst is.

    Args:
        x: [L] float32, without 0.
        outputs: [L] float32 of each of `FUNCTIONS`.
    """
    wide = x.astype(np.float64)
    sigmoid = 1.0 / (1.0 + np.exp(-wide))
    exact = {"exp": np.exp(wide), "tanh": np.tanh(wide), "sigmoid_by_tanh": sigmoid}
    exact |= {"silu_by_tanh": wide * sigmoid, "silu_by_exp": wide * sigmoid}
    table = {}
    for name in FUNCTIONS:
        errors = np.abs(outputs[name].astype(np.float64) - exact[name]) / np.abs(exact[name])
        worst = int(np.argmax(errors))
        table[name] = {"median": float(np.median(errors)), "worst": float(errors[worst]), "worst_x": float(x[worst])}
    return table


class Float64Graph:
    """Float64 arithmetic on the shipped graph's layers, from any values that are known.

    Args:
        model: the shipped graph of a research model: causal attention with position and time bias.
        feeds: its inputs.
    """

    def __init__(self, model: onnx.ModelProto, feeds: Mapping[str, Array]) -> None:
        self._producers = {name: node for node in model.graph.node for name in node.output}
        self._constants = _constants(model)
        self._feeds = feeds
        self._row_timestamps = _next_timestamps(feeds)

    def values(self, names: Sequence[str], known: Mapping[str, Array]) -> dict[str, Array]:
        """Compute values by name, going back no further than to what is known."""
        found: dict[str, Array] = {name: value.astype(np.float64) for name, value in known.items()}
        return {name: self._value(name, found) for name in names}

    def _value(self, name: str, found: dict[str, Array]) -> Array:
        if name not in found:
            if name in self._constants:
                return self._constants[name]
            node = self._producers[name]
            for output, value in zip(node.output, self._computed(node, found), strict=True):
                found.setdefault(output, value)
        return found[name]

    def _computed(self, node: onnx.NodeProto, found: dict[str, Array]) -> list[Array]:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "HstuAttention":
            return [self._attention(node, attributes, found)]
        inputs = [self._value(name, found) for name in node.input]
        if node.op_type == "HstuNorm":
            return [_norm(attributes, [value.astype(np.float64) for value in inputs])]
        if node.op_type == "Split":
            return np.split(inputs[0], np.cumsum(inputs[1])[:-1], axis=attributes["axis"])
        if node.op_type == "Reshape":
            return [inputs[0].reshape(inputs[1])]
        wide = [value.astype(np.float64) for value in inputs]
        operations = {
            "MatMul": lambda: wide[0] @ wide[1],
            "Mul": lambda: wide[0] * wide[1],
            "Add": lambda: wide[0] + wide[1],
            "Sigmoid": lambda: 1.0 / (1.0 + np.exp(-wide[0])),
        }
        if node.op_type not in operations:
            raise ValueError(f"{node.op_type} {node.name} is not part of a layer")
        return [operations[node.op_type]()]

    def _attention(self, node: onnx.NodeProto, attributes: Mapping[str, Any], found: dict[str, Array]) -> Array:
        optional = ("has_num_targets", "has_contextual_seq_lens", "has_scaling_seq_lens")
        if any(attributes[name] for name in optional) or not (attributes["pos_bias"] and attributes["time_bias"]):
            raise ValueError(f"{node.name} is not a research model's attention")
        q, k, v = (self._value(name, found) for name in node.input[:3])
        pos_table, ts_table, thresholds = (self._constants[name] for name in node.input[7:10])
        names = ("alpha", "scaling_seq_len", "target_group_size", "contextual_seq_len", "max_attn_len")
        attrs = AttentionAttrs(
            **{name: attributes[name] for name in (*names, "min_full_attn_seq_len")},
            pos_table_len=(pos_table.shape[-1] + 1) // 2,
        )
        offsets = self._feeds["seq_offsets"]
        return attention_ref64(
            q,
            k,
            v,
            offsets,
            offsets,
            row_timestamps=self._row_timestamps,
            col_timestamps=self._feeds["timestamps"].astype(np.int64),
            pos_table=pos_table,
            ts_table=ts_table,
            ts_thresholds=thresholds,
            attrs=attrs,
        ).out


def _next_timestamps(feeds: Mapping[str, Array]) -> Array:
    """[L] int64: the next event's timestamp, after the last one the request's."""
    following = np.roll(feeds["timestamps"].astype(np.int64), -1)
    lengths = np.diff(feeds["seq_offsets"])
    following[feeds["seq_offsets"][1:][lengths > 0] - 1] = feeds["request_timestamps"][lengths > 0]
    return following


def accuracy_table(model: onnx.ModelProto, feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> list[Any]:
    """Median and worst row error of every value of every layer.

    Args:
        model: the shipped graph, without taps.
        feeds: the request, as the engine took it.
        outputs: what the engine of `tapped_model` answered.

    Returns:
        One row per layer and tensor: projection, u, v, q, k, attention, result.
    """
    layers, exact = layer_taps(model), Float64Graph(model, feeds)
    names = [name for taps in layers for name in (taps.projection, taps.silu, taps.attention, taps.result)]
    measured = {name: outputs[name] for name in ["layer_0", *names]}
    total = exact.values(names, {"layer_0": measured["layer_0"]})
    own = {name: exact.values([name], {n: v for n, v in measured.items() if n != name})[name] for name in names}
    table = []
    for layer, taps in enumerate(layers):
        for tensor, name, columns in _tensors(taps):
            row: dict[str, Any] = {"layer": layer, "tensor": tensor}
            for kind, reference in (("own", own), ("total", total)):
                errors = row_errors(measured[name][:, columns], reference[name][:, columns])
                row |= {f"{kind}_median": float(np.median(errors)), f"{kind}_worst": float(errors.max())}
                row[f"{kind}_worst_row"] = int(np.argmax(errors))
            table.append(row)
    return table


def _tensors(taps: LayerTaps) -> list[tuple[str, str, slice]]:
    """Label, value and columns of each row of the table."""
    ends = np.cumsum(taps.widths)
    parts = [(label, taps.silu, slice(end - w, end)) for label, end, w in zip("uvqk", ends, taps.widths, strict=True)]
    everything = slice(None)
    first = [("projection", taps.projection, everything), *parts]
    return [*first, ("attention", taps.attention, everything), ("result", taps.result, everything)]
