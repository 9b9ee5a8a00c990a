"""What must hold for bundles in a real tritonserver: answers, batches, refusals, load, and how it ends."""

from __future__ import annotations

import collections
import dataclasses
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from checks import Checks
from triton_asking import Answered, Asking, Job
from triton_client import Body, Client, Refusal, body_of, statistics
from triton_questions import AskedModel

from tests.triton.memory import MemoryWatch
from tests.triton.processes import is_alive, stub_processes
from tests.triton.server import DRAIN_SECONDS, TritonServer

#: Of the questions and of the malformed requests; the load has its own.
CLIENTS = 8
#: Largest growth of a process, and of the GPU's memory, over a load: graphs of shapes that recur are still recorded.
MOST_GROWTH_MIB, MOST_GPU_GROWTH_MIB = 48.0, 128.0
STUB_SECONDS = 20.0
_EXAMPLES = 5
_BAD_REQUEST = 400
_SOON = 2**31


def jobs_of(models: Sequence[AskedModel], keyed: bool = True) -> list[Job]:
    """Every question, and every one that can be again with a user key."""
    found = []
    for model in models:
        for question in model.questions:
            found.append(Job(model.name, body_of(question.sample), question))
            if keyed and question.cacheable:
                found.append(Job(model.name, body_of(question.keyed()), question, keyed=True))
    return found


@dataclasses.dataclass
class Verdict:
    """What the answers to questions were.

    Attributes:
        answered: with outputs.
        lost: refused, or without an answer.
        wrong: with outputs that are none of the question's.
        with_float64: answers that were held to the bundle's float64 values.
        changed: not those of Python's session that is asked one by one, to the bit.
        worst: largest error over its bound, of the answers that are held to float64.
        outcomes: what the models said of their caches.
        examples: of what is not right.
    """

    answered: int = 0
    lost: int = 0
    wrong: int = 0
    with_float64: int = 0
    changed: int = 0
    worst: float = 0.0
    outcomes: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: list[str] = dataclasses.field(default_factory=list)


def verdict_of(answers: Sequence[Answered]) -> Verdict:
    """Hold every answer to its question."""
    verdict, outcomes = Verdict(), collections.Counter[str]()
    for each in answers:
        question, answer, keyed = each.job.question, each.answer, each.job.keyed
        assert question is not None
        problem: str | None
        if isinstance(answer, (Refusal, Exception)):
            verdict.lost += 1
            problem = f"{answer!r}"
        else:
            verdict.answered += 1
            problem = question.fault(answer)
            if problem is None:
                if question.stored:
                    verdict.with_float64 += 1
                    verdict.worst = max(verdict.worst, question.error(answer))
                verdict.changed += bool(changed := question.changed_bits(answer, keyed))
                problem = question.wrong_cache(answer, keyed)
                if changed and len(verdict.examples) < _EXAMPLES:
                    verdict.examples.append(f"{question.model}, {question.label}: other bits in {', '.join(changed)}")
                if "cache" in answer:
                    outcomes[f"{question.model} {answer['cache'].item().decode()}"] += 1
            verdict.wrong += problem is not None
        if problem is not None and len(verdict.examples) < _EXAMPLES:
            verdict.examples.append(f"{question.model}, {question.label}{', keyed' * keyed}: {problem}"[:500])
    verdict.outcomes = dict(sorted(outcomes.items()))
    return verdict


def right(verdict: Verdict, jobs: int, same_bits: bool) -> bool:
    """All answered, nothing wrong, something held to float64, and where it is asked for not a bit changed."""
    complete = verdict.answered == jobs > 0 and not verdict.lost and not verdict.wrong
    return complete and verdict.with_float64 > 0 and (verdict.changed == 0 or not same_bits)


def counted(port: int, models: Sequence[AskedModel]) -> dict[str, dict[str, int]]:
    """The server's counts by model."""
    with Client(port) as client:
        return {model.name: statistics(client, model.name) for model in models}


def since(
    port: int, models: Sequence[AskedModel], before: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, int]]:
    """What the server counted since."""
    return {
        model: {name: count - before[model][name] for name, count in counts.items()}
        for model, counts in counted(port, models).items()
    }


def check_one_by_one(checks: Checks, server: TritonServer, model: AskedModel, seconds: float) -> None:
    """Every question alone in its pass: the same engine, the same batch, the same bits as Python's session."""
    with checks.check(f"{model.name}: one request after the other, to the bit as Python's session") as check:
        jobs = jobs_of([model])
        # Twice with the key: the first is computed, the second answered from the cache.
        jobs = [each for job in jobs for each in ([job, job] if job.keyed else [job])]
        before = counted(server.http_port, [model])
        answers = Asking(server.http_port, jobs, 1, seconds).join()
        verdict = verdict_of(answers)
        counts = since(server.http_port, [model], before)[model.name]
        check.facts |= {"requests": len(jobs), "verdict": verdict, "server": counts}
        alone = counts["requests"] == counts["passes"] == len(jobs)
        check.passed = right(verdict, len(jobs), same_bits=True) and alone
        if model.has_cache:
            hits, misses = (verdict.outcomes.get(f"{model.name} {said}", 0) for said in ("hit", "miss"))
            check.passed = check.passed and hits == misses > 0


