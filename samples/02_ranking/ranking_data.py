"""MovieLens-100K as ranking requests: a user's history, the films asked about next, and whether they were liked.

A request is made at one moment, that of its first candidate: what the user did later is not in it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The data set is that of the first sample; its folder is no package.
_FIRST_SAMPLE = str(Path(__file__).resolve().parents[1] / "01_movielens_demo")
if _FIRST_SAMPLE not in sys.path:
    sys.path.append(_FIRST_SAMPLE)

import prepare_data as prepare_data  # noqa: E402 - found by the lines above; the other programs take it from here

NUM_USERS = 943
#: Most events of a history; a longer one keeps its newest.
MAX_HISTORY = 128
#: Most candidates of a training request.
MAX_TRAINING_CANDIDATES = 32
#: Newest ratings of every user, which training never sees.
NUM_HELD_OUT = 10
#: A rating from here on is a like.
LIKE = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One user asked about some films, under the names that the model's graphs use.

    Attributes:
        user: index of the user.
        history: movie_id int32, action_timestamp int64 seconds, item_weights int32 action bits; [U] each.
        context: user_id int32 [1].
        candidates: item_movie_id int32, item_query_time int64 seconds; [m] each.
        liked: [m] bool -- what became of the candidates; no input of the model.
    """

    user: int
    history: dict[str, NDArray[Any]]
    context: dict[str, NDArray[Any]]
    candidates: dict[str, NDArray[Any]]
    liked: NDArray[np.bool_]


def _known(
    histories: prepare_data.Histories, user: int, end: int, max_history: int | None = None
) -> dict[str, dict[str, NDArray[Any]]]:
    """History and context of the user before event `end` of all events; a rating r is the action bit 1 << (r - 1)."""
    longest = MAX_HISTORY if max_history is None else max_history
    events = slice(max(int(histories.seq_offsets[user]), end - longest), end)
    return {
        "history": {
            "movie_id": histories.item_ids[events],
            "action_timestamp": histories.timestamps[events],
            "item_weights": np.left_shift(1, histories.ratings[events] - 1, dtype=np.int32),
        },
        "context": {"user_id": np.array([user], np.int32)},
    }


def request_at(
    histories: prepare_data.Histories, user: int, first: int, last: int, max_history: int | None = None
) -> Request:
    """The request whose candidates are events first..last - 1 of all events, made when the first of them happened."""
    items = histories.item_ids[first:last]
    return Request(
        user=user,
        **_known(histories, user, first, max_history),
        candidates={
            "item_movie_id": items,
            "item_query_time": np.full(items.shape, histories.timestamps[first], np.int64),
        },
        liked=histories.ratings[first:last] >= LIKE,
    )


def held_out_requests(histories: prepare_data.Histories, max_history: int | None = None) -> list[Request]:
    """Every user asked about the newest ratings."""
    return [
        request_at(histories, user, int(end) - NUM_HELD_OUT, int(end), max_history)
        for user, end in enumerate(histories.seq_offsets[1:])
    ]


def page_request(histories: prepare_data.Histories, user: int, number: int, size: int, delay: int) -> Request:
    """The user, `delay` seconds after the last event, shown page `number` of the films that were never rated."""
    start, end = histories.seq_offsets[user : user + 2].tolist()
    unseen = np.setdiff1d(np.arange(1, prepare_data.NUM_ITEMS + 1), histories.item_ids[start:end])
    items = unseen[number * size : (number + 1) * size].astype(np.int32)
    asked = int(histories.timestamps[end - 1]) + delay
    return Request(
        user=user,
        **_known(histories, user, end),
        candidates={"item_movie_id": items, "item_query_time": np.full(items.shape, asked, np.int64)},
        liked=np.zeros(items.shape, np.bool_),
    )


def training_requests(histories: prepare_data.Histories, generator: np.random.Generator) -> Iterator[Request]:
    """One epoch in random order: each user asked at a random moment about the ratings that followed it.

    The held-out ratings are neither candidates nor history.
    """
    for user in generator.permutation(histories.num_users).tolist():
        start, end = int(histories.seq_offsets[user]), int(histories.seq_offsets[user + 1]) - NUM_HELD_OUT
        if end > start:
            first = int(generator.integers(start, end))
            yield request_at(histories, user, first, min(end, first + MAX_TRAINING_CANDIDATES))


def packed_feeds(requests: Sequence[Request]) -> dict[str, NDArray[Any]]:
    """A batch as the packed graph takes it: every feature's values one after the other, and the offsets of both."""

    def offsets(lengths: list[int]) -> NDArray[np.int32]:
        return np.cumsum([0, *lengths], dtype=np.int32)

    parts = [{**each.history, **each.context, **each.candidates} for each in requests]
    return {
        **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
        "seq_offsets": offsets([len(each.history["movie_id"]) for each in requests]),
        "candidate_offsets": offsets([len(each.liked) for each in requests]),
    }
