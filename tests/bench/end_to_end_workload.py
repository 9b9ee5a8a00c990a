"""The end-to-end benchmark's cases: batches of whole models, and the operations that each needs.

The ranking model is that of the M-FALCON benchmark (m_falcon_workload.py): embeddings, preprocessing, 5 layers, head.
Its cases are `packed`, histories and candidates in one forward, and `cached`, candidates alone against keys and values
that lie on the GPU. A pruned case computes of the last layer what the candidates' rows need, in ours and in every
baseline. The retrieval model and its cases are those of end_to_end_retrieval_workload.py.

NumPy alone: used beside TensorRT 8.5 on Python 3.10, beside TensorRT-RTX and beside torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from attention_grid import Case as AttentionCase
from attention_grid import ragged_log_normal
from end_to_end_retrieval_workload import (
    ML_20M_LARGE,
    RETRIEVAL,
    TINY_RETRIEVAL,
    RetrievalCase,
    RetrievalSizes,
    retrieval_arrays,
    retrieval_cases,
    retrieval_flop,
)
from m_falcon_workload import DLRM_V3, TINY, Request, Sizes, request
from numpy.typing import NDArray

DTYPES = ("bf16", "fp16")
PACKED, CACHED = "packed", "cached"
#: TFLOP/s of a bf16 product of 8192 x 8192 x 8192 on the H100 that the project's numbers are of.
CEILING_TFLOPS = 786.0
_ACTION_EMBEDDING, _TIME_FEATURES, _TOWER = 8, 4, 512
CONTEXT = 1
_FASTER, _CACHED_FASTER = 1.5, 2.0
#: Models of so many layers are measured beside the usual one; each has weights of its own.
GROWN_LAYERS = (1, 2, 3, 8)

Arrays = dict[str, NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch of the ranking model, and how it is computed.

    Attributes:
        shape: name without type and pruning, such as "B8_n2048_m256".
        dtype: "bf16" or "fp16".
        lengths: [B] history events of each user.
        candidates: of each user.
        mode: PACKED or CACHED.
        is_pruned: of the last layer only what the candidates' rows need; always False of cached ones, whose rows are
            all candidates'.
        layers: of the model, where it is not the usual one.
        bar: speed over the fastest baseline that is asked of ours.
    """

    shape: str
    dtype: str
    lengths: tuple[int, ...]
    candidates: int
    mode: str = PACKED
    is_pruned: bool = False
    layers: int | None = None
    bar: float = dataclasses.field(default=_FASTER, compare=False)

    @property
    def name(self) -> str:
        """For the CSV and for file names."""
        return f"{self.dtype}_{self.shape}" + ("_pruned" if self.is_pruned else "")

    @property
    def batch(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def num_events(self) -> int:
        """History events of all users."""
        return sum(self.lengths)

    @property
    def num_candidates(self) -> int:
        """Candidates of all users."""
        return self.batch * self.candidates

    @property
    def max_rows(self) -> int:
        """Rows of the longest sequence: context, history, candidates. Also the divisor of attention."""
        return CONTEXT + max(self.lengths) + self.candidates

    @property
    def tokens(self) -> int:
        """Rows that the forward computes: without cached ones."""
        return self.num_candidates + (0 if self.mode == CACHED else self.num_events + CONTEXT * self.batch)

    @property
    def reference(self) -> str:
        """Name of what the answers are compared with: pruning and caching change no answer."""
        return f"{self.dtype}_{self.shape.removeprefix('cached_')}"

    def attention(self, sizes: Sizes, *, candidates_only: bool) -> AttentionCase:
        """The attention of a layer: of all rows, or of the candidates' against all keys."""
        lengths = tuple(CONTEXT + n + self.candidates for n in self.lengths)
        queries = self.candidates if candidates_only else 0
        return AttentionCase(
            self.shape, self.dtype, sizes.attention_dim, lengths, targets=self.candidates, queries=queries
        )

    def requests(self, sizes: Sizes) -> list[Request]:
        """One request of each user; the first one of a length is that of the M-FALCON benchmark."""
        return [request(n, self.candidates, sizes, user) for user, n in enumerate(self.lengths)]


AnyCase = Case | RetrievalCase
AnySizes = Sizes | RetrievalSizes


@dataclasses.dataclass(frozen=True)
class Models:
    """Dimensions of the models that are measured."""

    ranking: Sizes
    retrieval: RetrievalSizes

    def of(self, case: AnyCase) -> AnySizes:
        """The model of a case."""
        if isinstance(case, RetrievalCase):
            return self.retrieval
        return self.ranking if case.layers is None else dataclasses.replace(self.ranking, num_layers=case.layers)


FULL, SMALL = Models(DLRM_V3, ML_20M_LARGE), Models(TINY, TINY_RETRIEVAL)


def all_cases(dtypes: Sequence[str] = DTYPES) -> Iterator[Case]:
    """Every case of the ranking model, those of the smallest batches first."""
    ragged = ragged_log_normal(1024.0, 32, 8192)
    packed = (
        ("B1_n1024_m256", (1024,), 256),
        ("B1_n4096_m512", (4096,), 512),
        ("B8_n2048_m256", (2048,) * 8, 256),
        ("B16_n4096_m256", (4096,) * 16, 256),
        ("B32_lognormal1024_m256", ragged, 256),
    )
    for dtype in dtypes:
        for shape, lengths, candidates in packed:
            for is_pruned in (True, False):
                yield Case(shape, dtype, lengths, candidates, is_pruned=is_pruned)
        for batch in (1, 8):
            yield Case(f"cached_B{batch}_n4096_m256", dtype, (4096,) * batch, 256, mode=CACHED, bar=_CACHED_FASTER)


def growth_cases(dtypes: Sequence[str] = DTYPES) -> Iterator[Case]:
    """Pruned cases around (B 4, n 2048, m 256, 5 layers), one number changed in each: measured where they are named."""
    for dtype in dtypes:
        for n in (512, 1024, 2048, 4096, 8192):
            yield Case(f"grow_B4_n{n}_m256", dtype, (n,) * 4, 256, is_pruned=True)
        for batch in (1, 2, 8, 16):
            yield Case(f"grow_B{batch}_n2048_m256", dtype, (2048,) * batch, 256, is_pruned=True)
        for m in (64, 512, 1024, 2048):
            yield Case(f"grow_B4_n2048_m{m}", dtype, (2048,) * 4, m, is_pruned=True)
        for layers in GROWN_LAYERS:
            yield Case(f"grow_B4_n2048_m256_layers{layers}", dtype, (2048,) * 4, 256, is_pruned=True, layers=layers)


def known_cases() -> list[AnyCase]:
    """Every case that there is: the usual ones, growing ones and those of retrieval."""
    return [*all_cases(), *growth_cases(), *retrieval_cases(DTYPES)]


def chosen_cases(patterns: Sequence[str]) -> list[AnyCase]:
    """The cases whose name fits one of the patterns, such as "bf16_*"; without patterns the usual ones alone.

    Growing cases and those of retrieval have to be named as such: "bf16_*" does not mean them, "bf16_retrieval_*" does.

    Raises:
        ValueError: a pattern that no case fits.
    """
    usual = list(all_cases())
    if not patterns:
        return [*usual]
    known = known_cases()
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in known):
            raise ValueError(f"no case is named {pattern!r}; cases: {', '.join(case.name for case in known)}")

    def is_chosen(case: AnyCase) -> bool:
        kinds = [kind for kind in ("grow", RETRIEVAL) if kind in case.name]
        return any(fnmatchcase(case.name, each) for each in patterns if all(kind in each for kind in kinds))

    return [case for case in known if is_chosen(case)]


