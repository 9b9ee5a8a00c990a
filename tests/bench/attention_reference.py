"""Inputs of an attention case on a device, float64 rows to check outputs with, and the check.

The whole float64 output would take longer than the benchmark, so rows are sampled: first, middle and last rows of four
sequences, those around the first target, some at random, all heads. The other rows of an output are compared with an
output whose sample was right.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from attention_grid import NUM_HEADS, Case
from attention_workload import BUCKET_RATIO, NUM_BUCKETS, session_times
from torch import Tensor

from tests.attention_cases import geometric_thresholds, offsets_of
from tests.oracle import OracleResult, attention_error, error_bound
from tests.tolerances import COMPONENTWISE, SUBNORMAL_STEP

#: Of the oracle and its tolerances, and of torch.
DTYPES = {"bf16": ("bfloat16", torch.bfloat16), "fp16": ("float16", torch.float16)}
HSTU, SOFTMAX = "hstu", "softmax"
_SPAN = 16


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What one call takes, on one device.

    Attributes:
        case: which.
        q: [Lq, H, D]; k and v [Lk, H, D].
        q_offsets: [B + 1] int32; the same object as k_offsets where all rows ask.
        k_offsets: [B + 1] int32.
        num_targets: [B] int32, or None.
        row_times: [Lq] int64 seconds of the next event, or None; col_times [Lk] of the own one.
        pos_table: [1, 2 N - 1] float32, or None.
        ts_table: [1, NUM_BUCKETS + 1] float32, or None.
        thresholds: [NUM_BUCKETS] int64, or None.
    """

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    q_offsets: Tensor
    k_offsets: Tensor
    num_targets: Tensor | None = None
    row_times: Tensor | None = None
    col_times: Tensor | None = None
    pos_table: Tensor | None = None
    ts_table: Tensor | None = None
    thresholds: Tensor | None = None

    def keywords(self) -> dict[str, Tensor]:
        """The optional inputs that are there, under the operator's names."""
        given = {
            "num_targets": self.num_targets,
            "row_timestamps": self.row_times,
            "col_timestamps": self.col_times,
            "pos_table": self.pos_table,
            "ts_table": self.ts_table,
            "ts_thresholds": self.thresholds,
        }
        return {name: tensor for name, tensor in given.items() if tensor is not None}


def draw(case: Case, device: torch.device) -> Inputs:
    """Random inputs with outputs of O(1): scores of mean 1 and deviation near 1, v of mean 1.

    The same case gives the same bits on the same kind of device.
    """
    seed = zlib.crc32(case.name.encode())
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[case.dtype][1]

    def drawn(rows: int, mean: float) -> Tensor:
        values = torch.randn((rows, NUM_HEADS, case.dim), generator=generator, device=device)
        return (values + mean).to(dtype)

    # <q, k> has mean D * mean^2 = sqrt(D), times alpha = 1.
    mean = float(case.dim) ** -0.25
    q, k, v = drawn(sum(case.query_lengths), mean), drawn(sum(case.lengths), mean), drawn(sum(case.lengths), 1.0)
    k_offsets = torch.from_numpy(offsets_of(case.lengths)).to(device)
    q_offsets = torch.from_numpy(offsets_of(case.query_lengths)).to(device) if case.queries else k_offsets
    targets = torch.full((len(case.lengths),), case.targets, dtype=torch.int32, device=device)
    inputs = Inputs(case, q, k, v, q_offsets, k_offsets, num_targets=targets if case.targets else None)
    return _with_bias(inputs, seed, device) if case.has_bias else inputs


def _with_bias(inputs: Inputs, seed: int, device: torch.device) -> Inputs:
    rng = np.random.default_rng(seed)
    times = [session_times(rng, length + 1) for length in inputs.case.lengths]
    pos_table, ts_table = (
        0.5 * torch.from_numpy(rng.standard_normal((1, size), dtype=np.float32))
        for size in (2 * inputs.case.max_len - 1, NUM_BUCKETS + 1)
    )
    return dataclasses.replace(
        inputs,
        row_times=torch.from_numpy(np.concatenate([each[1:] for each in times])).to(device),
        col_times=torch.from_numpy(np.concatenate([each[:-1] for each in times])).to(device),
        thresholds=torch.from_numpy(geometric_thresholds(NUM_BUCKETS, BUCKET_RATIO, 64)).to(device),
        pos_table=pos_table.to(device),
        ts_table=ts_table.to(device),
    )


def bias_rows(inputs: Inputs, sequence: int, rows: Tensor) -> Tensor:
    """[len(rows), Lk_b] float64 bias of some positions of one sequence, from the tables; the case has no targets."""
    row_times, col_times, thresholds = inputs.row_times, inputs.col_times, inputs.thresholds
    pos_table, ts_table = inputs.pos_table, inputs.ts_table
    if row_times is None or col_times is None or pos_table is None or ts_table is None or thresholds is None:
        raise ValueError(f"{inputs.case.name} has no bias")
    start, end = int(inputs.k_offsets[sequence]), int(inputs.k_offsets[sequence + 1])
    columns = torch.arange(end - start, device=rows.device)
    place = inputs.case.max_len - 1 + columns[None, :] - rows[:, None]
    gap = (row_times[start + rows][:, None] - col_times[start:end][None, :]).abs()
    return pos_table[0].double()[place] + ts_table[0].double()[torch.bucketize(gap, thresholds, right=True)]


