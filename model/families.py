"""The kinds of models: a configuration's type decides the model's. Level 1."""

from __future__ import annotations

from hstu_compile.model.config import RetrievalConfig
from hstu_compile.model.ranking import RankingModel
from hstu_compile.model.ranking_config import RankingConfig
from hstu_compile.model.retrieval import RetrievalModel

ModelConfig = RetrievalConfig | RankingConfig
HstuModel = RetrievalModel | RankingModel


def model_from_config(config: ModelConfig) -> HstuModel:
    """A model with random weights."""
    return RankingModel(config) if isinstance(config, RankingConfig) else RetrievalModel(config)
