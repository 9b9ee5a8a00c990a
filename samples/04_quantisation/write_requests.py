"""Write MovieLens-100K as request files: to calibrate with, and labelled, to measure quality on.

An .npz holds the requests of all 943 users in the form of `hstu-compile run --inputs`: jagged arrays by the names of
the graph's inputs, and one array more with what really happened.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The data set is that of the first two samples; their folders are no packages.
_SAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_SAMPLES / name) for name in ("01_movielens_demo", "02_ranking")]

import prepare_data  # noqa: E402 - found by the line above
import ranking_data  # noqa: E402

Arrays = dict[str, NDArray[Any]]

DEFAULT_OUTPUT = prepare_data.REPOSITORY / "build" / "quantisation"


@dataclasses.dataclass(frozen=True)
class RankingForm:
    """What a ranker expects of its requests.

    Attributes:
        first_user_id: id of the first user.
        max_history: newest events of a history.
    """

    first_user_id: int
    max_history: int


#: The second sample's ranker counts users from 0, Meta's checkpoint from 1.
DEMO_RANKER = RankingForm(0, ranking_data.MAX_HISTORY)
META_RANKER = RankingForm(1, 170)


def shortened(histories: prepare_data.Histories, count: int) -> prepare_data.Histories:
    """Every user as they were `count` events ago.

    Args:
        histories: of users with more than `count` events.
        count: newest events to leave out.
    """
    lengths = np.diff(histories.seq_offsets)
    kept = np.arange(lengths.sum()) < np.repeat(histories.seq_offsets[1:] - count, lengths)
    return prepare_data.Histories(
        np.concatenate([[0], np.cumsum(lengths - count)]),
        histories.item_ids[kept],
        histories.timestamps[kept],
        histories.ratings[kept],
    )


def retrieval_requests(histories: prepare_data.Histories) -> Arrays:
    """Leave-one-out: each user's last event is the target, its time the request time.

    Returns:
        item_ids int32 [L], timestamps int64 [L], seq_offsets int32 [B + 1], request_timestamps int64 [B], and
        target_ids int32 [B].
    """
    (batch,) = prepare_data.evaluation_feeds(histories, batch_size=histories.num_users)
    return {**batch.feeds, "target_ids": batch.target_ids}


def ranking_requests(histories: prepare_data.Histories, form: RankingForm) -> Arrays:
    """Each user asked about the newest ten ratings, at the time of the first of them.

    Returns:
        movie_id, item_weights int32 [L] and action_timestamp int64 [L]; user_id int32 [B]; item_movie_id int32 [T] and
        item_query_time int64 [T]; seq_offsets and candidate_offsets int32 [B + 1]; and labels int8 [T], 1 for a like.
    """
    requests = ranking_data.held_out_requests(histories, form.max_history)
    feeds = ranking_data.packed_feeds(requests)
    feeds["user_id"] = (feeds["user_id"] + form.first_user_id).astype(np.int32)
    return {**feeds, "labels": np.concatenate([request.liked for request in requests]).astype(np.int8)}


def request_files(histories: prepare_data.Histories) -> dict[str, Arrays]:
    """Every file by its name.

    Those that end in -earlier are the same users some events ago: what one would have recorded before the labelled
    requests were made. Scales are chosen on them.
    """
    one_ago, ten_ago = shortened(histories, 1), shortened(histories, ranking_data.NUM_HELD_OUT)
    return {
        "retrieval-earlier.npz": retrieval_requests(one_ago),
        "retrieval.npz": retrieval_requests(histories),
        "ranking-earlier.npz": ranking_requests(ten_ago, DEMO_RANKER),
        "ranking.npz": ranking_requests(histories, DEMO_RANKER),
        "ranking-meta-earlier.npz": ranking_requests(ten_ago, META_RANKER),
        "ranking-meta.npz": ranking_requests(histories, META_RANKER),
    }


def main() -> int:
    """Fetch the data, write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--data-dir", type=Path, default=prepare_data.DEFAULT_DATA_DIR, help="cache of the data (default: build/data)"
    )
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_OUTPUT, help="default: build/quantisation")
    arguments = parser.parse_args()
    try:
        histories = prepare_data.load_histories(prepare_data.fetch(arguments.data_dir))
    except prepare_data.DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, arrays in request_files(histories).items():
        path = arguments.output / name
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
        print(f"{path}: {len(arrays['seq_offsets']) - 1} users, {arrays['seq_offsets'][-1]} events")
    return 0


if __name__ == "__main__":
    sys.exit(main())
