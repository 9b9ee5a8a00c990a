"""A real tritonserver with the Python backend answers as the eager PyTorch model does, in batches that it makes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu_compile.serving.local_server import Installation
from hstu_compile.serving.repository import RepositoryRequest, write_repository
from hstu_compile.serving.settings import RuntimeSettings, Scheduling
from tests.triton.clients import PROTOCOLS, Protocol, ask, ask_all
from tests.triton.models import ServedModel, deploy
from tests.triton.server import TritonServer, execution_counts, grpc_client, http_client

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

#: Long enough for eight clients on a busy machine to be in the queue together.
PATIENT = Scheduling(max_queue_delay_us=20_000)


@pytest.fixture(scope="module")
def models(triton_server: TritonServer, retrieval: ServedModel, ranking: ServedModel) -> dict[str, ServedModel]:
    """Both bundles, loaded under their own names."""
    served = {each.name: each for each in (retrieval, ranking)}
    for name, model in served.items():
        deploy(triton_server, model, name, scheduling=PATIENT)
    return served


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["retrieval", "ranking"])
def test_concurrent_requests_of_mixed_length_equal_the_eager_model_one_by_one(
    triton_server: TritonServer, models: dict[str, ServedModel], name: str, protocol: Protocol
) -> None:
    model = models[name]
    samples = model.samples(48, seed=PROTOCOLS.index(protocol))
    before = execution_counts(triton_server, name)
    answers = ask_all(triton_server, protocol, name, samples)
    after = execution_counts(triton_server, name)
    for sample, answer in zip(samples, answers, strict=True):
        assert not isinstance(answer, Exception), answer
        model.check(answer, sample)
        assert (answer["truncated"].tolist(), answer["cache"].tolist()) == ([[0]], [[b"off"]])
    requests, passes = (now - then for now, then in zip(after, before, strict=True))
    assert requests == len(samples)
    assert passes <= len(samples) // 2, f"{passes} passes for {requests} requests: nothing was merged"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["retrieval", "ranking"])
def test_the_clients_that_are_written_beside_a_model_print_its_answers(
    triton_server: TritonServer, models: dict[str, ServedModel], name: str, protocol: Protocol
) -> None:
    program = triton_server.repository / name / f"client_{protocol}.py"
    url = triton_server.http_url if protocol == "http" else triton_server.grpc_url
    command = [sys.executable, program, "--url", url, "--requests", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outputs = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert outputs == [*models[name].eager.outputs, "truncated", "cache"] * 2
    samples = models[name].samples(2)
    for block, sample in zip(done.stdout.split("request ")[1:], samples, strict=True):
        first = models[name].eager.outputs[0]
        shown = [float(value) for value in block.split(f"  {first} ")[1].split("]  ")[1].split(" ...")[0].split()]
        exact = models[name].expected(sample)[first].reshape(-1)[:4]
        np.testing.assert_allclose(shown, exact, rtol=1e-3, atol=1e-4)


def test_users_without_history_and_requests_without_candidates_are_answered(
    triton_server: TritonServer, models: dict[str, ServedModel]
) -> None:
    (sample,) = models["retrieval"].samples(1)
    empty = {name: array if name == "request_timestamps" else array[:0] for name, array in sample.items()}
    (scored,) = models["ranking"].samples(1)
    spec_names = {each.name: each.axis for each in models["ranking"].eager.inputs}
    new_user = {name: array[:0] if spec_names[name] == "L" else array for name, array in scored.items()}
    nothing = {name: array[:0] if spec_names[name] == "T" else array for name, array in scored.items()}
    with http_client(triton_server) as client:
        answer = ask(client, "http", "retrieval", empty)
        assert not answer["user_embeddings"].any()
        models["retrieval"].check(answer, empty, tied=True)
        models["ranking"].check(ask(client, "http", "ranking", new_user), new_user)
        assert ask(client, "http", "ranking", nothing)["preds"].shape == (1, 0, 2)


def keyed(sample: dict[str, Any], key: int) -> dict[str, Any]:
    return {**sample, "user_key": np.array([key], np.int64)}


def test_a_ranking_request_with_a_key_reuses_the_history(
    triton_server: TritonServer, models: dict[str, ServedModel]
) -> None:
    model = models["ranking"]
    sample = model.samples(3)[2]
    later = {**sample, "action_timestamp": sample["action_timestamp"] - 1}
    with grpc_client(triton_server) as client:
        answers = [ask(client, "grpc", "ranking", keyed(each, 7)) for each in (sample, sample, later)]
        other = ask(client, "grpc", "ranking", keyed(sample, 8))
    assert [answer["cache"].item() for answer in (*answers, other)] == [b"miss", b"hit", b"stale", b"miss"]
    for answer, asked in zip((*answers, other), (sample, sample, later, sample), strict=True):
        model.check(answer, asked)


def test_a_history_that_grew_is_appended_to(triton_server: TritonServer, models: dict[str, ServedModel]) -> None:
    model = models["retrieval"]
    whole = model.samples(2)[1]
    events = ("item_ids", "timestamps", "ratings")
    first = {name: array[:-2] if name in events else array for name, array in whole.items()}
    with http_client(triton_server) as client:
        answers = [ask(client, "http", "retrieval", keyed(each, 7)) for each in (first, whole, whole)]
    assert [answer["cache"].item() for answer in answers] == [b"miss", b"appended", b"hit"]
    for answer, asked in zip(answers, (first, whole, whole), strict=True):
        model.check(answer, asked)


def test_settings_in_the_configuration_decide_about_long_histories_and_unknown_ids(
    triton_server: TritonServer, ranking: ServedModel
) -> None:
    lenient = RuntimeSettings(truncation="keep_last", unknown_ids="clamp", kv_budget_mib=0)
    name = deploy(triton_server, ranking, "ranking_lenient", settings=lenient)
    sample = ranking.samples(2)[1]
    events = ("movie_id", "action_timestamp", "item_weights")
    longer = {
        each: np.concatenate([array[:1]] * 3 + [array]) if each in events else array for each, array in sample.items()
    }
    clamped = {**sample, "item_movie_id": np.full_like(sample["item_movie_id"], 39)}
    unknown = {**longer, "item_movie_id": np.full_like(sample["item_movie_id"], 4000)}
    with http_client(triton_server) as client:
        answer = ask(client, "http", name, unknown)
    assert answer["truncated"].tolist() == [[3]]
    assert "cache" not in answer
    ranking.check(answer, clamped)


def test_a_model_that_cannot_be_opened_says_why_it_is_not_loaded(
    triton_server: TritonServer, retrieval: ServedModel
) -> None:
    from tritonclient.utils import InferenceServerException

    name = "retrieval_damaged"
    write_repository(RepositoryRequest(retrieval.bundle, triton_server.repository, name=name))
    damaged = triton_server.repository / name / "1" / "bundle" / "model.onnx"
    damaged.write_bytes(damaged.read_bytes() + b"x")
    with pytest.raises(InferenceServerException, match=r"(?s)HSTU-E803.*model\.onnx has another sha256"):
        triton_server.load(name)


def test_a_parameter_that_is_none_of_ours_is_named(triton_server: TritonServer, retrieval: ServedModel) -> None:
    from tritonclient.utils import InferenceServerException

    name = "retrieval_misspelt"
    write_repository(RepositoryRequest(retrieval.bundle, triton_server.repository, name=name))
    config = triton_server.repository / name / "config.pbtxt"
    config.write_text(config.read_text().replace("hstu_truncation", "hstu_truncate"))
    with pytest.raises(InferenceServerException, match=r"(?s)HSTU-E901.*hstu_truncate"):
        triton_server.load(name)


def test_a_python_with_numpy_2_is_refused_where_the_backend_reads_wrong_values(
    triton_installation: Installation, retrieval: ServedModel, tmp_path: Path
) -> None:
    """Found with this wheel: under NumPy 2 every tensor holds its first value as often as it is long."""
    if int(np.__version__.split(".")[0]) < 2:
        pytest.skip("this environment has no NumPy 2")
    from tritonclient.utils import InferenceServerException

    ours = {"PATH": f"{Path(sys.prefix) / 'bin'}:/usr/bin:/bin"}
    with TritonServer(triton_installation, tmp_path, environment=ours) as server:
        write_repository(RepositoryRequest(retrieval.bundle, server.repository, name="retrieval"))
        with pytest.raises(InferenceServerException, match=r"(?s)HSTU-E401.*pip install 'numpy<2'"):
            server.load("retrieval")
