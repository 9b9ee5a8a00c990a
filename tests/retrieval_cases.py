"""Retrieval sessions over the eager model: on the host, and on a TensorRT that computes with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hstu_compile.artifacts import TensorSpec
from hstu_compile.compare import error_bound, row_error
from hstu_compile.errors import RequestError
from hstu_compile.graph_limits import GraphLimits
from hstu_compile.model.config import RetrievalConfig
from hstu_compile.model.retrieval import RetrievalModel
from hstu_compile.profiles import graph_profiles
from hstu_compile.runtime._feeds import matched_feeds
from hstu_compile.runtime.resident import HostPool, HostTensor
from hstu_compile.runtime.retrieval import RetrievalSession
from hstu_compile.runtime.retrieval_request import RetrievalRequest, RetrievalResult
from hstu_compile.runtime.retrieval_spec import RetrievalSpec
from hstu_compile.runtime.session import Session
from hstu_compile.served import ServedGraph, served_graphs
from tests.exported_models import small_config, small_model
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import FakeEngine, Shape, open_fake

ROLES = ("retrieval", "prefill", "append")
MAX_SEQ_LEN, MAX_APPEND, MAX_BATCH = 20, 4, 3
VERSION = "b" * 64
_TRT_TYPES = {"int32": "INT32", "int64": "INT64", "float32": "FLOAT"}


def config_of(**changes: Any) -> RetrievalConfig:
    """A model small enough to be run thousands of times, whose time buckets tell a minute from a year."""
    attention = {"attention_dim": 5, "linear_dim": 7, "num_time_buckets": 128, **changes.pop("attention", {})}
    return small_config(2, attention, embedding_dim=12, **changes)


def model_of(config: RetrievalConfig) -> RetrievalModel:
    """A small model whose time bias outweighs its scores: a wrong time shows in every answer."""
    model = small_model(config)
    with torch.no_grad():
        for layer in model.layers:
            if layer.ts_table is not None:
                layer.ts_table.mul_(8.0)
    return model


def spec_of(config: RetrievalConfig, top_k: int = 0, **changes: Any) -> RetrievalSpec:
    """What a bundle of the model would say."""
    attention = config.layer.attention
    values: dict[str, Any] = {
        "num_items": config.num_items,
        "num_ratings": config.num_ratings,
        "top_k": top_k,
        "max_seq_len": config.max_seq_len,
        "max_batch": MAX_BATCH,
        "max_append": MAX_APPEND,
        "has_time_bias": config.has_time_bias,
        "num_layers": config.num_layers,
        "num_heads": attention.num_heads,
        "attention_dim": attention.attention_dim,
        "linear_dim": attention.linear_dim,
        "kv_dtype": "float32",
        "cache_rule": config.cache_rule,
        "model_version": VERSION,
    }
    return RetrievalSpec(**{**values, **changes})


def _specs(served: ServedGraph) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(each.name, str(each.example.dtype).removeprefix("torch."), (each.axis, *each.example.shape[1:]))
        for each in served.inputs
    )


class EagerGraph:
    """One graph of the eager model as a session on the host, with a profile that refuses what an engine would.

    Attributes:
        calls: of every run, the events and the sequences in it.
        failure: raised by every run while it is set.
    """

    def __init__(self, served: ServedGraph, spec: RetrievalSpec) -> None:
        self.served, self.name, self.inputs = served, f"eager {served.name}", _specs(served)
        self.outputs: tuple[TensorSpec, ...] = ()
        limits = GraphLimits(served.name, spec.max_seq_len, max_append=spec.max_append if self._appends else 0)
        (self.profile,) = graph_profiles(served.name, self.inputs, limits.sizes(spec.max_batch, 1, None, 1))
        self.calls: list[tuple[int, int]] = []
        self.graph_stats = None
        self.failure: Exception | None = None
        self.closed = False

    @property
    def _appends(self) -> bool:
        return self.served.name == "append"

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        arrays = matched_feeds(feeds, self.inputs)
        for name, array in arrays.items():
            if array.shape[0] > self.profile.max[name][0]:
                raise RequestError("HSTU-E704", f"{name} is {array.shape}", str(self.profile.max[name]), "split it")
        self.calls.append((int(arrays["seq_offsets"][-1]), len(arrays["seq_offsets"]) - 1))
        if self.failure is not None:
            raise self.failure
        values = self.served.run(arrays)
        return {name: values[name] for name in self.served.outputs}

    def run_resident(
        self, feeds: Mapping[str, Any], outputs: Mapping[str, Any], *, before: Any = (), after: Any = ()
    ) -> dict[str, Any]:
        for source, target in before:
            target.array[...] = source.array
        results = self.run({n: each.array if isinstance(each, HostTensor) else each for n, each in feeds.items()})
        for name, target in outputs.items():
            np.copyto(target.array, results.pop(name), casting="no")
        for source, target in after:
            target.array[...] = source.array
        return results

    def memory_pool(self, capacity_bytes: int) -> HostPool:
        return HostPool(capacity_bytes)

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> EagerGraph:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def engine_of(graph: EagerGraph) -> FakeEngine:
    """The same graph as a TensorRT engine."""
    served, config = graph.served, graph.served.module.model.config
    inputs = {
        each.name: (_TRT_TYPES[each.dtype], graph.profile.min[each.name], graph.profile.max[each.name])
        for each in graph.inputs
    }
    attention, top_k = config.layer.attention, served.module.top_k
    declared: dict[str, tuple[str, Shape]] = {"user_embeddings": ("FLOAT", (-1, config.item_embedding_dim))}
    if top_k:
        declared |= {"top_items": ("INT32", (-1, top_k)), "top_scores": ("FLOAT", (-1, top_k))}
    widths = {"k": attention.attention_dim, "v": attention.linear_dim}
    for name in served.outputs[len(declared) :]:
        declared[name] = ("FLOAT", (-1, attention.num_heads, widths[name.removeprefix("new_")[0]]))

    def infer(shapes: dict[str, Shape]) -> dict[str, Shape]:
        rows = {name: shapes["item_ids"][0] for name in declared if name.startswith(("k_", "v_", "new_"))}
        users = shapes["request_timestamps"][0]
        return {name: (rows.get(name, users), *shape[1:]) for name, (_, shape) in declared.items()}

    def compute(arrays: dict[str, Any]) -> dict[str, Any]:
        values = served.run(arrays)
        return {name: values[name] for name in served.outputs}

    return FakeEngine(inputs, declared, infer, compute)


class Served:
    """A session, its graphs, and the model that it must answer as.

    Args:
        config: of the model.
        top_k: items listed.
        users_in_cache: full-length users that the budget holds.
        on_device: serve through TensorRT sessions on a CUDA that is played by NumPy.
        cuda_graphs: of each of these sessions.
        changes: of the specification; `session_options` of the session.
    """

    def __init__(
        self,
        config: RetrievalConfig | None = None,
        top_k: int = 0,
        users_in_cache: float = 8,
        *,
        on_device: bool = False,
        cuda_graphs: int = 0,
        session_options: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        config = config or config_of()
        self.spec = spec_of(config, top_k, **changes)
        self.model, self.exact = model_of(config), model_of(config).cast(torch.float64)
        graphs = served_graphs(self.model, top_k, max_append=self.spec.max_append)
        self.graphs = {graph.name: EagerGraph(graph, self.spec) for graph in graphs}
        sessions: dict[str, Session] = dict(self.graphs)
        self.cuda = FakeCuda()
        if on_device:
            sessions = {
                name: open_fake(self.cuda, engine_of(graph), cuda_graphs=cuda_graphs)
                for name, graph in self.graphs.items()
            }
        probe = RetrievalSession(self.spec, *(self.graphs[role] for role in ROLES), kv_budget_bytes=1)
        budget = int(users_in_cache * probe.entry_bytes(config.max_seq_len))
        options = dict(session_options or {})
        self.session = RetrievalSession(
            self.spec, *(sessions[role] for role in ROLES), kv_budget_bytes=budget, **options
        )

    def one(self, request: RetrievalRequest, **options: Any) -> RetrievalResult:
        (result,) = self.session.encode([request], **options)
        return result

    def one_pass(self, model: RetrievalModel, request: RetrievalRequest) -> np.ndarray[Any, Any]:
        """A model's own answer to the events that the session may keep: [1, D]."""
        events = {name: np.asarray(array)[-MAX_SEQ_LEN:] for name, array in request.events.items()}
        ratings = events.get("ratings")
        users = model(
            torch.from_numpy(events["item_ids"].astype(np.int32)),
            torch.from_numpy(events["timestamps"].astype(np.int64)),
            torch.tensor([0, len(events["item_ids"])], dtype=torch.int32),
            torch.tensor([request.request_timestamp]),
            None if ratings is None else torch.from_numpy(ratings.astype(np.int32)),
        )
        return np.asarray(users.numpy())

    def error(self, request: RetrievalRequest, result: RetrievalResult) -> float:
        """Of an answer, against float64."""
        return row_error(result.user_embedding[None], self.one_pass(self.exact, request)).error

    def calls(self, role: str) -> list[tuple[int, int]]:
        """What went through a graph since the last look."""
        found = list(self.graphs[role].calls)
        self.graphs[role].calls.clear()
        return found


