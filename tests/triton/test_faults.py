"""Whatever is sent to it, the server lives, says what is wrong, and answers the others as before."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from hstu_compile.bundle import BundleFiles, read_bundle
from hstu_compile.serving.samples import Sample
from hstu_compile.serving.settings import RuntimeSettings
from tests.triton.clients import PROTOCOLS, Protocol, ask, prepared, send
from tests.triton.legal import completed, is_legal
from tests.triton.models import ServedModel, deploy
from tests.triton.processes import stub_processes
from tests.triton.raw_http import HEADER_LENGTH, RawHttp, binary_request, cut_off, encoded, json_outputs, outputs_of
from tests.triton.server import TritonServer, grpc_client, http_client

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

NAMES = {"retrieval": "retrieval_faults", "ranking": "ranking_faults"}
#: 2,000 requests in all: by bytes over HTTP 1,000, and by tensors over each protocol 500. Slow tests included: without
#: them each model is asked over one protocol.
FUZZED_BYTES, FUZZED_TENSORS = 1_000, 500
BAD_REQUEST = {"http": "400", "grpc": "StatusCode.INVALID_ARGUMENT"}
#: The server's own: JSON that it cannot read is its status 500, and only that.
UNREADABLE = ("failed to parse the request JSON buffer", "Unable to parse", "failed to get request params")
fuzzing = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@dataclasses.dataclass(frozen=True)
class Target:
    """One model, and what it answers to good requests when nothing else happens.

    Attributes:
        name: in the repository.
        model: its eager twin.
        files: its bundle.
        good: requests.
        before: the server's answers to them, by output; taken before any fault.
    """

    name: str
    model: ServedModel
    files: BundleFiles
    good: list[Sample]
    before: list[dict[str, Any]]

    @property
    def path(self) -> str:
        """Of its requests over HTTP."""
        return f"/v2/models/{self.name}/infer"


@pytest.fixture(scope="module")
def targets(triton_server: TritonServer, retrieval: ServedModel, ranking: ServedModel) -> dict[str, Target]:
    """Both bundles under names of their own."""
    found = {}
    for model in (retrieval, ranking):
        name = deploy(triton_server, model, NAMES[model.name], settings=RuntimeSettings(kv_budget_mib=0))
        good = model.samples(4, seed=11)
        with http_client(triton_server) as client:
            before = [ask(client, "http", name, sample) for sample in good]
        for sample, answer in zip(good, before, strict=True):
            model.check(answer, sample)
        found[model.name] = Target(name, model, read_bundle(model.bundle, check_files=False), good, before)
    return found


def check_nothing_changed(server: TritonServer, targets: Mapping[str, Target]) -> None:
    """Good requests are answered as before, to the bit, over both protocols."""
    for target in targets.values():
        for protocol in PROTOCOLS:
            with (http_client if protocol == "http" else grpc_client)(server) as client:
                for sample, before in zip(target.good, target.before, strict=True):
                    now = ask(client, protocol, target.name, sample)
                    assert now.keys() == before.keys()
                    for name, array in before.items():
                        assert now[name].tobytes() == array.tobytes(), (target.name, protocol, name)


@pytest.fixture
def unharmed(triton_server: TritonServer, targets: dict[str, Target]) -> Iterator[dict[str, Target]]:
    """The targets; after the test no process has ended, and no good answer has changed by a bit."""
    processes = stub_processes(triton_server.pid)
    assert set(NAMES.values()) <= processes.keys()
    yield targets
    assert stub_processes(triton_server.pid) == processes
    check_nothing_changed(triton_server, targets)


@pytest.fixture
def others(triton_server: TritonServer, unharmed: dict[str, Target]) -> Iterator[list[int]]:
    """Somebody who asks both models good requests all the time; the number of answers, which are all right."""
    enough, answered, wrong = threading.Event(), [0], []

    def go_on_asking() -> None:
        try:
            with grpc_client(triton_server) as client:
                while not enough.is_set():
                    for target in unharmed.values():
                        for sample in target.good:
                            # In a batch with others its last bits may differ, as those of any batch.
                            target.model.check(ask(client, "grpc", target.name, sample), sample)
                            answered[0] += 1
        except Exception as error:
            wrong.append(error)

    thread = threading.Thread(target=go_on_asking)
    thread.start()
    yield answered
    enough.set()
    thread.join(60)
    assert not thread.is_alive()
    assert wrong == []


@pytest.fixture
def raw(triton_server: TritonServer) -> Iterator[RawHttp]:
    connection = RawHttp(triton_server)
    yield connection
    connection.close()


Bytes = tuple[bytes, dict[str, str]]


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Sample], Bytes]:
    """A binary request whose JSON part was changed in place."""

    def request(sample: Sample) -> Bytes:
        head, tail = binary_request(sample)
        change(head)
        return encoded(head, tail)

    return request


def first(**entries: Any) -> Callable[[Sample], Bytes]:
    """A binary request whose first input has other entries; None takes one away."""

    def change(head: dict[str, Any]) -> None:
        tensor = {**head["inputs"][0], **entries}
        head["inputs"][0] = {name: value for name, value in tensor.items() if value is not None}

    return changed(change)


def bytes_in_all(size: object) -> Callable[[Sample], Bytes]:
    return first(parameters={"binary_data_size": size})


def whole(sample: Sample) -> Bytes:
    return encoded(*binary_request(sample))


def with_header_length(change: Callable[[int, int], object]) -> Callable[[Sample], Bytes]:
    """A good body with another length of its JSON part, made of that length and the body's."""

    def request(sample: Sample) -> Bytes:
        body, headers = whole(sample)
        return body, {HEADER_LENGTH: str(change(int(headers[HEADER_LENGTH]), len(body)))}

    return request


