"""The whole way on real data: train on MovieLens-100K, build the fp16 bundle, compare what each form recommends."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hstu_compile import load_bundle, save_checkpoint
from hstu_compile.checkpoint import model_from_spec, spec_from_checkpoint
from hstu_compile.errors import EXIT_VERIFICATION
from hstu_compile.metrics import RankMetrics, rank_metrics, target_ranks, top_k_overlap
from hstu_compile.model import RetrievalModel

import prepare_data
import train

DEFAULT_OUTPUT = prepare_data.REPOSITORY / "build" / "demo"
COMPARED_TOP_K = 10

#: Request feeds by graph input name -> user embeddings [B, D] float32.
UserEncoder = Callable[[Mapping[str, NDArray[Any]]], NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one form of the model recommends to every user.

    Attributes:
        metrics: ranking quality on the left-out events.
        top_items: [U, COMPARED_TOP_K] int64 -- best unseen items.
    """

    metrics: RankMetrics
    top_items: NDArray[np.int64]


def eager_encoder(model: RetrievalModel) -> UserEncoder:
    """The PyTorch model as a function of arrays."""

    def encode(feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        with torch.inference_mode():
            embeddings = model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        result: NDArray[Any] = embeddings.numpy()
        return result

    return encode


def evaluate(encoder: UserEncoder, item_vectors: NDArray[Any], histories: prepare_data.Histories) -> Evaluation:
    """Leave-one-out over all users: score the catalogue, leave out the request's history, rank the true next item.

    Args:
        encoder: user embeddings of one request batch.
        item_vectors: [V, D] float32 -- of items 1..V.
        histories: all users.
    """
    ranks, top_items = [], []
    for feeds, target_ids in prepare_data.evaluation_feeds(histories):
        scores = encoder(feeds) @ item_vectors.T
        ranks.append(target_ranks(scores, target_ids, feeds["item_ids"], feeds["seq_offsets"]))
        owners = np.repeat(np.arange(target_ids.shape[0]), np.diff(feeds["seq_offsets"]))
        scores[owners, feeds["item_ids"] - 1] = -np.inf
        top_items.append(np.argsort(-scores, axis=1, kind="stable")[:, :COMPARED_TOP_K] + 1)
    return Evaluation(rank_metrics(ranks), np.concatenate(top_items))


def build_bundle(checkpoint: Path, bundle: Path) -> int:
    """Run `hstu-compile build` as a user would, its output passed through; returns its exit status."""
    arguments = ["build", str(checkpoint), "--fp16", "-o", str(bundle), "--force"]
    print(f"\n$ hstu-compile {' '.join(arguments)}", flush=True)
    program = Path(sysconfig.get_path("scripts")) / "hstu-compile"
    return subprocess.run([str(program), *arguments], stdin=subprocess.DEVNULL, check=False).returncode


def compare(checkpoint: Path, bundle: Path, histories: prepare_data.Histories) -> dict[str, Evaluation]:
    """Evaluate the eager model in both precisions and the built artifact, by name, the fp32 reference first.

    The artifact returns user embeddings; they are scored against the item vectors of the same precision.
    """
    spec = spec_from_checkpoint(checkpoint)
    full, half = model_from_spec(spec), model_from_spec(spec, torch.float16)
    assert isinstance(full, RetrievalModel)
    assert isinstance(half, RetrievalModel)
    full_items, half_items = full.item_vectors().numpy(), half.item_vectors().numpy()
    evaluations = {
        "eager fp32": evaluate(eager_encoder(full), full_items, histories),
        "eager fp16": evaluate(eager_encoder(half), half_items, histories),
    }
    with load_bundle(bundle) as built:
        evaluations["built artifact (fp16)"] = evaluate(
            lambda feeds: built.run(feeds)["user_embeddings"], half_items, histories
        )
    return evaluations


def table(evaluations: Mapping[str, Evaluation]) -> str:
    """One row per form of the model; the overlap is with the first row."""
    reference = next(iter(evaluations.values()))
    rows = [f"{'':<24}{'HR@10':>9}{'NDCG@10':>9}{'HR@50':>9}{'MRR':>9}{'same top 10':>13}"]
    for name, evaluation in evaluations.items():
        metrics = evaluation.metrics
        overlap = top_k_overlap(reference.top_items, evaluation.top_items, COMPARED_TOP_K)
        rows.append(
            f"{name:<24}{metrics.hr10:>9.4f}{metrics.ndcg10:>9.4f}{metrics.hr50:>9.4f}{metrics.mrr:>9.4f}{overlap:>13.2%}"
        )
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare, train, build, compare; the exit status is that of the build.

    A bundle that failed verification exists and is compared all the same: the table shows what the error does.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    train.add_training_arguments(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        help="folder for the results (default: build/demo)",
    )
    arguments = parser.parse_args(argv)
    try:
        histories = prepare_data.load_histories(prepare_data.fetch(arguments.data_dir))
    except prepare_data.DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"MovieLens-100K: {histories.num_users} users, {histories.item_ids.shape[0]} events", flush=True)
    checkpoint, bundle = arguments.output / "checkpoint.pt", arguments.output / "bundle"
    save_checkpoint(train.train_from_arguments(arguments, histories), checkpoint)
    status = build_bundle(checkpoint, bundle)
    if status not in (0, EXIT_VERIFICATION):
        return status
    print(f"\nLeave-one-out on {histories.num_users} users, items of the history left out:", flush=True)
    print(table(compare(checkpoint, bundle, histories)))
    print(f"\nbundle  {bundle}\nreport  {bundle / 'report.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
