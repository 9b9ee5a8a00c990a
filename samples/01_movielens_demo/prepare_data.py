"""MovieLens-100K as jagged histories: taken out of the RecBole wheel, split leave-one-out, cut into request batches.

Run alone, it fetches the data into build/data/ and prints what is in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_DATA_DIR = REPOSITORY / "build" / "data"

WHEEL_REQUIREMENT = "recbole==1.2.1"
WHEEL_MEMBER = "recbole/dataset_example/ml-100k/ml-100k.inter"
DATA_SHA256 = "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"
DATA_HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"

NUM_ITEMS = 1682
#: Ratings are 1 to 5; a rating table has a row for 0, no rating, too.
NUM_RATINGS = 6
MAX_HISTORY = 200


class DataError(Exception):
    """The data set cannot be had; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Histories:
    """Every user's events, oldest first.

    Attributes:
        seq_offsets: [U + 1] int64 -- user u owns events seq_offsets[u]:seq_offsets[u + 1].
        item_ids: [L] int32 -- 1..NUM_ITEMS.
        timestamps: [L] int64 seconds.
        ratings: [L] int32 -- 1..5.
    """

    seq_offsets: NDArray[np.int64]
    item_ids: NDArray[np.int32]
    timestamps: NDArray[np.int64]
    ratings: NDArray[np.int32]

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.seq_offsets) - 1

    def take_users(self, count: int) -> Histories:
        """The first `count` users."""
        end = int(self.seq_offsets[count])
        return Histories(self.seq_offsets[: count + 1], self.item_ids[:end], self.timestamps[:end], self.ratings[:end])


class EvaluationBatch(NamedTuple):
    """One batch of requests under the names of the graph inputs, and the items that were really chosen next."""

    feeds: dict[str, NDArray[Any]]
    target_ids: NDArray[np.int32]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(data_dir: Path = DEFAULT_DATA_DIR) -> Path:
    """Path of ml-100k.inter, downloaded on the first call and checked on every one.

    Raises:
        DataError: if the wheel cannot be downloaded, or holds other data than expected.
    """
    path = data_dir / "ml-100k.inter"
    if path.is_file() and _sha256(path) == DATA_SHA256:
        return path
    data_dir.mkdir(parents=True, exist_ok=True)
    # Everything is prepared in a folder beside the target and moved in one step: an interrupted download leaves no file
    # that looks complete.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--dest", temporary, WHEEL_REQUIREMENT]
        result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        wheels = sorted(Path(temporary).glob("*.whl"))
        if result.returncode or not wheels:
            lines = (result.stderr or result.stdout).strip().splitlines() or ["pip printed nothing"]
            raise DataError(
                f"cannot download {WHEEL_REQUIREMENT}, whose wheel holds MovieLens-100K: {lines[-1]}\n"
                f"  Fix: connect this machine to a Python package index, or copy ml-100k.inter (member {WHEEL_MEMBER} "
                f"of that wheel) to {path}"
            )
        extracted = Path(temporary) / path.name
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                extracted.write_bytes(wheel.read(WHEEL_MEMBER))
        except (KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{wheels[0].name} does not hold {WHEEL_MEMBER}: {error}") from error
        if (seen := _sha256(extracted)) != DATA_SHA256:
            raise DataError(
                f"{WHEEL_MEMBER} of {wheels[0].name} has sha256 {seen}, expected {DATA_SHA256}\n"
                f"  Fix: remove the wheel from pip's cache (`pip cache remove recbole`) and run again"
            )
        os.replace(extracted, path)
    return path


def load_histories(path: Path) -> Histories:
    """Parse an .inter file.

    Events of one second are ordered by item id. The file itself is unordered and many events share a second, so the
    order must be chosen; this one is that of Meta's preprocessing, whose checkpoints see such ties in it.

    Args:
        path: tab-separated user, item, rating, timestamp, under DATA_HEADER.

    Raises:
        DataError: if the file has another header.
    """
    with path.open(encoding="utf-8") as file:
        header = file.readline().rstrip("\n")
        if header != DATA_HEADER:
            raise DataError(f"{path} starts with {header!r}, expected {DATA_HEADER!r}")
        rows = np.loadtxt(file, dtype=np.int64, delimiter="\t", ndmin=2)
    users, items, ratings, timestamps = rows[np.lexsort((rows[:, 1], rows[:, 3], rows[:, 0]))].T
    lengths = np.unique(users, return_counts=True)[1]
    return Histories(
        seq_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        item_ids=items.astype(np.int32),
        timestamps=timestamps.astype(np.int64),
        ratings=ratings.astype(np.int32),
    )


def evaluation_feeds(
    histories: Histories, *, batch_size: int = 64, max_events: int = MAX_HISTORY, with_ratings: bool = False
) -> Iterator[EvaluationBatch]:
    """Leave-one-out requests: each user's last event is the target, its time the request time.

    Args:
        histories: all users; one with a single event gives a request with an empty history.
        batch_size: users per batch; the last batch may be smaller.
        max_events: newest events before the target that the request carries.
        with_ratings: add the feed `ratings`, for models that read it.

    Yields:
        Feeds item_ids int32 [L], timestamps int64 [L], seq_offsets int32 [B + 1], request_timestamps int64 [B] (and
        ratings int32 [L]), and the target ids [B].
    """
    ends = histories.seq_offsets[1:] - 1
    starts = np.maximum(histories.seq_offsets[:-1], ends - max_events)
    for first in range(0, histories.num_users, batch_size):
        batch_starts, batch_ends = starts[first : first + batch_size], ends[first : first + batch_size]
        events = np.concatenate([np.arange(s, e) for s, e in zip(batch_starts, batch_ends, strict=True)])
        feeds: dict[str, NDArray[Any]] = {
            "item_ids": histories.item_ids[events],
            "timestamps": histories.timestamps[events],
            "seq_offsets": np.concatenate([[0], np.cumsum(batch_ends - batch_starts)]).astype(np.int32),
            "request_timestamps": histories.timestamps[batch_ends],
        }
        if with_ratings:
            feeds["ratings"] = histories.ratings[events]
        yield EvaluationBatch(feeds, histories.item_ids[batch_ends])


def main() -> int:
    """Fetch the data and print its size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", type=Path, default=DEFAULT_DATA_DIR, help="cache folder (default: build/data)")
    arguments = parser.parse_args()
    try:
        path = fetch(arguments.data_dir)
        histories = load_histories(path)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    lengths = np.diff(histories.seq_offsets)
    print(f"{path}: {histories.num_users} users, {lengths.sum()} events, {lengths.min()}..{lengths.max()} per user")
    return 0


if __name__ == "__main__":
    sys.exit(main())
