"""The end-to-end benchmark's own backends: sessions on engines of the bundles that prepare_job.py made.

Run by bench_end_to_end.py beside TensorRT-RTX (families ours_rtx_fused, ours_rtx_native) and beside TensorRT 8.5
(ours_trt85_plugin, Python 3.10, no torch). Engines are built where they run, from the bundles' graphs, for the shapes
of the benchmark; a bundle's own are for the shapes of its options.

  end_to_end-fp16  end_to_end-bf16                        model.onnx, its last layer pruned, and score.onnx
  end_to_end-fp16-unpruned  end_to_end-bf16-unpruned      model.onnx
  end_to_end-fp16-layers8 and others                      model.onnx of so many layers
  retrieval-fp16  retrieval-fp16-unpruned  and of bf16    model.onnx of the retrieval model
  the bundle, --kernels, or any of them                   libhstu_attention_kernels.so, for the fused sessions
"""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from bench_plugin import clocks, status_of
from end_to_end_clock import FLUSH_BYTES, DriverClock, call_times, timed
from end_to_end_reference import Reference, reference_path
from end_to_end_retrieval_workload import RETRIEVAL
from end_to_end_rows import GRAPH, RTX_FUSED, TRT85, backends_of, keys_path, line_of, load_keys, write_part
from end_to_end_workload import (
    CACHED,
    AnyCase,
    AnySizes,
    Case,
    arrays_of,
    score_arrays,
)
from m_falcon_workload import Sizes
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

    from hstu_compile.runtime._gpu_session import GpuSession
    from hstu_compile.runtime.resident import ResidentTensor
    from hstu_compile.trt_options import EngineOptions

#: Least, typical and greatest size of every axis of the ranking graphs' inputs, over all cases.
AXES = {
    "L": (1, 16_384, 65_536),
    "T": (1, 2048, 8192),
    "B": (1, 8, 32),
    "B_plus_1": (2, 9, 33),
    "Lc": (1, 32_776, 32_776),
}
#: The same of the retrieval graph.
RETRIEVAL_AXES = {"L": (1, 12_800, 25_600), "B": (1, 64, 128), "B_plus_1": (2, 65, 129)}
KERNELS_FILE = "libhstu_attention_kernels.so"
ELEMENTS = {"fp16": "float16", "bf16": "bfloat16"}
#: Runs until a pass is surely a replay: a plain one, one that is recorded, one that is compared.
_RUNS_TO_REPLAY = 4
_CUDA_GRAPHS = 4
_MIB = 2.0**20

Row = dict[str, Any]
Feeds = dict[str, Any]


def bundle_name(case: AnyCase, family: str = RTX_FUSED) -> str:
    """Folder of the bundle that a case's graph is in.

    The builder of TensorRT 8.5 crashes on a retrieval graph whose last layer is pruned, so that there it is whole.
    """
    if case.mode == RETRIEVAL:
        return f"{RETRIEVAL}-{case.dtype}" + ("" if case.is_pruned and family != TRT85 else "-unpruned")
    assert isinstance(case, Case)
    if case.layers is not None:
        return f"end_to_end-{case.dtype}-layers{case.layers}"
    return f"end_to_end-{case.dtype}" + ("" if case.is_pruned or case.mode == CACHED else "-unpruned")


def graph_stem(case: AnyCase) -> str:
    """Of the graph's file."""
    return "score" if case.mode == CACHED else "model"


def axes_of(case: AnyCase) -> Mapping[str, tuple[int, int, int]]:
    """Sizes that the engines of a case's graph are built for."""
    return RETRIEVAL_AXES if case.mode == RETRIEVAL else AXES


def answers_of(case: AnyCase, outputs: Mapping[str, Any]) -> NDArray[Any]:
    """What a case's reference is compared with: logits [T], or user embeddings [B, D]."""
    if case.mode == RETRIEVAL:
        return np.asarray(outputs["user_embeddings"])
    return np.asarray(outputs["logits"])[:, 0]


def options_of(
    model: onnx.ModelProto, plugin_library: Path | None, axes: Mapping[str, tuple[int, int, int]] = AXES
) -> EngineOptions:
    """Builder settings for a graph: the shapes of the benchmark.

    Raises:
        KeyError: an axis that `axes` lacks.
    """
    from hstu_compile.graph_facts import tensor_specs
    from hstu_compile.trt_options import EngineOptions

    least, typical, greatest = (
        tuple(
            (spec.name, tuple(axes[axis][which] if isinstance(axis, str) else axis for axis in spec.shape))
            for spec in tensor_specs(model.graph.input)
        )
        for which in range(3)
    )
    plugins = () if plugin_library is None else (plugin_library,)
    return EngineOptions(min_shapes=least, opt_shapes=typical, max_shapes=greatest, plugins=plugins)


