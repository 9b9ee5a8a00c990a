"""The kinds of models: a configuration's type decides the model's. Level 1."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hstu_compile.model.config import RetrievalConfig
from hstu_compile.model.ranking import RankingModel
from hstu_compile.model.ranking_config import RankingConfig
from hstu_compile.model.retrieval import RetrievalModel

ModelConfig = RetrievalConfig | RankingConfig
HstuModel = RetrievalModel | RankingModel


def model_from_config(config: ModelConfig) -> HstuModel:
    """A model with random weights."""
    return RankingModel(config) if isinstance(config, RankingConfig) else RetrievalModel(config)


def model_from_state(config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> HstuModel:
    """The model with these weights, in evaluation mode, cast to `dtype`.

    A weight that keeps its type is no copy: the model and `state` share it, and neither is to be changed in place.

    Args:
        config: of the model.
        state: every parameter by name.
        dtype: of the model.
    """
    # Random weights would only be thrown away: for a large catalogue they take long to draw, and as much memory again.
    with torch.device("meta"):
        model = model_from_config(config)
    model.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, assign=True)
    model.eval().requires_grad_(False)
    return model.cast(dtype)
