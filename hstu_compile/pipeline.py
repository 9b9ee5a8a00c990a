"""Checkpoint to bundle. Level 5: the only place that knows the order of the stages.

checkpoint -> model -> export -> rewrite -> engine -> verify -> bundle; each stage hands a frozen artifact to the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import onnx

import hstu_compile
from hstu_compile import bundle as bundles
from hstu_compile.artifacts import TAP_PREFIX, CheckpointSpec, EngineArtifact, Feed, OnnxGraph
from hstu_compile.calibration.batches import retrieval_batches
from hstu_compile.checkpoint import config_from_file, model_from_spec, spec_from_checkpoint
from hstu_compile.config import BuildConfig, Limits
from hstu_compile.engine import engine_from_onnx
from hstu_compile.environment import BackendChoice, choose_backend, collect_environment
from hstu_compile.errors import UsageError
from hstu_compile.export import TORCH_DTYPES, exported_from_model, tensor_specs
from hstu_compile.files import writing_to
from hstu_compile.graph_facts import graph_facts
from hstu_compile.graph_plugin import plugin_request_of
from hstu_compile.op_schema import attention_contract
from hstu_compile.plugin_library import PluginLibrary, build_plugin_library, installed_tensorrt_version
from hstu_compile.polygraphy_files import PolygraphyCheck, run_polygraphy, save_feeds, save_outputs
from hstu_compile.profiles import ProfileSizes, retrieval_profile
from hstu_compile.report import render_report
from hstu_compile.rewrite import apply_passes, export_passes
from hstu_compile.session_check import Outputs, Reference, VerifyReport
from hstu_compile.trt_options import EngineOptions
from hstu_compile.verify import reference_from_spec, verify_artifacts

STAGES = ("checkpoint", "model", "export", "rewrite", "engine", "verify", "bundle")

# Padded attention scores that verification on a CPU may hold at once: 64 MiB per float32 tensor, of about ten.
_MAX_VERIFY_SCORES = 1 << 24


@dataclasses.dataclass(frozen=True)
class StageReport:
    """One finished stage."""

    name: str
    seconds: float
    summary: str


class Listener(Protocol):
    """Hears of the build as it goes."""

    def stage_started(self, index: int, name: str) -> None:
        """Stage `index` (1-based) of len(STAGES) begins."""

    def stage_progress(self, what: str, done: int, total: int) -> None:
        """A long stage moved on."""

    def stage_finished(self, index: int, report: StageReport) -> None:
        """Stage `index` ended."""


class SilentListener:
    """The listener of builds that nobody watches."""

    def stage_started(self, index: int, name: str) -> None:
        """Say nothing."""

    def stage_progress(self, what: str, done: int, total: int) -> None:
        """Say nothing."""

    def stage_finished(self, index: int, report: StageReport) -> None:
        """Say nothing."""


@dataclasses.dataclass(frozen=True)
class BuildPlan:
    """What a build would do, known after reading the checkpoint: the answer of --dry-run."""

    spec: CheckpointSpec
    limits: Limits
    backend: BackendChoice

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "checkpoint": {"file": self.spec.path.name, "sha256": self.spec.sha256, "dialect": self.spec.dialect},
            "config": self.spec.config.to_dict(),
            "limits": dataclasses.asdict(self.limits),
            "backend": dataclasses.asdict(self.backend),
            "attention_nodes": self.spec.config.num_layers,
            "parameters": sum(tensor.numel() for tensor in self.spec.state_dict.values()),
            "ignored_keys": list(self.spec.ignored_keys),
        }


@dataclasses.dataclass(frozen=True)
class BuildResult:
    """A finished build."""

    path: Path
    status: str
    worst_error: float | None
    worst_bound: float | None
    report: dict[str, Any] = dataclasses.field(repr=False)


def plan_build(config: BuildConfig) -> BuildPlan:
    """Read the checkpoint and resolve every limit and the backend.

    Raises:
        CheckpointError, UnsupportedModelError: see `spec_from_checkpoint`.
        UsageError: HSTU-E901, if a limit contradicts the model or another limit.
        EngineError: HSTU-E401, if the requested backend is absent.
    """
    user_config = config_from_file(config.config_file) if config.config_file is not None else None
    spec = spec_from_checkpoint(config.checkpoint, user_config, config.dialect)
    limits = _resolve_limits(config, spec)
    spec = dataclasses.replace(spec, config=spec.config.with_max_seq_len(limits.max_seq_len))
    return BuildPlan(spec, limits, choose_backend(config.backend))


def _resolve_limits(config: BuildConfig, spec: CheckpointSpec) -> Limits:
    own_limit = spec.config.max_seq_len
    max_seq_len = config.max_seq_len or own_limit
    limits = Limits(
        max_batch=config.max_batch,
        opt_batch=config.opt_batch or max(1, config.max_batch // 8),
        max_seq_len=max_seq_len,
        opt_seq_len=config.opt_seq_len or max(1, max_seq_len // 2),
        top_k=config.top_k,
    )
    rules = [
        (1 <= max_seq_len <= own_limit, "--max-seq-len", max_seq_len, f"1 to {own_limit}, the model's tables"),
        (1 <= limits.opt_seq_len <= max_seq_len, "--opt-seq-len", limits.opt_seq_len, f"1 to {max_seq_len}"),
        (limits.max_batch >= 1, "--max-batch", limits.max_batch, "at least 1"),
        (1 <= limits.opt_batch <= limits.max_batch, "--opt-batch", limits.opt_batch, f"1 to {limits.max_batch}"),
        (0 <= limits.top_k <= spec.config.num_items, "--top-k", limits.top_k, f"0 to {spec.config.num_items} items"),
    ]
    for legal, option, value, allowed in rules:
        if not legal:
            raise UsageError("HSTU-E901", f"{option} {value} cannot be used", f"allowed: {allowed}", f"change {option}")
    return limits


class _Build:
    """One run of the pipeline: keeps the stage reports and the intermediate files."""

    def __init__(self, config: BuildConfig, listener: Listener) -> None:
        self.config, self.listener = config, listener
        self.stages: list[StageReport] = []

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time a stage; the block hands over its one-line summary."""
        index = STAGES.index(name) + 1
        self.listener.stage_started(index, name)
        summary: list[str] = []
        started = time.perf_counter()
        yield summary.append
        report = StageReport(name, time.perf_counter() - started, " ".join(summary))
        self.stages.append(report)
        self.listener.stage_finished(index, report)

    def keep(self, name: str, content: bytes | str | onnx.ModelProto) -> None:
        """Write an intermediate artifact, if the user wants them."""
        folder = self.config.keep_intermediates
        if folder is None:
            return
        path = folder / name
        with writing_to(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, onnx.ModelProto):
                onnx.save(content, path)
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)

    def rewritten(self, graph: OnnxGraph, num_layers: int) -> OnnxGraph:
        """Apply every export pass, keeping each step."""
        taps = tuple(f"{TAP_PREFIX}{i}" for i in range(num_layers + 1))
        for number, graph in enumerate(apply_passes(graph, export_passes(num_layers, taps)), start=1):  # noqa: B020
            self.keep(f"03_rewritten/{number:02d}_{graph.passes[-1].name}.onnx", graph.model)
        return dataclasses.replace(
            graph, inputs=tensor_specs(graph.model.graph.input), outputs=tensor_specs(graph.model.graph.output)
        )


