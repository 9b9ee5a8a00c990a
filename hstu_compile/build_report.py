"""The report and the manifest of a build, from what its stages handed over. Level 5."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import hstu_compile
from hstu_compile.artifacts import EngineArtifact, FusedEngines, Precision, Profile
from hstu_compile.build_plan import BuildPlan
from hstu_compile.environment import collect_environment
from hstu_compile.graph_facts import graph_facts
from hstu_compile.model.config import RetrievalConfig
from hstu_compile.model.ranking_config import RankingConfig
from hstu_compile.op_schema import attention_contract
from hstu_compile.plan_kernels import joined_kernels
from hstu_compile.plugin_library import KernelsLibrary, PluginLibrary
from hstu_compile.polygraphy_files import PolygraphyCheck
from hstu_compile.quality import QualityTable
from hstu_compile.report import SCHEMA_VERSION
from hstu_compile.runtime.ranking_spec import ContextualFeature, IdFeature, RankingSpec
from hstu_compile.runtime.retrieval_spec import RetrievalSpec
from hstu_compile.runtime.schedule_facts import schedule_facts
from hstu_compile.session_check import Reference, VerifyReport
from hstu_compile.table_files import table_names
from hstu_compile.verify import BuiltGraph

_KV_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class GraphOutcome:
    """One graph of a build, to the end.

    Attributes:
        built: the graph and its engine.
        reference: what it was compared with; None without verification.
        polygraphy: the same comparison by Polygraphy; None without verification.
    """

    built: BuiltGraph
    reference: Reference | None = None
    polygraphy: PolygraphyCheck | None = None


@dataclasses.dataclass(frozen=True)
class BuildOutcome:
    """Everything that the report and the manifest speak of.

    Attributes:
        plan: of the build.
        graphs: the one that answers a request by itself first.
        plugin: the plugin library, or None.
        verification: of all graphs; None if it was not wanted.
        stages: name, seconds and summary of each.
        session: what the graphs were compared with as a session; None without such a comparison.
        quantization_cost: what the quantisation itself changes in each output; None where it was not measured.
        quality: on labelled requests; None where there were none.
        kernels: library of the kernels between the engines of graphs that were cut; None for any other build.
        tables: sha256 of each file that large tables of the graphs are in.
    """

    plan: BuildPlan
    graphs: tuple[GraphOutcome, ...]
    plugin: PluginLibrary | None
    verification: VerifyReport | None
    stages: Sequence[dict[str, Any]]
    session: Reference | None = None
    quantization_cost: dict[str, float] | None = None
    quality: QualityTable | None = None
    kernels: KernelsLibrary | None = None
    tables: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def status(self) -> str:
        """PASS, FAIL or NOT VERIFIED."""
        if self.quality is not None and not self.quality.is_within:
            return "FAIL"
        if self.verification is None:
            return "NOT VERIFIED"
        refused = any(graph.polygraphy is not None and graph.polygraphy.exit_code != 0 for graph in self.graphs)
        return "FAIL" if refused else self.verification.status

    @property
    def main(self) -> BuiltGraph:
        """The graph that answers a request by itself."""
        return self.graphs[0].built


def engine_dict(engine: EngineArtifact) -> dict[str, Any]:
    """Facts about an engine, without the engine."""
    facts = dataclasses.asdict(dataclasses.replace(engine, plan=b""))
    del facts["plan"]
    return {**facts, "bytes": len(engine.plan)}


def build_report(outcome: BuildOutcome, bundle_name: str) -> dict[str, Any]:
    """report.json, but for the list of files."""
    plan, main = outcome.plan, outcome.main
    spec, verification = plan.spec, outcome.verification
    engine = main.engines[0] if main.engines else None
    return {
        "schema": SCHEMA_VERSION,
        "status": outcome.status,
        "title": spec.path.name,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hstu_compile": hstu_compile.__version__,
        "checkpoint": {
            "file": spec.path.name,
            "sha256": spec.sha256,
            "dialect": spec.dialect,
            "config": spec.config.to_dict(),
        },
        "precision": main.graph.precision,
        "attention": "auto" if plan.fused is None else "fused",
        "attention_silu": plan.attention_silu,
        "fuse_norms": plan.fuse_norms,
        "tabulate_towers": plan.tabulate_towers,
        "quantization": None
        if plan.quantization is None
        else {**plan.quantization.to_dict(), "cost": outcome.quantization_cost},
        "backend": {
            "name": plan.backend.name,
            "reason": plan.backend.reason,
            "version": engine.version if engine else None,
            "compute_capabilities": list(engine.compute_capabilities) if engine else [],
        },
        "stages": list(outcome.stages),
        "graphs": [_graph_dict(graph.built) for graph in outcome.graphs],
        "verification": None
        if verification is None
        else {
            **verification.to_dict(),
            "polygraphy": [
                {"artifact": graph.built.onnx_file, **graph.polygraphy.to_dict()}
                for graph in outcome.graphs
                if graph.polygraphy is not None
            ],
        },
        "metrics": None if outcome.quality is None else outcome.quality.to_dict(),
        "timings": [
            {**run.timing, "name": f"{run.artifact}, {run.timing['name']}"} for run in verification.runs if run.timing
        ]
        if verification
        else [],
        "environment": collect_environment(),
        "files": [],
        "commands": [
            {"purpose": "check the files and repeat the verification", "command": f"hstu-compile verify {bundle_name}"},
            {"purpose": "list inputs and outputs", "command": f"hstu-compile inspect {bundle_name}"},
            *(
                {
                    "purpose": f"repeat the check of {graph.built.onnx_file} without hstu-compile",
                    "command": check.command,
                }
                for graph in outcome.graphs
                if (check := graph.polygraphy) is not None
            ),
        ],
    }


def _graph_dict(built: BuiltGraph) -> dict[str, Any]:
    """Facts about one graph: of the ONNX file, of what the passes did to it, and of its engine."""
    graph = built.graph
    return {
        "name": graph.name,
        "file": built.onnx_file,
        "bytes": graph.model.ByteSize(),
        "tables": list(table_names(graph.model)),
        **graph_facts(graph.model),
        "inputs": [dataclasses.asdict(i) for i in graph.inputs],
        "outputs": [dataclasses.asdict(o) for o in graph.outputs],
        "passes": [dataclasses.asdict(record) for record in graph.passes],
        "engine": _engine_dict(built),
        "fused": None if built.fused is None else _fused_dict(built.fused),
    }


def _engine_dict(built: BuiltGraph) -> dict[str, Any] | None:
    """Facts about the graph's engine, or about those of its segments as if they were one."""
    if built.fused is None:
        return None if built.engine is None else {"file": built.engine_file, **engine_dict(built.engine)}
    engines = built.fused.engines
    layers: Counter[str] = Counter()
    for engine in engines:
        layers.update(engine.layers)
    whole = dataclasses.replace(
        engines[0],
        profiles=(built.fused.profile,),
        layers=dict(layers),
        kernels=joined_kernels(engines),
        messages=tuple(dict.fromkeys(line for engine in engines for line in engine.messages)),
        seconds=sum(engine.seconds for engine in engines),
    )
    nbytes = sum(len(engine.plan) for engine in engines)
    return {"file": built.fused.schedule_file, **engine_dict(whole), "bytes": nbytes}


