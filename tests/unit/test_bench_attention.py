"""The attention benchmark's own parts, without a GPU: cases, operations, check, peers' interface, rows and tables."""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.oracle import AttentionAttrs, AttentionCase, oracle_of
from tests.tolerances import FLOAT64

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests" / "bench"))

import attention_backends as backends  # noqa: E402
import attention_grid as grid  # noqa: E402
import attention_peers as peers  # noqa: E402
import attention_reference as reference  # noqa: E402
import attention_table as table  # noqa: E402
import attention_worker as worker  # noqa: E402
import bench_attention as bench  # noqa: E402

CPU = torch.device("cpu")
SMALL = {
    "causal": grid.Case("causal", "bf16", 64, (96, 96)),
    "ragged": grid.Case("ragged", "fp16", 64, (130, 1, 57, 90)),
    "targets": grid.Case("targets", "bf16", 64, (150, 70, 41), targets=40),
    "delta": grid.Case("delta", "fp16", 64, (140, 60), targets=20, queries=20),
    "delta_causal": grid.Case("delta_causal", "bf16", 64, (140, 60), queries=20),
    "delta_both": grid.Case("delta_both", "bf16", 64, (140, 60), targets=20, queries=50),
    "bias": grid.Case("bias", "bf16", 64, (80, 80), has_bias=True),
}


@pytest.fixture(params=list(SMALL))
def inputs(request: pytest.FixtureRequest) -> reference.Inputs:
    return reference.draw(SMALL[request.param], CPU)


def eager_output(inputs: reference.Inputs) -> torch.Tensor:
    alone = dataclasses.replace(inputs, case=dataclasses.replace(inputs.case, in_graph=False))
    return backends.Backends({}, None).forms("eager", alone)[0].run()


def oracle_case(inputs: reference.Inputs) -> AttentionCase:
    def array(tensor: torch.Tensor | None) -> Any:
        if tensor is None:
            return None
        return tensor.float().numpy() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.numpy()

    case = inputs.case
    attrs = AttentionAttrs(alpha=case.alpha, scaling_seq_len=float(case.max_len), pos_table_len=case.max_len)
    arrays = {name: array(getattr(inputs, name)) for name in ("q", "k", "v", "q_offsets", "k_offsets")}
    optional = {name: array(tensor) for name, tensor in inputs.keywords().items()}
    return AttentionCase(case.name, reference.DTYPES[case.dtype][0], **arrays, **optional, attrs=attrs)


# Cases and operations.


def test_every_row_of_the_table_is_a_case() -> None:
    names = [case.name for case in grid.all_cases()]
    assert len(names) == len(set(names))
    wanted = [f"D{dim}_N{n}" for dim in (64, 128, 256) for n in (256, 1024, 2048, 4096, 8192)]
    wanted += ["D128_uniform8192_B32", "D128_uniform8192_B32_t256", "D128_lognormal1024_B64_t256"]
    wanted += ["D128_B1_N8192", "D128_B1_N16384", "D128_B1_N4096_t512", "D128_B8_N2048_t256"]
    wanted += [f"D128_delta_B8_k{k}_{form}" for k in (4096, 16_384) for form in ("t256", "causal256")]
    wanted += ["D128_delta_B1_k4096_t256", "D128_delta_B1_k16384_t256"]
    wanted += ["D128_bias_N1024", "D128_bias_N4096"]
    wanted += [f"D128_graph_B{batch}_N{n}" for batch in (1, 2, 4, 8) for n in (256, 1024)]
    assert sorted(names) == sorted(f"{dtype}_{name}" for dtype in ("bf16", "fp16") for name in wanted)


def test_dense_cases_have_the_same_tokens_and_ragged_ones_their_distribution() -> None:
    cases = {case.name: case for case in grid.all_cases(["bf16"])}
    assert {sum(case.lengths) for case in cases.values() if case.shape.startswith("N")} == {65_536}
    uniform = cases["bf16_D128_uniform8192_B32"].lengths
    assert len(uniform) == 32
    assert 410 <= min(uniform) < 2000 < 6000 < max(uniform) <= 8192
    with_targets = cases["bf16_D128_uniform8192_B32_t256"]
    assert with_targets.lengths == tuple(length + 256 for length in uniform)
    log_normal = cases["bf16_D128_lognormal1024_B64_t256"]
    assert np.mean(log_normal.lengths) - 256 == pytest.approx(1024, rel=0.25)
    delta = cases["bf16_D128_delta_B8_k4096_t256"]
    assert (delta.lengths, delta.query_lengths) == ((4352,) * 8, (256,) * 8)


@pytest.mark.parametrize("case", SMALL.values(), ids=str)
def test_pairs_are_those_that_the_mask_lets_through(case: grid.Case) -> None:
    exact = old_queries = 0
    for length, asking in zip(case.lengths, case.query_lengths, strict=True):
        history = length - case.targets
        for i in range(length - asking, length):
            exact += sum((j <= i and j < history) or i == j for j in range(length))
            old_queries += i < history
    # The convention counts half of a history row's own diagonal element.
    assert case.pairs == exact - old_queries / 2
    assert case.flop == 4 * case.dim * grid.NUM_HEADS * case.pairs


