"""Train a small HSTU on MovieLens-100K on the CPU and save it as an hstu-compile checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hstu_compile import AttentionConfig, LayerConfig, RetrievalConfig, save_checkpoint
from hstu_compile.model import HstuLayer, RetrievalModel

import prepare_data

DEFAULT_CHECKPOINT = prepare_data.REPOSITORY / "build" / "demo" / "checkpoint.pt"

EMBEDDING_DIM = 50
NUM_LAYERS = 2
#: History plus the room that research HSTU leaves for outputs; also the divisor of its attention.
MAX_SEQ_LEN = prepare_data.MAX_HISTORY + 11


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the users.
        batch_size: users per step.
        learning_rate: peak of the one-cycle schedule.
        weight_decay: of AdamW, on matrices only.
        dropout: on the input embedding and on each gated attention output.
        temperature: divisor of the cosine scores in the softmax.
        seed: of initialisation, order and dropout.
    """

    epochs: int = 34
    batch_size: int = 16
    learning_rate: float = 4e-3
    weight_decay: float = 0.01
    dropout: float = 0.2
    temperature: float = 0.05
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class TrainingBatch:
    """Histories whose every event is asked to predict the next one.

    Attributes:
        item_ids: [L] int32.
        timestamps: [L] int64 seconds.
        seq_offsets: [B + 1] int32.
        request_timestamps: [B] int64 seconds -- time of the event after the last one.
        next_ids: [L] int64 -- the item that followed each event.
    """

    item_ids: Tensor
    timestamps: Tensor
    seq_offsets: Tensor
    request_timestamps: Tensor
    next_ids: Tensor


def research_config(*, hour_encoding: str = "none", positions: bool = True) -> RetrievalConfig:
    """The semantics of Meta's research HSTU at the size of this demo."""
    attention = AttentionConfig(
        num_heads=1,
        attention_dim=EMBEDDING_DIM,
        linear_dim=EMBEDDING_DIM,
        alpha=1.0,
        scaling_seq_len=float(MAX_SEQ_LEN),
        max_seq_len=MAX_SEQ_LEN,
        pos_table_len=MAX_SEQ_LEN,
        time_bias="next",
        num_time_buckets=128,
        time_bucket_divisor=0.301,
    )
    layer = LayerConfig(
        embedding_dim=EMBEDDING_DIM,
        attention=attention,
        silu_scope="uvqk",
        uvqk_bias=False,
        input_norm=True,
        input_norm_affine=False,
        output_norm="layer",
        output_norm_affine=False,
        norm_eps=1e-6,
        output_concat="gated",
        output_projection=True,
        output_bias=True,
    )
    return RetrievalConfig.from_dict(
        {
            "dialect": "native",
            "num_items": prepare_data.NUM_ITEMS,
            "num_layers": NUM_LAYERS,
            "layer": dataclasses.asdict(layer),
            "preprocessor": "positional",
            "item_embedding_dim": EMBEDDING_DIM,
            "num_ratings": 0,
            "num_positions": MAX_SEQ_LEN if positions else 0,
            "hour_encoding": hour_encoding,
            "postprocessor": "l2_norm",
            "postprocessor_eps": 1e-6,
            "item_l2_norm": True,
        }
    )


def training_batches(
    histories: prepare_data.Histories, batch_size: int, generator: np.random.Generator
) -> Iterator[TrainingBatch]:
    """One epoch: a random window of each user's events, the last one (the evaluation target) left out.

    Users of similar length share a batch, because the eager attention pads to the longest; the noise in the sort key
    mixes the batches between epochs.
    """
    ends = histories.seq_offsets[1:] - 1
    starts = histories.seq_offsets[:-1]
    window = np.minimum(ends - starts, prepare_data.MAX_HISTORY + 1)
    window_starts = starts + generator.integers(0, ends - starts - window + 1)
    users = np.flatnonzero(window >= 2)
    users = users[np.argsort(window[users] * generator.uniform(0.9, 1.1, users.shape[0]))]
    batches = [users[first : first + batch_size] for first in range(0, users.shape[0], batch_size)]
    for index in generator.permutation(len(batches)):
        members = batches[index]
        last = window_starts[members] + window[members] - 1
        events = np.concatenate([np.arange(s, e) for s, e in zip(window_starts[members], last, strict=True)])
        yield TrainingBatch(
            item_ids=torch.from_numpy(histories.item_ids[events]),
            timestamps=torch.from_numpy(histories.timestamps[events]),
            seq_offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(window[members] - 1)]).astype(np.int32)),
            request_timestamps=torch.from_numpy(histories.timestamps[last]),
            next_ids=torch.from_numpy(histories.item_ids[events + 1].astype(np.int64)),
        )


