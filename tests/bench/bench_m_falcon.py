"""M-FALCON: ranking engines with and without the KV cache, against PyTorch peers on the same GPU.

Two Pythons take part, so each run writes parts, and a last step merges them:

  m_falcon_peers.py --parts DIR --meta-repo REPO                   (beside torch; first, as it makes the references)
  bench_m_falcon.py --parts DIR --bundle DIR --plugin-library LIB  (beside TensorRT, no torch needed)
  bench_m_falcon.py --merge DIR [--csv FILE]    (anywhere; rows that DIR lacks stay in the CSV as they are)
  m_falcon_table.py [--into FILE] [--svg FILE]  (the Markdown table and the plot)

The bundle gives the manifest's ranking entry; beside it, or in --engines DIR, lie model.engine (packed), prefill.engine
and score.engine, which serves every micro-batch up to the one it was built for. median_ms is the engines' time on the
device, by events around each enqueue; call_median_ms is the whole `RankingSession` call, from host arrays to host
arrays, schedule and cache included. Every pass is one CUDA graph, and the note says of how many nodes. Score passes
read keys and values where they lie in a cache of --cache-users users; with an engine that cannot take it whole, and
after a prefill, the copies to and from the staging memory are in median_ms as well. Backend hstu_compile_no_graph is
the same without graphs. Every answer is compared with the float32 references before it is timed, with graphs that of a
replay over outputs of NaN. Warm L2 cache. Without --parts or --merge nothing is run.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from bench_plugin import status_of
from m_falcon_rows import (
    ALONE,
    COLD,
    ENGINES,
    OURS,
    PACKED,
    RESULTS,
    WARM,
    Case,
    Reference,
    Row,
    cases_of,
    finished,
    merge,
    reference_path,
    show_part,
    write_part,
)
from m_falcon_workload import CANDIDATE_COUNTS, HISTORY_LENGTHS, MICRO_BATCHES, Request, request
from numpy.typing import NDArray

if TYPE_CHECKING:
    from device_timing import EngineRunner

    from hstu_compile.runtime.kv_layout import KvLayout
    from hstu_compile.runtime.ranking import RankingSession, RankingStats
    from hstu_compile.runtime.ranking_request import RankingRequest, RankingResult
    from hstu_compile.runtime.ranking_spec import RankingSpec
    from hstu_compile.runtime.tensorrt_session import TensorRtSession
    from hstu_compile.tensorrt_api import TensorRtApi

ROLES = {"packed": "model.engine", "prefill": "prefill.engine", "score": "score.engine"}
NOT_REPLAYED = "passes were replays of a CUDA graph"
#: More than the cases of one group need, whose shapes come one after the other.
CUDA_GRAPHS = 8
_MIB = 2.0**20


@dataclasses.dataclass(frozen=True)
class Bundle:
    """The engines of one model, and what runs them.

    Attributes:
        api: TensorRT.
        spec: the manifest's ranking entry.
        plans: serialised engines by role.
        plugin_library: library with the plugin, or None.
        precision: "fp16", "bf16" or "fp32".
    """

    api: TensorRtApi
    spec: RankingSpec
    plans: Mapping[str, bytes]
    plugin_library: Path | None
    precision: str

    @classmethod
    def open(cls, folder: Path, engines: Path | None, plugin_library: Path | None) -> Bundle:
        """Read a bundle's engines, or those of another folder; nothing is loaded yet."""
        from hstu_compile.runtime.ranking_spec import RankingSpec
        from hstu_compile.tensorrt_api import tensorrt_api

        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        plans = {role: ((engines or folder) / file).read_bytes() for role, file in ROLES.items()}
        spec = RankingSpec.from_manifest(manifest["ranking"])
        return cls(tensorrt_api("tensorrt"), spec, plans, plugin_library, manifest["precision"]["requested"])

    def sessions(self, cuda_graphs: int) -> list[TensorRtSession]:
        """A session per engine."""
        from hstu_compile.runtime.tensorrt_session import TensorRtSession

        return [
            TensorRtSession(self.api, self.plans[role], self.plugin_library, cuda_graphs=cuda_graphs) for role in ROLES
        ]

    def layout(self) -> KvLayout:
        """Of a cached row."""
        from hstu_compile.runtime.kv_layout import KvLayout

        spec = self.spec
        return KvLayout(spec.num_layers, spec.num_heads, spec.attention_dim, spec.linear_dim, spec.kv_dtype)

    def ranking(self, sessions: Sequence[TensorRtSession], micro_batch: int, cached_rows: int) -> RankingSession:
        """A ranking session, which owns the sessions, whose cache holds so many rows.

        Raises:
            ValueError: if the score engine takes fewer candidates than a micro-batch.
        """
        from hstu_compile.runtime.ranking import RankingSession

        if micro_batch > self.spec.micro_batch:
            raise ValueError(f"the score engine takes {self.spec.micro_batch} candidates, not {micro_batch}")
        spec = dataclasses.replace(self.spec, micro_batch=micro_batch)
        return RankingSession(spec, *sessions, kv_budget_bytes=self.layout().entry_bytes(cached_rows))


