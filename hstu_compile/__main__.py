"""Entry point: runs the CLI and turns every ending into an exit code. Level 6."""

from __future__ import annotations

import json
import signal
import sys
import traceback
from types import FrameType

import click

from hstu_compile.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_USAGE, HstuCompileError, UsageError

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


def _terminate(signum: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds like Ctrl-C, so that temporary folders are removed."""
    raise KeyboardInterrupt


def _refuse(error: HstuCompileError, arguments: list[str]) -> int:
    if "--json" in arguments:
        click.echo(json.dumps({"error": error.to_dict()}, indent=1))
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


def _bug() -> int:
    traceback.print_exc()
    click.echo("This is a bug in hstu-compile; please report it with the output of `hstu-compile env`.", err=True)
    return EXIT_INTERNAL


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or the code of the error class; 130 when interrupted; 70 for a bug of ours.
    """
    from hstu_compile.cli import cli

    arguments = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, _terminate)
    try:
        outcome = cli.main(args=arguments, prog_name="hstu-compile", standalone_mode=False)
    except HstuCompileError as error:
        return _refuse(error, arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXTRAS:
            return _bug()
        return _refuse(_missing(package), arguments)
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; nothing was left behind", err=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 0
    except Exception:
        return _bug()
    return outcome if isinstance(outcome, int) else 0


if __name__ == "__main__":
    sys.exit(main())
