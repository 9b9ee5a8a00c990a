"""What an incremental retrieval model takes and gives, as a bundle's manifest records it. Level 3; no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from hstu_compile.errors import BundleError
from hstu_compile.runtime._manifest_entry import is_count, is_sha256, with_names
from hstu_compile.runtime.ranking_spec import CacheRule, KvDtype

_SIZES = (
    *("num_items", "max_seq_len", "max_batch", "max_append"),
    *("num_layers", "num_heads", "attention_dim", "linear_dim"),
)


@dataclasses.dataclass(frozen=True)
class RetrievalSpec:
    """The manifest's `retrieval` entry, of a bundle built with --incremental.

    Attributes:
        num_items: largest item id; 0 is padding.
        num_ratings: rows of the rating table; 0 for a model without ratings.
        top_k: items listed for each user; 0 without a list.
        max_seq_len: most events of one user.
        max_batch: most users in one pass.
        max_append: most new events of one user in one `append` pass.
        has_time_bias: whether attention reads the time between events, those of cached ones too.
        num_layers: layers with cached keys and values.
        num_heads: heads of a layer.
        attention_dim: per-head size of a key.
        linear_dim: per-head size of a value.
        kv_dtype: type of cached keys and values.
        cache_rule: "prefix": the rows of a history are those of any longer one that begins with it, but for its last
            row, which knows when it was asked for. There is no session under another rule.
        model_version: sha256 over the model's files; cached keys and values of another version are refused.
    """

    num_items: int
    num_ratings: int
    top_k: int
    max_seq_len: int
    max_batch: int
    max_append: int
    has_time_bias: bool
    num_layers: int
    num_heads: int
    attention_dim: int
    linear_dim: int
    kv_dtype: KvDtype
    cache_rule: CacheRule
    model_version: str

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ValueError("; ".join(problems))

    def _problems(self) -> list[str]:
        sizes = {name: getattr(self, name) for name in _SIZES}
        problems = [f"{name} is {size!r}, not a positive integer" for name, size in sizes.items() if not is_count(size)]
        for name in ("num_ratings", "top_k"):
            if not is_count(getattr(self, name), least=0):
                problems.append(f"{name} is {getattr(self, name)!r}, not an integer >= 0")
        if not problems and self.max_append >= self.max_seq_len:
            problems.append(f"max_append {self.max_append} leaves no cached event of {self.max_seq_len}")
        flag: object = self.has_time_bias
        if not isinstance(flag, bool):
            problems.append(f"has_time_bias is {flag!r}, neither true nor false")
        if self.kv_dtype not in get_args(KvDtype):
            problems.append(f"kv_dtype is {self.kv_dtype!r}, not one of {', '.join(get_args(KvDtype))}")
        if self.cache_rule != "prefix":
            problems.append(f"cache_rule is {self.cache_rule!r}; only under 'prefix' is a history encoded in parts")
        if not is_sha256(self.model_version):
            problems.append(f"model_version is {self.model_version!r}, not a sha256 in hexadecimal")
        return problems

    @property
    def event_names(self) -> tuple[str, ...]:
        """Features with one value per event."""
        return ("item_ids", "timestamps", *(("ratings",) if self.num_ratings else ()))

    @property
    def cached_facts(self) -> dict[str, str]:
        """What `append` has to be told of cached events: input name to the feature."""
        facts = {"cached_timestamps": "timestamps"} if self.has_time_bias else {}
        return facts | ({"cached_item_ids": "item_ids"} if self.top_k else {})

    def cached_names(self) -> list[str]:
        """k_0, v_0, k_1, ...: outputs of `prefill` and inputs of `append`; its outputs have `new_` in front."""
        return [f"{side}_{layer}" for layer in range(self.num_layers) for side in "kv"]

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_manifest` reads it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_manifest(cls, entry: Mapping[str, Any]) -> RetrievalSpec:
        """Read a manifest's `retrieval` entry.

        Raises:
            BundleError: HSTU-E803, naming everything that is absent, unknown or illegal.
        """
        try:
            return cls(**with_names(entry, cls))
        except (ValueError, TypeError, AttributeError) as error:
            raise BundleError(
                "HSTU-E803",
                "the manifest's retrieval entry cannot be used",
                str(error),
                "build the bundle again with this version of hstu-compile",
            ) from error
