"""The end-to-end benchmark's retrieval cases, without a GPU: requests, baseline, reference, graph and engines."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hstu_compile.checkpoint import config_from_file, model_from_spec, spec_from_checkpoint
from hstu_compile.export import exported_from_served
from hstu_compile.graph_facts import tensor_specs
from hstu_compile.model.retrieval import RetrievalModel
from hstu_compile.rewrite import RowSelection, apply_passes, export_passes
from hstu_compile.rewrite.cut_at_attention import segmented_from_onnx
from hstu_compile.runtime.onnxruntime_session import OnnxRuntimeSession
from hstu_compile.served import retrieval_graph
from tests.fake_cuda import FakeCuda
from tests.fused_fakes import fused_session
from tests.tolerances import RMS

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests" / "bench"))

import bench_end_to_end as bench  # noqa: E402
import end_to_end_engines as engines  # noqa: E402
import end_to_end_peers as peers  # noqa: E402
import end_to_end_reference as references  # noqa: E402
import end_to_end_retrieval_model as plain  # noqa: E402
import end_to_end_retrieval_reference as retrieval_reference  # noqa: E402
import end_to_end_retrieval_workload as work  # noqa: E402
import end_to_end_rows as rows  # noqa: E402
from end_to_end_workload import FULL, SMALL, chosen_cases  # noqa: E402

CPU = torch.device("cpu")
SIZES = work.TINY_RETRIEVAL
RAGGED = work.RetrievalCase("retrieval_ragged", "fp16", (40, 1, 33, 20))
EVEN = work.RetrievalCase("retrieval_even", "fp16", (40, 40, 40))


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(values) for key, values in work.retrieval_state_dict(SIZES).items()}


@pytest.fixture(scope="module")
def model() -> retrieval_reference.RetrievalReferenceModel:
    return retrieval_reference.RetrievalReferenceModel(SIZES, CPU)


@pytest.fixture(scope="module")
def reference(model: retrieval_reference.RetrievalReferenceModel) -> references.Reference:
    return references.make_reference(RAGGED, model)


def features_of(case: work.RetrievalCase) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values) for name, values in work.retrieval_arrays(case, SIZES).items()}


def vectors_of(
    state: dict[str, torch.Tensor],
    case: work.RetrievalCase,
    dtype: torch.dtype,
    form: str = plain.PADDED,
    attend: plain.Attend = plain.attend_by_products,
) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        built = plain.PlainRetrievalModel(state, SIZES, case, dtype, form, attend)
        answer: np.ndarray[Any, Any] = built(features_of(case)).numpy()
    return answer


# Cases, sizes, operations.


def test_the_model_has_the_parameters_of_ml_20m_large() -> None:
    sizes = work.ML_20M_LARGE
    assert sizes.table_len == 211
    # 38.9 million, 33.6 of them the item table's, 328,486 a layer.
    per_layer = sizes.width * 2 * (sizes.inner + sizes.query) + sizes.width * (sizes.inner + 1) + 129 + 421
    assert per_layer == 328_486
    assert (sizes.num_items + 1) * sizes.width == 33_603_328
    layers = [key for key in work.retrieval_state_dict(SIZES) if key.endswith("_uvqk")]
    assert len(layers) == SIZES.num_layers


def test_every_batch_is_a_case_with_full_and_with_ragged_histories() -> None:
    cases = {case.name: case for case in work.retrieval_cases(["fp16"])}
    assert {case.batch for case in cases.values()} == {1, 8, 64, 128}
    assert len(cases) == 16
    assert set(cases["fp16_retrieval_B128_n200_pruned"].lengths) == {200}
    ragged = cases["fp16_retrieval_B128_ragged"].lengths
    assert np.median(ragged) == pytest.approx(68, abs=1)
    assert (min(ragged), max(ragged)) == (20, 200)
    assert list(ragged) != sorted(ragged)
    for case in cases.values():
        assert max(case.lengths) <= work.ML_20M_LARGE.max_history
        for axis, size in (("L", case.tokens), ("B", case.batch), ("B_plus_1", case.batch + 1)):
            least, _, greatest = engines.RETRIEVAL_AXES[axis]
            assert least <= size <= greatest


def test_retrieval_is_measured_only_where_it_is_named() -> None:
    assert not any(case.mode == work.RETRIEVAL for case in chosen_cases(["fp16_*"]))
    found = chosen_cases(["fp16_retrieval_B8_*_pruned"])
    assert [case.name for case in found] == ["fp16_retrieval_B8_n200_pruned", "fp16_retrieval_B8_ragged_pruned"]
    assert FULL.of(found[0]) == work.ML_20M_LARGE


def test_histories_ascend_and_users_differ() -> None:
    arrays = work.retrieval_arrays(EVEN, SIZES)
    times = arrays["timestamps"].reshape(3, 40)
    assert (np.diff(times) > 0).all()
    assert (arrays["request_timestamps"] > times[:, -1]).all()
    assert arrays["request_timestamps"].max() < 2**31
    assert arrays["item_ids"].min() >= 1
    assert arrays["item_ids"].max() <= SIZES.num_items
    assert not np.array_equal(arrays["item_ids"][:40], arrays["item_ids"][40:80])


@pytest.mark.parametrize("is_pruned", [False, True])
def test_operations_are_those_of_the_products_and_of_the_pairs_that_are_seen(
    state: dict[str, torch.Tensor], is_pruned: bool
) -> None:
    case = dataclasses.replace(RAGGED, is_pruned=is_pruned)

    def nothing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return q.new_zeros((*q.shape[:3], v.shape[3]))

    with FlopCounterMode(display=False) as counter:
        vectors_of(state, case, torch.float32, plain.JAGGED, nothing)
    pairs = sum(length**2 / 2 for length in case.lengths)
    last = sum(case.lengths) if is_pruned else pairs
    per_pair = 2 * (SIZES.attention_dim + SIZES.linear_dim) * SIZES.num_heads
    expected = counter.get_total_flops() + per_pair * (pairs * (SIZES.num_layers - 1) + last)
    assert work.retrieval_flop(case, SIZES) == expected


# The baseline's model and its reference.


@pytest.mark.parametrize("form", plain.RETRIEVAL_FORMS)
@pytest.mark.parametrize("is_pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("case", [RAGGED, EVEN], ids=lambda case: case.shape)
def test_the_baseline_is_our_model(
    model: retrieval_reference.RetrievalReferenceModel,
    state: dict[str, torch.Tensor],
    case: work.RetrievalCase,
    form: str,
    is_pruned: bool,
) -> None:
    answer = vectors_of(state, dataclasses.replace(case, is_pruned=is_pruned), torch.float64, form)
    _, rms = references.errors_of(answer, model.exact(case))
    assert rms <= RMS["float32"]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("form", plain.RETRIEVAL_FORMS)
def test_the_baseline_is_right_in_the_half_types(
    model: retrieval_reference.RetrievalReferenceModel, state: dict[str, torch.Tensor], dtype: str, form: str
) -> None:
    case = dataclasses.replace(RAGGED, dtype=dtype, is_pruned=True)
    reference = references.make_reference(case, model)
    assert reference.judged(vectors_of(state, case, references.torch_dtype(case), form))["status"] == "ok"


def test_a_reference_rejects_what_it_must(reference: references.Reference, state: dict[str, torch.Tensor]) -> None:
    right = vectors_of(state, RAGGED, torch.float16)
    assert reference.judged(right)["status"] == "ok"
    missing, slightly = right.copy(), right.copy()
    missing[2, 5] = np.nan
    slightly[1] *= 0.9
    for wrong in (np.zeros_like(right), slightly, right[::-1], missing, right[:-1], right.ravel()):
        assert reference.judged(wrong)["status"] == "wrong result"


@pytest.mark.parametrize(
    "what", ["no bias", "a tenth less", "the future is seen", "heads swapped", "another time of the request"]
)
def test_a_wrong_attention_is_a_wrong_result(
    reference: references.Reference, state: dict[str, torch.Tensor], what: str
) -> None:
    """Off by what the norm behind the attention does not take away again."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if what == "no bias":
            bias = torch.where(bias < -100, bias, 0)
        elif what == "a tenth less":
            bias = torch.where(bias < -100, bias, 0.9 * bias)
        elif what == "the future is seen":
            bias = torch.where(bias < -100, 0, bias)
        elif what == "another time of the request":
            bias = torch.cat([bias[:, :, :-1], bias[:, :, -2:-1]], dim=2)
        elif what == "heads swapped":
            v = v.flip(1)
        return plain.attend_by_products(q, k, v, bias)

    answer = vectors_of(state, RAGGED, torch.float16, attend=attend)
    assert reference.judged(answer)["status"] == "wrong result"


