"""Builder options under trtexec's names: a frozen dataclass, one click decorator, and the trtexec command. Level 2.

`--stripWeights` is left out on purpose: its plan cannot run until it is refitted, so it could not be verified.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from hstu_compile.artifacts import Profile
from hstu_compile.errors import EngineError, UsageError

ProfilingVerbosity = Literal["layer_names_only", "detailed", "none"]
HardwareCompatibility = Literal["none", "ampere+", "sameComputeCapability"]

MEMORY_POOLS = ("workspace", "tacticSharedMem", "tacticDram")
_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_INT32_MAX = 2**31 - 1
_F = TypeVar("_F", bound=Callable[..., Any])

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """What trtexec options ask of the builder. None leaves a setting to TensorRT.

    Attributes:
        min_shapes, opt_shapes, max_shapes: explicit profile, as (input, shape) pairs; all three or none.
        timing_cache: file read before and written after the build.
        builder_optimization_level: 0..5.
        max_aux_streams: auxiliary streams, >= 0.
        memory_pools: (pool, bytes) pairs.
        profiling_verbosity: what the inspector can show. None means detailed: the manifest states the precisions and
            plugin layers that the inspector counts.
        export_layer_info: file for the inspector's JSON.
        hardware_compatibility: on which GPUs the engine may run.
        version_compatible: the engine also runs in later versions.
        no_tf32: never round float32 products to TF32. Graphs that are float32 throughout are always built so.
        compute_capabilities: TensorRT-RTX targets such as "8.9"; empty means any that the backend supports.
        plugins: plugin libraries, loaded before the parser runs.
    """

    min_shapes: Shapes = ()
    opt_shapes: Shapes = ()
    max_shapes: Shapes = ()
    timing_cache: Path | None = None
    builder_optimization_level: int | None = None
    max_aux_streams: int | None = None
    memory_pools: tuple[tuple[str, int], ...] = ()
    profiling_verbosity: ProfilingVerbosity | None = None
    export_layer_info: Path | None = None
    hardware_compatibility: HardwareCompatibility | None = None
    version_compatible: bool = False
    no_tf32: bool = False
    compute_capabilities: tuple[str, ...] = ()
    plugins: tuple[Path, ...] = ()

    def given(self) -> tuple[str, ...]:
        """The options that ask for something, as they are spelled on the command line, such as --noTF32."""
        fields = dataclasses.fields(self)
        return tuple(f"--{_SPELLED[each.name]}" for each in fields if getattr(self, each.name) != each.default)

    def explicit_profile(self) -> Profile | None:
        """The profile that the shape options spell out, or None without them.

        Raises:
            EngineError: HSTU-E405, if the three do not name the same inputs with the same ranks, min <= opt <= max.
        """
        given = {"min": dict(self.min_shapes), "opt": dict(self.opt_shapes), "max": dict(self.max_shapes)}
        if not any(given.values()):
            return None
        names = sorted({name for shapes in given.values() for name in shapes})
        problems = []
        for name in names:
            if absent := [f"--{kind}Shapes" for kind, shapes in given.items() if name not in shapes]:
                problems.append(f"{name} is missing in {', '.join(absent)}")
                continue
            low, typical, high = (given[kind][name] for kind in ("min", "opt", "max"))
            if not len(low) == len(typical) == len(high):
                problems.append(f"{name} has {len(low)}, {len(typical)} and {len(high)} dimensions in min, opt and max")
            elif not all(a <= b <= c for a, b, c in zip(low, typical, high, strict=True)):
                problems.append(f"{name}: min {_spell(low)}, opt {_spell(typical)}, max {_spell(high)} do not ascend")
        if problems:
            raise EngineError(
                "HSTU-E405",
                "the shape options contradict each other",
                "; ".join(problems),
                "give --minShapes, --optShapes and --maxShapes for the same inputs, with min <= opt <= max",
                {"shapes": {kind: {n: list(s) for n, s in shapes.items()} for kind, shapes in given.items()}},
            )
        return Profile("explicit", given["min"], given["opt"], given["max"])


def _spell(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _spec_error(option: str, text: str, why: str, fix: str) -> EngineError:
    return EngineError("HSTU-E405", f"--{option} {text!r} cannot be read", why, fix, {"option": option, "value": text})


def parse_shapes(text: str, option: str = "shapes") -> Shapes:
    """Shapes in trtexec's spelling: `name:1x2,name2:3`; `name:` is a scalar.

    Raises:
        EngineError: HSTU-E405, naming the part that cannot be read.

    >>> parse_shapes("item_ids:8,x:2x3,s:")
    (('item_ids', (8,)), ('x', (2, 3)), ('s', ()))
    """
    fix = f"write --{option}=name:1x2,name2:3"
    shapes: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        name, colon, dims = part.strip().rpartition(":")
        if not colon or not name:
            raise _spec_error(option, text, f"{part!r} is not name:dimensions", fix)
        if dims and not re.fullmatch(r"\d+(x\d+)*", dims):
            raise _spec_error(option, text, f"{dims!r} of {name} is not a list of sizes joined by x", fix)
        if any(len(size) > 10 or int(size) > _INT32_MAX for size in filter(None, dims.split("x"))):
            raise _spec_error(option, text[:80], f"a size of {name} is larger than {_INT32_MAX}", fix)
        if name in shapes:
            raise _spec_error(option, text, f"{name} is given twice", fix)
        shapes[name] = tuple(int(size) for size in dims.split("x")) if dims else ()
    return tuple(shapes.items())


def parse_memory_pools(text: str) -> tuple[tuple[str, int], ...]:
    """Pools in trtexec's spelling: `workspace:4096,tacticSharedMem:48K`; without a suffix the unit is MiB.

    Raises:
        EngineError: HSTU-E405.

    >>> parse_memory_pools("workspace:2G")
    (('workspace', 2147483648),)
    """
    fix = f"write --memPoolSize=workspace:4096M; pools: {', '.join(MEMORY_POOLS)}; units: B, K, M (default), G"
    pools: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\w+):(\d+(?:\.\d+)?)([BKMG]?)(?:iB)?", part.strip())
        if match is None:
            raise _spec_error("memPoolSize", text, f"{part!r} is not pool:size", fix)
        if match[1] not in MEMORY_POOLS:
            raise _spec_error("memPoolSize", text, f"there is no pool {match[1]!r}", fix)
        if match[1] in pools:
            raise _spec_error("memPoolSize", text, f"{match[1]} is given twice", fix)
        size = float(match[2]) * _UNITS[match[3] or "M"]
        if not size < 1 << 63:
            raise _spec_error("memPoolSize", text[:80], f"the size of {match[1]} is more than an address can tell", fix)
        pools[match[1]] = int(size)
    return tuple(pools.items())


def _kebab(camel: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", camel).lower()


# How a field of EngineOptions is spelled on the command line; filled where the options are made.
_SPELLED: dict[str, str] = {}


def _option(name: str, field: str, help_text: str, *aliases: str, **settings: Any) -> Callable[[_F], _F]:
    _SPELLED[field] = name
    spellings = dict.fromkeys([f"--{name}", *(aliases or [f"--{_kebab(name)}"])])
    return click.option(*spellings, f"trt_{field}", help=help_text, **settings)


_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    _option("minShapes", "min_shapes", "Smallest input shapes, name:1x2,name2:3.", metavar="SPEC"),
    _option("optShapes", "opt_shapes", "Input shapes to tune for.", metavar="SPEC"),
    _option("maxShapes", "max_shapes", "Largest input shapes.", metavar="SPEC"),
    _option(
        "timingCacheFile",
        "timing_cache",
        "Kernel timings, read before and written after the build.",
        type=click.Path(dir_okay=False, path_type=Path),
    ),
    _option(
        "builderOptimizationLevel",
        "builder_optimization_level",
        "How long to search for kernels, 0 to 5.",
        type=click.IntRange(0, 5),
    ),
    _option("maxAuxStreams", "max_aux_streams", "Most auxiliary streams.", type=click.IntRange(0, _INT32_MAX)),
    _option("memPoolSize", "memory_pools", "Memory pools, workspace:4096M.", metavar="SPEC"),
    _option(
        "profilingVerbosity",
        "profiling_verbosity",
        "What the engine says about its layers (default detailed).",
        type=click.Choice(["layer_names_only", "detailed", "none"]),
    ),
    _option(
        "exportLayerInfo",
        "export_layer_info",
        "Write the inspector's JSON to this file.",
        type=click.Path(dir_okay=False, path_type=Path),
    ),
    _option(
        "hardwareCompatibilityLevel",
        "hardware_compatibility",
        "On which GPUs the engine may run.",
        type=click.Choice(["none", "ampere+", "sameComputeCapability"]),
    ),
    _option(
        "versionCompatible",
        "version_compatible",
        "Build an engine that later versions run too.",
        "--version-compatible",
        "--vc",
        is_flag=True,
    ),
    _option("noTF32", "no_tf32", "Never round float32 products to TF32.", "--no-tf32", is_flag=True),
    _option(
        "computeCapabilities",
        "compute_capabilities",
        "GPU architectures for TensorRT-RTX, as 8.9 or 8.6,8.9,12.0 (default: all it supports).",
        metavar="CC",
    ),
    _option(
        "plugins",
        "plugins",
        "Plugin library to load; may be repeated.",
        "--staticPlugins",
        "--static-plugins",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        multiple=True,
    ),
)
_FIELDS = tuple(field.name for field in dataclasses.fields(EngineOptions))


def options_from_cli(values: Mapping[str, Any]) -> EngineOptions:
    """Turn the decorator's raw option values into EngineOptions.

    Raises:
        EngineError: HSTU-E405 for a spec that cannot be read.
    """
    settings: dict[str, Any] = {name: values[f"trt_{name}"] for name in _FIELDS}
    for name, option in (("min_shapes", "minShapes"), ("opt_shapes", "optShapes"), ("max_shapes", "maxShapes")):
        settings[name] = parse_shapes(settings[name], option) if settings[name] is not None else ()
    pools = settings["memory_pools"]
    settings["memory_pools"] = parse_memory_pools(pools) if pools is not None else ()
    capabilities = settings["compute_capabilities"]
    settings["compute_capabilities"] = parse_compute_capabilities(capabilities) if capabilities is not None else ()
    options = EngineOptions(**settings)
    options.explicit_profile()
    return options


def parse_compute_capabilities(text: str) -> tuple[str, ...]:
    """`8.6,8.9`, `86` or `sm_86` to ("8.6", "8.9").

    Raises:
        EngineError: HSTU-E405.

    >>> parse_compute_capabilities("sm_89, 12.0")
    ('8.9', '12.0')
    """
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"(?:sm_?)?(\d+?)\.?(\d)", part.strip(), re.IGNORECASE)
        if match is None:
            raise _spec_error("computeCapabilities", text, f"{part!r} is not an architecture", "write 8.9 or 8.6,8.9")
        found.append(f"{match[1]}.{match[2]}")
    return tuple(dict.fromkeys(found))


def trt_options(function: _F) -> _F:
    """Give a click command the trtexec-named options; it receives one argument, `engine_options: EngineOptions`."""

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        values = {name: kwargs.pop(name) for name in [f"trt_{field}" for field in _FIELDS]}
        return function(*args, engine_options=options_from_cli(values), **kwargs)

    decorated: Any = command
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def trtexec_command(
    onnx_path: Path, options: EngineOptions, profiles: Sequence[Profile], *, engine_path: Path | None = None
) -> str:
    """The trtexec command (TensorRT >= 10) that builds the same engine.

    Raises:
        UsageError: HSTU-E901, for --computeCapabilities, which trtexec does not have.
    """
    if options.compute_capabilities:
        raise UsageError(
            "HSTU-E901",
            "no trtexec command exists for this build",
            f"trtexec has no --computeCapabilities {','.join(options.compute_capabilities)}; TensorRT-RTX has",
            "use tensorrt_rtx, or leave --computeCapabilities out",
        )
    words = ["trtexec", f"--onnx={onnx_path}"]
    if engine_path is not None:
        words.append(f"--saveEngine={engine_path}")
    for index, profile in enumerate(profiles):
        if len(profiles) > 1:
            words.append(f"--profile={index}")
        for kind, shapes in (("min", profile.min), ("opt", profile.opt), ("max", profile.max)):
            words.append(f"--{kind}Shapes=" + ",".join(f"{name}:{_spell(shape)}" for name, shape in shapes.items()))
    words.append("--stronglyTyped")
    for name, value in (
        ("timingCacheFile", options.timing_cache),
        ("builderOptimizationLevel", options.builder_optimization_level),
        ("maxAuxStreams", options.max_aux_streams),
        ("profilingVerbosity", options.profiling_verbosity or "detailed"),
        ("exportLayerInfo", options.export_layer_info),
        ("hardwareCompatibilityLevel", options.hardware_compatibility),
    ):
        if value is not None:
            words.append(f"--{name}={value}")
    if options.memory_pools:
        words.append("--memPoolSize=" + ",".join(f"{pool}:{size}B" for pool, size in options.memory_pools))
    words += ["--versionCompatible"] if options.version_compatible else []
    words += ["--noTF32"] if options.no_tf32 else []
    words += [f"--staticPlugins={library}" for library in options.plugins]
    words.append("--skipInference")
    return shlex.join(words)
