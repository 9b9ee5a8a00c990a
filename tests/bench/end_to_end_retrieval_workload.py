"""The end-to-end benchmark's retrieval cases: Meta's research HSTU at the sizes of ml-20m-large.

Sizes are those of configs/ml-20m/hstu-sampled-softmax-n128-large-final.gin of generative-recommenders, read at db1bf8f:
16 blocks, 8 heads of 32, width 256, histories of up to 200 events, N = 211; the item table has a row for every id up to
131,262, the largest of the data set. Weights are random, as m_falcon_workload.py draws them.

NumPy alone: used beside TensorRT 8.5 on Python 3.10, beside TensorRT-RTX and beside torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from m_falcon_workload import QUERY_TIME, integers, parameter
from numpy.typing import NDArray

RETRIEVAL = "retrieval"
#: Of ml-20m's users: every one has 20 ratings or more, half have 68 or more, and the mean is 144.
FEWEST_EVENTS, MEDIAN_EVENTS, MEAN_EVENTS = 20, 68, 144
BATCHES = (1, 8, 64, 128)

Arrays = dict[str, NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class RetrievalSizes:
    """Dimensions of the model; the defaults are those of ml-20m-large.

    Attributes:
        width: D, of a token and of an item.
        num_heads: H.
        attention_dim: of a query and key, per head.
        linear_dim: of a value, per head.
        num_layers: HSTU layers.
        num_items: items 1 to num_items; row 0 of the table is padding.
        max_history: events of a request.
        max_output_len: what training adds to them; together they are N, the divisor and the size of the tables.
        num_time_buckets: the time table has one entry more.
    """

    width: int = 256
    num_heads: int = 8
    attention_dim: int = 32
    linear_dim: int = 32
    num_layers: int = 16
    num_items: int = 131_262
    max_history: int = 200
    max_output_len: int = 11
    num_time_buckets: int = 128

    @property
    def table_len(self) -> int:
        """N."""
        return self.max_history + self.max_output_len

    @property
    def inner(self) -> int:
        """Width of u and v."""
        return self.num_heads * self.linear_dim

    @property
    def query(self) -> int:
        """Width of q and k."""
        return self.num_heads * self.attention_dim


ML_20M_LARGE = RetrievalSizes()
#: Small enough for a CPU test; every part of the model is there.
TINY_RETRIEVAL = RetrievalSizes(64, 2, 32, 32, 3, num_items=300, max_history=40)


@dataclasses.dataclass(frozen=True)
class RetrievalCase:
    """One batch of histories, and how it is computed.

    Attributes:
        shape: name without type and pruning, such as "retrieval_B8_n200".
        dtype: "bf16" or "fp16".
        lengths: [B] events of each user.
        is_pruned: of the last layer only what the last row of each history needs.
    """

    shape: str
    dtype: str
    lengths: tuple[int, ...]
    is_pruned: bool = False

    mode = RETRIEVAL
    num_candidates = 0
    #: No speed is asked for.
    bar = 0.0

    @property
    def name(self) -> str:
        """For the CSV and for file names."""
        return f"{self.dtype}_{self.shape}" + ("_pruned" if self.is_pruned else "")

    @property
    def batch(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Rows that the forward computes."""
        return sum(self.lengths)

    @property
    def max_rows(self) -> int:
        """Rows of the longest history."""
        return max(self.lengths)

    @property
    def is_even(self) -> bool:
        """All histories have one length."""
        return min(self.lengths) == self.max_rows

    @property
    def reference(self) -> str:
        """Name of what the answers are compared with: pruning changes no answer."""
        return f"{self.dtype}_{self.shape}"


def ragged_lengths(batch: int, sizes: RetrievalSizes = ML_20M_LARGE) -> tuple[int, ...]:
    """[B] lengths as ml-20m's users have them, log-normal and cut at the model's limit, in a fixed order.

    The numbers are the distribution's quantiles, so that even a small batch has its shape; of one user, the median.
    """
    deviation = math.sqrt(2 * math.log(MEAN_EVENTS / MEDIAN_EVENTS))
    normal = NormalDist(math.log(MEDIAN_EVENTS), deviation)
    drawn = [round(math.exp(normal.inv_cdf((index + 0.5) / batch))) for index in range(batch)]
    order = np.argsort(integers(f"ragged {batch}", batch, 2**31), kind="stable")
    return tuple(min(max(drawn[place], FEWEST_EVENTS), sizes.max_history) for place in order)


