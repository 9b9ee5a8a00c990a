"""Small exported models and legal request batches for the tests of graph passes, engines and sessions."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from hstu_compile.artifacts import Precision
from hstu_compile.export import TORCH_DTYPES, exported_from_model
from hstu_compile.model import AttentionConfig, LayerConfig, RetrievalConfig, RetrievalModel
from hstu_compile.rewrite import apply_passes, export_passes

NUM_ITEMS, NUM_RATINGS, MAX_SEQ_LEN, NUM_LAYERS, WIDTH = 100, 6, 24, 2, 32
LAST_TIMESTAMP = 2**30
TAPS = tuple(f"layer_{i}" for i in range(NUM_LAYERS + 1))


def small_model(precision: Precision, *, rated: bool = False) -> RetrievalModel:
    """A research model of two layers with all biases; the same weights for the same arguments."""
    attention = AttentionConfig(
        num_heads=2,
        attention_dim=16,
        linear_dim=16,
        alpha=1.0,
        scaling_seq_len=float(MAX_SEQ_LEN),
        max_seq_len=MAX_SEQ_LEN,
        pos_table_len=32,
        time_bias="next",
        num_time_buckets=128,
        time_bucket_divisor=0.301,
    )
    layer = LayerConfig(
        embedding_dim=WIDTH,
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
    config = RetrievalConfig(
        dialect="research",
        num_items=NUM_ITEMS,
        num_layers=NUM_LAYERS,
        layer=layer,
        preprocessor="rated" if rated else "positional",
        item_embedding_dim=24 if rated else WIDTH,
        num_ratings=NUM_RATINGS if rated else 0,
        num_positions=32,
        hour_encoding="none",
        postprocessor="l2_norm",
        postprocessor_eps=1e-6,
        item_l2_norm=True,
    )
    torch.manual_seed(0)
    model = RetrievalModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)  # otherwise attention hardly moves the residual stream, and an error in it hides
    return model.cast(TORCH_DTYPES[precision])


@functools.cache
def _exported(precision: Precision, top_k: int, rated: bool) -> bytes:
    graph = exported_from_model(small_model(precision, rated=rated), precision, top_k)
    for step in apply_passes(graph, export_passes(NUM_LAYERS, TAPS)):
        graph = step
    return bytes(graph.model.SerializeToString())


def exported_graph(precision: Precision, *, top_k: int = 0, rated: bool = False) -> onnx.ModelProto:
    """The shipped graph of `small_model`; exported once per process, a new copy each time."""
    return onnx.load_from_string(_exported(precision, top_k, rated))


def request_batch(lengths: tuple[int, ...], *, rated: bool = False, seed: int = 0) -> dict[str, NDArray[Any]]:
    """A legal batch of sequences with these lengths."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    total = int(offsets[-1])
    times = [np.sort(rng.integers(0, LAST_TIMESTAMP, length)) for length in lengths]
    batch: dict[str, NDArray[Any]] = {
        "item_ids": rng.integers(1, NUM_ITEMS + 1, total).astype(np.int32),
        "timestamps": np.concatenate([*times, np.zeros(0, np.int64)]).astype(np.int64),
        "seq_offsets": offsets,
        "request_timestamps": np.full(len(lengths), LAST_TIMESTAMP + 60, np.int64),
    }
    if rated:
        batch["ratings"] = rng.integers(0, NUM_RATINGS, total).astype(np.int32)
    return batch