def compile_checkpoint(
    config: BuildConfig, options: EngineOptions | None = None, listener: Listener | None = None
) -> BuildResult:
    """Build a bundle.

    Args:
        config: what to build and where to put it.
        options: of the engine builder.
        listener: hears of every stage.

    Returns:
        Where the bundle is and whether it passed. A bundle that fails verification is written too, marked FAIL.

    Raises:
        HstuCompileError: by stage; nothing is left at the destination then.
    """
    build = _Build(config, listener or SilentListener())
    options = options or EngineOptions()
    bundles.check_destination(config.bundle_path.absolute(), config.force)

    with build.stage("checkpoint") as summarise:
        plan = plan_build(config)
        spec, limits = plan.spec, plan.limits
        model_config = spec.config
        summarise(
            f"{spec.dialect}, {model_config.num_layers} layers, D {model_config.layer.embedding_dim}, "
            f"{model_config.num_items} items"
        )
        build.keep("01_checkpoint.json", json.dumps(plan.to_dict(), indent=1))
    with build.stage("model") as summarise:
        model = model_from_spec(spec, TORCH_DTYPES[config.precision])
        summarise(f"{sum(p.numel() for p in model.parameters())} parameters in {config.precision}")
    with build.stage("export") as summarise:
        graph = exported_from_model(model, config.precision, limits.top_k)
        build.keep("02_exported.onnx", graph.model)
        summarise(f"{len(graph.model.graph.node)} nodes, {model_config.num_layers} {attention_contract().name}")
    with build.stage("rewrite") as summarise:
        graph = build.rewritten(graph, model_config.num_layers)
        totals = Counter({f"{r.name} {kind}": count for r in graph.passes for kind, count in r.counts.items() if count})
        summarise(", ".join(f"{count} {kind}" for kind, count in totals.items()))
    with build.stage("engine") as summarise:
        plugin = _plugin(config, plan, graph, build.listener)
        engine = _engine(plan, graph, options, plugin, build.listener)
        if engine is None:
            summarise(f"none: {plan.backend.reason}")
        else:
            build.keep("04_engine.json", json.dumps(_engine_dict(engine), indent=1))
            summarise(f"{engine.backend} {engine.version}, {len(engine.plan)} bytes; {plan.backend.reason}")
    reference: Reference | None = None
    verification: VerifyReport | None = None
    with build.stage("verify") as summarise:
        if config.verify:
            batches = retrieval_batches(
                model_config, limits.max_batch, limits.opt_batch, _MAX_VERIFY_SCORES, config.seed
            )
            progress = build.listener.stage_progress
            feeds = [Feed(batch.name, batch.arrays) for batch in batches]
            reference = reference_from_spec(spec, config.precision, feeds, limits.top_k, progress)
            verification = verify_artifacts(
                graph, engine, reference, plugin.self_registering if plugin else None, progress
            )
            build.keep("05_verify.json", json.dumps(verification.to_dict(), indent=1))
            ran = ", ".join(f"{run.runtime} {run.status}" for run in verification.runs)
            summarise(f"{ran}; worst error {verification.worst_error:.3g} of {verification.worst_bound:.3g} allowed")
        else:
            summarise("not verified (--no-verify)")
    with build.stage("bundle") as summarise:
        result = _write_bundle(build, plan, graph, engine, plugin, reference, verification)
        summarise(str(result.path))
    return result


