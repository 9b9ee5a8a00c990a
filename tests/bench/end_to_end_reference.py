"""What the end-to-end benchmark's answers are compared with: float64 answers of our eager model, and how.

`Reference` needs NumPy alone: both Pythons of the GPU machine judge by it. `make_reference` needs torch.
The model of the retrieval cases is in end_to_end_retrieval_reference.py.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from end_to_end_workload import PACKED, AnyCase, Case, packed_arrays
from m_falcon_workload import Sizes
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

#: An answer may be as wrong as twice plain PyTorch in the same type, in its worst element and on average.
EAGER_FACTOR = 2.0
#: A reference whose worst bound is more of the answers' spread than this would let wrong answers pass.
LARGEST_BOUND = 0.25

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Reference:
    """float64 answers of one batch, and what counts as agreement with them.

    Attributes:
        answers: logits [T] float64, candidates user by user; of retrieval, user embeddings [B, D] float64.
        max_eager: largest error of plain PyTorch in the case's type, over the answers' standard deviation.
        rms_eager: root of its mean squared error, likewise.
    """

    answers: NDArray[np.float64]
    max_eager: float
    rms_eager: float

    def errors(self, actual: NDArray[Any]) -> tuple[float, float]:
        """Largest and root mean squared error over the spread; infinite for another shape or what is not finite."""
        return errors_of(actual, self.answers)

    def judged(self, actual: NDArray[Any]) -> Row:
        """max_err, err_bound, rms_err, rms_bound, and status "ok" or "wrong result"."""
        largest, rms = self.errors(actual)
        bounds = EAGER_FACTOR * self.max_eager, EAGER_FACTOR * self.rms_eager
        status = "ok" if largest <= bounds[0] and rms <= bounds[1] else "wrong result"
        return {
            "status": status,
            "max_err": largest,
            "err_bound": bounds[0],
            "rms_err": rms,
            "rms_bound": bounds[1],
        }

    def save(self, path: Path) -> None:
        """Write it for the other processes, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".partial.npz")
        np.savez(aside, answers=self.answers, eager=np.array([self.max_eager, self.rms_eager]))
        aside.replace(path)

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read what `save` wrote."""
        with np.load(path) as stored:
            return cls(stored["answers"], *map(float, stored["eager"]))


def errors_of(actual: NDArray[Any], exact: NDArray[np.float64]) -> tuple[float, float]:
    """See `Reference.errors`."""
    if actual.shape != exact.shape or not np.isfinite(actual).all():
        return float("inf"), float("inf")
    off = np.abs(actual.astype(np.float64) - exact) / float(np.std(exact))
    return float(off.max(initial=0.0)), float(np.sqrt(np.mean(off**2)))


def reference_path(parts: Path, case: AnyCase) -> Path:
    """Where a case's reference lies."""
    return parts / "references" / f"{case.reference}.npz"


class AnswersTwice(Protocol):
    """A model that answers a case in float64 and in the case's own type, without a kernel of anybody."""

    def exact(self, case: Any) -> NDArray[np.float64]:
        """In float64."""

    def rounded(self, case: Any) -> NDArray[np.float32]:
        """In the case's type."""


class ReferenceModel:
    """The ranking model: ours in float64, and plain PyTorch in the half types, both without a kernel of anybody.

    Args:
        sizes: of the model.
        device: where it runs.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        import torch
        from m_falcon_prepare import save_checkpoint

        from hstu_compile.checkpoint import config_from_file, model_from_spec, spec_from_checkpoint
        from hstu_compile.model.ranking import RankingModel

        self.sizes, self.device = sizes, device
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder), sizes)
            spec = spec_from_checkpoint(Path(folder, "ckpt.pt"), config_from_file(Path(folder, "config.json")))
        model = model_from_spec(spec, torch.float64)
        assert isinstance(model, RankingModel)
        self._model = model.to(device)

    def _features(self, case: Case) -> dict[str, torch.Tensor]:
        import torch

        arrays = packed_arrays(case, self.sizes)
        return {name: torch.from_numpy(values).to(self.device) for name, values in arrays.items()}

    def exact(self, case: Case) -> NDArray[np.float64]:
        """[T] float64 logits of the packed forward; in float64 the model never runs a kernel of ours."""
        import torch

        with torch.inference_mode():
            logits: NDArray[np.float64] = self._model.packed(self._features(case)).logits[:, 0].cpu().numpy()
        return logits

    def rounded(self, case: Case) -> NDArray[np.float32]:
        """[T] logits of plain operators in the case's type; attention sums in float32 and rounds once."""
        import torch
        from end_to_end_attention import PLAIN, PlainProvider
        from end_to_end_model import PlainModel
        from m_falcon_workload import state_dict

        state = {key: torch.from_numpy(values) for key, values in state_dict(self.sizes).items()}
        packed = dataclasses.replace(case, mode=PACKED, is_pruned=False)
        plain = PlainProvider()
        model = PlainModel(
            state, self.sizes, packed, torch_dtype(case), PLAIN, None, attend=lambda *values: plain(*values[:-1])
        )
        with torch.inference_mode():
            logits: NDArray[np.float32] = model.to(self.device)(self._features(case)).float().cpu().numpy()
        return logits


def torch_dtype(case: AnyCase) -> torch.dtype:
    """Of a case."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}[case.dtype]


def make_reference(case: AnyCase, model: AnswersTwice) -> Reference:
    """Answer a case in float64, and in its own type to know what that type's rounding costs.

    Raises:
        ValueError: if that rounding is so large that wrong answers would pass.
    """
    exact = model.exact(case)
    largest, rms = errors_of(model.rounded(case), exact)
    if not 0 < EAGER_FACTOR * largest <= LARGEST_BOUND:
        raise ValueError(
            f"{case.reference}: plain PyTorch in {case.dtype} is off by {largest:.3g} of the answers' spread; more "
            f"than {LARGEST_BOUND / EAGER_FACTOR:g}, or none at all, can tell no error"
        )
    return Reference(exact, largest, rms)
