"""The config.pbtxt of an engine behind a check: what clients ask, and the step before the engine. Level 5; no torch.

NAME         what clients ask: an ensemble, which gives every request to the two others, one after the other
NAME_check   the Python backend with our checks: answers with the engine's inputs, or refuses
NAME_engine  the TensorRT backend with the engine

The server joins requests at every step anew. A refused request ends at its own check; the engine's batch is made of
checked requests alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from hstu_compile.bundle import BundleFiles
from hstu_compile.serving.answering import TRUNCATED
from hstu_compile.serving.pbtxt import Message, Word
from hstu_compile.serving.python_config import TRUNCATED_OUTPUT, client_inputs, client_outputs, python_parameters
from hstu_compile.serving.settings import RuntimeSettings
from hstu_compile.serving.tensorrt_config import max_batch
from hstu_compile.serving.tensors import graph_tensors, most_users, refuse_if_any

#: What Triton runs in front of the engine; the code is in the package.
CHECK_PY = '''"""The check that Triton's Python backend runs: see hstu_compile.serving.triton_model."""

from hstu_compile.serving.triton_model import TritonCheckModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
#: What of the settings a check reads; the others are a session's.
_SETTINGS = ("truncation", "unknown_ids", "lost_process")


def step_names(name: str) -> tuple[str, str]:
    """Names of the check and of the engine behind a model."""
    return f"{name}_check", f"{name}_engine"


def check_config(
    name: str,
    files: BundleFiles,
    settings: RuntimeSettings,
    warmup: Sequence[Message],
    execution_env: PurePosixPath | None = None,
) -> Message:
    """The configuration of the check.

    Args:
        name: of the check in the repository.
        files: the bundle.
        settings: what is refused.
        warmup: requests that run before the check is ready.
        execution_env: as for `python_config`.

    Raises:
        BundleError: HSTU-E804 for a graph that Triton cannot serve.
    """
    inputs = client_inputs(graph_tensors(files))
    taken = [each["name"] for each in inputs if each["name"] == TRUNCATED]
    refuse_if_any([f"an input is named {TRUNCATED}, as an output of the check is" for _ in taken])
    passed_on = [{key: each[key] for key in ("name", "data_type", "dims")} for each in inputs]
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": most_users(files),
        "input": inputs,
        "output": [*passed_on, TRUNCATED_OUTPUT],
        "instance_group": [{"count": 1, "kind": Word("KIND_CPU")}],
        # Nobody waits for others: those who come while a batch is checked are the next one.
        "dynamic_batching": {"max_queue_delay_microseconds": 0},
        "parameters": python_parameters(settings.to_parameters(_SETTINGS), execution_env),
        "model_warmup": list(warmup),
    }


def ensemble_config(name: str, files: BundleFiles) -> Message:
    """The configuration of what clients ask; both steps are named after it.

    Args:
        name: of the model in the repository.
        files: the bundle.

    Raises:
        BundleError: HSTU-E804 for a graph that Triton cannot serve.
    """
    tensors = graph_tensors(files)
    inputs = [each.name for each in tensors.inputs]
    outputs = [each.name for each in tensors.outputs]
    check, engine = step_names(name)
    return {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": max_batch(files),
        "input": [{key: each[key] for key in ("name", "data_type", "dims")} for each in client_inputs(tensors)],
        "output": [*client_outputs(tensors), TRUNCATED_OUTPUT],
        "ensemble_scheduling": {
            "step": [
                _step(
                    check,
                    {each: each for each in inputs},
                    {**{each: _checked(each) for each in inputs}, TRUNCATED: TRUNCATED},
                ),
                _step(engine, {each: _checked(each) for each in inputs}, {each: each for each in outputs}),
            ]
        },
    }


def _checked(name: str) -> str:
    """The ensemble's name of a checked tensor: no graph's input or output has a colon in it."""
    return f"checked:{name}"


def _step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> Message:
    """A step of an ensemble; the maps are from the model's names to the ensemble's."""
    return {
        "model_name": model,
        "model_version": -1,
        "input_map": [{"key": key, "value": value} for key, value in inputs.items()],
        "output_map": [{"key": key, "value": value} for key, value in outputs.items()],
    }
