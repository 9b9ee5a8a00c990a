"""Calibration tables of small models, from requests that are drawn like those of the verification."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hstu_compile.calibration.batches import retrieval_batches
from hstu_compile.calibration.quantization import plan_quantization
from hstu_compile.calibration.ranking_batches import ranking_batches
from hstu_compile.calibration.site_statistics import SiteStatistics
from hstu_compile.calibration.table import CalibrationTable, recorded_config
from hstu_compile.checkpoint import config_from_file, model_from_spec, spec_from_checkpoint
from hstu_compile.config import Quantization
from hstu_compile.model.fake_quantization import product_weights
from hstu_compile.model.families import HstuModel
from hstu_compile.model.product import product_sites
from hstu_compile.model.ranking_config import RankingConfig
from hstu_compile.quantized import QuantizationPlan
from hstu_compile.served import served_graphs


def site_statistics(model: HstuModel, requests: Iterable[Mapping[str, NDArray[Any]]]) -> dict[str, SiteStatistics]:
    """Statistics of every product of a float32 model over requests to its first graph."""
    found: dict[str, SiteStatistics] = {}
    graph = served_graphs(model)[0]
    with contextlib.ExitStack() as hooks:
        for name, site in product_sites(model).items():

            def observe(module: torch.nn.Module, operands: tuple[torch.Tensor, torch.Tensor], name: str = name) -> None:
                rows, outputs = operands[0].detach().numpy().astype(np.float32), operands[1].shape[1]
                seen = SiteStatistics.of(name, rows, outputs)
                found[name] = found[name].merged(seen) if name in found else seen

            hooks.callback(site.module.register_forward_pre_hook(observe).remove)
        for arrays in requests:
            graph.run(dict(arrays))
    return {name: found[name] for name in product_sites(model)}


def calibration_table(
    checkpoint: Path, config_file: Path | None = None, observer: str = "percentile", seed: int = 11
) -> CalibrationTable:
    """The table of a checkpoint over requests like those of the verification."""
    user_config = config_from_file(config_file) if config_file is not None else None
    spec = spec_from_checkpoint(checkpoint, user_config, None)
    config = spec.config
    batches = (
        ranking_batches(config, 8, 4, 1 << 22, seed)
        if isinstance(config, RankingConfig)
        else retrieval_batches(config, 8, 4, 1 << 22, seed)
    )
    sites = site_statistics(model_from_spec(spec), [batch.arrays for batch in batches])
    made_with = recorded_config(config.to_dict())
    return CalibrationTable(spec.sha256, spec.dialect, made_with, observer, (), sites)  # type: ignore[arg-type]


def quantization_plan(
    model: HstuModel, requests: Iterable[Mapping[str, NDArray[Any]]], kind: Quantization, **options: Any
) -> QuantizationPlan:
    """The plan of a float32 model by its activations on the requests."""
    table = CalibrationTable("0" * 64, "native", {}, "amax", (), site_statistics(model, requests))
    return plan_quantization(table, product_weights(model), kind, **options)
