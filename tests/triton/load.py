"""Load on a real server: clients of both protocols, every answer checked, the memory of every process watched."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.triton.clients import PROTOCOLS, Prepared, Protocol, prepared, send
from tests.triton.memory import Memory, MemoryWatch
from tests.triton.server import TritonServer, grpc_client, http_client
from tests.triton.workload import Question

_SHARE_KEYED = 0.6
_MOST_EXAMPLES = 5


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """What is asked.

    Attributes:
        requests: in all.
        clients: that ask at the same time; every second one by gRPC.
        seed: of who asks what.
    """

    requests: int
    clients: int = 16
    seed: int = 0


@dataclasses.dataclass
class LoadReport:
    """What was found.

    Attributes:
        requests: that were sent.
        answered: with outputs.
        lost: without an answer, or with an error.
        wrong: with outputs that are not the eager model's.
        examples: what the first lost and wrong ones were.
        outcomes: answers by model and what its cache said.
        latency_ms: p50, p90 and p99 by protocol and model, as the client sees them.
        statistics: the server's counts of the load by model: requests, passes, successes, failures.
        sent: requests by model, as the clients count them.
        memory: by process.
        seconds: in all.
        requests_per_second: answered.
    """

    requests: int = 0
    answered: int = 0
    lost: int = 0
    wrong: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)
    outcomes: dict[str, int] = dataclasses.field(default_factory=dict)
    latency_ms: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    statistics: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    sent: dict[str, int] = dataclasses.field(default_factory=dict)
    memory: dict[str, Memory] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    requests_per_second: float = 0.0

    def failures(self, plan: LoadPlan, most_growth_mib: float, most_slope_bytes: float) -> list[str]:
        """What must not have happened."""
        found = [f"{self.lost} lost, {self.wrong} wrong: {self.examples}"] if self.lost or self.wrong else []
        if not self.requests == self.answered == plan.requests:
            found.append(f"{self.requests} of {plan.requests} requests were sent and {self.answered} answered")
        for model, counts in self.statistics.items():
            if not counts["requests"] == counts["successes"] == self.sent[model] or counts["failures"]:
                found.append(f"{model}: {self.sent[model]} requests were sent, and the server counts {counts}")
            if not 0 < counts["passes"] < counts["requests"]:
                found.append(f"{model}: nothing was merged: {counts}")
        for process, memory in self.memory.items():
            growth = memory.end_mib - memory.warm_mib
            if not (growth <= most_growth_mib and memory.slope_bytes <= most_slope_bytes):
                found.append(f"{process}: memory grew by {growth:.1f} MiB, {memory.slope_bytes:.0f} bytes per request")
        return found


class _Tally:
    """What the clients find, under one lock."""

    def __init__(self) -> None:
        self.report, self.lock = LoadReport(), threading.Lock()
        self.latencies: dict[str, list[float]] = collections.defaultdict(list)
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.sent: collections.Counter[str] = collections.Counter()

    def add(self, question: Question, protocol: Protocol, seconds: float, answer: dict[str, Any] | Exception) -> None:
        fault = f"{type(answer).__name__}: {answer}" if isinstance(answer, Exception) else question.fault(answer)
        with self.lock:
            report = self.report
            report.requests += 1
            self.sent[question.model] += 1
            if isinstance(answer, Exception):
                report.lost += 1
            else:
                report.answered += 1
                report.wrong += fault is not None
                self.latencies[f"{protocol} {question.model}"].append(seconds * 1e3)
                self.outcomes[f"{question.model} {answer['cache'].item().decode()}"] += 1
            if fault is not None and len(report.examples) < _MOST_EXAMPLES:
                report.examples.append(f"{question.model} over {protocol}: {fault}")


def statistics_of(server: TritonServer, model: str) -> dict[str, int]:
    """The server's own counts since the model was loaded."""
    with http_client(server) as client:
        (stats,) = client.get_inference_statistics(model)["model_stats"]
    counted = stats["inference_stats"]
    return {
        "requests": int(stats["inference_count"]),
        "passes": int(stats["execution_count"]),
        "successes": int(counted["success"]["count"]),
        "failures": int(counted["fail"]["count"]),
    }


def run_load(
    server: TritonServer,
    pool: Sequence[Question],
    plan: LoadPlan,
    progress: Callable[[int], None] = lambda done: None,
) -> LoadReport:
    """Send the plan's requests and check every answer.

    Args:
        server: with the models of the pool.
        pool: what is asked; each client draws from it, and sends a part of the requests with the user's key.
        plan: how much.
        progress: called now and then with the number of finished requests.
    """
    models = sorted({each.model for each in pool})
    before = {model: statistics_of(server, model) for model in models}
    ready: dict[Protocol, list[tuple[Prepared, Prepared]]] = {
        protocol: [(prepared(protocol, each.sample), prepared(protocol, each.keyed())) for each in pool]
        for protocol in PROTOCOLS
    }
    tally, together = _Tally(), threading.Barrier(plan.clients, timeout=60)

    def one_client(number: int) -> None:
        protocol = PROTOCOLS[number % len(PROTOCOLS)]
        rng = np.random.default_rng([plan.seed, number])
        with (http_client if protocol == "http" else grpc_client)(server) as client:
            client.is_server_live()
            together.wait()
            for _ in range(number, plan.requests, plan.clients):
                index, keyed = int(rng.integers(len(pool))), bool(rng.random() < _SHARE_KEYED)
                started = time.perf_counter()
                answer: dict[str, Any] | Exception
                try:
                    answer = send(client, protocol, pool[index].model, ready[protocol][index][keyed])
                except Exception as error:  # whatever it is, this request has no answer
                    answer = error
                tally.add(pool[index], protocol, time.perf_counter() - started, answer)

    def done() -> int:
        return tally.report.requests

    threads = [threading.Thread(target=one_client, args=(number,)) for number in range(plan.clients)]
    started = time.perf_counter()
    with MemoryWatch(server.pid, done) as watch:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(timeout=10)
                progress(done())
        seconds = time.perf_counter() - started
    report = tally.report
    report.memory = watch.found(plan.requests)
    for model in models:
        after = statistics_of(server, model)
        report.statistics[model] = {name: after[name] - before[model][name] for name in after}
    report.sent, report.outcomes = dict(tally.sent), dict(sorted(tally.outcomes.items()))
    for name, values in sorted(tally.latencies.items()):
        report.latency_ms[name] = {f"p{share}": round(float(np.percentile(values, share)), 2) for share in (50, 90, 99)}
    report.seconds, report.requests_per_second = round(seconds, 1), round(report.answered / seconds, 1)
    return report
