"""What an engine launches, as its plan or the inspector tells, and that graphs in segments launch no copies."""

from __future__ import annotations

import functools
import re

import pytest

from hstu_compile.artifacts import EngineArtifact, EngineKernel
from hstu_compile.plan_kernels import joined_kernels, kernel_facts, kernels_of_layers, kernels_of_plan
from hstu_compile.profiles import ProfileSizes, graph_profiles
from hstu_compile.segment_engines import engines_from_segments
from tests.segmented_cases import Case, ranking_case, retrieval_case
from tests.unit.test_engine import RTX

PLAN = b"""\x00\x01junk main { label of something else }
main {
 label bb1:
  shape_call={ name="__mye1_0" stream=0 }
  signal={ name="entry^bb^signal^1" stream=0 event=1 }
  function={ name=__myl_ReshMulCast fqn=__myl_ReshMulCast_0x12 args={ "a" } }
  runtime_fusion={ name=__myl_FcAddCastAddCast input_args={ "b" } output_args={ "c" } }
  function={ name=__myl_Cast fqn=__myl_Cast_0x34 args={ "c" } }
  fully_connected={ name="node_matmul_2" output={"d" } accumulation_type=2 }
  runtime_function={ name=__myl_Conc args={ "d" } }
  function={ name=__myl_CastReshMoveGathEtc fqn=__myl_CastReshMoveGathEtc_0x56 args={ "d" } }
}
\xff\xfe
main {
 label bb7:
  copy={ name="copy_d2s" output={"n" } input={"m" } }
  mul={ name="__mye2" output={"k" } input={"n" } }
}
main {
 label bb1:
  fully_connected={ name="__mye3" output={"e" } input={"b" } accumulation_type=2 }
  cast={ name="inside" output={"f" } input={"e" } }
}
"""


def test_kernels_of_a_plan_are_those_of_the_program_that_launches_them() -> None:
    assert kernels_of_plan(PLAN) == (
        EngineKernel("__myl_ReshMulCast", "other"),
        EngineKernel("__myl_FcAddCastAddCast", "product"),
        EngineKernel("__myl_Cast", "copy"),
        EngineKernel("node_matmul_2", "product"),
        EngineKernel("__myl_Conc", "copy"),
        EngineKernel("__myl_CastReshMoveGathEtc", "other"),
    )


@pytest.mark.parametrize("plan", [b"", b"\x00" * 64, b"main {\n label bb1:\n", PLAN[: PLAN.index(b"  function")]])
def test_a_plan_that_does_not_tell(plan: bytes) -> None:
    assert kernels_of_plan(plan) is None
    assert kernel_facts(None) is None


def test_facts_name_what_only_copies() -> None:
    assert kernel_facts(kernels_of_plan(PLAN)) == {"launched": 6, "products": 2, "copies": ["__myl_Cast", "__myl_Conc"]}


def test_kernels_of_the_inspectors_layers() -> None:
    layers = [
        {"Name": "Reformatting CopyNode for Input Tensor 0 to conv", "LayerType": "Reformat"},
        {"Name": "conv + PWN(sum)", "LayerType": "CaskConvolution"},
        {"Name": "attention", "LayerType": "PluginV2"},
        {"Name": "shape", "LayerType": "NoOp"},
        {"Name": "[ShapeHostToDeviceCopy 0]", "LayerType": "ShapeHostToDevice"},
        {"Name": "weights", "LayerType": "Constant"},
        {"Name": "Reformatting CopyNode that moves nothing", "LayerType": "NoOp"},
        {"Name": "{ForeignNode[tables...sum]}", "LayerType": "Myelin"},
        {"Name": "node__to_copy_14", "LayerType": "Cast"},
        {"Name": "product", "LayerType": "CaskGemmConvolution"},
    ]
    assert kernels_of_layers(layers) == (
        EngineKernel(layers[0]["Name"], "copy"),
        EngineKernel("conv + PWN(sum)", "product"),
        EngineKernel("attention", "other"),
        EngineKernel("{ForeignNode[tables...sum]}", "other"),
        EngineKernel("node__to_copy_14", "copy"),
        EngineKernel("product", "product"),
    )
    assert kernels_of_layers([*layers, "a name only"]) is None
    assert kernels_of_layers([]) is None