def retrieval_cases(dtypes: Sequence[str]) -> Iterator[RetrievalCase]:
    """Every case, those of the smallest batches first."""
    full = ML_20M_LARGE.max_history
    for dtype in dtypes:
        for batch in BATCHES:
            for shape, lengths in ((f"B{batch}_n{full}", (full,) * batch), (f"B{batch}_ragged", ragged_lengths(batch))):
                for is_pruned in (True, False):
                    yield RetrievalCase(f"retrieval_{shape}", dtype, lengths, is_pruned)


def retrieval_arrays(case: RetrievalCase, sizes: RetrievalSizes) -> Arrays:
    """Inputs of the forward as our graph names them, users one behind the other, each with history of its own.

    Events lie seconds apart, and one in ten follows a pause of hours to months.
    """
    items, times = [], []
    for user, count in enumerate(case.lengths):
        prefix = f"retrieval n={count} user={user}"
        items.append(1 + integers(f"{prefix} items", count, sizes.num_items))
        gaps = 1 + integers(f"{prefix} gaps", count, 90)
        pause = integers(f"{prefix} pauses", count, 10) == 0
        gaps = np.where(pause, 3600 * gaps * gaps, gaps)
        times.append(QUERY_TIME - np.cumsum(gaps)[::-1])
    waits = 60 * (1 + integers("retrieval waits", case.batch, 10_000))
    return {
        "item_ids": np.concatenate(items).astype(np.int32),
        "timestamps": np.concatenate(times).astype(np.int64),
        "seq_offsets": np.concatenate([[0], np.cumsum(case.lengths)]).astype(np.int32),
        "request_timestamps": QUERY_TIME + waits.astype(np.int64),
    }


def retrieval_flop(case: RetrievalCase, sizes: RetrievalSizes) -> float:
    """Operations that the answers need: two for each multiply and add of a product with weights or of attention.

    With w = width, i = H dv, a = H dqk, a layer of R rows costs 2 w (2 i + 2 a) R in front, 2 i w R behind and
    2 (dqk + dv) H for each (query, key) pair that the mask lets through; half of the diagonal counts, as everywhere. A
    pruned last layer has keys and values of all R rows, 2 w (i + a) R, and all else of B rows, which see all keys.
    """
    w, inner, query, rows = sizes.width, sizes.inner, sizes.query, case.tokens
    per_pair = 2.0 * (sizes.attention_dim + sizes.linear_dim) * sizes.num_heads
    pairs = sum(n * n / 2 for n in case.lengths)
    whole = 2.0 * w * (2 * inner + 2 * query) * rows + per_pair * pairs + 2.0 * inner * w * rows
    last = whole
    if case.is_pruned:
        asking = 2.0 * w * (inner + query) + 2.0 * inner * w
        last = 2.0 * w * (inner + query) * rows + asking * case.batch + per_pair * rows
    return whole * (sizes.num_layers - 1) + last


def retrieval_state_dict(sizes: RetrievalSizes) -> Arrays:
    """float32 parameters under Meta's keys; all of them are exact in both half types.

    Tables and projections are as large as needed for every part to matter: with them an answer moves by several times
    float16's error when a bias, the mask or the time of the request is wrong.
    """
    shapes: dict[str, tuple[tuple[int, ...], float]] = {
        "_embedding_module._item_emb.weight": ((sizes.num_items + 1, sizes.width), 1 / math.sqrt(sizes.width)),
        "_input_features_preproc._pos_emb.weight": ((sizes.table_len, sizes.width), 0.5),
    }
    for index in range(sizes.num_layers):
        layer = f"_hstu._attention_layers.{index}."
        shapes |= {
            layer + "_uvqk": ((sizes.width, 2 * sizes.inner + 2 * sizes.query), 1 / math.sqrt(sizes.width)),
            layer + "_o.weight": ((sizes.width, sizes.inner), 0.5 / math.sqrt(sizes.inner)),
            layer + "_o.bias": ((sizes.width,), 0.1),
            layer + "_rel_attn_bias._ts_w": ((sizes.num_time_buckets + 1,), 1.0),
            layer + "_rel_attn_bias._pos_w": ((2 * sizes.table_len - 1,), 1.0),
        }
    return {key: parameter(key, shape, 0.0, deviation) for key, (shape, deviation) in shapes.items()}


def retrieval_config(sizes: RetrievalSizes) -> dict[str, Any]:
    """What a user passes beside the checkpoint: what no tensor's shape says, and what they say to compare with."""
    return {
        "max_sequence_len": sizes.max_history,
        "max_output_len": sizes.max_output_len,
        "embedding_dim": sizes.width,
        "num_blocks": sizes.num_layers,
        "num_heads": sizes.num_heads,
        "attention_dim": sizes.attention_dim,
        "linear_dim": sizes.linear_dim,
        "num_items": sizes.num_items,
        "postprocessor": "l2_norm",
    }