def _fused_dict(fused: FusedEngines) -> dict[str, Any]:
    """Segments, what runs between them, and what crosses."""
    return {
        "schedule": fused.schedule_file,
        "engines": [
            {"file": name, **engine_dict(engine)}
            for name, engine in zip(fused.engine_files, fused.engines, strict=True)
        ],
        **schedule_facts(fused.cut, fused.profile),
    }


def build_manifest(outcome: BuildOutcome, report: dict[str, Any]) -> dict[str, Any]:
    """manifest.json, but for format version and files."""
    plan, config = outcome.plan, outcome.plan.spec.config
    verification = report["verification"]
    main = _graph_entry(outcome.graphs[0])
    return {
        "hstu_compile": report["hstu_compile"],
        "created": report["created"],
        "status": report["status"],
        "checkpoint": report["checkpoint"],
        "precision": {"requested": report["precision"], "built": report["graphs"][0]["precision_counts"]},
        "quantization": report["quantization"],
        "backend": report["backend"],
        "operator": {
            "name": attention_contract().name,
            "namespace": attention_contract().namespace,
            "version": attention_contract().version,
            "nodes": config.num_layers,
        },
        "inputs": main["inputs"],
        "outputs": main["outputs"],
        "limits": _limits(plan),
        "profiles": main["profiles"],
        "graphs": [_graph_entry(graph) for graph in outcome.graphs],
        "ranking": ranking_spec(plan, outcome.main.graph.precision, _model_version(outcome)).to_dict()
        if isinstance(config, RankingConfig)
        else None,
        "retrieval": None
        if plan.limits.max_append is None
        else retrieval_spec(plan, outcome.main.graph.precision, _model_version(outcome)).to_dict(),
        "versions": report["environment"].get("packages", {}),
        "verification": None
        if verification is None
        else {
            "worst_error": verification["worst_error"],
            "worst_bound": verification["worst_bound"],
            "session": None if outcome.session is None else {"eager_error": outcome.session.eager_error},
        },
        "plugin": _plugin_dict(outcome.plugin),
        "kernels": None if outcome.kernels is None else outcome.kernels.to_dict(),
    }


def _graph_entry(outcome: GraphOutcome) -> dict[str, Any]:
    built, reference = outcome.built, outcome.reference
    return {
        "name": built.graph.name,
        "onnx": built.onnx_file,
        "tables": list(table_names(built.graph.model)),
        "engine": built.engine_file if built.engine is not None else None,
        "fused": None
        if built.fused is None
        else {"schedule": built.fused.schedule_file, "engines": list(built.fused.engine_files)},
        "inputs": [dataclasses.asdict(i) for i in built.graph.inputs],
        "outputs": [dataclasses.asdict(o) for o in built.graph.outputs],
        "profiles": [dataclasses.asdict(profile) for profile in _profiles(built)],
        "verification": None
        if reference is None
        else {
            "primary": reference.primary,
            "feeds": [feed.name for feed in reference.feeds],
            "eager_error": {
                output.name: reference.eager_error[output.name]
                for output in built.graph.outputs
                if output.name in reference.eager_error
            },
            "eager_whole_error": reference.eager_whole_error
            and {
                output.name: reference.eager_whole_error[output.name]
                for output in built.graph.outputs
                if output.name in reference.eager_whole_error
            },
            "polygraphy_arguments": list(outcome.polygraphy.arguments) if outcome.polygraphy else [],
        },
    }


