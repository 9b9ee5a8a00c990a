"""A wrong request gets its own error, a 4xx, and the requests that share its batch do not notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hstu_compile.serving.samples import Sample
from hstu_compile.serving.settings import RuntimeSettings, Scheduling
from tests.triton.clients import PROTOCOLS, Protocol, ask, ask_all
from tests.triton.models import ServedModel, deploy
from tests.triton.server import TritonServer, execution_counts, grpc_client, http_client

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

Change = Callable[[Sample], dict[str, Any]]
BAD_REQUEST = {"http": "400", "grpc": "StatusCode.INVALID_ARGUMENT"}


def setting(**changes: Callable[[Any], Any]) -> Change:
    return lambda sample: {**sample, **{name: change(sample[name]) for name, change in changes.items()}}


def repeated(array: Any) -> Any:
    """A longer history than any model here takes, with times that do not go back."""
    return np.repeat(array, 60)


#: What is wrong, and what our message says of it. The requests have 20 and 48 events, in order.
RETRIEVAL_FAULTS: dict[str, tuple[Change, str]] = {
    "id-outside": (setting(item_ids=lambda ids: ids + 1000), r"HSTU-E703.*item_ids outside 0\.\.40"),
    "negative-id": (setting(item_ids=lambda ids: -ids), r"HSTU-E703.*item_ids outside"),
    "rating-outside": (setting(ratings=lambda values: values + 4), r"HSTU-E703.*ratings outside 0\.\.3"),
    "unequal-lengths": (
        setting(item_ids=lambda ids: ids[1:]),
        r"HSTU-E701.*timestamps has 20 entries and item_ids has 19.*send item_ids \[1, L\]",
    ),
    "too-long": (
        setting(item_ids=repeated, timestamps=repeated, ratings=repeated),
        r"HSTU-E704.*1200 events; at most 20 fit",
    ),
    "times-back": (setting(timestamps=lambda times: times[::-1]), r"HSTU-E705.*goes back in time at event 1"),
    "no-time": (setting(request_timestamps=lambda time: time[:0]), r"HSTU-E701.*request_timestamps has 0 entries"),
    "asked-before": (setting(request_timestamps=lambda time: time - 10**8), r"HSTU-E705.*before its last event"),
}
RANKING_FAULTS: dict[str, tuple[Change, str]] = {
    "candidate-outside": (setting(item_movie_id=lambda ids: ids + 99), r"HSTU-E703.*item_movie_id outside 0\.\.39"),
    "context-outside": (setting(genres=lambda ids: ids + 99), r"HSTU-E703.*genres outside"),
    "context-too-long": (setting(genres=repeated), r"HSTU-E701.*genres has 180 values; it takes at most 3"),
    "unequal-candidates": (setting(item_shop=lambda ids: ids[1:]), r"HSTU-E701.*different lengths.*item_shop"),
    "unequal-events": (setting(item_weights=lambda ids: ids[1:]), r"HSTU-E701.*different lengths.*item_weights 47"),
    "too-long": (
        setting(movie_id=repeated, action_timestamp=repeated, item_weights=repeated),
        r"HSTU-E704.*2880 events; at most 48 fit",
    ),
    "query-before": (setting(item_query_time=lambda time: time - 10**8), r"HSTU-E705.*query time before"),
}
FAULTS = {"retrieval": RETRIEVAL_FAULTS, "ranking": RANKING_FAULTS}


@pytest.fixture(scope="module")
def models(triton_server: TritonServer, retrieval: ServedModel, ranking: ServedModel) -> dict[str, ServedModel]:
    """Both bundles, with a queue that gathers whoever asks at about the same time."""
    served = {"retrieval_strict": retrieval, "ranking_strict": ranking}
    for name, model in served.items():
        scheduling = Scheduling(max_queue_delay_us=50_000)
        deploy(triton_server, model, name, scheduling=scheduling, settings=RuntimeSettings(kv_budget_mib=0))
    return served


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", ["retrieval", "ranking"])
def test_every_fault_is_named_and_no_other_request_of_the_batch_is_affected(
    triton_server: TritonServer, models: dict[str, ServedModel], kind: str, protocol: Protocol
) -> None:
    name = f"{kind}_strict"
    model, faults = models[name], FAULTS[kind]
    longest, good = model.samples(2)[1], model.samples(len(faults), seed=3)
    wrong = [change(longest) for change, _ in faults.values()]
    # One good and one wrong request by turns: the eight threads hand in four of each at a time.
    samples = [sample for pair in zip(good, wrong, strict=True) for sample in pair]
    before = execution_counts(triton_server, name)
    answers = ask_all(triton_server, protocol, name, samples)
    after = execution_counts(triton_server, name)
    for sample, answer in zip(good, answers[::2], strict=True):
        assert not isinstance(answer, Exception), answer
        model.check(answer, sample)
    for (fault, (_, message)), answer in zip(faults.items(), answers[1::2], strict=True):
        assert isinstance(answer, Exception), fault
        check_refusal(answer, protocol, rf"(?s){message}.*hstu-compile explain HSTU-E7")
    # Fewer passes than good requests alone: good and wrong ones were in the same batches.
    assert after[1] - before[1] < len(good)


def check_refusal(error: Any, protocol: Protocol, message: str) -> None:
    with pytest.raises(type(error), match=message):
        raise error
    assert error.status() == BAD_REQUEST[protocol]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_the_server_itself_refuses_is_a_4xx_as_well(
    triton_server: TritonServer, models: dict[str, ServedModel], protocol: Protocol
) -> None:
    from tritonclient.utils import InferenceServerException

    name = "retrieval_strict"
    model = models[name]
    (good,) = model.samples(1)
    wrong: dict[str, dict[str, Any]] = {
        "data-type is 'INT64'": {**good, "item_ids": good["item_ids"].astype(np.int64)},
        "missing required input": {each: array for each, array in good.items() if each != "timestamps"},
        "expected 4 inputs but got 5 inputs": {**good, "color": good["item_ids"]},
        "unexpected shape for input 'item_ids'": {**good, "item_ids": good["item_ids"][None]},
    }
    opened = http_client if protocol == "http" else grpc_client
    with opened(triton_server) as client:
        for message, sample in wrong.items():
            with pytest.raises(InferenceServerException, match=message) as refusal:
                ask(client, protocol, name, sample)
            assert refusal.value.status() == BAD_REQUEST[protocol], message
        for arguments, model_name in (({"model_version": "9"}, name), ({}, "nobody")):
            with pytest.raises(InferenceServerException, match="unknown model") as refusal:
                ask(client, protocol, model_name, good, **arguments)
            assert refusal.value.status() in ("404", "400", "StatusCode.NOT_FOUND", "StatusCode.INVALID_ARGUMENT")
        model.check(ask(client, protocol, name, good), good)


def test_a_request_of_two_users_is_refused(triton_server: TritonServer, models: dict[str, ServedModel]) -> None:
    from tritonclient.http import InferInput
    from tritonclient.utils import InferenceServerException

    (good,) = models["retrieval_strict"].samples(1)
    inputs = []
    for name, array in good.items():
        rows = np.stack([array, array])
        tensor = InferInput(name, list(rows.shape), {"int32": "INT32", "int64": "INT64"}[str(rows.dtype)])
        tensor.set_data_from_numpy(rows)
        inputs.append(tensor)
    with http_client(triton_server) as client, pytest.raises(InferenceServerException) as refusal:
        client.infer("retrieval_strict", inputs)
    check_refusal(refusal.value, "http", r"(?s)HSTU-E701.*item_ids has shape \[2, 1\]: a request is one user")
