"""The attention benchmark's cases: shapes, operations and bytes of each, and the speed that is asked for.

Operations: 4 D H for each (query, key) pair that the mask lets through, of both products, on the actual lengths. Pairs
of a causal history of h rows count h^2 / 2, a target's h + 1. Bytes: q, k, v and out once. Needs no GPU and no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import numpy as np

DTYPES = ("bf16", "fp16")
DIMS = (128, 64, 256)
LENGTHS = (256, 1024, 2048, 4096, 8192)
NUM_HEADS = 4
NUM_TOKENS = 65_536
ELEMENT_BYTES = 2

OURS = "ours"
#: The same kernel with the attribute silu = "accurate".
OURS_ACCURATE = "ours_accurate"
#: What ours is compared with: whichever is faster in a case.
FASTEST_PEERS = ("meta_cutlass", "nvidia_cutlass")
DENSE_RAB = "nvidia_cutlass_dense_rab"
META_TRITON = ("meta_triton", "meta_triton_tma")
CUDNN = "cudnn_softmax"
SOFTMAX = (CUDNN, "fa2_softmax")
EAGER = "eager"
BACKENDS = (OURS, OURS_ACCURATE, "ours_triton", *FASTEST_PEERS, DENSE_RAB, *META_TRITON, *SOFTMAX, EAGER)

#: Tensor-core rate in FLOP/s (dense, half precision) and memory bandwidth in bytes/s of the SXM boards' data sheets.
PEAKS = {"H100 80GB HBM3": (989.4e12, 3.35e12), "H200": (989.4e12, 4.8e12)}


@dataclasses.dataclass(frozen=True)
class Bar:
    """What ours must reach in a case.

    Attributes:
        over_peer: speed over the fastest of the named backends that were measured.
        peers: those backends.
        over_cudnn: speed over cuDNN's softmax attention; 0 asks for nothing.
        tflops: TFLOP/s; 0 asks for nothing.
        roof: share of the roof that binds; 0 asks for nothing.
        over_unbiased: speed over our own in the same case without a bias; 0 asks for nothing.
    """

    over_peer: float
    peers: tuple[str, ...] = FASTEST_PEERS
    over_cudnn: float = 0.0
    tflops: float = 0.0
    roof: float = 0.0
    over_unbiased: float = 0.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the benchmark, for all backends: causal self-attention of B sequences, or of their last rows.

    Attributes:
        shape: name without type and head dim, such as "N4096".
        dtype: "bf16" or "fp16".
        dim: Dqk and Dv.
        lengths: [B] keys of each sequence, targets included.
        targets: of each sequence, at its tail; 0 for a mask that is plain causal.
        queries: rows of each sequence that ask, its last; 0 means all.
        has_bias: time and position bias, one table for all heads (the research model's form).
        in_graph: timed as calls of one CUDA graph with a warm L2 cache, not alone with a cold one.
        bar: what is asked of ours, if anything.
    """

    shape: str
    dtype: str
    dim: int
    lengths: tuple[int, ...]
    targets: int = 0
    queries: int = 0
    has_bias: bool = False
    in_graph: bool = False
    bar: Bar | None = dataclasses.field(default=None, compare=False)

    @property
    def name(self) -> str:
        """For the CSV and for file names."""
        return f"{self.dtype}_D{self.dim}_{self.shape}"

    @property
    def max_len(self) -> int:
        """N: the longest sequence, and what the scores are divided by."""
        return max(self.lengths)

    @property
    def query_lengths(self) -> tuple[int, ...]:
        """[B] queries of each sequence."""
        return tuple(min(self.queries, length) for length in self.lengths) if self.queries else self.lengths

    @property
    def alpha(self) -> float:
        """Multiplier of the products, a float32."""
        return float(np.float32(self.dim**-0.5))

    @property
    def is_dense(self) -> bool:
        """All sequences are as long, and every row of them asks."""
        return self.queries == 0 and len(set(self.lengths)) == 1

    @property
    def pairs(self) -> float:
        """(query, key) pairs of one head, as the module says."""
        total = 0.0
        for length, asking in zip(self.lengths, self.query_lengths, strict=True):
            targets = min(self.targets, length)
            history = length - targets
            old = max(asking - targets, 0)  # queries that are history
            total += old * (history - old) + old * old / 2 + min(targets, asking) * (history + 1)
        return total

    @property
    def flop(self) -> float:
        """Of both products and all heads."""
        return 4.0 * self.dim * NUM_HEADS * self.pairs

    @property
    def num_bytes(self) -> float:
        """Of q, k, v and out."""
        rows = 2 * sum(self.query_lengths) + 2 * sum(self.lengths)
        return float(rows * NUM_HEADS * self.dim * ELEMENT_BYTES)

    def floor_seconds(self, gpu: str) -> float | None:
        """Operations over rate or bytes over bandwidth, whichever is longer; None for a GPU that PEAKS lacks."""
        for board, (rate, bandwidth) in PEAKS.items():
            if board in gpu:
                return max(self.flop / rate, self.num_bytes / bandwidth)
        return None