def arrays_of(case: AnyCase, sizes: AnySizes) -> Arrays:
    """Inputs of a case's whole forward."""
    if isinstance(case, RetrievalCase):
        assert isinstance(sizes, RetrievalSizes)
        return retrieval_arrays(case, sizes)
    assert isinstance(sizes, Sizes)
    return packed_arrays(case, sizes)


def packed_arrays(case: Case, sizes: Sizes) -> Arrays:
    """Inputs of the packed forward, under Meta's feature names, users one behind the other."""
    requests = case.requests(sizes)
    parts = [{**each.history, **each.context, **each.candidates} for each in requests]
    arrays: Arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    arrays["seq_offsets"] = offsets_of(case.lengths)
    arrays["candidate_offsets"] = offsets_of([case.candidates] * case.batch)
    return arrays


def history_arrays(case: Case, sizes: Sizes) -> Arrays:
    """Inputs of the prefill that a cached case starts from, as our graph `prefill` names them."""
    packed = packed_arrays(case, sizes)
    candidates = set(case.requests(sizes)[0].candidates) | {"candidate_offsets"}
    return (
        {name: values for name, values in packed.items() if name not in candidates}
        | _query(case, sizes)
        | {"num_candidates": np.full(case.batch, case.candidates, np.int32)}
    )


