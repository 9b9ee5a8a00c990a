"""Fills the folder for run_quantised.py, on any machine without a GPU: quantised bundles with their references.

The calibration tables are of requests drawn as those of the verification are: what is checked on the GPU is that
engines give the numbers of the reference, not how well these scales recommend.
Usage: python prepare_quantised.py JOB [--models research dlrm] [--kinds int8 fp8]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY)]

from tests.calibrated_models import calibration_table  # noqa: E402

FIXTURES = REPOSITORY.parent / "shared" / "fixtures"
#: Folder of the checkpoint and options of the build. TensorRT 8.5 crashes on a retrieval graph that is pruned.
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "research": ("meta_research_ml100k", ("--no-prune", "--incremental", "max-append=8", "--max-batch", "8")),
    "dlrm": ("meta_dlrm_ml100k", ("--m-falcon", "micro-batch=16", "--max-batch", "8")),
}
KINDS = ("int8", "fp8")


def prepare_quantised(job: Path, model: str, kinds: Sequence[str]) -> None:
    """One bundle without an engine per kind."""
    folder, options = MODELS[model]
    fixture = FIXTURES / folder
    table = job / "quantised" / f"{model}.json"
    table.parent.mkdir(parents=True, exist_ok=True)
    calibration_table(fixture / "ckpt.pt", fixture / "config.json").save(table)
    program = Path(sys.executable).with_name("hstu-compile")
    for kind in kinds:
        bundle = table.with_name(f"{model}-{kind}")
        command = [program, "build", fixture / "ckpt.pt", "--config", fixture / "config.json", f"--{kind}"]
        command += ["--calib", table, "--backend", "onnx", *options, "-o", bundle, "--force"]
        subprocess.run([str(word) for word in command], check=True, stdin=subprocess.DEVNULL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    for model in arguments.models:
        prepare_quantised(arguments.job.resolve(), model, arguments.kinds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
