"""Checkpoint to bundle. Level 5: the only place that knows the order of the stages.

checkpoint -> model -> export -> rewrite -> engine -> verify -> bundle; each stage hands a frozen artifact to the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import onnx
from numpy.typing import NDArray

from hstu_compile import bundle as bundles
from hstu_compile.artifacts import EngineArtifact, Feed, FusedEngines, OnnxGraph, Precision, Profile, is_tap
from hstu_compile.build_plan import BuildPlan, check_engine_options, plan_build
from hstu_compile.build_report import (
    BuildOutcome,
    GraphOutcome,
    build_manifest,
    build_report,
    engine_dict,
    ranking_spec,
    retrieval_spec,
)
from hstu_compile.calibration.append_batches import most_cached_rows
from hstu_compile.calibration.batches import RequestBatch, retrieval_batches
from hstu_compile.calibration.ranking_batches import ranking_batches
from hstu_compile.checkpoint import model_from_spec
from hstu_compile.config import BuildConfig
from hstu_compile.engine import engine_from_onnx
from hstu_compile.errors import RewriteError, UsageError
from hstu_compile.export import TORCH_DTYPES, exported_from_served
from hstu_compile.files import writing_to
from hstu_compile.graph_facts import tensor_specs
from hstu_compile.graph_limits import write_limits
from hstu_compile.graph_plugin import kernels_request_of, plugin_request_of
from hstu_compile.incremental_check import check_incremental
from hstu_compile.labelled_requests import LARGEST_BATCH, LabelledRequests, labelled_requests
from hstu_compile.m_falcon_check import check_m_falcon
from hstu_compile.model.fake_quantization import fake_quantized
from hstu_compile.model.families import HstuModel
from hstu_compile.model.ranking_config import RankingConfig
from hstu_compile.op_schema import attention_contract
from hstu_compile.plugin_library import (
    KernelsLibrary,
    PluginLibrary,
    build_kernels_library,
    build_plugin_library,
    installed_tensorrt_version,
)
from hstu_compile.polygraphy_files import PolygraphyCheck, run_polygraphy, save_feeds, save_outputs
from hstu_compile.profiles import graph_profiles
from hstu_compile.quality import Answer, QualityMeasurement, QualityTable
from hstu_compile.quantized import QuantizationPlan
from hstu_compile.report import render_report
from hstu_compile.rewrite import Pass, RowSelection, apply_passes, export_passes, quantized_sites
from hstu_compile.runtime.schedule_file import schedule_text
from hstu_compile.runtime.session import Session, open_session
from hstu_compile.segment_engines import fused_from_onnx
from hstu_compile.sensitivity import ShippedForm, first_ladder
from hstu_compile.served import ServedGraph, served_graphs
from hstu_compile.session_check import (
    PREDICTIONS,
    SESSION,
    Outputs,
    Progress,
    Reference,
    RuntimeCheck,
    VerifyReport,
    report_of,
)
from hstu_compile.table_files import TABLE_BYTES, TableFiles, copy_tables
from hstu_compile.trt_options import EngineOptions
from hstu_compile.verify import BuiltGraph, References, open_built, references_from_spec, verify_artifacts

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
class BuildResult:
    """A finished build."""

    path: Path
    status: str
    worst_error: float | None
    worst_bound: float | None
    report: dict[str, Any] = dataclasses.field(repr=False)


class _Build:
    """One run of the pipeline: keeps the stage reports and the intermediate files."""

    def __init__(self, config: BuildConfig, listener: Listener, writer: bundles.BundleWriter) -> None:
        self.config, self.listener, self.writer = config, listener, writer
        self.tables = TableFiles(writer.folder)
        self.stages: list[StageReport] = []
        self._traced: dict[str, OnnxGraph] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time a stage; the block hands over its one-line summary."""
        index = STAGES.index(name) + 1
        self.listener.stage_started(index, name)
        summary: list[str] = []
        started = time.perf_counter()
        yield summary.append
        report = StageReport(name, time.perf_counter() - started, "; ".join(summary))
        self.stages.append(report)
        self.listener.stage_finished(index, report)

    def keep(self, name: str, content: str | OnnxGraph) -> None:
        """Write an intermediate artifact, if the user wants them."""
        folder = self.config.keep_intermediates
        if folder is None:
            return
        path = folder / name
        with writing_to(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, OnnxGraph):
                path.write_bytes(content.model.SerializeToString())
            else:
                path.write_text(content, encoding="utf-8")
        if isinstance(content, OnnxGraph) and content.folder is not None:
            copy_tables(content.model, content.folder, path.parent)

    def traced(self, served: ServedGraph) -> OnnxGraph:
        """One graph of the model as exported; what --mixed auto has traced to measure it is not traced again."""
        if served.name not in self._traced:
            self._traced[served.name] = exported_from_served(served, self.config.precision, self.tables)
        return self._traced[served.name]

    def rewritten(self, graph: OnnxGraph, served: ServedGraph, plan: BuildPlan, folder: str) -> OnnxGraph:
        """Apply every export pass, keeping each step, and note the graph's limits in it."""
        for number, graph in enumerate(apply_passes(graph, _passes(served, plan)), start=1):  # noqa: B020
            self.keep(f"{folder}/{number:02d}_{graph.passes[-1].name}.onnx", graph)
        write_limits(graph.model, plan.graph_limits(served.name))
        return dataclasses.replace(
            graph, inputs=tensor_specs(graph.model.graph.input), outputs=tensor_specs(graph.model.graph.output)
        )


