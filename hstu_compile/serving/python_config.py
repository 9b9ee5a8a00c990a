"""The config.pbtxt of a bundle in Triton's Python backend, which runs our own runtime. Level 5; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from hstu_compile.bundle import BundleFiles
from hstu_compile.serving.answering import CACHE, TRUNCATED, USER_KEY, keeps_cache
from hstu_compile.serving.pbtxt import Field, Message, Word
from hstu_compile.serving.settings import RuntimeSettings, Scheduling
from hstu_compile.serving.tensors import GraphTensors, graph_tensors, most_users, refuse_if_any

#: How many of a request's oldest events were dropped.
TRUNCATED_OUTPUT: Message = {"name": TRUNCATED, "data_type": Word("TYPE_INT32"), "dims": [1]}
#: What Triton runs. The code is in the package, where it is tested: a fix arrives with pip.
MODEL_PY = '''"""The model that Triton's Python backend runs: see hstu_compile.serving.triton_model."""

from hstu_compile.serving.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def python_config(
    name: str,
    files: BundleFiles,
    scheduling: Scheduling,
    settings: RuntimeSettings,
    warmup: Sequence[Message],
    execution_env: PurePosixPath | None = None,
) -> Message:
    """The configuration.

    Args:
        name: of the model in the repository.
        files: the bundle.
        scheduling: batching and instances.
        settings: how the model answers.
        warmup: requests that run before the model is ready.
        execution_env: conda-pack archive or folder of the Python that has hstu-compile; None is the server's own.

    Raises:
        BundleError: HSTU-E804 for a graph with inputs that no request has.
    """
    tensors = graph_tensors(files)
    names = {each.name for each in tensors.inputs}
    refuse_if_any([f"an input is named {USER_KEY}, as the key of the KV cache is"] if USER_KEY in names else [])
    cached = keeps_cache(files, settings)
    inputs: list[Message] = [*client_inputs(tensors)]
    if cached:
        inputs.append({"name": USER_KEY, "data_type": Word("TYPE_INT64"), "dims": [1], "optional": True})
    outputs = [*client_outputs(tensors), TRUNCATED_OUTPUT]
    if cached:
        outputs.append({"name": CACHE, "data_type": Word("TYPE_STRING"), "dims": [1]})
    message: dict[str, Field] = {
        "name": name,
        "backend": "python",
        "max_batch_size": most_users(files),
        "input": inputs,
        "output": outputs,
        "instance_group": [
            {"count": scheduling.instances, "kind": Word("KIND_GPU" if settings.on_gpu else "KIND_CPU")}
        ],
        "dynamic_batching": scheduling.dynamic_batching(),
        "parameters": python_parameters(settings.to_parameters(), execution_env),
        "model_warmup": list(warmup),
    }
    return message


def client_inputs(tensors: GraphTensors) -> list[dict[str, Field]]:
    """Inputs of a model that checks them itself."""
    return [
        {
            "name": each.name,
            "data_type": Word(f"TYPE_{each.datatype}"),
            # Of any length: a wrong one is refused by the model, which says more than the server can.
            "dims": [-1, *([each.width] if each.width else [])],
            "allow_ragged_batch": True,
        }
        for each in tensors.inputs
    ]


def client_outputs(tensors: GraphTensors) -> list[Message]:
    """Outputs of the graph, as clients get them."""
    return [
        {"name": each.name, "data_type": Word(f"TYPE_{each.datatype}"), "dims": list(each.dims)}
        for each in tensors.outputs
    ]


def python_parameters(parameters: Mapping[str, str], execution_env: PurePosixPath | None) -> list[Message]:
    """Parameters of a model of the Python backend, and the Python that it runs in; None is the server's own."""
    env = {} if execution_env is None else {"EXECUTION_ENV_PATH": str(execution_env)}
    return [{"key": key, "value": {"string_value": value}} for key, value in sorted({**parameters, **env}.items())]