def ranking_request(user: str, content: Request) -> RankingRequest:
    """The workload's request in the runtime's form."""
    from hstu_compile.runtime.ranking_request import RankingRequest

    return RankingRequest(user, content.history, content.candidates, content.context)


def calls_of(session: RankingSession, case: Case) -> Callable[[], list[RankingResult]]:
    """The whole call that a case measures.

    Raises:
        RuntimeError: (when called) if the cache was not used as the mode says.
    """
    whole = request(case.n, case.m)
    if case.mode == ALONE:
        singles = [ranking_request("user", whole.only(index, index + 1)) for index in range(case.sample)]
        return lambda: [session.score_packed([single])[0] for single in singles]
    asked = ranking_request("user", whole)
    if case.mode == PACKED:
        return lambda: session.score_packed([asked])

    def cached() -> list[RankingResult]:
        if case.mode == COLD:
            session.invalidate("user")
        results = session.score([asked])
        expected = "miss" if case.mode == COLD else "hit"
        if results[0].cache != expected:
            raise RuntimeError(f"the cache answered {results[0].cache!r}, not {expected!r}")
        return results

    if case.mode == WARM:
        session.score([asked])
    return cached


def passes_of(case: Case) -> tuple[int, int]:
    """How many score passes there are, and candidates in each; case.m is a multiple of what fits one."""
    size = min(case.m, case.micro_batch)
    if case.m % size:
        raise ValueError(f"{case.m} candidates are no whole number of micro-batches of {size}")
    return case.m // size, size


def nans(count: int, rows: NDArray[Any]) -> NDArray[Any]:
    """So many more rows of a floating-point type, or of its bits, that are NaN."""
    width = rows.nbytes // len(rows)
    return np.full(count * width, 0xFF, np.uint8).view(rows.dtype).reshape(count, *rows.shape[1:])


