"""Meta's DLRM-HSTU once more, in float64 NumPy, one user at a time; and small checkpoints of that family.

Written from the family's specification and sharing no code with hstu_compile.model. Each `trap` replaces one detail by
what is easily mistaken for it: a test that agrees with the plain form and with a trapped one could not fail.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]
Weights = dict[str, Array]
Trap = Literal[
    "silu-on-all",
    "silu-on-none",
    "uqkv-order",
    "per-head-layout",
    "alpha-1",
    "own-length-divisor",
    "configured-divisor",
    "concat-order",
    "concat-normed",
    "gated-only",
    "joint-norm",
    "residual-normed",
    "layer-eps-1e-5",
    "mlp-eps-1e-6",
    "postprocessor-eps-1e-6",
    "silu-of-norm",
    "candidates-see-earlier-ones",
    "contextual-tokens-see-all",
    "forward-positions",
    "candidates-count-on",
    "positions-without-context",
    "no-sqrt-d",
    "anchor-at-last-event",
    "own-anchor",
    "float32-times",
    "other-clamp",
    "log10-buckets",
    "min-length-of-history",
    "token-of-absent-id-is-zero",
    "action-equality",
    "candidates-without-action",
    "candidates-with-first-action",
    "additional-in-content",
    "pi",
    "exact-hours",
    "sigmoid-everywhere",
    "item-times-normed-user",
]

USER, HISTORY, CANDIDATE = "user_id", "movie_id", "item_movie_id"
TIME, QUERY_TIME, ACTIONS = "action_timestamp", "item_query_time", "item_weights"

_PREPROCESSOR = "_hstu_transducer._input_preprocessor."
_ENCODER = "_hstu_transducer._positional_encoder."
_POSTPROCESSOR = "_hstu_transducer._output_postprocessor."
_ACTION_DIM = 8


@dataclasses.dataclass(frozen=True)
class DlrmForm:
    """One member of the family: sizes and switches.

    Attributes:
        contextual: name, max_length and min_uih_length of each contextual feature; its table has its name.
        additional: history ids beside the first one; the candidates' counterparts are named item_<name>.
        item_only: candidate ids that only the item tower reads.
        tasks: name and type of each task, the type as a configuration states it.
    """

    width: int = 12
    table_dim: int = 6
    hidden: int = 10
    tower_hidden: int = 14
    num_layers: int = 2
    num_heads: int = 2
    attention_dim: int = 5
    linear_dim: int = 7
    group_norm: bool = False
    contextual: tuple[tuple[str, int, int], ...] = ((USER, 1, 20),)
    additional: tuple[str, ...] = ()
    item_only: tuple[str, ...] = ()
    action_weights: tuple[int, ...] = (1, 2, 4, 8, 16)
    tasks: tuple[tuple[str, str | int], ...] = (("like", "BINARY_CLASSIFICATION"),)
    postprocessor: Literal["timestamp_layer_norm", "layer_norm", "l2_norm"] = "timestamp_layer_norm"
    time_bucket_clamp: Literal["embedding_dim", "table"] = "embedding_dim"
    time_bucket_fn: Literal["sqrt", "log"] = "sqrt"
    time_feature_precision: Literal["float32", "exact"] = "float32"
    min_history_counts: Literal["history_and_candidates", "history"] = "history_and_candidates"
    scaling_seq_len: float | str = "batch"
    num_positions: int = 30
    num_time_buckets: int = 50
    num_rows: int = 40
    max_seq_len: int = 60
    max_num_candidates: int = 8
    max_num_candidates_inference: int = 24

    @property
    def context(self) -> int:
        """C, contextual tokens."""
        return sum(length for _, length, _ in self.contextual)

    @property
    def history_ids(self) -> tuple[str, ...]:
        """Names of the history's ids."""
        return (HISTORY, *self.additional)

    @property
    def item_ids(self) -> tuple[str, ...]:
        """Names of the candidates' ids, as the item tower joins them."""
        return (CANDIDATE, *(f"item_{name}" for name in self.additional), *self.item_only)

    @property
    def max_history_len(self) -> int:
        """Most history events: the data loader of the original leaves this many."""
        return self.max_seq_len - self.max_num_candidates - self.context

    def user_config(self) -> dict[str, Any]:
        """What a user passes with --config."""
        return {
            "max_seq_len": self.max_seq_len,
            "max_num_candidates": self.max_num_candidates,
            "max_num_candidates_inference": self.max_num_candidates_inference,
            "hstu_num_heads": self.num_heads,
            "hstu_attn_linear_dim": self.linear_dim,
            "hstu_attn_qk_dim": self.attention_dim,
            "hstu_attn_num_layers": self.num_layers,
            "hstu_embedding_table_dim": self.table_dim,
            "hstu_preprocessor_hidden_dim": self.hidden,
            "hstu_transducer_embedding_dim": self.width,
            "hstu_group_norm": self.group_norm,
            "hstu_input_dropout_ratio": 0.1,
            "contextual_feature_to_max_length": {name: length for name, length, _ in self.contextual},
            "contextual_feature_to_min_uih_length": {name: least for name, _, least in self.contextual if least},
            "candidates_weight_feature_name": "item_action_weights",
            "candidates_watchtime_feature_name": "item_watch_time",
            "candidates_querytime_feature_name": QUERY_TIME,
            "multitask_configs": [{"task_name": n, "task_weight": 1, "task_type": kind} for n, kind in self.tasks],
            "user_embedding_feature_names": [*self.history_ids, *(name for name, _, _ in self.contextual)],
            "item_embedding_feature_names": list(self.item_ids),
            "uih_post_id_feature_name": HISTORY,
            "uih_action_time_feature_name": TIME,
            "uih_weight_feature_name": ACTIONS,
            "merge_uih_candidate_feature_mapping": [
                [HISTORY, CANDIDATE],
                [TIME, QUERY_TIME],
                [ACTIONS, "item_action_weights"],
                *([name, f"item_{name}"] for name in self.additional),
            ],
            "action_weights": list(self.action_weights) or None,
            "enable_postprocessor": self.postprocessor != "l2_norm",
            "use_layer_norm_postprocessor": self.postprocessor == "layer_norm",
            "time_bucket_clamp": self.time_bucket_clamp,
            "time_bucket_fn": self.time_bucket_fn,
            "time_feature_precision": self.time_feature_precision,
            "min_history_counts": self.min_history_counts,
            "scaling_seq_len": self.scaling_seq_len,
        }


