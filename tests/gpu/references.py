"""What prepare_job.py stored, as the checks on the GPU need it: bundles with their references, and leave-one-out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from hstu_compile import bundle as bundles
from hstu_compile.artifacts import Precision
from hstu_compile.metrics import RankMetrics, rank_metrics, target_ranks
from hstu_compile.op_schema import is_norm
from hstu_compile.recheck import stored_reference
from hstu_compile.session_check import Reference

Arrays = dict[str, NDArray[Any]]

#: Issue bound: HR@10 and NDCG@10 of a half engine against eager float32.
RANKING_BOUND = 0.002


@dataclasses.dataclass(frozen=True)
class PreparedModel:
    """One bundle without an engine, and what the eager model answers.

    Attributes:
        name: of its folder, "research-fp16".
        folder: the bundle.
        precision: of the graph.
        num_layers: HSTU layers.
        reference: feeds, float64 and eager outputs, without top-k items.
    """

    name: str
    folder: Path
    precision: Precision
    num_layers: int
    reference: Reference

    @property
    def onnx(self) -> Path:
        """The graph's file."""
        return self.folder / bundles.ONNX_FILE

    @property
    def num_norms(self) -> int:
        """Norm nodes of the graph."""
        return sum(is_norm(node) for node in onnx.load(self.onnx).graph.node)


def prepared_model(job: Path, name: str) -> PreparedModel:
    """Read one of the job's bundles."""
    folder = job / "models" / name
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    reference = stored_reference(folder, manifest["graphs"][0])
    layers = json.loads((job / "job.json").read_text(encoding="utf-8"))["num_layers"][name]
    return PreparedModel(name, folder, manifest["precision"]["requested"], layers, reference)


@dataclasses.dataclass(frozen=True)
class LeaveOneOut:
    """Every user's last event predicted from the ones before.

    Attributes:
        batches: feeds of the requests.
        targets: ids that were really chosen, per batch.
        item_vectors: [V, D] float32 by precision of the model.
        eager_users: [U, D] float32 -- eager float32 user embeddings of all batches.
    """

    batches: list[Arrays]
    targets: list[NDArray[Any]]
    item_vectors: Mapping[str, NDArray[Any]]
    eager_users: NDArray[Any]

    def metrics(self, encode: Callable[[Arrays], NDArray[Any]], precision: str) -> RankMetrics:
        """Ranking quality of an encoder of one batch."""
        ranks = []
        for feeds, targets in zip(self.batches, self.targets, strict=True):
            scores = encode(feeds) @ self.item_vectors[precision].T
            ranks.append(target_ranks(scores, targets, feeds["item_ids"], feeds["seq_offsets"]))
        return rank_metrics(ranks)

    def eager_metrics(self) -> RankMetrics:
        """Of the eager float32 model."""
        ends = np.cumsum([len(targets) for targets in self.targets])
        users = iter(np.split(self.eager_users, ends[:-1]))
        return self.metrics(lambda _: next(users), "fp32")


def leave_one_out(job: Path) -> LeaveOneOut:
    """Read the requests and eager answers of the research model."""
    with np.load(job / "leave_one_out.npz", allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    count = int(arrays["num_batches"])
    names = ("item_ids", "timestamps", "seq_offsets", "request_timestamps")
    return LeaveOneOut(
        batches=[{name: arrays[f"{name}_{i}"] for name in names} for i in range(count)],
        targets=[arrays[f"targets_{i}"] for i in range(count)],
        item_vectors={p: arrays[f"item_vectors_{p}"] for p in ("fp32", "fp16", "bf16")},
        eager_users=arrays["eager_users"],
    )


def compare_ranking(checks_facts: dict[str, Any], stored: LeaveOneOut, encode: Any, precision: str) -> bool:
    """Put both models' metrics into the facts; True if HR@10 and NDCG@10 agree within `RANKING_BOUND`."""
    eager, measured = stored.eager_metrics(), stored.metrics(encode, precision)
    differences = {name: abs(getattr(eager, name) - getattr(measured, name)) for name in ("hr10", "ndcg10")}
    checks_facts |= {
        "eager_fp32": dataclasses.asdict(eager),
        "measured": dataclasses.asdict(measured),
        "differences": differences,
        "bound": RANKING_BOUND,
    }
    return max(differences.values()) <= RANKING_BOUND


def empty_requests(batch: int) -> Arrays:
    """A batch whose sequences are all empty: L = 0."""
    return {
        "item_ids": np.zeros(0, np.int32),
        "timestamps": np.zeros(0, np.int64),
        "seq_offsets": np.zeros(batch + 1, np.int32),
        "request_timestamps": np.full(batch, 900_000_000, np.int64),
    }
