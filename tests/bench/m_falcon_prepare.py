"""Prepares the M-FALCON benchmark, without a GPU.

  m_falcon_prepare.py --checkpoint DIR       DIR/ckpt.pt and DIR/config.json, for `hstu-compile build`
  m_falcon_prepare.py --meta REPO --job DIR  DIR/meta: what the peers need of Meta's generative-recommenders

REPO is a checkout or a bare clone. Its files are copied unmodified, with their licence and commit; none is kept here.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

from m_falcon_workload import DLRM_V3, Sizes, checkpoint_config, state_dict

#: Folders and files of Meta's repository; of a folder, the Python files in it and not those below.
META_FILES = (
    "LICENSE",
    "generative_recommenders/__init__.py",
    "generative_recommenders/common.py",
    "generative_recommenders/modules",
    "generative_recommenders/ops",
    "generative_recommenders/ops/pytorch",
    "generative_recommenders/ops/triton",
)
#: Parameters are exact in float16, these are not.
_BUFFERS = ("_combined_action_weights", "_period_units", "_units_per_period")


def save_checkpoint(folder: Path, sizes: Sizes) -> None:
    """Write ckpt.pt as Meta's trainer lays it out, parameters in float16, which holds them exactly, and config.json."""
    import torch

    state = {}
    for key, values in state_dict(sizes).items():
        tensor = torch.from_numpy(values)
        state[key] = tensor if key.endswith(_BUFFERS) else tensor.half()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model_state_dict": state}, folder / "ckpt.pt")
    config = json.dumps(checkpoint_config(sizes), indent=1) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")


def _git(repository: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(repository), *arguments], check=True, capture_output=True).stdout


def copy_meta(repository: Path, target: Path) -> int:
    """Take the needed files of HEAD; returns their size in bytes."""
    wanted = [path for path in META_FILES if "." in path or path == "LICENSE"]
    folders = {path for path in META_FILES if path not in wanted}
    archive = _git(repository, "archive", "--format=tar", "HEAD", *META_FILES)
    size = 0
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files.getmembers():
            parent, _, name = member.name.rpartition("/")
            content = files.extractfile(member)
            if content is None or not (member.name in wanted or (parent in folders and name.endswith(".py"))):
                continue
            path = target / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
            size += member.size
    (target / "COMMIT").write_bytes(_git(repository, "rev-parse", "HEAD"))
    return size


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR")
    parser.add_argument("--meta", type=Path, metavar="REPO")
    parser.add_argument("--job", type=Path, metavar="DIR", help="the job folder of tests/gpu/prepare_job.py")
    arguments = parser.parse_args(argv)
    if arguments.checkpoint is None and arguments.meta is None:
        parser.error("nothing to do: give --checkpoint, or --meta and --job")
    if (arguments.meta is None) != (arguments.job is None):
        parser.error("--meta and --job go together")
    if arguments.checkpoint is not None:
        save_checkpoint(arguments.checkpoint, DLRM_V3)
        print(f"{arguments.checkpoint}: {DLRM_V3.name}")
    if arguments.meta is not None:
        size = copy_meta(arguments.meta, arguments.job / "meta")
        print(f"{arguments.job / 'meta'}: {size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