def _profiles(built: BuiltGraph) -> tuple[Profile, ...]:
    """Of the whole graph."""
    if built.fused is not None:
        return (built.fused.profile,)
    return built.engine.profiles if built.engine is not None else ()


def _limits(plan: BuildPlan) -> dict[str, Any]:
    limits, config = plan.limits, plan.spec.config
    common = {"max_batch": limits.max_batch, "max_seq_len": limits.max_seq_len}
    if isinstance(config, RankingConfig):
        return {**common, "max_candidates": limits.max_candidates, "micro_batch": limits.micro_batch}
    return {"num_items": config.num_items, "num_ratings": config.num_ratings, **common}


def _model_version(outcome: BuildOutcome) -> str:
    model = hashlib.sha256()
    for graph in outcome.graphs:
        model.update(graph.built.graph.model.SerializeToString(deterministic=True))
    # A graph says of these tables no more than the name of the file.
    for name, sha256 in sorted(outcome.tables.items()):
        model.update(f"{name} {sha256}\n".encode())
    return model.hexdigest()


def ranking_spec(plan: BuildPlan, precision: Precision, model_version: str) -> RankingSpec:
    """What the ranking runtime is told of the graphs.

    Args:
        plan: of a ranking model's build.
        precision: of the graphs.
        model_version: sha256 by which cached keys and values are told from those of other weights.
    """
    config, limits = plan.spec.config, plan.limits
    assert isinstance(config, RankingConfig)
    rows = {table.name: table.num_rows for table in config.tables}
    external = config.table_dim if config.external_embeddings else None
    attention = config.layer.attention
    return RankingSpec(
        history_ids=tuple(IdFeature(name, rows[table], external) for name, table in config.history_ids.items()),
        history_time=config.history_time_feature,
        history_action=config.action_feature or None,
        contextual=tuple(
            ContextualFeature(each.name, rows[each.table], external, each.max_length, each.min_history_len)
            for each in config.contextual_features
        ),
        candidate_ids=tuple(IdFeature(name, rows[table], external) for name, table in config.candidate_ids.items()),
        candidate_time=config.candidate_time_feature,
        tasks=tuple(task.name for task in config.tasks),
        max_history_len=limits.max_seq_len,
        max_candidates=limits.max_candidates,
        max_batch=limits.max_batch,
        # Without the scoring graph there are no passes; the packed forward takes all candidates at once.
        micro_batch=limits.micro_batch or limits.max_candidates,
        scaling="batch" if config.scaling == "batch" else attention.scaling_seq_len,
        counts_candidates=config.counts_candidates,
        num_layers=config.num_layers,
        num_heads=attention.num_heads,
        attention_dim=attention.attention_dim,
        linear_dim=attention.linear_dim,
        row_dtype="float32",
        kv_dtype=_KV_DTYPES[precision],  # type: ignore[arg-type]
        cache_rule=config.cache_rule,
        model_version=model_version,
    )


def retrieval_spec(plan: BuildPlan, precision: Precision, model_version: str) -> RetrievalSpec:
    """What the retrieval runtime is told of the graphs of a model built with --incremental.

    Args:
        plan: of the build.
        precision: of the graphs.
        model_version: sha256 by which cached keys and values are told from those of other weights.
    """
    config, limits = plan.spec.config, plan.limits
    assert isinstance(config, RetrievalConfig)
    assert limits.max_append is not None
    attention = config.layer.attention
    return RetrievalSpec(
        num_items=config.num_items,
        num_ratings=config.num_ratings,
        top_k=limits.top_k,
        max_seq_len=limits.max_seq_len,
        max_batch=limits.max_batch,
        max_append=limits.max_append,
        has_time_bias=config.has_time_bias,
        num_layers=config.num_layers,
        num_heads=attention.num_heads,
        attention_dim=attention.attention_dim,
        linear_dim=attention.linear_dim,
        kv_dtype=_KV_DTYPES[precision],  # type: ignore[arg-type]
        cache_rule=config.cache_rule,
        model_version=model_version,
    )


def _plugin_dict(plugin: PluginLibrary | None) -> dict[str, Any] | None:
    if plugin is None:
        return None
    return {
        "trt_version": plugin.trt_version,
        "archs": list(plugin.archs),
        "with_ptx": plugin.with_ptx,
        "content_hash": plugin.content_hash,
        "variants": [dataclasses.asdict(variant) for variant in plugin.variants],
        "hopper": plugin.hopper.to_dict(),
    }
