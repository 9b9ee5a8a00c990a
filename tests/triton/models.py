"""Two small bundles as models of a Triton repository, and what the eager PyTorch model answers to each request."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hstu_compile.bundle import read_bundle
from hstu_compile.compare import error_bound, row_error
from hstu_compile.served import ServedGraph, packed_graph, retrieval_graph
from hstu_compile.serving.repository import RepositoryRequest, write_repository
from hstu_compile.serving.samples import Sample, sample_requests
from tests.dlrm_reference import DlrmForm
from tests.e2e.conftest import hstu_compile, save_checkpoint, save_ranking_checkpoint
from tests.exported_models import ranking_model, small_config, small_model
from tests.triton.server import TritonServer

TOP_K, MAX_BATCH = 5, 8
#: Against the eager model in float64; the rule of every build of a float32 graph.
TOLERANCE = error_bound(0.0, "fp32")

#: Contextual features of one and of three values, features of the item tower alone, two tasks, and a divisor that does
#: not depend on the batch.
RANKING_FORM = DlrmForm(
    contextual=(("user_id", 1, 20), ("genres", 3, 5)),
    item_only=("item_shop",),
    tasks=(("like", 0), ("minutes", 1)),
    scaling_seq_len=57.0,
    num_layers=1,
)


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A bundle, and the eager model that it was made from.

    Attributes:
        name: of the model in a repository.
        bundle: the bundle.
        eager: its graph in PyTorch, in float64.
    """

    name: str
    bundle: Path
    eager: ServedGraph

    def samples(self, count: int, seed: int = 0) -> list[Sample]:
        """Legal requests of mixed lengths, without the batch axis."""
        return sample_requests(read_bundle(self.bundle, check_files=False), count, seed)

    def expected(self, sample: Sample) -> dict[str, Any]:
        """What the eager model answers when this request is all it is asked."""
        feeds: dict[str, Any] = dict(sample)
        axes = {each.name: each.axis for each in self.eager.inputs}
        for offsets, axis in (("seq_offsets", "L"), ("candidate_offsets", "T")):
            if offsets in axes:
                counted = next(name for name, its in axes.items() if its == axis)
                feeds[offsets] = np.array([0, len(sample[counted])], np.int32)
        values = self.eager.run({name: feeds[name] for name in axes})
        return {name: values[name] for name in self.eager.outputs}

    def check(self, answer: Mapping[str, Any], sample: Sample, tied: bool = False) -> None:
        """Compare an answer, with the batch axis as Triton gives it, with the eager model's.

        Args:
            answer: output name to array.
            sample: what was asked.
            tied: all items have one score, so that their order has no meaning.

        Raises:
            AssertionError: naming the output.
        """
        for name, exact in self.expected(sample).items():
            if tied and name == "top_items":
                assert len(set(answer[name].reshape(-1).tolist())) == TOP_K
                continue
            actual = answer[name]
            rows = exact if self.eager.name == "retrieval" else exact[None]
            assert actual.shape == rows.shape, (name, actual.shape, rows.shape)
            if name == "top_items":
                assert np.array_equal(actual, rows), name
            else:
                assert row_error(actual.reshape(exact.shape), exact).error <= TOLERANCE, name


def deploy(server: TritonServer, model: ServedModel, name: str, **options: Any) -> str:
    """Write the model into the server's repository under that name, and load it; returns the name.

    Args:
        server: running.
        model: a bundle.
        name: in the repository.
        options: of `RepositoryRequest`.
    """
    write_repository(RepositoryRequest(model.bundle, server.repository, name=name, **options))
    server.load(name)
    return name


def build_retrieval(folder: Path) -> ServedModel:
    """One layer, 20 events, a list of items and the graphs of a growing history; a bundle that is there stays."""
    config = small_config(1, num_ratings=4, preprocessor="rated", item_embedding_dim=28)
    bundle = folder / "retrieval.hstu"
    if not bundle.exists():
        checkpoint = save_checkpoint(folder / "small.pt", config)
        _build(checkpoint, bundle, "--top-k", TOP_K, "--incremental", "max-append=4")
    model = small_model(config).cast(torch.float64)
    return ServedModel("retrieval", bundle, retrieval_graph(model, TOP_K))


def build_ranking(folder: Path) -> ServedModel:
    """One layer over 48 events and 24 candidates, with the graphs of M-FALCON; a bundle that is there stays."""
    bundle = folder / "ranking.hstu"
    if not bundle.exists():
        checkpoint, config = save_ranking_checkpoint(folder, RANKING_FORM)
        _build(checkpoint, bundle, "--config", config, "--m-falcon", "micro-batch=5")
    return ServedModel("ranking", bundle, packed_graph(ranking_model(RANKING_FORM, torch.float64)))


def _build(checkpoint: Path, bundle: Path, *options: object) -> None:
    """Without verification: that is what other tests are about."""
    command = ("build", checkpoint, "-o", bundle, "--backend", "onnx", "--max-batch", MAX_BATCH, "--no-verify")
    built = hstu_compile(*command, *options)
    assert built.exit_code == 0, built.stderr