class DeviceClock:
    """Times of a bundle's engines on the device, each loaded once; what several cases share is timed once.

    Args:
        bundle: the engines.
        graphs: time CUDA graphs of them, and the copies that these need; a replay has to equal a plain run to the bit.
        cached_rows: of the cache, whose last ones are the user's.
    """

    def __init__(self, bundle: Bundle, graphs: bool, cached_rows: int) -> None:
        self._bundle, self._graphs, self._cached_rows = bundle, graphs, cached_rows
        self._copies: dict[int, Row] = {}
        self._runners: dict[str, EngineRunner] = {}
        self._prefills: dict[int, tuple[Row, dict[str, NDArray[Any]]]] = {}
        self._scores: dict[tuple[int, int], Row] = {}

    def _runner(self, role: str) -> EngineRunner:
        from device_timing import EngineRunner

        if role not in self._runners:
            bundle = self._bundle
            self._runners[role] = EngineRunner(bundle.api, bundle.plans[role], bundle.plugin_library)
        return self._runners[role]

    def _timed(self, role: str, feeds: Mapping[str, NDArray[Any]]) -> tuple[Row, dict[str, NDArray[Any]]]:
        runner = self._runner(role)
        runner.set_inputs(feeds)
        outputs = {name: values.copy() for name, values in runner.run().items()}
        facts: Row = {}
        if self._graphs:
            facts["nodes"] = runner.record()
            for name, values in runner.run().items():
                if values.tobytes() != outputs[name].tobytes():
                    raise RuntimeError(f"{name} of a replay of {role} differs from that of a plain run")
        return {**facts, **runner.time(), "peak_mib": runner.memory()["peak_mib"]}, outputs

    def timing(self, case: Case) -> Row:
        """The packed engine, or as many score passes as there are, with a prefill before them where it is cold."""
        whole = request(case.n, case.m)
        if case.mode == ALONE:
            single, _ = self._timed("packed", whole.only(0, 1).features)
            scaled = {name: value * case.sample for name, value in single.items() if name.endswith("_ms")}
            return self._noted(single | scaled, "one forward, times the candidates")
        if case.mode == PACKED:
            return self._noted(self._timed("packed", whole.features)[0], "one forward")
        count, size = passes_of(case)
        prefill, score = self._passes(case.n, size)
        row, what = score | {name: count * score[name] for name in ("median_ms", "p90_ms")}, ""
        if case.mode == COLD:
            row |= {name: row[name] + prefill[name] for name in ("median_ms", "p90_ms")}
            row |= {name: max(prefill[name], score[name]) for name in ("cv", "peak_mib")}
            what = "one prefill and "
        in_place = self._takes_all_rows()
        # With graphs, from the staging memory to the cache after a prefill; and to it, once for all score passes, where
        # these cannot read the cache.
        times = (case.mode == COLD) + (not in_place) if self._graphs else 0
        if times:
            copies = self._copies[case.n]
            row |= {name: row[name] + times * copies[name] for name in ("median_ms", "p90_ms")}
            what += f"{times} x {copies['median_ms']:.3f} ms of copying keys and values and "
        read = f" in a cache of {self._cached_rows} rows" if in_place else ""
        return self._noted(row, f"{what}{count} x one score pass of {size}{read}")

    def _takes_all_rows(self) -> bool:
        from hstu_compile.runtime.ranking import takes_all_rows

        return takes_all_rows(self._runner("score"), self._bundle.spec, self._cached_rows)

    def _noted(self, row: Row, what: str) -> Row:
        nodes = row.pop("nodes", None)
        return row | {"note": f"device: {what}" + (f"; a CUDA graph of {nodes} nodes" if nodes else "")}

    def _passes(self, n: int, size: int) -> tuple[Row, Row]:
        """One prefill of n events, and one score pass of `size` candidates against it."""
        from hstu_compile.runtime._ranking_feeds import among_all_rows, prefill_feeds, score_feeds
        from hstu_compile.runtime.ranking_request import RankingPolicy, checked_requests

        spec = self._bundle.spec
        (checked,) = checked_requests([ranking_request("user", request(n, size))], spec, RankingPolicy())
        if n not in self._prefills:
            self._prefills.clear()  # keys and values of one length at a time
            self._prefills[n] = self._timed("prefill", prefill_feeds([checked], spec))
        prefill, key_values = self._prefills[n]
        if (n, size) not in self._scores:
            feeds = score_feeds([checked], [checked.candidates], spec)
            if self._takes_all_rows():
                first = self._cached_rows - len(next(iter(key_values.values())))
                feeds = among_all_rows(feeds, [first])
                feeds |= {name: np.concatenate([nans(first, rows), rows]) for name, rows in key_values.items()}
            else:
                feeds |= key_values
            self._scores[n, size], answers = self._timed("score", feeds)
            if not all(np.isfinite(values).all() for values in answers.values()):
                raise RuntimeError("a score pass read rows of the cache that are not its user's")
            if self._graphs and n not in self._copies:
                self._copies[n] = self._runner("score").time_copies([rows.nbytes for rows in key_values.values()])
        return prefill, self._scores[n, size]

    def close(self) -> None:
        """Free the engines."""
        while self._runners:
            self._runners.popitem()[1].close()


def free_bytes() -> int:
    """Device memory that the driver could still give out."""
    from hstu_compile.runtime._cuda import CudaDriver

    driver, free, total = CudaDriver(), ctypes.c_size_t(), ctypes.c_size_t()
    try:
        with driver.current():
            status = ctypes.CDLL("libcuda.so.1").cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    finally:
        driver.close()
    if status:
        raise RuntimeError(f"cuMemGetInfo failed with CUDA error {status}")
    return int(free.value)


