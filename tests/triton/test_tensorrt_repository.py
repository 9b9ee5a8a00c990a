"""The TensorRT backend's configuration: against the graph, fed as Triton feeds it, and in a real server without GPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hstu_compile.bundle import ONNX_FILE, read_bundle
from hstu_compile.graph_facts import tensor_specs
from hstu_compile.runtime.session import open_session
from hstu_compile.serving.repository import RepositoryRequest, write_repository
from hstu_compile.serving.settings import Scheduling
from tests.triton.models import MAX_BATCH, ServedModel
from tests.triton.ragged_backend import RaggedBackend, parse_config
from tests.triton.server import TritonServer, http_client

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

GRAPHS = Scheduling(cuda_graphs=True)
pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")


@pytest.fixture(params=["retrieval", "ranking"])
def served(request: pytest.FixtureRequest) -> ServedModel:
    model: ServedModel = request.getfixturevalue(request.param)
    return model


def backend_of(model: ServedModel, folder: Path) -> RaggedBackend:
    """The backend around the bundle's graph, with the configuration that is written for it."""
    request = RepositoryRequest(model.bundle, folder, "tensorrt", model.name, scheduling=GRAPHS, checked=False)
    write_repository(request)
    graph = onnx.load(str(model.bundle / ONNX_FILE)).graph
    config = parse_config(folder / model.name / "config.pbtxt")
    return RaggedBackend(config, tensor_specs(graph.input), tensor_specs(graph.output))


def with_empty_ones(model: ServedModel, count: int) -> list[dict[str, Any]]:
    """Requests of mixed lengths; every third user is new, every fifth asks about nothing."""
    axes = {each.name: each.axis for each in model.eager.inputs}
    samples: list[dict[str, Any]] = []
    for index, sample in enumerate(model.samples(count, seed=5)):
        emptied = {"L"} if index % 3 == 2 else {"T"} if index % 5 == 4 else set()
        samples.append({name: array[:0] if axes[name] in emptied else array for name, array in sample.items()})
    return samples


def test_a_batch_of_requests_is_answered_as_each_alone_by_the_eager_model(served: ServedModel, tmp_path: Path) -> None:
    backend = backend_of(served, tmp_path)
    requests = with_empty_ones(served, MAX_BATCH)
    with open_session("onnxruntime", onnx=served.bundle / ONNX_FILE) as session:
        outputs = session.run(backend.engine_feeds(requests))
    for sample, answer in zip(requests, backend.responses(outputs, requests), strict=True):
        new_user = served.name == "retrieval" and not sample["item_ids"].size
        served.check(answer, sample, tied=new_user)


@pytest.mark.parametrize("count", [1, 3, 6, 7])
def test_what_a_larger_cuda_graph_reads_beyond_the_batch_changes_no_bit(
    served: ServedModel, tmp_path: Path, count: int
) -> None:
    backend = backend_of(served, tmp_path)
    requests = with_empty_ones(served, count)
    feeds = backend.engine_feeds(requests)
    sizes = backend.graph_shapes(feeds)
    assert sizes is not None, "no graph serves this batch"
    assert any(sizes[name] > array.size for name, array in feeds.items())
    with open_session("onnxruntime", onnx=served.bundle / ONNX_FILE) as session:
        alone = backend.responses(session.run(feeds), requests)
        for seed in range(3):
            larger = backend.graph_feeds(feeds, sizes, np.random.default_rng(seed))
            for answer, expected in zip(backend.responses(session.run(larger), requests), alone, strict=True):
                for name, values in expected.items():
                    assert answer[name].tobytes() == values.tobytes(), name


def test_a_cuda_graph_serves_every_batch_that_the_profile_takes(served: ServedModel, tmp_path: Path) -> None:
    """One event each, the longest histories, and everything between; the graph has room for all of it."""
    backend = backend_of(served, tmp_path)
    shortest, longest = served.samples(2)
    for users in range(1, MAX_BATCH + 1):
        for requests in ([shortest] * users, [longest] * users, [longest] + [shortest] * (users - 1)):
            feeds = backend.engine_feeds(requests)
            sizes = backend.graph_shapes(feeds)
            assert sizes is not None, users
            assert all(sizes[name] >= array.size for name, array in feeds.items())
            batch = sizes["seq_offsets"] - 1
            assert batch < 2 * users or batch == users


def test_padding_that_is_not_what_triton_sends_would_be_noticed(retrieval: ServedModel, tmp_path: Path) -> None:
    """The comparison can fail: were the tail given to the last user, its answer would be another."""
    backend = backend_of(retrieval, tmp_path)
    requests = retrieval.samples(4, seed=5)
    feeds = backend.engine_feeds(requests)
    sizes = backend.graph_shapes(feeds)
    assert sizes is not None
    larger = backend.graph_feeds(feeds, sizes, np.random.default_rng(0))
    larger["seq_offsets"][len(requests) :] += 1
    with open_session("onnxruntime", onnx=retrieval.bundle / ONNX_FILE) as session:
        alone = backend.responses(session.run(feeds), requests)[-1]["user_embeddings"]
        other = backend.responses(session.run(larger), requests)[-1]["user_embeddings"]
    assert np.abs(alone - other).max() > 1e-3