def assert_right(served: Served, request: RetrievalRequest, result: RetrievalResult) -> None:
    """The answer is as good as that of one float32 pass over the whole history."""
    exact, once = (served.one_pass(model, request) for model in (served.exact, served.model))
    error = row_error(result.user_embedding[None], exact).error
    assert error <= error_bound(row_error(once, exact).error, "fp32")


def assert_wrong(served: Served, request: RetrievalRequest, result: RetrievalResult) -> None:
    """The answer is not, by far: a hundred times what float32 may be wrong by."""
    assert served.error(request, result) > 100 * error_bound(0.0, "fp32")


def history_of(seed: int | Sequence[int], events: int = MAX_SEQ_LEN, num_ratings: int = 0) -> dict[str, Any]:
    """Events from seconds to a year apart."""
    rng = np.random.default_rng(seed)
    gaps = np.floor(10 ** rng.uniform(0, 7.5, events)).astype(np.int64)
    history = {"item_ids": rng.integers(1, 41, events), "timestamps": 1_400_000_000 + np.cumsum(gaps)}
    return history | ({"ratings": rng.integers(0, num_ratings, events)} if num_ratings else {})


def asked(user: str | int, history: Mapping[str, Any], events: int, later: int = 60) -> RetrievalRequest:
    """The first events of a history, `later` seconds after the last of them."""
    times = history["timestamps"][:events]
    at = int(times[-1]) + later if events else 1_400_000_000
    return RetrievalRequest(user, {name: array[:events] for name, array in history.items()}, at)


def edited(request: RetrievalRequest, **events: Any) -> RetrievalRequest:
    """The request with other values of some features."""
    return dataclasses.replace(request, events={**request.events, **events})
