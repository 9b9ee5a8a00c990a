"""What a served bundle is asked, and what it must answer: the stored float64 values, and Python's own session.

NumPy and onnx alone, so that it runs beside TensorRT 8.5.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from ranking_checks import fitting

from hstu_compile import bundle as bundles
from hstu_compile.artifacts import TensorSpec
from hstu_compile.compare import error_bound
from hstu_compile.m_falcon_check import requests_of
from hstu_compile.polygraphy_files import load_outputs
from hstu_compile.ranking_bundle import open_ranking_session
from hstu_compile.recheck import stored_reference
from hstu_compile.runtime.ranking_request import RankingRequest
from hstu_compile.runtime.ranking_spec import RankingSpec
from hstu_compile.serving.samples import sample_requests
from hstu_compile.session_check import PREDICTIONS, SESSION, Reference

Arrays = dict[str, NDArray[Any]]

#: Of mixed lengths, beside the stored ones.
SAMPLES = 48
#: Batches that Python's session is asked, to see whether an answer depends on who is beside it.
COMPOSITIONS, LARGEST_COMPOSITION = 24, 16
_UNCACHED, _CACHED = b"off", (b"miss", b"hit", b"stale")


@dataclasses.dataclass(frozen=True)
class Target:
    """What an output must be near to.

    Attributes:
        values: [rows, columns] float64.
        scale: [rows, 1] or [columns] float64 -- what a difference is divided by.
        bound: largest quotient.
    """

    values: NDArray[np.float64]
    scale: NDArray[np.float64]
    bound: float

    def error(self, actual: NDArray[Any]) -> float:
        """Largest scaled difference; infinite for another size, for what is not finite, and where the scale is 0."""
        if actual.size != self.values.size:
            return np.inf
        difference = np.abs(actual.reshape(self.values.shape).astype(np.float64) - self.values)
        scaled = np.where(difference == 0, 0.0, difference / np.where(self.scale > 0, self.scale, np.nan))
        worst = float(scaled.max(initial=0.0))
        return worst if np.isfinite(worst) else np.inf


@dataclasses.dataclass(frozen=True)
class Question:
    """One request of one user.

    Attributes:
        model: name in the repository.
        label: where it comes from.
        user: number of the question, and the key under which rows are cached.
        stored: whether the targets are the bundle's float64 values; else they are the session's own answers.
        cacheable: whether the model has a cache, and the request something to look up.
        sample: input name to array, without the batch axis.
        targets: by output.
        bits: what Python's session answers when it is asked nothing else: "plain" and, with a cache, "cached".
    """

    model: str
    label: str
    user: int
    stored: bool
    cacheable: bool
    sample: Arrays
    targets: Mapping[str, Target]
    bits: Mapping[str, Arrays]

    def keyed(self) -> Arrays:
        """The request as one whose rows may be cached."""
        return {**self.sample, "user_key": np.array([self.user], np.int64)}

    def error(self, answer: Mapping[str, NDArray[Any]]) -> float:
        """Worst error over its bound, of all outputs that have one."""
        return max(target.error(answer[name]) / target.bound for name, target in self.targets.items())

    def fault(self, answer: Mapping[str, NDArray[Any]]) -> str | None:
        """What is wrong with an answer, whoever was beside it; None if nothing is."""
        for name, expected in self.bits["plain"].items():
            actual = answer.get(name)
            if actual is None:
                return f"no {name}"
            if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
                return f"{name} is {actual.dtype} {list(actual.shape)}, not {expected.dtype} {list(expected.shape)}"
        for name, target in self.targets.items():
            error = target.error(answer[name])
            if not error <= target.bound:
                return f"{name} differs by {error:.3g}; at most {target.bound:.3g} may be"
        if answer["truncated"].tolist() != [[0]]:
            return f"{answer['truncated'].tolist()} events were cut"
        return None

    def changed_bits(self, answer: Mapping[str, NDArray[Any]], keyed: bool) -> list[str]:
        """Outputs that are not those of Python's session, to the bit."""
        expected = self.bits["cached" if keyed else "plain"]
        return [name for name, values in expected.items() if answer[name].tobytes() != values.tobytes()]

    def wrong_cache(self, answer: Mapping[str, NDArray[Any]], keyed: bool) -> str | None:
        """What is wrong about the use of the cache; None if nothing is."""
        said = answer["cache"].item() if "cache" in answer else _UNCACHED
        right = said in _CACHED if keyed else said == _UNCACHED
        return None if right else f"the cache said {said!r}"


