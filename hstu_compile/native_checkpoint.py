"""Write a model in hstu-compile's own checkpoint format, `native`. Level 2.

The format is for models that were trained elsewhere: docs/native-checkpoints.md describes every tensor and field.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from hstu_compile.files import whole_file, writing_to
from hstu_compile.model.dialects import NATIVE_FORMAT
from hstu_compile.model.families import HstuModel


def save_checkpoint(model: HstuModel, path: str | os.PathLike[str]) -> None:
    """Write weights and configuration to one file that `hstu-compile build` reads without further options.

    The file is whole or it is not there; one that was there is replaced. Missing folders above it are made.

    Args:
        model: from `model_from_config`, with the trained weights in it (`load_state_dict` checks names and shapes).
        path: the file, by convention `.pt`.

    Raises:
        BundleError: HSTU-E802, if the file cannot be written.
    """
    checkpoint = {"format": NATIVE_FORMAT, "config": model.config.to_dict(), "state_dict": model.state_dict()}
    path = Path(path)
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        torch.save(checkpoint, file)
