"""Answer many one-user requests in one pass, and refuse each wrong one alone. Level 5; no torch.

Triton hands a batch of requests to `Answerer.answer`. What is wrong with a request is its own error; the others of the
batch are answered as if it had not been there.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from hstu_compile.bundle import BundleFiles, model_files, open_graph, read_bundle
from hstu_compile.errors import HstuCompileError, RequestError
from hstu_compile.ranking_bundle import open_ranking_session
from hstu_compile.retrieval_bundle import open_retrieval_session
from hstu_compile.runtime.ranking import RankingSession
from hstu_compile.runtime.ranking_request import RankingPolicy, RankingRequest, RankingResult, checked_requests
from hstu_compile.runtime.ranking_spec import RankingSpec
from hstu_compile.runtime.request import check_request
from hstu_compile.runtime.retrieval import RetrievalSession
from hstu_compile.runtime.retrieval_request import (
    RetrievalRequest,
    RetrievalResult,
    Truncation,
    checked_histories,
)
from hstu_compile.runtime.session import Session
from hstu_compile.serving.settings import RuntimeSettings

Arrays = Mapping[str, NDArray[Any]]
#: Output name to array, with the leading axis of 1; or why there is none.
Answer = dict[str, NDArray[Any]] | HstuCompileError

#: Under which key a user's rows are cached: an optional input of models with a cache. A request without it is answered
#: without the cache.
USER_KEY = "user_key"
#: Outputs beside the graph's: oldest events that were dropped, and what the cache did.
TRUNCATED, CACHE = "truncated", "cache"

_REQUEST_TIMES = "request_timestamps"
_SEQ_OFFSETS = "seq_offsets"
#: The name of everybody who is answered without the cache; refusals show it.
_NOBODY = f"without {USER_KEY}"
_Request = TypeVar("_Request")


def keeps_cache(files: BundleFiles, settings: RuntimeSettings) -> bool:
    """Whether a bundle is served with a KV cache: it has the graphs for one, and the settings give it memory."""
    has_graphs = files.retrieval is not None or model_files("score")[0] in files.manifest["files"]
    return has_graphs and settings.kv_budget_mib > 0


def open_answerer(bundle: Path, settings: RuntimeSettings) -> Answerer[Any]:
    """Open a bundle for serving.

    Raises:
        BundleError: HSTU-E803 if it is no bundle, or was altered.
        EngineError: HSTU-E401 or E404 if the runtime cannot be used.
        UsageError: HSTU-E901 for settings that do not go together.
    """
    files = read_bundle(bundle)
    use_gpu = settings.device == "gpu" and settings.runtime == "onnxruntime"
    cached, buckets = keeps_cache(files, settings), settings.buckets
    if files.ranking is not None:
        policy = RankingPolicy(truncation=settings.truncation, unknown_ids=settings.unknown_ids)
        if cached:
            session = open_ranking_session(
                bundle,
                settings.runtime,
                kv_budget_bytes=settings.kv_budget_bytes,
                policy=policy,
                over_budget="packed",
                use_gpu=use_gpu,
                buckets=buckets,
            )
        else:
            packed = open_graph(files, "packed", settings.runtime, use_gpu=use_gpu, buckets=buckets)
            session = RankingSession(files.ranking, packed, policy=policy)
        return RankingAnswerer(session, cached)
    if cached:
        return GrowingAnswerer(
            open_retrieval_session(
                bundle,
                settings.runtime,
                kv_budget_bytes=settings.kv_budget_bytes,
                truncation=settings.truncation,
                over_budget="uncached",
                use_gpu=use_gpu,
                buckets=buckets,
            ),
            settings.truncation,
        )
    retrieval = open_graph(files, "retrieval", settings.runtime, use_gpu=use_gpu, buckets=buckets)
    return RetrievalAnswerer(files, retrieval, settings)


class Answerer(abc.ABC, Generic[_Request]):
    """Answers requests of one user each."""

    def answer(self, requests: Sequence[Arrays]) -> list[Answer]:
        """Answer a batch.

        Args:
            requests: input name to array, with the leading axis of 1; any number of any users.

        Returns:
            One answer per request, in their order: outputs, or the RequestError that the request deserves alone. Any
            other error is of the whole batch.
        """
        answers: dict[int, Answer] = {}
        read: dict[int, _Request] = {}
        for index, arrays in enumerate(requests):
            try:
                read[index] = self._read(_without_batch_axis(arrays))
            except RequestError as error:
                answers[index] = error
        try:
            answers |= self._together(read)
        except RequestError:
            # The sessions refuse all requests for one: find it, and answer the others again.
            good = {}
            for index, request in read.items():
                try:
                    self._check(request)
                    good[index] = request
                except RequestError as error:
                    answers[index] = error
            answers |= self._one_by_one(good) if len(good) == len(read) else self._without_the_wrong(good)
        except HstuCompileError as error:
            answers |= dict.fromkeys(read, error)
        return [answers[index] for index in range(len(requests))]

    def _without_the_wrong(self, requests: Mapping[int, _Request]) -> dict[int, Answer]:
        try:
            return self._together(requests)
        except RequestError:
            return self._one_by_one(requests)
        except HstuCompileError as error:
            return dict.fromkeys(requests, error)

    def _one_by_one(self, requests: Mapping[int, _Request]) -> dict[int, Answer]:
        """What only a pass finds out, such as candidates that no split answers exactly."""
        answers: dict[int, Answer] = {}
        for index, request in requests.items():
            try:
                answers |= self._together({index: request})
            except HstuCompileError as error:
                answers[index] = error
        return answers

    def _together(self, requests: Mapping[int, _Request]) -> dict[int, Answer]:
        if not requests:
            return {}
        return dict(zip(requests, self._run(list(requests.values())), strict=True))

    @abc.abstractmethod
    def _read(self, arrays: Arrays) -> _Request:
        """The request in the arrays, which may have any shape; raises RequestError."""

    @abc.abstractmethod
    def _check(self, request: _Request) -> None:
        """Raise the RequestError that the request deserves, whoever is beside it."""

    @abc.abstractmethod
    def _run(self, requests: Sequence[_Request]) -> list[dict[str, NDArray[Any]]]:
        """Outputs of each request; raises RequestError if any of them is wrong."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free the runtime."""