class PythonSession(Protocol):
    """The same engine in this process."""

    has_cache: bool
    inputs: tuple[TensorSpec, ...]

    def ask(self, samples: Sequence[Mapping[str, NDArray[Any]]], cached: bool = False) -> list[Arrays]:
        """Outputs of each, with the batch axis as Triton gives it; the users of `cached` are the samples' numbers."""

    def close(self) -> None:
        """Free it."""


class Encoder:
    """A retrieval bundle's engine.

    Args:
        files: the bundle.
        runtime: onnxruntime or tensorrt.
    """

    has_cache = False

    def __init__(self, files: bundles.BundleFiles, runtime: str) -> None:
        self._session = bundles.open_graph(files, "retrieval", runtime)
        self._shapes = {tensor.name: tensor.shape for tensor in files.inputs}
        self.inputs = self._session.inputs

    def ask(self, samples: Sequence[Mapping[str, NDArray[Any]]], cached: bool = False) -> list[Arrays]:
        """See `PythonSession.ask`."""
        names = [name for name, shape in self._shapes.items() if shape != ("B_plus_1",)]
        events = next(name for name in names if self._shapes[name] == ("L",))
        feeds = {name: np.concatenate([each[name] for each in samples]) for name in names}
        feeds["seq_offsets"] = np.cumsum([0, *(len(each[events]) for each in samples)], dtype=np.int32)
        outputs = self._session.run(feeds)
        return [{name: rows[user : user + 1] for name, rows in outputs.items()} for user in range(len(samples))]

    def close(self) -> None:
        """See `PythonSession.close`."""
        self._session.close()


class Scorer:
    """A ranking bundle's engines with a KV cache that holds everybody.

    Args:
        files: the bundle.
        runtime: onnxruntime or tensorrt.
        budget: bytes of the cache.
    """

    has_cache = True

    def __init__(self, files: bundles.BundleFiles, runtime: str, budget: int = 1 << 28) -> None:
        self._session = open_ranking_session(files.path, runtime, kv_budget_bytes=budget, over_budget="packed")
        with bundles.open_graph(files, "packed", runtime) as packed:
            self.inputs = packed.inputs

    def ask(self, samples: Sequence[Mapping[str, NDArray[Any]]], cached: bool = False) -> list[Arrays]:
        """See `PythonSession.ask`; the cache is empty before and after."""
        requests = [request_from(sample, self._session.spec, user) for user, sample in enumerate(samples)]
        self._session.clear()
        results = self._session.score(requests) if cached else self._session.score_packed(requests)
        self._session.clear()
        return [{"preds": each.preds[None], "logits": each.logits[None]} for each in results]

    def close(self) -> None:
        """See `PythonSession.close`."""
        self._session.close()


def request_from(sample: Mapping[str, NDArray[Any]], spec: RankingSpec, user: int) -> RankingRequest:
    """A ranking request of Triton's inputs."""
    parts = (spec.history_names, spec.candidate_names, spec.contextual_names)
    history, candidates, context = ({name: sample[name] for name in names} for names in parts)
    return RankingRequest(user, history, candidates, context)