def test_flop_of_a_causal_case_is_the_causal_half() -> None:
    case = next(case for case in grid.all_cases() if case.name == "bf16_D128_N8192")
    assert case.flop == 2 * 128 * 4 * 8 * 8192**2
    assert case.floor_seconds("NVIDIA H100 80GB HBM3, driver 1") == pytest.approx(case.flop / 989.4e12)
    assert case.floor_seconds("another GPU") is None


def test_delta_case_with_few_queries_is_bound_by_bytes() -> None:
    case = grid.Case("x", "bf16", 128, (16_384,), queries=16)
    assert case.num_bytes == 2 * 4 * 128 * (2 * 16 + 2 * 16_384)
    assert case.floor_seconds("NVIDIA H100 80GB HBM3") == pytest.approx(case.num_bytes / 3.35e12)


def test_bars_are_those_asked_for() -> None:
    cases = {case.name: case.bar for case in grid.all_cases()}
    for dtype in ("bf16", "fp16"):
        assert cases[f"{dtype}_D128_N8192"] == grid.Bar(1.10, over_cudnn=1.05, tflops=640.0)
        assert cases[f"{dtype}_D64_N256"] == grid.Bar(1.6)
        assert cases[f"{dtype}_D64_N8192"] == grid.Bar(1.25, tflops=560.0)
        assert cases[f"{dtype}_D256_N4096"] == grid.Bar(1.05, over_cudnn=1.0)
        assert cases[f"{dtype}_D128_B1_N4096_t512"] == grid.Bar(1.5)
        assert cases[f"{dtype}_D128_graph_B1_N256"] is None


def test_chosen_cases_are_filtered_and_a_pattern_without_cases_is_refused() -> None:
    assert [case.name for case in grid.chosen_cases(["bf16_D64_N2*", "fp16_D128_bias_*"])] == [
        "bf16_D64_N256",
        "bf16_D64_N2048",
        "fp16_D128_bias_N1024",
        "fp16_D128_bias_N4096",
    ]
    assert len(grid.chosen_cases([])) == len(list(grid.all_cases()))
    with pytest.raises(ValueError, match="no case is named 'bf16_D32"):
        grid.chosen_cases(["bf16_D32_*"])


def test_backends_without_a_case_are_left_out() -> None:
    def runs(case: grid.Case) -> set[str]:
        return {name for name in grid.BACKENDS if grid.why_not(name, case) is None}

    assert runs(SMALL["causal"]) == set(grid.BACKENDS) - {grid.DENSE_RAB}
    assert runs(SMALL["bias"]) == {"ours", "ours_accurate", "ours_triton", "eager", grid.DENSE_RAB}
    assert not runs(SMALL["delta"]) & {"meta_cutlass", "cudnn_softmax"}
    assert "meta_cutlass" in runs(SMALL["delta_causal"])
    assert not runs(SMALL["ragged"]) & set(grid.SOFTMAX)
    with pytest.raises(ValueError, match="backend 'cudnn' is none of ours"):
        grid.why_not("cudnn", SMALL["causal"])


# The check.


def test_sampled_rows_are_the_oracle_s(inputs: reference.Inputs) -> None:
    sample = reference.make_sample(inputs, reference.HSTU)
    whole = oracle_of(oracle_case(inputs))
    rows = sample.rows.numpy()
    assert len(rows) == len(set(rows.tolist()))
    assert {0, inputs.q.shape[0] - 1} <= set(rows.tolist())
    assert np.abs(sample.result.out - whole.out[rows]).max() <= FLOAT64 * whole.scale[rows].max()
    forced = sample.result.scale - whole.scale[rows]
    if inputs.case.dtype == "bf16":
        assert np.abs(forced).max() <= FLOAT64 * whole.scale[rows].max()
    else:
        # Half a subnormal step of float16 per visible key, against weights of about 1 / N.
        assert 0 < (forced / whole.scale[rows]).max() < 0.1
    assert (sample.result.sequence == whole.sequence[rows]).all()


def test_outputs_are_of_order_one(inputs: reference.Inputs) -> None:
    values = eager_output(inputs).float()
    assert 0.05 < float(values.square().mean().sqrt()) < 5
    assert torch.equal(inputs.q, reference.draw(inputs.case, CPU).q)


def test_check_accepts_eager_pytorch(inputs: reference.Inputs) -> None:
    sample = reference.make_sample(inputs, reference.HSTU)
    output = eager_output(inputs)
    error, bound, wrong = reference.judge(output, sample, ("other", output.clone()))
    assert wrong == ""
    assert 0 < error <= bound


