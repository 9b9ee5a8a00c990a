"""The end-to-end benchmark's retrieval model as ours: a checkpoint of Meta's, float64 answers, what rounding costs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from end_to_end_reference import torch_dtype
from end_to_end_retrieval_model import PlainRetrievalModel, attend_in_float32
from end_to_end_retrieval_workload import (
    RetrievalCase,
    RetrievalSizes,
    retrieval_arrays,
    retrieval_config,
    retrieval_state_dict,
)
from numpy.typing import NDArray

from hstu_compile.checkpoint import config_from_file, model_from_spec, spec_from_checkpoint
from hstu_compile.model.retrieval import RetrievalModel


def save_retrieval_checkpoint(folder: Path, sizes: RetrievalSizes) -> None:
    """Write ckpt.pt as Meta's trainer lays it out, parameters in float16, which holds them exactly, and config.json."""
    state = {key: torch.from_numpy(values).half() for key, values in retrieval_state_dict(sizes).items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model_state_dict": state}, folder / "ckpt.pt")
    config = json.dumps(retrieval_config(sizes), indent=1) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")


class RetrievalReferenceModel:
    """The benchmark's model: ours in float64, and plain PyTorch in the half types, both without a kernel of anybody.

    Args:
        sizes: of the model.
        device: where it runs.
    """

    def __init__(self, sizes: RetrievalSizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        with tempfile.TemporaryDirectory() as folder:
            save_retrieval_checkpoint(Path(folder), sizes)
            spec = spec_from_checkpoint(Path(folder, "ckpt.pt"), config_from_file(Path(folder, "config.json")))
            # Half, which holds them exactly.
            self._state = torch.load(Path(folder, "ckpt.pt"), weights_only=True)["model_state_dict"]
        model = model_from_spec(spec, torch.float64)
        assert isinstance(model, RetrievalModel)
        self._model = model.to(device)

    def _features(self, case: RetrievalCase) -> dict[str, torch.Tensor]:
        arrays = retrieval_arrays(case, self.sizes)
        return {name: torch.from_numpy(values).to(self.device) for name, values in arrays.items()}

    def exact(self, case: RetrievalCase) -> NDArray[np.float64]:
        """[B, D] float64; in float64 the model never runs a kernel of ours."""
        with torch.inference_mode():
            vectors: NDArray[np.float64] = self._model(**self._features(case)).cpu().numpy()
        return vectors

    def rounded(self, case: RetrievalCase) -> NDArray[np.float32]:
        """[B, D] of plain operators in the case's type; attention sums in float32 and rounds once."""
        model = PlainRetrievalModel(self._state, self.sizes, case, torch_dtype(case), attend=attend_in_float32)
        with torch.inference_mode():
            vectors: NDArray[np.float32] = model.to(self.device)(self._features(case)).cpu().numpy()
        return vectors