def _plugin(config: BuildConfig, plan: BuildPlan, graph: OnnxGraph, listener: Listener) -> PluginLibrary | None:
    """The plugin library of this model, where TensorRT will load it or the user asks for it."""
    wanted = config.plugin if config.plugin is not None else plan.backend.name == "tensorrt"
    if not wanted:
        return None
    return build_plugin_library(plugin_request_of(graph.model, installed_tensorrt_version()), listener.stage_progress)


def _engine(
    plan: BuildPlan, graph: OnnxGraph, options: EngineOptions, plugin: PluginLibrary | None, listener: Listener
) -> EngineArtifact | None:
    if plan.backend.name == "onnx":
        return None
    limits = plan.limits
    sizes = ProfileSizes(limits.max_batch, limits.max_seq_len, limits.opt_batch, limits.opt_seq_len)
    explicit = options.explicit_profile()
    has_ratings = plan.spec.config.has_ratings
    profiles = (explicit,) if explicit is not None else retrieval_profile(sizes, has_ratings=has_ratings)
    return engine_from_onnx(
        graph.model,
        backend=plan.backend.name,
        profiles=profiles,
        plugin_library=plugin.self_registering if plugin is not None and plan.backend.name == "tensorrt" else None,
        options=options,
        on_progress=lambda phase, fraction: listener.stage_progress(phase, round(100 * fraction), 100),
    )


def _engine_dict(engine: EngineArtifact) -> dict[str, Any]:
    facts = dataclasses.asdict(dataclasses.replace(engine, plan=b""))
    del facts["plan"]
    return {**facts, "bytes": len(engine.plan)}