@dataclasses.dataclass(frozen=True)
class Sample:
    """Rows of the output in float64.

    Attributes:
        rows: [S] int64 which rows of q.
        result: the oracle's form, of these rows.
        dtype: the oracle's name of the outputs' type.
    """

    rows: Tensor
    result: OracleResult
    dtype: str


def _sampled(case: Case) -> Iterator[tuple[int, list[int]]]:
    """(sequence, positions within it) that are checked."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    order = np.argsort(case.lengths, kind="stable")
    for b in sorted({int(order[0]), int(order[-1]), 0, len(case.lengths) - 1}):
        length, first = case.lengths[b], case.lengths[b] - case.query_lengths[b]
        starts = {first, first + (length - first) * 5 // 8, length - _SPAN, length - case.targets - _SPAN // 2}
        chosen = {position for start in starts for position in range(start, start + _SPAN)}
        chosen |= {int(position) for position in rng.integers(first, length, _SPAN)}
        yield b, sorted(position for position in chosen if first <= position < length)


def make_sample(inputs: Inputs, function: str) -> Sample:
    """Compute the sampled rows in float64, from the operator's definition.

    Args:
        inputs: q, k, v and the rest as the backends get them.
        function: HSTU, or SOFTMAX for softmax attention with the same mask and alpha.
    """
    case = inputs.case
    which, outputs, scales, visible, sequences = [], [], [], [], []
    for b, positions in _sampled(case):
        start, end = int(inputs.k_offsets[b]), int(inputs.k_offsets[b + 1])
        history = (end - start) - case.targets
        i = torch.tensor(positions, device=inputs.q.device)
        j = torch.arange(end - start, device=inputs.q.device)
        rows = int(inputs.q_offsets[b + 1]) - (end - start) + i
        q, k, v = (tensor.double() for tensor in (inputs.q[rows], inputs.k[start:end], inputs.v[start:end]))
        score = case.alpha * torch.einsum("rhd,khd->hrk", q, k)
        if case.has_bias:
            score = score + bias_rows(inputs, b, i)
        sees_history = (j[None, :] <= i[:, None]) & (j[None, :] < history)
        allowed = sees_history | ((i[:, None] >= history) & (i[:, None] == j[None, :]))
        if function == SOFTMAX:
            weight = torch.softmax(score.masked_fill(~allowed, -torch.inf), dim=-1)
        else:
            weight = torch.where(allowed, score * torch.sigmoid(score) / case.max_len, 0.0)
        which.append(rows)
        outputs.append(torch.einsum("hrk,khd->rhd", weight, v))
        scales.append(torch.einsum("hrk,khd->rhd", weight.abs(), v.abs()))
        visible.append(torch.einsum("rk,khd->rhd", allowed.double(), v.abs()))
        sequences += [b] * len(positions)
    out, scale = (torch.cat(parts).cpu().numpy() for parts in (outputs, scales))
    # A weight that was divided by N before it was rounded may be half a subnormal step off, whatever its size. What a
    # score's own rounding adds is left out: it makes the check stricter, by less than a hundredth.
    name = DTYPES[case.dtype][0]
    forced = SUBNORMAL_STEP[name] / 2 * torch.cat(visible).cpu().numpy() / COMPONENTWISE[name]
    result = OracleResult(out, scale + forced, np.zeros_like(scale), np.array(sequences))
    return Sample(torch.cat(which), result, name)


def judge(output: Tensor, sample: Sample, right: tuple[str, Tensor] | None) -> tuple[float, float, str]:
    """Compare an output with the float64 sample, and its other rows with an output that passed.

    Args:
        output: [Lq, H, D].
        sample: of the same function.
        right: another implementation's name and output [Lq, H, D], whose sample was right, or None.

    Returns:
        Componentwise error of the sample, its bound, and what is wrong, empty if nothing is.
    """
    bound = error_bound(sample.dtype)
    if not bool(torch.isfinite(output).all()):
        row = int((~torch.isfinite(output)).flatten(1).any(dim=1).nonzero()[0])
        return float("inf"), bound.componentwise, f"row {row} is not finite"
    report = attention_error(output[sample.rows].float().cpu().numpy(), sample.result, sample.dtype)
    if not (report.componentwise <= bound.componentwise and report.rms <= bound.rms):
        return report.componentwise, bound.componentwise, f"in the sample, {report.where}"
    if right is not None:
        # Both may be off by the bound, relative to sums of magnitudes; the outputs are sums of mostly one sign. And by
        # what subnormals force on rows of few keys; with more keys it is less than the bound.
        name, expected = right
        size = expected.float().flatten(1).norm(dim=1)
        apart = (output.float() - expected.float()).flatten(1).norm(dim=1)
        forced = SUBNORMAL_STEP[sample.dtype] / 2 * _SPAN * float(output[0].numel()) ** 0.5
        far = apart > 2 * bound.componentwise * size + forced
        if bool(far.any()):
            row = int(far.nonzero()[0])
            text = f"{int(far.sum())} rows differ from those of {name}, whose sample is right; the first is {row}"
            return report.componentwise, bound.componentwise, text
    return report.componentwise, bound.componentwise, ""
