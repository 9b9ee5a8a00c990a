"""Shape ranges of the graph inputs: the only place that knows them. Level 2, no torch.

Every dynamic axis has a name that says what it counts, so that a profile follows from the names alone: L events,
T candidates, A last events of histories whose others are cached, Lc rows of a KV cache, B sequences, B_plus_1 offsets,
B_times_k values of a feature with k per sequence.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from hstu_compile.artifacts import Profile, TensorSpec
from hstu_compile.axis_sizes import axis_size, axis_values
from hstu_compile.errors import EngineError, UsageError

_INT32_MAX = 2**31 - 1
_PER_SEQUENCE = re.compile(r"B_times_(\d+)")

AxisRange = tuple[int, int, int]

# What each option that counts something stands for when it is left out. An option's name ends where its value begins.
_LEFT_OUT = {
    "--max-batch": "64 sequences",
    "--opt-batch": "an eighth of --max-batch",
    "--max-seq-len": "the longest history that the model was made for",
    "--opt-seq-len": "half of --max-seq-len",
    "--max-candidates": "as many as the model was made for",
    "--m-falcon micro-batch=": "a build without the graphs prefill and score",
    "--incremental max-append=": "a build without the graphs prefill and append",
    "--top-k": "no list of items",
    "--seed": "seed 0",
    "--max-queue-delay-us": "500 microseconds",
    "--instances": "one",
    "--kv-budget-mib": "256 MiB",
}


def option_text(option: str, value: object) -> str:
    """An option as it was typed.

    >>> option_text("--max-batch", 0), option_text("--m-falcon micro-batch=", 0)
    ('--max-batch 0', '--m-falcon micro-batch=0')
    """
    return f"{option}{value}" if option.endswith("=") else f"{option} {value}"


def check_counts(counts: Mapping[str, int | None], lowest: int = 1) -> None:
    """Refuse options whose number is too small to count anything.

    Args:
        counts: option to the number it was given; None for an option that was left out.
        lowest: least legal number.

    Raises:
        UsageError: HSTU-E901, naming every one of them.
    """
    wrong = {option: value for option, value in counts.items() if value is not None and value < lowest}
    if not wrong:
        return
    raise UsageError(
        "HSTU-E901",
        f"{', '.join(option_text(*each) for each in wrong.items())} cannot be used",
        f"allowed: {lowest} or more",
        "; ".join(f"pass {option_text(option, 'N')}, or leave it out for {_LEFT_OUT[option]}" for option in wrong),
        {option.lstrip("-"): value for option, value in wrong.items()},
    )


@dataclasses.dataclass(frozen=True)
class ProfileSizes:
    """Numbers behind one optimisation profile.

    Attributes:
        max_batch: most sequences in one request batch, >= 1.
        max_seq_len: most events in one sequence, >= 1.
        opt_batch: sequences that the engine is tuned for; None means max_batch.
        opt_seq_len: events per sequence that the engine is tuned for; None means half of max_seq_len, rounded up:
            lengths are ragged, so a full batch rarely holds more.
        min_batch: fewest sequences, >= 1.
        max_candidates: most candidates of all sequences together; 0 in a graph without candidates.
        opt_candidates: candidates that the engine is tuned for; None means half of max_candidates, rounded up.
        contextual_len: rows of a KV cache in front of every history.
        max_append: most new events of one sequence in a graph that extends cached ones; each comes after one that is
            computed again. 0 in other graphs.
        cache_rows: most rows of a KV cache that is taken whole, by twice as many sequences: in front of each comes one
            without candidates, which owns the rows between. 0 where there are the sequences' own rows alone.
    """

    max_batch: int
    max_seq_len: int
    opt_batch: int | None = None
    opt_seq_len: int | None = None
    min_batch: int = 1
    max_candidates: int = 0
    opt_candidates: int | None = None
    contextual_len: int = 0
    max_append: int = 0
    cache_rows: int = 0

    def __post_init__(self) -> None:
        opt_batch, opt_seq_len = self.typical()
        problems = []
        if not 1 <= self.min_batch <= opt_batch <= self.max_batch:
            problems.append(f"1 <= min {self.min_batch} <= opt {opt_batch} <= max {self.max_batch} sequences is false")
        if not 1 <= opt_seq_len <= self.max_seq_len:
            problems.append(f"1 <= opt {opt_seq_len} <= max {self.max_seq_len} events per sequence is false")
        rows = self.max_batch * (self.max_seq_len + self.contextual_len) + self.max_candidates
        if rows > _INT32_MAX:
            problems.append(
                f"max_batch {self.max_batch} times max_seq_len {self.max_seq_len} and {self.max_candidates} candidates "
                f"are more than {_INT32_MAX} rows, which int32 offsets cannot count"
            )
        if self.max_candidates and not 1 <= self._typical_candidates() <= self.max_candidates:
            problems.append(f"1 <= opt {self.opt_candidates} <= max {self.max_candidates} candidates is false")
        if problems:
            raise EngineError(
                "HSTU-E405",
                "the profile sizes are not usable",
                "; ".join(problems),
                "set --opt-batch <= --max-batch and --opt-seq-len <= --max-seq-len; lower --max-batch "
                "or --max-seq-len where there are too many rows",
                dataclasses.asdict(self),
            )

    def typical(self) -> tuple[int, int]:
        """(opt_batch, opt_seq_len) with the defaults filled in."""
        opt_batch = self.max_batch if self.opt_batch is None else self.opt_batch
        opt_seq_len = (self.max_seq_len + 1) // 2 if self.opt_seq_len is None else self.opt_seq_len
        return opt_batch, opt_seq_len

    def _typical_candidates(self) -> int:
        return (self.max_candidates + 1) // 2 if self.opt_candidates is None else self.opt_candidates

    def axis(self, name: str) -> AxisRange | None:
        """(min, opt, max) of a named axis; None if nothing here says how long it is.

        L and its like start at 1 because builders refuse empty tensors in a profile; a session serves an empty batch
        with one row that belongs to no sequence.
        """
        opt_batch, opt_seq_len = self.typical()
        gaps = 2 if self.cache_rows else 1
        batch = (self.min_batch, gaps * opt_batch, gaps * self.max_batch)
        if each := _PER_SEQUENCE.fullmatch(name):
            return tuple(int(each[1]) * size for size in batch)  # type: ignore[return-value]
        ranges: dict[str, AxisRange] = {
            "B": batch,
            "B_plus_1": (batch[0] + 1, batch[1] + 1, batch[2] + 1),
            "L": (1, opt_batch * opt_seq_len, self.max_batch * self.max_seq_len),
            "Lc": (
                1,
                opt_batch * (opt_seq_len + self.contextual_len),
                max(self.max_batch * (self.max_seq_len + self.contextual_len), self.cache_rows),
            ),
        }
        if self.max_candidates:
            ranges["T"] = (1, self._typical_candidates(), self.max_candidates)
        if self.max_append:
            most = self.max_append + 1
            ranges["A"] = (1, opt_batch * ((most + 1) // 2), self.max_batch * most)
        return ranges.get(name)


def graph_profiles(name: str, inputs: Sequence[TensorSpec], sizes: ProfileSizes) -> tuple[Profile, ...]:
    """The profile of a graph with these inputs.

    Args:
        name: of the profile.
        inputs: of the graph, dynamic axes by name.
        sizes: limits and typical sizes.

    Raises:
        EngineError: HSTU-E405, if an axis has a name that the sizes do not explain.
    """
    unknown = [
        f"{each.name} {list(each.shape)}"
        for each in inputs
        if any(isinstance(size, str) and sizes.axis(size) is None for size in each.shape)
    ]
    if unknown:
        raise EngineError(
            "HSTU-E405",
            "the sizes do not give shapes for this graph's inputs",
            f"{', '.join(unknown)}: an axis is none of L, T, A, Lc, B, B_plus_1, B_times_k, or it counts candidates "
            "or new events and their number is not given",
            "give the shapes themselves with --minShapes, --optShapes and --maxShapes",
            {"inputs": [each.name for each in inputs]},
        )

    def shapes(which: int) -> dict[str, tuple[int, ...]]:
        return {
            each.name: tuple(_range(sizes, size)[which] if isinstance(size, str) else size for size in each.shape)
            for each in inputs
        }

    return (Profile(name=name, min=shapes(0), opt=shapes(1), max=shapes(2)),)


def _range(sizes: ProfileSizes, axis: str) -> AxisRange:
    found = sizes.axis(axis)
    assert found is not None
    return found


def derived_profile(
    name: str, profile: Profile, inputs: Sequence[TensorSpec], tensors: Sequence[TensorSpec]
) -> Profile:
    """The profile of a part of a graph.

    Args:
        name: of the profile.
        profile: of the graph.
        inputs: of the graph, dynamic axes by name.
        tensors: inputs of the part: of the graph, or made by another part; an axis is an expression of the same names.

    Raises:
        EngineError: HSTU-E405, if the profile gives one axis two sizes, or no size to an axis of the tensors.
    """
    declared = {each.name: each.shape for each in inputs}
    shapes: list[dict[str, tuple[int, ...]]] = []
    for kind, given in (("min", profile.min), ("opt", profile.opt), ("max", profile.max)):
        try:
            # An input without dynamic axes may be left out of a profile.
            known = {n: shape for n, shape in declared.items() if n in given}
            values = axis_values({n: given[n] for n in known}, known)
            shapes.append({each.name: _shape_at(each, given, values) for each in tensors})
        except (KeyError, ValueError) as error:
            raise EngineError(
                "HSTU-E405",
                f"the {kind} shapes of profile {profile.name} do not give those of {name}",
                f"no size for the axis {error}" if isinstance(error, KeyError) else str(error),
                "give inputs that share an axis the same size: leave --minShapes, --optShapes and --maxShapes out",
                {"profile": profile.name, "part": name},
            ) from error
    return Profile(name, *shapes)


def _shape_at(tensor: TensorSpec, given: Mapping[str, tuple[int, ...]], values: Mapping[str, int]) -> tuple[int, ...]:
    if tensor.name in given:
        return tuple(given[tensor.name])
    sizes = []
    for axis in tensor.shape:
        expression = axis_size(axis) if isinstance(axis, str) else None
        if isinstance(axis, str) and expression is None:
            raise ValueError(f"the axis {axis} of {tensor.name} is no expression of names")
        sizes.append(expression.at(values) if expression is not None else int(axis))
    return tuple(sizes)
