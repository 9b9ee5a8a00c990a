"""`hstu-compile inspect`: what a checkpoint or a bundle holds. Level 5."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hstu_compile.artifacts import Profile
from hstu_compile.bundle import BundleFiles, is_bundle, read_bundle
from hstu_compile.errors import BundleError, CheckpointError
from hstu_compile.plan_kernels import kernel_facts, kernels_of_plan
from hstu_compile.runtime.schedule_facts import schedule_facts
from hstu_compile.runtime.schedule_file import schedule_from_text
from hstu_compile.shard_index import is_checkpoint_folder


def inspect_path(
    path: Path, config_file: Path | None = None, dialect: str | None = None, *, external_embeddings: bool = False
) -> dict[str, Any]:
    """Facts about a bundle or a checkpoint.

    Args:
        path: either one. A folder with a manifest is a bundle, whatever else is in it.
        config_file: training configuration, for checkpoints.
        dialect: checkpoint family, for checkpoints.
        external_embeddings: leave the tables of a ranking checkpoint out, which need not be there then.

    Returns:
        `kind` is bundle or checkpoint; a bundle has `inputs` and `outputs` as lists of name, dtype, shape.

    Raises:
        BundleError, CheckpointError: if it is neither, or damaged.
    """
    if path.is_dir() and (is_bundle(path) or not is_checkpoint_folder(path)):
        files = read_bundle(path)
        manifest = files.manifest
        keys = (
            "status",
            "checkpoint",
            "precision",
            "backend",
            "limits",
            "profiles",
            "inputs",
            "outputs",
            "operator",
            "graphs",
            "verification",
            "ranking",
            "retrieval",
            "quantization",
        )
        return {
            "kind": "bundle",
            "path": str(path),
            "format_version": manifest["format_version"],
            **{key: manifest.get(key) for key in keys},
            "fused": _fused_facts(files),
            "files": manifest["files"],
        }
    from hstu_compile.checkpoint import config_from_file, spec_from_checkpoint

    if not path.exists():
        raise CheckpointError("HSTU-E101", f"cannot read {path}", "there is no such file or folder", "check the path")
    config = config_from_file(config_file) if config_file is not None else None
    spec = spec_from_checkpoint(path, config, dialect, external_embeddings=external_embeddings)
    return {
        "kind": "checkpoint",
        "path": str(path),
        "sha256": spec.sha256,
        "dialect": spec.dialect,
        "config": spec.config.to_dict(),
        "parameters": sum(tensor.numel() for tensor in spec.state_dict.values()),
        "tensors": [{"name": n, "shape": list(t.shape)} for n, t in spec.state_dict.items()],
        "ignored_keys": list(spec.ignored_keys),
    }


def _fused_facts(files: BundleFiles) -> dict[str, Any] | None:
    """Segments, kernels and what crosses between them, by graph; None where no graph was cut."""
    found: dict[str, Any] = {}
    for entry in files.manifest["graphs"]:
        graph = files.fused_graph(entry["name"])
        if graph is None:
            continue
        schedule = schedule_from_text(graph.schedule.read_text(encoding="utf-8"), graph.schedule.name)
        profiles = [Profile(**each) for each in entry.get("profiles", ())]
        if len(profiles) != 1:
            raise BundleError(
                "HSTU-E803",
                f"{files.path} does not say how large the values between its segments get",
                f"graph {entry['name']} is in segments and has {len(profiles)} profiles, not one",
                "build the bundle again",
            )
        segments = [_segment_facts(each) for each in graph.engines]
        found[entry["name"]] = {
            "schedule": graph.schedule.name,
            "segments": segments,
            **schedule_facts(schedule, profiles[0]),
        }
    return {"kernels": files.manifest["kernels"], "graphs": found} if found else None


def _segment_facts(engine: Path) -> dict[str, Any]:
    """Size of a segment's engine, and what it launches; None where its plan does not tell."""
    return {
        "engine": engine.name,
        "bytes": engine.stat().st_size,
        "kernels": kernel_facts(kernels_of_plan(engine.read_bytes())),
    }


def render_inspection(facts: Mapping[str, Any]) -> str:
    """The same facts as text: what has the same fields several times is a table."""
    return "\n".join(_lines(facts, ""))


def _lines(facts: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in facts.items():
        nested = _named(value)
        if nested is None:
            yield f"{indent}{name}: {_text(value)}"
            continue
        yield f"{indent}{name}:"
        yield from _table(nested, indent + "  ") if _is_table(nested) else _lines(nested, indent + "  ")


def _named(value: Any) -> Mapping[str, Any] | None:
    """Facts inside a fact, by name; None of a fact that is one value."""
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        firsts = [next(iter(each.values()), None) for each in value]
        # By their first field where it names them, else by number.
        if all(isinstance(first, str) for first in firsts) and len({*firsts}) == len(firsts) < sum(map(len, value)):
            return {str(first): dict(list(each.items())[1:]) for first, each in zip(firsts, value, strict=True)}
        return {str(number): each for number, each in enumerate(value)}
    return value if isinstance(value, Mapping) and value else None


def _is_table(nested: Mapping[str, Any]) -> bool:
    """Whether these are the same fields several times, each with one value."""
    rows = list(nested.values())
    if len(rows) == 1 or not all(isinstance(row, Mapping) and row for row in rows):
        return False
    return all(row.keys() == rows[0].keys() and not any(map(_named, row.values())) for row in rows)


def _table(rows: Mapping[str, Mapping[str, Any]], indent: str) -> Iterator[str]:
    """Aligned columns, as many as the shorter side needs."""
    columns = list(next(iter(rows.values())))
    cells = [["", *columns], *([name, *(_text(row[column]) for column in columns)] for name, row in rows.items())]
    if len(columns) > len(rows):
        cells = [list(line) for line in zip(*cells, strict=True)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield (indent + "  ".join(map(str.ljust, line, widths))).rstrip()


def _text(value: Any) -> str:
    """One value as a person writes it."""
    if value is None or value in ({}, []):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