def _shifted_mask(inputs: reference.Inputs, output: torch.Tensor) -> torch.Tensor:
    """As if each row did not see itself: what a mask that is off by one gives."""
    case = inputs.case
    result = output.float().clone()
    for b in range(len(case.lengths)):
        queries = slice(int(inputs.q_offsets[b]), int(inputs.q_offsets[b + 1]))
        own = slice(int(inputs.k_offsets[b + 1]) - case.query_lengths[b], int(inputs.k_offsets[b + 1]))
        score = (inputs.q[queries].float() * inputs.k[own].float()).sum(-1, keepdim=True) * case.alpha
        result[queries] -= torch.nn.functional.silu(score) * inputs.v[own].float() / case.max_len
    return result.to(output.dtype)


BREAKERS: dict[str, Callable[[reference.Inputs, torch.Tensor], torch.Tensor]] = {
    "zeros": lambda _, output: torch.zeros_like(output),
    "0.9x": lambda _, output: output * 0.9,
    "nan in one element": lambda _, output: output.index_fill(0, torch.tensor([len(output) // 3]), torch.nan),
    "shifted mask": _shifted_mask,
    "rows reversed": lambda _, output: output.flip(0),
    "heads swapped": lambda _, output: output.roll(1, dims=1),
    "columns swapped": lambda _, output: output.roll(1, dims=2),
}


@pytest.mark.parametrize("name", BREAKERS)
def test_check_rejects(name: str, inputs: reference.Inputs) -> None:
    sample = reference.make_sample(inputs, reference.HSTU)
    _, _, wrong = reference.judge(BREAKERS[name](inputs, eager_output(inputs)), sample, None)
    assert wrong


def test_check_rejects_one_wrong_row_that_the_sample_lacks() -> None:
    inputs = reference.draw(SMALL["targets"], CPU)
    sample = reference.make_sample(inputs, reference.HSTU)
    right = eager_output(inputs)
    unseen = sorted(set(range(right.shape[0])) - set(sample.rows.tolist()))
    assert unseen
    output = right.clone()
    output[unseen[0]] *= 0.9
    assert reference.judge(output, sample, None)[2] == ""
    wrong = reference.judge(output, sample, ("other", right))[2]
    assert wrong == f"1 rows differ from those of other, whose sample is right; the first is {unseen[0]}"


def test_check_accepts_float16_weights_that_were_rounded_after_the_division() -> None:
    case = grid.Case("long", "fp16", 64, (16_384, 24))
    inputs = reference.draw(case, CPU)
    sample = reference.make_sample(inputs, reference.HSTU)
    output = torch.zeros_like(inputs.q)
    output[sample.rows] = torch.from_numpy(sample.result.out).half()
    q, k, v = (tensor[16_384:].double().transpose(0, 1) for tensor in (inputs.q, inputs.k, inputs.v))
    weight = torch.nn.functional.silu(q @ k.transpose(1, 2) * case.alpha).tril() / 16_384
    output[16_384:] = (weight.half().double() @ v).transpose(0, 1).half()
    assert reference.judge(output, sample, None)[2] == ""
    for factor in (0.0, 0.9):
        wrong = output.clone()
        wrong[16_384:] *= factor
        assert "in the sample, sequence 1" in reference.judge(wrong, sample, None)[2]


def test_check_of_softmax_attention_accepts_pytorch_s_and_rejects_ours() -> None:
    inputs = reference.draw(SMALL["causal"], CPU)
    sample = reference.make_sample(inputs, reference.SOFTMAX)
    form = backends.Backends({}, None).forms("fa2_softmax", inputs)[0]
    output = form.rows(form.run())
    assert output.shape == inputs.q.shape
    assert reference.judge(output, sample, None)[2] == ""
    assert reference.judge(eager_output(inputs), sample, None)[2]


def test_dense_bias_is_the_tables_over_alpha() -> None:
    inputs = reference.draw(SMALL["bias"], CPU)
    case = oracle_case(inputs)
    bias = peers.dense_bias(inputs)
    assert bias.shape == (2, 1, 80, 80)
    assert case.row_timestamps is not None
    assert case.col_timestamps is not None
    assert case.pos_table is not None
    assert case.ts_table is not None
    assert case.ts_thresholds is not None
    rng = np.random.default_rng(0)
    for b, i, j in zip(rng.integers(0, 2, 50), rng.integers(0, 80, 50), rng.integers(0, 80, 50), strict=True):
        gap = abs(int(case.row_timestamps[80 * b + i]) - int(case.col_timestamps[80 * b + j]))
        bucket = sum(int(each) <= gap for each in case.ts_thresholds)
        exact = (case.pos_table[0, 79 + j - i] + case.ts_table[0, bucket]) / inputs.case.alpha
        assert float(bias[b, 0, i, j]) == pytest.approx(float(exact), rel=2**-8)


# Libraries.

PEER_SOURCE = """
#include <stdint.h>
#include <string.h>
struct PeerArguments {
  int32_t version, element, is_dense, batch, num_heads, head_dim;
  int32_t total_q, total_k, max_q_len, max_k_len, scaling_seq_len;
  int32_t bias_heads, num_sms;
  float alpha;
  const void *q, *k, *v;
  void *out;
  const int32_t *q_offsets, *k_offsets, *num_targets;
  const void *bias;
  void *workspace, *stream;
};
int peer_size(void) { return sizeof(struct PeerArguments); }
const char *hstu_peer_version(void) { return "a test"; }
int hstu_peer_forward(const struct PeerArguments *a) {
  if (a->version != 1 || a->is_dense) return -1;
  if (a->bias) return 700;
  if (a->batch != 2 || a->num_heads != 4 || a->head_dim != 64 || a->element != 1) return 1;
  if (a->max_q_len != 20 || a->max_k_len != 140 || a->scaling_seq_len != 140 || a->bias_heads) return 2;
  if (a->q_offsets[2] != a->total_q || a->k_offsets[2] != a->total_k || a->num_targets[1] != 20) return 3;
  if (a->alpha != 0.125f || a->stream || !a->workspace || a->num_sms) return 4;
  memcpy(a->out, a->q, (size_t)a->total_q * a->num_heads * a->head_dim * 2);
  return 0;
}
"""


@pytest.fixture(scope="module")
def peer_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: cc")
    folder = tmp_path_factory.mktemp("peer")
    (folder / "peer.c").write_text(PEER_SOURCE, encoding="utf-8")
    library = folder / "libpeer.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(folder / "peer.c")], check=True)
    return library


def test_a_library_gets_every_argument_in_its_place(peer_library: Path) -> None:
    assert ctypes.CDLL(str(peer_library)).peer_size() == ctypes.sizeof(peers.PeerArguments)
    inputs = reference.draw(SMALL["delta"], CPU)
    library = peers.PeerLibrary(peer_library)
    assert library.version == "a test"
    run = library.caller(inputs, is_dense=False)
    first = run()
    assert torch.equal(first, inputs.q)
    assert run() is first


def test_what_a_library_refuses_or_fails_at_is_told_apart(peer_library: Path) -> None:
    inputs = reference.draw(SMALL["delta"], CPU)
    library = peers.PeerLibrary(peer_library)
    with pytest.raises(peers.NotOfferedError, match="no kernel"):
        library.caller(inputs, is_dense=True)()
    bias = torch.zeros((2, 1, 140, 140), dtype=torch.float16)
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        library.caller(inputs, is_dense=False, bias=bias)()


def test_backends_say_what_was_not_given(tmp_path: Path) -> None:
    inputs = reference.draw(SMALL["causal"], CPU)
    none = backends.Backends({}, None)
    with pytest.raises(peers.NotOfferedError, match="no library was given"):
        none.forms("meta_cutlass", inputs)
    with pytest.raises(peers.NotOfferedError, match="no checkout"):
        none.forms("meta_triton", inputs)
    with pytest.raises(peers.NotOfferedError, match="the case has no bias"):
        none.forms(grid.DENSE_RAB, inputs)
    with pytest.raises(FileNotFoundError, match="triton_hstu_attention"):
        backends.Backends({}, tmp_path).forms("meta_triton", inputs)


def test_meta_s_triton_kernel_is_called_in_its_form_for_cached_keys_where_few_rows_ask() -> None:
    asked: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    class Module:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            return lambda *arguments, **keywords: asked.append((name, arguments, keywords))

    delta, targets = (reference.draw(SMALL[name], CPU) for name in ("delta", "targets"))
    peers.meta_triton_caller(Module(), delta, has_tma=False)()
    peers.meta_triton_caller(Module(), targets, has_tma=True)()
    assert [name for name, _, _ in asked] == ["triton_cached_hstu_mha", "triton_hstu_mha"]
    _, arguments, keywords = asked[0]
    assert arguments[:2] == (140, 0.125)
    assert [arguments[index] is tensor for index, tensor in ((2, delta.q), (5, delta.k_offsets))] == [True, True]
    assert keywords == {"num_targets": delta.num_targets, "enable_tma": False}
    assert asked[1][2]["enable_tma"] is True


# The worker.


class FakeEvent:
    """A CUDA event that ticks whenever one is recorded."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.now += 1.0
        self.at = FakeEvent.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = {name: lambda *_: None for name in ("synchronize", "_sleep", "empty_cache", "reset_peak_memory_stats")}
    for name, function in replaced.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(worker, "FLUSH_BYTES", 16)
    monkeypatch.setattr(worker, "MOST_ROUNDS", 20)
    monkeypatch.setattr(worker.Clock, "gemm_tflops", lambda *_: 700.0)
    monkeypatch.setattr(worker, "gpu_name", lambda: "NVIDIA H100 80GB HBM3, driver 1")


class Fakes(backends.Backends):
    """Backends on CPU: one that is right in two forms, one that is wrong, one that fails, one that offers nothing."""

    def forms(self, backend: str, inputs: reference.Inputs) -> list[backends.Form]:
        right = eager_output(inputs)

        def refuse() -> torch.Tensor:
            raise peers.NotOfferedError("the library has no kernel for it")

        def fail() -> torch.Tensor:
            raise RuntimeError("CUDA error 9")

        found = {
            "meta_cutlass": [backends.Form("jagged", lambda: right), backends.Form("dense", refuse)],
            "nvidia_cutlass": [backends.Form("jagged", refuse), backends.Form("dense", refuse)],
            "ours": [backends.Form("", lambda: right * 0.9)],
            "ours_triton": [backends.Form("", fail)],
            grid.DENSE_RAB: [backends.Form("", lambda: right)],
        }
        return found[backend] if backend in found else super().forms(backend, inputs)


@pytest.mark.usefixtures("fake_cuda")
def test_worker_times_what_is_right_and_gives_reasons_for_the_rest(tmp_path: Path) -> None:
    case = SMALL["causal"]
    names = ["ours", "meta_cutlass", "nvidia_cutlass", "ours_triton", "cudnn_softmax", "eager"]
    worker.Worker(tmp_path, Fakes({}, None), worker.Clock(CPU)).run(case, names)
    rows = {row["backend"]: row for row in bench.rows_of(tmp_path)}
    assert set(rows) == set(names)
    assert rows["ours"]["status"].startswith("wrong result: in the sample")
    assert rows["nvidia_cutlass"]["status"].startswith("not offered")
    assert rows["ours_triton"]["status"] == "error: RuntimeError: CUDA error 9"
    assert rows["cudnn_softmax"]["status"].startswith("error: ")
    for name in ("ours", "nvidia_cutlass", "ours_triton", "cudnn_softmax"):
        assert "median_ms" not in rows[name]
    right = rows["meta_cutlass"]
    assert (right["status"], right["form"], right["median_ms"]) == ("ok", "jagged", 1.0)
    assert right["tflops"] == pytest.approx(case.flop / 1e9)
    assert right["roof_share"] == pytest.approx(1e3 * case.num_bytes / 3.35e12)
    assert (right["peak_mib"], right["repeats"], right["l2"], right["gemm_tflops"]) == (2.0, 20, "cold", 700.0)
    assert 0 < right["max_err"] <= right["err_bound"]
    assert set(right) <= set(bench.COLUMNS)
    assert rows["eager"]["status"] == "ok"
    step = json.loads((tmp_path / bench.PROGRESS).read_text(encoding="utf-8"))
    assert (step["case"], step["step"], step["backends"]) == (case.name, bench.TIMING, ["meta_cutlass", "eager"])


@pytest.mark.usefixtures("fake_cuda")
def test_worker_adds_the_least_time_to_fill_a_bias_tensor(tmp_path: Path) -> None:
    worker.Worker(tmp_path, Fakes({}, None), worker.Clock(CPU)).run(SMALL["bias"], [grid.DENSE_RAB])
    (row,) = bench.rows_of(tmp_path)
    assert (row["status"], row["fill_ms"]) == ("ok", 1.0)


@pytest.mark.usefixtures("fake_cuda")
def test_worker_ends_when_the_gpu_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = False

    def synchronize() -> None:
        if lost:
            raise RuntimeError("an illegal memory access was encountered")

    class Breaks(Fakes):
        def forms(self, backend: str, inputs: reference.Inputs) -> list[backends.Form]:
            nonlocal lost
            lost = backend == "ours_triton"
            return super().forms(backend, inputs)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        worker.Worker(tmp_path, Breaks({}, None), worker.Clock(CPU)).run(SMALL["causal"], ["ours", "ours_triton"])
    assert bench.failed_step(tmp_path) == (SMALL["causal"].name, ["ours_triton"])


def replayed(factor: float) -> Callable[[worker.Run], tuple[worker.Run, torch.Tensor]]:
    """A graph whose replay writes its output times a factor."""

    def captured(run: worker.Run) -> tuple[worker.Run, torch.Tensor]:
        right = run() * factor
        output = torch.empty_like(right)
        return lambda: output.copy_(right), output

    return captured


@pytest.mark.usefixtures("fake_cuda")
def test_a_graph_that_computes_something_else_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "captured", replayed(0.9))
    case = dataclasses.replace(SMALL["causal"], in_graph=True)
    worker.Worker(tmp_path, Fakes({}, None), worker.Clock(CPU)).run(case, ["meta_cutlass"])
    (row,) = bench.rows_of(tmp_path)
    assert row["status"].startswith("wrong result in a graph: ")
    assert "median_ms" not in row


@pytest.mark.usefixtures("fake_cuda")
def test_a_call_s_share_of_a_graph_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "captured", replayed(1.0))
    case = dataclasses.replace(SMALL["causal"], in_graph=True)
    worker.Worker(tmp_path, Fakes({}, None), worker.Clock(CPU)).run(case, ["meta_cutlass"])
    (row,) = bench.rows_of(tmp_path)
    assert (row["median_ms"], row["l2"]) == (1.0 / worker.GRAPH_CALLS, "warm")


@pytest.mark.usefixtures("fake_cuda")
def test_what_cannot_be_captured_is_a_row_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: worker.Run) -> tuple[worker.Run, torch.Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(worker, "captured", refuse)
    case = dataclasses.replace(SMALL["causal"], in_graph=True)
    worker.Worker(tmp_path, Fakes({}, None), worker.Clock(CPU)).run(case, ["meta_cutlass"])
    (row,) = bench.rows_of(tmp_path)
    assert row["status"].startswith("error: RuntimeError: operation not permitted")
    assert "median_ms" not in row


def test_every_backend_comes_first_in_turn() -> None:
    assert [worker.rotated(["a", "b", "c"], by)[0] for by in range(4)] == ["a", "b", "c", "a"]
    assert worker.rotated(["a", "b", "c"], 1) == ["b", "c", "a"]


def test_what_waits_for_the_gpu_shares_no_round_with_others() -> None:
    backends = {"0": "ours", "1": "eager", "2": "meta_cutlass", "3": "nvidia_cutlass"}
    assert worker.rounds_of(backends) == [["0", "2", "3"], ["1"]]
    assert worker.rounds_of({"1": "eager"}) == [["1"]]
    assert worker.rounds_of({}) == []


def test_repeats_fill_the_budget_within_bounds() -> None:
    assert worker.rounds_for(1e-9) == worker.MOST_ROUNDS
    assert worker.rounds_for(16.0) == 50
    assert worker.rounds_for(1e6) == worker.FEWEST_ROUNDS


def test_percentiles_are_samples() -> None:
    assert worker.percentile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.0
    assert worker.percentile([5.0], 0.99) == 5.0
    timing = worker.timing_of([float(value) for value in range(1, 101)])
    assert (timing["median_ms"], timing["p90_ms"], timing["p99_ms"], timing["repeats"]) == (50.5, 90.0, 99.0, 100)


# The parts and the CSV.

FAKE_WORKER = """
import json, os, sys, time
from pathlib import Path
parts, mode = Path(sys.argv[1]), sys.argv[2]
if mode == "no start":
    sys.exit("torch finds no GPU")
for case, backends in json.loads((parts / "plan.json").read_text()).items():
    for backend in backends:
        note = {"case": case, "step": backend, "backends": []}
        (parts / "progress.json").write_text(json.dumps(note))
        if backend == "meta_cutlass" and case.endswith("N1024"):
            if mode == "dies":
                os.abort()
            if mode == "hangs":
                time.sleep(60)
            if mode == "dies while timing":
                note = {"case": case, "step": "timing", "backends": backends}
                (parts / "progress.json").write_text(json.dumps(note))
                os.abort()
        row = {"case": case, "backend": backend, "status": "ok"}
        (parts / f"{case}-{backend}.json").write_text(json.dumps(row))
"""


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[tuple[str, str], str]]:
    script = tmp_path / "worker.py"
    script.write_text(FAKE_WORKER, encoding="utf-8")

    def run(mode: str, *options: str) -> dict[tuple[str, str], str]:
        parts = tmp_path / "parts"

        def command(arguments: argparse.Namespace) -> list[str]:
            return [sys.executable, str(script), str(parts), mode]

        monkeypatch.setattr(bench, "worker_command", command)
        chosen = ["--cases", "bf16_D64_N256", "bf16_D64_N1024", "--backends", "ours", "meta_cutlass", "nvidia_cutlass"]
        assert bench.main(["--parts", str(parts), *chosen, *options]) == 0
        return {(row["case"].rpartition("_")[2], row["backend"]): row["status"] for row in bench.rows_of(parts)}

    return run


def test_a_worker_that_dies_costs_one_row(measured: Callable[..., dict[tuple[str, str], str]]) -> None:
    rows = measured("dies")
    assert rows.pop(("N1024", "meta_cutlass")).startswith("error: the process ended with -")
    assert len(rows) == 5
    assert set(rows.values()) == {"ok"}


CUDA_SAID = (
    """Traceback (most recent call last):
  File "model.py", line 3, in forward
    raise ValueError("this one was handled")
ValueError: this one was handled
During handling of the above exception, another exception occurred:
torch.AcceleratorError: CUDA error: an illegal memory access was encountered
Search for `cudaErrorIllegalAddress' for more information.
"""
    + "For debugging consider passing CUDA_LAUNCH_BLOCKING=1\n" * 20
)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (CUDA_SAID, "torch.AcceleratorError: CUDA error: an illegal memory access was encountered Search for"),
        ("warning\n" * 100 + "double free or corruption\n", "warning double free or corruption"),
        ("\n", "it said nothing"),
    ],
)
def test_the_reason_of_a_dead_worker_names_the_error(said: str, reason: str) -> None:
    found = bench.last_reason(said)
    assert reason in found
    assert len(found) <= 300


def test_a_worker_that_hangs_is_ended_and_costs_one_row(measured: Callable[..., dict[tuple[str, str], str]]) -> None:
    began = time.monotonic()
    rows = measured("hangs", "--step-seconds", "1")
    assert time.monotonic() - began < 30
    assert rows.pop(("N1024", "meta_cutlass")) == "error: not finished in 1 s"
    assert len(rows) == 5
    assert set(rows.values()) == {"ok"}


def test_a_worker_that_dies_while_timing_costs_its_case(measured: Callable[..., dict[tuple[str, str], str]]) -> None:
    rows = measured("dies while timing")
    # ours was finished before; the others were being timed.
    failed = {key for key, status in rows.items() if status != "ok"}
    assert failed == {("N1024", "meta_cutlass"), ("N1024", "nvidia_cutlass")}


def test_a_worker_that_cannot_start_says_why_in_every_row(measured: Callable[..., dict[tuple[str, str], str]]) -> None:
    rows = measured("no start")
    assert len(rows) == 6
    assert all("torch finds no GPU" in status for status in rows.values())


def test_cases_beyond_the_budget_are_rows(measured: Callable[..., dict[tuple[str, str], str]]) -> None:
    rows = measured("hangs", "--budget", "1")
    assert len(rows) == 6
    assert rows["N1024", "nvidia_cutlass"] == "not run: the time budget was used up"


def test_kernels_are_compiled_in_as_many_slices_as_there_are_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []
    told: list[Any] = []

    def popen(command: list[str]) -> Any:
        started.append(command)
        return argparse.Namespace(wait=lambda: 0)

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(worker, "compile_slice", lambda *arguments: told.append(arguments))
    options = ["--compile-kernels", "--meta-repo", str(tmp_path), "--cases", "bf16_D64_N256", "--workers", "3"]
    assert bench.main(options) == 0
    for command in started:
        assert bench.main(command[2:]) == 0
    assert [[case.name for case in cases] for cases, *_ in told] == [["bf16_D64_N256"]] * 3
    assert [arguments[1:] for arguments in told] == [(tmp_path, index, 3) for index in range(3)]
    with pytest.raises(SystemExit):
        bench.main(["--compile-kernels"])
    assert "needs --meta-repo" in capsys.readouterr().err


def test_rows_are_measured_again_unless_told_to_resume(measured: Callable[..., dict[tuple[str, str], str]]) -> None:
    measured("no start")
    assert all("torch finds no GPU" in status for status in measured("runs", "--resume").values())
    assert set(measured("runs").values()) == {"ok"}


def test_the_worker_is_told_where_everything_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(worker, "work", lambda *arguments: told.append(arguments) or 0)
    names = argparse.Namespace(
        parts=tmp_path, meta_library=tmp_path / "m.so", nvidia_library=tmp_path / "n.so", meta_repo=None
    )
    assert bench.main(bench.worker_command(names)[2:]) == 0
    libraries = {"meta_cutlass": tmp_path / "m.so", "nvidia_cutlass": tmp_path / "n.so"}
    assert told == [(tmp_path, libraries | {grid.DENSE_RAB: tmp_path / "n.so"}, None)]


def test_merge_replaces_rows_keeps_others_and_orders_them(tmp_path: Path) -> None:
    csv = tmp_path / "attention.csv"
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    bench.write_part(first, "bf16_D64_N256", "ours", {"status": "ok", "median_ms": 1.0})
    bench.write_part(first, "bf16_D128_N256", "eager", {"status": "ok", "median_ms": 2.0})
    bench.write_part(second, "bf16_D64_N256", "ours", {"status": "ok", "median_ms": 0.123456789})
    bench.write_part(second, "bf16_D128_N256", "ours", {"status": "wrong result"})
    assert bench.main(["--merge", str(first), "--csv", str(csv)]) == 0
    assert bench.main(["--merge", str(second), "--csv", str(csv)]) == 0
    rows = [(row["case"], row["backend"], row["median_ms"]) for row in bench.read_rows(csv)]
    assert rows == [
        ("bf16_D128_N256", "ours", ""),
        ("bf16_D128_N256", "eager", "2"),
        ("bf16_D64_N256", "ours", "0.12346"),
    ]


def test_merge_refuses_an_empty_folder_and_unknown_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv = tmp_path / "attention.csv"
    assert bench.main(["--merge", str(tmp_path), "--csv", str(csv)]) == 1
    assert "holds no parts" in capsys.readouterr().err
    bench.write_part(tmp_path, "bf16_D48_N256", "ours", {"status": "ok"})
    assert bench.main(["--merge", str(tmp_path), "--csv", str(csv)]) == 1
    assert "no case is named bf16_D48_N256" in capsys.readouterr().err
    assert not csv.exists()


def test_nothing_is_measured_without_a_place_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    assert "measures on a GPU" in capsys.readouterr().out


# The table.


def row_of(case: str, backend: str, ms: float, **more: Any) -> dict[str, Any]:
    facts = {"case": case, "backend": backend, "status": "ok", "median_ms": f"{ms}", "tflops": f"{600 / ms}"}
    facts |= {"p90_ms": f"{1.01 * ms}", "cv": "2.5"}
    return facts | {"gpu": "G", "versions": "V", "commit": "C", "date": "D"} | more


def test_ratio_is_against_the_faster_peer_and_leaves_noisy_rows_out() -> None:
    case = "bf16_D128_N4096"
    rows = [row_of(case, "ours", 1.0), row_of(case, "meta_cutlass", 1.2), row_of(case, "nvidia_cutlass", 1.3)]
    found = table.rows_by_case(rows)[case]
    assert table.over(found, grid.FASTEST_PEERS) == pytest.approx(1.2)
    found["meta_cutlass"]["p90_ms"] = f"{1.2 * 1.08}"
    assert table.over(found, grid.FASTEST_PEERS) == pytest.approx(1.3)
    found["ours"]["p90_ms"] = "1.08"
    assert table.over(found, grid.FASTEST_PEERS) is None


def test_verdicts_say_how_far_a_bar_is_missed() -> None:
    cases = {case.name: case for case in grid.all_cases()}
    name = "bf16_D128_N8192"
    rows = [row_of(name, "ours", 1.0), row_of(name, "meta_cutlass", 1.2), row_of(name, "cudnn_softmax", 1.0)]
    missed = table.shortfalls(cases[name], table.rows_by_case(rows))
    assert missed == ["1 of 1.05x cuDNN softmax", "600 of 640 TFLOP/s"]
    assert table.shortfalls(cases[name], table.rows_by_case(rows[:2])) is None
    wrong = [row_of(name, "ours", 1.0, status="wrong result: row 3")]
    assert table.shortfalls(cases[name], table.rows_by_case(wrong)) == ["ours: wrong result: row 3"]
    small = "bf16_D64_N256"
    good = [row_of(small, "ours", 1.0), row_of(small, "nvidia_cutlass", 1.7)]
    assert table.shortfalls(cases[small], table.rows_by_case(good)) == []


def test_filling_the_bias_tensor_counts_and_so_does_our_speed_without_bias() -> None:
    case = next(case for case in grid.all_cases() if case.name == "bf16_D128_bias_N1024")
    rows = [
        row_of(case.name, "ours", 1.0),
        row_of(case.name, grid.DENSE_RAB, 1.1, fill_ms="0.3"),
        row_of("bf16_D128_N1024", "ours", 0.4),
    ]
    found = table.rows_by_case(rows)
    assert table.over(found[case.name], (grid.DENSE_RAB,)) == pytest.approx(1.4)
    assert table.shortfalls(case, found) == ["0.4 of 0.5x ours without bias"]


def test_table_and_drawing_have_every_backend_and_reason(tmp_path: Path) -> None:
    rows = []
    for n in (1024, 4096):
        rows += [row_of(f"bf16_D128_N{n}", name, 1.0 + place / 10) for place, name in enumerate(grid.BACKENDS)]
    rows = [row for row in rows if row["backend"] != grid.DENSE_RAB]
    rows.append(row_of("bf16_D64_N1024", "nvidia_cutlass", 1.0, status="not offered: no library was given"))
    csv, page, svg = tmp_path / "a.csv", tmp_path / "a.md", tmp_path / "a.svg"
    bench.write_rows(csv, bench.COLUMNS, rows)
    page.write_text(f"before\n{table.BEGIN}\nprevious\n{table.END}\nafter\n", encoding="utf-8")
    assert table.main(["--csv", str(csv), "--into", str(page), "--svg", str(svg)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "previous" not in text
    assert "- nvidia_cutlass, bf16_D64_N1024: not offered: no library was given" in text
    line = next(line for line in text.splitlines() if line.startswith("| bf16_D128_N4096"))
    assert "1.000 (600)" in line
    assert "| 1.30 | 1.80 | " in line
    drawn = svg.read_text(encoding="utf-8")
    for name in set(grid.BACKENDS) - {grid.DENSE_RAB}:
        assert f">{name}</text>" in drawn
    assert drawn.count("<polyline") == len(grid.BACKENDS) - 1


def test_table_without_rows_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main(["--csv", str(tmp_path / "none.csv")]) == 1
    assert "has no rows" in capsys.readouterr().err


def test_a_round_that_the_host_was_late_for_is_measured_again() -> None:
    late, quick, later = (worker.Round({}, {}, seconds) for seconds in (3e-3, 0.5e-3, 9e-3))
    given = iter([late, quick, later])
    assert worker.in_time(lambda: next(given), 1e-3) is quick
    assert next(given) is later, "no more rounds than needed"
    rounds = [later, late, *[later] * (worker.MOST_REPEATS - 1)]
    given = iter(rounds)
    assert worker.in_time(lambda: next(given), 1e-3) is late
    assert next(given, None) is None
