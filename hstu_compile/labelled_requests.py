"""Recorded requests whose outcome is known: an .npz of graph inputs and labels, checked and cut into batches. Level 3.

The arrays are those of `hstu-compile run --inputs`, of any number of users, and one more:

- retrieval: `target_ids` [B] int -- the item that each user really chose next;
- ranking: `labels` [T] or [T, tasks] -- 1 or true where what the task predicts happened to the candidate, else 0; the
  columns are the model's binary tasks in their order.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.calibration.request_layout import Arrays, request_layout
from hstu_compile.errors import CalibrationError
from hstu_compile.model.families import ModelConfig
from hstu_compile.model.ranking import CANDIDATE_OFFSETS, SEQ_OFFSETS
from hstu_compile.model.ranking_config import RankingConfig
from hstu_compile.runtime.request import feeds_from_npz

TARGET_IDS = "target_ids"
LABELS = "labels"

#: Users of one forward.
LARGEST_BATCH = 64
# Padded attention scores of one: 64 MiB per float32 tensor, of about ten.
_MAX_SCORES = 1 << 24


@dataclasses.dataclass(frozen=True)
class LabelledBatch:
    """Some users' requests.

    Attributes:
        feeds: inputs of the graph `retrieval` or `packed`, by name.
        labels: [B] int64 target ids, or [T, tasks] bool.
    """

    feeds: Arrays = dataclasses.field(repr=False)
    labels: NDArray[Any] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class LabelledRequests:
    """A file of requests whose outcome is known.

    Attributes:
        file: its name.
        sha256: of its bytes.
        batches: all requests, the shortest first, so that the padding of an eager batch is little.
    """

    file: str
    sha256: str
    batches: tuple[LabelledBatch, ...] = dataclasses.field(repr=False)

    @property
    def num_requests(self) -> int:
        """Users."""
        return sum(len(batch.feeds[SEQ_OFFSETS]) - 1 for batch in self.batches)

    def to_dict(self) -> dict[str, Any]:
        """What the manifest keeps."""
        return {"file": self.file, "sha256": self.sha256, "requests": self.num_requests}


def labelled_requests(path: Path, config: ModelConfig, most_users: int = LARGEST_BATCH) -> LabelledRequests:
    """Read a file of labelled requests.

    Args:
        path: an .npz without pickles; see the module.
        config: of the model that is asked.
        most_users: of a batch. With `scaling_seq_len: batch` each user is a batch: an answer would depend on the others
            of its batch, and a session asks so too.

    Raises:
        RequestError: HSTU-E706, if the file cannot be read.
        CalibrationError: HSTU-E831, with every fault of its arrays and labels.
    """
    arrays, layout = feeds_from_npz(path), request_layout(config)
    name, other = (LABELS, TARGET_IDS) if isinstance(config, RankingConfig) else (TARGET_IDS, LABELS)
    faults = layout.faults(arrays)
    faults += [f"{name} is missing"] if name not in arrays else []
    faults += [f"{other} are the labels of another family"] if other in arrays else []
    if not faults and len(arrays[SEQ_OFFSETS]) < 2:
        faults = ["there are no requests"]
    if not faults:
        labels, faults = _labels(arrays, config)
    if faults:
        raise CalibrationError(
            "HSTU-E831",
            f"{path} is not a file of labelled requests to this {config.dialect} model",
            "; ".join(faults),
            f"store the arrays {', '.join([*layout.features, *layout.jagged, name])} by numpy.savez, of no more events "
            "and candidates than --max-seq-len and --max-candidates let the build take",
            {"file": str(path), "faults": faults},
        )
    feeds = layout.typed(arrays)
    context = config.contextual_len if isinstance(config, RankingConfig) else 0
    lengths = np.asarray(context + sum(np.diff(feeds[offsets]) for offsets in layout.jagged))
    order = np.argsort(lengths, kind="stable").astype(np.int64)
    candidates = feeds.get(CANDIDATE_OFFSETS)
    most_users = 1 if isinstance(config, RankingConfig) and config.scaling == "batch" else most_users
    batches = []
    for first, last in _cuts(lengths[order], most_users, _MAX_SCORES // config.layer.attention.num_heads):
        users = order[first:last]
        rows = users if candidates is None else _rows(candidates, users)
        batches.append(LabelledBatch(layout.taken(feeds, users), labels[rows]))
    return LabelledRequests(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), tuple(batches))


def binary_tasks(config: RankingConfig) -> list[str]:
    """The tasks that labels are for, in the order of the logits' first columns."""
    return [task.name for task in config.tasks if task.kind == "binary"]


def _labels(arrays: Mapping[str, NDArray[Any]], config: ModelConfig) -> tuple[NDArray[Any], list[str]]:
    """The labels in the form of `LabelledBatch`, and what is wrong with them."""
    if not isinstance(config, RankingConfig):
        targets, num_users = arrays[TARGET_IDS], len(arrays[SEQ_OFFSETS]) - 1
        if targets.shape != (num_users,) or targets.dtype.kind not in "iu":
            return targets, [f"target_ids are {targets.dtype} {list(targets.shape)}, not int [{num_users}]"]
        if not 1 <= targets.min() <= targets.max() <= config.num_items:
            return targets, [f"target_ids are {targets.min()}..{targets.max()}; items are 1..{config.num_items}"]
        return targets.astype(np.int64), []
    tasks = binary_tasks(config)
    given = arrays[LABELS]
    if not tasks:
        return given, ["the model has no binary task: AUC and normalised entropy are not defined"]
    labels = given[:, None] if given.ndim == 1 else given
    count = int(arrays[CANDIDATE_OFFSETS][-1])
    if labels.shape != (count, len(tasks)):
        return labels, [f"labels have shape {list(given.shape)}; expected [{count}, {len(tasks)}], {', '.join(tasks)}"]
    if labels.dtype.kind not in "biuf" or not np.isin(labels, (0, 1)).all():
        return labels, [f"labels are {labels.dtype} from {labels.min()} to {labels.max()}; only 0 and 1 are labels"]
    positives = labels.astype(np.int64).sum(axis=0)
    return labels.astype(np.bool_), [
        f"{found} of {count} labels of {task} are 1; both kinds must occur"
        for task, found in zip(tasks, positives.tolist(), strict=True)
        if found in (0, count)
    ]


def _rows(offsets: NDArray[np.int32], users: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of some users, one user after the other."""
    return np.concatenate([np.arange(offsets[user], offsets[user + 1], dtype=np.int64) for user in users])


def _cuts(lengths: NDArray[Any], most_users: int, max_scores: int) -> list[tuple[int, int]]:
    """First and last + 1 user of each batch: as many as fit a padded attention, at least one."""
    cuts, first, longest = [], 0, 0
    for user, length in enumerate(lengths.tolist()):
        wider, size = max(longest, length), user - first + 1
        if size > 1 and (size > most_users or size * wider * wider > max_scores):
            cuts.append((first, user))
            first, wider = user, length
        longest = wider
    return [*cuts, (first, len(lengths))]
