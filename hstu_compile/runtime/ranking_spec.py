"""What a ranking model takes and gives, as a bundle's manifest records it. Level 3; no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from hstu_compile.errors import BundleError
from hstu_compile.graph_names import is_reserved
from hstu_compile.runtime._manifest_entry import is_count, is_sha256, with_names

CacheRule = Literal["request", "prefix"]
KvDtype = Literal["float32", "float16", "bfloat16"]
RowDtype = Literal["float32", "float16"]

_SIZES = (
    *("max_history_len", "max_candidates", "max_batch", "micro_batch"),
    *("num_layers", "num_heads", "attention_dim", "linear_dim"),
)


@dataclasses.dataclass(frozen=True)
class IdFeature:
    """A feature that is looked up in an embedding table.

    Attributes:
        name: graph input.
        table_size: rows of its table; legal ids are 0 .. table_size - 1.
        external_dim: None if the table is inside the graph and the input holds ids [n] int32; otherwise the input holds
            rows [n, external_dim] that the caller looked up.
    """

    name: str
    table_size: int
    external_dim: int | None = None


@dataclasses.dataclass(frozen=True)
class ContextualFeature(IdFeature):
    """A feature of the user: `max_length` tokens before the history.

    Attributes:
        max_length: values of one user; a negative id is absent.
        min_history_len: with fewer events the values are ignored; 0 for never.
    """

    max_length: int = 1
    min_history_len: int = 0


@dataclasses.dataclass(frozen=True)
class RankingSpec:
    """The manifest's `ranking` entry.

    Attributes:
        history_ids: id features of an event; at least one.
        history_time: feature with an event's time, int64 seconds.
        history_action: feature with an event's action bits, int32; None for a model without actions.
        contextual: features of the user, in token order.
        candidate_ids: id features of a candidate; at least one.
        candidate_time: feature with a candidate's query time, int64 seconds.
        row_dtype: type of embedding rows that the caller looks up.
        tasks: names of the columns of `preds` and `logits`.
        max_history_len: most events of one user.
        max_candidates: most candidates of one user in one `packed` pass.
        max_batch: most users in one pass.
        micro_batch: most candidates, of all users together, in one `score` pass.
        scaling: the divisor after SiLU; "batch" for Meta's longest history + most candidates + contextual tokens.
        counts_candidates: whether candidates count towards `min_history_len`, as Meta's do.
        num_layers: layers with cached keys and values.
        num_heads: heads of a layer.
        attention_dim: per-head size of a key.
        linear_dim: per-head size of a value.
        kv_dtype: type of cached keys and values.
        cache_rule: what a cached history depends on. "request": everything the request says but its candidates' ids,
            because positions and time buckets are anchored at the query. "prefix": not on the query's time.
        model_version: sha256 over the model's files; cached keys and values of another version are refused.
    """

    history_ids: tuple[IdFeature, ...]
    history_time: str
    history_action: str | None
    contextual: tuple[ContextualFeature, ...]
    candidate_ids: tuple[IdFeature, ...]
    candidate_time: str
    row_dtype: RowDtype
    tasks: tuple[str, ...]
    max_history_len: int
    max_candidates: int
    max_batch: int
    micro_batch: int
    scaling: float | Literal["batch"]
    counts_candidates: bool
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
        problems = []
        if not self.history_ids or not self.candidate_ids:
            problems.append("history and candidates need at least one id feature each")
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            problems.append(f"tasks {list(self.tasks)} must be one or more different names")
        names = [*self.history_names, *self.contextual_names, *self.candidate_names]
        if len(set(names)) != len(names) or not all(names):
            problems.append(f"feature names {names} must be different and not empty")
        if clash := sorted(name for name in names if is_reserved(name)):
            problems.append(f"{', '.join(clash)} cannot name a feature: it names an input or output of every graph")
        sizes = {name: getattr(self, name) for name in _SIZES}
        for feature in (*self.history_ids, *self.contextual, *self.candidate_ids):
            sizes[f"table_size of {feature.name}"] = feature.table_size
            if feature.external_dim is not None:
                sizes[f"external_dim of {feature.name}"] = feature.external_dim
        sizes |= {f"max_length of {feature.name}": feature.max_length for feature in self.contextual}
        problems += [
            f"{name} is {size!r}, not a positive integer" for name, size in sizes.items() if not is_count(size)
        ]
        for feature in self.contextual:
            if feature.min_history_len != 0 and not is_count(feature.min_history_len):
                problems.append(
                    f"min_history_len of {feature.name} is {feature.min_history_len!r}, not an integer >= 0"
                )
        if self.scaling != "batch" and not (_is_number(self.scaling) and self.scaling > 0):
            problems.append(f"scaling is {self.scaling!r}, neither 'batch' nor a positive number")
        for name, choices in (("row_dtype", RowDtype), ("kv_dtype", KvDtype), ("cache_rule", CacheRule)):
            allowed = get_args(choices)
            if getattr(self, name) not in allowed:
                problems.append(f"{name} is {getattr(self, name)!r}, not one of {', '.join(allowed)}")
        if not is_sha256(self.model_version):
            problems.append(f"model_version is {self.model_version!r}, not a sha256 in hexadecimal")
        return problems

    @property
    def history_names(self) -> tuple[str, ...]:
        """Features with one value per event."""
        action = () if self.history_action is None else (self.history_action,)
        return (*(feature.name for feature in self.history_ids), self.history_time, *action)

    @property
    def contextual_names(self) -> tuple[str, ...]:
        """Features with `max_length` values per user."""
        return tuple(feature.name for feature in self.contextual)

    @property
    def candidate_names(self) -> tuple[str, ...]:
        """Features with one value per candidate."""
        return (*(feature.name for feature in self.candidate_ids), self.candidate_time)

    @property
    def contextual_len(self) -> int:
        """C: tokens before each history."""
        return sum(feature.max_length for feature in self.contextual)

    @property
    def has_minimum(self) -> bool:
        """Whether `prefill` must be told how many candidates there are: they count towards a minimum length."""
        return self.counts_candidates and any(feature.min_history_len for feature in self.contextual)

    def cached_names(self) -> list[str]:
        """k_0, v_0, k_1, ...: outputs of `prefill` and inputs of `score`."""
        return [f"{side}_{layer}" for layer in range(self.num_layers) for side in "kv"]

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_manifest` reads it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_manifest(cls, entry: Mapping[str, Any]) -> RankingSpec:
        """Read a manifest's `ranking` entry.

        Raises:
            BundleError: HSTU-E803, naming everything that is absent, unknown or illegal.
        """
        try:
            values = with_names(entry, cls)
            return cls(
                **{
                    **values,
                    "history_ids": _features(values["history_ids"], IdFeature),
                    "contextual": _features(values["contextual"], ContextualFeature),
                    "candidate_ids": _features(values["candidate_ids"], IdFeature),
                    "tasks": tuple(str(task) for task in values["tasks"]),
                }
            )
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise BundleError(
                "HSTU-E803",
                "the manifest's ranking entry cannot be used",
                str(error),
                "build the bundle again with this version of hstu-compile",
            ) from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _features(entries: Any, kind: Any) -> tuple[Any, ...]:
    return tuple(kind(**with_names(entry, kind)) for entry in entries)
