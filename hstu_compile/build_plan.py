"""What a build would do, known after reading the checkpoint: limits, backend, graphs. Level 4."""

from __future__ import annotations

import dataclasses
from typing import Any

from hstu_compile.artifacts import CheckpointSpec
from hstu_compile.build_quantization import QuantizationSettings, check_quantization, planned_quantization
from hstu_compile.checkpoint import config_from_file, spec_from_checkpoint
from hstu_compile.config import AttentionSilu, BuildConfig, Limits
from hstu_compile.environment import BackendChoice, choose_backend
from hstu_compile.errors import UsageError
from hstu_compile.fused_plan import FusedPlan, check_attention, fused_plan, requested_backend
from hstu_compile.graph_limits import GraphLimits, whole_cache_rows
from hstu_compile.model.ranking_config import RankingConfig
from hstu_compile.plugin_library import installed_tensorrt_version
from hstu_compile.profiles import ProfileSizes, check_counts, option_text
from hstu_compile.trt_options import EngineOptions


@dataclasses.dataclass(frozen=True)
class BuildPlan:
    """The answer of --dry-run.

    Attributes:
        spec: the checkpoint, its configuration narrowed to the limits.
        limits: of shapes, resolved.
        backend: engine builder and why.
        prune: compute the last layer only for the rows that are read.
        attention_silu: error that the attention kernels' SiLU may have.
        fuse_norms: one operator for each norm and what surrounds it.
        tabulate_towers: look up what towers make of embeddings.
        quantization: products that are quantised, and from which table; None for none.
        fused: segments and kernels of a build with --attention fused; None for any other.
    """

    spec: CheckpointSpec
    limits: Limits
    backend: BackendChoice
    prune: bool = True
    attention_silu: AttentionSilu = "fast"
    fuse_norms: bool = True
    quantization: QuantizationSettings | None = None
    fused: FusedPlan | None = None
    tabulate_towers: bool = False

    @property
    def is_fused(self) -> bool:
        """Whether graphs are cut at their attentions."""
        return self.fused is not None

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the graphs, the one that answers a request by itself first."""
        if not isinstance(self.spec.config, RankingConfig):
            return ("retrieval",) if self.limits.max_append is None else ("retrieval", "prefill", "append")
        return ("packed",) if self.limits.micro_batch is None else ("packed", "prefill", "score")

    def graph_limits(self, graph: str) -> GraphLimits:
        """What one graph is exported for."""
        limits = self.limits
        candidates = {"packed": limits.max_candidates, "score": limits.micro_batch or 0}.get(graph, 0)
        max_append = (limits.max_append or 0) if graph == "append" else 0
        attention = self.spec.config.layer.attention
        widths = attention.num_heads, attention.attention_dim, attention.linear_dim
        cache_rows = whole_cache_rows(*widths) if graph == "score" else 0
        return GraphLimits(graph, limits.max_seq_len, candidates, limits.contextual_len, max_append, cache_rows)

    def sizes(self, graph: str, *, has_kernels: bool = False) -> ProfileSizes:
        """Numbers behind the profile of one graph; see `GraphLimits.sizes`."""
        limits = self.limits
        return self.graph_limits(graph).sizes(
            limits.max_batch, limits.opt_batch, None, limits.opt_seq_len, has_kernels=has_kernels
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "checkpoint": {"file": self.spec.path.name, "sha256": self.spec.sha256, "dialect": self.spec.dialect},
            "config": self.spec.config.to_dict(),
            "limits": dataclasses.asdict(self.limits),
            "backend": dataclasses.asdict(self.backend),
            "graphs": list(self.graphs),
            "prune_last_layer": self.prune,
            "attention_silu": self.attention_silu,
            "fuse_norms": self.fuse_norms,
            "tabulate_towers": self.tabulate_towers,
            "quantization": self.quantization.to_dict() if self.quantization is not None else None,
            "fused": self.fused.to_dict() if self.fused is not None else None,
            "attention_nodes": self.spec.config.num_layers,
            "parameters": sum(tensor.numel() for tensor in self.spec.state_dict.values()),
            "ignored_keys": list(self.spec.ignored_keys),
        }


def plan_build(config: BuildConfig) -> BuildPlan:
    """Read the checkpoint and resolve every limit and the backend.

    Raises:
        CheckpointError, UnsupportedModelError: see `spec_from_checkpoint`.
        UsageError: HSTU-E901, if a limit contradicts the model or another limit, or the backend --attention; see
            `planned_quantization` for those of a quantised build.
        CalibrationError: HSTU-E812 to E814, if the calibration table is not one of this checkpoint.
        EngineError: HSTU-E401, if the requested backend is absent; E405, if a batch could have more rows than offsets
            can count.
    """
    _check_numbers(config)
    check_attention(config)
    check_quantization(config)
    _check_towers(config)
    user_config = config_from_file(config.config_file) if config.config_file is not None else None
    external = config.embeddings == "external"
    spec = spec_from_checkpoint(config.checkpoint, user_config, config.dialect, external_embeddings=external)
    model, silu = spec.config, config.attention_silu
    if isinstance(model, RankingConfig):
        if config.max_append is not None:
            raise _not_incremental(
                config.max_append,
                spec.dialect,
                "positions count back from the query and time buckets are anchored at it, so a new event changes the "
                "keys and values of every older one",
                "leave --incremental out; --m-falcon micro-batch=N reuses a history among one request's candidates",
            )
        limits = _ranking_limits(config, model)
        narrowed = model.with_limits(limits.max_seq_len, limits.max_candidates)
        prune, backend = config.prune is not False, choose_backend(requested_backend(config))
        quantization = planned_quantization(config, spec, backend)
        ranking = dataclasses.replace(spec, config=narrowed)
        plan = BuildPlan(ranking, limits, backend, prune, silu, config.fuse_norms, quantization)
        tabulate = config.tabulate_towers
        if tabulate is None:
            tabulate = not external and quantization is None
        return _resolved(config, dataclasses.replace(plan, tabulate_towers=tabulate))
    given = {
        "--max-candidates": config.max_candidates,
        "--m-falcon micro-batch=": config.micro_batch,
    }
    for option, value in given.items():
        if value is not None:
            raise _unusable(option, value, "ranking models alone; this checkpoint is a retrieval model")
    if config.tabulate_towers:
        raise UsageError(
            "HSTU-E901",
            "--tabulate-towers cannot be used",
            "this checkpoint is a retrieval model, which has no towers",
            "leave it out",
        )
    if config.max_append is not None and model.later_rows_matter is not None:
        raise _not_incremental(config.max_append, spec.dialect, model.later_rows_matter, "leave --incremental out")
    limits = dataclasses.replace(
        _common_limits(config, model.max_seq_len, "the model's tables"), max_append=config.max_append
    )
    longest = limits.max_seq_len - 1
    append = config.max_append
    _check(
        [
            (limits.top_k <= model.num_items, "--top-k", limits.top_k, f"0 to {model.num_items} items"),
            (append is None or append <= longest, "--incremental max-append=", append, f"1 to {longest} events"),
        ]
    )
    narrowed_retrieval = model.with_max_seq_len(limits.max_seq_len)
    backend = choose_backend(requested_backend(config))
    prune = _prunes_retrieval(backend) if config.prune is None else config.prune
    retrieval = dataclasses.replace(spec, config=narrowed_retrieval)
    quantization = planned_quantization(config, spec, backend)
    return _resolved(config, BuildPlan(retrieval, limits, backend, prune, silu, config.fuse_norms, quantization))


def check_engine_options(plan: BuildPlan, options: EngineOptions) -> None:
    """Refuse options of the engine builder where no engine is built: they would change nothing.

    Raises:
        UsageError: HSTU-E901, naming them.
    """
    if plan.backend.name == "onnx" and (given := options.given()):
        raise UsageError(
            "HSTU-E901",
            f"nothing reads {', '.join(given)}",
            f"they are options of the engine builder, and this build has none ({plan.backend.reason})",
            "leave them out, or build an engine with --backend tensorrt or tensorrt-rtx",
            {"options": list(given), "backend": plan.backend.name},
        )


def _resolved(config: BuildConfig, plan: BuildPlan) -> BuildPlan:
    """The plan with what --attention asks for, when int32 offsets can count the rows of every graph."""
    for graph in plan.graphs:
        plan.sizes(graph)
    if config.attention != "fused":
        return plan
    fused = fused_plan(
        plan.spec.config,
        plan.graphs,
        config.precision,
        plan.attention_silu,
        fuse_norms=plan.fuse_norms,
        tabulate_towers=plan.tabulate_towers,
    )
    reason = "--attention fused" if config.backend == "auto" else plan.backend.reason
    return dataclasses.replace(plan, backend=dataclasses.replace(plan.backend, reason=reason), fused=fused)


def _prunes_retrieval(backend: BackendChoice) -> bool:
    """Whether this builder survives a retrieval graph whose last layer has one row per sequence."""
    version = installed_tensorrt_version() if backend.name == "tensorrt" else None
    return version is None or not version.startswith("8.")


def _common_limits(config: BuildConfig, own_limit: int, of_what: str) -> Limits:
    max_seq_len = config.max_seq_len if config.max_seq_len is not None else own_limit
    limits = Limits(
        max_batch=config.max_batch,
        opt_batch=config.opt_batch if config.opt_batch is not None else max(1, config.max_batch // 8),
        max_seq_len=max_seq_len,
        opt_seq_len=config.opt_seq_len if config.opt_seq_len is not None else max(1, max_seq_len // 2),
        top_k=config.top_k,
    )
    _check(
        [
            (max_seq_len <= own_limit, "--max-seq-len", max_seq_len, f"1 to {own_limit}, {of_what}"),
            (limits.opt_seq_len <= max_seq_len, "--opt-seq-len", limits.opt_seq_len, f"1 to {max_seq_len}"),
            (limits.opt_batch <= limits.max_batch, "--opt-batch", limits.opt_batch, f"1 to {limits.max_batch}"),
        ]
    )
    return limits


def _ranking_limits(config: BuildConfig, model: RankingConfig) -> Limits:
    # Positions are clamped and nothing else is sized by the history: a longer one than in training is legal.
    common = _common_limits(config, max(model.max_history_len, config.max_seq_len or 0), "events")
    limits = dataclasses.replace(
        common,
        max_candidates=config.max_candidates if config.max_candidates is not None else model.max_candidates,
        micro_batch=config.micro_batch,
        contextual_len=model.contextual_len,
    )
    _check(
        [
            (limits.top_k == 0, "--top-k", limits.top_k, "0; a ranking model scores the candidates it is given"),
        ]
    )
    return limits


def _check_numbers(config: BuildConfig) -> None:
    """Before a checkpoint is read, which may take minutes: a number that no model could have is not the default."""
    counts = {
        "--max-batch": config.max_batch,
        "--opt-batch": config.opt_batch,
        "--max-seq-len": config.max_seq_len,
        "--opt-seq-len": config.opt_seq_len,
        "--max-candidates": config.max_candidates,
        "--m-falcon micro-batch=": config.micro_batch,
        "--incremental max-append=": config.max_append,
    }
    check_counts(counts)
    check_counts({"--top-k": config.top_k, "--seed": config.seed}, lowest=0)


def _check_towers(config: BuildConfig) -> None:
    """Refuse tables of towers where there can be none."""
    against = {
        "--embeddings external": (config.embeddings == "external", "the graph has no tables then to make others of"),
        f"--{config.quantization}": (config.quantization is not None, "it quantises the products that tables replace"),
    }
    for option, (given, why) in against.items():
        if config.tabulate_towers and given:
            raise UsageError(
                "HSTU-E901",
                f"--tabulate-towers and {option} exclude each other",
                why,
                "leave one of them out",
                {"option": option},
            )


def _check(rules: list[tuple[bool, str, object, str]]) -> None:
    for legal, option, value, allowed in rules:
        if not legal:
            raise _unusable(option, value, allowed)


def _not_incremental(max_append: int, dialect: str, why: str, fix: str) -> UsageError:
    return UsageError(
        "HSTU-E904",
        f"--incremental max-append={max_append} cannot be used with this {dialect} model",
        why,
        fix,
        {"max_append": max_append, "dialect": dialect},
    )


def _unusable(option: str, value: object, allowed: str) -> UsageError:
    return UsageError(
        "HSTU-E901",
        f"{option_text(option, value)} cannot be used",
        f"allowed: {allowed}",
        f"pass {option_text(option, 'N')} with an allowed N, or leave it out",
    )