class Engines:
    """Engines of one family: built where they are missing, and measured.

    Args:
        family: RTX_FUSED, RTX_NATIVE or TRT85.
        bundles: folder of the bundles.
        engines: folder for what is built.
        plugin_library: for TRT85.
        kernels: for RTX_FUSED, where a case's bundle has none of its own; None looks in the other bundles.
    """

    def __init__(
        self, family: str, bundles: Path, engines: Path, plugin_library: Path | None, kernels: Path | None
    ) -> None:
        self._family, self._bundles, self._engines = family, bundles, engines
        self._plugin_library, self._kernels = plugin_library, kernels

    def why_not(self, case: AnyCase) -> str:
        """Why a case has no time here; "" if it may have one."""
        if self._family == TRT85 and case.dtype == "bf16":
            return "not offered: TensorRT 8.5 has no bfloat16"
        return ""

    def _folder(self, case: AnyCase) -> Path:
        return self._engines / self._family / bundle_name(case, self._family)

    def _files(self, case: AnyCase) -> list[Path]:
        """The engines of a case, in order; of a fused one the schedule first."""
        folder, stem = self._folder(case), graph_stem(case)
        if self._family != RTX_FUSED:
            return [folder / f"{stem}.engine"]
        engines = sorted(folder.glob(f"{stem}.segment-*.engine"), key=lambda path: int(path.stem.rsplit("-", 1)[1]))
        return [folder / f"{stem}.schedule.json", *engines]

    def target(self, case: AnyCase) -> Path:
        """The last file that building a case's engines writes; cases with the same graph share it."""
        return self._files(case)[0]

    def build(self, case: AnyCase) -> float:
        """Build a case's engines; returns the seconds it took.

        Raises:
            HstuCompileError: what the stages raise.
        """
        import onnx

        from hstu_compile.engine_stage import EngineRequest, run_engine_stage

        started = time.perf_counter()
        source = self._bundles / bundle_name(case, self._family) / f"{graph_stem(case)}.onnx"
        target, axes = self.target(case), axes_of(case)
        target.parent.mkdir(parents=True, exist_ok=True)
        plugin = self._plugin_library if self._family == TRT85 else None
        options = options_of(onnx.load(source, load_external_data=False), plugin, axes)
        request = EngineRequest(
            model=source,
            output=target.with_name(f"{graph_stem(case)}.engine"),
            backend="tensorrt" if self._family == TRT85 else "tensorrt-rtx",
            max_batch=axes["B"][2],
            opt_batch=axes["B"][1],
            max_seq_len=None,
            opt_seq_len=None,
            options=options,
            attention="fused" if self._family == RTX_FUSED else "auto",
        )
        run_engine_stage(request)
        seconds = time.perf_counter() - started
        target.with_suffix(".seconds").write_text(f"{seconds:.3f}\n", encoding="utf-8")
        return seconds

    def build_seconds(self, case: AnyCase) -> float | None:
        """How long `build` took, if it said so."""
        path = self._files(case)[0].with_suffix(".seconds")
        return float(path.read_text(encoding="utf-8")) if path.exists() else None

    def opened(self, case: AnyCase) -> GpuSession:
        """A session on a case's engines, which keeps CUDA graphs where its runtime has them.

        Raises:
            FileNotFoundError: its engines or its kernels are missing.
            HstuCompileError: what the session raises.
        """
        from hstu_compile.runtime._gpu_session import GpuSession
        from hstu_compile.runtime.tensorrt_session import TensorRtSession
        from hstu_compile.tensorrt_api import tensorrt_api

        files = self._files(case)
        if not self.target(case).exists():
            raise FileNotFoundError(f"{files[0].name} was not built")
        if self._family == RTX_FUSED:
            from hstu_compile.runtime.open_fused import open_fused_session

            session = open_fused_session(files[0], files[1:], self._kernel_library(case), cuda_graphs=_CUDA_GRAPHS)
            assert isinstance(session, GpuSession)
            return session
        if self._family == TRT85:
            api = tensorrt_api("tensorrt")
            return TensorRtSession(api, files[0].read_bytes(), self._plugin_library, cuda_graphs=_CUDA_GRAPHS)
        return TensorRtSession(tensorrt_api("tensorrt-rtx"), files[0].read_bytes())

    def _kernel_library(self, case: AnyCase) -> Path:
        own = self._bundles / bundle_name(case, self._family) / KERNELS_FILE
        given = () if self._kernels is None else (self._kernels,)
        candidates = (own, *given, *sorted(self._bundles.glob(f"*/{KERNELS_FILE}")))
        found = next((path for path in candidates if path.exists()), None)
        if found is None:
            raise FileNotFoundError(f"no bundle has {KERNELS_FILE}, and none was given")
        return found


