"""hstu-compile's own checkpoints: parameters under our names, the configuration inside the file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from hstu_compile.model.config import RetrievalConfig
from hstu_compile.model.dialects._base import Dialect, DialectError, Shapes, SourceTensor
from hstu_compile.model.families import ModelConfig, model_from_config
from hstu_compile.model.ranking_config import RankingConfig

#: What a native file says under "format"; a reader knows these files by it and by their tensors' names.
NATIVE_FORMAT = "hstu-compile/1"


class _Native(Dialect):
    name = "native"

    def matches(self, keys: Collection[str]) -> bool:
        named = {"item_embedding.weight", "position_embedding"}
        return bool(named & set(keys)) and any(key.startswith("layers.0.uvqk") for key in keys)

    def config(self, shapes: Shapes, config: Mapping[str, Any] | None) -> ModelConfig:
        if config is None:
            raise DialectError(
                "config",
                "a native checkpoint carries its configuration under 'config', and this one does not",
                f"save it as {{'format': {NATIVE_FORMAT!r}, 'config': config.to_dict(), 'state_dict': ...}} "
                "or pass that configuration with --config",
            )
        try:
            kind = RankingConfig if isinstance(config, Mapping) and "tasks" in config else RetrievalConfig
            parsed: ModelConfig = kind.from_dict(config)
        except (ValueError, TypeError, OverflowError) as error:
            raise DialectError("config", str(error), "correct the configuration") from error
        if parsed.num_layers > len(shapes):
            raise DialectError(
                "config",
                f"num_layers is {parsed.num_layers}, and the checkpoint has only {len(shapes)} tensors",
                "correct num_layers",
            )
        return parsed

    def with_external_embeddings(self, config: Mapping[str, Any] | None) -> Mapping[str, Any]:
        if not isinstance(config, Mapping) or "tasks" not in config:
            return super().with_external_embeddings(config)
        return {**config, "external_embeddings": True}

    def is_ignored(self, key: str) -> bool:
        # Of a ranking model whose tables stay outside.
        return key.startswith("tables.")

    def sources(self, config: ModelConfig) -> dict[str, SourceTensor]:
        with torch.device("meta"):  # names alone
            names = list(model_from_config(config).state_dict())
        return {name: SourceTensor(name) for name in names}


NATIVE = _Native()
