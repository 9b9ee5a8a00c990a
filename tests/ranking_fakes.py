"""A ranking model small enough to be NumPy, behind the three graphs' real inputs and outputs.

Two variants, so that nothing in the scheduler rests on one family:

- "request": Meta's DLRM. Positions count back from the query, time buckets are anchored at the last candidate, a
  contextual token looks at how many events and candidates there are, the divisor may be the batch's own length.
- "prefix": forward positions, relative position and time biases between events' own times. A history's keys and values
  do not know the query; each key carries its event's time in one more column, which is what `score` needs of it.

All arithmetic is float64, one sequence at a time, so that packing has nothing to hide behind. Keys and values are
rounded to float32 on every path, because that is what a cache holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hstu_compile.artifacts import TensorSpec
from hstu_compile.errors import RequestError
from hstu_compile.runtime._feeds import matched_feeds
from hstu_compile.runtime._resident_io import Copies
from hstu_compile.runtime.graph_cache import GraphStats
from hstu_compile.runtime.ranking_spec import ContextualFeature, IdFeature, RankingSpec
from hstu_compile.runtime.resident import HostPool, HostTensor

Array = NDArray[Any]
Role = Literal["packed", "prefill", "score"]
WIDTH, HEADS, KEY, VALUE, LAYERS, BUCKETS, POSITIONS = 8, 2, 3, 4, 2, 64, 96


def spec_of(rule: Literal["request", "prefix"] = "request", **changes: Any) -> RankingSpec:
    """A small specification; the changes are fields of it."""
    spec = RankingSpec(
        history_ids=(IdFeature("movie_id", 50), IdFeature("genre", 6)),
        history_time="action_timestamp",
        history_action="item_weights",
        contextual=(ContextualFeature("user_id", 30, None, 1, 8), ContextualFeature("devices", 5, None, 2, 0)),
        candidate_ids=(IdFeature("item_movie_id", 50),),
        candidate_time="item_query_time",
        row_dtype="float32",
        tasks=("like", "watch_time"),
        max_history_len=12,
        max_candidates=9,
        max_batch=3,
        micro_batch=4,
        scaling=20.0,
        counts_candidates=True,
        num_layers=LAYERS,
        num_heads=HEADS,
        attention_dim=KEY + (rule == "prefix"),
        linear_dim=VALUE,
        kv_dtype="float32",
        cache_rule=rule,
        model_version="ab" * 32,
    )
    return dataclasses.replace(spec, **changes)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def normed(x: Array) -> Array:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def as_float32(x: Array) -> Array:
    return x.astype(np.float32).astype(np.float64)


class FakeModel:
    """The weights, and the mathematics of one sequence."""

    def __init__(self, spec: RankingSpec, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.spec = spec

        def weights(*shape: int) -> Array:
            return rng.normal(0, 1 / np.sqrt(shape[0]), shape)

        ids = (*spec.history_ids, *spec.candidate_ids, *spec.contextual)
        self.tables = {feature.name: rng.normal(0, 1, (feature.table_size, WIDTH)) for feature in ids}
        self.slots = [(weights(WIDTH, WIDTH), rng.normal(0, 1, WIDTH)) for _ in range(spec.contextual_len)]
        self.actions, self.target_action = rng.normal(0, 1, (8, WIDTH)), rng.normal(0, 1, WIDTH)
        self.positions = rng.normal(0, 1, (POSITIONS, WIDTH))
        self.buckets = rng.normal(0, 1, (BUCKETS + 1, WIDTH))
        self.layers = [
            (weights(WIDTH, HEADS * (2 * KEY + 2 * VALUE)), weights(3 * HEADS * VALUE, WIDTH)) for _ in range(LAYERS)
        ]
        self.position_bias, self.time_bias = rng.normal(0, 1, POSITIONS), rng.normal(0, 1, BUCKETS + 1)
        self.item_tower, self.head = weights(WIDTH, WIDTH), weights(WIDTH, len(spec.tasks))
        self.hour = rng.normal(0, 1, WIDTH)

    def bucket(self, seconds: Array) -> Array:
        return np.clip(np.sqrt(np.maximum(seconds, 1e-6) / 60).astype(np.int64), 0, BUCKETS)

    def clipped(self, name: str, ids: Array) -> Array:
        return self.tables[name][np.clip(ids, 0, len(self.tables[name]) - 1)]

    def prefix_tokens(
        self, history: Mapping[str, Array], context: Mapping[str, Array], anchor: int, num_counted: int
    ) -> tuple[Array, Array]:
        """Contextual and history rows before the layers, with their times."""
        spec = self.spec
        events = history[spec.history_time].size
        rows = []
        for feature in spec.contextual:
            for value in context[feature.name]:
                seen = value >= 0 and num_counted >= feature.min_history_len
                matrix, bias = self.slots[len(rows)]
                rows.append(bias + (self.clipped(feature.name, value) @ matrix if seen else 0))
        contextual = np.array(rows).reshape(-1, WIDTH)
        past = np.zeros((events, WIDTH))
        for feature in spec.history_ids:
            past = past + self.clipped(feature.name, history[feature.name])
        if spec.history_action is not None:
            past = past + self.actions[history[spec.history_action] & 7]
        times = np.concatenate([np.zeros(len(contextual), np.int64), history[spec.history_time]])
        index = np.arange(len(contextual) + events)
        if spec.cache_rule == "request":
            back = np.where(index < len(contextual), index, len(index) - index + len(contextual))
            extra = self.positions[back] + self.buckets[self.bucket(anchor - times)]
        else:
            extra = self.positions[index]
        return np.concatenate([contextual, past]) * np.sqrt(WIDTH) + extra, times

    def target_tokens(self, candidates: Mapping[str, Array], anchor: int, before: int) -> tuple[Array, Array]:
        """Candidate rows before the layers, with their times; `before` cached rows precede them."""
        spec = self.spec
        times = candidates[spec.candidate_time]
        rows = self.target_action + np.zeros((times.size, WIDTH))
        for feature in spec.candidate_ids:
            rows = rows + self.clipped(feature.name, candidates[feature.name])
        if spec.cache_rule == "request":
            extra = self.positions[spec.contextual_len] + self.buckets[self.bucket(anchor - times)]
        else:
            extra = self.positions[before]
        return rows * np.sqrt(WIDTH) + extra, times

    def project(self, layer: int, x: Array, times: Array) -> tuple[Array, Array, Array, Array]:
        packed = normed(x) @ self.layers[layer][0]
        u, v, q, k = np.split(packed, np.cumsum([HEADS * VALUE, HEADS * VALUE, HEADS * KEY]), axis=-1)
        k = k.reshape(-1, HEADS, KEY)
        if self.spec.cache_rule == "prefix":
            k = np.concatenate([k, np.broadcast_to(times[:, None, None], (len(x), HEADS, 1))], axis=-1)
        return silu(u), as_float32(v.reshape(-1, HEADS, VALUE)), q.reshape(-1, HEADS, KEY), as_float32(k)

    def attend(self, q: Array, k: Array, v: Array, allowed: Array, row_times: Array, rows: Array, n: float) -> Array:
        """Rows [r] against columns [c]; `rows` are the rows' positions, columns' positions are 0 .. c - 1, capped."""
        scores = np.einsum("rhd,chd->hrc", q, k[..., :KEY]) / np.sqrt(KEY)
        if self.spec.cache_rule == "prefix":
            columns = np.minimum(np.arange(len(k)), rows.max(initial=0))
            scores = scores + self.position_bias[np.maximum(rows[:, None] - columns, 0)]
            scores = scores + self.time_bias[self.bucket(np.abs(row_times[:, None] - k[None, :, 0, KEY]))]
        weights = silu(scores) / n * allowed
        return np.einsum("hrc,chd->rhd", weights, v)

    def leave(self, layer: int, x: Array, u: Array, attention: Array) -> Array:
        flat = attention.reshape(len(x), HEADS * VALUE)
        return np.concatenate([u, flat, u * normed(flat)], axis=-1) @ self.layers[layer][1] + x

    def prefill(
        self, history: Mapping[str, Array], context: Mapping[str, Array], anchor: int, num_counted: int, n: float
    ) -> list[Array]:
        """k_0, v_0, ... of the contextual and history rows."""
        x, times = self.prefix_tokens(history, context, anchor, num_counted)
        index = np.arange(len(x))
        cached = []
        for layer in range(LAYERS):
            u, v, q, k = self.project(layer, x, times)
            cached += [k, v]
            x = self.leave(layer, x, u, self.attend(q, k, v, index[:, None] >= index, times, index, n))
        return cached

    def score(self, candidates: Mapping[str, Array], cached: list[Array], anchor: int, n: float) -> tuple[Array, Array]:
        """Predictions and logits of candidates against one sequence's cached rows."""
        before = len(cached[0])
        x, times = self.target_tokens(candidates, anchor, before)
        rows = np.full(len(x), before)
        allowed = np.concatenate([np.ones((len(x), before)), np.eye(len(x))], axis=1)
        for layer in range(LAYERS):
            u, v, q, k = self.project(layer, x, times)
            keys, values = np.concatenate([cached[2 * layer], k]), np.concatenate([cached[2 * layer + 1], v])
            x = self.leave(layer, x, u, self.attend(q, keys, values, allowed, times, rows, n))
        user = x + self.hour * np.cos(times % 3600 / 3600 * 6)[:, None]
        user = user / np.maximum(np.linalg.norm(user, axis=-1, keepdims=True), 1e-6)
        items = sum(self.clipped(feature.name, candidates[feature.name]) for feature in self.spec.candidate_ids)
        logits = 3 * (user * np.tanh(items @ self.item_tower)) @ self.head
        # The first task is binary; the others are regressions.
        preds = np.concatenate([1 / (1 + np.exp(-logits[:, :1])), logits[:, 1:]], axis=1)
        return preds, logits

    def answer(
        self, history: Mapping[str, Array], context: Mapping[str, Array], candidates: Mapping[str, Array]
    ) -> tuple[Array, Array]:
        """Predictions and logits of one whole request: what every schedule has to give."""
        spec = self.spec
        events, times = len(history[spec.history_time]), np.asarray(candidates[spec.candidate_time])
        if not times.size:
            return np.zeros((0, len(spec.tasks))), np.zeros((0, len(spec.tasks)))
        n = events + times.size + spec.contextual_len if spec.scaling == "batch" else spec.scaling
        counted = events + (times.size if spec.counts_candidates else 0)
        arrays = [{name: np.asarray(values) for name, values in part.items()} for part in (history, candidates)]
        cached = self.prefill(arrays[0], context, int(times[-1]), counted, float(n))
        return self.score(arrays[1], cached, int(times[-1]), float(n))