@dataclasses.dataclass(frozen=True)
class AskedModel:
    """A bundle with its questions.

    Attributes:
        name: in the repository.
        files: the bundle.
        questions: stored ones first.
        longest: a request of the longest history that the bundle takes, to make malformed ones of.
        beyond_int32: names of the stored feeds whose times the engine cannot hold.
        holds_int64: whether the engine takes every int64 time.
        batches: what Python's session answered in batches: answers, and how many differed in a bit from those alone.
    """

    name: str
    files: bundles.BundleFiles
    questions: tuple[Question, ...]
    longest: Arrays
    beyond_int32: tuple[str, ...]
    holds_int64: bool
    batches: Mapping[str, int]

    @property
    def alone_is_beside_others(self) -> bool:
        """Whether Python's session gave the same bits whoever was beside a request."""
        return self.batches["answers"] > 0 and self.batches["changed"] == 0

    @property
    def has_cache(self) -> bool:
        """Whether requests may have a key."""
        return any(question.cacheable for question in self.questions)


def ask_python(folder: Path, runtime: str) -> AskedModel:
    """Make a bundle's questions, and answer them with the session that the server is to equal."""
    files = bundles.read_bundle(folder)
    session: PythonSession = Encoder(files, runtime) if files.ranking is None else Scorer(files, runtime)
    try:
        return _asked(files, session)
    finally:
        session.close()


def _asked(files: bundles.BundleFiles, session: PythonSession) -> AskedModel:
    entry = files.manifest["graphs"][0]
    whole = stored_reference(files.path, entry)
    if files.ranking is not None:
        whole = _of_session(files, whole)
    reference, beyond = fitting(whole, session.inputs)
    precision = files.manifest["precision"]["requested"]
    bounds = {name: error_bound(error, precision) for name, error in reference.eager_error.items()}
    dtypes = {tensor.name: np.dtype(tensor.dtype) for tensor in files.inputs}
    stored = _stored(files, reference, bounds)
    drawn = sample_requests(files, SAMPLES)
    samples = [{name: array.astype(dtypes[name]) for name, array in each.items()} for each in (*stored[1], *drawn)]
    plain = [session.ask([sample])[0] for sample in samples]
    cacheable = [session.has_cache and files.ranking is not None and _has_candidates(files, each) for each in samples]
    cached = [
        session.ask([each], cached=True)[0] if able else None for each, able in zip(samples, cacheable, strict=True)
    ]
    # Both the server and the session may lie a bound away from float64.
    doubled = {name: 2 * bound for name, bound in bounds.items()}
    targets = [*stored[2], *_targets(plain[len(stored[0]) :], doubled)]
    labels = [*stored[0], *(f"sample {index}" for index in range(SAMPLES))]
    questions = tuple(
        Question(
            model=files.path.name,
            label=labels[index],
            user=index,
            stored=index < len(stored[0]),
            cacheable=cacheable[index],
            sample=samples[index],
            targets=targets[index],
            bits={"plain": plain[index]} | ({} if (kept := cached[index]) is None else {"cached": kept}),
        )
        for index in range(len(samples))
    )
    return AskedModel(
        name=files.path.name,
        files=files,
        questions=questions,
        longest=samples[len(stored[0]) + 1],
        beyond_int32=tuple(beyond),
        holds_int64=all(tensor.dtype == "int64" for tensor in session.inputs if dtypes[tensor.name] == np.int64),
        batches=_in_batches(session, questions, min(LARGEST_COMPOSITION, files.manifest["limits"]["max_batch"])),
    )


def _of_session(files: bundles.BundleFiles, packed: Reference) -> Reference:
    """The packed graph's requests, each a batch of its own, as the three graphs answer them together."""
    stored = files.manifest["verification"]["session"]
    exact = tuple(load_outputs(files.path / bundles.reference_files(SESSION).exact))
    return dataclasses.replace(packed, exact=exact, eager=exact, eager_error=dict(stored["eager_error"]))


