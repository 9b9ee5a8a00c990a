"""Feeds and outputs in Polygraphy's files, and the `polygraphy run` that repeats the check. Level 4.

The command needs neither torch nor hstu-compile: whoever doubts a bundle can run it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.comparator import IterationResult, RunResults
from polygraphy.json import load_json, save_json
from polygraphy.logger import G_LOGGER

Outputs = Mapping[str, NDArray[Any]]
_TAIL = 1500
#: Where torch is installed, polygraphy imports it to ask whether an array is one of torch's: three quarters of the
#: command's time. As far as the command can see, it is not installed.
_ENTRY = "import sys; sys.modules['torch'] = None; from polygraphy.tools import main; sys.exit(main())"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Polygraphy without its messages, and without torch where nobody has imported it.

    It takes seconds, and an interrupt that comes meanwhile ends the process with a segmentation fault.
    """
    with G_LOGGER.verbosity(G_LOGGER.ERROR):
        if "torch" in sys.modules:
            yield
            return
        sys.modules["torch"] = None  # type: ignore[assignment]
        try:
            yield
        finally:
            del sys.modules["torch"]


def save_feeds(path: Path, feeds: Sequence[Outputs]) -> None:
    """Write a list of feeds for `--load-inputs`."""
    with _quiet():
        save_json([OrderedDict(feed) for feed in feeds], str(path))


def load_feeds(path: Path) -> list[dict[str, NDArray[Any]]]:
    """Read what `save_feeds` wrote."""
    with _quiet():
        return [dict(feed) for feed in load_json(str(path))]


def save_outputs(path: Path, runner: str, outputs: Sequence[Outputs]) -> None:
    """Write outputs, one entry per feed, for `--load-outputs`."""
    with _quiet():
        results = RunResults()
        results.append((runner, [IterationResult(OrderedDict(each), runner_name=runner) for each in outputs]))
        results.save(str(path))


def load_outputs(path: Path) -> list[dict[str, NDArray[Any]]]:
    """Read what `save_outputs` wrote."""
    with _quiet():
        results = RunResults.load(str(path))
        _, iterations = next(iter(results))
        return [{name: np.asarray(iteration[name]) for name in iteration} for iteration in iterations]


@dataclasses.dataclass(frozen=True)
class PolygraphyCheck:
    """A polygraphy command, run in the bundle's folder, and what came of it."""

    arguments: tuple[str, ...]
    exit_code: int
    output_tail: str

    @property
    def command(self) -> str:
        """The command as typed in the bundle's folder."""
        return shlex.join(["polygraphy", *self.arguments])

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"command": self.command, "exit_code": self.exit_code, "output_tail": self.output_tail}


def run_polygraphy(folder: Path, arguments: Sequence[str]) -> PolygraphyCheck:
    """Run polygraphy in a folder."""
    # Through this interpreter: the polygraphy script need not be on the PATH, and another one could be.
    command = [sys.executable, "-c", _ENTRY, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return PolygraphyCheck(tuple(arguments), done.returncode, _last_lines(done.stdout + done.stderr))


def _last_lines(text: str) -> str:
    """The end of a text, from where a line begins; a last line that is longer is cut."""
    if len(text) <= _TAIL:
        return text
    first = text.find("\n", len(text) - _TAIL - 1, len(text) - 1)
    return text[first + 1 :] if first >= 0 else text[-_TAIL:]