def _plugin_dict(plugin: PluginLibrary | None) -> dict[str, Any] | None:
    if plugin is None:
        return None
    return {
        "trt_version": plugin.trt_version,
        "archs": list(plugin.archs),
        "with_ptx": plugin.with_ptx,
        "content_hash": plugin.content_hash,
        "variants": [dataclasses.asdict(variant) for variant in plugin.variants],
    }


def _polygraphy_arguments(reference: Reference, verification: VerifyReport, graph: OnnxGraph) -> list[str]:
    """`polygraphy run` arguments that compare the eager outputs with model.onnx run by ONNX Runtime.

    Both sides may lie a bound away from float64, in different directions; Polygraphy compares absolute differences,
    so the row scale is that of the largest row.
    """
    tolerances = []
    bounds = {c.tensor: c.bound for run in verification.runs for c in run.tensors}
    for name in _polygraphy_outputs(reference):
        users = [exact["user_embeddings"] for exact in reference.exact]
        scale = max(float((u * u).mean(axis=1).max(initial=0.0)) ** 0.5 for u in users)
        if name == "top_scores":
            scale = max(float((u * u).sum(axis=1).max(initial=0.0)) ** 0.5 for u in users)
            assert reference.item_vectors is not None
            scale *= float((reference.item_vectors**2).sum(axis=1).max()) ** 0.5
        bound = bounds["user_embeddings"] + reference.eager_error["user_embeddings"]
        tolerances.append(f"{name}:{bound * scale:.3g}")
    source = ["--load-outputs", bundles.EAGER_FILE]
    if graph.precision == "bf16":
        # ONNX Runtime has no bf16 kernels on a CPU; its outputs, made on a widened copy of the graph, are in the file.
        source += [ORT_OUTPUTS_FILE]
    else:
        source = [bundles.ONNX_FILE, "--onnxrt", "--load-inputs", bundles.FEEDS_FILE, *source]
    return ["run", *source, "--atol", *tolerances, "--rtol", "0"]


def _polygraphy_outputs(reference: Reference) -> list[str]:
    return [name for name in ("user_embeddings", "top_scores") if name in reference.eager[0]]


def _write_bundle(
    build: _Build,
    plan: BuildPlan,
    graph: OnnxGraph,
    engine: EngineArtifact | None,
    plugin: PluginLibrary | None,
    reference: Reference | None,
    verification: VerifyReport | None,
) -> BuildResult:
    config = build.config
    status = verification.status if verification is not None else "NOT VERIFIED"
    with bundles.BundleWriter(config.bundle_path, config.force) as writer:
        writer.add(bundles.ONNX_FILE, graph.model.SerializeToString(deterministic=True))
        if engine is not None:
            writer.add(bundles.ENGINE_FILE, engine.plan)
        if plugin is not None:
            for library in filter(None, (plugin.self_registering, plugin.version_compatible)):
                writer.add(library.name, library.read_bytes())
        polygraphy: PolygraphyCheck | None = None
        if reference is not None and verification is not None:
            polygraphy = _write_reference(writer, reference, verification, graph)
            if polygraphy.exit_code != 0:
                status = "FAIL"
        report = _report(build, plan, graph, engine, verification, polygraphy, status)
        report["files"] = [{"name": name, **facts} for name, facts in writer.files().items()]
        writer.add(bundles.REPORT_JSON, json.dumps(report, indent=1) + "\n")
        writer.add(bundles.REPORT_HTML, render_report(report))
        manifest = {**_manifest(plan, graph, engine, polygraphy, report), "plugin": _plugin_dict(plugin)}
        path = writer.commit(manifest)
    return BuildResult(
        path,
        status,
        verification.worst_error if verification else None,
        verification.worst_bound if verification else None,
        report,
    )


ORT_OUTPUTS_FILE = "onnxruntime_outputs.json"


