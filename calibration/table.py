"""What a model's activations were on recorded requests, as a file. Level 2; no torch.

A table holds statistics, not decisions: which rule bounds a tensor, and for which type, is asked later. Statistics of
parts add up exactly to those of the whole, so tables of shards merge.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hstu_compile.calibration.observers import OBSERVERS, Observer, Quantization
from hstu_compile.calibration.sealed_json import SealError, read_sealed, require_keys, write_sealed
from hstu_compile.calibration.site_statistics import SiteStatistics
from hstu_compile.errors import CalibrationError

FORMAT = "hstu-compile/calibration-2"
#: What tables of earlier forms lack.
EARLIER_FORMATS = {
    "hstu-compile/calibration-1": "which does not say what configuration the activations were computed with"
}
_MOST_LISTED = 10
_SHA256_DIGITS = 64
_AGAIN = "run `hstu-compile calibrate` on this checkpoint again"
# Where embedding rows come from, the table or the request, changes no activation.
_WITHOUT_EFFECT = ("external_embeddings",)


def recorded_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration as a table holds it: JSON values of all that decides what its activations are.

    Args:
        values: of the model's configuration, as its `to_dict` has them.
    """
    kept = {name: value for name, value in values.items() if name not in _WITHOUT_EFFECT}
    recorded: dict[str, Any] = json.loads(json.dumps(kept, allow_nan=False))
    return recorded


@dataclasses.dataclass(frozen=True)
class CalibrationData:
    """One file of recorded requests.

    Attributes:
        file: its name, without the folder.
        sha256: of the file.
        requests: in the file.
        samples: requests that were drawn from it.
        seed: of the draw.
    """

    file: str
    sha256: str
    requests: int
    samples: int
    seed: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, wanted = getattr(self, field.name), str if field.type == "str" else int
            if type(value) is not wanted:
                raise ValueError(f"{field.name} of a data file is {value!r}; it must be a {wanted.__name__}")


