"""Command line: options to `BuildConfig`, results to stdout, progress to stderr. Level 6, no logic of its own.

Only click and light modules are imported here; a command imports what it needs when it runs, so that `-h` works in an
environment without torch and TensorRT.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import click

import hstu_compile
from hstu_compile.config import DEFAULT_BUDGET, BuildConfig
from hstu_compile.errors import ERROR_CODES, EXIT_BUILD, EXIT_INTERRUPTED, EXIT_VERIFICATION, UsageError
from hstu_compile.files import check_not_input
from hstu_compile.trt_options import EngineOptions, parse_compute_capabilities, trt_options, trtexec_command

if TYPE_CHECKING:
    from hstu_compile.build_plan import BuildPlan
    from hstu_compile.fused_plan import FusedPlan
    from hstu_compile.pipeline import BuildResult, StageReport

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
_PATH = click.Path(path_type=Path)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, default=str))


class _Console:
    """A `pipeline.Listener`: one line per stage on stderr, and a bar while a stage is long and someone is watching."""

    def __init__(self, verbose: bool, num_stages: int) -> None:
        self._verbose, self._num_stages = verbose, num_stages
        self._is_terminal = sys.stderr.isatty()

    def stage_started(self, index: int, name: str) -> None:
        if self._verbose:
            click.echo(f"[{index}/{self._num_stages}] {name} ...", err=True)

    def stage_progress(self, what: str, done: int, total: int) -> None:
        if self._is_terminal and total:
            filled = 24 * done // total
            end = "\r" + " " * 79 + "\r" if done == total else ""
            click.echo(
                f"\r  [{'#' * filled}{'.' * (24 - filled)}] {done}/{total} {what:<40.40}{end}", nl=False, err=True
            )
        elif self._verbose:
            click.echo(f"    {what} {done}/{total}", err=True)

    def stage_finished(self, index: int, report: StageReport) -> None:
        click.echo(f"[{index}/{self._num_stages}] {report.name:<10} {report.summary}  {report.seconds:.1f} s", err=True)


@click.group(context_settings=_CONTEXT)
@click.version_option(hstu_compile.__version__, prog_name="hstu-compile")
def cli() -> None:
    """Compile a trained HSTU recommender from a PyTorch checkpoint to a verified, servable GPU engine."""


def _one_precision(fp32: bool, fp16: bool, bf16: bool) -> Any:
    chosen = [name for name, given in (("fp32", fp32), ("fp16", fp16), ("bf16", bf16)) if given]
    if len(chosen) > 1:
        raise UsageError(
            "HSTU-E901",
            f"--{' and --'.join(chosen)} exclude each other",
            "a graph has one precision",
            "pass one of --fp32, --fp16, --bf16",
        )
    return chosen[0] if chosen else "fp32"


def _quantization(int8: bool, fp8: bool) -> Any:
    if int8 and fp8:
        raise UsageError(
            "HSTU-E901", "--int8 and --fp8 exclude each other", "a product has one type", "pass one of them"
        )
    return "int8" if int8 else "fp8" if fp8 else None


def _micro_batch(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """The number in `micro-batch=N`."""
    return _named_number("--m-falcon", "micro-batch", value, "the number of candidates of one pass", 256)


def _max_append(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """The number in `max-append=N`."""
    return _named_number("--incremental", "max-append", value, "the most new events of one history in a pass", 16)


def _named_number(option: str, wanted: str, value: str | None, what: str, example: int) -> int | None:
    if value is None:
        return None
    name, _, number = value.partition("=")
    # Nine digits: any count, and no text that int() refuses for its length.
    if name != wanted or not number.isdecimal() or len(number) > 9:
        raise UsageError(
            "HSTU-E901",
            f"{option} {value} cannot be used",
            f"it takes {what}",
            f"write {option} {wanted}={example}",
        )
    return int(number)


@cli.command()
@click.argument("checkpoint", type=_PATH)
@click.option("-o", "--output", type=_PATH, help="Bundle folder (default: CHECKPOINT's stem + .hstu).")
@click.option("--fp32", is_flag=True, help="float32 graph (default).")
@click.option("--fp16", is_flag=True, help="float16 graph, strongly typed; norms and accumulation stay float32.")
@click.option("--bf16", is_flag=True, help="bfloat16 graph, strongly typed; norms and accumulation stay float32.")
@click.option("--int8", is_flag=True, help="float16 graph whose products with weights are int8; needs --calib.")
@click.option("--fp8", is_flag=True, help="float16 graph whose products with weights are float8 (e4m3); needs --calib.")
@click.option(
    "--calib",
    "calibration",
    type=_PATH,
    metavar="FILE",
    help="Table that `hstu-compile calibrate` wrote of CHECKPOINT.",
)
@click.option("--observer", metavar="NAME", help="Rule that bounds activations (default: the table's).")
@click.option(
    "--smooth-quant", type=float, metavar="ALPHA", help="Move this share of the activations' range into the weights."
)
@click.option("--keep-fp16", multiple=True, metavar="SITE", help="Leave this product in float16; may be repeated.")
@click.option(
    "--data",
    "labelled_data",
    type=_PATH,
    metavar="FILE",
    help="Measure ranking quality on these requests, an .npz with target_ids or labels.",
)
@click.option(
    "--mixed",
    type=click.Choice(["auto"]),
    help="Leave in float16 the products that cost most quality on --data, until it is within --budget.",
)
@click.option(
    "--budget",
    type=float,
    help=f"Largest change of HR@10 and NDCG@10, or relative one of AUC and NE, against float32; the build fails beyond "
    f"it (default: {DEFAULT_BUDGET} with --mixed, else none).",
)
@click.option("--config", "config_file", type=_PATH, help="JSON configuration of the training run.")
@click.option("--dialect", help="Checkpoint family (default: detected).")
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx", "onnx"]),
    default="auto",
    show_default=True,
    help="Engine builder; onnx builds no engine.",
)
@click.option("--max-batch", type=int, default=64, show_default=True, help="Most sequences in a request.")
@click.option("--opt-batch", type=int, help="Typical number of sequences (default: max-batch / 8).")
@click.option("--max-seq-len", type=int, help="Longest history in events (default: the model's limit).")
@click.option("--opt-seq-len", type=int, help="Typical history (default: max-seq-len / 2).")
@click.option(
    "--top-k", type=int, default=0, show_default=True, metavar="K", help="Also output the K best unseen items."
)
@click.option("--max-candidates", type=int, help="Most candidates of a user in one packed forward (ranking models).")
@click.option(
    "--m-falcon",
    "micro_batch",
    metavar="micro-batch=N",
    callback=_micro_batch,
    help="Also build the graphs prefill and score, N candidates a pass (ranking models).",
)
@click.option(
    "--incremental",
    "max_append",
    metavar="max-append=N",
    callback=_max_append,
    help="Also build the graphs prefill and append, N new events of a history a pass (retrieval models).",
)
@click.option(
    "--embeddings",
    type=click.Choice(["inside", "external"]),
    default="inside",
    show_default=True,
    help="Tables in the graph, or embedding rows as inputs (ranking models).",
)
@click.option(
    "--attention",
    type=click.Choice(["auto", "fused"]),
    default="auto",
    show_default=True,
    help="Who computes attention: the plugin in TensorRT and native operators elsewhere (auto), or our kernels between "
    "the engines of a graph that is cut at its attentions (fused; tensorrt-rtx).",
)
@click.option(
    "--attention-silu",
    type=click.Choice(["fast", "accurate"]),
    default="fast",
    show_default=True,
    help="Error of the plugin's SiLU on Hopper: fast adds half of what fp16 rounds a positive score's weight by.",
)
@click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Compare every artifact with the eager model."
)
@click.option(
    "--prune/--no-prune",
    default=None,
    help="Compute the last layer only for the rows that are read (default: yes; retrieval on TensorRT 8: no).",
)
@click.option(
    "--fuse-norms/--no-fuse-norms",
    default=True,
    show_default=True,
    help="Make one operator, and in TensorRT one kernel of the plugin, of each norm and what surrounds it.",
)
@click.option(
    "--tabulate-towers/--no-tabulate-towers",
    default=None,
    help="Compute what a ranking model's towers make of each embedding now, and look it up (default: where possible).",
)
@click.option(
    "--plugin/--no-plugin",
    default=None,
    help="Build the TensorRT plugin of this model into the bundle (default: when the backend is tensorrt).",
)
@click.option("--dry-run", is_flag=True, help="Read the checkpoint, say what would be built, and stop.")
@click.option("--keep-intermediates", type=_PATH, metavar="DIR", help="Write the artifact of every stage to DIR.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the verification requests.")
@_JSON
@click.option("-v", "--verbose", is_flag=True, help="Say more while it runs.")
@trt_options
def build(
    checkpoint: Path,
    fp32: bool,
    fp16: bool,
    bf16: bool,
    int8: bool,
    fp8: bool,
    dry_run: bool,
    as_json: bool,
    verbose: bool,
    engine_options: EngineOptions,
    **settings: Any,
) -> int:
    """Compile CHECKPOINT to a verified bundle.

    CHECKPOINT is a FILE that torch.save wrote, or a FOLDER that torch.distributed.checkpoint or Meta's DLRMv3 training
    wrote.

    The bundle holds the ONNX graph, the engine, reference outputs and a report.

    Exits with 6 when the artifact differs from the eager model by more than the bound; the bundle is written all the
    same, marked FAIL, so that its report can be read.
    """
    quantization = _quantization(int8, fp8)
    # A quantised graph is float16 where it is not quantised; another precision that is asked for is refused.
    precision: Any = "fp16" if quantization is not None and not (fp32 or bf16) else _one_precision(fp32, fp16, bf16)
    config = BuildConfig(checkpoint=checkpoint, precision=precision, quantization=quantization, **settings)
    from hstu_compile import pipeline

    if dry_run:
        plan = pipeline.rehearse(config, engine_options)
        _print_json(plan.to_dict()) if as_json else _print_plan(plan, precision)
        if config.mixed is not None and not as_json:
            click.echo(
                f"mixed       {config.mixed}: the build leaves more products in float16 until the quality on "
                f"{config.labelled_data} is within {config.quality_budget:g}"
            )
        return 0
    console = _Console(verbose, len(pipeline.STAGES))
    result = pipeline.compile_checkpoint(config, engine_options, console)
    if as_json:
        _print_json({"bundle": str(result.path), "status": result.status, "report": result.report})
    else:
        _print_result(result)
    if (result.report["metrics"] or {}).get("within") is False:
        click.echo("quality beyond the budget: see `hstu-compile explain HSTU-E833` and the report", err=True)
        return EXIT_VERIFICATION
    return _exit_code(result.status)


def _print_plan(plan: BuildPlan, precision: str) -> None:
    facts = plan.to_dict()
    config = plan.spec.config
    click.echo(f"checkpoint  {facts['checkpoint']['file']}, dialect {plan.spec.dialect}")
    click.echo(f"model       {config.num_layers} layers, {facts['parameters']} parameters, precision {precision}")
    click.echo(
        f"attention   {facts['attention_nodes']} hstu::HstuAttention nodes, one per layer; all layers covered; "
        f"SiLU {plan.attention_silu}"
    )
    if plan.quantization is not None:
        _print_quantization(plan.quantization.to_dict())
    limits = plan.limits
    click.echo(f"graphs      {', '.join(plan.graphs)}")
    click.echo(
        f"profile     1 to {limits.max_batch} sequences (typical {limits.opt_batch}) of up to "
        f"{limits.max_seq_len} events "
        f"(typical {limits.opt_seq_len})"
        + (f", up to {limits.max_candidates} candidates each" if limits.max_candidates else "")
        + (f", up to {limits.max_append} new events each" if limits.max_append else "")
    )
    click.echo(f"backend     {plan.backend.name}: {plan.backend.reason}")
    if plan.fused is not None:
        _print_fused(plan.fused)


def _print_fused(plan: FusedPlan) -> None:
    cut = ", ".join(
        f"{graph} {count} engines around {plan.attentions[graph]} attentions" for graph, count in plan.segments.items()
    )
    click.echo(f"segments    {cut}")
    hopper = len(plan.hopper_kernels)
    click.echo(
        f"kernels     {len(plan.kernels)} portable of attention, {len(plan.norm_kernels)} of norms, "
        f"and {hopper} for Hopper if nvcc is there"
    )


def _print_quantization(facts: dict[str, Any]) -> None:
    sites, kept, smoothing = facts["sites"], facts["kept"], facts["smooth_quant"]
    click.echo(
        f"quantised   {len(sites)} of {len(sites) + len(kept)} products in {facts['kind']}, by {facts['observer']}"
        + (f", smoothing {smoothing:g}" if smoothing is not None else "")
        + f"; {facts['calibration']['samples']} requests in {facts['calibration']['file']}"
    )
    for name, scales in sites.items():
        low, high = scales["weight_scales"]
        click.echo(
            f"  {facts['kind']}  {name}  input scale {scales['input_scale']:.4g}, weights {low:.4g} to {high:.4g}"
        )
    for name, reason in kept.items():
        click.echo(f"  fp16  {name}  {reason}")


def _print_result(result: BuildResult) -> None:
    if ladder := (result.report["quantization"] or {}).get("sensitivity"):
        from hstu_compile._report_ladder import ladder_table

        click.echo(f"{ladder_table(ladder)}\n")
    if result.worst_error is None:
        click.echo(f"{result.path}  {result.status}")
    else:
        click.echo(
            f"{result.path}  {result.status}  worst error {result.worst_error:.3g} (allowed {result.worst_bound:.3g})"
        )


@cli.command()
@click.argument("model", type=_PATH)
@click.option("-o", "--output", type=_PATH, help="Engine file (default: MODEL's stem + .engine).")
@click.option("--backend", type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]), default="auto", show_default=True)
@click.option(
    "--attention",
    type=click.Choice(["auto", "fused"]),
    default="auto",
    show_default=True,
    help="fused: cut the graph at its attentions into engines that a bundle's kernels run between (tensorrt-rtx).",
)
@click.option("--max-batch", type=int, default=64, show_default=True, help="Most sequences in a request.")
@click.option("--opt-batch", type=int, help="Typical number of sequences (default: max-batch / 8).")
@click.option("--max-seq-len", type=int, help="Longest history (default: what the graph was exported for).")
@click.option("--opt-seq-len", type=int, help="Typical history (default: max-seq-len / 2).")
@click.option("--dry-run", is_flag=True, help="Print the equivalent trtexec command and stop.")
@_JSON
@trt_options
def engine(
    model: Path,
    output: Path | None,
    backend: str,
    attention: Any,
    max_batch: int,
    opt_batch: int | None,
    max_seq_len: int | None,
    opt_seq_len: int | None,
    dry_run: bool,
    as_json: bool,
    engine_options: EngineOptions,
) -> int:
    """Build an engine from an .onnx file.

    MODEL is the model.onnx of a bundle. Needs TensorRT or TensorRT-RTX, and no torch.
    """
    from hstu_compile import engine_stage

    request = engine_stage.EngineRequest(
        model=model,
        output=output if output is not None else model.with_suffix(".engine"),
        backend=backend,
        max_batch=max_batch,
        opt_batch=opt_batch if opt_batch is not None else max(1, max_batch // 8),
        max_seq_len=max_seq_len,
        opt_seq_len=opt_seq_len,
        options=engine_options,
        attention=attention,
    )
    if dry_run:
        engine_stage.require_one_engine(request)
        profiles = engine_stage.profiles_of(request)
        click.echo(trtexec_command(model, engine_options, profiles, engine_path=request.output))
        return 0
    check_not_input(request.output, [model])
    facts = engine_stage.run_engine_stage(request)
    if as_json:
        _print_json(facts)
    else:
        click.echo(
            f"{facts['output']}  {facts['backend']} {facts['version']}, {facts['bytes']} bytes, "
            f"{facts['seconds']:.1f} s"
        )
    return 0


@cli.command()
@click.argument("checkpoint", type=_PATH)
@click.option(
    "--data", multiple=True, type=_PATH, metavar="FILE.npz", help="Recorded requests, as for `run`; may be repeated."
)
@click.option("-o", "--output", required=True, type=_PATH, metavar="FILE.json", help="The calibration table.")
@click.option(
    "--observer",
    type=click.Choice(["amax", "percentile", "entropy", "mse"]),
    help="How a build bounds activations unless told otherwise (default: amax). The table serves all of them.",
)
@click.option("--samples", type=int, default=1024, show_default=True, help="Most requests, drawn across all lengths.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draw.")
@click.option(
    "--merge", multiple=True, type=_PATH, metavar="FILE.json", help="Add a table of other data; may be repeated."
)
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--config", "config_file", type=_PATH, help="JSON configuration of the training run.")
@click.option("--dialect", help="Checkpoint family (default: detected).")
@click.option(
    "--embeddings",
    type=click.Choice(["inside", "external"]),
    default="inside",
    show_default=True,
    help="What requests hold: ids, or embedding rows (ranking models).",
)
@_JSON
@click.option("-v", "--verbose", is_flag=True, help="Say more while it runs.")
def calibrate(
    checkpoint: Path,
    data: tuple[Path, ...],
    output: Path,
    merge: tuple[Path, ...],
    embeddings: str,
    as_json: bool,
    verbose: bool,
    **settings: Any,
) -> int:
    """Record how large CHECKPOINT's activations get on real requests.

    CHECKPOINT is a FILE or FOLDER, as for `build`.

    The table is what `build --int8` and `build --fp8` take their scales from.
    """
    from hstu_compile import calibrate as stage

    request = stage.CalibrationRequest(
        checkpoint, output, data, merge, external_embeddings=embeddings == "external", **settings
    )
    try:
        result = stage.calibrate(request, _Console(verbose, 1).stage_progress)
    except KeyboardInterrupt:
        if not request.partial.exists():
            raise
        click.echo(f"interrupted; {request.partial} keeps what was counted: repeat with --resume", err=True)
        return EXIT_INTERRUPTED
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    facts = stage.calibration_facts(request, result)
    _print_json(facts) if as_json else click.echo(stage.render_calibration(facts))
    return 0


@cli.command()
@click.argument("path", metavar="CKPT|BUNDLE", type=_PATH)
@click.option("--config", "config_file", type=_PATH, help="JSON configuration of the training run.")
@click.option("--dialect", help="Checkpoint family (default: detected).")
@click.option(
    "--embeddings",
    type=click.Choice(["inside", "external"]),
    default="inside",
    show_default=True,
    help="External leaves a ranking checkpoint's tables out: they are not read.",
)
@_JSON
def inspect(path: Path, config_file: Path | None, dialect: str | None, embeddings: str, as_json: bool) -> int:
    """Say what a checkpoint (a FILE, or a FOLDER of shards) or a bundle holds."""
    from hstu_compile import inspection

    facts = inspection.inspect_path(path, config_file, dialect, external_embeddings=embeddings == "external")
    _print_json(facts) if as_json else click.echo(inspection.render_inspection(facts))
    return 0


@cli.command()
@click.argument("bundle", type=_PATH)
@_JSON
def verify(bundle: Path, as_json: bool) -> int:
    """Check BUNDLE and repeat its verification.

    The stored requests run again, without the checkpoint and without torch.
    """
    from hstu_compile.bundle import read_bundle
    from hstu_compile.recheck import recheck_bundle

    files = read_bundle(bundle)
    result = recheck_bundle(files, _silent)
    if as_json:
        _print_json(result.to_dict())
    else:
        for run in result.verification.runs:
            click.echo(f"{run.artifact} on {run.runtime}: {run.status}" + (f" ({run.reason})" if run.reason else ""))
        for check in result.polygraphy:
            click.echo(f"{check.command}: exit {check.exit_code}")
        worst = result.verification
        click.echo(f"{bundle}  {result.status}  worst error {worst.worst_error:.3g} (allowed {worst.worst_bound:.3g})")
    return _exit_code(result.status)


def _exit_code(status: str) -> int:
    """0, or that of a failed verification; a build without verification does not fail it."""
    if status != "FAIL":
        return 0
    click.echo("verification failed: see `hstu-compile explain HSTU-E601` and the report", err=True)
    return EXIT_VERIFICATION


def _silent(what: str, done: int, total: int) -> None:
    """Progress of a command that is short."""


@cli.command()
@click.argument("bundle", type=_PATH)
@click.option("--inputs", required=True, type=_PATH, help="Requests: an .npz with one array per input.")
@click.option("--outputs", required=True, type=_PATH, help="Where to write the answers, an .npz.")
@click.option(
    "--runtime",
    type=click.Choice(["onnxruntime", "tensorrt", "tensorrt-rtx"]),
    default="onnxruntime",
    show_default=True,
)
@_JSON
def run(bundle: Path, inputs: Path, outputs: Path, runtime: str, as_json: bool) -> int:
    """Answer the requests in INPUTS with BUNDLE."""
    from hstu_compile.bundle import load_bundle
    from hstu_compile.npz import save_npz
    from hstu_compile.runtime.request import feeds_from_npz

    check_not_input(outputs, (bundle, inputs))
    with load_bundle(bundle, runtime) as loaded:
        answers = loaded.run(feeds_from_npz(inputs))
    save_npz(outputs, answers)
    facts = [{"name": n, "dtype": str(a.dtype), "shape": list(a.shape)} for n, a in answers.items()]
    if as_json:
        _print_json({"outputs": facts, "file": str(outputs)})
    else:
        for fact in facts:
            click.echo(f"{fact['name']}  {fact['dtype']}  {fact['shape']}")
    return 0


@cli.command()
@click.argument("bundle", type=_PATH)
@click.option("-o", "--output", type=_PATH, metavar="DIR", help="Folder of the profile (default: BUNDLE + .profile).")
@click.option(
    "--runtime", type=click.Choice(["tensorrt", "tensorrt-rtx"]), help="(default: what the bundle's engines are of)"
)
@click.option("--calls", type=click.IntRange(min=1), default=50, show_default=True, help="Measured, of each request.")
@click.option(
    "--cuda-graphs/--no-cuda-graphs",
    default=None,
    help="Also measure replays of CUDA graphs (default: where the runtime records them).",
)
@click.option(
    "--timeline/--no-timeline", default=True, show_default=True, help="Trace the kernels; needs torch with CUDA."
)
@click.option("--force", is_flag=True, help="Replace an existing profile.")
@_JSON
def profile(bundle: Path, as_json: bool, **settings: Any) -> int:
    """Measure BUNDLE on this GPU: latencies, and a timeline of kernels.

    Of each graph the typical and the largest stored request run. DIR gets profile.json and the bundle's report with the
    sections Timings and Kernels; the bundle is not changed.
    """
    from hstu_compile import bundle_profile
    from hstu_compile._report_kernels import profile_table

    request = bundle_profile.ProfileRequest(bundle, **settings)
    found = bundle_profile.profile_bundle(request, _Console(False, 1).stage_progress)
    for each in found["passes"]:
        for text in each["warnings"]:
            click.echo(f"warning: {each['graph']}, {each['request']}, {each['way']}: {text}", err=True)
    _print_json(found) if as_json else click.echo(f"{profile_table(found)}\n{request.folder}")
    return 0


@cli.command()
@click.argument("bundle", type=_PATH)
@click.option("-o", "--output", required=True, type=_PATH, metavar="DIR", help="Model repository; others in it stay.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "python", "tensorrt"]),
    default="auto",
    show_default=True,
    help="Triton's backend: tensorrt where the bundle has a TensorRT engine, else python.",
)
@click.option("--name", help="Name of the model (default: the bundle's).")
@click.option("--max-queue-delay-us", type=int, default=500, show_default=True, help="How long a request may wait.")
@click.option("--instances", type=int, default=1, show_default=True, help="Copies of the model on the device.")
@click.option("--cuda-graphs", is_flag=True, help="Record CUDA graphs for batches of many sizes (tensorrt).")
@click.option(
    "--runtime",
    type=click.Choice(["onnxruntime", "tensorrt", "tensorrt-rtx"]),
    default="onnxruntime",
    show_default=True,
    help="What the python backend runs.",
)
@click.option("--device", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True, help="Of ONNX Runtime.")
@click.option("--kv-budget-mib", type=int, default=256, show_default=True, help="KV cache, of models that have one.")
@click.option(
    "--truncation",
    type=click.Choice(["refuse", "keep_last"]),
    default="refuse",
    show_default=True,
    help="Histories that are too long (python, or the check).",
)
@click.option(
    "--unknown-ids",
    type=click.Choice(["refuse", "clamp"]),
    default="refuse",
    show_default=True,
    help="Ids outside their table (python, or the check; ranking models).",
)
@click.option(
    "--lost-process",
    type=click.Choice(["report", "stop_server"]),
    default="report",
    show_default=True,
    help="When the model's process ends unasked (python, or the check).",
)
@click.option(
    "--shapes",
    type=click.Choice(["auto", "exact", "fine", "coarse"]),
    default="auto",
    show_default=True,
    help="Pad passes to few shapes (python): auto does so, coarsely, for tensorrt-rtx, which compiles for each.",
)
@click.option("--execution-env", metavar="PATH", help="Python of the python backend: a conda-pack archive or folder.")
@click.option(
    "--checked/--unchecked",
    default=True,
    show_default=True,
    help="Check each request in front of the engine (tensorrt).",
)
@click.option("--force", is_flag=True, help="Replace a model of that name.")
@_JSON
def triton(
    bundle: Path,
    output: Path,
    backend: Any,
    name: str | None,
    execution_env: str | None,
    force: bool,
    as_json: bool,
    max_queue_delay_us: int,
    instances: int,
    cuda_graphs: bool,
    checked: bool,
    **settings: Any,
) -> int:
    """Write BUNDLE as a model of Triton Inference Server.

    DIR/launch.sh checks the repository and starts the server; DIR/NAME has examples of clients.
    """
    from hstu_compile.serving import repository
    from hstu_compile.serving.settings import RuntimeSettings, Scheduling

    facts = repository.write_repository(
        repository.RepositoryRequest(
            bundle,
            output,
            backend,
            name,
            Scheduling(max_queue_delay_us, instances, cuda_graphs),
            RuntimeSettings(**settings),
            PurePosixPath(execution_env) if execution_env is not None else None,
            force,
            checked,
        )
    )
    if as_json:
        _print_json(facts)
        return 0
    click.echo(f"{facts['path']}  {facts['backend']} backend; start: {facts['launch']}")
    for note in facts["notes"]:
        click.echo(f"note: {note}", err=True)
    return 0


@cli.group()
def plugin() -> None:
    """Work with the TensorRT plugin library."""


@plugin.command(name="build")
@click.option(
    "--onnx",
    "models",
    multiple=True,
    type=_PATH,
    help="Build the kernels that this graph needs; may be repeated (default: a common set).",
)
@click.option("-o", "--output", type=_PATH, metavar="DIR", help="Also copy the libraries to DIR.")
@click.option("--arch", "archs", multiple=True, help="GPU architecture such as 9.0; may be repeated (default: all).")
@click.option(
    "--tensorrt-version", help="TensorRT that will load the library, such as 8.5.3 (default: the installed one)."
)
@click.option(
    "--hopper",
    type=click.Choice(["auto", "require", "off"]),
    default="auto",
    show_default=True,
    help="Hopper's own kernels: where nvcc is found, or fail without it, or leave them out.",
)
@_JSON
def plugin_build(
    models: tuple[Path, ...],
    output: Path | None,
    archs: tuple[str, ...],
    tensorrt_version: str | None,
    hopper: Any,
    as_json: bool,
) -> int:
    """Compile the plugin library, without a GPU.

    Needs CMake and g++; the kernels that are faster on Hopper also need nvcc. Results are cached by content.
    """
    from hstu_compile import plugin_stage

    capabilities = parse_compute_capabilities(",".join(archs)) if archs else ()
    facts = plugin_stage.run_plugin_stage(models, output, capabilities, tensorrt_version, hopper)
    if as_json:
        _print_json(facts)
    else:
        click.echo("\n".join(facts["libraries"]))
        click.echo(facts["hopper"]["summary"], err=True)
    return 0


@cli.command()
@click.argument("target", metavar="[BUNDLE|MODEL.onnx]", required=False, type=_PATH)
@_JSON
def doctor(target: Path | None, as_json: bool) -> int:
    """Find out why a plugin is not found.

    Lists the registered creators, what the model asks for, which loader needs which library, and what is missing.
    """
    from hstu_compile.doctor import diagnose, render_doctor

    report = diagnose(target)
    _print_json(dataclasses.asdict(report)) if as_json else click.echo(render_doctor(report))
    return 0 if not report.findings else EXIT_BUILD


@cli.command()
@_JSON
def env(as_json: bool) -> int:
    """Describe this machine for a bug report."""
    from hstu_compile.environment import collect_environment, render_environment

    facts = collect_environment()
    _print_json(facts) if as_json else click.echo(render_environment(facts))
    return 0


@cli.command()
@click.argument("code", required=False)
def explain(code: str | None) -> int:
    """Explain an error code, or list all of them."""
    if code is None:
        for name, doc in ERROR_CODES.items():
            click.echo(f"{name}  {doc.title}")
        return 0
    wanted = code.upper() if code.upper().startswith("HSTU-") else f"HSTU-{code.upper()}"
    if wanted not in ERROR_CODES:
        raise UsageError(
            "HSTU-E902", f"there is no error code {code}", "it is not in the list", "run `hstu-compile explain`"
        )
    click.echo(f"{wanted}: {ERROR_CODES[wanted].title}\n\n{ERROR_CODES[wanted].text}")
    return 0