def _write_reference(
    writer: bundles.BundleWriter, reference: Reference, verification: VerifyReport, graph: OnnxGraph
) -> PolygraphyCheck:
    names = _polygraphy_outputs(reference)

    def pick(outputs: Sequence[Outputs]) -> list[Outputs]:
        return [{name: each[name] for name in names} for each in outputs]

    with writer.writing() as folder:
        save_feeds(folder / bundles.FEEDS_FILE, [feed.arrays for feed in reference.feeds])
        save_outputs(folder / bundles.EAGER_FILE, f"eager-{graph.precision}", pick(reference.eager))
        save_outputs(folder / bundles.EXACT_FILE, "eager-float64", pick(reference.exact))
        if graph.precision == "bf16":
            from hstu_compile.runtime.session import open_session

            with open_session("onnxruntime", onnx=graph.model) as session:
                save_outputs(
                    folder / ORT_OUTPUTS_FILE,
                    "onnxruntime-widened",
                    pick([session.run(feed.arrays) for feed in reference.feeds]),
                )
        return run_polygraphy(folder, _polygraphy_arguments(reference, verification, graph))


def _report(
    build: _Build,
    plan: BuildPlan,
    graph: OnnxGraph,
    engine: EngineArtifact | None,
    verification: VerifyReport | None,
    polygraphy: PolygraphyCheck | None,
    status: str,
) -> dict[str, Any]:
    config, spec = build.config, plan.spec
    name = config.bundle_path.name
    facts = graph_facts(graph.model)
    return {
        "schema": 1,
        "status": status,
        "title": spec.path.name,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hstu_compile": hstu_compile.__version__,
        "checkpoint": {
            "file": spec.path.name,
            "sha256": spec.sha256,
            "dialect": spec.dialect,
            "config": spec.config.to_dict(),
        },
        "precision": graph.precision,
        "backend": {
            "name": plan.backend.name,
            "reason": plan.backend.reason,
            "version": engine.version if engine else None,
            "compute_capabilities": list(engine.compute_capabilities) if engine else [],
        },
        "stages": [dataclasses.asdict(stage) for stage in build.stages],
        "passes": [dataclasses.asdict(record) for record in graph.passes],
        "graph": {
            **facts,
            "inputs": [dataclasses.asdict(i) for i in graph.inputs],
            "outputs": [dataclasses.asdict(o) for o in graph.outputs],
        },
        "engine": _engine_dict(engine) if engine else None,
        "verification": None
        if verification is None
        else {**verification.to_dict(), "polygraphy": polygraphy.to_dict() if polygraphy else None},
        "metrics": None,
        "timings": [run.timing for run in verification.runs if run.timing] if verification else [],
        "environment": collect_environment(),
        "files": [],
        "commands": [
            {"purpose": "check the files and repeat the verification", "command": f"hstu-compile verify {name}"},
            {"purpose": "list inputs and outputs", "command": f"hstu-compile inspect {name}"},
            *(
                [{"purpose": "repeat the check without hstu-compile", "command": polygraphy.command}]
                if polygraphy
                else []
            ),
        ],
    }


def _manifest(
    plan: BuildPlan,
    graph: OnnxGraph,
    engine: EngineArtifact | None,
    polygraphy: PolygraphyCheck | None,
    report: dict[str, Any],
) -> dict[str, Any]:
    limits, config = plan.limits, plan.spec.config
    verification = report["verification"]
    return {
        "hstu_compile": report["hstu_compile"],
        "created": report["created"],
        "status": report["status"],
        "checkpoint": report["checkpoint"],
        "precision": {"requested": graph.precision, "built": report["graph"]["precision_counts"]},
        "backend": report["backend"],
        "operator": {
            "name": attention_contract().name,
            "namespace": attention_contract().namespace,
            "version": attention_contract().version,
            "nodes": config.num_layers,
        },
        "inputs": report["graph"]["inputs"],
        "outputs": report["graph"]["outputs"],
        "limits": {
            "num_items": config.num_items,
            "num_ratings": config.num_ratings,
            "max_batch": limits.max_batch,
            "max_seq_len": limits.max_seq_len,
        },
        "profiles": [dataclasses.asdict(profile) for profile in engine.profiles] if engine else [],
        "versions": report["environment"].get("packages", {}),
        "verification": None
        if verification is None
        else {
            "worst_error": verification["worst_error"],
            "worst_bound": verification["worst_bound"],
            "feeds": [feed["name"] for feed in verification["feeds"]],
            "eager_error": {"user_embeddings": verification["eager_error"]},
            "polygraphy_arguments": list(polygraphy.arguments) if polygraphy else [],
        },
    }
