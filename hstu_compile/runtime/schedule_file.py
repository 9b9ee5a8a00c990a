"""A schedule as a file: what a bundle needs beside its engines to run a graph that was cut. Level 3; no torch, no ONNX.

JSON, so that a loader in another language reads it: constants are base64 of their little-endian bytes.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import sys
from typing import Any

import numpy as np

from hstu_compile.artifacts import ColumnView, Crossing, KernelCall, Schedule, Step, TensorSpec
from hstu_compile.errors import BundleError
from hstu_compile.op_schema import contract_of, strided_inputs
from hstu_compile.runtime._bfloat16 import storage_dtype

FORMAT_VERSION = 2


def fused_files(stem: str, num_segments: int) -> tuple[str, tuple[str, ...]]:
    """File names of a graph's schedule and of its engines, in order.

    >>> fused_files("model", 2)
    ('model.schedule.json', ('model.segment-0.engine', 'model.segment-1.engine'))
    """
    return f"{stem}.schedule.json", tuple(f"{stem}.segment-{number}.engine" for number in range(num_segments))


def schedule_text(schedule: Schedule) -> str:
    """The file's content. Equal schedules have equal texts."""
    constants = {}
    for name in sorted(schedule.constants):
        spec, array = schedule.spec(name), schedule.constants[name]
        little = array if sys.byteorder == "little" else array.byteswap()
        constants[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data": base64.b64encode(little.tobytes()).decode("ascii"),
        }
    content = {
        "format_version": FORMAT_VERSION,
        "operators": {call.operator: contract_of(call.operator).version for call in schedule.calls},
        "inputs": [_spec_json(spec) for spec in schedule.inputs],
        "outputs": [_spec_json(spec) for spec in schedule.outputs],
        "calls": [dataclasses.asdict(call) for call in schedule.calls],
        "steps": [dataclasses.asdict(step) for step in schedule.steps],
        "crossing": [{**_spec_json(each.spec), "first": each.first, "last": each.last} for each in schedule.crossing],
        "constants": constants,
    }
    return json.dumps(content, indent=1) + "\n"


def schedule_from_text(text: str, source: str) -> Schedule:
    """Read a file's content.

    Args:
        text: of the file.
        source: its name, for messages.

    Raises:
        BundleError: HSTU-E803, if it is no schedule, of another format, or of another version of an operator.
    """
    try:
        content = json.loads(text)
        _check_versions(content)
        schedule = _schedule(content)
        _check_order(schedule)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(
            "HSTU-E803",
            f"{source} is not a schedule that can be run",
            f"{type(error).__name__}: {error}",
            "build the bundle again with this version",
        ) from error
    return schedule


def _spec_json(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _spec(entry: dict[str, Any]) -> TensorSpec:
    shape = tuple(entry["shape"])
    if not all(isinstance(size, (int, str)) for size in shape):
        raise ValueError(f"{entry['name']} has shape {list(shape)}")
    storage_dtype(entry["dtype"])
    return TensorSpec(entry["name"], entry["dtype"], shape)


def _check_versions(content: dict[str, Any]) -> None:
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format {content['format_version']}, and this hstu-compile reads format {FORMAT_VERSION}")
    known = {name: contract_of(name).version for name in content["operators"]}
    if content["operators"] != known:
        raise ValueError(f"operators {content['operators']}, and this hstu-compile has {known}")
    if not known.keys() >= {call["operator"] for call in content["calls"]}:
        raise ValueError(f"calls of other operators than {sorted(known)}")


def _schedule(content: dict[str, Any]) -> Schedule:
    constants = {}
    for name, entry in content["constants"].items():
        spec = _spec({"name": name, **entry})
        flat = np.frombuffer(
            base64.b64decode(entry["data"], validate=True), storage_dtype(spec.dtype).newbyteorder("<")
        )
        constants[name] = np.ascontiguousarray(flat.astype(flat.dtype.newbyteorder("=")).reshape(entry["shape"]))
    calls = tuple(
        KernelCall(
            each["operator"],
            each["name"],
            dict(each["attributes"]),
            dict(each["inputs"]),
            each["output"],
            {name: ColumnView(**{**view, "dims": tuple(view["dims"])}) for name, view in each["views"].items()},
        )
        for each in content["calls"]
    )
    return Schedule(
        inputs=tuple(_spec(each) for each in content["inputs"]),
        outputs=tuple(_spec(each) for each in content["outputs"]),
        calls=calls,
        steps=tuple(Step(each["kind"], each["index"]) for each in content["steps"]),
        crossing=tuple(Crossing(_spec(each), each["first"], each["last"]) for each in content["crossing"]),
        constants=constants,
    )


def _check_order(schedule: Schedule) -> None:
    """Refuse what a damaged file could make a session do: read what is not there, or run a step twice."""
    problems = []
    for kind, count in (("kernel", len(schedule.calls)), ("segment", None)):
        indices = [step.index for step in schedule.steps if step.kind == kind]
        if indices != list(range(len(indices) if count is None else count)):
            problems.append(f"{kind} steps {indices}")
    if any(step.kind not in ("kernel", "segment") for step in schedule.steps):
        problems.append("a step is neither a segment nor a kernel")
    for call in schedule.calls:
        contract = contract_of(call.operator)
        problems += contract.problems(call.attributes)
        wanted = [each.name for each in contract.present_inputs(contract.defaults() | call.attributes)]
        if list(call.inputs) != wanted:
            problems.append(f"{call.name} has inputs {list(call.inputs)}, and its attributes say {wanted}")
        for tensor in (*call.inputs.values(), call.output):
            schedule.spec(tensor)
        schedule.row_of(call)
        problems += _view_problems(schedule, call)
    for each in schedule.crossing:
        if not 0 <= each.first <= each.last < len(schedule.steps):
            problems.append(f"{each.spec.name} lives from step {each.first} to {each.last}")
    if problems:
        raise ValueError("; ".join(problems))


def _view_problems(schedule: Schedule, call: KernelCall) -> list[str]:
    """What would make a kernel read outside of a tensor."""
    problems = []
    allowed = strided_inputs(call.operator)
    for name, view in call.views.items():
        if name not in allowed:
            problems.append(f"{call.name} has {name} as columns, and only {', '.join(allowed)} may be")
            continue
        if any(type(number) is not int for number in (view.column, view.row_stride, *view.dims)):
            raise ValueError(f"{call.name} has {view} as {name}")
        shape = schedule.spec(call.inputs[name]).shape
        row = [size for size in shape[1:] if isinstance(size, int)]
        last = view.row_stride - math.prod(view.dims)
        fits = all(size > 0 for size in view.dims) and 0 <= view.column <= last
        if len(shape) < 2 or len(row) != len(shape) - 1 or math.prod(row) != view.row_stride or not fits:
            problems.append(f"{call.name} has {view} of a tensor {list(shape)} as {name}")
    return problems
