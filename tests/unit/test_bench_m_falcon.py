"""The M-FALCON benchmark's own parts, without a GPU: its model, its references, its peers on PyTorch kernels."""

from __future__ import annotations

import csv
import dataclasses
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hstu_compile.checkpoint import config_from_file, model_from_spec, spec_from_checkpoint
from hstu_compile.model.ranking import RankingModel
from tests.tolerances import RMS

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests" / "bench"))

import m_falcon_meta as meta_peer  # noqa: E402
import m_falcon_peers as peers  # noqa: E402
import m_falcon_prepare as prepare  # noqa: E402
import m_falcon_rows as rows  # noqa: E402
import m_falcon_table as table  # noqa: E402
import m_falcon_workload as work  # noqa: E402
from m_falcon_eager import EagerModel  # noqa: E402

CPU = torch.device("cpu")
#: Where a checkout of Meta's generative-recommenders is; its smoke tests need it.
META_REPO = "HSTU_META_REPO"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(values) for key, values in work.state_dict(work.TINY).items()}


@pytest.fixture(scope="module")
def reference(state: dict[str, torch.Tensor]) -> rows.Reference:
    return peers.make_reference(150, (1, 5, 64), work.TINY, state, CPU, torch.float16)


def eager(state: dict[str, torch.Tensor], dtype: torch.dtype, last_bucket: int = peers.LAST_BUCKET) -> EagerModel:
    return EagerModel(state, work.TINY, CPU, dtype, last_bucket)


def test_weights_and_requests_are_the_same_bits_on_every_machine() -> None:
    tensor = work.state_dict(work.TINY)["_hstu_transducer._stu_module._stu_layers.0._uvqk_weight"]
    assert zlib.crc32(tensor.tobytes()) == 1263809185
    times = work.request(150, 5, work.TINY).history["action_timestamp"]
    assert zlib.crc32(times.tobytes()) == 2681367168


def test_half_types_hold_every_parameter_exactly() -> None:
    for key, values in work.state_dict(work.TINY).items():
        tensor = torch.from_numpy(values)
        if key.endswith("_period_units") or not tensor.is_floating_point():
            continue
        for dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(tensor.to(dtype).float(), tensor), key


def test_requests_fit_the_engines_and_share_their_beginnings() -> None:
    whole = work.request(150, 64, work.TINY)
    times = whole.history["action_timestamp"]
    assert (np.diff(times) >= 0).all()
    assert times[-1] < work.QUERY_TIME < 2**31
    few = work.request(150, 5, work.TINY)
    for name, values in few.candidates.items():
        np.testing.assert_array_equal(values, whole.candidates[name][:5])
    for name, values in few.history.items():
        np.testing.assert_array_equal(values, whole.history[name])


@pytest.mark.parametrize("shape", [(150, 7), (3, 2), (40, 1)])
def test_plain_pytorch_is_the_model_that_the_engines_are_built_from(
    state: dict[str, torch.Tensor], shape: tuple[int, int], tmp_path: Path
) -> None:
    prepare.save_checkpoint(tmp_path, work.TINY)
    spec = spec_from_checkpoint(tmp_path / "ckpt.pt", config_from_file(tmp_path / "config.json"))
    ours = model_from_spec(spec, torch.float64)
    assert isinstance(ours, RankingModel)
    request = work.request(*shape, work.TINY)
    features = {name: torch.from_numpy(values) for name, values in request.features.items()}
    with torch.inference_mode():
        expected = ours.packed(features).logits[:, 0]
        model = eager(state, torch.float64)
        actual = model.packed(model.upload(request))
    assert float((actual - expected).abs().max() / expected.square().mean().sqrt()) <= RMS["float32"]