def table_key(name: str) -> str:
    """Key of an embedding table."""
    return f"_embedding_collection.embeddings.{name}.weight"


def dlrm_state_dict(form: DlrmForm, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under the family's names, drawn so that every part of the model changes the result."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    state: dict[str, torch.Tensor] = {}

    def norm(weight: str, bias: str, width: int) -> None:
        state[weight] = 1 + draw(width, scale=0.3)
        state[bias] = draw(width, scale=0.3)

    def mlp(prefix: str, inputs: int, hidden: int, outputs: int, *, final_norm: bool = True) -> None:
        state[prefix + "0.weight"] = draw(hidden, inputs, scale=1.0 / math.sqrt(max(inputs, 1)))
        state[prefix + "0.bias"] = draw(hidden, scale=0.3)
        norm(prefix + "1.weight", prefix + "1.bias", hidden)
        state[prefix + "2.weight"] = draw(outputs, hidden, scale=1.0 / math.sqrt(hidden))
        state[prefix + "2.bias"] = draw(outputs, scale=0.3)
        if final_norm:
            norm(prefix + "3.weight", prefix + "3.bias", outputs)

    width, dim, context = form.width, form.table_dim, form.context
    for name in (*form.history_ids, *(name for name, _, _ in form.contextual), *form.item_only):
        state[table_key(name)] = draw(form.num_rows, dim, scale=0.7)
    if context:
        state[_PREPROCESSOR + "_batched_contextual_linear_weights"] = draw(context, dim, width, scale=0.4)
        state[_PREPROCESSOR + "_batched_contextual_linear_bias"] = draw(context, width, scale=0.4)
    mlp(_PREPROCESSOR + "_content_embedding_mlp.", dim, form.hidden, width)
    mlp(_PREPROCESSOR + "_additional_embedding_mlp.", dim * len(form.additional), form.hidden, width)
    if form.action_weights:
        actions = len(form.action_weights)
        encoder = _PREPROCESSOR + "_action_encoder."
        state[encoder + "_combined_action_weights"] = torch.tensor(form.action_weights)
        state[encoder + "_action_embedding_table"] = draw(actions, _ACTION_DIM, scale=0.7)
        state[encoder + "_target_action_embedding_table"] = draw(1, actions * _ACTION_DIM, scale=0.7)
        mlp(_PREPROCESSOR + "_action_embedding_mlp.", actions * _ACTION_DIM, form.hidden, width)
    state[_ENCODER + "_position_embeddings_weight"] = draw(form.num_positions, width, scale=1.0)
    state[_ENCODER + "_timestamp_embeddings_weight"] = draw(form.num_time_buckets + 1, width, scale=1.0)
    heads, inner = form.num_heads, form.num_heads * form.linear_dim
    packed = 2 * inner + 2 * heads * form.attention_dim
    for index in range(form.num_layers):
        prefix = f"_hstu_transducer._stu_module._stu_layers.{index}."
        state[prefix + "_uvqk_weight"] = draw(width, packed, scale=0.7)
        state[prefix + "_uvqk_beta"] = draw(packed, scale=0.3)
        norm(prefix + "_input_norm_weight", prefix + "_input_norm_bias", width)
        state[prefix + "_output_weight"] = draw(3 * inner, width, scale=1.0 / math.sqrt(inner))
        groups = heads if form.group_norm else inner
        norm(prefix + "_output_norm_weight", prefix + "_output_norm_bias", groups)
    if form.postprocessor != "l2_norm":
        norm(_POSTPROCESSOR + "_layer_norm.weight", _POSTPROCESSOR + "_layer_norm.bias", width)
    if form.postprocessor == "timestamp_layer_norm":
        state[_POSTPROCESSOR + "_period_units"] = torch.tensor([[3600.0, 86400.0]])
        state[_POSTPROCESSOR + "_units_per_period"] = torch.tensor([[24.0, 7.0]])
        state[_POSTPROCESSOR + "_time_feature_combiner.weight"] = draw(width, width + 4, scale=0.4)
        state[_POSTPROCESSOR + "_time_feature_combiner.bias"] = draw(width, scale=0.3)
    mlp("_item_embedding_mlp.", dim * len(form.item_ids), form.tower_hidden, width)
    mlp("_multitask_module._prediction_module.", width, form.tower_hidden, len(form.tasks), final_norm=False)
    return state


@dataclasses.dataclass(frozen=True)
class Request:
    """One user and what is asked about them.

    Attributes:
        context: ids by contextual feature, max_length each; negative is absent.
        history: ids by name, [U] each, oldest event first.
        times: [U] seconds of the events.
        actions: [U] bitmasks.
        candidates: ids by name, [T] each.
        query_times: [T] seconds.
    """

    context: dict[str, Array]
    history: dict[str, Array]
    times: Array
    actions: Array
    candidates: dict[str, Array]
    query_times: Array

    def only(self, chosen: Sequence[int]) -> Request:
        """The same request for some of its candidates, in the order given."""
        index = np.array(chosen, dtype=np.int64)
        candidates = {name: ids[index] for name, ids in self.candidates.items()}
        return dataclasses.replace(self, candidates=candidates, query_times=self.query_times[index])


def draw_requests(form: DlrmForm, sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Request]:
    """Requests of (events, candidates) each, with seconds, hours and days between events.

    Candidates have times of their own, before and behind that of the last one, at which the request is asked: just
    before a full hour, where a float32 timestamp falls into the next one.
    """
    rng = np.random.default_rng(seed)
    requests = []
    for events, candidates in sizes:
        gaps = np.floor(np.exp(rng.uniform(0, math.log(3e5), events + 1))).astype(np.int64)
        times = 1_400_000_000 + int(rng.integers(0, 10**6)) + np.cumsum(gaps)
        asked = int(times[events]) // 3600 * 3600 + 3600 - int(rng.integers(1, 40))
        query_times = asked - rng.integers(-4000, 20_000, candidates)
        query_times[-1:] = asked
        context = {}
        for name, length, _ in form.contextual:
            ids = rng.integers(0, form.num_rows, length)
            # Absent ids stand behind the others: the original pads short lists.
            context[name] = np.where(np.arange(length) < max(1, int(rng.integers(0, length + 1))), ids, -1)
        requests.append(
            Request(
                context,
                {name: rng.integers(0, form.num_rows, events) for name in form.history_ids},
                times[:events],
                rng.integers(0, 2 * max(form.action_weights, default=1), events),
                {name: rng.integers(0, form.num_rows, candidates) for name in form.item_ids},
                query_times,
            )
        )
    return requests


def _offsets(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths, dtype=np.int64).tolist()], dtype=torch.int32)


