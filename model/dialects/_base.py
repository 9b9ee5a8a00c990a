"""The interface of a checkpoint family."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from torch import Tensor

from hstu_compile.model.families import ModelConfig

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Problem = Literal["config", "heads", "shape", "unsupported", "keys"]


class DialectError(ValueError):
    """A checkpoint or configuration that the family cannot be read from.

    Attributes:
        problem: which of the documented problems it is.
        fix: what the user can change.
    """

    def __init__(self, problem: Problem, message: str, fix: str) -> None:
        super().__init__(message)
        self.problem, self.fix = problem, fix


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """Where one of our parameters comes from.

    Attributes:
        key: the name in the checkpoint.
        convert: the checkpoint's layout to ours.
        source_shape: the shape in our layout to the one in the checkpoint's.
    """

    key: str
    convert: Callable[[Tensor], Tensor] = lambda tensor: tensor
    source_shape: Callable[[Shape], Shape] = lambda shape: shape


class Dialect(abc.ABC):
    """One checkpoint family."""

    name: str

    @abc.abstractmethod
    def matches(self, keys: Collection[str]) -> bool:
        """Whether a state_dict with these keys (prefix `module.` removed) belongs to the family."""

    @abc.abstractmethod
    def config(self, shapes: Shapes, config: Mapping[str, Any] | None) -> ModelConfig:
        """Our configuration, from the tensors' shapes and the user's configuration.

        Raises:
            DialectError: if something needed is in neither, or the two contradict each other.
        """

    @abc.abstractmethod
    def sources(self, config: ModelConfig) -> dict[str, SourceTensor]:
        """Our parameter names to where they come from."""

    def with_external_embeddings(self, config: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """The user's configuration for a model whose inputs are embedding rows.

        Raises:
            DialectError: if models of the family, or of this configuration, have their tables inside.
        """
        raise DialectError(
            "unsupported",
            f"--embeddings external: a {self.name} model looks its ids up itself",
            "leave --embeddings out; ranking models (dlrm_v3) take embedding rows",
        )

    def constants(self, config: ModelConfig) -> dict[str, Tensor]:
        """Tensors that a checkpoint may hold and that must then be exactly these: constants of the family's code."""
        return {}

    def is_ignored(self, key: str) -> bool:
        """Whether a key carries nothing that inference needs."""
        return False