def next_item_loss(model: RetrievalModel, data: TrainingBatch, recipe: Recipe) -> Tensor:
    """Cross-entropy of the next item over the whole catalogue, mean over the events of the batch."""
    batch, position = model.batch(data.timestamps, data.seq_offsets, data.request_timestamps)
    x = model.embed(data.item_ids, data.timestamps, position, None, recipe.dropout)
    for layer in cast(Iterable[HstuLayer], model.layers):
        uvqk = layer.project_uvqk(x)
        # The gate multiplies the normed attention, so dropping u drops the same entries of their product.
        gate = F.dropout(uvqk.u, recipe.dropout, model.training)
        x = layer.output(x, gate, layer.attend(uvqk, batch))
    scores = model.normalise(x) @ model.item_vectors().T
    return F.cross_entropy(scores / recipe.temperature, data.next_ids - 1)


def train(
    config: RetrievalConfig, histories: prepare_data.Histories, recipe: Recipe, *, show_progress: bool = True
) -> tuple[RetrievalModel, float]:
    """Train from scratch.

    Returns:
        The model in evaluation mode, and the mean loss of the last epoch.
    """
    torch.manual_seed(recipe.seed)
    generator = np.random.default_rng(recipe.seed)
    model = RetrievalModel(config).train()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))
    total_steps = recipe.epochs * math.ceil(histories.num_users / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=total_steps, pct_start=0.1
    )
    loss = math.nan
    # A log file gets a line's worth of progress every ten seconds; a terminal gets a moving bar.
    interval = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=total_steps,
        desc="train",
        unit="step",
        mininterval=interval,
        maxinterval=interval,
        disable=not show_progress,
    ) as bar:
        for epoch in range(recipe.epochs):
            total, events = 0.0, 0
            for data in training_batches(histories, recipe.batch_size, generator):
                step_loss = next_item_loss(model, data, recipe)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(step_loss)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                total += step_loss.item() * data.item_ids.shape[0]
                events += data.item_ids.shape[0]
                loss = total / events
                bar.set_postfix(epoch=f"{epoch + 1}/{recipe.epochs}", loss=f"{loss:.4f}", refresh=False)
                bar.update()
    return model.eval(), loss


def positive_int(text: str) -> int:
    """The value of an option that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `demo.py` shares."""
    recipe = Recipe()
    parser.add_argument("--epochs", type=positive_int, default=recipe.epochs, help=f"passes (default: {recipe.epochs})")
    parser.add_argument("--seed", type=int, default=recipe.seed, help=f"random seed (default: {recipe.seed})")
    parser.add_argument(
        "--hour-encoding",
        choices=("none", "additive"),
        default="none",
        help="add the sinusoid of the hour of day to each event (default: none)",
    )
    parser.add_argument("--no-positions", action="store_true", help="no learned position embedding")
    parser.add_argument(
        "--data-dir", type=Path, default=prepare_data.DEFAULT_DATA_DIR, help="cache of the data (default: build/data)"
    )


def train_from_arguments(arguments: argparse.Namespace, histories: prepare_data.Histories) -> RetrievalModel:
    """Train as the options of `add_training_arguments` say, and print one line about it."""
    config = research_config(hour_encoding=arguments.hour_encoding, positions=not arguments.no_positions)
    started = time.monotonic()
    model, loss = train(config, histories, Recipe(epochs=arguments.epochs, seed=arguments.seed))
    print(f"trained {arguments.epochs} epochs in {time.monotonic() - started:.0f} s, last loss {loss:.4f}", flush=True)
    return model


def main() -> int:
    """Fetch the data, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_training_arguments(parser)
    parser.add_argument(
        "-o", "--output", type=Path, default=DEFAULT_CHECKPOINT, help="default: build/demo/checkpoint.pt"
    )
    arguments = parser.parse_args()
    try:
        histories = prepare_data.load_histories(prepare_data.fetch(arguments.data_dir))
    except prepare_data.DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    save_checkpoint(train_from_arguments(arguments, histories), arguments.output)
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
