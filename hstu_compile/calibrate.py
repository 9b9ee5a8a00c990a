"""Calibration: a checkpoint and recorded requests to a table of what its activations are. Level 5.

Runs the eager model in float32 with a hook on every product, batch by batch; after every few batches what was counted
so far is kept beside the output, so that an interrupted run can go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hstu_compile.artifacts import CheckpointSpec
from hstu_compile.calibration.data_warnings import data_warnings
from hstu_compile.calibration.observers import OBSERVERS, QUANTIZATIONS, Observer
from hstu_compile.calibration.recorded_requests import (
    FEWEST_REQUESTS,
    RecordedRequests,
    RequestFile,
    recorded_requests,
)
from hstu_compile.calibration.sealed_json import SealError, read_sealed, require_keys, write_sealed
from hstu_compile.calibration.site_statistics import SiteStatistics
from hstu_compile.calibration.table import CalibrationData, CalibrationTable, recorded_config
from hstu_compile.checkpoint import config_from_file, model_from_spec, spec_from_checkpoint
from hstu_compile.errors import CalibrationError, UsageError
from hstu_compile.files import check_not_input, file_sha256, writing_to
from hstu_compile.model.families import HstuModel
from hstu_compile.model.product import product_sites, product_sizes
from hstu_compile.runtime.request import feeds_from_npz
from hstu_compile.served import served_graphs

#: Rule that a table's bounds are taken by where neither `calibrate` nor `build` is told another. It clips nothing, so
#: it has no data on which it is far off; what the others do to three models is in docs/calibration.md.
DEFAULT_OBSERVER: Observer = "amax"

PARTIAL_FORMAT = "hstu-compile/calibration-partial-2"
# Batches between two copies of the partial table, which takes a fraction of a second to write.
_BATCHES_PER_COPY = 32

#: Called with what is done, how many and of how many.
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class CalibrationRequest:
    """What `hstu-compile calibrate` is asked.

    Attributes:
        checkpoint: file that torch.save wrote, or a folder of shards.
        output: the table's file; replaced when the new one is complete.
        data: .npz files of recorded requests; may be empty where tables are merged.
        merge: tables of the same checkpoint whose statistics are added.
        config_file: JSON configuration of the training run.
        dialect: checkpoint family; None detects it.
        external_embeddings: requests hold embedding rows.
        observer: of the table; None is that of the merged tables, or the default.
        samples: most requests that are drawn.
        seed: of the draw.
        resume: go on from the partial table of an interrupted run.
    """

    checkpoint: Path
    output: Path
    data: tuple[Path, ...] = ()
    merge: tuple[Path, ...] = ()
    config_file: Path | None = None
    dialect: str | None = None
    external_embeddings: bool = False
    observer: Observer | None = None
    samples: int = 1024
    seed: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        if not self.data and not self.merge:
            raise UsageError(
                "HSTU-E901",
                "there is nothing to calibrate with",
                "neither --data nor --merge is given",
                "pass recorded requests with --data FILE.npz, or tables with --merge FILE.json",
            )
        check_not_input(self.output, (self.checkpoint, *self.data, *([self.config_file] if self.config_file else [])))
        if self.samples < FEWEST_REQUESTS or self.seed < 0:
            raise UsageError(
                "HSTU-E901",
                f"--samples {self.samples} --seed {self.seed} cannot be used",
                f"--samples is at least {FEWEST_REQUESTS} and --seed at least 0",
                "leave them out, or pass for instance --samples 1024 --seed 0",
            )

    @property
    def partial(self) -> Path:
        """Where an unfinished table is kept."""
        return self.output.with_name(f"{self.output.name}.partial")


@dataclasses.dataclass(frozen=True)
class CalibrationResult:
    """What a calibration made.

    Attributes:
        table: as written.
        warnings: what is suspicious about the data, in sentences.
        resumed_requests: requests that an earlier, interrupted run had counted.
    """

    table: CalibrationTable
    warnings: tuple[str, ...]
    resumed_requests: int


def calibrate(request: CalibrationRequest, progress: Progress) -> CalibrationResult:
    """Make a calibration table and write it.

    Raises:
        CheckpointError: for a checkpoint that cannot be read.
        RequestError: HSTU-E706, for data that cannot be read.
        CalibrationError: HSTU-E810 to E816.
        BundleError: HSTU-E802, if the table cannot be written.
    """
    user_config = config_from_file(request.config_file) if request.config_file is not None else None
    spec = spec_from_checkpoint(
        request.checkpoint, user_config, request.dialect, external_embeddings=request.external_embeddings
    )
    model = model_from_spec(spec)
    tables = [CalibrationTable.load(path) for path in request.merge]
    for table in tables:
        table.require(spec.sha256, spec.dialect, spec.config.to_dict(), product_sizes(model))
    warnings: tuple[str, ...] = ()
    resumed = 0
    if request.data:
        requests = recorded_requests([_request_file(path) for path in request.data], spec.config)
        users = requests.sample(request.samples, request.seed)
        warnings = tuple(data_warnings(requests.feeds(users), requests.layout))
        run = _Run(request, spec, model, requests, users)
        sites = run.statistics(progress)
        resumed = run.resumed_requests
        observer = request.observer or (tables[0].observer if tables else DEFAULT_OBSERVER)
        config = recorded_config(spec.config.to_dict())
        tables.append(CalibrationTable(spec.sha256, spec.dialect, config, observer, run.provenance, sites))
    table = CalibrationTable.merged(tables, request.observer)
    table.save(request.output)
    with writing_to(request.partial):
        request.partial.unlink(missing_ok=True)
    return CalibrationResult(table, warnings, resumed)


def calibration_facts(request: CalibrationRequest, result: CalibrationResult) -> dict[str, Any]:
    """What the command says of a table it wrote, for machines; bounds of each type by observer."""
    table = result.table
    return {
        "table": str(request.output),
        "checkpoint": {"file": str(request.checkpoint), "sha256": table.checkpoint_sha256, "dialect": table.dialect},
        "observer": table.observer,
        "samples": table.samples,
        "resumed_requests": result.resumed_requests,
        "data": [dataclasses.asdict(data) for data in table.data],
        "warnings": list(result.warnings),
        "sites": {
            name: {
                "inputs": site.inputs,
                "outputs": site.outputs,
                "rows": site.rows,
                "bounds": {
                    quantization: {observer: site.bound(observer, quantization) for observer in OBSERVERS}
                    for quantization in QUANTIZATIONS
                },
            }
            for name, site in table.sites.items()
        },
    }


def render_calibration(facts: Mapping[str, Any]) -> str:
    """The same for people: a row for each product, its bounds for INT8 by observer."""
    width = max(len(name) for name in facts["sites"])
    lines = [f"{'INT8 bounds':<{width}}{'rows':>10}" + "".join(f"{observer:>12}" for observer in OBSERVERS)]
    for name, site in facts["sites"].items():
        bounds = "".join(f"{site['bounds']['int8'][observer]:>12.4g}" for observer in OBSERVERS)
        lines.append(f"{name:<{width}}{site['rows']:>10}{bounds}")
    resumed = f", {facts['resumed_requests']} of them before it was interrupted" if facts["resumed_requests"] else ""
    lines.append(f"{facts['table']}  {facts['samples']} requests{resumed}, observer {facts['observer']}")
    return "\n".join(lines)


def _request_file(path: Path) -> RequestFile:
    arrays = feeds_from_npz(path)
    return RequestFile(path.name, file_sha256(path), arrays)


class _Run:
    """One pass of the model over the drawn requests.

    Attributes:
        provenance: what the table records of the data.
        resumed_requests: requests that the partial table had.
    """

    def __init__(
        self,
        request: CalibrationRequest,
        spec: CheckpointSpec,
        model: HstuModel,
        requests: RecordedRequests,
        users: NDArray[np.int64],
    ) -> None:
        self._request, self._spec, self._model, self._requests = request, spec, model, requests
        self._batches = requests.batches(users)
        self._sites = {name: SiteStatistics.empty(name, *size) for name, size in product_sizes(model).items()}
        self.provenance: tuple[CalibrationData, ...] = requests.provenance(users, request.seed)
        self.resumed_requests = 0

    def statistics(self, progress: Progress) -> dict[str, SiteStatistics]:
        """Of every site over all requests."""
        done = self._resume() if self._request.resume else 0
        total = sum(map(len, self._batches))
        finished = self.resumed_requests = sum(map(len, self._batches[:done]))
        graph = served_graphs(self._model)[0]
        with self._observed():
            for index, users in enumerate(self._batches[done:], done + 1):
                self._current = users
                graph.run(self._requests.feeds(users))
                finished += len(users)
                if index % _BATCHES_PER_COPY == 0 and index < len(self._batches):
                    self._keep(index)
                progress("requests", finished, total)
        unseen = [name for name, site in self._sites.items() if not site.rows]
        if unseen:
            raise CalibrationError(
                "HSTU-E810",
                "the calibration data do not reach every product",
                f"no row of activations went into {', '.join(unseen)}",
                "record requests that have events and, of a ranking model, candidates",
                {"sites": unseen},
            )
        return self._sites

    @contextlib.contextmanager
    def _observed(self) -> Iterator[None]:
        """Count what goes into every product while the block runs."""
        with contextlib.ExitStack() as hooks:
            for name, site in product_sites(self._model).items():
                hooks.callback(site.module.register_forward_pre_hook(self._observer(name)).remove)
            yield

    def _observer(self, name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def observe(module: torch.nn.Module, operands: tuple[torch.Tensor, ...]) -> None:
            activations = operands[0].numpy()
            try:
                seen = SiteStatistics.of(name, activations, operands[1].shape[1])
            except ValueError as error:
                raise self._not_finite(name, activations) from error
            self._sites[name] = self._sites[name].merged(seen)

        return observe

    def _not_finite(self, name: str, activations: NDArray[np.float32]) -> CalibrationError:
        nan, infinite = int(np.isnan(activations).sum()), int(np.isinf(activations).sum())
        rows = int((~np.isfinite(activations)).any(axis=1).sum())
        return CalibrationError(
            "HSTU-E811",
            f"the activations in front of {name} are not finite",
            f"{nan} NaN and {infinite} infinite of {activations.size}, in {rows} of {len(activations)} rows, computed "
            f"in float32 for {self._requests.names(self._current)}",
            "leave these requests out, or use an earlier checkpoint: scales cannot be taken from such values",
            {"site": name, "nan": nan, "infinite": infinite},
        )

    def _task(self) -> dict[str, Any]:
        """What must be the same for a partial table to be gone on from."""
        return {
            "checkpoint_sha256": self._spec.sha256,
            "dialect": self._spec.dialect,
            "config": recorded_config(self._spec.config.to_dict()),
            "data": [dataclasses.asdict(data) for data in self.provenance],
            "batches": len(self._batches),
        }

    def _keep(self, done: int) -> None:
        sites = {name: site.to_dict() for name, site in self._sites.items()}
        write_sealed(self._request.partial, PARTIAL_FORMAT, {"task": self._task(), "done": done, "sites": sites})

    def _resume(self) -> int:
        """Take over a partial table, if there is one; the number of batches that it has."""
        path = self._request.partial
        if not path.exists():
            return 0

        def parse(values: dict[str, Any]) -> tuple[Mapping[str, Any], int, dict[str, SiteStatistics]]:
            require_keys(values, {"task", "done", "sites"})
            sites = {name: SiteStatistics.from_dict(name, site) for name, site in values["sites"].items()}
            return values["task"], int(values["done"]), sites

        try:
            task, done, sites = read_sealed(path, PARTIAL_FORMAT, parse)
        except SealError as error:
            raise self._cannot_resume(str(error)) from error
        ours = self._task()
        changed = [name for name in ours if task.get(name) != ours[name]]
        if changed or list(sites) != list(self._sites):
            what = ", ".join(changed) or "the sites"
            raise self._cannot_resume(f"it was made of another checkpoint or other data: {what} differ")
        self._sites = sites
        return done

    def _cannot_resume(self, why: str) -> CalibrationError:
        return CalibrationError(
            "HSTU-E816",
            f"{self._request.partial} cannot be gone on from",
            why,
            "repeat the command as it was interrupted, or leave out --resume to begin again",
            {"path": str(self._request.partial)},
        )
