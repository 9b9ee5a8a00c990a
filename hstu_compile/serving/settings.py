"""How a model is served: what the options of `hstu-compile triton` say. Level 5; no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

from hstu_compile.errors import UsageError
from hstu_compile.profiles import check_counts
from hstu_compile.runtime.ladder import Buckets
from hstu_compile.runtime.ranking_request import Truncation, UnknownIds
from hstu_compile.runtime.session import RUNTIMES
from hstu_compile.serving.pbtxt import Message

#: Prefix of our parameters in a config.pbtxt: whoever edits one sees whose it is.
PREFIX = "hstu_"
LostProcess = Literal["report", "stop_server"]
Shapes = Literal["auto", "exact", "fine", "coarse"]
_CHOICES = {
    "runtime": RUNTIMES,
    "device": ("cpu", "gpu"),
    "truncation": get_args(Truncation),
    "unknown_ids": get_args(UnknownIds),
    "lost_process": get_args(LostProcess),
    "shapes": get_args(Shapes),
}
_MEBI = 1 << 20


@dataclasses.dataclass(frozen=True)
class Scheduling:
    """How requests become batches.

    Attributes:
        max_queue_delay_us: microseconds that a request waits for others; 0 takes who is there.
        instances: of the model on the device, each with memory of its own.
        cuda_graphs: record graphs (TensorRT backend).
    """

    max_queue_delay_us: int = 500
    instances: int = 1
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        check_counts({"--max-queue-delay-us": self.max_queue_delay_us}, lowest=0)
        check_counts({"--instances": self.instances})

    def dynamic_batching(self) -> Message:
        """The field of a config."""
        return {"max_queue_delay_microseconds": self.max_queue_delay_us}


@dataclasses.dataclass(frozen=True)
class RuntimeSettings:
    """How the Python backend answers; `to_parameters` goes into a config.pbtxt and `from_parameters` reads it there.

    Attributes:
        runtime: onnxruntime, tensorrt or tensorrt-rtx.
        device: of ONNX Runtime; the engines always run on the GPU.
        kv_budget_mib: memory of the KV cache in MiB, of a model that has one; 0 keeps nothing.
        truncation: a history over the limit: refuse it, or keep its last events and say how many went.
        unknown_ids: an id outside its table: refuse it, or take the table's first or last row (ranking models).
        lost_process: the model's process has ended unasked: say so in the server's log, or end the server as well.
        shapes: of a pass: exact is the requests' own; fine and coarse pad them to `Buckets()` and `Buckets.coarse()`;
            auto is coarse for tensorrt-rtx, which compiles for each new set of shapes, and exact otherwise.

    Raises:
        UsageError: HSTU-E901 for a value that is none.
    """

    runtime: str = "onnxruntime"
    device: str = "cpu"
    kv_budget_mib: int = 256
    truncation: Truncation = "refuse"
    unknown_ids: UnknownIds = "refuse"
    lost_process: LostProcess = "report"
    shapes: Shapes = "auto"

    def __post_init__(self) -> None:
        check_counts({"--kv-budget-mib": self.kv_budget_mib}, lowest=0)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(
                    "HSTU-E901",
                    f"there is no {name} {getattr(self, name)!r}",
                    f"it is none of {', '.join(allowed)}",
                    f"choose one of these with --{name.replace('_', '-')}, or in the config.pbtxt",
                )

    @property
    def kv_budget_bytes(self) -> int:
        """The cache's memory in bytes."""
        return self.kv_budget_mib * _MEBI

    @property
    def buckets(self) -> Buckets | None:
        """What passes are padded to; None for exact shapes."""
        if self.shapes == "fine":
            return Buckets()
        is_coarse = self.shapes == "coarse" or (self.shapes == "auto" and self.runtime == "tensorrt-rtx")
        return Buckets.coarse() if is_coarse else None

    @property
    def on_gpu(self) -> bool:
        """Whether anything of the model is on a GPU."""
        return self.device == "gpu" or self.runtime != "onnxruntime"

    def to_parameters(self, names: Collection[str] | None = None) -> dict[str, str]:
        """Parameters of a config; of these settings alone, if names are given."""
        return {
            f"{PREFIX}{name}": str(value)
            for name, value in dataclasses.asdict(self).items()
            if names is None or name in names
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> RuntimeSettings:
        """Read a config's parameters; one that is absent has its default.

        Raises:
            UsageError: HSTU-E901 for one of ours that is unknown or has no such value.
        """
        ours = {name.removeprefix(PREFIX): text for name, text in parameters.items() if name.startswith(PREFIX)}
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(ours) - known):
            raise UsageError(
                "HSTU-E901",
                f"there are no parameters {', '.join(PREFIX + name for name in unknown)}",
                f"ours are {', '.join(PREFIX + name for name in sorted(known))}",
                "correct the names in config.pbtxt",
            )
        budget = ours.pop("kv_budget_mib", str(cls.kv_budget_mib))
        if not budget.isdecimal():
            raise UsageError(
                "HSTU-E901",
                f"{PREFIX}kv_budget_mib {budget!r} is no number of MiB",
                "it is not a whole number of 0 or more",
                "correct it in config.pbtxt",
            )
        values: dict[str, Any] = dict(ours)  # __post_init__ looks at each
        return cls(kv_budget_mib=int(budget), **values)
