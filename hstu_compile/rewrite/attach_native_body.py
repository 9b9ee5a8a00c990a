"""Give hstu::HstuAttention a body of native operators, for runtimes that have no plugin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from hstu_compile.op_schema import attention_contract, is_attention, node_attributes
from hstu_compile.rewrite._function_builder import FunctionBuilder
from hstu_compile.rewrite._pass import Pass, PassResult


class AttachNativeBody(Pass):
    """Add one ONNX local function per distinct set of attributes.

    A runtime without the plugin inlines the function; real TensorRT prefers the registered plugin and never reads it.
    The body pads each sequence to `max_seq_len` (never the batch to one long sequence), computes in float32 whatever
    the type of q, k, v, and gathers the rows back. On half-valued operands TF32 tensor cores compute the same products
    exactly, with float32's range, so the scores can neither overflow nor vanish.

    Cases: 1. all layers share their attributes: one function; 2. they differ: one overload each.
    """

    name = "attach_native_body"

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers

    def call(self, model: onnx.ModelProto) -> PassResult:
        contract = attention_contract()
        if any(f.domain == contract.namespace and f.name == contract.name for f in model.functions):
            return PassResult({"functions": 0})
        opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        thresholds = {i.name: i.dims[0] for i in model.graph.initializer if len(i.dims) == 1}
        overloads: dict[tuple[Any, ...], str] = {}
        for node in model.graph.node:
            if not is_attention(node):
                continue
            attributes = node_attributes(node)
            names = [each.name for each in contract.present_inputs(attributes)]
            num_buckets = thresholds[node.input[names.index("ts_thresholds")]] if attributes["time_bias"] else 0
            key = (*sorted(attributes.items()), num_buckets)
            if key not in overloads:
                overloads[key] = f"v{len(overloads)}" if overloads else ""
                model.functions.append(native_body(attributes, num_buckets, opset, overloads[key]))
            node.overload = overloads[key]
        return PassResult({"functions": len(overloads)})

    def ensures(self, model: onnx.ModelProto, result: PassResult) -> None:
        have = {(f.domain, f.name, f.overload) for f in model.functions}
        served = sum(is_attention(n) and (n.domain, n.op_type, n.overload) in have for n in model.graph.node)
        self.expect(PassResult({"attention": served}), "attention", self._num_layers)


def native_body(attributes: Mapping[str, Any], num_buckets: int, opset: int, overload: str = "") -> onnx.FunctionProto:
    """The function for one set of attributes.

    Args:
        attributes: the contract's attributes.
        num_buckets: length of ts_thresholds; 0 without time bias.
        opset: ONNX opset of the model.
        overload: ONNX function overload; empty for the first.
    """
    contract = attention_contract()
    body = _NativeBody(attributes, num_buckets)
    return body.builder.function(
        contract.namespace,
        contract.name,
        [each.name for each in contract.present_inputs(attributes)],
        body.output(),
        [attribute.name for attribute in contract.attributes] + ["plugin_version", "plugin_namespace"],
        opset,
        overload,
    )


class _Bounds:
    """Offsets of rows: the bounds and lengths of the sequences, and whether they are legal."""

    def __init__(self, b: FunctionBuilder, offsets: str, rows_of: str) -> None:
        self.builder = b
        self.offsets = b.cast(offsets, TensorProto.INT64)
        self.starts = b.op("Slice", self.offsets, b.ints(0), b.ints(-1), b.ints(0))
        self.ends = b.op("Slice", self.offsets, b.ints(1), b.ints(np.iinfo(np.int64).max), b.ints(0))
        self.total = b.op("Slice", self.offsets, b.ints(-1), b.ints(np.iinfo(np.int64).max), b.ints(0))
        self.lengths = b.op("Sub", self.ends, self.starts)
        self.num_rows = b.op("Shape", rows_of, start=0, end=1)
        self.are_valid = self._are_valid()

    def _are_valid(self) -> str:
        """[1] bool: 0 == offsets[0] <= ... <= offsets[B] <= L. Otherwise no row is read or written: all of out is 0."""
        b = self.builder
        descents = b.op("ReduceSum", b.cast(b.op("Less", self.ends, self.starts), TensorProto.INT64), b.ints(0))
        is_ascending = b.op("Equal", descents, b.ints(0))
        starts_at_zero = b.op("Equal", b.op("Slice", self.offsets, b.ints(0), b.ints(1), b.ints(0)), b.ints(0))
        fits = b.op("LessOrEqual", self.total, self.num_rows)
        return b.op("And", b.op("And", is_ascending, starts_at_zero), fits)


class _Side:
    """Rows of queries or keys: their lengths, and the index that pads them.

    Rows behind a sequence read the zero row that `padded` appends: garbage there never enters the sums.

    Args:
        rows: bounds of the rows.
        bound: most rows of one sequence, cached ones included.
        cached: bounds of the rows in front of them, which are tensors of their own; None without a cache.
    """

    def __init__(self, rows: _Bounds, bound: int, cached: _Bounds | None = None) -> None:
        self.builder = b = rows.builder
        self.rows, self.bound = rows, bound
        self.lengths, self.are_valid = rows.lengths, rows.are_valid
        self.steps = b.constant(np.arange(bound)[None, :])
        starts, num_rows = rows.starts, rows.num_rows
        index = b.op("Add", b.unsqueeze(starts, 1), self.steps)
        if cached is not None:
            self.lengths = b.op("Add", cached.lengths, rows.lengths)
            self.are_valid = b.op("And", cached.are_valid, rows.are_valid)
            starts, num_rows = b.op("Add", cached.starts, starts), b.op("Add", cached.num_rows, num_rows)
            cached_len = b.unsqueeze(cached.lengths, 1)
            in_cache = b.op("Add", b.unsqueeze(cached.starts, 1), self.steps)
            in_rows = b.op("Sub", b.op("Add", index, cached.num_rows), cached_len)
            index = b.op("Where", b.op("Less", self.steps, cached_len), in_cache, in_rows)
        inside = b.op("And", b.op("Less", self.steps, b.unsqueeze(self.lengths, 1)), self.are_valid)
        self.index = b.op("Where", inside, index, num_rows)
        # Of tensors in which the rows of both are joined already: a sequence starts where its two parts do, added.
        self.joined_index = self.index
        if cached is not None:
            self.joined_index = b.op("Where", inside, b.op("Add", b.unsqueeze(starts, 1), self.steps), num_rows)

    def padded(self, *parts: str) -> str:
        """Cached rows, if there are any, and rows, [L, ...] each -> [B, bound, ...] with zeros behind each sequence."""
        return self._gathered(parts, self.index)

    def padded_joined(self, rows: str) -> str:
        """The same of one tensor that holds cached rows and rows of each sequence together."""
        return self._gathered((rows,), self.joined_index)

    def _gathered(self, parts: tuple[str, ...], index: str) -> str:
        b = self.builder
        shape = b.op("Concat", b.ints(1), b.op("Shape", parts[-1], start=1), axis=0)
        zero = b.op("CastLike", b.op("Expand", b.constant(0.0, np.float32), shape), parts[-1])
        return b.op("Gather", b.op("Concat", *parts, zero, axis=0), index, axis=0)


class _NativeBody:
    """Builds the body; the names of the parts are those of `hstu_compile.model`."""

    def __init__(self, attributes: Mapping[str, Any], num_buckets: int) -> None:
        self.a = attributes
        self.num_buckets = num_buckets
        self.builder = b = FunctionBuilder()
        self.q_side = _Side(_Bounds(b, "q_offsets", "q"), attributes["max_query_len"])
        cached = _Bounds(b, "cache_offsets", "k_cached") if attributes["has_cache"] else None
        self.k_side = _Side(_Bounds(b, "k_offsets", "k"), attributes["max_seq_len"], cached)
        shift = b.op("Sub", self.k_side.lengths, self.q_side.lengths)
        self.query_pos = b.unsqueeze(b.op("Add", self.q_side.steps, b.unsqueeze(shift, 1)), 2)
        self.key_pos = b.constant(np.arange(attributes["max_seq_len"])[None, None, :])
        self.key_len = b.unsqueeze(self.k_side.lengths, 1, 2)
        self.history = self.key_len
        if attributes["has_num_targets"]:
            targets = b.unsqueeze(b.cast("num_targets", TensorProto.INT64), 1, 2)
            targets = b.op("Min", b.op("Max", targets, b.constant(0)), self.key_len)
            self.history = b.op("Sub", self.key_len, targets)

    def output(self) -> str:
        """[Lq, H, Dv] in the type of q."""
        b = self.builder
        keys, values = (["k_cached", "k"], ["v_cached", "v"]) if self.a["has_cache"] else (["k"], ["v"])
        q = b.op("Transpose", self._wide(self.q_side, "q"), perm=[0, 2, 1, 3])
        k_t = b.op("Transpose", self._wide(self.k_side, *keys), perm=[0, 2, 3, 1])
        v = b.op("Transpose", self._wide(self.k_side, *values), perm=[0, 2, 1, 3])
        scores = b.op("Mul", b.op("MatMul", q, k_t), b.constant(self.a["alpha"], np.float32))
        for bias in self._biases():
            scores = b.op("Add", scores, bias)
        weights = b.op("Mul", scores, b.op("Sigmoid", scores))
        valid = b.unsqueeze(self._valid_attn_mask(), 1)
        weights = b.op("Where", valid, weights, b.constant(0.0, np.float32))
        out = b.op("Div", b.op("MatMul", weights, v), self._scaling())
        return b.op("CastLike", self._jagged(b.op("Transpose", out, perm=[0, 2, 1, 3])), "q")

    def _wide(self, side: _Side, *parts: str) -> str:
        return self.builder.cast(side.padded(*parts), TensorProto.FLOAT)

    def _scaling(self) -> str:
        b = self.builder
        if self.a["has_scaling_seq_lens"]:
            return b.unsqueeze("scaling_seq_lens", 1, 2, 3)
        return b.constant(self.a["scaling_seq_len"], np.float32)

    def _jagged(self, padded: str) -> str:
        """[B, bound, H, Dv] float -> [Lq, H, Dv]; rows outside every sequence are zero."""
        b, side, queries = self.builder, self.q_side, self.q_side.rows
        num_rows = b.op("Squeeze", queries.num_rows, b.ints(0))
        rows = b.op("Range", b.constant(0), num_rows, b.constant(1))
        passed = b.op("LessOrEqual", b.unsqueeze(queries.ends, 0), b.unsqueeze(rows, 1))
        owner = b.op("ReduceSum", b.cast(passed, TensorProto.INT64), b.ints(1), keepdims=0)
        batch = b.op("Shape", queries.starts)
        # Not below 0 either: a batch of no sequences still has the one offset that is read here.
        owner = b.op("Max", b.op("Min", owner, b.op("Sub", batch, b.ints(1))), b.ints(0))
        step = b.op("Sub", rows, b.op("Gather", queries.offsets, owner))
        bound = b.constant(side.bound)
        inside = b.op("And", b.op("Less", step, bound), b.op("Less", rows, queries.total))
        inside = b.op("And", inside, queries.are_valid)
        index = b.op("Add", b.op("Mul", owner, bound), step)
        zero_row = b.op("Mul", batch, bound)
        index = b.op("Where", inside, index, zero_row)
        row_shape = b.op("Shape", padded, start=2)
        flat = b.op("Reshape", padded, b.op("Concat", b.ints(-1), row_shape, axis=0))
        zero = b.op("Expand", b.constant(0.0, np.float32), b.op("Concat", b.ints(1), row_shape, axis=0))
        return b.op("Gather", b.op("Concat", flat, zero, axis=0), index, axis=0)

    def _contextual_seq_len(self) -> str | None:
        b = self.builder
        if self.a["has_contextual_seq_lens"]:
            return b.unsqueeze(b.cast("contextual_seq_lens", TensorProto.INT64), 1, 2)
        return b.constant(self.a["contextual_seq_len"]) if self.a["contextual_seq_len"] else None

    def _valid_attn_mask(self) -> str:
        """[B, Nq, Nk] bool. Rows and columns behind a sequence are zero in q, k and v, and need no mask."""
        b, context = self.builder, self._contextual_seq_len()
        causal = b.op("LessOrEqual", self.key_pos, self.query_pos)
        base = causal
        in_history = b.op("Less", self.key_pos, self.history)
        if self.a["has_num_targets"]:
            is_target = b.op("GreaterOrEqual", self.query_pos, self.history)
            key_is_target = b.op("Not", in_history)
            same = b.op("Equal", self._target_group(self.query_pos), self._target_group(self.key_pos))
            both = b.op("And", b.op("And", is_target, key_is_target), same)
            base = b.op("And", causal, b.op("Or", in_history, both))
        if self.a["max_attn_len"]:
            base = b.op("And", base, self._window(context))
        if context is not None:
            is_context = b.op("Less", self.query_pos, context)
            sees = b.op("Or", in_history, b.op("Equal", self.key_pos, self.query_pos))
            base = b.op("Or", b.op("And", is_context, sees), b.op("And", b.op("Not", is_context), base))
        if self.a["has_num_targets"] or context is not None or self.a["max_query_len"] > 1:
            base = b.op("And", base, b.op("GreaterOrEqual", self.query_pos, b.constant(0)))
        return base

    def _target_group(self, row: str) -> str:
        # Integer division of negative numbers rounds differently between runtimes; history rows are masked anyway.
        b = self.builder
        distance = b.op("Max", b.op("Sub", row, self.history), b.constant(0))
        return b.op("Div", distance, b.constant(self.a["target_group_size"]))

    def _window(self, context: str | None) -> str:
        b = self.builder
        zero = b.constant(0)
        shift = zero if context is None else b.op("Max", b.op("Sub", context, b.constant(1)), zero)

        def position(row: str) -> str:
            moved = b.op("Sub", b.op("Min", row, self.history), shift)
            return moved if context is None else b.op("Where", b.op("Less", row, context), zero, moved)

        query_position = position(self.query_pos)
        gap = b.op("Sub", query_position, position(self.key_pos))
        near = b.op("LessOrEqual", gap, b.constant(self.a["max_attn_len"]))
        if not self.a["min_full_attn_seq_len"]:
            return near
        first_full = b.op("Sub", b.op("Sub", self.history, shift), b.constant(self.a["min_full_attn_seq_len"]))
        return b.op("Or", near, b.op("GreaterOrEqual", query_position, first_full))

    def _biases(self) -> list[str]:
        biases = []
        if self.a["pos_bias"]:
            biases.append(self._position_bias())
        if self.a["time_bias"]:
            biases.append(self._time_bias())
        return biases

    def _position_bias(self) -> str:
        """[B, Hp, Nq, Nk]: pos_table[origin + min(j, h) - min(i, h)]."""
        b = self.builder
        entries = b.op("Shape", "pos_table", start=1, end=2)
        origin = b.op("Div", b.op("Sub", entries, b.ints(1)), b.ints(2))
        row, column = self.query_pos, self.key_pos
        if self.a["has_num_targets"]:
            row, column = b.op("Min", row, self.history), b.op("Min", column, self.history)
        index = b.op("Add", b.op("Sub", column, row), origin)
        last = b.op("Sub", entries, b.ints(1))
        index = b.op("Min", b.op("Max", index, b.constant(0)), last)
        return b.op("Transpose", b.op("Gather", "pos_table", index, axis=1), perm=[1, 0, 2, 3])

    def _time_bias(self) -> str:
        """[B, Ht, Nq, Nk]: ts_table[number of thresholds <= |row time - column time|], by binary search on integers."""
        b = self.builder
        thresholds = b.cast("ts_thresholds", TensorProto.INT64)
        row = b.unsqueeze(self.q_side.padded(b.cast("row_timestamps", TensorProto.INT64)), 2)
        column = b.unsqueeze(self.k_side.padded_joined(b.cast("col_timestamps", TensorProto.INT64)), 1)
        gap = b.op("Abs", b.op("Sub", row, column))
        bucket: str | None = None
        step = 1 << (self.num_buckets.bit_length() - 1)
        while step:
            candidate = b.constant(step) if bucket is None else b.op("Add", bucket, b.constant(step))
            # A candidate beyond the last bucket reads the last threshold, and is cut off by the minimum below.
            probe = b.op("Min", b.op("Sub", candidate, b.constant(1)), b.constant(self.num_buckets - 1))
            reached = b.op("LessOrEqual", b.op("Gather", thresholds, probe), gap)
            bucket = b.op("Where", reached, candidate, b.constant(0) if bucket is None else bucket)
            step >>= 1
        assert bucket is not None
        bucket = b.op("Min", bucket, b.constant(self.num_buckets))
        return b.op("Transpose", b.op("Gather", "ts_table", bucket, axis=1), perm=[1, 0, 2, 3])
