"""Named checks with their facts, written as one JSON file; a check that raises has failed, and the rest go on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_TAIL = 3000


@dataclasses.dataclass
class Check:
    """One check; the block that runs it fills in the facts and says whether it passed."""

    name: str
    passed: bool = False
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


class Checks:
    """Everything one script checked.

    Args:
        name: of the script, for the summary.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.facts: dict[str, Any] = {}
        self._entries: list[Check] = []

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[Check]:
        """Run one check: it passes when the block sets `passed`; an exception is a failure with its traceback."""
        entry = Check(name)
        started = time.perf_counter()
        try:
            yield entry
        except Exception as error:  # whatever it is, the other checks still have something to say
            entry.passed = False
            entry.facts["error"] = f"{type(error).__name__}: {error}"[-_TAIL:]
            entry.facts["traceback"] = traceback.format_exc()[-_TAIL:]
        entry.facts["seconds"] = round(time.perf_counter() - started, 3)
        self._entries.append(entry)
        shown = "ok  " if entry.passed else "FAIL"
        print(f"{shown} {name}  {entry.facts.get('error', '')[:300]}", flush=True)

    def take(self, other: Checks) -> None:
        """Add what another process checked."""
        self._entries += other._entries

    def write(self, path: Path) -> int:
        """Write the JSON, once more with each call; returns the exit status, 1 also when nothing was checked."""
        failed = [entry.name for entry in self._entries if not entry.passed]
        passed = len(self._entries) - len(failed)
        summary = f"{passed} passed, {len(failed)} failed"
        content = {
            "name": self.name,
            "summary": summary,
            "failed": failed,
            "facts": self.facts,
            "checks": [dataclasses.asdict(entry) for entry in self._entries],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, default=_plain) + "\n", encoding="utf-8")
        print(f"{self.name}: {summary}" + "".join(f"\n  failed: {name}" for name in failed), flush=True)
        return 0 if passed and not failed else 1


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


@dataclasses.dataclass(frozen=True)
class Finished:
    """A command that ended, or was ended: exit code 124 stands for the time limit."""

    exit_code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def tail(self) -> str:
        """The end of what it printed."""
        return (self.stdout + self.stderr)[-_TAIL:]


def run_command(
    command: Sequence[str], *, timeout: float, cwd: Path | None = None, env: dict[str, str] | None = None
) -> Finished:
    """Run a command with a time limit in seconds; never raises for what the command does."""
    started = time.perf_counter()
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env, check=False
        )
    except subprocess.TimeoutExpired as error:
        texts = [t.decode(errors="replace") if isinstance(t, bytes) else t or "" for t in (error.stdout, error.stderr)]
        return Finished(124, texts[0], texts[1] + f"\nended after {timeout:g} s", time.perf_counter() - started)
    return Finished(done.returncode, done.stdout, done.stderr, time.perf_counter() - started)
