"""One TensorRT-RTX engine a segment: what is built, for which shapes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from hstu_compile.artifacts import Profile
from hstu_compile.errors import EngineError, UsageError
from hstu_compile.profiles import ProfileSizes, graph_profiles
from hstu_compile.segment_engines import engines_from_segments
from hstu_compile.trt_options import EngineOptions
from tests.segmented_cases import Case, ranking_case, retrieval_case

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


def profile_of(case: Case, **sizes: int) -> Profile:
    (profile,) = graph_profiles(case.served.name, case.cut.inputs, ProfileSizes(max_batch=4, max_seq_len=20, **sizes))
    return profile


def test_every_segment_is_an_engine_for_the_shapes_that_the_graphs_profile_gives_it() -> None:
    case = ranking_case("packed", "bf16")
    heard: list[tuple[str, str]] = []
    engines = engines_from_segments(
        case.cut, profile_of(case, max_candidates=8), on_progress=lambda name, phase, _: heard.append((name, phase))
    )
    assert len(engines) == len(case.cut.segments) == 6
    assert {name for name, _ in heard} == {segment.name for segment in case.cut.segments}
    for engine, segment in zip(engines, case.cut.segments, strict=True):
        assert engine.plan
        (profile,) = engine.profiles
        assert set(profile.max) == {spec.name for spec in segment.inputs}
    between_layers = engines[4].profiles[0]
    rows = next(spec.name for spec in case.cut.segments[4].inputs if spec.shape == ("4*B + L + T", 12))
    assert between_layers.min[rows] == (4 + 1 + 1, 12)
    assert between_layers.max[rows] == (16 + 80 + 8, 12)


def test_segments_without_a_float32_weight_of_a_float32_graph_build_like_the_others() -> None:
    case = retrieval_case("retrieval", "fp32", prune=False, fuse_norms=False)
    engines = engines_from_segments(case.cut, profile_of(case))
    assert all(engine.backend == "tensorrt-rtx" and engine.plan for engine in engines)


def test_a_profile_that_contradicts_itself_is_refused() -> None:
    case = retrieval_case("retrieval", "fp32", prune=False, fuse_norms=False)
    profile = profile_of(case)
    crooked = Profile("mine", profile.min, profile.opt, {**profile.max, "timestamps": (3,)})
    with pytest.raises(EngineError, match=r"HSTU-E405.*max shapes[\s\S]*timestamps of shape \[3\] does not fit L"):
        engines_from_segments(case.cut, crooked)


def test_an_option_that_tensorrt_rtx_lacks_is_refused() -> None:
    case = retrieval_case("retrieval", "fp32", prune=False, fuse_norms=False)
    with pytest.raises(UsageError, match="HSTU-E901"):
        engines_from_segments(case.cut, profile_of(case), EngineOptions(plugins=(Path("libplugin.so"),)))


def test_the_bindings_have_every_name_that_a_session_of_segments_uses() -> None:
    """A session runs on fakes here: they must not have what TensorRT-RTX has not."""
    import tensorrt_rtx

    names = {
        "CudaGraphStrategy": ["DISABLED"],
        "DynamicShapesKernelSpecializationStrategy": ["EAGER"],
        "ExecutionContextAllocationStrategy": ["USER_MANAGED"],
        "ICudaEngine": ["create_execution_context", "create_runtime_config", "device_memory_size_v2"],
        "IExecutionContext": [
            "execute_async_v3",
            "is_stream_capturable",
            "set_device_memory",
            "set_tensor_address",
            "update_device_memory_size_for_shapes",
        ],
        "IRuntimeConfig": [
            "cuda_graph_strategy",
            "dynamic_shapes_kernel_specialization_strategy",
            "set_execution_context_allocation_strategy",
        ],
    }
    lacking = [
        f"{kind}.{name}"
        for kind, each in names.items()
        for name in each
        if not hasattr(getattr(tensorrt_rtx, kind), name)
    ]
    assert not lacking