def packed_inputs(form: DlrmForm, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
    """The graph inputs of `packed` that hold the requests."""
    none = np.zeros(0, np.int64)

    def joined(rows: list[Array], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([none, *rows])).to(dtype)

    inputs = {name: joined([r.history[name] for r in requests], torch.int32) for name in form.history_ids}
    inputs[TIME] = joined([r.times for r in requests], torch.int64)
    if form.action_weights:
        inputs[ACTIONS] = joined([r.actions for r in requests], torch.int32)
    inputs |= {name: joined([r.context[name] for r in requests], torch.int32) for name, _, _ in form.contextual}
    inputs |= {name: joined([r.candidates[name] for r in requests], torch.int32) for name in form.item_ids}
    inputs[QUERY_TIME] = joined([r.query_times for r in requests], torch.int64)
    inputs["seq_offsets"] = _offsets([len(r.times) for r in requests])
    inputs["candidate_offsets"] = _offsets([len(r.query_times) for r in requests])
    return inputs


@dataclasses.dataclass(frozen=True)
class Expected:
    """Of a batch, in float64: rows of all users one after another.

    Attributes:
        activations: [sum of C + U + T, D] before the first layer and after each one.
        users: [sum of T, D] user embeddings.
        items: [sum of T, D] item embeddings.
        logits: [sum of T, tasks].
        preds: [sum of T, tasks].
    """

    activations: list[Array]
    users: Array
    items: Array
    logits: Array
    preds: Array

    def tensors(self) -> dict[str, Array]:
        """Everything by name."""
        layers = {f"activations {index}": rows for index, rows in enumerate(self.activations)}
        return layers | {"users": self.users, "items": self.items, "logits": self.logits, "preds": self.preds}


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * weight + bias


class _Reference:
    """The family's arithmetic on one set of weights."""

    def __init__(self, form: DlrmForm, weights: Weights, divisor: float, trap: Trap | None) -> None:
        self.form, self.weights, self.divisor, self.trap = form, weights, divisor, trap

    def rows(self, table: str, ids: Array) -> Array:
        return self.weights[table_key(table)][ids]

    def mlp(self, prefix: str, x: Array, *, final_norm: bool = True) -> Array:
        w = self.weights
        eps = 1e-6 if self.trap == "mlp-eps-1e-6" else 1e-5
        hidden = x @ w[prefix + "0.weight"].T + w[prefix + "0.bias"]
        normed = _norm(hidden, w[prefix + "1.weight"], w[prefix + "1.bias"], eps)
        gated = _silu(normed) if self.trap == "silu-of-norm" else hidden * _sigmoid(normed)
        out = gated @ w[prefix + "2.weight"].T + w[prefix + "2.bias"]
        return _norm(out, w[prefix + "3.weight"], w[prefix + "3.bias"], eps) if final_norm else out

    def contextual_tokens(self, request: Request) -> Array:
        form, tokens = self.form, []
        counted = len(request.times)
        if form.min_history_counts == "history_and_candidates" and self.trap != "min-length-of-history":
            counted += len(request.query_times)
        for name, length, least in form.contextual:
            for slot in range(length):
                present = request.context[name][slot] >= 0 and counted >= least
                row = self.rows(name, request.context[name][slot]) if present else np.zeros(form.table_dim)
                matrix = self.weights[_PREPROCESSOR + "_batched_contextual_linear_weights"][len(tokens)]
                token = row @ matrix + self.weights[_PREPROCESSOR + "_batched_contextual_linear_bias"][len(tokens)]
                is_nothing = self.trap == "token-of-absent-id-is-zero" and not present
                tokens.append(np.zeros(form.width) if is_nothing else token)
        return np.array(tokens).reshape(-1, form.width)

    def action_inputs(self, request: Request) -> Array:
        form, prefix = self.form, _PREPROCESSOR + "_action_encoder."
        table, target = self.weights[prefix + "_action_embedding_table"], f"{prefix}_target_action_embedding_table"
        rows = []
        for action in request.actions:
            for index, weight in enumerate(form.action_weights):
                taken = action == weight if self.trap == "action-equality" else (int(action) & weight) > 0
                rows.append(table[index] if taken else np.zeros(_ACTION_DIM))
        history = np.array(rows).reshape(-1, len(form.action_weights) * _ACTION_DIM)
        of_candidate = self.weights[target]
        if self.trap == "candidates-without-action":
            of_candidate = np.zeros_like(of_candidate)
        if self.trap == "candidates-with-first-action":
            of_candidate = np.zeros_like(of_candidate)
            of_candidate[0, :_ACTION_DIM] = table[0]
        return np.concatenate([history, np.repeat(of_candidate, len(request.query_times), axis=0)])

    def events(self, request: Request) -> Array:
        form = self.form
        names = [(name, f"item_{name}") for name in form.history_ids]
        ids = [
            self.rows(ours, np.concatenate([request.history[ours], request.candidates[theirs]]))
            for ours, theirs in names
        ]
        content = sum(ids) if self.trap == "additional-in-content" else ids[0]
        rows = self.mlp(_PREPROCESSOR + "_content_embedding_mlp.", np.asarray(content))
        if form.additional and self.trap != "additional-in-content":
            rows = rows + self.mlp(_PREPROCESSOR + "_additional_embedding_mlp.", np.concatenate(ids[1:], axis=1))
        if form.action_weights:
            rows = rows + self.mlp(_PREPROCESSOR + "_action_embedding_mlp.", self.action_inputs(request))
        return rows

    def position(self, index: int, before_candidates: int) -> int:
        context = self.form.context
        if index < context:
            return index
        if self.trap == "forward-positions":
            position = min(index, before_candidates)
        elif self.trap == "candidates-count-on":
            position = abs(before_candidates - index) + context
        else:
            position = before_candidates - min(index, before_candidates)
            position += 0 if self.trap == "positions-without-context" else context
        return min(position, self.form.num_positions - 1)

    def bucket(self, anchor: int, time: int) -> int:
        form = self.form
        rounded_first = np.float32(anchor) - np.float32(time)
        seconds = rounded_first if self.trap == "float32-times" else np.float32(anchor - time)
        minutes = np.maximum(seconds, np.float32(1e-6)) / np.float32(60)
        if form.time_bucket_fn == "sqrt":
            value = np.sqrt(minutes)
        else:
            # NumPy's float32 logarithm is off by a unit on some CPUs; that of float64, rounded, is not.
            wide = np.float64(minutes)
            value = np.float32(np.log10(wide) if self.trap == "log10-buckets" else np.log(wide))
        of_width = (form.time_bucket_clamp == "embedding_dim") != (self.trap == "other-clamp")
        largest = min(form.width - 1, form.num_time_buckets) if of_width else form.num_time_buckets
        return min(int(max(value, np.float32(0))), largest)

    def encoded(self, request: Request) -> Array:
        form = self.form
        rows = np.concatenate([self.contextual_tokens(request), self.events(request)])
        times = [0] * form.context + [int(t) for t in (*request.times, *request.query_times)]
        before_candidates = form.context + len(request.times)
        anchor = times[-1] if times else 0
        if self.trap == "anchor-at-last-event":
            anchor = times[max(before_candidates - 1, 0)]
        positions = self.weights[_ENCODER + "_position_embeddings_weight"]
        buckets = self.weights[_ENCODER + "_timestamp_embeddings_weight"]
        out = rows * (1.0 if self.trap == "no-sqrt-d" else math.sqrt(form.width))
        for index, time in enumerate(times):
            own = self.trap == "own-anchor" and index >= before_candidates
            out[index] += positions[self.position(index, before_candidates)]
            out[index] += buckets[self.bucket(time if own else anchor, time)]
        return out

    def visible(self, i: int, j: int, before_candidates: int) -> bool:
        if self.trap == "contextual-tokens-see-all" and i < self.form.context:
            return j < before_candidates
        if self.trap == "candidates-see-earlier-ones":
            return j <= i
        return j <= i and (j < before_candidates or j == i)

    def layer(self, index: int, x: Array, before_candidates: int) -> Array:
        form, w = self.form, self.weights
        prefix = f"_hstu_transducer._stu_module._stu_layers.{index}."
        eps = 1e-5 if self.trap == "layer-eps-1e-5" else 1e-6
        heads, dqk, dv, length = form.num_heads, form.attention_dim, form.linear_dim, len(x)
        normed = _norm(x, w[prefix + "_input_norm_weight"], w[prefix + "_input_norm_bias"], eps)
        packed = normed @ w[prefix + "_uvqk_weight"] + w[prefix + "_uvqk_beta"]
        if self.trap == "per-head-layout":
            grouped = packed.reshape(length, heads, 2 * dv + 2 * dqk)
            parts = np.split(grouped, [dv, 2 * dv, 2 * dv + dqk], axis=2)
            u, v, q, k = (part.reshape(length, part.shape[1] * part.shape[2]) for part in parts)
        elif self.trap == "uqkv-order":
            u, q, k, v = np.split(packed, np.cumsum([heads * dv, heads * dqk, heads * dqk]), axis=1)
        else:
            u, v, q, k = np.split(packed, np.cumsum([heads * dv, heads * dv, heads * dqk]), axis=1)
        if self.trap != "silu-on-none":
            u = _silu(u)
        if self.trap == "silu-on-all":
            v, q, k = _silu(v), _silu(q), _silu(k)
        q, k, v = q.reshape(length, heads, dqk), k.reshape(length, heads, dqk), v.reshape(length, heads, dv)
        divisor = length if self.trap == "own-length-divisor" else self.divisor
        alpha = 1.0 if self.trap == "alpha-1" else 1.0 / math.sqrt(dqk)
        mask = np.array([[self.visible(i, j, before_candidates) for j in range(length)] for i in range(length)])
        attention = np.zeros((length, heads, dv))
        for head in range(heads):
            scores = alpha * (q[:, head] @ k[:, head].T)
            attention[:, head] = (_silu(scores) / divisor * mask.reshape(length, length)) @ v[:, head]
        weight, bias = w[prefix + "_output_norm_weight"], w[prefix + "_output_norm_bias"]
        flat = attention.reshape(length, heads * dv)
        if form.group_norm and self.trap == "joint-norm":
            gate = _norm(flat, np.repeat(weight, dv), np.repeat(bias, dv), eps)
        elif form.group_norm:
            gate = _norm(attention, weight[:, None], bias[:, None], eps).reshape(length, heads * dv)
        else:
            gate = _norm(flat, weight, bias, eps)
        joined = {
            "concat-order": [u, u * gate, flat],
            "concat-normed": [u, gate, u * gate],
            "gated-only": [np.zeros_like(u), np.zeros_like(u), u * gate],
        }.get(self.trap or "", [u, flat, u * gate])
        update = np.concatenate(joined, axis=1) @ w[prefix + "_output_weight"]
        return update + (normed if self.trap == "residual-normed" else x)

    def circles(self, times: Array) -> Array:
        """[T, 4]: cosine and sine of hour and weekday, in float32 as the original's arithmetic."""
        columns = []
        for period, units in ((3600, 24), (86400, 7)):
            if self.form.time_feature_precision == "exact" or self.trap == "exact-hours":
                unit = torch.from_numpy(times // period % units).float()
            else:
                since = torch.div(torch.from_numpy(times).float(), float(period), rounding_mode="floor")
                unit = torch.remainder(since, float(units))
            angle = unit / units * 2 * (math.pi if self.trap == "pi" else 3.14)
            point = torch.polar(torch.ones_like(angle), angle)
            columns += [point.real, point.imag]
        return torch.stack(columns, dim=1).double().numpy()

    def user_embedding(self, x: Array, query_times: Array) -> Array:
        form, w = self.form, self.weights
        eps = 1e-6 if self.trap == "postprocessor-eps-1e-6" else 1e-5
        if form.postprocessor == "l2_norm":
            return x / np.maximum(np.sqrt((x * x).sum(axis=1, keepdims=True)), 1e-6)
        if form.postprocessor == "timestamp_layer_norm":
            combiner = _POSTPROCESSOR + "_time_feature_combiner."
            joined = np.concatenate([x, self.circles(query_times)], axis=1)
            x = joined @ w[combiner + "weight"].T + w[combiner + "bias"]
        return _norm(x, w[_POSTPROCESSOR + "_layer_norm.weight"], w[_POSTPROCESSOR + "_layer_norm.bias"], eps)

    def answer(self, request: Request) -> Expected:
        form = self.form
        before_candidates = form.context + len(request.times)
        layers = [self.encoded(request)]
        for index in range(form.num_layers):
            layers.append(self.layer(index, layers[-1], before_candidates))
        users = self.user_embedding(layers[-1][before_candidates:], request.query_times)
        tables = [name.removeprefix("item_") if name not in form.item_only else name for name in form.item_ids]
        of_items = [self.rows(t, request.candidates[name]) for t, name in zip(tables, form.item_ids, strict=True)]
        items = self.mlp("_item_embedding_mlp.", np.concatenate(of_items, axis=1))
        gate = users / np.linalg.norm(users, axis=1, keepdims=True) if self.trap == "item-times-normed-user" else users
        logits = self.mlp("_multitask_module._prediction_module.", gate * items, final_norm=False)
        binary = [kind in (0, "BINARY_CLASSIFICATION") or self.trap == "sigmoid-everywhere" for _, kind in form.tasks]
        return Expected(layers, users, items, logits, np.where(np.array(binary), _sigmoid(logits), logits))


def reference_answers(
    form: DlrmForm, state: dict[str, torch.Tensor], requests: Sequence[Request], trap: Trap | None = None
) -> Expected:
    """What the family answers to a batch of requests, in float64.

    Args:
        form: sizes and switches.
        state: weights under the family's names.
        requests: the batch; with scaling_seq_len "batch" its longest history and most candidates make the divisor.
        trap: one detail to be got wrong.
    """
    weights = {key: tensor.double().numpy() for key, tensor in state.items()}
    events = max(len(request.times) for request in requests)
    candidates = max(len(request.query_times) for request in requests)
    divisor = events + candidates + form.context if form.scaling_seq_len == "batch" else float(form.scaling_seq_len)
    if trap == "configured-divisor":
        divisor = form.max_seq_len
    reference = _Reference(form, weights, max(divisor, 1), trap)
    answers = [reference.answer(request) for request in requests]
    return Expected(
        [np.concatenate(layers) for layers in zip(*(answer.activations for answer in answers), strict=True)],
        *(np.concatenate([getattr(a, name) for a in answers]) for name in ("users", "items", "logits", "preds")),
    )
