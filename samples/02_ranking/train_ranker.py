"""Train a small DLRM-HSTU ranker on MovieLens-100K on the CPU and save it as an hstu-compile checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hstu_compile import AttentionConfig, LayerConfig, save_checkpoint
from hstu_compile.model.ranking import RankingModel
from hstu_compile.model.ranking_config import (
    ContextualFeature,
    EmbeddingTable,
    ItemFeature,
    RankingConfig,
    RankingTask,
    SequenceFeature,
)

import ranking_data
from ranking_data import prepare_data
from train import positive_int

DEFAULT_OUTPUT = prepare_data.REPOSITORY / "build" / "demo-ranking"
CHECKPOINT_NAME = "checkpoint.pt"

EMBEDDING_DIM = 64
TABLE_DIM = 32
NUM_LAYERS = 2
#: Most candidates of one packed forward when the model serves.
MAX_CANDIDATES = 64


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: requests of every user.
        batch_size: requests per step.
        learning_rate: peak of the one-cycle schedule.
        weight_decay: of AdamW, on matrices only.
        seed: of initialisation, order and moments.
    """

    epochs: int = 12
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    seed: int = 0


def ranker_config() -> RankingConfig:
    """The semantics of Meta's DLRM-HSTU at the size of this sample, with a divisor that no batch can change."""
    attention = AttentionConfig(
        num_heads=2,
        attention_dim=32,
        linear_dim=32,
        alpha=32**-0.5,
        scaling_seq_len=float(ranking_data.MAX_HISTORY),
        max_seq_len=1 + ranking_data.MAX_HISTORY + MAX_CANDIDATES,
    )
    layer = LayerConfig(
        embedding_dim=EMBEDDING_DIM,
        attention=attention,
        silu_scope="u",
        uvqk_bias=True,
        input_norm=True,
        input_norm_affine=True,
        output_norm="layer",
        output_norm_affine=True,
        norm_eps=1e-6,
        output_concat="u_attn_gated",
        output_projection=True,
        output_bias=False,
    )
    return RankingConfig(
        dialect="native",
        num_layers=NUM_LAYERS,
        layer=layer,
        tables=(
            EmbeddingTable("movie_id", prepare_data.NUM_ITEMS + 1, TABLE_DIM),
            EmbeddingTable("user_id", ranking_data.NUM_USERS, TABLE_DIM),
        ),
        sequence_features=(SequenceFeature("movie_id", "item_movie_id", "movie_id"),),
        contextual_features=(ContextualFeature("user_id", "user_id", max_length=1, min_history_len=0),),
        item_features=(ItemFeature("item_movie_id", "movie_id"),),
        history_time_feature="action_timestamp",
        candidate_time_feature="item_query_time",
        action_feature="item_weights",
        action_weights=(1, 2, 4, 8, 16),
        action_embedding_dim=8,
        hidden_dim=64,
        tower_hidden_dim=128,
        num_positions=256,
        num_time_buckets=2048,
        time_bucket_fn="sqrt",
        time_bucket_clamp="table",
        postprocessor="timestamp_layer_norm",
        time_feature_precision="exact",
        tasks=(RankingTask("like", "binary"),),
        max_history_len=ranking_data.MAX_HISTORY,
        max_candidates=MAX_CANDIDATES,
        scaling="fixed",
        min_history_counts="history",
    )


def like_loss(model: RankingModel, requests: list[ranking_data.Request]) -> Tensor:
    """Binary cross-entropy of "rated at least LIKE", mean over the candidates of the batch."""
    feeds = {name: torch.from_numpy(array) for name, array in ranking_data.packed_feeds(requests).items()}
    liked = torch.from_numpy(np.concatenate([request.liked for request in requests]).astype(np.float32))
    return F.binary_cross_entropy_with_logits(model.packed(feeds).logits[:, 0], liked)


def train(
    config: RankingConfig, histories: prepare_data.Histories, recipe: Recipe, *, show_progress: bool = True
) -> tuple[RankingModel, float]:
    """Train from scratch.

    Returns:
        The model in evaluation mode, and the mean loss of the last epoch.
    """
    torch.manual_seed(recipe.seed)
    generator = np.random.default_rng(recipe.seed)
    model = RankingModel(config).train()
    for table in model.tables.parameters():
        torch.nn.init.normal_(table, std=0.1)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
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
            losses = []
            requests = ranking_data.training_requests(histories, generator)
            while batch := list(itertools.islice(requests, recipe.batch_size)):
                step_loss = like_loss(model, batch)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(step_loss)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(step_loss.item())
                bar.set_postfix(epoch=f"{epoch + 1}/{recipe.epochs}", loss=f"{losses[-1]:.4f}", refresh=False)
                bar.update()
            loss = float(np.mean(losses))
    return model.eval(), loss


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `ranking_demo.py` shares."""
    recipe = Recipe()
    parser.add_argument("--epochs", type=positive_int, default=recipe.epochs, help=f"passes (default: {recipe.epochs})")
    parser.add_argument("--seed", type=int, default=recipe.seed, help=f"random seed (default: {recipe.seed})")
    parser.add_argument(
        "--data-dir", type=Path, default=prepare_data.DEFAULT_DATA_DIR, help="cache of the data (default: build/data)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=DEFAULT_OUTPUT, help="folder for the results (default: build/demo-ranking)"
    )


def train_from_arguments(arguments: argparse.Namespace, histories: prepare_data.Histories) -> Path:
    """Train as the options of `add_training_arguments` say, print one line about it; returns the checkpoint."""
    started = time.monotonic()
    model, loss = train(ranker_config(), histories, Recipe(epochs=arguments.epochs, seed=arguments.seed))
    print(f"trained {arguments.epochs} epochs in {time.monotonic() - started:.0f} s, last loss {loss:.4f}", flush=True)
    checkpoint: Path = arguments.output / CHECKPOINT_NAME
    save_checkpoint(model, checkpoint)
    return checkpoint


def main() -> int:
    """Fetch the data, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_training_arguments(parser)
    arguments = parser.parse_args()
    try:
        histories = prepare_data.load_histories(prepare_data.fetch(arguments.data_dir))
    except prepare_data.DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(train_from_arguments(arguments, histories))
    return 0


if __name__ == "__main__":
    sys.exit(main())