class RankingAnswerer(Answerer[RankingRequest]):
    """Scores candidates, with the KV cache for requests that have a key.

    Args:
        session: closed with this.
        cached: whether the session has a cache.
    """

    def __init__(self, session: RankingSession, cached: bool) -> None:
        self._session, self._cached = session, cached

    def _read(self, arrays: Arrays) -> RankingRequest:
        return ranking_request(arrays, self._session.spec)

    def _check(self, request: RankingRequest) -> None:
        checked_requests([request], self._session.spec, self._session.policy)

    def _run(self, requests: Sequence[RankingRequest]) -> list[dict[str, NDArray[Any]]]:
        known = [index for index, each in enumerate(requests) if self._cached and each.user != _NOBODY]
        others = sorted({*range(len(requests))} - {*known})
        if known and others:
            # Both are checked before either runs: what is refused leaves no trace in the cache.
            checked_requests(requests, self._session.spec, self._session.policy)
        results: dict[int, RankingResult] = {}
        if others:
            results |= zip(others, self._session.score_packed([requests[index] for index in others]), strict=True)
        if known:
            results |= zip(known, self._session.score([requests[index] for index in known]), strict=True)
        return [self._outputs(results[index]) for index in range(len(requests))]

    def _outputs(self, result: RankingResult) -> dict[str, NDArray[Any]]:
        outputs: dict[str, NDArray[Any]] = {"preds": result.preds[None], "logits": result.logits[None]}
        outputs[TRUNCATED] = np.array([[result.truncated]], np.int32)
        return outputs | ({CACHE: _text(result.cache)} if self._cached else {})

    def close(self) -> None:
        """See `Answerer.close`."""
        self._session.close()