def check_together(checks: Checks, server: TritonServer, models: Sequence[AskedModel], seconds: float) -> None:
    """All questions of all models from several threads; the server merges what waits."""
    for model in models:
        with checks.check(f"{model.name}: concurrent requests of mixed lengths, merged into batches") as check:
            jobs = jobs_of([model]) * 2
            before = counted(server.http_port, [model])
            verdict = verdict_of(Asking(server.http_port, jobs, CLIENTS, seconds).join())
            counts = since(server.http_port, [model], before)[model.name]
            same = model.alone_is_beside_others
            check.facts |= {"requests": len(jobs), "clients": CLIENTS, "verdict": verdict, "server": counts}
            check.facts["held_to_the_bit"] = same
            # A GPU answers before most other clients have asked again, so not every pass has company.
            merged = 0 < 4 * counts["passes"] <= 3 * counts["requests"] == 3 * len(jobs)
            check.passed = right(verdict, len(jobs), same) and merged


def check_refusals(checks: Checks, server: TritonServer, model: AskedModel, seconds: float) -> None:
    """Each malformed request gets its own 4xx, ours with our message; good ones beside it do not notice."""
    with checks.check(f"{model.name}: malformed requests are refused alone") as check:
        faults = faults_of(model)
        good = jobs_of([model], keyed=False)
        before = counted(server.http_port, [model])
        wrong = [Job(model.name, body) for body, _ in faults.values()]
        # By turns: every thread sends good and wrong ones.
        jobs = [job for index, bad in enumerate(wrong * 2) for job in (bad, good[index % len(good)])]
        answers = Asking(server.http_port, jobs, CLIENTS - 1, seconds).join()
        verdict = verdict_of([each for each in answers if each.job.question is not None])
        said: dict[str, str] = {}
        missed = []
        expected = {id(body): (name, message) for name, (body, message) in faults.items()}
        for each in answers:
            if each.job.question is None:
                name, message = expected[id(each.job.body)]
                answer = each.answer
                refused = isinstance(answer, Refusal) and answer.status == _BAD_REQUEST and message in answer.message
                said[name] = f"{answer.status} {answer.message}"[:300] if isinstance(answer, Refusal) else repr(answer)
                if not refused:
                    missed.append(f"{name}: {said[name]}; expected {_BAD_REQUEST} with {message!r}")
        with Client(server.http_port) as client:
            client.get("/health/ready")
            after = verdict_of([Answered(good[0], client.ask(model.name, good[0].body), 0.0)])
        counts = since(server.http_port, [model], before)[model.name]
        check.facts |= {"refusals": said, "verdict": verdict, "after": after, "missed": missed, "server": counts}
        complete = len(answers) == len(jobs) and len(said) == len(faults)
        good_ones = verdict.answered == len(wrong) * 2 and not (verdict.lost or verdict.wrong)
        check.passed = complete and not missed and good_ones and after.answered == 1 and not after.wrong


def faults_of(model: AskedModel) -> dict[str, tuple[Body, str]]:
    """Requests that are wrong, and what the answer must say; what the server itself refuses has its words."""
    files, longest = model.files, model.longest
    ranking = files.ranking

    def changed(**changes: Callable[[Any], Any]) -> Body:
        return body_of({**longest, **{name: change(longest[name]) for name, change in changes.items()}})

    def longer(array: Any) -> Any:
        return np.repeat(array, 2)

    if ranking is None:
        events = [tensor.name for tensor in files.inputs if tensor.shape == ("L",)]
        ids, times, asked = "item_ids", "timestamps", "request_timestamps"
        wrong = {"asked before the last event": (changed(**{asked: lambda time: time - 10**8}), "HSTU-E705")}
        later = changed(**{times: lambda time: time + _SOON, asked: lambda time: time + _SOON})
    else:
        events = list(ranking.history_names)
        ids, times, asked = ranking.history_ids[0].name, ranking.history_time, ranking.candidate_time
        candidate = ranking.candidate_ids[0].name
        wrong = {
            "candidate outside its table": (changed(**{candidate: lambda values: values + 10**6}), "HSTU-E703"),
            "fewer times than candidates": (changed(**{asked: lambda time: time[1:]}), "HSTU-E701"),
            "asked before the last event": (changed(**{asked: lambda time: time - 10**8}), "HSTU-E705"),
        }
        later = changed(**{times: lambda time: time + _SOON, asked: lambda time: time + _SOON})
    wrong |= {
        "id outside its table": (changed(**{ids: lambda values: values + 10**6}), "HSTU-E703"),
        "negative id": (changed(**{ids: lambda values: -1 - values}), "HSTU-E703"),
        "unequal lengths": (changed(**{ids: lambda values: values[1:]}), "HSTU-E701"),
        "times that go back": (changed(**{times: lambda time: time[::-1]}), "HSTU-E705"),
        "history too long": (changed(**dict.fromkeys(events, longer)), "HSTU-E704"),
        "two users": (body_of(longest, users=2), "HSTU-E701"),
        "wrong type": (changed(**{ids: lambda values: values.astype(np.int64)}), "data-type is 'INT64'"),
        "input missing": (
            body_of({each: longest[each] for each in longest if each != times}),
            "missing required input",
        ),
    }
    if not model.holds_int64:
        wrong["a time that the engine cannot hold"] = (later, "HSTU-E701")
    return wrong