# Rows of the baselines.


def test_a_baseline_has_a_row_with_its_form(tmp_path: Path) -> None:
    made = peers.make_peers(tmp_path, tmp_path / "scratch", SIZES, CPU, {}, all_forms=False)
    made.plan(RAGGED)
    assert json.loads(rows.plan_path(tmp_path, RAGGED).read_text()) == {
        "full": "batched_products",
        "query": None,
        "form": "jagged",
    }
    # What is timed on a CPU says nothing; that it is checked and written is what is shown.
    made.measure(RAGGED, rows.EAGER)
    row = json.loads((tmp_path / f"{RAGGED.name}-eager.json").read_text())
    assert set(row) <= set(rows.COLUMNS)
    assert row["status"] == "ok"
    assert row["form"] in ("jagged, batched_products", "padded, batched_products")
    assert row["tokens"] == sum(RAGGED.lengths)
    assert "candidates_per_s" not in row
    graph = json.loads((tmp_path / f"{RAGGED.name}-eager_graph.json").read_text())
    assert graph["status"].startswith("not offered")


def test_the_small_program_has_a_retrieval_case() -> None:
    arguments = bench.parser_of().parse_args(["--tiny", "--cases", "fp16_retrieval_tiny_B3_pruned"])
    (case,) = bench.cases_of(arguments)
    assert bench.models_of(arguments).of(case) == SMALL.retrieval


