"""The checks of bundles in segments, on fakes: right steps pass, and a wrong one fails by its name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hstu_compile.artifacts import Schedule
from hstu_compile.bundle import FusedFiles
from hstu_compile.runtime._cuda import CudaDriver
from hstu_compile.runtime.fused_session import FusedSession
from hstu_compile.runtime.schedule_file import schedule_text
from hstu_compile.tensorrt_api import TensorRtApi
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import fake_tensorrt
from tests.fused_fakes import FakeKernels, fused_session, segment_engine
from tests.segmented_cases import Case, retrieval_case

FOLDER = Path(__file__).parent
KERNELS = Path("libkernels.so")


@pytest.fixture(scope="module")
def modules() -> Mapping[str, ModuleType]:
    """The scripts as they import one another: from their own folder and the benchmark's."""
    for folder in (FOLDER, FOLDER.parent / "bench"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return {name: importlib.import_module(name) for name in ("checks", "prepare_fused", "run_fused")}


@pytest.fixture(scope="module")
def case() -> Case:
    return retrieval_case("retrieval", "fp16")


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    cuda = FakeCuda(2**24)
    yield cuda
    assert not cuda.memory


class Bundle:
    """A bundle of one graph in segments, whose engines are files of their names."""

    def __init__(self, folder: Path, case: Case) -> None:
        self.path = folder / "tiny-fused"
        self.path.mkdir()
        self._schedule = self.path / "model.schedule.json"
        self._schedule.write_text(schedule_text(case.cut))
        self._engines = [self.path / f"segment-{number}" for number in range(len(case.cut.segments))]
        for engine in self._engines:
            engine.write_text(engine.name)

    def fused_graph(self, graph: str) -> FusedFiles:
        return FusedFiles(self._schedule, tuple(self._engines), KERNELS)


def check_names(checks: Any) -> list[tuple[str, bool]]:
    return [(entry.name.removeprefix("tiny-fused retrieval: "), entry.passed) for entry in checks._entries]


def test_every_step_alone_is_held_to_its_own_values(
    modules: Mapping[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cuda: FakeCuda,
    case: Case,
) -> None:
    engines = {f"segment-{i}".encode(): segment_engine(each) for i, each in enumerate(case.cut.segments)}
    api = TensorRtApi("tensorrt-rtx", fake_tensorrt(engines, cuda))  # type: ignore[arg-type]

    def opened(schedule: Schedule, engines: Sequence[Path], kernels: Path) -> FusedSession:
        assert kernels == KERNELS
        plans = [engine.read_bytes() for engine in engines]
        return FusedSession(api, schedule, plans, FakeKernels(case.cut, cuda), CudaDriver(cuda))

    monkeypatch.setattr(modules["run_fused"], "open_fused_session", opened)
    bundle = Bundle(tmp_path, case)
    steps = ["segment 0", "kernel 0", "kernel 1", "segment 1", "kernel 2", "kernel 3", "segment 2"]
    stored = modules["prepare_fused"].step_values(case.cut, case.feeds[1])
    checks = modules["checks"].Checks("test")
    modules["run_fused"].check_steps(checks, bundle, "retrieval", stored)
    assert check_names(checks) == [(f"{step} alone agrees with ONNX Runtime", True) for step in steps]

    # What the first norm makes is wrong in the reference: it fails, and the segment that reads it.
    made = case.cut.calls[1].output
    checks = modules["checks"].Checks("test")
    modules["run_fused"].check_steps(checks, bundle, "retrieval", {**stored, made: stored[made] * np.float16(1.02)})
    assert not dict(check_names(checks))["kernel 1 alone agrees with ONNX Runtime"]
    assert [passed for _, passed in check_names(checks)][:2] == [True] * 2


def test_replays_are_compared_to_the_bit(modules: Mapping[str, ModuleType], cuda: FakeCuda, case: Case) -> None:
    reference = type(
        "Reference", (), {"feeds": [feed_of(index, arrays) for index, arrays in enumerate(case.feeds[:2])]}
    )
    for skips, passes in ((False, True), (True, False)):
        kernels = FakeKernels(case.cut, cuda, skips=skips)
        checks = modules["checks"].Checks("test")
        with (
            fused_session(case.cut, cuda) as plain,
            fused_session(case.cut, cuda, kernels, cuda_graphs=2) as recorded,
        ):
            modules["run_fused"].check_replays(checks, "tiny", reference, plain, recorded)
        assert [passed for _, passed in check_names(checks)] == [passes]


def test_the_first_pass_of_every_request_is_timed_apart(
    modules: Mapping[str, ModuleType], cuda: FakeCuda, case: Case
) -> None:
    reference = type("Reference", (), {"feeds": [feed_of(index, arrays) for index, arrays in enumerate(case.feeds)]})
    checks = modules["checks"].Checks("test")
    with fused_session(case.cut, cuda) as plain:
        modules["run_fused"].check_first_passes(checks, "tiny-fused retrieval", reference, plain)
    (entry,) = checks._entries
    assert entry.passed
    times = [entry.facts[f"feed {index}"] for index in range(len(case.feeds))]
    assert all(each["first_pass_ms"] > 0 and each["next_pass_ms"] > 0 for each in times)


def feed_of(index: int, arrays: dict[str, Any]) -> Any:
    return type("Feed", (), {"name": f"feed {index}", "arrays": arrays})


@pytest.mark.parametrize(
    ("actual", "wrong"),
    [
        (np.zeros((2, 3), np.float16), True),
        (np.ones((2, 2), np.float16), True),
        (np.ones((2, 3), np.float16), False),
        (np.full((2, 3), np.nan, np.float16), True),
    ],
)
def test_a_step_that_gives_zeros_another_shape_or_nan_is_wrong(
    modules: Mapping[str, ModuleType], actual: Any, wrong: bool
) -> None:
    whole, row = modules["run_fused"].step_errors(actual, np.ones((2, 3), np.float16))
    bound = modules["run_fused"].STEP_BOUND
    assert (whole > bound, row > bound) == (wrong, wrong)


def test_integers_of_a_step_are_equal_or_wrong(modules: Mapping[str, ModuleType]) -> None:
    step_errors = modules["run_fused"].step_errors
    assert step_errors(np.array([1, 2]), np.array([1, 2])) == (0.0, 0.0)
    assert step_errors(np.array([1, 3]), np.array([1, 2])) == (np.inf, np.inf)