def call_timing(call: Callable[[], Any]) -> Row:
    """Wall-clock milliseconds of whole calls: warm-up, then a fixed time."""
    from device_timing import MEASURE_MS, MOST, WARM_UP_MS, repeats_for, summary_of

    def samples(count: int) -> list[float]:
        measured = []
        for _ in range(count):
            started = time.perf_counter()
            call()
            measured.append(1e3 * (time.perf_counter() - started))
        return measured

    single = sorted(samples(3))[1]
    samples(max(1, min(MOST, int(WARM_UP_MS / single))))
    summary = summary_of(samples(repeats_for(single, MEASURE_MS)))
    return {"call_median_ms": summary["median_ms"], "call_p90_ms": summary["p90_ms"]}


def run_call(
    session: RankingSession, engines: Sequence[TensorRtSession], free_before: int, case: Case, reference: Reference
) -> Row:
    """Check, then time whole calls: a wrong answer gets no time, nor does one that was to be replayed and was not."""
    call = calls_of(session, case)
    if case.backend == ENGINES:
        # A plain run, one that is recorded, and a replay that the session compares with a plain run.
        for _ in range(3):
            call()
    for engine in engines:
        engine.poison_outputs()
    before = session.stats()
    logits = np.concatenate([result.logits[:, 0] for result in call()])
    row = reference.judged(case, logits)
    if "status" in row:
        return row
    if case.backend == ENGINES and (problem := unreplayed(before, session.stats())):
        return row | {"status": problem}
    return row | call_timing(call) | {"used_mib": (free_before - free_bytes()) / _MIB}


def unreplayed(before: RankingStats, after: RankingStats) -> str:
    """What of the passes between two looks was no replay; "" if every one was."""
    passes = sum(
        getattr(after, name) - getattr(before, name) for name in ("prefill_passes", "score_passes", "packed_passes")
    )
    replays = after.graphs.replays - before.graphs.replays
    return "" if passes == replays else f"error: {replays} of {passes} {NOT_REPLAYED}"


def command_of(case: Case) -> str:
    """The line that reproduces a row."""
    split = f" --micro-batches {case.micro_batch}" if case.micro_batch else ""
    return (
        f"bench_m_falcon.py --parts DIR --bundle DIR --plugin-library LIB --n {case.n} --m {case.m} "
        f"--backends {case.backend} --modes {case.mode}{split}"
    )


def selected(arguments: argparse.Namespace, group: int | None = None) -> Iterator[Case]:
    """The cases that were asked for; with `group`, those of one micro-batch (0: without the cache)."""
    for backend in arguments.backends:
        for case in cases_of(backend, arguments.n, arguments.m, arguments.micro_batches):
            if case.mode in arguments.modes and group in (None, case.micro_batch):
                yield case


def run_group(arguments: argparse.Namespace) -> None:
    """All cases of one micro-batch in this process: whole calls first, as memory is then one session's."""
    parts, micro_batch = arguments.parts, arguments.one_group
    free_before = free_bytes()
    bundle = Bundle.open(arguments.bundle, arguments.engines, arguments.plugin_library)
    facts = {"dtype": bundle.precision, "versions": f"TensorRT {bundle.api.version}"}
    for backend in arguments.backends:
        cases = [case for case in selected(arguments, micro_batch) if case.backend == backend]
        cases = [case for case in cases if not (parts / case.part_name).exists()]
        if cases:
            run_cases(arguments, bundle, cases, micro_batch, free_before, facts)


