"""Match resident feeds and outputs to what a session declares, before it runs. Private to the sessions. Level 3."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from hstu_compile.artifacts import TensorSpec
from hstu_compile.errors import RequestError
from hstu_compile.runtime.resident import ResidentTensor

Feeds = Mapping[str, NDArray[Any] | ResidentTensor]
#: (source, target) pairs.
Copies = Sequence[tuple[ResidentTensor, ResidentTensor]]


def split_feeds(feeds: Feeds) -> tuple[dict[str, NDArray[Any]], dict[str, ResidentTensor]]:
    """(arrays, resident tensors)."""
    arrays: dict[str, NDArray[Any]] = {}
    residents: dict[str, ResidentTensor] = {}
    for name, value in feeds.items():
        if isinstance(value, ResidentTensor):
            residents[name] = value
        else:
            arrays[name] = value
    return arrays, residents


def check_residents(
    reads: Mapping[str, ResidentTensor],
    writes: Mapping[str, ResidentTensor],
    *,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    kind: type[ResidentTensor],
    alignment: int = 1,
) -> None:
    """Refuse resident tensors that the session cannot read or write in place.

    Args:
        reads: fed tensors by input name.
        writes: targets by output name.
        inputs: of the session.
        outputs: of the session.
        kind: of memory that the session computes in.
        alignment: bytes that every address is a multiple of.

    Raises:
        RequestError: HSTU-E701, listing everything that does not match.
    """
    problems: list[str] = []
    for tensors, specs, role in ((reads, inputs, "input"), (writes, outputs, "output")):
        expected = {spec.name: spec for spec in specs}
        for name, tensor in tensors.items():
            if name not in expected:
                problems.append(f"{name} is not an {role}")
                continue
            problems += [f"{name} {text}" for text in _mismatches(tensor, expected[name], kind, alignment)]
    problems += _overlaps(reads, writes)
    if problems:
        raise mismatch(problems, (*inputs, *outputs))


def check_target(name: str, shape: tuple[int, ...], target: ResidentTensor, outputs: Sequence[TensorSpec]) -> None:
    """Refuse a target that has not the shape which the feeds give the output.

    Raises:
        RequestError: HSTU-E701.
    """
    if target.shape != shape:
        raise mismatch([f"{name} is {list(shape)} for these feeds, and its target {list(target.shape)}"], outputs)


def check_copies(copies: Copies, kind: type[ResidentTensor]) -> None:
    """Refuse copies that a session cannot make.

    Raises:
        ValueError: if a pair differs in shape or type, or is not of the session's memory.
    """
    for source, target in copies:
        if (source.shape, source.dtype) != (target.shape, target.dtype):
            raise ValueError(
                f"{source.dtype} {list(source.shape)} cannot be copied to {target.dtype} {list(target.shape)}"
            )
        if not (isinstance(source, kind) and isinstance(target, kind)):
            raise ValueError(f"only a {kind.__name__} can be copied here")


def mismatch(problems: Sequence[str], specs: Sequence[TensorSpec]) -> RequestError:
    """The refusal of resident tensors."""
    return RequestError(
        "HSTU-E701",
        "the resident tensors do not match the model",
        "; ".join(problems),
        "it has: " + ", ".join(f"{s.name} {s.dtype} {list(s.shape)}" for s in specs),
        {"problems": list(problems)},
    )


def _mismatches(tensor: ResidentTensor, spec: TensorSpec, kind: type[ResidentTensor], alignment: int) -> list[str]:
    problems = []
    if not isinstance(tensor, kind):
        problems.append(f"is a {type(tensor).__name__}, and the session computes on {kind.__name__}")
    if tensor.dtype != spec.dtype:
        problems.append(f"is {tensor.dtype}, not {spec.dtype}")
    fixed = zip(tensor.shape, spec.shape, strict=False)
    if len(tensor.shape) != len(spec.shape) or any(isinstance(want, int) and size != want for size, want in fixed):
        problems.append(f"is {list(tensor.shape)}, not {list(spec.shape)}")
    if alignment > 1 and tensor.nbytes and tensor.address % alignment:
        problems.append(f"starts at address {tensor.address:#x}, which is not a multiple of {alignment}")
    return problems


def _overlaps(reads: Mapping[str, ResidentTensor], writes: Mapping[str, ResidentTensor]) -> list[str]:
    """Every write that shares bytes with a read or another write: the order in which they happen is the runtime's."""
    if not writes:
        return []
    spans = [_span(name, tensor, False) for name, tensor in reads.items() if tensor.nbytes]
    spans += [_span(name, tensor, True) for name, tensor in writes.items() if tensor.nbytes]
    # In every pass, so that pairs are only looked at where there is something to name.
    read_to = written_to = 0
    for start, stop, _, written in sorted(spans):
        if start < written_to or (written and start < read_to):
            break
        if written:
            written_to = max(written_to, stop)
        else:
            read_to = max(read_to, stop)
    else:
        return []
    problems = []
    for (start, stop, name, written), (other_start, other_stop, other, other_written) in itertools.combinations(
        spans, 2
    ):
        if (written or other_written) and start < other_stop and other_start < stop:
            problems.append(f"{other} overlaps {name}")
    return problems


def _span(name: str, tensor: ResidentTensor, written: bool) -> tuple[int, int, str, bool]:
    start = tensor.address
    return start, start + tensor.nbytes, name, written