def followed_by(text: bytes) -> Callable[[Sample], Bytes]:
    """A good body whose JSON part ends in something else."""

    def request(sample: Sample) -> Bytes:
        body, headers = whole(sample)
        length = int(headers[HEADER_LENGTH])
        return body[:length] + text + body[length:], {HEADER_LENGTH: str(length + len(text))}

    return request


#: Status and the server's words for bodies that are not a request. 500 is always one of UNREADABLE.
BODIES: dict[str, tuple[Callable[[Sample], Bytes], int, str]] = {
    "zero bytes": (lambda _: (b"", {}), 400, "Raw request must only have 1 input"),
    "zero bytes, a header is promised": (lambda good: (b"", whole(good)[1]), 400, "inference header size"),
    "garbage": (lambda _: (b"\x00\xff" * 500, {}), 500, "failed to parse the request JSON buffer"),
    "another document": (lambda _: (b"[]", {}), 500, "Unable to parse 'inputs'"),
    "an empty document": (lambda _: (b"{}", {}), 500, "Unable to parse 'inputs'"),
    "brackets": (lambda _: (b'{"inputs":' + b"[" * 100_000, {}), 500, "failed to parse the request JSON buffer"),
    "half of the JSON": (lambda good: (whole(good)[0][:100], {}), 500, "failed to parse the request JSON buffer"),
    "compression that is none": (
        lambda good: (whole(good)[0], {**whole(good)[1], "Content-Encoding": "zzz"}),
        501,
        "Unsupported compression type",
    ),
    "header length over the body": (with_header_length(lambda _, size: size + 1), 400, "inference header size"),
    "header length negative": (with_header_length(lambda *_: -1), 400, "inference header size"),
    "header length no number": (with_header_length(lambda *_: "abc"), 400, "Raw request must only have 1 input"),
    "header length short": (with_header_length(lambda head, _: head - 3), 500, "failed to parse the request JSON"),
    "something behind the JSON": (followed_by(b"junk"), 500, "failed to parse the request JSON"),
    "binary cut": (lambda good: (whole(good)[0][:-8], whole(good)[1]), 400, "unexpected size for input"),
    "binary too long": (lambda good: (whole(good)[0] + b"12345678", whole(good)[1]), 400, "unexpected additional"),
    "tensor shorter than its shape": (bytes_in_all(4), 400, "unexpected additional input data"),
    "tensor longer than the body": (bytes_in_all(1 << 40), 400, "unexpected size for input"),
    "tensor of negative size": (bytes_in_all(-4), 500, "Unable to parse 'binary_data_size'"),
    "size as text": (bytes_in_all("x"), 500, "Unable to parse 'binary_data_size'"),
    "wrong type": (first(datatype="INT64"), 400, "data-type is 'INT64'"),
    "type that is none": (first(datatype="NOPE"), 400, "data-type is '<invalid>'"),
    "texts": (first(datatype="BYTES"), 400, "data-type is 'BYTES'"),
    "type as number": (first(datatype=3), 500, "Unable to parse 'datatype'"),
    "negative length": (first(shape=[1, -5]), 500, "Unable to parse 'shape'"),
    "no length": (first(shape=None), 500, "Unable to parse 'shape'"),
    "length as fraction": (first(shape=[1, 1.5]), 500, "Unable to parse 'shape'"),
    "long length": (first(shape=[1, 1 << 40]), 400, "byte size mismatch for input"),
    "nobody": (first(shape=[0, 5]), 400, "batch size does not match"),
    "no axes": (first(shape=[]), 400, "has no shape but model requires batch dimension"),
    "many axes": (first(shape=[1] * 30), 400, "unexpected shape for input"),
    "another name": (first(name="nobody"), 400, "unexpected inference input 'nobody'"),
    "a name twice": (
        changed(lambda head: head["inputs"][0].update(name=head["inputs"][1]["name"])),
        400,
        "already exists in request",
    ),
    "an input less": (changed(lambda head: head["inputs"].pop()), 400, "unexpected additional input data"),
    "no inputs": (changed(lambda head: head.pop("inputs")), 500, "Unable to parse 'inputs'"),
    "an output that is none": (
        changed(lambda head: head.update(outputs=[{"name": "nobody"}])),
        400,
        "unexpected inference output 'nobody'",
    ),
    "shared memory that is none": (
        first(parameters={"shared_memory_region": "x", "shared_memory_byte_size": 4}),
        404,
        "Unable to find shared memory region",
    ),
    "parameters that are none": (changed(lambda head: head.update(parameters=3)), 500, "failed to get request params"),
}