def _passes(served: ServedGraph, plan: BuildPlan) -> Sequence[Pass]:
    """What is done to an exported graph."""
    return export_passes(
        served.num_attention,
        served.taps,
        _selection(served) if plan.prune else None,
        plan.attention_silu,
        fuse_norms=plan.fuse_norms,
        quantization=plan.quantization.plan if plan.quantization is not None else None,
        tabulate=_evaluated if plan.tabulate_towers else None,
    )


def _evaluated(model: onnx.ModelProto) -> NDArray[Any]:
    """The output of a graph without inputs."""
    with open_session("onnxruntime", onnx=model) as session:
        (result,) = session.run({}).values()
    return result


def _selection(served: ServedGraph) -> RowSelection | None:
    """Which rows of the last layer the outputs need, where that is not all of them."""
    if served.consumed == "all":
        return None
    if served.consumed == "last_of_sequence":
        return RowSelection()
    return RowSelection(served.max_candidates, "candidate_offsets")


def rehearse(config: BuildConfig, options: EngineOptions | None = None) -> BuildPlan:
    """What a build would do; writes nothing.

    Args:
        config: what to build and where to put it.
        options: of the engine builder.

    Raises:
        HstuCompileError: what the build would raise before anything is traced: of the destination, the options, the
            checkpoint and the labelled requests.
    """
    bundles.check_destination(config.bundle_path.absolute(), config.force)
    plan = plan_build(config)
    check_engine_options(plan, options or EngineOptions())
    _labelled_requests(config, plan)
    return plan


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
    # From the start: large tables are written once, right into the folder that becomes the bundle.
    with bundles.BundleWriter(config.bundle_path, config.force) as writer:
        return _compiled(_Build(config, listener or SilentListener(), writer), options or EngineOptions())


