"""trtexec-named options: spellings, parsing, contradictions, and the printed command."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from hstu_compile.artifacts import Profile, TensorSpec
from hstu_compile.errors import EngineError, UsageError
from hstu_compile.profiles import ProfileSizes, graph_profiles
from hstu_compile.trt_options import (
    EngineOptions,
    parse_compute_capabilities,
    parse_memory_pools,
    parse_shapes,
    trt_options,
    trtexec_command,
)
from tests.exported_models import retrieval_profile


def options_of(*arguments: str) -> EngineOptions:
    seen: list[EngineOptions] = []

    @click.command()
    @click.argument("model")
    @trt_options
    def command(model: str, engine_options: EngineOptions) -> None:
        assert model == "m.onnx"
        seen.append(engine_options)

    result = CliRunner().invoke(command, ["m.onnx", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return seen[0]


def test_without_options_everything_is_left_to_tensorrt() -> None:
    assert options_of() == EngineOptions()


@pytest.mark.parametrize("style", ["camel", "kebab"])
def test_both_spellings_are_taken(style: str, tmp_path: Path) -> None:
    library = tmp_path / "plugin.so"
    library.write_bytes(b"")
    camel = [
        "--minShapes=x:1,y:1x2",
        "--optShapes=x:4,y:1x2",
        "--maxShapes=x:8,y:1x2",
        "--timingCacheFile=t.cache",
        "--builderOptimizationLevel=5",
        "--maxAuxStreams=2",
        "--memPoolSize=workspace:2G,tacticSharedMem:48K",
        "--profilingVerbosity=layer_names_only",
        "--exportLayerInfo=l.json",
        "--hardwareCompatibilityLevel=ampere+",
        "--versionCompatible",
        "--noTF32",
        "--computeCapabilities=8.9,12.0",
        f"--plugins={library}",
    ]
    kebab = {
        "--minShapes": "--min-shapes",
        "--optShapes": "--opt-shapes",
        "--maxShapes": "--max-shapes",
        "--timingCacheFile": "--timing-cache-file",
        "--builderOptimizationLevel": "--builder-optimization-level",
        "--maxAuxStreams": "--max-aux-streams",
        "--memPoolSize": "--mem-pool-size",
        "--profilingVerbosity": "--profiling-verbosity",
        "--exportLayerInfo": "--export-layer-info",
        "--hardwareCompatibilityLevel": "--hardware-compatibility-level",
        "--versionCompatible": "--vc",
        "--noTF32": "--no-tf32",
        "--computeCapabilities": "--compute-capabilities",
        "--plugins": "--static-plugins",
    }
    arguments = camel
    if style == "kebab":
        arguments = ["=".join([kebab[a.split("=")[0]], *a.split("=")[1:]]) for a in camel]
    assert options_of(*arguments) == EngineOptions(
        min_shapes=(("x", (1,)), ("y", (1, 2))),
        opt_shapes=(("x", (4,)), ("y", (1, 2))),
        max_shapes=(("x", (8,)), ("y", (1, 2))),
        timing_cache=Path("t.cache"),
        builder_optimization_level=5,
        max_aux_streams=2,
        memory_pools=(("workspace", 2 * 2**30), ("tacticSharedMem", 48 * 2**10)),
        profiling_verbosity="layer_names_only",
        export_layer_info=Path("l.json"),
        hardware_compatibility="ampere+",
        version_compatible=True,
        no_tf32=True,
        compute_capabilities=("8.9", "12.0"),
        plugins=(library,),
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'' is not name:dimensions"),
        ("x", "'x' is not name:dimensions"),
        (":1", "':1' is not name:dimensions"),
        ("x:1*2", r"'1\*2' of x"),
        ("x:-1", "'-1' of x"),
        ("x:1,x:2", "x is given twice"),
        ("x:2147483648", "a size of x is larger than 2147483647"),
        ("x:1x" + 5000 * "9", "a size of x is larger than 2147483647"),
    ],
)
def test_a_shape_that_cannot_be_read_is_quoted(text: str, why: str) -> None:
    with pytest.raises(EngineError, match=why) as caught:
        parse_shapes(text, "minShapes")
    assert caught.value.code == "HSTU-E405"
    assert "--minShapes=name:1x2" in caught.value.fix
    assert len(str(caught.value)) < 400


def test_names_may_hold_colons() -> None:
    assert parse_shapes("a::b:3") == (("a::b", (3,)),)


@pytest.mark.parametrize(("text", "size"), [("workspace:3", 3 * 2**20), ("workspace:1.5K", 1536), ("workspace:7B", 7)])
def test_memory_units(text: str, size: int) -> None:
    assert parse_memory_pools(text) == (("workspace", size),)


@pytest.mark.parametrize(
    "text",
    [
        "workspace",
        "heap:3",
        "workspace:3T",
        "workspace:1,workspace:2",
        "workspace:9999999999G",
        "workspace:" + 400 * "9",
    ],
)
def test_a_memory_pool_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(EngineError, match="--memPoolSize"):
        parse_memory_pools(text)


def test_more_streams_than_the_builder_can_count_are_refused() -> None:
    with pytest.raises(AssertionError, match="is not in the range 0<=x<=2147483647"):
        options_of("--maxAuxStreams=2147483648")


@pytest.mark.parametrize("text", ["8.9", "89", "sm89", "SM_89", "8.9,8.9"])
def test_spellings_of_an_architecture(text: str) -> None:
    assert parse_compute_capabilities(text) == ("8.9",)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(EngineError, match="'hopper' is not an architecture"):
        parse_compute_capabilities("hopper")


@pytest.mark.parametrize(
    ("minimum", "optimum", "maximum", "why"),
    [
        ("x:1", "", "x:2", "x is missing in --optShapes"),
        ("x:1", "x:1x2", "x:2", "x has 1, 2 and 1 dimensions"),
        ("x:1", "x:3", "x:2", "min 1, opt 3, max 2 do not ascend"),
    ],
)
def test_shapes_that_contradict_each_other(minimum: str, optimum: str, maximum: str, why: str) -> None:
    arguments = [f"--{n}Shapes={v}" for n, v in (("min", minimum), ("opt", optimum), ("max", maximum)) if v]
    with pytest.raises(EngineError, match=why) as caught:
        options_of(*arguments)
    assert caught.value.code == "HSTU-E405"


def test_the_trtexec_command_says_the_same() -> None:
    options = EngineOptions(
        timing_cache=Path("a b.cache"),
        builder_optimization_level=4,
        memory_pools=(("workspace", 2**30),),
        version_compatible=True,
        no_tf32=True,
        plugins=(Path("p.so"),),
    )
    profiles = retrieval_profile(ProfileSizes(8, 20, 4, 10))
    words = shlex.split(trtexec_command(Path("m.onnx"), options, profiles, engine_path=Path("m.engine")))
    assert words == [
        "trtexec",
        "--onnx=m.onnx",
        "--saveEngine=m.engine",
        "--minShapes=item_ids:1,timestamps:1,seq_offsets:2,request_timestamps:1",
        "--optShapes=item_ids:40,timestamps:40,seq_offsets:5,request_timestamps:4",
        "--maxShapes=item_ids:160,timestamps:160,seq_offsets:9,request_timestamps:8",
        "--stronglyTyped",
        "--timingCacheFile=a b.cache",
        "--builderOptimizationLevel=4",
        "--profilingVerbosity=detailed",
        "--memPoolSize=workspace:1073741824B",
        "--versionCompatible",
        "--noTF32",
        "--staticPlugins=p.so",
        "--skipInference",
    ]


def test_several_profiles_are_numbered() -> None:
    profile = Profile("p", {"x": (1,)}, {"x": (2,)}, {"x": (3,)})
    words = shlex.split(trtexec_command(Path("m.onnx"), EngineOptions(), [profile, profile]))
    assert [w for w in words if w.startswith("--profile=")] == ["--profile=0", "--profile=1"]


def test_no_trtexec_command_for_what_only_rtx_can() -> None:
    with pytest.raises(UsageError, match=r"no --computeCapabilities 8\.9"):
        trtexec_command(Path("m.onnx"), EngineOptions(compute_capabilities=("8.9",)), [])


def test_profile_defaults_and_ratings() -> None:
    (profile,) = retrieval_profile(ProfileSizes(8, 21), has_ratings=True)
    assert profile.min == {
        "item_ids": (1,),
        "timestamps": (1,),
        "ratings": (1,),
        "seq_offsets": (2,),
        "request_timestamps": (1,),
    }
    assert profile.opt["ratings"] == (8 * 11,)
    assert profile.max["item_ids"] == (8 * 21,)
    assert profile.max["seq_offsets"] == (9,)


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ((0, 5), "max 0 sequences"),
        ((4, 5, 8), "opt 8 <= max 4"),
        ((4, 5, 2, 9), "opt 9 <= max 5"),
        ((4, 5, 2, 3, 3), "min 3 <= opt 2"),
        ((2**16, 2**16), "int32 offsets cannot count"),
    ],
)
def test_sizes_that_cannot_be_a_profile(sizes: tuple[int, ...], why: str) -> None:
    with pytest.raises(EngineError, match=why) as caught:
        ProfileSizes(*sizes)
    assert caught.value.code == "HSTU-E405"


def test_inputs_of_another_graph_are_named() -> None:
    inputs = [TensorSpec("item_ids", "int32", ("L",)), TensorSpec("pixels", "float32", ("height", 3))]
    with pytest.raises(EngineError, match=r"pixels \['height', 3\]"):
        graph_profiles("retrieval", inputs, ProfileSizes(2, 2))


def test_candidates_without_a_number_are_named() -> None:
    inputs = [TensorSpec("item_movie_id", "int32", ("T",))]
    with pytest.raises(EngineError, match=r"item_movie_id \['T'\]"):
        graph_profiles("score", inputs, ProfileSizes(2, 2))


def test_a_scoring_profile_counts_candidates_cached_rows_and_context() -> None:
    inputs = [
        TensorSpec("item_movie_id", "int32", ("T",)),
        TensorSpec("user_id", "int32", ("B_times_3",)),
        TensorSpec("k_0", "float16", ("Lc", 2, 32)),
        TensorSpec("cache_offsets", "int32", ("B_plus_1",)),
    ]
    sizes = ProfileSizes(4, 100, 2, 50, max_candidates=256, contextual_len=3)
    (profile,) = graph_profiles("score", inputs, sizes)
    assert profile.name == "score"
    assert profile.min == {"item_movie_id": (1,), "user_id": (3,), "k_0": (1, 2, 32), "cache_offsets": (2,)}
    assert profile.opt == {"item_movie_id": (128,), "user_id": (6,), "k_0": (106, 2, 32), "cache_offsets": (3,)}
    assert profile.max == {"item_movie_id": (256,), "user_id": (12,), "k_0": (412, 2, 32), "cache_offsets": (5,)}
