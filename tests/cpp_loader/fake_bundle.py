"""Bundles whose engines the fake TensorRT runs: manifests as `hstu-compile build` writes them, a model in NumPy.

The model is that of fakes/fakeModel.h, written down a second time: what the program computes through engines, streams,
caches and graphs is compared with this.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.bundle import FORMAT_VERSION, model_files, reference_files
from hstu_compile.plugin_library import SELF_REGISTERING
from hstu_compile.polygraphy_files import save_feeds, save_outputs
from hstu_compile.runtime.ranking_spec import ContextualFeature, IdFeature, RankingSpec

Arrays = dict[str, NDArray[Any]]

WIDTH, NUM_ITEMS, MAX_BATCH, MAX_SEQ_LEN = 6, 500, 8, 64
MICRO_BATCH, MAX_CANDIDATES = 4, 16
RANKING = RankingSpec(
    history_ids=(IdFeature("movie", 300),),
    history_time="time",
    history_action="action",
    contextual=(ContextualFeature("user", 100, max_length=2, min_history_len=3),),
    candidate_ids=(IdFeature("item", 300),),
    candidate_time="query",
    row_dtype="float32",
    tasks=("like", "watch"),
    max_history_len=MAX_SEQ_LEN,
    max_candidates=MAX_CANDIDATES,
    max_batch=MAX_BATCH,
    micro_batch=MICRO_BATCH,
    scaling="batch",
    counts_candidates=True,
    num_layers=2,
    num_heads=2,
    attention_dim=3,
    linear_dim=5,
    kv_dtype="float32",
    cache_rule="request",
    model_version="a" * 64,
)
_NAMES = {
    "history_id": "movie",
    "history_time": "time",
    "history_action": "action",
    "context": "user",
    "candidate_id": "item",
    "candidate_time": "query",
}


def mixed(values: NDArray[Any], salt: int) -> NDArray[np.float64]:
    """Numbers in [-1, 1] that look random."""
    word = (values.astype(np.uint64) * np.uint64(2654435761) + np.uint64(salt * 40503)) & np.uint64(0xFFFFFFFF)
    return ((word >> np.uint64(8)) % np.uint64(2001)).astype(np.float64) / 1000 - 1


def retrieval_answers(feeds: Arrays) -> Arrays:
    """What the graph `retrieval` answers in float64."""
    offsets = feeds["seq_offsets"]
    users = np.zeros((len(offsets) - 1, WIDTH))
    for b in range(len(users)):
        own = slice(offsets[b], offsets[b + 1])
        age = (feeds["request_timestamps"][b] - feeds["timestamps"][own]) % 97
        for d in range(WIDTH):
            users[b, d] = (mixed(feeds["item_ids"][own], d) + 0.001 * age).sum()
    return {"user_embeddings": users}


def prefill_answers(feeds: Arrays) -> Arrays:
    """What the graph `prefill` answers in float64: contextual rows of a user, then one row per event."""
    offsets, spec = feeds["seq_offsets"], RANKING
    blocks: dict[str, list[NDArray[Any]]] = {name: [] for name in spec.cached_names()}
    for user in range(len(offsets) - 1):
        own = slice(offsets[user], offsets[user + 1])
        context = feeds["user"][user * spec.contextual_len :][: spec.contextual_len]
        tokens = np.concatenate([context, feeds["movie"][own] + 7 * feeds["action"][own]])
        # As C++ divides: a request without candidates is asked at 0, before its history.
        events_age = np.fmod(feeds["request_timestamps"][user] - feeds["time"][own], 97)
        age = np.concatenate([np.zeros(spec.contextual_len), events_age])
        for name, parts in blocks.items():
            letter, layer = name.split("_")
            width, side = (spec.attention_dim, 0) if letter == "k" else (spec.linear_dim, 1)
            salts = [[1000 * int(layer) + 10 * head + e + 500 * side for e in range(width)] for head in range(2)]
            heads = [[0.5 * mixed(tokens, salt) + 0.001 * age for salt in line] for line in salts]
            parts.append(np.moveaxis(np.array(heads), 2, 0))
    return {name: np.concatenate(parts) for name, parts in blocks.items()}


def score_answers(feeds: Arrays) -> Arrays:
    """What the graph `score` answers in float64."""
    asked, cached = feeds["candidate_offsets"], feeds["cache_offsets"]
    logits = np.zeros((asked[-1], len(RANKING.tasks)))
    for user in range(len(asked) - 1):
        rows, wanted = slice(cached[user], cached[user + 1]), slice(asked[user], asked[user + 1])
        total = sum(feeds[name][rows].astype(np.float64).sum() for name in RANKING.cached_names())
        for task in range(len(RANKING.tasks)):
            own = mixed(feeds["item"][wanted], 31 + task)
            logits[wanted, task] = own + (1 + task) * total / feeds["scaling_seq_lens"][user]
    return {"preds": 1 / (1 + np.exp(-logits)), "logits": logits}


def prefill_feeds(packed: Arrays) -> Arrays:
    """Feeds of `prefill` for a packed batch, whose divisor is that of the whole batch."""
    lengths, asked = np.diff(packed["seq_offsets"]) + RANKING.contextual_len, packed["candidate_offsets"]
    counts = np.diff(asked)
    last = np.array([packed["query"][stop - 1] if count else 0 for stop, count in zip(asked[1:], counts, strict=True)])
    return {
        **{name: packed[name] for name in (*RANKING.history_names, "user", "seq_offsets")},
        "request_timestamps": last.astype(np.int64),
        "scaling_seq_lens": np.full(len(counts), lengths.max() + counts.max(), np.float32),
        "num_candidates": counts.astype(np.int32),
    }


def score_feeds(packed: Arrays) -> Arrays:
    """Feeds of `score` for a packed batch of at most a micro-batch of candidates."""
    history = prefill_feeds(packed)
    lengths = np.diff(packed["seq_offsets"]) + RANKING.contextual_len
    return {
        **{name: packed[name] for name in (*RANKING.candidate_names, "candidate_offsets")},
        **{name: history[name] for name in ("request_timestamps", "scaling_seq_lens")},
        "cache_offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        **{name: rows.astype(np.float32) for name, rows in prefill_answers(history).items()},
    }


def packed_answers(feeds: Arrays) -> Arrays:
    """What the graph `packed` answers in float64."""
    history = prefill_feeds(feeds)
    lengths = np.diff(feeds["seq_offsets"]) + RANKING.contextual_len
    cached = {"cache_offsets": np.concatenate([[0], np.cumsum(lengths)]), **prefill_answers(history)}
    return score_answers({**feeds, **history, **cached})


def retrieval_feeds(lengths: Sequence[int], seed: int) -> Arrays:
    """A batch of random histories."""
    random = np.random.default_rng(seed)
    total = sum(lengths)
    return {
        "item_ids": random.integers(1, NUM_ITEMS, total, dtype=np.int32),
        "timestamps": 1_700_000_000 + np.arange(total, dtype=np.int64),
        "seq_offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        "request_timestamps": 1_700_100_000 + random.integers(0, 900, len(lengths)),
    }


def packed_feeds(sizes: Sequence[tuple[int, int]], seed: int) -> Arrays:
    """A batch of (events, candidates)."""
    random = np.random.default_rng(seed)
    events, candidates = (np.array([size[i] for size in sizes]) for i in range(2))
    return {
        "movie": random.integers(0, 300, events.sum(), dtype=np.int32),
        "time": 1_700_000_000 + np.arange(events.sum(), dtype=np.int64),
        "action": random.integers(0, 16, events.sum(), dtype=np.int32),
        "user": random.integers(0, 100, 2 * len(sizes), dtype=np.int32),
        "item": random.integers(0, 300, candidates.sum(), dtype=np.int32),
        "query": np.repeat(1_700_100_000 + random.integers(0, 900, len(sizes)), candidates),
        "seq_offsets": np.concatenate([[0], np.cumsum(events)]).astype(np.int32),
        "candidate_offsets": np.concatenate([[0], np.cumsum(candidates)]).astype(np.int32),
    }


@dataclasses.dataclass(frozen=True)
class Graph:
    """A graph of a fake bundle: (name, dtype, shape, least, most) of its tensors; a shape of names is open."""

    name: str
    inputs: Sequence[tuple[str, str, tuple[Any, ...], tuple[int, ...], tuple[int, ...]]]
    outputs: Sequence[tuple[str, str, tuple[Any, ...]]]


def _row(name: str, dtype: str, dim: str, most: int, least: int = 1) -> tuple[Any, ...]:
    return (name, dtype, (dim,), (least,), (most,))


def _history() -> list[Any]:
    rows, batch = MAX_BATCH * MAX_SEQ_LEN, MAX_BATCH
    return [
        _row("movie", "int32", "L", rows),
        _row("time", "int64", "L", rows),
        _row("action", "int32", "L", rows),
        _row("user", "int32", "2*B", 2 * batch, 2),
        _row("seq_offsets", "int32", "B_plus_1", batch + 1, 2),
    ]


def _query() -> list[Any]:
    return [
        _row("request_timestamps", "int64", "B", MAX_BATCH),
        _row("scaling_seq_lens", "float32", "B", MAX_BATCH),
    ]


def _candidates(most: int) -> list[Any]:
    return [
        _row("item", "int32", "T", most),
        _row("query", "int64", "T", most),
        _row("candidate_offsets", "int32", "B_plus_1", MAX_BATCH + 1, 2),
    ]


def graphs_of(family: str) -> list[Graph]:
    """The graphs of a family, the one that answers a request by itself first."""
    if family == "retrieval":
        rows = MAX_BATCH * MAX_SEQ_LEN
        inputs = [
            _row("item_ids", "int32", "L", rows),
            _row("timestamps", "int64", "L", rows),
            _row("seq_offsets", "int32", "B_plus_1", MAX_BATCH + 1, 2),
            _row("request_timestamps", "int64", "B", MAX_BATCH),
        ]
        return [Graph("retrieval", inputs, [("user_embeddings", "float32", ("B", WIDTH))])]
    predictions = [(name, "float32", ("T", len(RANKING.tasks))) for name in ("preds", "logits")]
    widths = {"k": RANKING.attention_dim, "v": RANKING.linear_dim}
    cached = [(name, (RANKING.num_heads, widths[name[0]])) for name in RANKING.cached_names()]
    rows = MAX_BATCH * (MAX_SEQ_LEN + RANKING.contextual_len)
    blocks = [(name, "float32", ("Lc", *width), (1, *width), (rows, *width)) for name, width in cached]
    counts = _row("num_candidates", "int32", "B", MAX_BATCH)
    return [
        Graph("packed", [*_history(), *_candidates(MAX_BATCH * MAX_CANDIDATES)], predictions),
        Graph("prefill", [*_history(), *_query(), counts], [(n, "float32", ("L + 2*B", *w)) for n, w in cached]),
        Graph(
            "score",
            [*_candidates(MICRO_BATCH), *_query(), _row("cache_offsets", "int32", "B_plus_1", 9, 2), *blocks],
            predictions,
        ),
    ]


def engine_text(graph: Graph, version: int, plugin: bool) -> str:
    """An engine file of the fake TensorRT; version 8 takes times as int32."""
    lines = ["hstu-fake-engine", f"version {version}", f"model {graph.name}"]
    lines += ["plugin HstuAttention 1 hstu"] if plugin else []
    lines += [f"name {role} {name}" for role, name in _NAMES.items()]
    sizes = {
        "width": WIDTH,
        "context": RANKING.contextual_len,
        "tasks": len(RANKING.tasks),
        "layers": RANKING.num_layers,
    }
    sizes |= {"heads": RANKING.num_heads, "attention_dim": RANKING.attention_dim, "linear_dim": RANKING.linear_dim}
    lines += [f"size {name} {value}" for name, value in sizes.items()]
    for name, dtype, _, least, most in graph.inputs:
        held = "int32" if dtype == "int64" and version < 10000 else dtype
        lines.append(f"in {name} {held} " + " ".join(f"{low} {high}" for low, high in zip(least, most, strict=True)))
    lines += [f"out {name} {dtype}" for name, dtype, _ in graph.outputs]
    return "\n".join(lines) + "\n"


def reference_of(graph: str) -> dict[str, tuple[Arrays, Arrays]]:
    """Feeds of a graph and what the model answers, by the feed's name."""
    if graph == "retrieval":
        lengths = {"one event": [1], "mixed": [5, 0, 17], "longest": [MAX_SEQ_LEN, 3], "no events": [0]}
        batches = [retrieval_feeds(sizes, seed) for seed, sizes in enumerate(lengths.values())]
        return {name: (feed, retrieval_answers(feed)) for name, feed in zip(lengths, batches, strict=True)}
    shapes = {"one": [(1, 1)], "mixed": [(9, 3), (0, 5), (20, 0)], "longest": [(MAX_SEQ_LEN, 11), (2, 16)]}
    if graph == "score":
        shapes = {"one": [(1, 1)], "mixed": [(9, 3), (0, 1)], "longest": [(MAX_SEQ_LEN, 4)]}
    packed = [packed_feeds(sizes, seed) for seed, sizes in enumerate(shapes.values())]
    make: dict[str, tuple[Callable[[Arrays], Arrays], Callable[[Arrays], Arrays]]] = {
        "packed": (dict, packed_answers),
        "prefill": (prefill_feeds, prefill_answers),
        "score": (score_feeds, score_answers),
    }
    feeds_of, answers_of = make[graph]
    feeds = [feeds_of(each) for each in packed]
    return {name: (feed, answers_of(feed)) for name, feed in zip(shapes, feeds, strict=True)}