def _compiled(build: _Build, options: EngineOptions) -> BuildResult:
    """All stages, in order."""
    config = build.config
    with build.stage("checkpoint") as summarise:
        plan = plan_build(config)
        check_engine_options(plan, options)
        spec, limits = plan.spec, plan.limits
        summarise(f"{spec.dialect}, {spec.config.num_layers} layers, D {spec.config.layer.embedding_dim}")
        build.keep("01_checkpoint.json", json.dumps(plan.to_dict(), indent=1))
    with build.stage("model") as summarise:
        model = model_from_spec(spec, TORCH_DTYPES[config.precision])
        served = served_graphs(model, limits.top_k, limits.micro_batch, limits.max_append)
        requests = _labelled_requests(config, plan)
        plan = _mixed(config, plan, model, served[0], requests, build)
        summarise(f"{sum(p.numel() for p in model.parameters())} parameters in {config.precision}{_mix_in_words(plan)}")
    with build.stage("export") as summarise:
        graphs = []
        for number, each in enumerate(served):
            build.listener.stage_progress(each.name, number, len(served))
            graphs.append(build.traced(each))
            build.keep(_intermediate("02_exported", each, served) + ".onnx", graphs[-1])
        build.listener.stage_progress("exported", len(served), len(served))
        summarise(
            "; ".join(
                f"{_called(graph, graphs)}{len(graph.model.graph.node)} nodes, {each.num_attention} "
                f"{attention_contract().name}"
                for each, graph in zip(served, graphs, strict=True)
            )
        )
    with build.stage("rewrite") as summarise:
        graphs = [
            build.rewritten(graph, each, plan, _intermediate("03_rewritten", each, served))
            for each, graph in zip(served, graphs, strict=True)
        ]
        _require_quantized(plan, graphs)
        if config.tabulate_towers:
            _require_tabulated(graphs)
        totals = Counter(
            {
                f"{_called(graph, graphs)}{record.name} {kind}": count
                for graph in graphs
                for record in graph.passes
                for kind, count in record.counts.items()
                if count
            }
        )
        summarise(", ".join(f"{count} {kind}" for kind, count in totals.items()))
    with build.stage("engine") as summarise:
        plugin = _plugin(config, plan, graphs, build.listener)
        kernels = _kernels(plan, graphs, build.listener)
        built = [_built(plan, graph, options, plugin, kernels, build.listener) for graph in graphs]
        for each_built in built:
            for number, each_engine in enumerate(each_built.engines):
                name = "04_engine" if len(built) == 1 else f"04_engine_{each_built.graph.name}"
                name += "" if each_built.fused is None else f"_segment_{number}"
                build.keep(f"{name}.json", json.dumps(engine_dict(each_engine), indent=1))
        summarise(
            _engines_in_words(plan, built)
            + (f"; plugin with {plugin.hopper}" if plugin is not None else "")
            + (f"; {kernels.path.name} with {kernels.hopper}" if kernels is not None else "")
        )
    references: References | None = None
    verification: VerifyReport | None = None
    runs: list[list[RuntimeCheck]] = []
    with build.stage("verify") as summarise:
        if config.verify:
            progress = build.listener.stage_progress
            references = references_from_spec(
                spec,
                config.precision,
                _batches(plan, config.seed),
                limits,
                progress,
                prune=plan.prune,
                quantization=plan.quantization.plan if plan.quantization is not None else None,
            )
            library = plugin.self_registering if plugin else None
            runs = [
                verify_artifacts(each_built, reference, library, progress)
                for each_built, reference in zip(built, references.graphs, strict=True)
            ]
            checked = list(zip(references.graphs, runs, strict=True))
            if references.session is not None:
                sessions = _verify_session(plan, built, references.session, library, config.precision, progress)
                checked.append((references.session, sessions))
            verification = report_of(checked, config.precision, config.quantization)
            build.keep("05_verify.json", json.dumps(verification.to_dict(), indent=1))
            ran = ", ".join(f"{run.artifact} on {run.runtime} {run.status}" for run in verification.runs)
            summarise(f"{ran}; worst error {verification.worst_error:.3g} of {verification.worst_bound:.3g} allowed")
        else:
            summarise("not verified (--no-verify)")
        quality: QualityTable | None = None
        if requests is not None:
            quality = _quality(config, plan, model, requests, built, runs, plugin, build.listener.stage_progress)
            summarise(_quality_in_words(quality))
    with build.stage("bundle") as summarise:
        outcomes = [GraphOutcome(each_built) for each_built in built]
        if references is not None:
            outcomes = [
                GraphOutcome(each_built, reference)
                for each_built, reference in zip(built, references.graphs, strict=True)
            ]
        result = _write_bundle(build, plan, outcomes, runs, plugin, kernels, verification, references, quality)
        summarise(str(result.path))
    return result


def _labelled_requests(config: BuildConfig, plan: BuildPlan) -> LabelledRequests | None:
    """The requests that quality is measured on, cut so that an engine of this build takes them."""
    if config.labelled_data is None:
        return None
    return labelled_requests(config.labelled_data, plan.spec.config, min(LARGEST_BATCH, plan.limits.max_batch))