def check_load(
    checks: Checks, server: TritonServer, models: Sequence[AskedModel], requests: int, clients: int, seconds: float
) -> None:
    """Every answer right, none lost, memory flat; latencies as the clients see them."""
    with checks.check(f"load: {requests} requests from {clients} clients") as check:
        pool, rng = jobs_of(models), np.random.default_rng(1)
        by_model = [[job for job in pool if job.model == model.name] for model in models]
        chosen = [by_model[index % len(models)] for index in range(requests)]
        jobs = [of_model[int(rng.integers(len(of_model)))] for of_model in chosen]
        before, gpu_before = counted(server.http_port, models), gpu_mib()
        started = time.perf_counter()
        asking = Asking(server.http_port, jobs, clients, seconds)
        with MemoryWatch(server.pid, lambda: asking.done, interval=0.05) as watch:
            answers = asking.join()
        took, gpu_after = time.perf_counter() - started, gpu_mib()
        counts = since(server.http_port, models, before)
        # Compared when the load is over, so that the clients' clocks measure the server.
        verdict = verdict_of(answers)
        memory = watch.found(requests)
        check.facts |= {"requests": requests, "clients": clients, "verdict": verdict, "server": counts}
        check.facts |= {"latency_ms": latencies(answers), "seconds_run": round(took, 2)}
        check.facts |= {"requests_per_second": round(len(answers) / took, 1)}
        check.facts |= {"memory_mib": memory, "gpu_mib": {"before": gpu_before, "after": gpu_after}}
        growths = {process: each.end_mib - each.warm_mib for process, each in memory.items()}
        merged = all(0 < each["passes"] < each["requests"] == each["successes"] for each in counts.values())
        flat = all(growth <= MOST_GROWTH_MIB for growth in growths.values())
        if gpu_before is not None and gpu_after is not None:
            flat = flat and gpu_after - gpu_before <= MOST_GPU_GROWTH_MIB
        same = all(model.alone_is_beside_others for model in models)
        check.facts["held_to_the_bit"] = same
        check.passed = right(verdict, requests, same) and merged and flat


def latencies(answers: Sequence[Answered]) -> dict[str, dict[str, float]]:
    """p50, p90 and p99 in milliseconds, by model and whether the requests had a key."""
    seen: dict[str, list[float]] = collections.defaultdict(list)
    for each in answers:
        seen[f"{each.job.model}{', keyed' * each.job.keyed}"].append(each.seconds * 1e3)
    return {
        name: {f"p{share}": round(float(np.percentile(values, share)), 3) for share in (50, 90, 99)}
        for name, values in sorted(seen.items())
    }


def gpu_mib() -> float | None:
    """Memory that is used on the first GPU; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return float(done.stdout.split()[0])


def check_stop(checks: Checks, server: TritonServer, models: Sequence[AskedModel]) -> None:
    """SIGTERM under load: what was sent is answered, the server ends with 0, and leaves nothing."""
    with checks.check(f"SIGTERM under load of {CLIENTS} clients: a clean drain") as check:
        stubs = stub_processes(server.pid)
        pool = jobs_of(models)
        jobs = [pool[index] for index in np.random.default_rng(2).integers(len(pool), size=100_000)]
        asking = Asking(server.http_port, jobs, CLIENTS, DRAIN_SECONDS + 20)
        deadline = time.monotonic() + 20
        while asking.done < 10 * CLIENTS and time.monotonic() < deadline:
            time.sleep(0.01)
        told = time.monotonic()
        server.send_signal(signal.SIGTERM)
        # As behind a load balancer: each finishes its request and closes its connection.
        asking.stop()
        code = server.wait(DRAIN_SECONDS + 10)
        took = time.monotonic() - told
        verdict = verdict_of(answers := asking.join())
        _wait_for_end(stubs)
        left = sorted(name for name, pid in stubs.items() if is_alive(pid))
        regions = [path.name for path in server.shared_memory]
        check.facts |= {
            "exit_code": code,
            "seconds_to_end": round(took, 2),
            "verdict": verdict,
            "models": sorted(stubs),
        }
        check.facts |= {"processes_left": left, "shared_memory_left": regions}
        clean = code == 0 and took < DRAIN_SECONDS and not left and not regions
        served = len(answers) >= 10 * CLIENTS and right(verdict, len(answers), same_bits=False)
        check.passed = clean and served and sorted(stubs) == sorted(model.name for model in models)


def _wait_for_end(stubs: Mapping[str, int]) -> None:
    deadline = time.monotonic() + STUB_SECONDS
    while any(map(is_alive, stubs.values())) and time.monotonic() < deadline:
        time.sleep(0.1)
