"""Files of labelled requests: what is read, how it is cut, and everything that is refused by name."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from hstu_compile import labelled_requests as module
from hstu_compile.errors import CalibrationError, RequestError
from hstu_compile.labelled_requests import labelled_requests
from tests.dlrm_reference import DlrmForm
from tests.exported_models import ranking_config, small_config
from tests.labelled_cases import ranking_arrays, retrieval_arrays

LENGTHS = [3, 0, 20, 1, 7, 20]
CANDIDATES = [2, 5, 0, 1, 8, 3]
TASKS = (("like", "BINARY_CLASSIFICATION"), ("share", "BINARY_CLASSIFICATION"), ("seconds", "REGRESSION"))


def saved(path, arrays):
    file = path / "requests.npz"
    np.savez(file, **arrays)
    return file


def users_of(arrays, division):
    """What each user has of every array, as lists.

    `division` names the offsets that divide an array, or says how many entries each user has.
    """
    users = []
    for user in range(len(arrays["seq_offsets"]) - 1):
        own = {}
        for name, by in division.items():
            bounds = np.arange(len(arrays["seq_offsets"])) * by if isinstance(by, int) else arrays[by]
            own[name] = arrays[name][bounds[user] : bounds[user + 1]].tolist()
        users.append(own)
    return users


def check_users(requests, arrays, division, label):
    """Every batch holds whole users, and all of them, the shortest first, are those of the file."""
    lengths = sum(np.diff(arrays[name]) for name in arrays if name.endswith("offsets"))
    expected = [users_of(arrays, division)[user] for user in np.argsort(lengths, kind="stable")]
    found = [user for batch in requests.batches for user in users_of({**batch.feeds, label: batch.labels}, division)]
    assert found == expected
    for batch in requests.batches:
        assert set(batch.feeds) == set(arrays) - {label}
        for name, array in batch.feeds.items():
            assert array.dtype == arrays[name].dtype, name


@pytest.mark.parametrize("most_users", [1, 4, 64])
def test_batches_are_all_users_of_the_file(tmp_path, most_users):
    config = small_config()
    arrays = retrieval_arrays(config, LENGTHS)
    file = saved(tmp_path, {name: array.astype(np.int64) for name, array in arrays.items()})
    requests = labelled_requests(file, config, most_users)
    assert len(requests.batches) == -(-len(LENGTHS) // most_users)
    division = {"item_ids": "seq_offsets", "timestamps": "seq_offsets", "request_timestamps": 1, "target_ids": 1}
    check_users(requests, arrays, division, "target_ids")
    assert requests.to_dict() == {
        "file": "requests.npz",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "requests": len(LENGTHS),
    }


@pytest.mark.parametrize("most_users", [1, 2, 64])
def test_ranking_batches_divide_events_candidates_context_and_labels(tmp_path, most_users):
    config = ranking_config(DlrmForm(contextual=(("user_id", 2, 3),), tasks=TASKS, scaling_seq_len=50.0))
    arrays = ranking_arrays(config, LENGTHS, CANDIDATES)
    requests = labelled_requests(saved(tmp_path, arrays), config, most_users)
    assert len(requests.batches) == -(-len(LENGTHS) // most_users)
    division = {
        **dict.fromkeys(("movie_id", "action_timestamp", "item_weights"), "seq_offsets"),
        **dict.fromkeys(("item_movie_id", "item_query_time", "labels"), "candidate_offsets"),
        "user_id": 2,
    }
    check_users(requests, {**arrays, "labels": arrays["labels"].astype(bool)}, division, "labels")


def test_long_histories_are_cut_into_smaller_batches(tmp_path, monkeypatch):
    config = small_config()
    monkeypatch.setattr(module, "_MAX_SCORES", 2 * 2 * 20 * 20)  # two heads, two users of 20 events
    requests = labelled_requests(saved(tmp_path, retrieval_arrays(config, [20, 20, 20, 1, 1, 1, 20])), config)
    assert [len(batch.labels) for batch in requests.batches] == [3, 2, 2]


def test_a_divisor_of_the_batch_makes_every_user_a_batch(tmp_path):
    config = ranking_config(DlrmForm(scaling_seq_len="batch"))
    requests = labelled_requests(saved(tmp_path, ranking_arrays(config, LENGTHS, CANDIDATES)), config)
    assert sorted(len(batch.labels) for batch in requests.batches) == sorted(CANDIDATES)


def test_one_task_may_have_flat_labels(tmp_path):
    config = ranking_config(DlrmForm())
    arrays = ranking_arrays(config, LENGTHS, CANDIDATES)
    flat = {**arrays, "labels": arrays["labels"][:, 0].astype(np.float32)}
    both = [labelled_requests(saved(tmp_path, each), config) for each in (flat, arrays)]
    for one, other in zip(*(requests.batches for requests in both), strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)


def without(arrays, name):
    return {key: value for key, value in arrays.items() if key != name}


RETRIEVAL_FAULTS = {
    "no labels": (lambda a: without(a, "target_ids"), "target_ids is missing"),
    "labels of another family": (lambda a: {**a, "labels": a["target_ids"]}, "labels are the labels of another family"),
    "no times": (lambda a: without(a, "timestamps"), "missing: timestamps"),
    "another dialect": (lambda a: {**a, "movie_id": a["item_ids"]}, "not inputs of this model: movie_id"),
    "a target that is padding": (
        lambda a: {**a, "target_ids": a["target_ids"] * 0},
        "target_ids are 0..0; items are 1..40",
    ),
    "a target too few": (lambda a: {**a, "target_ids": a["target_ids"][1:]}, r"int32 \[5\], not int \[6\]"),
    "targets as scores": (lambda a: {**a, "target_ids": a["target_ids"] / 2}, "target_ids are float64"),
    "an unknown item": (
        lambda a: {**a, "item_ids": a["item_ids"] + 40},
        r"item_ids are \d+..\d+; allowed: 0..40",
    ),
    "text": (lambda a: {**a, "item_ids": a["item_ids"].astype(str)}, "item_ids is <U.*must hold whole numbers"),
    "NaN": (
        lambda a: {**a, "timestamps": a["timestamps"] * np.nan},
        "timestamps is float64; it must hold whole numbers",
    ),
    "an event too few": (
        lambda a: {**a, "item_ids": a["item_ids"][1:]},
        r"item_ids has 50 entries, and seq_offsets ends at 51",
    ),
    "a request time too few": (
        lambda a: {**a, "request_timestamps": a["request_timestamps"][1:]},
        r"request_timestamps has 5 entries; 6 users need 6",
    ),
    "descending offsets": (
        lambda a: {**a, "seq_offsets": a["seq_offsets"][::-1]},
        "seq_offsets does not ascend from 0",
    ),
    "flat offsets": (lambda a: {**a, "seq_offsets": a["seq_offsets"][None]}, r"seq_offsets has shape \[1, 7\]"),
    "nothing": (lambda a: {name: array[: name == "seq_offsets"] for name, array in a.items()}, "there are no requests"),
}
RANKING_FAULTS = {
    "no labels": (lambda a: without(a, "labels"), "labels is missing"),
    "probabilities": (lambda a: {**a, "labels": a["labels"] * 0.5}, "labels are float64 from 0.0 to 0.5; only 0 and 1"),
    "one kind": (lambda a: {**a, "labels": a["labels"] * 0}, "0 of 19 labels of like are 1; both kinds"),
    "a task too few": (
        lambda a: {**a, "labels": a["labels"][:, :1]},
        r"shape \[19, 1\]; expected \[19, 2\], like, share",
    ),
    "other candidates": (
        lambda a: {**a, "candidate_offsets": a["candidate_offsets"][:-1]},
        "candidate_offsets has 6 entries for 6 users",
    ),
}


@pytest.mark.parametrize("case", RETRIEVAL_FAULTS)
def test_retrieval_faults_are_named(tmp_path, case):
    change, message = RETRIEVAL_FAULTS[case]
    config = small_config()
    file = saved(tmp_path, change(retrieval_arrays(config, LENGTHS)))
    with pytest.raises(CalibrationError, match=message) as caught:
        labelled_requests(file, config)
    assert caught.value.code == "HSTU-E831"
    assert "target_ids" in caught.value.fix


@pytest.mark.parametrize("case", RANKING_FAULTS)
def test_ranking_faults_are_named(tmp_path, case):
    change, message = RANKING_FAULTS[case]
    config = ranking_config(DlrmForm(tasks=TASKS))
    file = saved(tmp_path, change(ranking_arrays(config, LENGTHS, CANDIDATES)))
    with pytest.raises(CalibrationError, match=message) as caught:
        labelled_requests(file, config)
    assert caught.value.code == "HSTU-E831"


def test_a_model_without_a_binary_task_has_no_labels(tmp_path):
    config = ranking_config(DlrmForm(tasks=TASKS[2:]))
    arrays = ranking_arrays(ranking_config(DlrmForm()), LENGTHS, CANDIDATES)
    with pytest.raises(CalibrationError, match="no binary task"):
        labelled_requests(saved(tmp_path, arrays), config)


def test_an_absent_contextual_value_is_legal(tmp_path):
    config = ranking_config(DlrmForm())
    arrays = ranking_arrays(config, LENGTHS, CANDIDATES)
    arrays["user_id"][0] = -1
    batches = labelled_requests(saved(tmp_path, arrays), config).batches
    assert min(batch.feeds["user_id"].min() for batch in batches) == -1


def test_a_file_that_is_no_npz(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"PK")
    with pytest.raises(RequestError, match="HSTU-E706"):
        labelled_requests(path, small_config())