def _has_candidates(files: bundles.BundleFiles, sample: Mapping[str, NDArray[Any]]) -> bool:
    """Whether a ranking request has candidates: nobody looks up a user who has none."""
    assert files.ranking is not None
    return len(sample[files.ranking.candidate_time]) > 0


def _stored(
    files: bundles.BundleFiles, reference: Reference, bounds: Mapping[str, float]
) -> tuple[list[str], list[Arrays], list[dict[str, Target]]]:
    """Labels, requests and targets of the users of every stored feed."""
    labels, samples, targets = [], [], []
    for feed, exact in zip(reference.feeds, reference.exact, strict=True):
        arrays = feed.arrays
        if files.ranking is None:
            ends = arrays["seq_offsets"]
            shapes = {tensor.name: tensor.shape for tensor in files.inputs if tensor.shape != ("B_plus_1",)}
            of_feed = [
                {
                    name: arrays[name][ends[user] : ends[user + 1]]
                    if shape == ("L",)
                    else arrays[name][user : user + 1]
                    for name, shape in shapes.items()
                }
                for user in range(len(ends) - 1)
            ]
            rows = [{"user_embeddings": exact["user_embeddings"][user : user + 1]} for user in range(len(of_feed))]
            targets += _targets(rows, bounds)
        else:
            of_feed = [{**each.history, **each.candidates, **each.context} for each in requests_of(feed, files.ranking)]
            ends = arrays["candidate_offsets"]
            rows = [
                {name: exact[name][ends[user] : ends[user + 1]] for name in PREDICTIONS} for user in range(len(of_feed))
            ]
            targets += _targets(rows, bounds)
        samples += [dict(each) for each in of_feed]
        labels += [f"{feed.name}, user {user}" for user in range(len(of_feed))]
    return labels, samples, targets


def _targets(rows: Sequence[Arrays], bounds: Mapping[str, float]) -> list[dict[str, Target]]:
    """Targets of requests that belong together.

    A prediction is one number and may be near zero, so it has no scale of its own: its scale is that of the task over
    all of these requests. An embedding's is its own.
    """
    names = [name for name in (*PREDICTIONS, "user_embeddings") if rows and name in rows[0] and name in bounds]
    found: list[dict[str, Target]] = [{} for _ in rows]
    for name in names:
        tables = [each[name].reshape(-1, each[name].shape[-1]).astype(np.float64) for each in rows]
        tasks = np.sqrt(np.mean(np.concatenate(tables) ** 2, axis=0))
        for targets, table in zip(found, tables, strict=True):
            scale = tasks if name in PREDICTIONS else np.sqrt(np.mean(table**2, axis=1, keepdims=True))
            targets[name] = Target(table, scale, bounds[name])
    return found


def _in_batches(session: PythonSession, questions: Sequence[Question], largest: int) -> dict[str, int]:
    """Whether the session's answers are the same in a batch as alone: answers, and how many differed in a bit."""
    rng = np.random.default_rng(0)
    answers = changed = 0
    for _ in range(COMPOSITIONS):
        chosen = [questions[index] for index in rng.integers(len(questions), size=rng.integers(2, largest + 1))]
        for keyed in (False, True):
            asked = [question for question in chosen if question.cacheable or not keyed]
            if not asked:
                continue
            for question, answer in zip(asked, session.ask([each.sample for each in asked], keyed), strict=True):
                answers += 1
                changed += bool(question.changed_bits(answer, keyed))
    return {"answers": answers, "changed": changed}


def described(model: AskedModel) -> dict[str, Any]:
    """Facts for the results."""
    lengths = {
        question.label: {name: len(array) for name, array in question.sample.items()} for question in model.questions
    }
    stored = sum(question.stored for question in model.questions)
    return {
        "questions": len(model.questions),
        "with_float64": stored,
        "distinct_lengths": len({json.dumps(each, sort_keys=True) for each in lengths.values()}),
        "feeds_beyond_int32": list(model.beyond_int32),
        "python_in_batches": dict(model.batches),
    }
