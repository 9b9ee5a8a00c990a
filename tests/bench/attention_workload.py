"""The benchmark's work: ragged sequences with a fixed number of tokens, and the float64 check of a sample of rows.

NumPy and the oracle alone: used beside TensorRT 8.5 on Python 3.10 and beside torch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.attention_cases import geometric_thresholds, offsets_of
from tests.oracle import AttentionAttrs, AttentionCase, attention_error, error_bound, oracle_of

NUM_HEADS = 4
NUM_TOKENS = 65_536
#: The research model's: bucket m starts at ceil(exp(0.301 m)) seconds.
NUM_BUCKETS, BUCKET_RATIO = 128, float(np.exp(0.301))
_SHORTEST = 0.1
_ROWS_PER_SAMPLE = 48


@dataclasses.dataclass(frozen=True)
class Workload:
    """One case of the benchmark: causal self-attention of ragged sequences.

    Attributes:
        max_len: N; lengths are uniform in 0.1 N to N.
        dim: Dqk and Dv.
        has_bias: one position table and one time table shared by all heads (the research model's form).
        lengths: [B].
        q: [L, H, dim] float16; k and v the same.
        row_times: [L] int64 seconds of the next event; col_times of the own one. Both fit int32.
        pos_table: [1, 2 N - 1] float32.
        ts_table: [1, NUM_BUCKETS + 1] float32.
        thresholds: [NUM_BUCKETS] int64, within int32.
    """

    max_len: int
    dim: int
    has_bias: bool
    lengths: NDArray[np.int64]
    q: NDArray[np.float16] = dataclasses.field(repr=False)
    k: NDArray[np.float16] = dataclasses.field(repr=False)
    v: NDArray[np.float16] = dataclasses.field(repr=False)
    row_times: NDArray[np.int64] = dataclasses.field(repr=False)
    col_times: NDArray[np.int64] = dataclasses.field(repr=False)
    pos_table: NDArray[np.float32] = dataclasses.field(repr=False)
    ts_table: NDArray[np.float32] = dataclasses.field(repr=False)
    thresholds: NDArray[np.int64] = dataclasses.field(repr=False)

    @property
    def offsets(self) -> NDArray[Any]:
        """[B + 1] int32."""
        return offsets_of(self.lengths.tolist())

    @property
    def alpha(self) -> float:
        """Multiplier of the products."""
        return float(np.float32(1.0 / np.sqrt(self.dim)))

    @property
    def name(self) -> str:
        """For the CSV."""
        bias = "pos+time" if self.has_bias else "none"
        return (
            f"H={NUM_HEADS} D={self.dim} N={self.max_len} bias={bias} B={len(self.lengths)} L={int(self.lengths.sum())}"
        )

    @property
    def flop(self) -> float:
        """Of both products, on the actual lengths, the causal half alone."""
        return float((self.lengths.astype(np.float64) ** 2).sum() * NUM_HEADS * 2 * self.dim)


def session_times(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    """[count] int64 ascending seconds of a user's events: within sessions, now and then hours to a day apart."""
    gaps = np.where(rng.random(count) < 0.1, rng.integers(3600, 90_000, count), rng.integers(0, 90, count))
    return np.asarray(1_000_000_000 + np.cumsum(gaps), np.int64)


def workload(max_len: int, dim: int, has_bias: bool) -> Workload:
    """Draw a case; the same arguments give the same bits."""
    rng = np.random.default_rng([max_len, dim])
    lengths: list[int] = []
    while True:
        length = int(rng.integers(int(np.ceil(_SHORTEST * max_len)), max_len + 1))
        if sum(lengths) + length > NUM_TOKENS:
            break
        lengths.append(length)
    total = sum(lengths)

    def drawn(mean: float) -> NDArray[np.float16]:
        values = rng.standard_normal((total, NUM_HEADS, dim), dtype=np.float32) + np.float32(mean)
        return values.astype(np.float16)

    q, k, v = drawn(0.0), drawn(dim**-0.5), drawn(1.0)
    rows, cols = [], []
    for length in lengths:
        times = session_times(rng, length + 1)
        rows.append(times[1:])
        cols.append(times[:-1])
    pos_table = 0.5 * rng.standard_normal((1, 2 * max_len - 1)).astype(np.float32)
    ts_table = 0.5 * rng.standard_normal((1, NUM_BUCKETS + 1)).astype(np.float32)
    return Workload(
        max_len=max_len,
        dim=dim,
        has_bias=has_bias,
        lengths=np.array(lengths, np.int64),
        q=q,
        k=k,
        v=v,
        row_times=np.concatenate(rows).astype(np.int64),
        col_times=np.concatenate(cols).astype(np.int64),
        pos_table=pos_table,
        ts_table=ts_table,
        thresholds=geometric_thresholds(NUM_BUCKETS, BUCKET_RATIO, 32).astype(np.int64),
    )


def check_rows(case: Workload, output: NDArray[Any]) -> tuple[float, float, bool]:
    """Compare a sample of rows with the float64 oracle: the first, some middle and the last rows of four sequences.

    Under a causal mask a row depends on the rows before it alone, so rows up to m are those of the sequence cut at m.

    Args:
        case: what was computed.
        output: [L, H, dim] float16 or float32.

    Returns:
        Componentwise error, its bound, and whether every element of the whole output is finite and the sample agrees.
    """
    starts = case.offsets[:-1].astype(np.int64)
    order = np.argsort(case.lengths, kind="stable")
    sequences = {int(order[0]), int(order[-1]), 0, len(case.lengths) - 1}
    spans = []
    for b in sorted(sequences):
        length, start = int(case.lengths[b]), int(starts[b])
        for end in sorted({min(length, _ROWS_PER_SAMPLE), max(1, length * 5 // 8), length}):
            spans.append((start, start + max(0, end - _ROWS_PER_SAMPLE), start + end))
    keys = np.concatenate([np.arange(start, end) for start, _, end in spans])
    queries = np.concatenate([np.arange(first, end) for _, first, end in spans])
    sample = AttentionCase(
        name=case.name,
        dtype="float16",
        q=case.q[queries].astype(np.float32),
        k=case.k[keys].astype(np.float32),
        v=case.v[keys].astype(np.float32),
        q_offsets=offsets_of([end - first for _, first, end in spans]),
        k_offsets=offsets_of([end - start for start, _, end in spans]),
        row_timestamps=case.row_times[queries] if case.has_bias else None,
        col_timestamps=case.col_times[keys] if case.has_bias else None,
        pos_table=case.pos_table if case.has_bias else None,
        ts_table=case.ts_table if case.has_bias else None,
        ts_thresholds=case.thresholds if case.has_bias else None,
        attrs=AttentionAttrs(alpha=case.alpha, scaling_seq_len=float(case.max_len), pos_table_len=case.max_len),
    )
    report, bound = attention_error(output[queries], oracle_of(sample), "float16"), error_bound("float16")
    agrees = report.componentwise <= bound.componentwise and report.rms <= bound.rms
    return report.componentwise, bound.componentwise, bool(agrees and np.isfinite(output).all())