def score_arrays(case: Case, sizes: Sizes) -> Arrays:
    """Inputs of the cached forward but for keys and values, as our graph `score` names them."""
    packed = packed_arrays(case, sizes)
    candidates = case.requests(sizes)[0].candidates
    return {
        **{name: packed[name] for name in candidates},
        "candidate_offsets": packed["candidate_offsets"],
        "cache_offsets": offsets_of([CONTEXT + n for n in case.lengths]),
        **_query(case, sizes),
    }


def _query(case: Case, sizes: Sizes) -> Arrays:
    times = [each.candidates["item_query_time"][-1] for each in case.requests(sizes)]
    return {
        "request_timestamps": np.array(times, np.int64),
        "scaling_seq_lens": np.full(case.batch, case.max_rows, np.float32),
    }


def offsets_of(lengths: Sequence[int]) -> NDArray[np.int32]:
    """[B + 1] int32 bounds."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def flop_of(case: AnyCase, sizes: AnySizes) -> float:
    """Operations that the answers of any case need."""
    if isinstance(case, RetrievalCase):
        assert isinstance(sizes, RetrievalSizes)
        return retrieval_flop(case, sizes)
    assert isinstance(sizes, Sizes)
    return case_flop(case, sizes)


def case_flop(case: Case, sizes: Sizes = DLRM_V3) -> float:
    """Operations that a ranking case needs: two for each multiply and add of a product with weights or of attention.

    With w = width, t = table width, h = hidden width, i = H dv, a = H dqk, E events, T candidates, B users:

    - an MLP of x -> y -> z costs 2 (x y + y z) a row. One of item (t, h, w) and one of category (t, h, w) for each
      event and candidate; one of actions (8 for each action weight, h, w) for each event, once for all candidates.
    - the contextual token: 2 t w for each user.
    - a layer of R rows: 2 w (2 i + 2 a) R in front, 2 (3 i) w R behind, and 2 (dqk + dv) H for each (query, key) pair
      that the mask lets through (attention_grid.py counts them). A pruned last layer has keys and values of all R rows,
      2 w (i + a) R, and all else of the T candidates' rows. A cached case has T rows and no others.
    - behind the layers, for each candidate: 2 (w + 4) w to join time features, MLPs (2 t, tower, w) and (w, tower, 1).

    Norms, gates, lookups and sums are not counted: tensor cores do none of them.

    Returns:
        FLOP of the whole forward.
    """
    w, t, h = sizes.width, sizes.table_dim, sizes.hidden_dim
    inner, query = sizes.num_heads * sizes.linear_dim, sizes.num_heads * sizes.attention_dim
    is_cached = case.mode == CACHED
    events = 0 if is_cached else case.num_events
    users, candidates, rows = (0 if is_cached else case.batch), case.num_candidates, case.tokens

    def mlp(x: int, y: int, z: int) -> float:
        return 2.0 * (x * y + y * z)

    actions = _ACTION_EMBEDDING * len(sizes.action_weights)
    front = 2 * mlp(t, h, w) * (events + candidates) + mlp(actions, h, w) * (events + 1) + 2.0 * t * w * users
    per_pair = 2.0 * (sizes.attention_dim + sizes.linear_dim) * sizes.num_heads
    all_pairs, candidate_pairs = (
        case.attention(sizes, candidates_only=only).pairs * per_pair for only in (False, True)
    )
    ends = 2.0 * 3 * inner * w
    whole = (2.0 * w * (2 * inner + 2 * query) + ends) * rows + (candidate_pairs if is_cached else all_pairs)
    last = whole
    if case.is_pruned:
        key_value, gate_query = 2.0 * w * (inner + query) * rows, 2.0 * w * (inner + query) * candidates
        last = key_value + gate_query + candidate_pairs + ends * candidates
    head = 2.0 * (w + _TIME_FEATURES) * w + mlp(2 * t, _TOWER, w) + mlp(w, _TOWER, 1)
    return front + whole * (sizes.num_layers - 1) + last + head * candidates