def test_a_reference_rejects_what_it_must(reference: rows.Reference) -> None:
    case = rows.Case("torch_eager", rows.PACKED, 150, 64)
    logits = reference.logits[64]
    swapped = logits.copy()
    swapped[[3, 40]] = swapped[[40, 3]]
    not_finite = logits.copy()
    not_finite[7] = np.nan
    wrong = {
        "zeros": np.zeros_like(logits),
        "scaled": 0.9 * logits,
        "swapped": swapped,
        "not finite": not_finite,
        "shorter": logits[:-1],
        "another request's": np.roll(logits, 1),
    }
    for name, values in wrong.items():
        assert reference.judged(case, values)["status"] == "wrong result", name
    assert "status" not in reference.judged(case, logits)
    assert 0 < reference.bound <= rows.LARGEST_ERROR


def test_a_wrong_history_or_divisor_is_seen_in_the_logits(
    state: dict[str, torch.Tensor], reference: rows.Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, exact = work.request(150, 64, work.TINY), eager(state, torch.float32)
    case = rows.Case("torch_eager", rows.PACKED, 150, 64)
    reversed_items = {**request.history, "item_id": request.history["item_id"][::-1].copy()}
    changed = dataclasses.replace(request, history=reversed_items)
    with torch.inference_mode():
        assert "status" in reference.judged(case, exact.packed(exact.upload(changed)).numpy())
        attention = EagerModel._attention
        for spoil in (
            lambda self, q, k, v, count: 0.9 * attention(self, q, k, v, count),
            lambda self, q, k, v, count: attention(self, q, k, v, 0),
        ):
            monkeypatch.setattr(EagerModel, "_attention", spoil)
            assert "status" in reference.judged(case, exact.packed(exact.upload(request)).numpy())


def test_a_reference_comes_back_from_its_file(reference: rows.Reference, tmp_path: Path) -> None:
    path = rows.reference_path(tmp_path, 150, "fp16")
    reference.save(path)
    loaded = rows.Reference.load(path)
    assert (loaded.spread, loaded.bound) == (reference.spread, reference.bound)
    np.testing.assert_array_equal(loaded.alone, reference.alone)
    assert loaded.logits.keys() == reference.logits.keys()
    # Alone, the divisor is another: the references must not be confused.
    assert reference.error(loaded.alone[:5], loaded.logits[5]) > 0


def test_every_mode_of_a_backend_has_its_cases() -> None:
    assert len(list(rows.cases_of("torch_eager"))) == 3 * 5 * 2
    ours = list(rows.cases_of(rows.ENGINES))
    assert len(ours) == 3 * (5 + 5 + 2 * 5 * 4)
    assert len({case.part_name for case in ours}) == len(ours)


def test_one_at_a_time_says_where_it_was_extrapolated() -> None:
    timing = {"median_ms": 8.0, "call_p90_ms": 16.0, "repeats": 20}
    few, many = (rows.Case("torch_eager", rows.ALONE, 1024, m) for m in (1, 1024))
    assert rows.extrapolated(few, timing) == timing
    scaled = rows.extrapolated(many, timing)
    assert (scaled["median_ms"], scaled["call_p90_ms"], scaled["repeats"]) == (512.0, 1024.0, 20)
    assert scaled["note"].startswith("extrapolated: 16 forwards")
    assert rows.with_rates(many, scaled)["candidates_per_s"] == 2000.0


def test_merging_keeps_rows_and_the_table_has_the_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "gpu_name", lambda: "G")
    parts, target = tmp_path / "parts", tmp_path / "m_falcon.csv"
    parts.mkdir()
    times = {
        rows.Case("meta_triton", rows.PACKED, 4096, 256): 8.0,
        rows.Case(rows.ENGINES, rows.ALONE, 4096, 256): 512.0,
        rows.Case(rows.ENGINES, rows.PACKED, 4096, 256): 4.0,
        rows.Case(rows.ENGINES, rows.WARM, 4096, 256, 256): 1.0,
        rows.Case(rows.ENGINES, rows.WARM, 4096, 256, 64): 2.0,
    }
    for case, median in times.items():
        row = {"median_ms": median, "call_median_ms": 2 * median, "used_mib": 100.0, "max_err": 1e-3}
        rows.write_part(parts, case, rows.with_rates(case, row), "command")
    assert rows.merge(parts, target) == 0
    again = rows.Case("meta_triton", rows.PACKED, 4096, 256)
    rows.write_part(parts, again, {"status": "error: gone"}, "command")
    for path in parts.glob("hstu*"):
        path.unlink()
    assert rows.merge(parts, target) == 0
    with target.open() as file:
        merged = {(row["backend"], row["mode"], row["micro_batch"]): row for row in csv.DictReader(file)}
    assert len(merged) == len(times)
    assert merged["meta_triton", "packed", "0"]["status"] == "error: gone"
    assert merged["hstu_compile", "cached_warm", "256"]["candidates_per_s"] == "2.56e+05"
    text = table.table_text(list(merged.values()))
    assert "| 4096 | 256 | 512.0 | 4.000 (8.000) | - | 1.000 b=256 (2.000) | 128.0x | 4.0x | - |" in text
    assert "meta_triton packed n=4096 m=256: error: gone" in text
    drawn = table.plot(list(merged.values()))
    assert drawn.startswith("<svg")
    assert drawn.count("<polyline") >= 1


