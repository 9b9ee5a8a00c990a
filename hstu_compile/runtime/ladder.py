"""The few sizes that the axes of requests are rounded up to. Arithmetic. Level 3; no torch."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math

from hstu_compile.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Sizes that an axis is rounded up to.

    Attributes:
        rungs: ascending, each at least 1.

    Raises:
        UsageError: HSTU-E901 for rungs that do not ascend from 1 or more, or none.
    """

    rungs: tuple[int, ...]

    def __post_init__(self) -> None:
        steps = itertools.pairwise((0, *self.rungs))
        if not self.rungs or any(low >= high for low, high in steps):
            raise UsageError(
                "HSTU-E901",
                f"the sizes {', '.join(map(str, self.rungs)) or '(none)'} are no ladder",
                "each must be at least 1 and larger than the one before",
                "list them in ascending order",
                {"rungs": list(self.rungs)},
            )

    def up(self, size: int) -> int:
        """The least rung that holds `size`; the size itself beyond the last rung.

        >>> Ladder((4, 8)).up(5), Ladder((4, 8)).up(8), Ladder((4, 8)).up(9), Ladder((4, 8)).up(0)
        (8, 8, 9, 4)
        """
        place = bisect.bisect_left(self.rungs, size)
        return self.rungs[place] if place < len(self.rungs) else size

    @classmethod
    def geometric(cls, least: int, most: int, per_doubling: int = 2) -> Ladder:
        """Rungs from `least` to `most`, `per_doubling` of them between a size and its double.

        A size from `least` on is padded by less than a factor of 2 ** (1 / per_doubling), rounded up to a whole number.

        Raises:
            UsageError: HSTU-E901 unless 1 <= least <= most and 1 <= per_doubling.

        >>> Ladder.geometric(8, 40).rungs
        (8, 12, 16, 23, 32, 40)
        """
        _require_way(least, most, per_doubling)
        count = math.ceil(per_doubling * math.log2(most / least)) + 1
        found = {min(most, math.ceil(least * 2 ** (i / per_doubling))) for i in range(count)}
        return cls(tuple(sorted(found | {most})))

    @classmethod
    def even(cls, least: int, most: int, per_doubling: int = 8) -> Ladder:
        """Rungs from `least` to `most`, evenly spaced between `least`, its double, the double of that, and so on.

        A size from `least` on is padded by less than 1 / per_doubling of itself. Where `least` is a multiple of
        8 * per_doubling, every rung but perhaps the last is one of 8, which is what GEMMs of half precision like.

        Raises:
            UsageError: HSTU-E901 unless 1 <= least <= most and 1 <= per_doubling.

        >>> Ladder.even(64, 200, 4).rungs, Ladder.even(1, 20, 8).rungs[6:]
        ((64, 80, 96, 112, 128, 160, 192, 200), (7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20))
        """
        _require_way(least, most, per_doubling)
        found, start = {most}, least
        while start < most:
            # Rounded up: below 1 / per_doubling rows there is nothing between two whole numbers.
            found |= {-(-start * (per_doubling + i) // per_doubling) for i in range(per_doubling)}
            start *= 2
        return cls(tuple(sorted(rung for rung in found if rung <= most)))


def _require_way(least: int, most: int, per_doubling: int) -> None:
    if not (1 <= least <= most and per_doubling >= 1):
        raise UsageError(
            "HSTU-E901",
            f"no ladder leads from {least} to {most} with {per_doubling} rungs a doubling",
            "allowed: 1 <= least <= most, and at least 1 rung",
            "swap the two, or leave the ladder out",
        )


#: Fewest rows that a default ladder rounds to: at fewer, a pass takes as long as the launches of its kernels.
LEAST_ROWS = 64
#: A default ladder adds less than one part in so many.
PARTS = 8
_ROWS, _FEW = Ladder.even(LEAST_ROWS, 1 << 22, PARTS), Ladder.even(1, 1 << 16, PARTS)
_COARSE_ROWS, _COARSE_FEW = Ladder.even(LEAST_ROWS, 1 << 22, 2), Ladder.even(1, 1 << 16, 1)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """What the axes of requests are rounded up to. A session pads none beyond its engine's profile.

    By default a pass has less than an eighth more events, candidates and sequences than were asked, or 64 events or
    candidates where there were fewer; batches of up to 16 sequences keep their number.

    Attributes:
        events: of events, and of the rows that keys and values are cached in: L, A, Lc.
        candidates: T.
        sequences: B. An extra one has no events, but as many contextual tokens as any.

    Raises:
        UsageError: HSTU-E901 for what is no `Ladder`.
    """

    events: Ladder = _ROWS
    candidates: Ladder = _ROWS
    sequences: Ladder = _FEW

    def __post_init__(self) -> None:
        given = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        if wrong := {name: value for name, value in given.items() if not isinstance(value, Ladder)}:
            raise UsageError(
                "HSTU-E901",
                f"{', '.join(wrong)} cannot be rounded",
                "; ".join(f"{name} is {value!r}, which is no Ladder" for name, value in wrong.items()),
                "pass hstu_compile.Ladder((64, 128, 256)), or leave it out for the default",
                {"given": sorted(wrong)},
            )

    @classmethod
    def coarse(cls) -> Buckets:
        """Few: for a runtime that compiles for each, as TensorRT-RTX does.

        A pass has less than half more events and candidates than were asked, or 64 of them, and less than twice the
        sequences.
        """
        return cls(_COARSE_ROWS, _COARSE_ROWS, _COARSE_FEW)

    def ladder(self, axis: str) -> Ladder:
        """Of an axis by its name."""
        return {"B": self.sequences, "T": self.candidates}.get(axis, self.events)
