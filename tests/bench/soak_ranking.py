"""Soak a ranking bundle: many threads, more users than the cache holds, every answer compared with the uncached one.

Each call scores one to four users' requests with the cache and then with `packed`, without it. Users are drawn with a
skew, so that some are hot; their histories grow eight times during the run, a tenth of the requests are still the older
ones, and some users are invalidated while others are being scored. Query times lie between a history's last event and
its next one, so a history asked again at the same time may hit.

Run: python tests/bench/soak_ranking.py BUNDLE [--runtime tensorrt] [--requests 20000] [--users 2000] [--threads 8]
         [--kv-budget-mib 64] [--tolerance 1e-4] [--output soak.json]

Writes a JSON report and exits with 1 if an answer differs by more than the tolerance, the budget was exceeded, or
memory grew by more than --max-growth-mib after the first tenth of the calls.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

if str(Path(__file__).resolve().parents[2]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hstu_compile.runtime.ranking import RankingSession
from hstu_compile.runtime.ranking_request import RankingRequest, RankingResult
from hstu_compile.runtime.ranking_spec import RankingSpec
from tests.ranking_requests import NOW, candidates_of, context_of, history_of

EPOCHS = 8
_MOST_IN_A_CALL = 4
_SHARE_OUTDATED = 0.1
_SHARE_INVALIDATED = 0.05
_SHARE_OTHER_COUNT = 0.2


@dataclasses.dataclass(frozen=True)
class SoakPlan:
    """What is asked.

    Attributes:
        requests: in all.
        users: that they are drawn from.
        threads: that ask at the same time.
        tolerance: largest difference of a logit or prediction from the uncached one, relative to the root mean square
            of all logits.
        seed: of everything drawn.
    """

    requests: int
    users: int
    threads: int
    tolerance: float
    seed: int = 0


@dataclasses.dataclass
class SoakReport:
    """What was found; `worst` and `rms` are absolute.

    Attributes:
        requests: answered twice.
        candidates: of these.
        users_seen: different users among them.
        hit_rate: of the requests with candidates.
        outcomes: requests by what the cache said.
        worst_logit: largest difference of a logit from the uncached one.
        worst_pred: largest difference of a prediction.
        rms_logit: root mean square of the uncached logits.
        budget_bytes: of the cache.
        budget_peak_bytes: most that was used, seen after every call.
        entries_peak: most entries, likewise.
        staging_bytes: beside the budget.
        evictions: of the cache.
        rss_warm_mib: resident memory after a tenth of the calls.
        rss_end_mib: resident memory at the end.
        seconds: in all.
    """

    requests: int = 0
    candidates: int = 0
    users_seen: int = 0
    hit_rate: float = 0.0
    outcomes: dict[str, int] = dataclasses.field(default_factory=dict)
    worst_logit: float = 0.0
    worst_pred: float = 0.0
    rms_logit: float = 0.0
    budget_bytes: int = 0
    budget_peak_bytes: int = 0
    entries_peak: int = 0
    staging_bytes: int = 0
    evictions: int = 0
    rss_warm_mib: float = 0.0
    rss_end_mib: float = 0.0
    seconds: float = 0.0

    def failures(self, plan: SoakPlan, max_growth_mib: float) -> list[str]:
        """What must not have happened."""
        bound = plan.tolerance * self.rms_logit
        found = []
        if self.requests != plan.requests:
            found.append(f"{self.requests} of {plan.requests} requests were answered")
        if not self.rms_logit > 0:
            found.append("all logits are zero, which proves nothing")
        # Not max(), which may lose a NaN; and written so that a NaN fails.
        worst = float(np.maximum(self.worst_logit, self.worst_pred))
        if not worst <= bound:
            found.append(f"answers differ by {worst:.3g}; at most {bound:.3g} may be")
        if self.budget_peak_bytes > self.budget_bytes:
            found.append(f"the cache used {self.budget_peak_bytes} of {self.budget_bytes} bytes")
        if not self.outcomes.get("hit") or not self.evictions:
            found.append("no hit or no eviction: the soak did not exercise the cache")
        if self.rss_end_mib - self.rss_warm_mib > max_growth_mib:
            found.append(f"resident memory grew from {self.rss_warm_mib:.1f} to {self.rss_end_mib:.1f} MiB")
        return found


def rss_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _request(spec: RankingSpec, plan: SoakPlan, serial: int, rng: np.random.Generator) -> RankingRequest:
    """One request; a user's history at one epoch is the same whenever it is drawn, and grows with the epochs."""
    user = int(plan.users * rng.random() ** 3)
    epoch = serial * EPOCHS // plan.requests
    if epoch and rng.random() < _SHARE_OUTDATED:
        epoch -= 1
    person = np.random.default_rng([plan.seed, 1, user])
    most = spec.max_history_len
    # A tenth of the users are new; the others have between one event and as many as fit.
    final = 0 if person.random() < 0.1 else int(person.integers(1, most + 1))
    history, context = history_of(spec, most, person), context_of(spec, person)
    events = final * (epoch + 1) // EPOCHS
    # Mostly as many as the last time: with a divisor that counts them, another number is another history.
    count = int(person.integers(0, spec.max_candidates + 1))
    if rng.random() < _SHARE_OTHER_COUNT:
        count = int(rng.integers(0, spec.max_candidates + 1))
    candidates = candidates_of(spec, count, rng)
    if candidates[spec.candidate_time].size:
        # The anchor: what the cached history depends on.
        candidates[spec.candidate_time][-1] = NOW + epoch
    return RankingRequest(user, {name: values[:events] for name, values in history.items()}, candidates, context)