# Ours.


def test_a_pruned_graph_has_a_bundle_of_its_own_but_in_tensorrt_8() -> None:
    case = dataclasses.replace(RAGGED, is_pruned=True)
    assert engines.bundle_name(case) == "retrieval-fp16"
    assert engines.bundle_name(RAGGED) == "retrieval-fp16-unpruned"
    assert engines.bundle_name(case, rows.TRT85) == "retrieval-fp16-unpruned"


def test_the_kernels_of_a_bundle_come_before_those_that_are_given(tmp_path: Path) -> None:
    given = tmp_path / "given.so"
    given.touch()
    ours = engines.Engines(rows.RTX_FUSED, tmp_path, tmp_path / "engines", None, given)
    own = tmp_path / "retrieval-fp16-unpruned" / engines.KERNELS_FILE
    assert ours._kernel_library(RAGGED) == given
    own.parent.mkdir()
    own.touch()
    assert ours._kernel_library(RAGGED) == own


def test_the_checkpoint_becomes_segments_that_answer_the_requests(
    reference: references.Reference, tmp_path: Path
) -> None:
    """What prepare_end_to_end.py builds, small: from the checkpoint to the session that is timed."""
    retrieval_reference.save_retrieval_checkpoint(tmp_path, SIZES)
    spec = spec_from_checkpoint(tmp_path / "ckpt.pt", config_from_file(tmp_path / "config.json"))
    trained = model_from_spec(spec, torch.float16)
    assert isinstance(trained, RetrievalModel)
    served = retrieval_graph(trained)
    passes = export_passes(served.num_attention, served.taps, RowSelection())
    *_, rewritten = apply_passes(exported_from_served(served, "fp16"), passes)
    graph = dataclasses.replace(rewritten, outputs=tensor_specs(rewritten.model.graph.output))
    case = dataclasses.replace(RAGGED, is_pruned=True)
    feeds = work.retrieval_arrays(case, SIZES)
    assert {each.name for each in graph.inputs} == set(feeds)
    engines.options_of(graph.model, None, engines.axes_of(case))
    with OnnxRuntimeSession(graph.model) as session:
        assert reference.judged(engines.answers_of(case, session.run(feeds)))["status"] == "ok"
    with fused_session(segmented_from_onnx(graph), FakeCuda(2**24)) as session:
        assert reference.judged(engines.answers_of(case, session.run(feeds)))["status"] == "ok"