class OurRows:
    """Checks and times a family's cases.

    Args:
        engines: of the family.
        family: its name.
        parts: folder of the rows and references.
        scratch: folder of keys and values.
        sizes: of the model.
    """

    def __init__(self, engines: Engines, family: str, parts: Path, scratch: Path, sizes: AnySizes) -> None:
        self._engines, self._family, self._parts = engines, family, parts
        self._scratch, self._sizes, self._clocks = scratch, sizes, clocks()

    def measure(self, case: AnyCase) -> None:
        """Write the rows of a case."""
        names = backends_of(self._family)
        rows: dict[str, Row] = {name: {} for name in names}
        if reason := self._engines.why_not(case):
            rows = {name: {"status": reason} for name in names}
        else:
            try:
                self._fill(case, rows)
            except Exception as error:
                status = status_of(error)
                for row in rows.values():
                    row.setdefault("status", status)
        for name, row in rows.items():
            write_part(self._parts, case, name, {"clocks": self._clocks, "l2": "cold"} | row, self._sizes)
            print(line_of(case.name, name, row), flush=True)

    def _fill(self, case: AnyCase, rows: dict[str, Row]) -> None:
        reference = Reference.load(reference_path(self._parts, case))
        is_pruned = case.is_pruned and not bundle_name(case, self._family).endswith("-unpruned")
        common: Row = {"form": "pruned" if is_pruned else ""}
        if (seconds := self._engines.build_seconds(case)) is not None:
            common["build_s"] = seconds
        before = free_bytes()
        keys = keys_path(self._scratch, case) if isinstance(case, Case) and case.mode == CACHED else None
        with self._engines.opened(case) as session, session_feeds(case, session, self._sizes, keys) as feeds:
            for row in rows.values():
                row |= common | {"versions": session.name}
            measured = Measured(session, feeds, reference, functools.partial(answers_of, case))
            try:
                for name, row in rows.items():
                    try:
                        row |= measured.replays() if name.endswith(GRAPH) else measured.plain()
                    except Exception as error:
                        row["status"] = status_of(error)
                    row["peak_mib"] = (before - free_bytes() - FLUSH_BYTES) / _MIB
            finally:
                measured.close()


@contextlib.contextmanager
def session_feeds(case: AnyCase, session: GpuSession, sizes: AnySizes, keys: Path | None) -> Iterator[Feeds]:
    """Inputs of a case: arrays, and of a cached one the keys and values of a file, where the session computes."""
    if keys is None:
        yield dict(arrays_of(case, sizes))
        return
    assert isinstance(case, Case)
    assert isinstance(sizes, Sizes)
    arrays = load_keys(keys, case)
    pool = session.memory_pool(sum(array.nbytes + 256 for array in arrays.values()))
    try:
        feeds: Feeds = dict(score_arrays(case, sizes))
        for name, array in arrays.items():
            region = pool.allocate(array.nbytes)
            assert region is not None
            tensor: ResidentTensor = pool.tensor(region, 0, array.shape, ELEMENTS[case.dtype])
            pool.write(array, tensor)
            feeds[name] = tensor
        yield feeds
    finally:
        pool.close()


class Measured:
    """One request on one session: plain passes, and replays of a CUDA graph.

    Args:
        session: keeps graphs, unless its runtime has none.
        feeds: the request.
        reference: of its answers.
        answers: those among the outputs.
    """

    def __init__(
        self,
        session: GpuSession,
        feeds: Mapping[str, Any],
        reference: Reference,
        answers: Callable[[Mapping[str, Any]], NDArray[Any]],
    ) -> None:
        self._session, self._feeds, self._reference = session, dict(feeds), reference
        self._answers = answers
        self._clock = DriverClock(session._driver)

    def run(self) -> NDArray[Any]:
        """Answers of a whole call."""
        return self._answers(self._session.run_resident(self._feeds, {}))

    def plain(self) -> Row:
        """Check and time passes that are enqueued kernel by kernel."""
        # Without them a session records what comes twice.
        graphs, self._session._graphs = self._session._graphs, None
        try:
            self.run()
            self._session.poison_outputs()
            row = self._reference.judged(self.run())
            if row["status"] != "ok":
                return row
            with self._session._api.capture() as log:
                row |= timed(self._clock.samples(lambda: self._session._execute(log)))
            return row | call_times(self.run)
        finally:
            self._session._graphs = graphs

    def replays(self) -> Row:
        """Check and time replays; what was to be replayed and was not has no time."""
        from hstu_compile.runtime._cuda_graph import CudaGraph

        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for _ in range(_RUNS_TO_REPLAY):
                self.run()
        before = self._session.graph_stats
        self._session.poison_outputs()
        row = self._reference.judged(self.run())
        after = self._session.graph_stats
        if row["status"] != "ok":
            return row
        if before is None or after is None or after.replays != before.replays + 1:
            reasons = "; ".join(str(each.message) for each in warned[-2:])
            return row | {"status": f"error: the pass was no replay: {reasons}"[:400]}
        driver = self._session._driver
        with driver.current(), self._session._api.capture() as log:
            graph = CudaGraph(driver, lambda: self._session._execute(log))
        try:
            row |= {"nodes": graph.num_nodes} | timed(self._clock.samples(graph.launch))
        finally:
            with driver.current():
                graph.close()
        return row | call_times(self.run)

    def close(self) -> None:
        """Free the clock's memory."""
        self._clock.close()


def free_bytes() -> int:
    """Device memory that the driver could still give out."""
    from hstu_compile.runtime._cuda import CudaDriver

    driver = CudaDriver()
    try:
        with driver.current():
            return driver.free_bytes()
    finally:
        driver.close()
