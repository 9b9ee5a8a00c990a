"""Says why a plugin is or is not found: what the model asks for, what is registered, which loader needs which file. L2.

Pure data (`DoctorReport`) and a text renderer; nothing is loaded into TensorRT, so asking changes nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from hstu_compile.errors import EngineError, PluginError
from hstu_compile.plugin_library import SELF_REGISTERING, VERSION_COMPATIBLE, default_cache_dir
from hstu_compile.plugins.kernels.hopper.compile import usable_nvcc
from hstu_compile.tensorrt_api import PluginKey, tensorrt_api

ONNX_FILE = "model.onnx"
_STANDARD_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "com.microsoft"}
_FIRST_VERSION_WITH_DOMAIN_FALLBACK = "10.10"


@dataclasses.dataclass(frozen=True)
class RequestedPlugin:
    """A custom operator in the model, as TensorRT's parser will look it up.

    Attributes:
        key: name, version and namespace.
        num_nodes: how many nodes ask for it.
        names_namespace: the nodes carry `plugin_namespace`; without it, parsers before 10.10 look in the namespace "".
        has_native_body: the model holds an ONNX function for it, so runtimes without the plugin can run it.
    """

    key: PluginKey
    num_nodes: int
    names_namespace: bool
    has_native_body: bool


@dataclasses.dataclass(frozen=True)
class BuiltPlugin:
    """A plugin library in the cache.

    Attributes:
        folder: where its files are.
        trt_version: TensorRT version of its headers; it serves that major version.
        archs: compute capabilities inside.
        num_hopper: how many Hopper kernels are inside.
        files: names of its libraries.
    """

    folder: Path
    trt_version: str
    archs: tuple[int, ...]
    num_hopper: int
    files: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LoaderAdvice:
    """Which library one loader needs, and how it is told."""

    loader: str
    library: str
    how: str


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that is missing or will go wrong, and what to do."""

    what: str
    fix: str


@dataclasses.dataclass(frozen=True)
class DoctorReport:
    """The whole answer; `findings` is empty when every requested plugin is registered or nothing is requested.

    Attributes:
        model: the ONNX file that was read, or None.
        tensorrt_version: of the TensorRT that this Python imports, or None.
        tensorrt_problem: why it cannot be imported, or None.
        registered: creators in TensorRT's registry.
        requested: custom operators of the model.
        built: plugin libraries in the cache.
        nvcc: the compiler of the Hopper kernels and its release, or why there is none.
        loaders: which loader needs which library.
        findings: what is missing.
    """

    model: Path | None
    tensorrt_version: str | None
    tensorrt_problem: str | None
    registered: tuple[PluginKey, ...]
    requested: tuple[RequestedPlugin, ...]
    built: tuple[BuiltPlugin, ...]
    nvcc: str
    loaders: tuple[LoaderAdvice, ...]
    findings: tuple[Finding, ...]


LOADERS = (
    LoaderAdvice("polygraphy", SELF_REGISTERING, f"polygraphy run --trt --plugins {SELF_REGISTERING}"),
    LoaderAdvice(
        "trtexec (dlopen)", SELF_REGISTERING, f"--staticPlugins={SELF_REGISTERING} (--plugins before TensorRT 10)"
    ),
    LoaderAdvice(
        "trtexec (registry)", VERSION_COMPATIBLE, f"--dynamicPlugins={VERSION_COMPATIBLE} (TensorRT 8.6 and later)"
    ),
    LoaderAdvice(
        "Triton Inference Server",
        SELF_REGISTERING,
        f"--backend-config=tensorrt,plugins=/path/{SELF_REGISTERING} (or LD_PRELOAD; a failure is only logged)",
    ),
    LoaderAdvice(
        "C++ loadLibrary", VERSION_COMPATIBLE, f'registry.loadLibrary("{VERSION_COMPATIBLE}"), before deserialising'
    ),
    LoaderAdvice(
        "C++ dlopen, Python ctypes", SELF_REGISTERING, f'dlopen("{SELF_REGISTERING}", RTLD_NOW) after libnvinfer'
    ),
    LoaderAdvice("hstu-compile", SELF_REGISTERING, f"--plugins {SELF_REGISTERING}, for engine, run and verify"),
)


