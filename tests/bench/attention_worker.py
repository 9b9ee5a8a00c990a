"""The attention benchmark's worker: checks and times the cases of a plan on this machine's GPU.

It notes each step before it takes it, so that whoever waits knows what killed it. A GPU whose context is lost ends the
worker: nothing after an illegal access would run.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attention_backends import Backends, Form
from attention_grid import DENSE_RAB, EAGER, ELEMENT_BYTES, META_TRITON, OURS, SOFTMAX, Case, all_cases, why_not
from attention_peers import NotOfferedError, meta_triton_module
from attention_reference import DTYPES, HSTU, Inputs, Sample, draw, judge, make_sample
from attention_reference import SOFTMAX as SOFTMAX_FUNCTION
from bench_attention import PLAN, PROGRESS, TIMING, common_facts, write_part
from bench_plugin import clocks, gpu_name, status_of
from device_timing import summary_of
from torch import Tensor

#: Larger than any GPU's L2 cache, and what it takes to write it is longer than the host takes to enqueue a call.
FLUSH_BYTES = 256 * 2**20
#: Cycles that the GPU sleeps before each round: about 3 ms, in which the host enqueues the round.
HEAD_START = 6_000_000
#: The host has fallen behind where enqueueing a round took longer than this, and twice as long as usual: what the GPU
#: then waits for is no time of a kernel. Such a round is measured again, this often at most.
HEAD_START_SECONDS, LATE_RATIO, MOST_REPEATS = 1.0e-3, 2.0, 5
ROUND_BUDGET_MS, FEWEST_ROUNDS, MOST_ROUNDS, WARM_UP_ROUNDS = 800.0, 20, 100, 3
GRAPH_CALLS = 20
_MIB = 2.0**20

Row = dict[str, Any]
Run = Callable[[], Any]


@dataclasses.dataclass
class Entry:
    """A form that is right, on its way to a row."""

    backend: str
    form: Form
    row: Row
    check: Callable[[Tensor], tuple[float, float, str]]


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that so many of them do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def timing_of(samples: Sequence[float]) -> Row:
    """median_ms, p90_ms, p99_ms, cv and repeats."""
    return summary_of(list(samples)) | {"p99_ms": percentile(samples, 0.99)}


def rates_of(case: Case, median_ms: float, gpu: str) -> Row:
    """tflops, tb_per_s and, of a known GPU, roof_share."""
    rates = {"tflops": case.flop / median_ms / 1e9, "tb_per_s": case.num_bytes / median_ms / 1e9}
    floor = case.floor_seconds(gpu)
    return rates if floor is None else rates | {"roof_share": 1e3 * floor / median_ms}


@dataclasses.dataclass(frozen=True)
class Round:
    """One call of everything.

    Attributes:
        device_ms: milliseconds on the device, by name.
        call_seconds: of enqueueing each, by name.
        host_seconds: of enqueueing all, with what lies between.
    """

    device_ms: Mapping[str, float]
    call_seconds: Mapping[str, float]
    host_seconds: float


def in_time(measure: Callable[[], Round], limit: float) -> Round:
    """Return the first round that the host enqueued in `limit` seconds, or the quickest of all that were tried."""
    rounds: list[Round] = []
    for _ in range(1 + MOST_REPEATS):
        rounds.append(measure())
        if rounds[-1].host_seconds <= limit:
            return rounds[-1]
    return min(rounds, key=lambda one: one.host_seconds)


def rounds_for(total_ms: float) -> int:
    """How many rounds fill the budget, when one of all backends takes so long."""
    return int(min(MOST_ROUNDS, max(FEWEST_ROUNDS, ROUND_BUDGET_MS / max(total_ms, 1e-3))))


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The names in an order that begins at another one each time."""
    start = by % len(names)
    return [*names[start:], *names[:start]]


def rounds_of(backends: Mapping[str, str]) -> list[list[str]]:
    """Names that are called in turn, by the names' backends: eager alone, all others together.

    Eager waits for the GPU, and so takes its head start from whatever is called next: the time of that would be the
    host's.
    """
    groups = [[name for name, backend in backends.items() if (backend == EAGER) == alone] for alone in (False, True)]
    return [group for group in groups if group]


