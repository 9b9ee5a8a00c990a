"""An engine behind its check, in a real server: wrong requests end at the check, and all others are answered right.

No server here has a TensorRT backend; ONNX Runtime stands in for the engine, fed as that backend feeds it. Everything
else is what `hstu-compile triton` wrote: the ensemble, the check, and the engine's inputs, outputs and batches.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hstu_compile.graph_facts import tensor_specs
from hstu_compile.serving.repository import RepositoryRequest, write_repository
from hstu_compile.serving.settings import RuntimeSettings, Scheduling
from tests.triton.clients import PROTOCOLS, Protocol, ask, ask_all
from tests.triton.engine_stand_in import stand_in
from tests.triton.models import MAX_BATCH, ServedModel
from tests.triton.ragged_backend import RaggedBackend, parse_config
from tests.triton.server import TritonServer, execution_counts, grpc_client, http_client
from tests.triton.test_malformed_requests import FAULTS, check_refusal

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

KINDS = ("retrieval", "ranking")
#: Long enough for eight clients on a busy machine to be in the engine's queue together.
PATIENT = Scheduling(max_queue_delay_us=20_000)
pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")


def deploy_checked(server: TritonServer, model: ServedModel, name: str, **options: Any) -> str:
    """The model behind its check, with the stand-in for the engine; loading the ensemble loads its steps."""
    request = RepositoryRequest(model.bundle, server.repository, "tensorrt", name, PATIENT, **options)
    facts = write_repository(request)
    assert facts["steps"] == [f"{name}_check", f"{name}_engine"]
    stand_in(server.repository / f"{name}_engine")
    server.load(name)
    return name


@pytest.fixture(scope="module")
def models(triton_server: TritonServer, retrieval: ServedModel, ranking: ServedModel) -> dict[str, ServedModel]:
    """Both bundles, each behind its check."""
    served = {"retrieval": retrieval, "ranking": ranking}
    for kind, model in served.items():
        deploy_checked(triton_server, model, f"{kind}_checked")
    return served


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_concurrent_requests_equal_the_eager_model_one_by_one_and_share_the_engines_batches(
    triton_server: TritonServer, models: dict[str, ServedModel], kind: str, protocol: Protocol
) -> None:
    model, name = models[kind], f"{kind}_checked"
    samples = model.samples(32, seed=11 + PROTOCOLS.index(protocol))
    before = execution_counts(triton_server, f"{name}_engine")
    answers = ask_all(triton_server, protocol, name, samples)
    requests, passes = (
        now - then for now, then in zip(execution_counts(triton_server, f"{name}_engine"), before, strict=True)
    )
    for sample, answer in zip(samples, answers, strict=True):
        assert not isinstance(answer, Exception), answer
        assert set(answer) == {*model.eager.outputs, "truncated"}
        assert answer["truncated"].tolist() == [[0]]
        model.check(answer, sample)
    assert requests == len(samples)
    assert passes <= len(samples) // 2, f"{passes} passes for {requests} requests: nothing was merged"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_requests_get_the_checks_message_and_never_reach_the_engine(
    triton_server: TritonServer, models: dict[str, ServedModel], kind: str, protocol: Protocol
) -> None:
    model, faults, name = models[kind], FAULTS[kind], f"{kind}_checked"
    longest = model.samples(2)[1]
    wrong = [change(longest) for change, _ in faults.values()]
    before = execution_counts(triton_server, f"{name}_engine")
    answers = ask_all(triton_server, protocol, name, wrong)
    assert execution_counts(triton_server, f"{name}_engine") == before
    for (fault, (_, message)), answer in zip(faults.items(), answers, strict=True):
        assert isinstance(answer, Exception), fault
        check_refusal(answer, protocol, rf"(?s){message}.*hstu-compile explain HSTU-E7")


@pytest.mark.parametrize("kind", KINDS)
def test_right_requests_among_wrong_ones_are_answered_as_if_these_were_not_there(
    triton_server: TritonServer, models: dict[str, ServedModel], kind: str
) -> None:
    model, faults, name = models[kind], FAULTS[kind], f"{kind}_checked"
    longest, good = model.samples(2)[1], model.samples(len(faults), seed=3)
    pairs = zip(good, (change(longest) for change, _ in faults.values()), strict=True)
    before = execution_counts(triton_server, f"{name}_engine")
    answers = ask_all(triton_server, "grpc", name, [sample for pair in pairs for sample in pair])
    after = execution_counts(triton_server, f"{name}_engine")
    assert all(isinstance(answer, Exception) for answer in answers[1::2])
    for sample, answer in zip(good, answers[::2], strict=True):
        assert not isinstance(answer, Exception), answer
        model.check(answer, sample)
    assert after[0] - before[0] == len(good)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_client_beside_the_ensemble_prints_its_answers(
    triton_server: TritonServer, models: dict[str, ServedModel], protocol: Protocol
) -> None:
    program = triton_server.repository / "ranking_checked" / f"client_{protocol}.py"
    url = triton_server.http_url if protocol == "http" else triton_server.grpc_url
    command = [sys.executable, program, "--url", url, "--requests", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = [line.split() for line in done.stdout.splitlines() if line.startswith("  ")]
    outputs = [*models["ranking"].eager.outputs, "truncated"]
    assert [line[0] for line in printed] == outputs * 2
    for number, sample in enumerate(models["ranking"].samples(2)):
        shown = printed[number * len(outputs)]
        values = [float(value) for value in shown[shown.index("2]") + 1 : -1]]
        exact = models["ranking"].expected(sample)[outputs[0]].reshape(-1)[:4]
        np.testing.assert_allclose(values, exact, rtol=1e-3, atol=1e-4)


def test_a_request_of_two_users_never_reaches_the_engine(
    triton_server: TritonServer, models: dict[str, ServedModel]
) -> None:
    from tritonclient.http import InferInput
    from tritonclient.utils import InferenceServerException

    (good,) = models["retrieval"].samples(1)
    inputs = []
    for name, array in good.items():
        rows = np.stack([array, array])
        tensor = InferInput(name, list(rows.shape), {"int32": "INT32", "int64": "INT64"}[str(rows.dtype)])
        tensor.set_data_from_numpy(rows)
        inputs.append(tensor)
    before = execution_counts(triton_server, "retrieval_checked_engine")
    with http_client(triton_server) as client, pytest.raises(InferenceServerException) as refusal:
        client.infer("retrieval_checked", inputs)
    check_refusal(refusal.value, "http", r"(?s)HSTU-E701.*item_ids has shape \[2, 1\]: a request is one user")
    assert execution_counts(triton_server, "retrieval_checked_engine") == before


def test_more_candidates_than_the_engines_profile_takes_are_refused(
    triton_server: TritonServer, models: dict[str, ServedModel]
) -> None:
    from tritonclient.utils import InferenceServerException

    axes = {each.name: each.axis for each in models["ranking"].eager.inputs}
    sample = models["ranking"].samples(2)[1]
    many = {name: np.resize(array, 25) if axes[name] == "T" else array for name, array in sample.items()}
    before = execution_counts(triton_server, "ranking_checked_engine")
    with grpc_client(triton_server) as client, pytest.raises(InferenceServerException) as refusal:
        ask(client, "grpc", "ranking_checked", many)
    check_refusal(refusal.value, "grpc", r"(?s)HSTU-E704.*25 candidates.*at most 24 fit.*--max-candidates")
    assert execution_counts(triton_server, "ranking_checked_engine") == before


def test_settings_of_the_check_cut_long_histories_and_clamp_unknown_ids(
    triton_server: TritonServer, ranking: ServedModel
) -> None:
    lenient = RuntimeSettings(truncation="keep_last", unknown_ids="clamp")
    name = deploy_checked(triton_server, ranking, "ranking_checked_lenient", settings=lenient)
    sample = ranking.samples(2)[1]
    axes = {each.name: each.axis for each in ranking.eager.inputs}
    longer = {
        each: np.concatenate([array[:1]] * 3 + [array]) if axes[each] == "L" else array
        for each, array in sample.items()
    }
    unknown = {**longer, "item_movie_id": np.full_like(sample["item_movie_id"], 4000), "genres": sample["genres"][:2]}
    absent = np.array([*sample["genres"][:2], -1], np.int32)
    with http_client(triton_server) as client:
        answer = ask(client, "http", name, unknown)
    assert answer["truncated"].tolist() == [[3]]
    ranking.check(answer, {**sample, "item_movie_id": np.full_like(sample["item_movie_id"], 39), "genres": absent})


def test_without_the_check_a_wrong_request_changes_the_answers_of_others(
    retrieval: ServedModel, tmp_path: Path
) -> None:
    """What all this is for: the stand-in does to its batches what the TensorRT backend does, and is no check itself."""
    from hstu_compile.runtime.session import open_session

    write_repository(RepositoryRequest(retrieval.bundle, tmp_path, "tensorrt", "retrieval"))
    engine = tmp_path / "retrieval_engine"
    graph = onnx.load(str(engine / "model.onnx")).graph
    config = parse_config(engine / "config.pbtxt")
    backend = RaggedBackend(config, tensor_specs(graph.input), tensor_specs(graph.output))
    first, good, last = (retrieval.samples(4, seed=3)[index] for index in (1, 3, 2))
    # One item too few here, one time and one rating too few there: the batch as a whole adds up.
    short = {name: array[1:] if name == "item_ids" else array for name, array in first.items()}
    long = {name: array[1:] if name in ("timestamps", "ratings") else array for name, array in last.items()}
    with open_session("onnxruntime", onnx=engine / "model.onnx") as session:
        batches = ([first, good, last], [short, good, long])
        right, wrong = (backend.responses(session.run(backend.engine_feeds(each)), each)[1] for each in batches)
    retrieval.check(right, good)
    assert np.abs(wrong["user_embeddings"] - right["user_embeddings"]).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_three_configurations_are_messages_of_triton_that_fit_one_another(
    request: pytest.FixtureRequest, kind: str, tmp_path: Path
) -> None:
    model: ServedModel = request.getfixturevalue(kind)
    write_repository(RepositoryRequest(model.bundle, tmp_path, "tensorrt", kind))
    ensemble, check, engine = (
        parse_config(tmp_path / name / "config.pbtxt") for name in (kind, f"{kind}_check", f"{kind}_engine")
    )
    assert (ensemble.platform, check.backend, engine.backend) == ("ensemble", "python", "tensorrt")
    assert ensemble.max_batch_size == engine.max_batch_size == check.max_batch_size == MAX_BATCH
    assert [each.model_name for each in ensemble.ensemble_scheduling.step] == [check.name, engine.name]
    asked, run = ensemble.ensemble_scheduling.step
    names = [each.name for each in ensemble.input]
    assert sorted(asked.input_map.items()) == sorted((name, name) for name in names)
    assert {asked.output_map[name] for name in names} == set(run.input_map.values())
    assert all(run.input_map[name] == asked.output_map[name] for name in names)
    assert [each.name for each in engine.output] == [each.name for each in ensemble.output][:-1]
    types = {each.name: each.data_type for each in engine.input}
    for step in (check.input, list(check.output)[:-1], ensemble.input):
        assert {each.name: each.data_type for each in step} == types
    assert all(each.allow_ragged_batch for each in check.input)