@RTX
def test_segments_of_layers_launch_two_products_and_a_norm() -> None:
    """Between two attentions: the output's product with the residual, the next layer's norm, and its projection."""
    case = retrieval_case("retrieval", "fp16", prune=False, fuse_norms=True)
    between = engines_of(case)[1].kernels
    assert between is not None
    assert [(each.kind, each.name) for each in between] == [
        ("product", "__myl_FcAddAddCastAddCast"),
        ("other", "__myl_CastMeanSubMulMeanAddSqrtDivMulMulAddCast"),
        ("product", "__myl_FcCastAddCastCastSiluCast"),
    ]


@RTX
@pytest.mark.parametrize("name", ["packed", "prefill"])
def test_no_kernel_of_the_engine_that_adds_the_towers_computes_a_norm_with_their_sum(name: str) -> None:
    """The first layer's norm is a kernel of ours behind it, and its product the only one of the next engine."""
    sums, projects, layer = ranking_engines(name)[2:5]
    assert len(sources_of(sums.plan)) > 1
    # A norm divides by its root; the root of a distance in time is a bucket.
    assert not any(b"__myln_div___myln_float" in source for source in sources_of(sums.plan))
    assert any(b"__myln_div___myln_float" in source for source in sources_of(layer.plan)), (
        "in front of the second layer is its norm"
    )
    facts = kernel_facts(projects.kernels)
    assert facts is not None
    assert facts["products"] == 1


def sources_of(plan: bytes) -> list[bytes]:
    """Of each kernel of TensorRT-RTX's own, the text that the plan has of it."""
    return [part.partition(b"\0")[0] for part in plan.split(b'extern "C" __global__ void ')[1:]]


@RTX
@pytest.mark.parametrize("name", ["packed", "score", "retrieval"])
def test_no_engine_of_segments_launches_a_copy(name: str) -> None:
    if name == "retrieval":
        engines = engines_of(retrieval_case(name, "fp16", prune=True, fuse_norms=True))
    else:
        engines = ranking_engines(name)
    for engine in engines:
        facts = kernel_facts(engine.kernels)
        assert facts is not None
        assert facts["launched"] > 1
        # Behind the last layer of a retrieval model items are ranked: rows of a constant are repeated there.
        assert set(facts["copies"]) <= ({"__myl_Repl"} if engine is engines[-1] and name == "retrieval" else set()), (
            facts
        )


@RTX
@pytest.mark.parametrize("name", ["packed", "prefill", "score"])
def test_every_product_of_a_float16_ranking_graph_adds_up_in_float32(name: str) -> None:
    """Also one whose rows are gathered by indices whose type the graph does not tell."""
    plans = [engine.plan for engine in ranking_engines(name)]
    found = [kind for plan in plans for kind in re.findall(rb"accumulation_type=(\d)", plan)]
    assert len(found) > 6
    assert set(found) == {b"2"}


@RTX
def test_prefill_launches_no_copies_but_of_the_keys_and_values_that_it_gives() -> None:
    case = ranking_case("prefill", "fp16")
    facts = kernel_facts(joined_kernels(ranking_engines("prefill")))
    assert facts is not None
    assert facts["copies"] == ["__myl_Slic"] * len(case.cut.outputs)


@functools.cache
def ranking_engines(name: str) -> tuple[EngineArtifact, ...]:
    return engines_of(ranking_case(name, "fp16"), max_candidates=8)


def engines_of(case: Case, **sizes: int) -> tuple[EngineArtifact, ...]:
    (profile,) = graph_profiles(case.served.name, case.cut.inputs, ProfileSizes(max_batch=4, max_seq_len=20, **sizes))
    return engines_from_segments(case.cut, profile)
