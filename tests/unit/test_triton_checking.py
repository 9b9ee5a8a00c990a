"""What the check in front of an engine passes on and what it refuses, from a manifest alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu_compile.errors import BundleError, RequestError
from hstu_compile.serving.answering import Answerer
from hstu_compile.serving.checking import open_checker
from hstu_compile.serving.settings import RuntimeSettings
from tests.ranking_fakes import spec_of
from tests.ranking_requests import request_of
from tests.triton_bundles import write_bundle

SPEC = spec_of(scaling="batch")


def manifest_alone(tmp_path: Path, **facts: Any) -> Path:
    """A folder that has a bundle's manifest and nothing else of it."""
    bundle = write_bundle(tmp_path / "model.hstu", **facts)
    folder = tmp_path / "1"
    folder.mkdir()
    (bundle / "manifest.json").rename(folder / "manifest.json")
    return folder


@pytest.fixture
def ranking(tmp_path: Path) -> Answerer[Any]:
    return open_checker(manifest_alone(tmp_path, ranking=SPEC.to_dict()), RuntimeSettings())


@pytest.fixture
def retrieval(tmp_path: Path) -> Answerer[Any]:
    return open_checker(manifest_alone(tmp_path), RuntimeSettings(truncation="keep_last"))


def scored(events: int, candidates: int, seed: int = 0) -> dict[str, Any]:
    """A ranking request as Triton hands it over."""
    request = request_of(SPEC, 0, events, candidates, seed)
    arrays = {**request.history, **request.candidates, **request.context}
    return {name: np.asarray(array)[None] for name, array in arrays.items()}


def embedded(events: int) -> dict[str, Any]:
    """A retrieval request as Triton hands it over."""
    return {
        "item_ids": np.arange(1, events + 1, dtype=np.int32)[None],
        "timestamps": np.arange(events, dtype=np.int64)[None],
        "request_timestamps": np.array([[events]], np.int64),
    }


def test_right_ranking_requests_are_passed_on_bit_for_bit(ranking: Answerer[Any]):
    requests = [scored(5, 3, seed=1), scored(0, 2, seed=2), scored(4, 0, seed=3)]
    for request, answer in zip(requests, ranking.answer(requests), strict=True):
        assert isinstance(answer, dict)
        assert answer.pop("truncated").tolist() == [[0]]
        assert set(answer) == set(request)
        for name, array in answer.items():
            assert array.dtype == (np.int64 if "time" in name else np.int32), name
            np.testing.assert_array_equal(array, request[name])


def test_right_retrieval_requests_are_passed_on_and_long_ones_cut(retrieval: Answerer[Any]):
    short, long = retrieval.answer([embedded(3), embedded(23)])
    assert isinstance(short, dict)
    assert isinstance(long, dict)
    assert set(short) == {"item_ids", "timestamps", "request_timestamps", "truncated"}
    assert (short["item_ids"].tolist(), short["truncated"].tolist()) == ([[1, 2, 3]], [[0]])
    assert (long["item_ids"].tolist(), long["truncated"].tolist()) == ([list(range(4, 24))], [[3]])
    assert (long["item_ids"].dtype, long["timestamps"].dtype) == (np.int32, np.int64)
    assert long["request_timestamps"].shape == (1, 1)


@pytest.mark.parametrize(("count", "refused"), [(SPEC.max_candidates, False), (SPEC.max_candidates + 1, True)])
def test_candidates_beyond_the_engines_profile_are_one_requests_error(
    ranking: Answerer[Any], count: int, refused: bool
):
    before, answer, after = ranking.answer([scored(5, 3), scored(5, count), scored(2, 1)])
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert isinstance(answer, RequestError) == refused
    if refused:
        assert answer.code == "HSTU-E704"
        assert f"at most {SPEC.max_candidates} fit" in str(answer)


def test_a_wrong_request_is_refused_alone(retrieval: Answerer[Any]):
    unequal = {**embedded(4), "timestamps": np.arange(3, dtype=np.int64)[None]}
    good, wrong, pair, other = retrieval.answer(
        [embedded(2), unequal, {name: np.repeat(array, 2, axis=0) for name, array in embedded(2).items()}, embedded(1)]
    )
    assert isinstance(good, dict)
    assert isinstance(other, dict)
    assert isinstance(wrong, RequestError)
    assert "timestamps has 3 entries and item_ids has 4" in wrong.why
    assert isinstance(pair, RequestError)
    assert "a request is one user" in pair.why


def test_without_a_manifest_there_is_no_check(tmp_path: Path):
    with pytest.raises(BundleError, match="HSTU-E803"):
        open_checker(tmp_path, RuntimeSettings())