def write_bundle(folder: Path, family: str, version: tuple[int, int, int], plugin: Path | None = None) -> Path:
    """A complete bundle for a TensorRT version.

    Args:
        folder: to make.
        family: retrieval or ranking.
        version: major, minor, patch.
        plugin: library to put in, which the engines then need.
    """
    folder.mkdir(parents=True)
    major, minor, patch = version
    # TensorRT 8 alone has one digit a part; TensorRT-RTX counts from 1 and has two, as TensorRT 10.
    number = (major * 10 + minor) * 100 + patch if major == 8 else major * 10000 + minor * 100 + patch
    graphs = graphs_of(family)
    if plugin is not None:
        (folder / SELF_REGISTERING).write_bytes(plugin.read_bytes())
    entries = []
    for graph in graphs:
        engine, files = model_files(graph.name)[1], reference_files(graph.name)
        (folder / engine).write_text(engine_text(graph, number, plugin is not None), "utf-8")
        stored = reference_of(graph.name)
        save_feeds(folder / files.feeds, [feeds for feeds, _ in stored.values()])
        save_outputs(folder / files.exact, "eager-float64", [answers for _, answers in stored.values()])
        verification = {
            "primary": graph.outputs[0][0],
            "feeds": list(stored),
            "eager_error": {output[0]: 1e-6 for output in graph.outputs},
            "polygraphy_arguments": [],
        }
        entries.append(
            {
                "name": graph.name,
                "onnx": model_files(graph.name)[0],
                "engine": engine,
                "inputs": [{"name": n, "dtype": t, "shape": list(s)} for n, t, s, *_ in graph.inputs],
                "outputs": [{"name": n, "dtype": t, "shape": list(s)} for n, t, s in graph.outputs],
                "profiles": [],
                "verification": verification,
            }
        )
    manifest = {
        "format_version": FORMAT_VERSION,
        "status": "PASS",
        "precision": {"requested": "fp32", "built": {}},
        "backend": {"name": "tensorrt", "version": f"{major}.{minor}.{patch}.1", "compute_capabilities": ["9.0"]},
        "operator": {"name": "HstuAttention", "namespace": "hstu", "version": "1", "nodes": 2},
        "limits": {"max_batch": MAX_BATCH, "max_seq_len": MAX_SEQ_LEN}
        | ({"num_items": NUM_ITEMS} if family == "retrieval" else {}),
        "graphs": entries,
        "ranking": RANKING.to_dict() if family == "ranking" else None,
    }
    write_manifest(folder, manifest)
    return folder


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest that vouches for every file as it is now."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": files}, indent=1), "utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as it is."""
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text("utf-8"))
    return content