def diagnose(target: Path | None = None, *, cache_dir: Path | None = None) -> DoctorReport:
    """Compare what a model asks for with what this process has registered and what has been built.

    Args:
        target: a bundle, an ONNX file, or None to look at this machine only.
        cache_dir: where built libraries are; None is the user's cache.

    Raises:
        PluginError: HSTU-E503 if the target has no readable ONNX file.
    """
    model = None if target is None else _model_file(target)
    requested = () if model is None else _requested_plugins(model)
    version, problem, registered = _registry()
    built = tuple(_built_plugins((cache_dir or default_cache_dir()) / "plugins"))
    findings = tuple(_findings(requested, registered, version, problem, built))
    return DoctorReport(model, version, problem, registered, requested, built, _nvcc(), LOADERS, findings)


def _model_file(target: Path) -> Path:
    model = target / ONNX_FILE if target.is_dir() else target
    if not model.is_file():
        raise PluginError(
            "HSTU-E503",
            f"{target} cannot be diagnosed",
            f"{model} is not a file",
            "give a bundle (a folder with model.onnx) or an ONNX file",
            {"target": str(target)},
        )
    return model


def _requested_plugins(model: Path) -> tuple[RequestedPlugin, ...]:
    """Read the custom operators of an ONNX file; weights in other files are not loaded."""
    try:
        proto = onnx.load(str(model), load_external_data=False)
    except Exception as error:  # protobuf's own exception types differ between its implementations
        raise PluginError(
            "HSTU-E503",
            f"{model} cannot be diagnosed",
            f"not an ONNX file: {error}",
            "give a bundle (a folder with model.onnx) or an ONNX file",
            {"target": str(model)},
        ) from error
    bodies = {(function.domain, function.name) for function in proto.functions}
    seen: Counter[tuple[PluginKey, bool, bool]] = Counter()
    for node in _custom_nodes(proto):
        attributes = {
            a.name: a.s.decode(errors="replace") for a in node.attribute if a.type == onnx.AttributeProto.STRING
        }
        namespace = attributes.get("plugin_namespace")
        key = PluginKey(
            node.op_type, attributes.get("plugin_version", "1"), node.domain if namespace is None else namespace
        )
        seen[key, namespace is not None, (node.domain, node.op_type) in bodies] += 1
    return tuple(RequestedPlugin(key, count, named, native) for (key, named, native), count in seen.items())


def _custom_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield nodes of non-standard domains in the graph and in its subgraphs, not in function bodies."""
    pending = list(proto.graph.node)
    while pending:
        node = pending.pop()
        if node.domain not in _STANDARD_DOMAINS:
            yield node
        for attribute in node.attribute:
            for graph in [attribute.g, *attribute.graphs]:
                pending.extend(graph.node)


def _registry() -> tuple[str | None, str | None, tuple[PluginKey, ...]]:
    """Return TensorRT's version, why there is none, and the creators in its registry."""
    try:
        api = tensorrt_api("tensorrt")
    except EngineError as error:
        return None, error.why, ()
    return str(api.trt.__version__), None, tuple(api.registered())


def _nvcc() -> str:
    """Say which nvcc compiles the Hopper kernels here, or why none does."""
    try:
        compiler, (major, minor) = usable_nvcc()
    except RuntimeError as error:
        return f"not usable: {error}"
    return f"{major}.{minor}, {compiler}"


