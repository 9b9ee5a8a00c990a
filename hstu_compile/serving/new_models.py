"""Put models into a Triton model repository, all of them or none. Level 5; no torch.

DEPLOYMENT in a model's folder says that the model is ours, and under "steps" which models it asks.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from hstu_compile.errors import BundleError
from hstu_compile.files import writing_to

DEPLOYMENT = "deployment.json"


@contextlib.contextmanager
def new_models(repository: Path, names: Sequence[str], force: bool) -> Iterator[tuple[Path, ...]]:
    """Folders that become the models when the block ends, and are removed if it fails.

    Args:
        repository: made if it is absent.
        names: of the models; the first asks the others, if there are any.
        force: replace models of these names, and remove what else the first one asked so far.

    Raises:
        BundleError: HSTU-E801 if a model exists and is not to be replaced, E802 if one cannot be written.
    """
    targets = [repository / name for name in names]
    for target in targets:
        if target.exists() and not (force and _is_ours(target)):
            whose = "it is a model that hstu-compile wrote" if _is_ours(target) else "it is not ours"
            fix = "pass --force, or another --name" if _is_ours(target) else "pass another --name or -o DIR"
            raise BundleError("HSTU-E801", f"{target} exists", whose, fix)
    mark = secrets.token_hex(4)

    def hidden(target: Path, state: str) -> Path:
        # A server that looks for new models at this moment must not find half of one: names with a dot are no models.
        return repository / f".{target.name}.{mark}.{state}"

    folders = [hidden(target, "partial") for target in targets]
    replaced = {target: hidden(target, "old") for target in (*targets, *_former_steps(targets[0], names))}
    placed: list[Path] = []
    complete = False
    with writing_to(targets[0]):
        repository.mkdir(parents=True, exist_ok=True)
        try:
            for folder in folders:
                folder.mkdir()
            yield tuple(folders)
            for target, old in replaced.items():
                if target.exists():
                    os.rename(target, old)
            # What asks others comes after them.
            for folder, target in reversed([*zip(folders, targets, strict=True)]):
                os.rename(folder, target)
                placed.append(target)
            complete = True
        finally:
            if not complete:
                for target in placed:
                    shutil.rmtree(target, ignore_errors=True)
                for target, old in replaced.items():
                    if old.exists():
                        os.rename(old, target)
            for leftover in (*folders, *replaced.values()):
                shutil.rmtree(leftover, ignore_errors=True)


def _is_ours(model: Path) -> bool:
    return (model / DEPLOYMENT).is_file()


def _former_steps(model: Path, kept: Sequence[str]) -> list[Path]:
    """Models of ours beside this one that it asked so far, without those of the names to keep."""
    if not _is_ours(model):
        return []
    try:
        steps = [str(step) for step in json.loads((model / DEPLOYMENT).read_text(encoding="utf-8")).get("steps", ())]
    except (OSError, ValueError, AttributeError, TypeError):
        # Damaged, so that it says nothing; the model is replaced all the same, and others are left alone.
        return []
    others = [model.with_name(step) for step in steps if step == Path(step).name and step not in (*kept, "", "..")]
    return [other for other in others if _is_ours(other)]