@dataclasses.dataclass(frozen=True)
class CalibrationTable:
    """Statistics of every product of one checkpoint.

    Attributes:
        checkpoint_sha256: of the checkpoint file.
        dialect: its family.
        config: the model's configuration, with what --config and the checkpoint say, as `recorded_config` gives it. A
            checkpoint of most families holds weights alone: with another configuration they are another model.
        observer: the rule that bounds are taken by where nothing else is asked for.
        data: files of requests.
        sites: name to statistics.
    """

    checkpoint_sha256: str
    dialect: str
    config: Mapping[str, Any] = dataclasses.field(repr=False)
    observer: Observer
    data: tuple[CalibrationData, ...]
    sites: Mapping[str, SiteStatistics] = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        if self.observer not in OBSERVERS:
            raise ValueError(f"observer is {self.observer!r}; there are {', '.join(OBSERVERS)}")

    @property
    def samples(self) -> int:
        """Requests that the statistics are of."""
        return sum(data.samples for data in self.data)

    def bound(self, site: str, observer: Observer | None, quantization: Quantization) -> float:
        """Where to clip a site's activations.

        Args:
            site: name.
            observer: None is the table's own.
            quantization: int8 or fp8.

        Returns:
            Above 0 and at most the site's amax, or 0 where every activation is zero.

        Raises:
            KeyError: if the table has no such site.
        """
        return self.sites[site].bound(observer or self.observer, quantization)

    def require(
        self, checkpoint_sha256: str, dialect: str, config: Mapping[str, Any], sites: Mapping[str, tuple[int, int]]
    ) -> None:
        """Check that the table is one of this model.

        Args:
            checkpoint_sha256: of the checkpoint file.
            dialect: its family.
            config: the model's configuration, as its `to_dict` has it.
            sites: every product of the model: name to (inputs, outputs).

        Raises:
            CalibrationError: HSTU-E813 for another checkpoint, family or configuration, E814 for other products.
        """
        if self.dialect != dialect:
            raise CalibrationError(
                "HSTU-E813",
                "the calibration table is not one of this model",
                f"it is of the family {self.dialect}, the checkpoint is of {dialect}",
                _AGAIN,
                {"table": self.dialect, "checkpoint": dialect},
            )
        if self.checkpoint_sha256 != checkpoint_sha256:
            raise CalibrationError(
                "HSTU-E813",
                "the calibration table is stale",
                f"it is of the checkpoint with sha256 {self.checkpoint_sha256}, this one has {checkpoint_sha256}",
                _AGAIN,
                {"table": self.checkpoint_sha256, "checkpoint": checkpoint_sha256},
            )
        if changed := _differences(self.config, recorded_config(config)):
            raise CalibrationError(
                "HSTU-E813",
                "the calibration table was made with another configuration",
                _listed([f"{name} is {ours} in the table and {theirs} here" for name, ours, theirs in changed]),
                "pass the --config that the table was made with, or run `hstu-compile calibrate` with this one",
                {"changed": [name for name, _, _ in changed]},
            )
        missing = [name for name in sites if name not in self.sites]
        extra = [name for name in self.sites if name not in sites]
        resized = [
            f"{name} is {[table.inputs, table.outputs]} in the table and {list(sites[name])} in the model"
            for name, table in self.sites.items()
            if name in sites and (table.inputs, table.outputs) != tuple(sites[name])
        ]
        if missing or extra or resized:
            faults = [f"{what}: {_listed(names)}" for what, names in (("missing", missing), ("extra", extra)) if names]
            raise CalibrationError(
                "HSTU-E814",
                "the calibration table does not have exactly the products of the model",
                "; ".join(faults + ([_listed(resized)] if resized else [])),
                _AGAIN,
                {"missing": missing, "extra": extra, "resized": resized},
            )

    @classmethod
    def merged(cls, tables: Sequence[CalibrationTable], observer: Observer | None = None) -> CalibrationTable:
        """The table of all data of several.

        Args:
            tables: of one checkpoint, at least one.
            observer: of the result; None where all have the same.

        Raises:
            CalibrationError: HSTU-E815, if they are of different checkpoints, share data, or differ in the observer.
        """
        first = tables[0]
        for index, other in enumerate(tables[1:], 2):
            for what, ours, theirs in (
                ("checkpoints", first.checkpoint_sha256, other.checkpoint_sha256),
                ("families", first.dialect, other.dialect),
                ("configurations", _flat(first.config), _flat(other.config)),
                ("products", _sizes(first), _sizes(other)),
            ):
                if ours != theirs:
                    raise CalibrationError(
                        "HSTU-E815",
                        f"tables 1 and {index} are of different {what}",
                        f"{_difference(ours, theirs)}",
                        "merge tables of one checkpoint",
                    )
        observers = sorted({table.observer for table in tables})
        if observer is None and len(observers) > 1:
            raise CalibrationError(
                "HSTU-E815",
                "the tables have different observers",
                f"found {', '.join(observers)}",
                "choose one with --observer; the statistics serve all of them",
            )
        data = tuple(data for table in tables for data in table.data)
        _require_distinct(data)
        sites = {
            name: functools.reduce(SiteStatistics.merged, (table.sites[name] for table in tables))
            for name in first.sites
        }
        return dataclasses.replace(first, observer=observer or first.observer, data=data, sites=sites)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "checkpoint_sha256": self.checkpoint_sha256,
            "dialect": self.dialect,
            "config": dict(self.config),
            "observer": self.observer,
            "samples": self.samples,
            "data": [dataclasses.asdict(data) for data in self.data],
            "sites": {name: site.to_dict() for name, site in self.sites.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CalibrationTable:
        """Parse the JSON form. Raises ValueError, TypeError or AttributeError where it is not what `to_dict` writes."""
        require_keys(values, {"checkpoint_sha256", "dialect", "config", "observer", "samples", "data", "sites"})
        if not all(isinstance(values[name], str) for name in ("checkpoint_sha256", "dialect", "observer")):
            raise ValueError("checkpoint_sha256, dialect and observer must be strings")
        if not isinstance(values["config"], dict) or not values["config"]:
            raise ValueError("config must be an object with the model's configuration")
        sites = {}
        for name, site in values["sites"].items():
            try:
                sites[name] = SiteStatistics.from_dict(name, site)
            except (ValueError, TypeError, AttributeError, OverflowError) as error:
                raise ValueError(f"site {name}: {error}") from error
        expected = {field.name for field in dataclasses.fields(CalibrationData)}
        for data in values["data"]:
            require_keys(data, expected)
        data_files = tuple(CalibrationData(**data) for data in values["data"])
        table = cls(
            values["checkpoint_sha256"], values["dialect"], values["config"], values["observer"], data_files, sites
        )
        if table.samples != values["samples"]:
            raise ValueError(f"samples is {values['samples']} and its data have {table.samples}")
        return table

    def save(self, path: Path) -> None:
        """Write the table, whole or not at all.

        Raises:
            BundleError: HSTU-E802, if the file cannot be written.
        """
        write_sealed(path, FORMAT, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> CalibrationTable:
        """Read a table.

        Raises:
            CalibrationError: HSTU-E812, if it is not as `save` wrote it.
        """
        try:
            return read_sealed(path, FORMAT, cls.from_dict, EARLIER_FORMATS)
        except SealError as error:
            raise CalibrationError(
                "HSTU-E812",
                f"{path} is not a calibration table",
                str(error),
                "copy it again, or write it again with `hstu-compile calibrate`",
                {"path": str(path)},
            ) from error


def require_distinct_files(names: Mapping[str, Sequence[str]]) -> None:
    """Refuse files whose content is given more than once.

    Args:
        names: sha256 to the names of the files that have it.

    Raises:
        CalibrationError: HSTU-E815.
    """
    twice = [" and ".join(files) for files in names.values() if len(files) > 1]
    if twice:
        raise CalibrationError(
            "HSTU-E815",
            "the same calibration data is given twice",
            f"{_listed(twice)} have the same content; their requests would count twice",
            "leave one of them out",
        )


def _require_distinct(data: Sequence[CalibrationData]) -> None:
    names: dict[str, list[str]] = {}
    for each in data:
        names.setdefault(each.sha256, []).append(each.file)
    require_distinct_files(names)


def _sizes(table: CalibrationTable) -> list[str]:
    return [f"{site.name} [{site.inputs}, {site.outputs}]" for site in table.sites.values()]


def _flat(config: Mapping[str, Any]) -> list[str]:
    """A configuration as dotted names and values."""
    return [f"{name} {value}" for name, value in _leaves(config).items()]


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Values of a configuration as JSON, by dotted name."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = json.dumps(value)
    return found


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name and both values of what differs between configurations."""
    one, other = _leaves(ours), _leaves(theirs)
    absent = "absent"
    names = list(dict.fromkeys([*one, *other]))
    return [
        (name, one.get(name, absent), other.get(name, absent)) for name in names if one.get(name) != other.get(name)
    ]


def _difference(ours: str | list[str], theirs: str | list[str]) -> str:
    if isinstance(ours, str) or isinstance(theirs, str):
        return f"{ours} and {theirs}"
    return f"only one of them has {_listed(sorted(set(ours) ^ set(theirs)) or ['another order'])}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more