class Clock:
    """Device times by CUDA events.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def interleaved(self, runs: Mapping[str, Run], *, cold: bool) -> dict[str, tuple[list[float], float]]:
        """Call everything in turn, in rounds.

        Args:
            runs: what to call, by name.
            cold: flush the L2 cache before each call.

        Returns:
            By name, milliseconds of each call on the device, and the median microseconds of enqueueing one.
        """
        names = list(runs)
        warm = [self._round(runs, rotated(names, index), cold=cold) for index in range(WARM_UP_ROUNDS)]
        total = sum(statistics.median(one.device_ms[name] for one in warm) for name in names)
        limit = max(HEAD_START_SECONDS, LATE_RATIO * statistics.median(one.host_seconds for one in warm))
        measured = [
            in_time(lambda index=index: self._round(runs, rotated(names, index), cold=cold), limit)
            for index in range(rounds_for(total))
        ]
        return {
            name: (
                [one.device_ms[name] for one in measured],
                1e6 * statistics.median(one.call_seconds[name] for one in measured),
            )
            for name in names
        }

    def _round(self, runs: Mapping[str, Run], order: Sequence[str], *, cold: bool) -> Round:
        events, hosts = {}, {}
        torch.cuda._sleep(HEAD_START)
        first = time.perf_counter()
        for name in order:
            if cold:
                self._flushed.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            began = time.perf_counter()
            runs[name]()
            hosts[name] = time.perf_counter() - began
            end.record()
            events[name] = (start, end)
        enqueued = time.perf_counter() - first
        torch.cuda.synchronize()
        return Round({name: start.elapsed_time(end) for name, (start, end) in events.items()}, hosts, enqueued)

    def gemm_tflops(self, dtype: torch.dtype) -> float:
        """What an 8192 x 8192 x 8192 product reaches here and now; also brings the GPU's clocks up."""
        n = 8192
        left, right = (torch.randn((n, n), dtype=dtype, device=self.device) for _ in range(2))
        out = torch.empty_like(left)
        times, _ = self.interleaved({"gemm": lambda: torch.mm(left, right, out=out)}, cold=False)["gemm"]
        return 2.0 * n**3 / statistics.median(times) / 1e9

    def fill_ms(self, num_bytes: int) -> float:
        """Time to write so many bytes."""
        target = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        times, _ = self.interleaved({"fill": target.zero_}, cold=True)["fill"]
        return statistics.median(times)