class FakeGraph:
    """One of the three graphs as a Session on the CPU, with a profile that refuses what an engine would.

    Attributes:
        calls: of every run, the candidates or events in it and the sequences.
        addresses: of every resident run, where the keys of the first layer were.
        copied: of every resident run, how many copies came before and how many after it.
        failure: raised by every run while it is set.
        graph_stats: as of a session without CUDA graphs; a test may say otherwise.

    Args:
        model: of all three graphs.
        role: of this one.
        cache_rows: score: most rows of a cache that it takes whole, with sequences between the users'; None for a
            graph that takes the users' rows alone, and says nothing of a profile.
    """

    graph_stats: GraphStats | None = None

    def __init__(self, model: FakeModel, role: Role, cache_rows: int | None = None) -> None:
        self.model, self.role, self.name = model, role, f"fake {role}"
        self.cache_rows = cache_rows if role == "score" else None
        self.calls: list[tuple[int, int]] = []
        self.addresses: list[int] = []
        self.copied: list[int] = []
        self.failure: Exception | None = None
        self.closed = False
        spec = model.spec
        history = [TensorSpec(name, self._dtype(name), ("L",)) for name in spec.history_names]
        context = [TensorSpec(name, "int32", ("BC",)) for name in spec.contextual_names]
        candidates = [TensorSpec(name, self._dtype(name), ("T",)) for name in spec.candidate_names]
        offsets = {
            name: TensorSpec(name, "int32", ("B1",)) for name in ("seq_offsets", "candidate_offsets", "cache_offsets")
        }
        asked = TensorSpec("request_timestamps", "int64", ("B",))
        counted = [TensorSpec("num_candidates", "int32", ("B",))] if spec.has_minimum else []
        scaled = [TensorSpec("scaling_seq_lens", "float32", ("B",))] if spec.scaling == "batch" else []
        sizes = {"k": spec.attention_dim, "v": spec.linear_dim}
        cached = [TensorSpec(n, "float32", ("Lc", spec.num_heads, sizes[n[0]])) for n in spec.cached_names()]
        answers = [TensorSpec(name, "float32", ("T", len(spec.tasks))) for name in ("preds", "logits")]
        self.inputs: tuple[TensorSpec, ...] = {
            "packed": (*history, *context, *candidates, offsets["seq_offsets"], offsets["candidate_offsets"]),
            "prefill": (*history, *context, offsets["seq_offsets"], asked, *counted, *scaled),
            "score": (*candidates, offsets["candidate_offsets"], asked, *scaled, offsets["cache_offsets"], *cached),
        }[role]
        self.outputs: tuple[TensorSpec, ...] = tuple(cached if role == "prefill" else answers)

    def _dtype(self, name: str) -> str:
        return "int64" if name in (self.model.spec.history_time, self.model.spec.candidate_time) else "int32"

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        arrays = matched_feeds(feeds, self.inputs)
        self._check_profile(arrays)
        if self.failure is not None:
            raise self.failure
        return getattr(self, f"_{self.role}")(arrays)

    def run_resident(
        self, feeds: Mapping[str, Any], outputs: Mapping[str, Any], *, before: Copies = (), after: Copies = ()
    ) -> dict[str, Array]:
        self._copy(before)
        arrays = {n: feed.array if isinstance(feed, HostTensor) else feed for n, feed in feeds.items()}
        self.addresses += [tensor["k_0"].address for tensor in (feeds, outputs) if "k_0" in tensor]
        results = self.run(arrays)
        for name, target in outputs.items():
            np.copyto(target.array, results.pop(name), casting="no")
        self._copy(after)
        return results

    def _copy(self, copies: Copies) -> None:
        self.copied.append(len(copies))
        for source, target in copies:
            assert isinstance(source, HostTensor)
            assert isinstance(target, HostTensor)
            np.copyto(target.array, source.array, casting="no")

    def memory_pool(self, capacity_bytes: int) -> HostPool:
        return HostPool(capacity_bytes)

    def most_rows(self, name: str) -> int | None:
        if self.cache_rows is None:
            return None
        return {"candidate_offsets": 2 * self.model.spec.max_batch + 1}.get(name, self.cache_rows)

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeGraph:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _check_profile(self, arrays: Mapping[str, Array]) -> None:
        spec = self.model.spec
        offsets = arrays["seq_offsets" if self.role == "prefill" else "candidate_offsets"]
        batch = offsets.size - 1
        rows = self.cache_rows or spec.max_batch * (spec.contextual_len + spec.max_history_len)
        most = {
            "B": (batch, spec.max_batch * (1 if self.cache_rows is None else 2)),
            "history": (arrays[spec.history_time].size, spec.max_batch * spec.max_history_len)
            if self.role != "score"
            else (arrays["k_0"].shape[0], rows),
            "candidates": (arrays[spec.candidate_time].size, self._most_candidates())
            if self.role != "prefill"
            else (0, 0),
        }
        if batch < 1 or any(size > limit for size, limit in most.values()):
            raise RequestError("HSTU-E704", f"{self.name} is outside its profile", str(most), "schedule better")
        self.calls.append((int(offsets[-1]), batch))

    def _most_candidates(self) -> int:
        spec = self.model.spec
        return spec.micro_batch if self.role == "score" else spec.max_batch * spec.max_candidates

    def _divisors(self, arrays: Mapping[str, Array], batch: int) -> list[float]:
        scaling = self.model.spec.scaling
        return [scaling] * batch if scaling != "batch" else [float(n) for n in arrays["scaling_seq_lens"]]

    def _prefixes(self, arrays: Mapping[str, Array]) -> list[tuple[dict[str, Array], dict[str, Array]]]:
        """History and context of every sequence."""
        spec, offsets, found = self.model.spec, arrays["seq_offsets"], []
        for b in range(offsets.size - 1):
            history = {name: arrays[name][offsets[b] : offsets[b + 1]] for name in spec.history_names}
            context = {f.name: arrays[f.name][b * f.max_length : (b + 1) * f.max_length] for f in spec.contextual}
            found.append((history, context))
        return found

    def _counted(self, events: int, candidates: int) -> int:
        return events + (candidates if self.model.spec.counts_candidates else 0)

    def _prefill(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        names, parts = self.model.spec.cached_names(), self._prefixes(arrays)
        divisors = self._divisors(arrays, len(parts))
        counts = arrays.get("num_candidates", np.zeros(len(parts), np.int32))
        rows = []
        for b, (history, context) in enumerate(parts):
            counted = self._counted(history[self.model.spec.history_time].size, int(counts[b]))
            anchor = int(arrays["request_timestamps"][b])
            rows.append(self.model.prefill(history, context, anchor, counted, divisors[b]))
        return {name: np.concatenate([each[i] for each in rows]).astype(np.float32) for i, name in enumerate(names)}

    def _candidates(self, arrays: Mapping[str, Array]) -> list[dict[str, Array]]:
        offsets = arrays["candidate_offsets"]
        return [
            {name: arrays[name][offsets[b] : offsets[b + 1]] for name in self.model.spec.candidate_names}
            for b in range(offsets.size - 1)
        ]

    def _score(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        parts, offsets = self._candidates(arrays), arrays["cache_offsets"]
        divisors = self._divisors(arrays, len(parts))
        answers = []
        for b, candidates in enumerate(parts):
            if not candidates[self.model.spec.candidate_time].size:
                continue  # its rows, which may be anybody's, are not read
            cached = [
                arrays[name][offsets[b] : offsets[b + 1]].astype(np.float64) for name in self.model.spec.cached_names()
            ]
            anchor = int(arrays["request_timestamps"][b])
            answers.append(self.model.score(candidates, cached, anchor, divisors[b]))
        return self._answers(answers)

    def _packed(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        spec = self.model.spec
        histories, targets, answers = self._prefixes(arrays), self._candidates(arrays), []
        most_events = max(history[spec.history_time].size for history, _ in histories)
        most_targets = max(candidates[spec.candidate_time].size for candidates in targets)
        # As Meta's, the divisor is the batch's, not the sequence's.
        n = float(most_events + most_targets + spec.contextual_len) if spec.scaling == "batch" else spec.scaling
        for (history, context), candidates in zip(histories, targets, strict=True):
            times = candidates[spec.candidate_time]
            anchor = int(times[-1]) if times.size else 0
            counted = self._counted(history[spec.history_time].size, times.size)
            cached = self.model.prefill(history, context, anchor, counted, n)
            answers.append(self.model.score(candidates, cached, anchor, n))
        return self._answers(answers)

    def _answers(self, answers: list[tuple[Array, Array]]) -> dict[str, Array]:
        return {
            name: np.concatenate([each[i] for each in answers]).astype(np.float32)
            for i, name in enumerate(("preds", "logits"))
        }