def run_cases(
    arguments: argparse.Namespace,
    bundle: Bundle,
    cases: Sequence[Case],
    micro_batch: int,
    free_before: int,
    facts: Row,
) -> None:
    """Cases of one backend and one micro-batch."""
    parts, graphs = arguments.parts, cases[0].backend == ENGINES
    rows: dict[Case, Row] = {}
    size = micro_batch or bundle.spec.micro_batch
    cached_rows = arguments.cache_users * (bundle.spec.contextual_len + max(arguments.n))
    engines = bundle.sessions(CUDA_GRAPHS if graphs else 0)
    with (
        bundle.ranking(engines, size, cached_rows) as session,
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        for case in dict.fromkeys(case.measured for case in cases):
            try:
                reference = Reference.load(reference_path(arguments.references or parts, case.n, bundle.precision))
                rows[case] = run_call(session, engines, free_before, case, reference)
            except Exception as error:
                rows[case] = {"status": status_of(error)}
            if NOT_REPLAYED in rows[case].get("status", ""):
                rows[case]["status"] += "".join(f"; {each.message}" for each in warned[-2:])[:300]
    for each in warned:
        print(f"warning: {each.message}", flush=True)
    clock = DeviceClock(bundle, graphs, cached_rows)
    try:
        for case, row in rows.items():
            if "status" not in row:
                try:
                    row.update(clock.timing(case))
                except Exception as error:
                    row["status"] = status_of(error)
            for each in cases:
                if each.measured == case:
                    write_part(parts, each, facts | finished(each, row), command_of(each))
    finally:
        clock.close()


def measure(arguments: argparse.Namespace) -> int:
    """Each micro-batch in a process of its own, so that one that fails takes no other with it."""
    parts: Path = arguments.parts.resolve()
    parts.mkdir(parents=True, exist_ok=True)
    started, missing = time.perf_counter(), False
    manifest = json.loads((arguments.bundle / "manifest.json").read_text(encoding="utf-8"))
    precision = manifest["precision"]["requested"]
    groups = sorted({case.micro_batch for case in selected(arguments)})
    for group in groups:
        cases = list(selected(arguments, group))
        left = arguments.budget - (time.perf_counter() - started)
        failed = f"not run: the time budget of {arguments.budget:g} s was used up"
        if left > 5:
            command = [sys.executable, str(Path(__file__).resolve()), "--parts", str(parts), "--one-group", str(group)]
            command += ["--bundle", str(arguments.bundle.resolve()), "--modes", *arguments.modes]
            command += ["--backends", *arguments.backends, "--n", *map(str, arguments.n), "--m", *map(str, arguments.m)]
            command += ["--micro-batches", *map(str, arguments.micro_batches)]
            command += ["--cache-users", str(arguments.cache_users)]
            for option in ("engines", "plugin_library", "references"):
                if getattr(arguments, option) is not None:
                    command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option).resolve())]
            limit, log = min(left, arguments.group_seconds), parts / f"{ENGINES}-b{group}.log"
            with log.open("w", encoding="utf-8") as file:
                try:
                    done = subprocess.run(
                        command, stdout=file, stderr=subprocess.STDOUT, timeout=limit, cwd=parts, check=False
                    )
                    failed = f"error: exit {done.returncode}"
                except subprocess.TimeoutExpired:
                    failed = f"not run: its group was not finished in {limit:.0f} s"
            failed += ": " + " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-300:]
        for case in cases:
            show_part(parts, case, {"status": failed, "dtype": precision}, command_of(case))
        missing |= any(json.loads((parts / case.part_name).read_text())["status"] != "ok" for case in cases)
        print(f"micro-batch {group or 'none'}: {time.perf_counter() - started:.0f} s", flush=True)
    return int(missing)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, metavar="DIR", help="measure, and write one JSON per row here")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="with the manifest")
    parser.add_argument("--engines", type=Path, metavar="DIR", help="with the three engines (default: --bundle)")
    parser.add_argument("--plugin-library", type=Path, metavar="LIB", help="self-registering, for this TensorRT")
    parser.add_argument("--references", type=Path, metavar="DIR", help="parts of m_falcon_peers.py (default: --parts)")
    parser.add_argument("--n", type=int, nargs="+", default=list(HISTORY_LENGTHS), help="history events")
    parser.add_argument("--m", type=int, nargs="+", default=list(CANDIDATE_COUNTS), help="candidates")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=list(MICRO_BATCHES))
    parser.add_argument("--cache-users", type=int, default=2, help="of the greatest n, whom the cache has room for")
    parser.add_argument("--modes", nargs="+", choices=(ALONE, PACKED, COLD, WARM), default=[ALONE, PACKED, COLD, WARM])
    parser.add_argument("--backends", nargs="+", choices=OURS, default=list(OURS), help="with and without CUDA graphs")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds for all; later cases are rows 'not run'")
    parser.add_argument("--group-seconds", type=float, default=180.0, help="limit of one micro-batch")
    parser.add_argument("--merge", type=Path, metavar="DIR", help="write the CSV from the parts under DIR")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--one-group", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.merge is not None:
        return merge(arguments.merge, arguments.csv)
    if arguments.parts is None:
        print("bench_m_falcon.py measures on a GPU, with --parts; nothing was run, results/m_falcon.csv stays as it is")
        return 0
    if arguments.bundle is None:
        parser.error("--parts needs --bundle")
    if arguments.one_group is not None:
        run_group(arguments)
        return 0
    return measure(arguments)


if __name__ == "__main__":
    sys.exit(main())