def captured(run: Run) -> tuple[Run, Any]:
    """A replay of GRAPH_CALLS calls in one CUDA graph, and what the last of them writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            output = run()
    return graph.replay, output


class Worker:
    """One GPU process.

    Args:
        parts: folder of the plan, the steps and the rows.
        backends: what can run.
        clock: what times it.
    """

    def __init__(self, parts: Path, backends: Backends, clock: Clock) -> None:
        self._parts, self._backends, self._clock = parts, backends, clock
        self._gpu, self._clocks = gpu_name(), clocks()
        self._gemm: dict[torch.dtype, float] = {}

    def _note(self, case: Case | None, step: str, backends: Sequence[str] = ()) -> None:
        text = json.dumps({"case": case.name if case else None, "step": step, "backends": list(backends)})
        (self._parts / PROGRESS).write_text(text, encoding="utf-8")

    def _finish(self, case: Case, backend: str, row: Row) -> None:
        facts = common_facts(case.name, backend) | {
            "clocks": self._clocks,
            "l2": "warm" if case.in_graph else "cold",
            "versions": self._backends.versions(backend),
        }
        write_part(self._parts, case.name, backend, facts | row)
        shown = f"{row['median_ms']:.4f} ms, {row['tflops']:.0f} TFLOP/s" if "median_ms" in row else ""
        print(f"{case.name} {backend}: {row['status']} {shown}".rstrip(), flush=True)

    def run(self, case: Case, backends: Sequence[str]) -> None:
        """Check and time one case, and write its rows.

        Raises:
            RuntimeError: the GPU's context is lost; the step that did it is noted.
        """
        self._note(case, backends[0])
        inputs = draw(case, self._clock.device)
        samples: dict[str, Sample] = {}
        entries: list[Entry] = []
        right: dict[str, tuple[str, Tensor]] = {}
        # Ours last: where rows beyond the sample differ from others', ours is what has to be looked at.
        for backend in sorted(backends, key=lambda name: name.startswith(OURS)):
            self._note(case, backend)
            function = SOFTMAX_FUNCTION if backend in SOFTMAX else HSTU
            if function not in samples:
                samples[function] = make_sample(inputs, function)
            found, refused = self._checked(backend, inputs, samples[function], right, function)
            entries += found
            if not found:
                self._finish(case, backend, refused)
        self._note(case, TIMING, [entry.backend for entry in entries])
        if entries:
            self._time(case, entries)

    def _checked(
        self, backend: str, inputs: Inputs, sample: Sample, right: dict[str, tuple[str, Tensor]], function: str
    ) -> tuple[list[Entry], Row]:
        """Forms of a backend that are right; without one, the row that says why."""
        refused: Row = {"status": "not offered"}
        entries = []

        def check(output: Tensor) -> tuple[float, float, str]:
            return judge(output, sample, right.get(function))

        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            forms = self._backends.forms(backend, inputs)
        except NotOfferedError as error:
            return [], {"status": f"not offered: {error}"}
        except Exception as error:
            return [], self._failure(error)
        for form in forms:
            try:
                with torch.inference_mode():
                    output = form.rows(form.run())
                    torch.cuda.synchronize()
                    peak = (torch.cuda.max_memory_allocated() - held) / _MIB
                    worst, bound, wrong = check(output)
            except NotOfferedError as reason:
                if len(forms) == 1:
                    refused = {"status": f"not offered: {reason}"}
                continue
            except Exception as failure:
                refused = self._failure(failure)
                continue
            row: Row = {"max_err": worst, "err_bound": bound, "form": form.name}
            if wrong:
                refused = row | {"status": f"wrong result: {wrong}"}
                continue
            if function not in right:
                # A copy: the form may write into this tensor again.
                right[function] = (backend, output.clone())
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            entries.append(Entry(backend, form, row | {"status": "ok", "peak_mib": peak}, check))
        return entries, refused

    def _failure(self, error: Exception) -> Row:
        """A row for an exception, unless the GPU is lost with it: then the exception goes on."""
        status = status_of(error)
        # Where the context is lost, this raises: the worker ends, its step is noted.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return {"status": status}

    def _time(self, case: Case, entries: Sequence[Entry]) -> None:
        named = {f"{index}": entry for index, entry in enumerate(entries)}
        with torch.inference_mode():
            runs: dict[str, Run] = {name: entry.form.run for name, entry in named.items()}
            hosts: dict[str, float] = {}
            if case.in_graph:
                hosts = {name: host for name, (_, host) in self._clock.interleaved(runs, cold=False).items()}
                runs = self._captured(case, named)
            dtype = DTYPES[case.dtype][1]
            if dtype not in self._gemm:
                self._gemm[dtype] = self._clock.gemm_tflops(dtype)
            times: dict[str, tuple[list[float], float]] = {}
            for group in rounds_of({name: named[name].backend for name in runs}):
                times |= self._clock.interleaved({name: runs[name] for name in group}, cold=not case.in_graph)
        best: dict[str, Row] = {}
        for name, (samples, host_us) in times.items():
            entry = named[name]
            timing = timing_of([each / (GRAPH_CALLS if case.in_graph else 1) for each in samples])
            row = entry.row | timing | rates_of(case, timing["median_ms"], self._gpu)
            row |= {"host_us": hosts.get(name, host_us), "gemm_tflops": self._gemm[dtype]}
            if entry.backend not in best or row["median_ms"] < best[entry.backend]["median_ms"]:
                best[entry.backend] = row
        for backend, row in best.items():
            if backend == DENSE_RAB:
                num_bytes = len(case.lengths) * case.max_len**2 * ELEMENT_BYTES
                row["fill_ms"] = self._clock.fill_ms(num_bytes)
            self._finish(case, backend, row)

    def _captured(self, case: Case, named: Mapping[str, Entry]) -> dict[str, Run]:
        """Replays by name; what cannot be captured gets its row here."""
        runs: dict[str, Run] = {}
        for name, entry in named.items():
            self._note(case, entry.backend)
            try:
                replay, output = captured(entry.form.run)
                output.fill_(torch.nan)
                replay()
                torch.cuda.synchronize()
                worst, _, wrong = entry.check(entry.form.rows(output))
            except Exception as error:
                self._finish(case, entry.backend, entry.row | self._failure(error))
                continue
            if wrong:
                self._finish(case, entry.backend, entry.row | {"status": f"wrong result in a graph: {wrong}"})
            else:
                entry.row["max_err"] = worst
                runs[name] = replay
        self._note(case, TIMING, [named[name].backend for name in runs])
        return runs


def work(parts: Path, libraries: dict[str, Path], meta_repo: Path | None) -> int:
    """Measure what the plan in `parts` asks for; returns the exit status."""
    if not torch.cuda.is_available():
        print("error: torch finds no GPU", file=sys.stderr)
        return 1
    plan = json.loads((parts / PLAN).read_text(encoding="utf-8"))
    cases = {case.name: case for case in all_cases()}
    worker = Worker(parts, Backends(libraries, meta_repo), Clock(torch.device("cuda")))
    for name, backends in plan.items():
        worker.run(cases[name], backends)
        gc.collect()
        torch.cuda.empty_cache()
    return 0


def compile_slice(cases: Sequence[Case], meta_repo: Path, index: int, slices: int) -> None:
    """Run Meta's Triton kernels with every `slices`-th candidate: compiles those into Triton's cache."""
    from m_falcon_meta import thin_autotuners

    meta_triton_module(meta_repo)
    thin_autotuners(index, slices)
    backends = Backends({}, meta_repo)
    device = torch.device("cuda")
    for case in cases:
        inputs = draw(case, device)
        for name in META_TRITON:
            if why_not(name, case) is None:
                with torch.inference_mode():
                    backends.forms(name, inputs)[0].run()
    torch.cuda.synchronize()