def _mixed(
    config: BuildConfig,
    plan: BuildPlan,
    model: HstuModel,
    served: ServedGraph,
    requests: LabelledRequests | None,
    build: _Build,
) -> BuildPlan:
    """The plan with what --mixed auto leaves in float16, and how it came to that; the same plan without it."""
    settings, budget = plan.quantization, config.quality_budget
    if config.mixed is None or settings is None or requests is None or budget is None:
        return plan
    models: dict[str, HstuModel] = {"fp32": model_from_spec(plan.spec), config.precision: model}
    exported = build.traced(served)

    @contextlib.contextmanager
    def opened(candidate: QuantizationPlan) -> Iterator[Answer]:
        mix = dataclasses.replace(plan, quantization=dataclasses.replace(settings, plan=candidate))
        *_, graph = apply_passes(exported, _passes(served, mix))
        with open_session("onnxruntime", onnx=graph.model, folder=graph.folder) as session:
            yield _answer(session, _asked_output(plan))

    shipped = ShippedForm("onnxruntime", model, opened)
    plans = {settings.observer: settings.plan, **settings.alternatives}
    rule, ladder = first_ladder(models, plans, requests, budget, build.listener.stage_progress, shipped)
    build.keep("02_sensitivity.json", json.dumps(ladder.to_dict(), indent=1))
    chosen = dataclasses.replace(settings, plan=ladder.plan, observer=rule, sensitivity=ladder.to_dict())
    return dataclasses.replace(plan, quantization=chosen)


def _mix_in_words(plan: BuildPlan) -> str:
    """What --mixed auto chose, for the model stage's line."""
    if plan.quantization is None or plan.quantization.sensitivity is None:
        return ""
    ladder = plan.quantization.sensitivity
    kept = ", ".join(ladder["kept"]) or "none"
    count, rule = len(plan.quantization.plan.sites), plan.quantization.observer
    return f"; {ladder['kind']} by {rule} in {count} products, left out for quality: {kept}"


def _quality(
    config: BuildConfig,
    plan: BuildPlan,
    model: HstuModel,
    requests: LabelledRequests,
    built: Sequence[BuiltGraph],
    runs: Sequence[Sequence[RuntimeCheck]],
    plugin: PluginLibrary | None,
    progress: Progress,
) -> QualityTable:
    """How good the eager model and the first graph's artifacts are.

    ONNX Runtime answers in any case, the engine where the verification found that it runs here.
    """
    progress("quality of eager fp32", 0, 3)
    measured = QualityMeasurement(model_from_spec(plan.spec), requests)
    settings, main = plan.quantization, built[0]
    form = config.precision if settings is None else f"{settings.plan.kind} and {config.precision}"
    if form != "fp32":
        progress(f"quality of eager {form}", 1, 3)
        with contextlib.nullcontext() if settings is None else fake_quantized(model, settings.plan):
            measured.add(f"eager {form}", model)
    output = _asked_output(plan)
    feeds = [Feed(f"labelled {number}", batch.feeds) for number, batch in enumerate(requests.batches)]
    library = plugin.self_registering if plugin else None
    files = {"onnxruntime": main.onnx_file}
    # The engine's run is the last one where there is an engine.
    if main.runnable_file is not None and runs and runs[0][-1].status != "NOT RUN":
        files[plan.backend.name] = main.runnable_file
    for runtime, file in files.items():
        progress(f"quality on {runtime}", 2, 3)
        with open_built(main, runtime, feeds, library) as session:
            measured.add(f"{file} on {runtime}", model, _answer(session, output))
    progress("quality", 3, 3)
    return measured.table(config.quality_budget)


def _asked_output(plan: BuildPlan) -> str:
    """The output of the first graph whose quality is measured."""
    return "logits" if isinstance(plan.spec.config, RankingConfig) else "user_embeddings"


