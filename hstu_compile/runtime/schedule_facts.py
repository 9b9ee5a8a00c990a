"""What a schedule means in steps and bytes, for reports. Arithmetic. Level 3; no torch, no ONNX."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hstu_compile.artifacts import Profile, Schedule, TensorSpec
from hstu_compile.axis_sizes import axis_size, axis_values
from hstu_compile.runtime._bfloat16 import storage_dtype
from hstu_compile.runtime._buffer_plan import Lifetime, planned_buffers


def schedule_facts(schedule: Schedule, profile: Profile) -> dict[str, Any]:
    """Facts about a schedule, as JSON.

    Args:
        schedule: of a cut graph.
        profile: of that graph, which says how large it typically is and at most.

    Returns:
        `steps` in order; `calls` of kernels with their operators and the tensors that each reads and makes; `crossing`
        tensors with the steps that they live from and to, and their bytes; `block_bytes`: the memory that all those
        between two steps share, without the kernels' workspaces and without the graph's outputs. Bytes are given for
        the profile's `typical` and `largest` shapes.
    """
    sizes = {"typical": _axes(schedule, profile.opt), "largest": _axes(schedule, profile.max)}
    served = {spec.name for spec in schedule.outputs}
    crossing = [
        {
            "name": each.spec.name,
            "dtype": each.spec.dtype,
            "shape": list(each.spec.shape),
            "first_step": each.first,
            "last_step": each.last,
            "served": each.spec.name in served,
            **{f"{kind}_bytes": _nbytes(each.spec, axes) for kind, axes in sizes.items()},
        }
        for each in schedule.crossing
    ]
    return {
        "steps": [
            f"segment {step.index}" if step.kind == "segment" else schedule.calls[step.index].name
            for step in schedule.steps
        ],
        "calls": [
            {
                "operator": call.operator,
                "name": call.name,
                "reads": list(dict.fromkeys(call.inputs.values())),
                "makes": call.output,
            }
            for call in schedule.calls
        ],
        "crossing": crossing,
        "block_bytes": {
            kind: planned_buffers(
                Lifetime(each.spec.name, _nbytes(each.spec, axes), each.first, each.last)
                for each in schedule.crossing
                if each.spec.name not in served
            ).nbytes
            for kind, axes in sizes.items()
        },
    }


def _axes(schedule: Schedule, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The value of each axis' name. An input without dynamic axes may be left out of a profile."""
    declared = {spec.name: spec.shape for spec in schedule.inputs if spec.name in shapes}
    return axis_values({name: tuple(shapes[name]) for name in declared}, declared)


def _nbytes(spec: TensorSpec, axes: Mapping[str, int]) -> int:
    return math.prod(_size(axis, axes) for axis in spec.shape) * storage_dtype(spec.dtype).itemsize


def _size(axis: int | str, axes: Mapping[str, int]) -> int:
    if isinstance(axis, int):
        return axis
    expression = axis_size(axis)
    if expression is None:
        raise ValueError(f"{axis} is no expression of axes")
    return expression.at(axes)
