"""Timelines of what runs on the GPU: every kernel of a pass, its time and share, and the gaps between them. Level 1.

torch.profiler records what runs on the GPU in this process, whoever enqueued it: also engines of TensorRT and the
kernels between them. torch is imported by what records, and by nothing else here. A pass is run a few times with a wait
in between; the L2 cache is warm. Profiling makes launches slower, so gaps of what is not in a CUDA graph are larger
than without it.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hstu_compile.errors import EngineError

#: What is no kernel: time in which none ran, and from the beginning of the first to the end of the last.
GAPS, SPAN = "(gaps)", "(span)"
ATTENTION, PRODUCT, COPY, OTHER = "attention", "product", "copy", "other"
KINDS = (ATTENTION, PRODUCT, COPY, OTHER, GAPS)
CALLS, WARM_UP_CALLS = 8, 5
#: Between calls lies a wait of this long, within one no kernel waits for half of it.
PAUSE_SECONDS = 0.02
_LARGEST_GAP_US = 1e6 * PAUSE_SECONDS / 2
_LONGEST_NAME = 160
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_KIND_OF = (
    (ATTENTION, re.compile(r"hstu(?!_norm)|attn|attention|fmha|flash", re.IGNORECASE)),
    (COPY, re.compile(r"memcpy|memset|copy|transpose|permut|reformat|slice|concat|_cat|CatArray", re.IGNORECASE)),
    (PRODUCT, re.compile(r"gemm|nvjet|cublas|cutlass|matmul|xmma|wgmma|_mm_|_addmm|_bmm|splitk", re.IGNORECASE)),
)

Event = Mapping[str, Any]


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    return next((kind for kind, pattern in _KIND_OF if pattern.search(kernel)), OTHER)


def device_events(trace: Mapping[str, Any]) -> list[Event]:
    """What ran on the GPU, of a Chrome trace, in the order in which it began; ts and dur in microseconds."""
    found = [event for event in trace["traceEvents"] if event.get("cat") in _DEVICE and event.get("ph") == "X"]
    return sorted(found, key=lambda event: float(event["ts"]))


def calls_of(events: Sequence[Event], largest_gap_us: float = _LARGEST_GAP_US) -> list[list[Event]]:
    """Split at long waits."""
    calls: list[list[Event]] = []
    end = float("-inf")
    for event in events:
        if float(event["ts"]) - end > largest_gap_us:
            calls.append([])
        calls[-1].append(event)
        end = max(end, float(event["ts"]) + float(event["dur"]))
    return calls


def busy_us(call: Sequence[Event]) -> float:
    """Time in which at least one kernel ran."""
    total, end = 0.0, float("-inf")
    for event in call:
        start, stop = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def timeline_rows(calls: Sequence[Sequence[Event]]) -> Iterator[dict[str, Any]]:
    """One row for each kernel, in the order of their first launch, then the gaps and the span.

    Times are medians over those calls that have the usual number of launches.

    Raises:
        ValueError: no call, or no kernel in it.
    """
    if not calls or not all(calls):
        raise ValueError("the trace has no kernels: nothing ran on the GPU, or the profiler could not see it")
    usual = statistics.mode(len(call) for call in calls)
    kept = [call for call in calls if len(call) == usual]
    spans = [max(float(e["ts"]) + float(e["dur"]) for e in call) - float(call[0]["ts"]) for call in kept]
    span = statistics.median(spans)
    names = list(dict.fromkeys(str(event["name"]) for event in kept[0]))
    for first, name in enumerate(names):
        times = [sum(float(e["dur"]) for e in call if e["name"] == name) for call in kept]
        launches = sum(event["name"] == name for event in kept[0])
        us = statistics.median(times)
        row = {"kernel": name[:_LONGEST_NAME], "kind": kind_of(name), "launches": launches, "us": us}
        yield row | {"share": us / span, "first": first}
    gaps = statistics.median(whole - busy_us(call) for whole, call in zip(spans, kept, strict=True))
    yield {"kernel": GAPS, "kind": GAPS, "launches": usual, "us": gaps, "share": gaps / span}
    yield {"kernel": SPAN, "kind": SPAN, "launches": usual, "us": span, "share": 1.0}


def us_by_kind(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Microseconds of each kind, of the gaps and of the span, in one timeline."""
    kinds = dict.fromkeys((*KINDS, SPAN), 0.0)
    for row in rows:
        kinds[row["kind"]] += float(row["us"])
    return kinds


def start_tracer() -> str:
    """Let torch begin to use the GPU, which its profiler follows from then on.

    Returns:
        torch's version.

    Raises:
        EngineError: HSTU-E406, if there is no torch that can.
    """
    try:
        import torch
    except ImportError as error:
        raise _no_tracer(f"torch cannot be imported: {error}") from error
    if torch.version.cuda is None:
        raise _no_tracer(f"torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        raise _no_tracer(f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and sees no GPU")
    torch.zeros(1, device="cuda")
    return str(torch.__version__)


def _no_tracer(why: str) -> EngineError:
    return EngineError(
        "HSTU-E406",
        "the kernels cannot be traced",
        why,
        "install torch with CUDA for this driver (https://pytorch.org), or pass --no-timeline",
    )


def traced(run: Callable[[], Any], wait: Callable[[], Any]) -> list[list[Event]]:
    """The device's events of some calls; `start_tracer` was called before.

    Args:
        run: enqueue one.
        wait: until all is done.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    for _ in range(WARM_UP_CALLS):
        run()
    wait()
    with torch_profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            time.sleep(PAUSE_SECONDS)
            run()
            wait()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return calls_of(device_events(json.loads(path.read_text(encoding="utf-8"))))