def _built_plugins(store: Path) -> Iterator[BuiltPlugin]:
    """Yield the complete libraries of the cache, newest TensorRT first; anything unreadable is no library."""
    found = []
    for path in store.glob("*/manifest.json"):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            plugin = BuiltPlugin(
                path.parent,
                manifest["trt_version"],
                tuple(manifest["archs"]),
                len(manifest["hopper"]["variants"]),
                tuple(manifest["files"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if all((plugin.folder / name).is_file() for name in plugin.files):
            found.append(plugin)
    yield from sorted(found, key=lambda p: [int(part) for part in p.trt_version.split(".")], reverse=True)


def _findings(
    requested: Iterable[RequestedPlugin],
    registered: tuple[PluginKey, ...],
    version: str | None,
    problem: str | None,
    built: tuple[BuiltPlugin, ...],
) -> Iterator[Finding]:
    for plugin in requested:
        if not plugin.names_namespace and plugin.key.namespace:
            yield Finding(
                f"{plugin.num_nodes} {plugin.key.name} node(s) have no plugin_namespace attribute: TensorRT before "
                f"{_FIRST_VERSION_WITH_DOMAIN_FALLBACK} looks for namespace ''",
                "export the model again with hstu-compile, which writes plugin_version and plugin_namespace",
            )
        if problem is not None:
            yield Finding(
                f"{plugin.key} is needed by {plugin.num_nodes} node(s); TensorRT cannot be imported here: {problem}",
                "install TensorRT (pip install 'hstu-compile[gpu]')"
                + (
                    ", or run the model's native body with ONNX Runtime or TensorRT-RTX"
                    if plugin.has_native_body
                    else ""
                ),
            )
        elif plugin.key not in registered:
            yield _missing_creator(plugin, registered, version or "", built)


def _missing_creator(
    plugin: RequestedPlugin, registered: tuple[PluginKey, ...], version: str, built: tuple[BuiltPlugin, ...]
) -> Finding:
    """Say which part of the key differs from what is registered, and which library would register it."""
    near = [key for key in registered if key.name == plugin.key.name]
    why = (
        f"registered under that name: {', '.join(map(str, near))}" if near else "no creator of that name is registered"
    )
    major = version.split(".")[0]
    fitting = [library for library in built if library.trt_version.split(".")[0] == major]
    if fitting:
        fix = f"load {fitting[0].folder / SELF_REGISTERING} (see the table of loaders)"
    else:
        fix = f"hstu-compile plugin build (nothing in the cache is for TensorRT {major}), then load {SELF_REGISTERING}"
    return Finding(f"{plugin.key} is needed by {plugin.num_nodes} node(s): {why}", fix)


def render_doctor(report: DoctorReport) -> str:
    """Render the report as text for a terminal."""
    lines = [f"TensorRT      {report.tensorrt_version or f'not importable: {report.tensorrt_problem}'}"]
    ours = [key for key in report.registered if key.namespace] or list(report.registered)
    lines += [f"registered    {len(report.registered)} creators" + "".join(f"\n  {key}" for key in ours[:20])]
    if report.model is not None:
        lines.append(f"model         {report.model}")
        for plugin in report.requested:
            body = "has a native body" if plugin.has_native_body else "no native body"
            lines.append(f"  asks for    {plugin.key} in {plugin.num_nodes} node(s), {body}")
        if not report.requested:
            lines.append("  asks for    no plugin")
    lines.append(f"built         {len(report.built)} plugin libraries in the cache")
    for built in report.built:
        archs = ", ".join(f"sm_{arch}" for arch in built.archs)
        lines.append(f"  TensorRT {built.trt_version}  {archs}  {built.num_hopper} Hopper kernels  {built.folder}")
    lines.append(f"nvcc          {report.nvcc}")
    lines.append("which library which loader needs")
    width = max(len(advice.loader) for advice in report.loaders)
    lines += [f"  {advice.loader:<{width}}  {advice.how}" for advice in report.loaders]
    if report.findings:
        lines.append("missing")
        for finding in report.findings:
            lines += [f"  - {finding.what}", f"    Fix: {finding.fix}"]
    else:
        lines.append("nothing is missing")
    return "\n".join(lines)