def test_merging_nothing_leaves_the_csv_alone(tmp_path: Path) -> None:
    target = tmp_path / "m_falcon.csv"
    target.write_text("untouched")
    assert rows.merge(tmp_path, target) == 1
    assert target.read_text() == "untouched"


def test_the_scripts_measure_nothing_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    import bench_m_falcon

    assert peers.main([]) == 0
    assert bench_m_falcon.main([]) == 0
    assert capsys.readouterr().out.count("nothing was run") == 2


@pytest.fixture(scope="module")
def meta_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a job carries, taken from the checkout."""
    checkout = os.environ.get(META_REPO)
    if not checkout:
        pytest.skip(f"no checkout of Meta's generative-recommenders: {META_REPO} is not set")
    folder = tmp_path_factory.mktemp("job") / "meta"
    prepare.copy_meta(Path(checkout), folder)
    return folder


@pytest.fixture
def meta(meta_repo: Path) -> Iterator[SimpleNamespace]:
    modules = meta_peer.import_meta(meta_repo)
    stu: Any = sys.modules["generative_recommenders.modules.stu"]
    original = stu.delta_hstu_mha
    # Its PyTorch kernel returns a transposed view for one sequence, which its caller cannot reshape; Triton's does not.
    stu.delta_hstu_mha = lambda **arguments: original(**arguments).contiguous()
    yield modules
    stu.delta_hstu_mha = original


@pytest.mark.parametrize("shape", [(150, 17), (5, 3), (30, 1)])
def test_meta_agrees_packed_and_cached(
    meta: SimpleNamespace, state: dict[str, torch.Tensor], shape: tuple[int, int]
) -> None:
    request, sizes = work.request(*shape, work.TINY), work.TINY
    # Meta's PyTorch kernel clamps time buckets to D - 1.
    exact = eager(state, torch.float64, sizes.width - 1)
    peer = peers.Peer(meta_peer.MetaModel(meta, state, sizes, CPU, torch.float32, "PYTORCH"))
    with torch.inference_mode():
        expected = exact.packed(exact.upload(request))
        spread = exact.packed(exact.upload(work.request(shape[0], 64, sizes))).std()
        for mode in (rows.PACKED, rows.COLD, rows.WARM):
            (run,), upload = peer.runs(mode, [request])
            upload(0)
            for _ in range(2):
                assert float((run() - expected).abs().max() / spread) <= RMS["float32"], mode


def test_meta_carries_only_what_it_imports(meta_repo: Path) -> None:
    files = [path for path in meta_repo.rglob("*") if path.is_file()]
    assert all(path.suffix in (".py", "") for path in files)
    assert sum(path.stat().st_size for path in files) < 2**20
    assert (meta_repo / "COMMIT").read_text().strip()
