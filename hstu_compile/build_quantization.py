"""Options of a quantised build to what is quantised, before anything is built. Level 4."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from hstu_compile.artifacts import CheckpointSpec
from hstu_compile.calibration.observers import OBSERVERS, Observer
from hstu_compile.calibration.quantization import plan_quantization
from hstu_compile.calibration.table import CalibrationTable
from hstu_compile.config import DEFAULT_BUDGET, BuildConfig
from hstu_compile.environment import BackendChoice
from hstu_compile.errors import UsageError
from hstu_compile.model.families import model_from_config
from hstu_compile.model.product import product_sites
from hstu_compile.plugin_library import installed_tensorrt_version
from hstu_compile.quantized import ProductWeight, QuantizationPlan


@dataclasses.dataclass(frozen=True)
class QuantizationSettings:
    """What is quantised, and where the numbers come from.

    Attributes:
        plan: scales by site.
        observer: rule for the bounds of activations.
        smooth_alpha: share of the range that moved into the weights, or None.
        table: name of the calibration table's file.
        data: files that it was made of, as it lists them.
        samples: requests that it was made of.
        alternatives: plans by the other rules, in the order in which --mixed auto asks them if no mix by `observer` is
            within the budget; empty unless the rule is left to it.
        sensitivity: how --mixed auto chose what stays in float16, as `SensitivityLadder.to_dict` has it, or None.
    """

    plan: QuantizationPlan
    observer: str
    smooth_alpha: float | None
    table: str
    data: tuple[dict[str, Any], ...]
    samples: int
    alternatives: Mapping[str, QuantizationPlan] = dataclasses.field(default_factory=dict, repr=False)
    sensitivity: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form for manifest, report and --dry-run."""
        return {
            **self.plan.to_dict(),
            "observer": self.observer,
            "smooth_quant": self.smooth_alpha,
            "calibration": {"file": self.table, "samples": self.samples, "data": list(self.data)},
            "sensitivity": self.sensitivity,
        }


def check_quantization(config: BuildConfig) -> None:
    """Options that contradict each other, before a checkpoint is read.

    Raises:
        UsageError: HSTU-E901; E907, if there is no table.
    """
    _check_quality(config)
    if config.quantization is None:
        given = {
            "--calib": config.calibration,
            "--observer": config.observer,
            "--smooth-quant": config.smooth_quant,
            "--keep-fp16": config.keep_fp16 or None,
            "--mixed": config.mixed,
        }
        for option, value in given.items():
            if value is not None:
                raise UsageError(
                    "HSTU-E901",
                    f"{option} cannot be used",
                    "nothing is quantised without --int8 or --fp8",
                    f"add one of them, or leave {option} out",
                )
        return
    if config.precision != "fp16":
        raise UsageError(
            "HSTU-E901",
            f"--{config.quantization} and --{config.precision} exclude each other",
            "what is not quantised is float16, and so are the scales",
            f"leave --{config.precision} out",
        )
    if config.calibration is None:
        raise UsageError(
            "HSTU-E907",
            f"--{config.quantization} cannot be used without --calib",
            "nothing says how large the activations of this checkpoint get",
            "hstu-compile calibrate CKPT --data REQUESTS.npz -o calibration.json, then add --calib calibration.json",
        )
    if config.observer is not None and config.observer not in OBSERVERS:
        raise UsageError(
            "HSTU-E901",
            f"--observer {config.observer} cannot be used",
            f"there are {', '.join(OBSERVERS)}",
            "pass one of these, or leave it out",
        )


def _check_quality(config: BuildConfig) -> None:
    """The options that speak of ranking quality."""
    for option, value in (("--mixed auto", config.mixed), ("--budget", config.budget)):
        if value is not None and config.labelled_data is None:
            raise UsageError(
                "HSTU-E901",
                f"{option} cannot be used without --data",
                "quality is measured on requests whose outcome is known",
                "add --data LABELLED.npz",
            )
    if config.budget is not None and not 0 <= config.budget < 1:
        raise UsageError(
            "HSTU-E901",
            f"--budget {config.budget:g} cannot be used",
            "it is the largest change of a metric: at least 0 and below 1",
            f"pass {DEFAULT_BUDGET}, or leave it out",
        )


def planned_quantization(
    config: BuildConfig, spec: CheckpointSpec, backend: BackendChoice
) -> QuantizationSettings | None:
    """Read the table and choose scales; None where nothing is quantised.

    Args:
        config: checked by `check_quantization`.
        spec: the checkpoint.
        backend: engine builder.

    Raises:
        CalibrationError: HSTU-E812, if the table cannot be read; E813 and E814, if it is not of this checkpoint.
        UsageError: HSTU-E905, for a product that does not exist; E906, if the backend lacks the type.
    """
    if config.quantization is None:
        return None
    assert config.calibration is not None  # checked
    _require_type(config, backend)
    table = CalibrationTable.load(config.calibration)
    weights = checkpoint_products(spec)
    sizes = {name: (weight.matrix.shape[0], weight.matrix.shape[1]) for name, weight in weights.items()}
    table.require(spec.sha256, spec.dialect, spec.config.to_dict(), sizes)
    smoothed = config.smooth_quant is not None
    observer = cast(Observer | None, config.observer)
    plan = plan_quantization(table, weights, config.quantization, observer, config.keep_fp16, config.smooth_quant)
    others = OBSERVERS if config.mixed is not None and observer is None and not smoothed else ()
    alternatives: dict[str, QuantizationPlan] = {
        other: plan_quantization(table, weights, config.quantization, other, config.keep_fp16)
        for other in others
        if other != table.observer
    }
    return QuantizationSettings(
        plan,
        "amax" if smoothed else observer or table.observer,
        config.smooth_quant,
        Path(config.calibration).name,
        tuple(dataclasses.asdict(data) for data in table.data),
        table.samples,
        alternatives,
    )


def checkpoint_products(spec: CheckpointSpec) -> dict[str, ProductWeight]:
    """The constant matrix of every product, in the order of the model; no model is filled with weights for it."""
    with torch.device("meta"):
        sites = product_sites(model_from_config(spec.config))
    return {
        name: ProductWeight(site.weight_name, spec.state_dict[site.weight_name].float().numpy())
        for name, site in sites.items()
    }


def _require_type(config: BuildConfig, backend: BackendChoice) -> None:
    if config.quantization != "fp8" or backend.name != "tensorrt":
        return
    version = installed_tensorrt_version()
    if version is not None and int(version.split(".", maxsplit=1)[0]) < 10:
        raise UsageError(
            "HSTU-E906",
            "--fp8 cannot be used with this TensorRT",
            f"TensorRT {version} has no such type",
            "use --int8, TensorRT >= 10, or --backend tensorrt-rtx",
            {"version": version},
        )