def _answer(session: Session, output: str) -> Answer:
    """A graph as a function of its feeds."""

    def answer(feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        return session.run(dict(feeds))[output]

    return answer


def _quality_in_words(quality: QualityTable) -> str:
    """The verify stage's line on quality."""
    facts = quality.to_dict()
    limit = "" if quality.budget is None else f" ({'within' if quality.is_within else 'beyond'} {quality.budget:g})"
    return f"quality on {facts['data']['requests']} requests changed by at most {facts['worst']:.2g}{limit}"


def _require_quantized(plan: BuildPlan, graphs: Sequence[OnnxGraph]) -> None:
    """Refuse a build in whose graphs a planned product was not found: it would stay in float16 unnoticed."""
    if plan.quantization is None:
        return
    planned = plan.quantization.plan
    missing = set(planned.sites).difference(*(quantized_sites(graph.model, planned) for graph in graphs))
    if missing:
        raise RewriteError(
            "HSTU-E301",
            f"{len(missing)} of {len(planned.sites)} products were not quantised",
            f"no graph has a constant of {', '.join(sorted(missing))}",
            "report this with `hstu-compile env` and the .onnx of --keep-intermediates",
            {"missing": sorted(missing)},
        )


def _require_tabulated(graphs: Sequence[OnnxGraph]) -> None:
    """Refuse a build that was asked for tables of towers and has none: it would compute them unnoticed."""
    records = [record for graph in graphs for record in graph.passes if record.name == "tabulate_towers"]
    if not any(record.counts["tables"] for record in records):
        raise UsageError(
            "HSTU-E901",
            "--tabulate-towers finds no tower that it could make a table of",
            f"the tables that the towers read, or what they would become, have {TABLE_BYTES >> 20} MiB or more, or a "
            "tower reads rows of several tables at once",
            "leave it out",
        )


def _verify_session(
    plan: BuildPlan,
    built: Sequence[BuiltGraph],
    reference: Reference,
    plugin_library: Path | None,
    precision: Precision,
    progress: Progress,
) -> list[RuntimeCheck]:
    """The graphs as one session: in ONNX Runtime, and their engines where those can run."""
    graphs = {each.graph.name: each for each in built}
    files = {"onnxruntime": {name: each.onnx_file for name, each in graphs.items()}}
    runnable = {name: each.runnable_file for name, each in graphs.items()}
    engines = {name: file for name, file in runnable.items() if file is not None}
    if len(engines) == len(built):
        files[plan.backend.name] = engines

    def opener(runtime: str) -> Callable[[str], Session]:
        return lambda graph: open_built(graphs[graph], runtime, reference.feeds, plugin_library)

    # Cached keys and values live as long as this check: any version is as good as another.
    version, found = plan.spec.sha256, []
    for runtime, names in files.items():
        if isinstance(plan.spec.config, RankingConfig):
            ranking = ranking_spec(plan, precision, version)
            found.append(check_m_falcon(runtime, opener(runtime), names, ranking, reference, precision, progress))
        else:
            retrieval = retrieval_spec(plan, precision, version)
            found.append(check_incremental(runtime, opener(runtime), names, retrieval, reference, precision, progress))
    return found


def _intermediate(name: str, graph: ServedGraph, graphs: Sequence[ServedGraph]) -> str:
    return name if len(graphs) == 1 else f"{name}_{graph.name}"


def _called(graph: OnnxGraph, graphs: Sequence[OnnxGraph]) -> str:
    """The graph's name in front of a fact, where there are several."""
    return "" if len(graphs) == 1 else f"{graph.name} "


def _engines_in_words(plan: BuildPlan, built: Sequence[BuiltGraph]) -> str:
    engines = [engine for each in built for engine in each.engines]
    if not engines:
        return f"none: {plan.backend.reason}"
    if any(each.fused is not None for each in built):
        nbytes = sum(len(engine.plan) for engine in engines)
        sizes = f"{len(engines)} segments of {len(built)} graphs, {nbytes} bytes"
    else:
        sizes = ", ".join(f"{len(engine.plan)} bytes" for engine in engines)
    return f"{engines[0].backend} {engines[0].version}, {sizes}; {plan.backend.reason}"


def _batches(plan: BuildPlan, seed: int) -> list[RequestBatch]:
    config, limits = plan.spec.config, plan.limits
    if isinstance(config, RankingConfig):
        return ranking_batches(config, limits.max_batch, limits.opt_batch, _MAX_VERIFY_SCORES, seed)
    max_rows = None if limits.max_append is None else most_cached_rows(config)
    return retrieval_batches(config, limits.max_batch, limits.opt_batch, _MAX_VERIFY_SCORES, seed, max_rows)


def _plugin(
    config: BuildConfig, plan: BuildPlan, graphs: Sequence[OnnxGraph], listener: Listener
) -> PluginLibrary | None:
    """The plugin library of this model, where TensorRT will load it or the user asks for it."""
    wanted = config.plugin if config.plugin is not None else plan.backend.name == "tensorrt"
    if not wanted:
        return None
    request = plugin_request_of([graph.model for graph in graphs], installed_tensorrt_version())
    return build_plugin_library(request, listener.stage_progress)


def _kernels(plan: BuildPlan, graphs: Sequence[OnnxGraph], listener: Listener) -> KernelsLibrary | None:
    """The library of the kernels that run between the engines of these graphs, where they are cut."""
    if not plan.is_fused:
        return None
    return build_kernels_library(kernels_request_of([graph.model for graph in graphs]), listener.stage_progress)


def _built(
    plan: BuildPlan,
    graph: OnnxGraph,
    options: EngineOptions,
    plugin: PluginLibrary | None,
    kernels: KernelsLibrary | None,
    listener: Listener,
) -> BuiltGraph:
    """A graph with its engine, or with those of its segments."""
    engine = fused = None
    if kernels is not None:
        fused = _fused(plan, graph, options, kernels, listener)
    else:
        engine = _engine(plan, graph, options, plugin, listener)
    return BuiltGraph(graph, engine, *bundles.model_files(graph.name), plan.limits.contextual_len, fused)


def _profile(plan: BuildPlan, graph: OnnxGraph, options: EngineOptions, *, has_kernels: bool) -> Profile:
    explicit = options.explicit_profile()
    if explicit is not None:
        return explicit
    (profile,) = graph_profiles(graph.name, graph.inputs, plan.sizes(graph.name, has_kernels=has_kernels))
    return profile


def _fused(
    plan: BuildPlan, graph: OnnxGraph, options: EngineOptions, kernels: KernelsLibrary, listener: Listener
) -> FusedEngines:
    return fused_from_onnx(
        graph,
        _profile(plan, graph, options, has_kernels=True),
        kernels.path,
        Path(bundles.model_files(graph.name)[1]).stem,
        options,
        lambda segment, phase, fraction: listener.stage_progress(f"{segment} {phase}", round(100 * fraction), 100),
    )


def _engine(
    plan: BuildPlan, graph: OnnxGraph, options: EngineOptions, plugin: PluginLibrary | None, listener: Listener
) -> EngineArtifact | None:
    if plan.backend.name == "onnx":
        return None
    library = plugin.self_registering if plugin is not None and plan.backend.name == "tensorrt" else None
    return engine_from_onnx(
        graph.model,
        backend=plan.backend.name,
        profiles=(_profile(plan, graph, options, has_kernels=library is not None),),
        plugin_library=library,
        options=options,
        on_progress=lambda phase, fraction: listener.stage_progress(
            f"{graph.name} {phase}", round(100 * fraction), 100
        ),
        folder=graph.folder,
    )


def _polygraphy_arguments(
    reference: Reference, runs: Sequence[RuntimeCheck], graph: OnnxGraph, onnx_file: str, stored: bool
) -> list[str]:
    """`polygraphy run` arguments that compare the eager outputs with the graph run by ONNX Runtime.

    Both sides may lie a bound away from float64, in different directions; Polygraphy compares absolute differences,
    so the row scale is that of the largest row. Where `stored`, the outputs of ONNX Runtime are in a file.
    """
    files = bundles.reference_files(graph.name)
    bounds = {check.tensor: check.bound for run in runs for check in run.tensors}
    tolerances = []
    for name in _polygraphy_outputs(reference):
        if name == "top_scores":
            users = [exact["user_embeddings"] for exact in reference.exact]
            scale = max(float((u * u).sum(axis=1).max(initial=0.0)) ** 0.5 for u in users)
            assert reference.item_vectors is not None
            scale *= reference.item_vectors.longest
            bound = bounds["user_embeddings"] + reference.eager_error["user_embeddings"]
        else:
            scale = max(_largest_row(name, exact) for exact in reference.exact)
            bound = bounds[name] + reference.eager_error[name]
        tolerances.append(f"{name}:{bound * scale:.3g}")
    source = ["--load-outputs", files.eager]
    if stored:
        source += [files.onnxruntime]
    else:
        source = [onnx_file, "--onnxrt", "--load-inputs", files.feeds, *source]
    return ["run", *source, "--atol", *tolerances, "--rtol", "0"]


def _largest_row(name: str, outputs: Outputs) -> float:
    """Largest root mean square of a row, by the rows that `tensor_error` takes."""
    rows = outputs[name].T if name in PREDICTIONS else outputs[name].reshape(len(outputs[name]), -1)
    return float((rows * rows).mean(axis=1).max(initial=0.0)) ** 0.5 if rows.size else 0.0


def _polygraphy_outputs(reference: Reference) -> list[str]:
    """Outputs that can be compared number by number; a list of items cannot."""
    return [name for name in reference.eager[0] if name != "top_items" and not is_tap(name)]


def _write_bundle(
    build: _Build,
    plan: BuildPlan,
    graphs: Sequence[GraphOutcome],
    runs: Sequence[Sequence[RuntimeCheck]],
    plugin: PluginLibrary | None,
    kernels: KernelsLibrary | None,
    verification: VerifyReport | None,
    references: References | None,
    quality: QualityTable | None,
) -> BuildResult:
    config = build.config
    session, writer = references.session if references is not None else None, build.writer
    writer.vouch(build.tables.sha256)
    for graph in graphs:
        built = graph.built
        writer.add(built.onnx_file, built.graph.model.SerializeToString(deterministic=True))
        if built.engine is not None:
            writer.add(built.engine_file, built.engine.plan)
        if built.fused is not None:
            for name, engine in zip(built.fused.engine_files, built.fused.engines, strict=True):
                writer.add(name, engine.plan)
            writer.add(built.fused.schedule_file, schedule_text(built.fused.cut))
    if kernels is not None:
        writer.add(kernels.path.name, kernels.path.read_bytes())
    if plugin is not None:
        for library in filter(None, (plugin.self_registering, plugin.version_compatible)):
            writer.add(library.name, library.read_bytes())
    if verification is not None:
        graphs = [
            dataclasses.replace(graph, polygraphy=_write_reference(writer, graph, graph_runs))
            for graph, graph_runs in zip(graphs, runs, strict=True)
        ]
    if session is not None:
        with writer.writing() as folder:
            save_outputs(folder / bundles.reference_files(SESSION).exact, "eager-float64", session.exact)
    stages = [dataclasses.asdict(stage) for stage in build.stages]
    cost = references.quantization_cost if references is not None else None
    outcome = BuildOutcome(
        plan, tuple(graphs), plugin, verification, stages, session, cost, quality, kernels, build.tables.sha256
    )
    report = build_report(outcome, config.bundle_path.name)
    report["files"] = [{"name": name, **facts} for name, facts in writer.files().items()]
    writer.add(bundles.REPORT_JSON, json.dumps(report, indent=1) + "\n")
    writer.add(bundles.REPORT_HTML, render_report(report))
    path = writer.commit(build_manifest(outcome, report))
    return BuildResult(
        path,
        outcome.status,
        verification.worst_error if verification else None,
        verification.worst_bound if verification else None,
        report,
    )


def _write_reference(
    writer: bundles.BundleWriter, outcome: GraphOutcome, runs: Sequence[RuntimeCheck]
) -> PolygraphyCheck:
    """Feeds and outputs of one graph, and Polygraphy's own verdict on them."""
    graph, reference = outcome.built.graph, outcome.reference
    assert reference is not None
    names, files = _polygraphy_outputs(reference), bundles.reference_files(graph.name)

    def pick(outputs: Sequence[Outputs]) -> list[Outputs]:
        return [{name: each[name] for name in names} for each in outputs]

    with writer.writing() as folder:
        save_feeds(folder / files.feeds, [feed.arrays for feed in reference.feeds])
        save_outputs(folder / files.eager, f"eager-{graph.precision}", pick(reference.eager))
        save_outputs(folder / files.exact, "eager-float64", pick(reference.exact))
        runnable = outcome.built.affordable(reference.feeds)
        # ONNX Runtime has no bfloat16 on a CPU, and may lack the memory for the graph as it is: then Polygraphy
        # compares what it answered on the copy that it can run.
        stored = graph.precision == "bf16" or runnable is not graph.model
        if stored:
            with open_session("onnxruntime", onnx=runnable, folder=graph.folder) as session:
                save_outputs(
                    folder / files.onnxruntime,
                    "onnxruntime",
                    pick([session.run(feed.arrays) for feed in reference.feeds]),
                )
        return run_polygraphy(folder, _polygraphy_arguments(reference, runs, graph, outcome.built.onnx_file, stored))