@pytest.mark.parametrize("kind", list(NAMES))
def test_bodies_that_are_no_request_are_refused_by_the_server_with_a_known_code(
    unharmed: dict[str, Target], raw: RawHttp, kind: str
) -> None:
    target = unharmed[kind]
    longest = target.good[1]
    for name, (request, status, message) in BODIES.items():
        found, text, _ = raw.post(target.path, *request(longest))
        assert found == status, (name, text)
        said = json.loads(text)["error"]
        assert any(part in said for part in message.split("|")), (name, said)
        assert (status == 500) == any(part in said for part in UNREADABLE), (name, said)


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/v2/models/nobody/infer", 404, "unknown model: 'nobody' is not found"),
        ("/v2/models/{name}/versions/9/infer", 404, "'{name}' version 9 is not found"),
        ("/v2/models/{name}/versions/x/infer", 404, "Not Found"),
        ("/v2/models/{name}/versions/-1/infer", 404, "Not Found"),
        ("/v2/models/{name}/versions/99999999999999999999/infer", 400, "failed to get model version"),
        ("/v2/models//infer", 404, "Not Found"),
    ],
)
def test_models_and_versions_that_do_not_exist_are_a_4xx(
    unharmed: dict[str, Target], raw: RawHttp, path: str, status: int, message: str
) -> None:
    target = unharmed["ranking"]
    found, text, _ = raw.post(path.format(name=target.name), *whole(target.good[0]))
    assert found == status
    assert message.format(name=target.name) in json.loads(text)["error"]


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_clients_that_go_away_in_mid_request_leave_nothing_behind(
    triton_server: TritonServer, unharmed: dict[str, Target], raw: RawHttp
) -> None:
    opened = open_files(triton_server.pid)
    for target in unharmed.values():
        body, headers = whole(target.good[1])
        for number in range(20):
            # In the JSON part, at its end, in the middle, and one byte before the end of the body.
            sent = (10, int(headers[HEADER_LENGTH]), len(body) // 2, len(body) - 1)[number % 4]
            cut_off(triton_server, target.path, body, headers, sent, reset=number % 2 == 1)
        assert raw.post(target.path, body, headers)[0] == 200
    deadline = time.monotonic() + 10
    # One is the connection of this test.
    while open_files(triton_server.pid) > opened + 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert open_files(triton_server.pid) <= opened + 1


def test_cancelled_requests_affect_nobody(triton_server: TritonServer, unharmed: dict[str, Target]) -> None:
    target = unharmed["ranking"]
    request = prepared("grpc", target.good[1])
    given_up: list[Any] = []
    with grpc_client(triton_server) as client:
        for number in range(40):
            call = client.async_infer(target.name, request.inputs, lambda result, error: given_up.append(error))
            if number % 2:
                call.cancel()
        answer = ask(client, "grpc", target.name, target.good[0])
        target.model.check(answer, target.good[0])
        deadline = time.monotonic() + 20
        while len(given_up) < 40 and time.monotonic() < deadline:
            time.sleep(0.05)
    said = [error for error in given_up if error is not None]
    assert len(given_up) == 40
    assert 0 < len(said) <= 20
    assert {error.status() for error in said} == {"StatusCode.CANCELLED"}


def refusal_of(body: bytes) -> str:
    """The server's words; it repeats names as it got them, which need not be UTF-8."""
    said: str = json.loads(body.decode(errors="replace"), strict=False)["error"]
    return said


def byte_changes(sample: Sample) -> st.SearchStrategy[Bytes]:
    """Bodies of a good request in which something was changed without understanding it."""
    body, headers = whole(sample)
    place, value = st.integers(0, len(body) - 1), st.integers(0, 255)

    def overwritten(changes: list[tuple[int, int]]) -> Bytes:
        edited = bytearray(body)
        for index, byte in changes:
            edited[index] = byte
        return bytes(edited), headers

    return st.one_of(
        st.lists(st.tuples(place, value), min_size=1, max_size=8).map(overwritten),
        place.map(lambda end: (body[:end], headers)),
        st.tuples(place, st.binary(min_size=1, max_size=64)).map(
            lambda edit: (body[: edit[0]] + edit[1] + body[edit[0] :], headers)
        ),
        st.tuples(place, st.integers(1, 64)).map(lambda cut: (body[: cut[0]] + body[cut[0] + cut[1] :], headers)),
        st.integers(-5, len(body) + 5).map(lambda length: (body, {HEADER_LENGTH: str(length)})),
        st.binary(max_size=300).map(lambda other: (other, {})),
    )


@pytest.mark.parametrize("kind", list(NAMES))
def test_changed_bytes_are_answered_or_refused_and_nothing_else(
    unharmed: dict[str, Target], raw: RawHttp, kind: str
) -> None:
    target = unharmed[kind]
    names = set(target.model.eager.outputs)
    statuses: Counter[int] = Counter()

    @seed(6)
    @settings(fuzzing, max_examples=FUZZED_BYTES // len(NAMES))
    @given(byte_changes(target.good[2]))
    def check(request: Bytes) -> None:
        status, text, header_length = raw.post(target.path, *request)
        statuses[status] += 1
        if status == 200:
            outputs = outputs_of(text, header_length) if header_length else json_outputs(text)
            assert names <= outputs.keys()
            assert all(np.isfinite(outputs[name]).all() for name in names)
        elif status == 500:
            assert any(part in refusal_of(text) for part in UNREADABLE), text
        else:
            assert 400 <= status < 500, (status, text)
            assert refusal_of(text)
        if sum(statuses.values()) % 20 == 0:
            found = raw.post(target.path, *whole(target.good[2]))
            assert {name: array.tobytes() for name, array in outputs_of(found[1], found[2]).items()} == {
                name: array.tobytes() for name, array in target.before[2].items() if array.dtype != object
            }

    check()
    assert sum(statuses.values()) >= FUZZED_BYTES // len(NAMES)
    assert sum(statuses.values()) - statuses[200] > FUZZED_BYTES // len(NAMES) // 2, statuses


EXTREMES = [-(1 << 31), -1, 0, 1, 2, 39, 40, 41, 1000, (1 << 31) - 1]
TIMES = [-(1 << 63), -1, 0, 1_700_000_000, (1 << 63) - 1]


@st.composite
def tensor_changes(draw: st.DrawFn, sample: Sample) -> Sample:
    """The tensors of a good request after one to three changes; some are legal still."""
    changed_sample = dict(sample)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(changed_sample)))
        array = changed_sample[name].copy()
        kind = draw(st.sampled_from(["value", "cut", "longer", "reverse", "type", "drop", "all longer"]))
        if kind == "value" and array.size:
            values = TIMES if array.dtype == np.int64 else EXTREMES
            array.reshape(-1)[draw(st.integers(0, array.size - 1))] = draw(st.sampled_from(values))
        elif kind == "cut":
            array = array[: draw(st.integers(0, max(0, len(array) - 1)))]
        elif kind == "longer":
            array = np.concatenate([array, np.resize(array, draw(st.integers(1, 5))).astype(array.dtype)])
        elif kind == "reverse":
            array = array[::-1].copy()
        elif kind == "type":
            array = array.astype(draw(st.sampled_from([np.int32, np.int64])))
        elif kind == "all longer":
            times = draw(st.integers(2, 6))
            changed_sample = {each: np.repeat(values, times) for each, values in changed_sample.items()}
            continue
        elif kind == "drop" and len(changed_sample) > 1:
            del changed_sample[name]
            continue
        changed_sample[name] = array
    return changed_sample


