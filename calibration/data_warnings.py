"""Does calibration data look like traffic? Tests for constant and random data. Level 2.

They warn and never refuse. Each needs enough events to tell, and is silent with fewer.
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from hstu_compile.calibration.request_layout import Arrays, RequestLayout
from hstu_compile.model.ranking import SEQ_OFFSETS

#: Below so many requests the largest values of traffic are likely not among them.
FEW_REQUESTS = 32
#: More than this share of requests with the same history, or of events with the same id, is constant data.
_CONSTANT_SHARE = 0.5
# Pairs of equal ids that uniform ids would have, from which on their number tells uniform from skewed.
_FEWEST_PAIRS = 100
# Standard deviations of that number that still count as uniform. Of uniform data one set in 15,000 has more where 100
# pairs are expected, and one in 30,000 where there are many.
_UNIFORM_SIGMAS = 4


def data_warnings(arrays: Arrays, layout: RequestLayout) -> list[str]:
    """What is suspicious about requests, in sentences; empty if nothing is.

    - Few: fewer than FEW_REQUESTS.
    - Constant: more than half of the histories that are not empty are the same, or more than half of all events
      have one id.
    - Random ids: pairs of equal ids are as frequent as if every id between the smallest and the largest were equally
      likely, within four standard deviations. Of uniform data fewer than one set in 10,000 is missed. Real data is
      called random only if its popularity is that even: MovieLens-100K has 2.8 times as many pairs, and none of 1,000
      samples of it, of 32 to 943 users, was.
    - Random times: an event is earlier than the one before it. `hstu-compile run` refuses such requests.
    """
    bounds = arrays[SEQ_OFFSETS].astype(np.int64)
    found = []
    if len(bounds) - 1 < FEW_REQUESTS:
        found.append(
            f"there are only {len(bounds) - 1} requests; the largest activations of traffic are probably not among "
            f"them. Use {FEW_REQUESTS} or more, better some hundred"
        )
    if layout.history_ids is not None:
        ids = arrays[layout.history_ids]
        constant = _constant(ids, bounds)
        found += constant or _uniform(ids, layout.history_ids)
    return found + _backwards(arrays[layout.history_times], bounds, layout.history_times)


def _constant(ids: NDArray[np.int32], bounds: NDArray[np.int64]) -> list[str]:
    histories = Counter(ids[start:end].tobytes() for start, end in itertools.pairwise(bounds) if end > start)
    if histories.total() >= FEW_REQUESTS:
        same = histories.most_common(1)[0][1]
        if same > _CONSTANT_SHARE * histories.total():
            return [f"the data look constant: {same} of {histories.total()} requests have the same history"]
    if len(ids) >= FEW_REQUESTS:
        values, counts = np.unique(ids, return_counts=True)
        most = int(counts.argmax())
        if counts[most] > _CONSTANT_SHARE * len(ids):
            return [f"the data look constant: {counts[most]} of {len(ids)} events have the id {values[most]}"]
    return []


def _uniform(ids: NDArray[np.int32], name: str) -> list[str]:
    if not len(ids):
        return []
    span = int(ids.max()) - int(ids.min()) + 1
    counts = np.unique(ids, return_counts=True)[1].astype(np.int64)
    pairs = int((counts * (counts - 1) // 2).sum())
    expected = len(ids) * (len(ids) - 1) / 2 / span
    if expected < _FEWEST_PAIRS or pairs > expected + _UNIFORM_SIGMAS * expected**0.5:
        return []
    return [
        f"the data look random: {name} are spread evenly over {ids.min()}..{ids.max()}, as no popularity is. Scales "
        "fit the traffic that they were made from; record real requests"
    ]


def _backwards(times: NDArray[np.int64], bounds: NDArray[np.int64], name: str) -> list[str]:
    if len(times) < 2:
        return []
    steps = times[1:] < times[:-1]
    inside = np.ones(len(steps), np.bool_)
    starts = bounds[1:-1]
    inside[starts[(starts > 0) & (starts < len(times))] - 1] = False
    back = int((steps & inside).sum())
    if not back:
        return []
    return [
        f"{name} go back in {back} of {int(inside.sum())} steps within a history: recorded histories ascend, random "
        "times do not, and `hstu-compile run` refuses such requests"
    ]