class GrowingAnswerer(Answerer[RetrievalRequest]):
    """User embeddings of growing histories, with the KV cache for requests that have a key.

    Args:
        session: closed with this.
        truncation: the session's.
    """

    def __init__(self, session: RetrievalSession, truncation: Truncation) -> None:
        self._session, self._truncation = session, truncation

    def _read(self, arrays: Arrays) -> RetrievalRequest:
        asked = arrays.get(_REQUEST_TIMES)
        if asked is None or asked.shape != (1,):
            shown = "missing" if asked is None else f"of shape {list(asked.shape)}"
            raise _malformed([f"{_REQUEST_TIMES} is {shown}; a request has one"])
        names = self._session.spec.event_names
        events = {name: arrays[name] for name in names if name in arrays}
        return RetrievalRequest(_key(arrays), events, asked.item())

    def _check(self, request: RetrievalRequest) -> None:
        checked_histories([request], self._session.spec, self._truncation)

    def _run(self, requests: Sequence[RetrievalRequest]) -> list[dict[str, NDArray[Any]]]:
        known = [index for index, each in enumerate(requests) if each.user != _NOBODY]
        others = sorted({*range(len(requests))} - {*known})
        if known and others:
            # As above; alone, the session checks them itself before it runs any.
            checked_histories(requests, self._session.spec, self._truncation)
        results: dict[int, RetrievalResult] = {}
        for chosen, cache in ((others, False), (known, True)):
            if chosen:
                encoded = self._session.encode([requests[index] for index in chosen], cache=cache)
                results |= zip(chosen, encoded, strict=True)
        return [self._outputs(results[index]) for index in range(len(requests))]

    def _outputs(self, result: RetrievalResult) -> dict[str, NDArray[Any]]:
        values = {
            "user_embeddings": result.user_embedding,
            "top_items": result.top_items,
            "top_scores": result.top_scores,
        }
        outputs: dict[str, NDArray[Any]] = {name: value[None] for name, value in values.items() if value is not None}
        return outputs | {TRUNCATED: np.array([[result.truncated]], np.int32), CACHE: _text(result.cache)}

    def close(self) -> None:
        """See `Answerer.close`."""
        self._session.close()


class RetrievalAnswerer(Answerer[Arrays]):
    """User embeddings of whole histories.

    Args:
        files: the bundle.
        session: its main graph; closed with this.
        settings: whether a long history is cut.
    """

    def __init__(self, files: BundleFiles, session: Session, settings: RuntimeSettings) -> None:
        self._limits, self._session = files.limits, session
        self._histories = WholeHistories(files, settings)

    def _read(self, arrays: Arrays) -> Arrays:
        return self._histories.read(arrays)

    def _check(self, request: Arrays) -> None:
        self._histories.typed(request)

    def _run(self, requests: Sequence[Arrays]) -> list[dict[str, NDArray[Any]]]:
        typed = [self._histories.typed(request) for request in requests]
        outputs: list[dict[str, NDArray[Any]]] = []
        for start in range(0, len(typed), self._limits.max_batch):
            batch = typed[start : start + self._limits.max_batch]
            feeds = {name: np.concatenate([each[name] for each in batch]) for name in batch[0] if name != _SEQ_OFFSETS}
            feeds[_SEQ_OFFSETS] = np.cumsum([0, *(each[_SEQ_OFFSETS][1] for each in batch)], dtype=np.int32)
            results = self._session.run(feeds)
            outputs += [{name: rows[row : row + 1] for name, rows in results.items()} for row in range(len(batch))]
        for each, request in zip(outputs, requests, strict=True):
            each[TRUNCATED] = request[TRUNCATED].reshape(1, 1)
        return outputs

    def close(self) -> None:
        """See `Answerer.close`."""
        self._session.close()