# Each model by one protocol, and by the other one in slow runs: what looks at the tensors is the same.
@pytest.mark.parametrize(
    ("kind", "protocol"),
    [
        ("retrieval", "grpc"),
        ("ranking", "http"),
        pytest.param("retrieval", "http", marks=pytest.mark.slow),
        pytest.param("ranking", "grpc", marks=pytest.mark.slow),
    ],
)
def test_changed_tensors_are_refused_exactly_if_they_are_wrong(
    triton_server: TritonServer, unharmed: dict[str, Target], others: list[int], kind: str, protocol: Protocol
) -> None:
    from tritonclient.utils import InferenceServerException

    target = unharmed[kind]
    counts = {"answered": 0, "ours": 0, "the server's": 0}
    with (http_client if protocol == "http" else grpc_client)(triton_server) as client:

        @seed(6 + PROTOCOLS.index(protocol))
        @settings(fuzzing, max_examples=FUZZED_TENSORS // len(NAMES))
        @given(st.sampled_from(target.good).flatmap(tensor_changes))
        def check(sample: Sample) -> None:
            legal, answer, refusal = is_legal(target.files, sample), None, None
            try:
                answer = send(client, protocol, target.name, prepared(protocol, sample))
            except InferenceServerException as error:
                refusal = error
            assert legal == (refusal is None), refusal
            if answer is not None:
                events = sample[target.model.eager.inputs[0].name]
                target.model.check(answer, completed(target.files, sample), tied=not len(events))
                counts["answered"] += 1
            elif refusal is not None:
                assert refusal.status() == BAD_REQUEST[protocol], refusal
                counts["ours" if "error[HSTU-E70" in str(refusal) else "the server's"] += 1

        check()
    assert sum(counts.values()) >= FUZZED_TENSORS // len(NAMES)
    assert min(counts.values()) > 10, counts
    assert others[0] > 50, "nobody else was answered meanwhile"