def why_not(backend: str, case: Case) -> str | None:
    """Why a backend has no row of a case; None where it has one, be it that it was refused or failed."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    if backend == DENSE_RAB:
        return None if case.has_bias else "it is the kernel with a bias tensor, and the case has no bias"
    if case.has_bias and backend not in (OURS, OURS_ACCURATE, "ours_triton", EAGER):
        return "it has no bias of time and position"
    if backend == "meta_cutlass" and case.queries and case.targets:
        return "it has no targets where queries and keys differ"
    if backend in SOFTMAX and (not case.is_dense or case.targets):
        return "softmax attention of PyTorch is measured on sequences of one length, plain causal"
    if backend == EAGER and case.in_graph:
        return "it reads lengths on the host, which a CUDA graph cannot"
    return None


def _ragged_uniform(largest: int, batch: int) -> tuple[int, ...]:
    rng = np.random.default_rng([largest, batch])
    return tuple(int(n) for n in rng.integers(int(np.ceil(0.05 * largest)), largest + 1, batch))


def ragged_log_normal(mean: float, batch: int, largest: int) -> tuple[int, ...]:
    """[B] lengths of that mean, from 16 to `largest`; the same arguments give the same lengths."""
    rng = np.random.default_rng([int(mean), batch])
    sigma = 0.8
    drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, batch)
    return tuple(int(n) for n in np.clip(np.rint(drawn), 16, largest))


def _longer(lengths: Sequence[int], by: int) -> tuple[int, ...]:
    return tuple(length + by for length in lengths)


def _dense_bar(dim: int, n: int) -> Bar | None:
    if n == 256:
        return Bar({64: 1.6, 128: 1.3, 256: 1.3}[dim])
    if dim == 128:
        return Bar(1.10, over_cudnn=1.05, tflops=640.0 if n == 8192 else 0.0)
    if n == 2048:
        return None
    return Bar(1.25, tflops=560.0 if n == 8192 else 0.0) if dim == 64 else Bar(1.05, over_cudnn=1.0)


def all_cases(dtypes: Sequence[str] = DTYPES) -> Iterator[Case]:
    """Every case, the most telling first, so that a run that is cut off has them."""
    for dtype in dtypes:
        for dim in DIMS:
            for n in LENGTHS:
                yield Case(f"N{n}", dtype, dim, (n,) * (NUM_TOKENS // n), bar=_dense_bar(dim, n))
        yield from _ragged_cases(dtype)
        yield from _delta_cases(dtype)
        for n in (1024, 4096):
            bar = Bar(1.3, peers=(DENSE_RAB,), over_unbiased=0.5)
            yield Case(f"bias_N{n}", dtype, 128, (n,) * (NUM_TOKENS // n), has_bias=True, bar=bar)
        for batch in (1, 2, 4, 8):
            for n in (256, 1024):
                yield Case(f"graph_B{batch}_N{n}", dtype, 128, (n,) * batch, in_graph=True)


def _ragged_cases(dtype: str) -> Iterator[Case]:
    uniform = _ragged_uniform(8192, 32)
    yield Case("uniform8192_B32", dtype, 128, uniform, bar=Bar(1.10))
    yield Case("uniform8192_B32_t256", dtype, 128, _longer(uniform, 256), targets=256, bar=Bar(1.10))
    log_normal = _longer(ragged_log_normal(1024.0, 64, 8192), 256)
    yield Case("lognormal1024_B64_t256", dtype, 128, log_normal, targets=256, bar=Bar(1.10))
    yield Case("B1_N8192", dtype, 128, (8192,), bar=Bar(1.4))
    yield Case("B1_N16384", dtype, 128, (16_384,), bar=Bar(1.15))
    yield Case("B1_N4096_t512", dtype, 128, (4096 + 512,), targets=512, bar=Bar(1.5))
    yield Case("B8_N2048_t256", dtype, 128, (2048 + 256,) * 8, targets=256, bar=Bar(1.25))


def _delta_cases(dtype: str) -> Iterator[Case]:
    """256 candidates against cached keys; also as a causal suffix, the only form that Meta's CUTLASS kernel has."""
    bar = Bar(1.5, peers=(*FASTEST_PEERS, *META_TRITON), roof=0.75)
    for cached in (4096, 16_384):
        lengths = (cached + 256,) * 8
        yield Case(f"delta_B8_k{cached}_t256", dtype, 128, lengths, targets=256, queries=256, bar=bar)
        yield Case(f"delta_B8_k{cached}_causal256", dtype, 128, lengths, queries=256, bar=bar)
        # One user, as in the scoring pass of a request: 8 query tiles in all, so the keys have to be split.
        yield Case(f"delta_B1_k{cached}_t256", dtype, 128, lengths[:1], targets=256, queries=256)


def chosen_cases(patterns: Sequence[str]) -> list[Case]:
    """The cases whose name fits one of the patterns, such as "bf16_D128_*"; all of them without patterns.

    Raises:
        ValueError: a pattern that no case fits.
    """
    cases = list(all_cases())
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in cases):
            raise ValueError(f"no case is named {pattern!r}; cases: {', '.join(case.name for case in cases)}")
    return [case for case in cases if not patterns or any(fnmatchcase(case.name, each) for each in patterns)]