class WholeHistories:
    """Reads and checks retrieval requests whose whole history is encoded.

    Args:
        files: the bundle; its manifest is enough.
        settings: whether a long history is cut.
    """

    def __init__(self, files: BundleFiles, settings: RuntimeSettings) -> None:
        self._limits = files.limits
        self._cuts = settings.truncation == "keep_last"
        self._events = [each.name for each in files.inputs if each.shape == ("L",)]

    def read(self, arrays: Arrays) -> Arrays:
        """The request, cut if that is meant; how many events went is in it under TRUNCATED.

        Args:
            arrays: input name to array of any shape, without the batch axis.
        """
        lengths = {arrays[name].shape[0] for name in self._events if name in arrays and arrays[name].ndim}
        dropped = 0
        if self._cuts and len(lengths) == 1:
            dropped = max(0, lengths.pop() - self._limits.max_seq_len)
        given = {name: array[dropped:] if name in self._events else array for name, array in arrays.items()}
        return {**given, TRUNCATED: np.array(dropped, np.int32)}

    def typed(self, request: Arrays) -> dict[str, NDArray[Any]]:
        """The request in the model's dtypes, with its seq_offsets [2].

        Raises:
            RequestError: HSTU-E701 to E705, with every fault.
        """
        feeds = {name: array for name, array in request.items() if name not in (TRUNCATED, USER_KEY)}
        first = feeds.get(self._events[0])
        length = first.shape[0] if first is not None and first.ndim else 0
        try:
            return check_request({**feeds, _SEQ_OFFSETS: np.array([0, length], np.int64)}, self._limits)
        except RequestError as error:
            if error.code != "HSTU-E701":
                raise
            # Written for whole batches: the offsets that it asks for are none of the client's.
            events = ", ".join(f"{name} [1, L]" for name in self._events)
            fix = f"send {events} and {_REQUEST_TIMES} [1, 1], of the types that the model's metadata lists"
            raise RequestError("HSTU-E701", error.what, error.why, fix, error.context) from error


def ranking_request(arrays: Arrays, spec: RankingSpec) -> RankingRequest:
    """The request in the arrays, input name to array without the batch axis.

    Raises:
        RequestError: HSTU-E701 for more than one key.
    """

    def of(names: Sequence[str]) -> dict[str, NDArray[Any]]:
        return {name: arrays[name] for name in names if name in arrays}

    return RankingRequest(
        user=_key(arrays),
        history=of(spec.history_names),
        candidates=of(spec.candidate_names),
        context=of(spec.contextual_names),
    )


def _without_batch_axis(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """The arrays of the one user.

    Raises:
        RequestError: HSTU-E701 for a request of several users.
    """
    wrong = [
        f"{name} has shape {list(array.shape)}: a request is one user, so its first axis is 1"
        for name, array in arrays.items()
        if not array.ndim or array.shape[0] != 1
    ]
    if wrong:
        raise _malformed(wrong)
    return {name: array[0] for name, array in arrays.items()}


def _key(arrays: Arrays) -> str | int:
    key = arrays.get(USER_KEY)
    if key is None:
        return _NOBODY
    if key.shape != (1,):
        raise _malformed([f"{USER_KEY} has {list(key.shape)} values; a request has one"])
    return int(key[0])


def _malformed(problems: Sequence[str]) -> RequestError:
    return RequestError(
        "HSTU-E701",
        f"the request has {len(problems)} fault{'s' if len(problems) > 1 else ''}",
        "; ".join(problems),
        "send one user per request: every tensor of shape [1, n]",
        {"problems": [{"code": "HSTU-E701", "problem": text} for text in problems]},
    )


def _text(value: str) -> NDArray[Any]:
    """One string of Triton's TYPE_STRING."""
    return np.array([[value.encode()]], dtype=np.object_)