def _calls(plan: SoakPlan) -> Iterator[range]:
    """Serial numbers of the requests of each call."""
    rng, start = np.random.default_rng([plan.seed, 2]), 0
    while start < plan.requests:
        stop = min(plan.requests, start + int(rng.integers(1, _MOST_IN_A_CALL + 1)))
        yield range(start, stop)
        start = stop


class _Tally:
    """What the threads find, under one lock."""

    def __init__(self) -> None:
        self.report, self.users, self.lock = SoakReport(), set[int | str](), threading.Lock()
        self.squares, self.values = 0.0, 0

    def add(self, requests: list[RankingRequest], cached: list[RankingResult], uncached: list[RankingResult]) -> None:
        report = self.report
        with self.lock:
            for request, actual, exact in zip(requests, cached, uncached, strict=True):
                report.requests += 1
                report.candidates += len(exact.logits)
                self.users.add(request.user)
                report.outcomes[actual.cache] = report.outcomes.get(actual.cache, 0) + 1
                if not exact.logits.size:
                    continue
                logits = np.abs(actual.logits.astype(np.float64) - exact.logits).max()
                preds = np.abs(actual.preds.astype(np.float64) - exact.preds).max()
                report.worst_logit = float(np.maximum(report.worst_logit, logits))
                report.worst_pred = float(np.maximum(report.worst_pred, preds))
                self.squares += float((exact.logits.astype(np.float64) ** 2).sum())
                self.values += exact.logits.size

    def look(self, session: RankingSession) -> None:
        cache = session.stats().cache
        with self.lock:
            self.report.budget_peak_bytes = max(self.report.budget_peak_bytes, cache.used_bytes)
            self.report.entries_peak = max(self.report.entries_peak, cache.entries)


def soak(session: RankingSession, plan: SoakPlan, progress: Callable[[int], None] = lambda done: None) -> SoakReport:
    """Run the plan; an exception in any thread ends it.

    Args:
        session: with the cache under test; `packed` of the same session is what answers are compared with.
        plan: what is asked.
        progress: called now and then with the number of finished calls.
    """
    tally, calls, started = _Tally(), list(_calls(plan)), time.perf_counter()

    def call(serials: range) -> None:
        rng = np.random.default_rng([plan.seed, 3, serials.start])
        requests = [_request(session.spec, plan, serial, rng) for serial in serials]
        if rng.random() < _SHARE_INVALIDATED:
            session.invalidate(requests[0].user)
        cached = session.score(requests)
        tally.look(session)
        tally.add(requests, cached, session.score_packed(requests))

    with concurrent.futures.ThreadPoolExecutor(plan.threads) as pool:
        for done, _ in enumerate(pool.map(call, calls), start=1):
            if done == max(1, len(calls) // 10):
                tally.report.rss_warm_mib = rss_mib()
            if done % 500 == 0:
                progress(done)
    report, stats = tally.report, session.stats()
    scored = sum(count for outcome, count in report.outcomes.items() if outcome != "off")
    report.users_seen = len(tally.users)
    report.hit_rate = report.outcomes.get("hit", 0) / max(1, scored)
    report.rms_logit = float(np.sqrt(tally.squares / max(1, tally.values)))
    report.budget_bytes, report.staging_bytes = stats.cache.capacity_bytes, stats.staging_bytes
    report.evictions = stats.cache.evictions
    report.rss_end_mib, report.seconds = rss_mib(), time.perf_counter() - started
    return report


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runtime", default="onnxruntime", choices=("onnxruntime", "tensorrt", "tensorrt-rtx"))
    parser.add_argument("--plugins", type=Path, default=None, help="plugin library that the engines need")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--users", type=int, default=2_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--kv-budget-mib", type=float, default=64)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="relative to the logits' root mean square")
    parser.add_argument("--max-growth-mib", type=float, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="default: standard output")
    return parser.parse_args()


def main() -> int:
    from hstu_compile.ranking_bundle import open_ranking_session

    options = _arguments()
    plan = SoakPlan(options.requests, options.users, options.threads, options.tolerance, options.seed)
    with open_ranking_session(
        options.bundle,
        options.runtime,
        kv_budget_bytes=int(options.kv_budget_mib * 2**20),
        plugin_library=options.plugins,
    ) as session:
        report = soak(session, plan, lambda done: print(f"{done} calls", file=sys.stderr))
        runtime, version = session.runtime, session.spec.model_version
    failures = report.failures(plan, options.max_growth_mib)
    result: dict[str, Any] = {
        "status": "FAIL" if failures else "PASS",
        "failures": failures,
        "plan": dataclasses.asdict(plan),
        "report": dataclasses.asdict(report),
        "runtime": runtime,
        "model_version": version,
        "python": platform.python_version(),
        "command": shlex.join(["python", *sys.argv]),
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text, encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
