"""Entry point: runs the CLI and turns every ending into an exit code. Level 6."""

from __future__ import annotations

import contextlib
import errno
import json
import signal
import sys
import traceback
from types import FrameType
from typing import Any

import click

from hstu_compile.errors import (
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    BundleError,
    HstuCompileError,
    UsageError,
)

# Packages outside the base installation, and the extra that brings them; anything else that is missing is our bug.
_EXTRAS = {
    "torch": "export",
    "onnxscript": "export",
    "onnxruntime": "cpu",
    "tensorrt": "gpu",
    "tensorrt_rtx": "rtx",
    "triton": "plugin",
    "click": "",
    "numpy": "",
    "onnx": "",
    "polygraphy": "",
    "yaml": "",
}


class _Interrupts:
    """SIGINT and SIGTERM unwind as KeyboardInterrupt, so that temporary folders are removed, and are remembered."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
        self._before = {kind: signal.signal(kind, self._interrupt) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        self.received = True
        raise KeyboardInterrupt


def _refuse(error: HstuCompileError, arguments: list[str]) -> int:
    _print_error(arguments, **error.to_dict())
    click.echo(str(error), err=True)
    return error.exit_code


def _missing(package: str) -> UsageError:
    extra = f"[{_EXTRAS[package]}]" if _EXTRAS[package] else ""
    return UsageError(
        "HSTU-E903",
        f"this command needs the package {package}",
        f"no module named {package} is installed for {sys.executable}",
        f"pip install 'hstu-compile{extra}'",
    )


def _full(error: OSError) -> BundleError:
    where = error.filename if error.filename is not None else "the output"
    return BundleError("HSTU-E802", f"cannot write {where}", error.strerror or str(error), "free some disk space")


def _print_error(arguments: list[str], **fields: Any) -> None:
    """An error as JSON where that was asked for; the endings that have no code have none here."""
    if "--json" in arguments:
        # Standard output may be what is full.
        with contextlib.suppress(OSError):
            click.echo(json.dumps({"error": {"code": None, **fields}}, indent=1))


def _interrupted(arguments: list[str]) -> int:
    what = "interrupted; nothing was left behind"
    _print_error(arguments, stage="interrupted", what=what, exit_code=EXIT_INTERRUPTED)
    click.echo(what, err=True)
    return EXIT_INTERRUPTED


def _failed(error: Exception, arguments: list[str]) -> int:
    """Say what went wrong; the exit code."""
    if isinstance(error, HstuCompileError):
        return _refuse(error, arguments)
    if isinstance(error, click.ClickException):
        _print_error(arguments, stage="usage", what=error.format_message(), exit_code=EXIT_USAGE)
        error.show()
        return EXIT_USAGE
    if isinstance(error, ModuleNotFoundError) and (package := (error.name or "").split(".")[0]) in _EXTRAS:
        return _refuse(_missing(package), arguments)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return _refuse(_full(error), arguments)
    _print_error(arguments, stage="internal", what=f"{type(error).__name__}: {error}", exit_code=EXIT_INTERNAL)
    traceback.print_exception(error)
    click.echo("This is a bug in hstu-compile; please report it with the output of `hstu-compile env`.", err=True)
    return EXIT_INTERNAL


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or the code of the error class; 130 when interrupted; 70 for a bug of ours.
    """
    from hstu_compile.cli import cli

    arguments = sys.argv[1:] if argv is None else argv
    with _Interrupts() as interrupts:
        try:
            outcome = cli.main(args=arguments, prog_name="hstu-compile", standalone_mode=False)
        except (KeyboardInterrupt, click.Abort):
            return _interrupted(arguments)
        except (BrokenPipeError, SystemExit):
            # The reader of standard output, such as head, has gone: click makes a SystemExit of that, and of nothing
            # else while it does not stand alone.
            return 0
        except Exception as error:
            # Native code turns an interrupt into an error of its own, such as ImportError: initialization failed.
            return _interrupted(arguments) if interrupts.received else _failed(error, arguments)
    return outcome if isinstance(outcome, int) else 0


if __name__ == "__main__":
    sys.exit(main())