def test_a_divisor_of_the_batch_makes_every_request_a_batch_of_its_own(ranking: ServedModel, tmp_path: Path) -> None:
    bundle = tmp_path / "ranking.hstu"
    shutil.copytree(ranking.bundle, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["ranking"]["scaling"] = "batch"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    facts = write_repository(RepositoryRequest(bundle, tmp_path / "models", "tensorrt", checked=False))
    config = parse_config(tmp_path / "models" / "ranking" / "config.pbtxt")
    assert config.max_batch_size == 1
    assert any("one request a batch" in note for note in facts["notes"])


def test_the_real_server_reads_the_configuration_and_lacks_the_backend_alone(
    triton_server: TritonServer, served: ServedModel
) -> None:
    """The wheel has no TensorRT backend: that is all the server has to say, after it has checked the configuration."""
    from tritonclient.utils import InferenceServerException

    name = f"{served.name}_tensorrt"
    repository = triton_server.repository
    write_repository(RepositoryRequest(served.bundle, repository, "tensorrt", name, scheduling=GRAPHS, checked=False))
    with pytest.raises(InferenceServerException) as refusal:
        triton_server.load(name)
    assert str(refusal.value).split("UNAVAILABLE state: ")[1].strip(" ;\n") == (
        "Invalid argument: unable to find backend library for backend 'tensorrt', try specifying runtime on the model "
        "configuration."
    )
    with http_client(triton_server) as client:
        listed = {each["name"]: each for each in client.get_model_repository_index()}
    assert listed[name]["state"] == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO", "BATCH_ACCUMULATED_ELEMENTS", "BATCH_ACCUMULATED_ELEMENTS"),
        ("allow_ragged_batch", "allow_ragged", "allow_ragged"),
    ],
)
def test_the_real_server_would_have_said_what_is_wrong_with_a_configuration(
    triton_server: TritonServer, retrieval: ServedModel, right: str, wrong: str, message: str
) -> None:
    from tritonclient.utils import InferenceServerException

    name = "retrieval_wrong"
    target = triton_server.repository / name
    repository = triton_server.repository
    write_repository(RepositoryRequest(retrieval.bundle, repository, "tensorrt", name, force=True, checked=False))
    config, logged = target / "config.pbtxt", len(triton_server.log())
    text = config.read_text()
    assert right in text
    config.write_text(text.replace(right, wrong))
    with pytest.raises(InferenceServerException) as refusal:
        triton_server.load(name)
    said = f"{refusal.value} {triton_server.log()[logged:]}"
    assert "unable to find backend library" not in said
    assert message in said
    shutil.rmtree(target)


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ('source_input: "item_ids"', 'source_input: "items"', "seq_offsets counts items"),
        ('name: "ratings"', 'name: "rating"', "the engine takes"),
        ("TYPE_INT64", "TYPE_INT32", "timestamps is int64, and int32"),
        ("dims: -1", "dims: 20", r"ragged item_ids is \[-1\] in the engine and \[20\]"),
        ("  reshape {\n  }\n", "", r"request_timestamps is \[-1\] in the engine and \[-1, \*\[1\]\]"),
        ("dims: 5", "dims: 6", r"top_items is \[-1, 5\]"),
    ],
)
def test_a_configuration_that_does_not_fit_the_graph_would_be_refused(
    retrieval: ServedModel, tmp_path: Path, right: str, wrong: str, message: str
) -> None:
    backend_of(retrieval, tmp_path)
    path = tmp_path / "retrieval" / "config.pbtxt"
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong, 1) if "name" in right else text.replace(right, wrong))
    graph = onnx.load(str(retrieval.bundle / ONNX_FILE)).graph
    with pytest.raises(ValueError, match=message):
        RaggedBackend(parse_config(path), tensor_specs(graph.input), tensor_specs(graph.output))


def test_the_profile_has_room_for_what_the_warm_up_and_the_graphs_ask(served: ServedModel, tmp_path: Path) -> None:
    from hstu_compile.serving.tensorrt_config import profile_sizes

    backend_of(served, tmp_path)
    config = parse_config(tmp_path / served.name / "config.pbtxt")
    files = read_bundle(served.bundle)
    sizes = profile_sizes(files, config.max_batch_size)
    for spec in config.optimization.cuda.graph_spec:
        for each in files.inputs:
            dims = list(spec.input[each.name].dim) or [spec.batch_size]
            allowed = sizes.axis(str(each.shape[0]))
            assert allowed is not None
            assert dims[0] <= allowed[2], each.name
    for sample in config.model_warmup:
        for name, each in sample.inputs.items():
            content = (tmp_path / served.name / "warmup" / each.input_data_file).read_bytes()
            spec = next(found for found in files.inputs if found.name == name)
            assert len(content) == int(np.prod(each.dims)) * np.dtype(spec.dtype).itemsize
