"""The M-FALCON benchmark's peers in PyTorch: plain operators, and Meta's modules with Meta's Triton kernels.

  m_falcon_peers.py --parts DIR --meta-repo REPO               (every peer; rows that DIR lacks are measured)
  m_falcon_peers.py --compile-kernels --meta-repo REPO         (fill Triton's cache with Meta's candidates, in parallel)

REPO is a checkout of Meta's generative-recommenders, or what m_falcon_prepare.py took from one. Peers:

  torch_eager          plain PyTorch operators, dense attention in chunks of rows
  meta_triton          Meta's DlrmHSTU, its TRITON kernels, launched from Python; without TMA (m_falcon_meta.py: why)
  meta_triton_graph    meta_triton in a CUDA graph
  meta_triton_cached   meta_triton with STULayer's cache: prefill, then cached_forward of all candidates at once
  meta_compiled_graph  meta_triton through torch.compile (its Triton kernels stay), in a CUDA graph

float32 logits of plain PyTorch operators come first, without TF32; no result is timed before it agrees with them. Peers
run in a half type, where TF32 plays no part. median_ms is device time, by events around each forward, with no wait in
between and a warm L2 cache; call_median_ms is the whole call: upload, forward, download. Embedding lookups are inside,
as they are in the engines. Another --dtype needs another --parts. Without --parts or --compile-kernels nothing is run.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from bench_plugin import status_of
from device_timing import MOST, repeats_for, summary_of
from m_falcon_eager import EagerModel
from m_falcon_meta import TMA_NOTE, MetaModel, import_meta, thin_autotuners
from m_falcon_rows import (
    ALONE,
    COLD,
    PACKED,
    PEERS,
    Case,
    Reference,
    Row,
    cases_of,
    finished,
    reference_path,
    show_part,
    turn,
    write_part,
)
from m_falcon_workload import (
    ALONE_SAMPLE,
    CANDIDATE_COUNTS,
    DLRM_V3,
    HISTORY_LENGTHS,
    PRECISIONS,
    Request,
    Sizes,
    request,
    state_dict,
)
from torch import Tensor

REFERENCE = "reference"
#: Last time bucket of Meta's Triton kernel: the table's.
LAST_BUCKET = 2048
COMPILED = "meta_compiled_graph"
#: Backends that share a process: Meta's have one model, and its kernels are loaded and tuned once.
GROUPS = ((REFERENCE,), ("torch_eager",), tuple(name for name in PEERS if name.startswith("meta_")))
#: Milliseconds: less than the engines get, for 93 measurements in a few minutes; never fewer than 20 repeats.
WARM_UP_MS, MEASURE_MS = 30.0, 120.0
_MIB = 2.0**20

Features = Mapping[str, Tensor]
Run = Callable[[], Tensor]


def exact_float32() -> None:
    """No TF32 anywhere: what float32 means in this benchmark."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def tensors_of(sizes: Sizes) -> dict[str, Tensor]:
    """The model's parameters as float32 tensors."""
    return {key: torch.from_numpy(values) for key, values in state_dict(sizes).items()}


def make_reference(
    n: int, counts: Sequence[int], sizes: Sizes, state: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Reference:
    """float32 logits of every request with n events, and how far plain PyTorch in `dtype` is from them."""
    longest = max(counts)
    whole = request(n, longest, sizes)
    requests = [request(n, m, sizes) for m in counts]
    alone = [whole.only(index, index + 1) for index in range(min(longest, ALONE_SAMPLE))]

    def logits_in(kind: torch.dtype) -> list[np.ndarray[Any, Any]]:
        model = EagerModel(state, sizes, device, kind, LAST_BUCKET)
        return [model.packed(model.upload(each)).float().cpu().numpy() for each in (*requests, *alone)]

    exact, rounded = logits_in(torch.float32), logits_in(dtype)
    spread = float(np.std(exact[list(counts).index(longest)]))
    if not spread > 0:
        raise ValueError(f"the logits of {longest} candidates are all the same: they can tell no error")
    result = Reference(
        dict(zip(counts, exact[: len(counts)], strict=True)), np.concatenate(exact[len(counts) :]), spread, 0.0
    )
    error = max(result.error(half, full) for half, full in zip(rounded, exact, strict=True))
    return Reference(result.logits, result.alone, spread, error)


class Peer:
    """One way to run the model in PyTorch, on whatever device its model is.

    Attributes:
        capture_peak: bytes allocated at most while a graph was captured; its memory is not allocated again later.
    """

    def __init__(self, model: EagerModel | MetaModel) -> None:
        self.model, self.capture_peak = model, 0

    def runs(self, mode: str, requests: Sequence[Request]) -> tuple[list[Run], Callable[[int], None]]:
        """A forward for each request with its inputs on the device, and how to upload one's inputs again."""
        held = [self.model.upload(each) for each in requests]

        def upload(index: int) -> None:
            for name, tensor in self.model.upload(requests[index]).items():
                held[index][name] = tensor

        return [self._forward(mode, features) for features in held], upload

    def _forward(self, mode: str, features: Features) -> Run:
        model = self.model
        if mode in (ALONE, PACKED):
            return lambda: model.packed(features)
        assert isinstance(model, MetaModel)
        if mode == COLD:

            def prime_and_score() -> Tensor:
                model.prime(features)
                return model.score(features)

            return prime_and_score
        model.prime(features)
        return lambda: model.score(features)


class GraphPeer(Peer):
    """Meta's forward in a CUDA graph of one shape; inputs are copied into the graph's own."""

    def __init__(self, model: MetaModel, *, compiled: bool) -> None:
        super().__init__(model)
        self._compiled = compiled

    def runs(self, mode: str, requests: Sequence[Request]) -> tuple[list[Run], Callable[[int], None]]:
        """See `Peer.runs`; all requests have one shape."""
        held = [self.model.upload(each) for each in requests]
        inputs = {name: tensor.clone() for name, tensor in held[0].items()}
        forward: Callable[[Features], Tensor] = self.model.packed
        if self._compiled:
            torch._dynamo.reset()
            forward = torch.compile(forward, dynamic=False)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Compiles, and lets every autotuner choose: neither is legal during capture.
            for _ in range(3):
                forward(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.reset_peak_memory_stats()
        with torch.cuda.graph(graph):
            output = forward(inputs)
        self.capture_peak = torch.cuda.max_memory_allocated()

        def replay(features: Features | None) -> Run:
            def run() -> Tensor:
                if features is not None:
                    for name in inputs:
                        inputs[name].copy_(features[name])
                graph.replay()
                return output

            return run

        def upload(index: int) -> None:
            for name, tensor in self.model.upload(requests[index]).items():
                inputs[name].copy_(tensor)

        # A graph of one request keeps its inputs; one of several gets each one's, which is part of its time.
        return [replay(None if len(held) == 1 else features) for features in held], upload


def device_samples(run: Callable[[], Any], count: int) -> list[float]:
    """Milliseconds on the device of each of `count` runs, enqueued without a wait in between."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * count)]
    for start, end in zip(events[::2], events[1::2], strict=True):
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(events[::2], events[1::2], strict=True)]


def call_samples(call: Callable[[], Any], count: int) -> list[float]:
    """Milliseconds of each of `count` calls that wait for their result."""
    samples = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        samples.append(1e3 * (time.perf_counter() - started))
    return samples


def timed(samples: Callable[[int], list[float]]) -> Row:
    """Warm up, then measure for a fixed time: median, p90, coefficient of variation, repeats."""
    single = sorted(samples(3))[1]
    samples(max(1, min(MOST, int(WARM_UP_MS / single))))
    return summary_of(samples(repeats_for(single, MEASURE_MS)))


def requests_of(case: Case, sizes: Sizes) -> list[Request]:
    """The request of a case, or one for each candidate of its sample."""
    whole = request(case.n, case.m, sizes)
    return [whole.only(index, index + 1) for index in range(case.sample)] if case.mode == ALONE else [whole]


def run_case(peer: Peer, case: Case, reference: Reference, sizes: Sizes) -> Row:
    """Check, then time: a wrong result gets no time. Candidates forwarded alone are timed together."""
    if isinstance(peer.model, MetaModel):
        peer.model.forget()  # another case's keys and values are no memory of this one
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    free_before, held = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
    requests = requests_of(case, sizes)
    runs, upload = peer.runs(case.mode, requests)
    logits = np.concatenate([run().float().cpu().numpy() for run in runs])
    row = reference.judged(case, logits)
    if "status" in row:
        return row
    torch.cuda.reset_peak_memory_stats()

    def run_all() -> None:
        for run in runs:
            run()

    def call_all() -> None:
        for index, run in enumerate(runs):
            upload(index)
            run().float().cpu()

    run_all()
    torch.cuda.synchronize()
    memory = {
        "peak_mib": (max(peer.capture_peak, torch.cuda.max_memory_allocated()) - held) / _MIB,
        "used_mib": (free_before - torch.cuda.mem_get_info()[0]) / _MIB,
    }
    timing = timed(lambda count: device_samples(run_all, count))
    call = timed(lambda count: call_samples(call_all, count))
    timing |= {"call_median_ms": call["median_ms"], "call_p90_ms": call["p90_ms"]}
    return row | memory | timing


def make_peers(
    backends: Sequence[str], meta_repo: Path | None, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> dict[str, Peer]:
    """The peers of those names; all of Meta's have one model.

    Raises:
        ValueError: if one is Meta's and there is no --meta-repo.
    """
    state, peers = tensors_of(sizes), dict[str, Peer]()
    if "torch_eager" in backends:
        peers["torch_eager"] = Peer(EagerModel(state, sizes, device, dtype, LAST_BUCKET))
    metas = [name for name in backends if name not in peers]
    if metas:
        if meta_repo is None:
            raise ValueError(f"{', '.join(metas)}: --meta-repo is needed")
        model = MetaModel(import_meta(meta_repo), state, sizes, device, dtype, "TRITON")
        for name in metas:
            peers[name] = GraphPeer(model, compiled=name == COMPILED) if name.endswith("_graph") else Peer(model)
    return peers


def ordered(backends: Sequence[str], lengths: Sequence[int], counts: Sequence[int]) -> list[Case]:
    """Their cases, each request for all of them before the next one; those that compile for long come last."""
    cases = [case for backend in backends for case in cases_of(backend, lengths, counts)]
    return sorted(cases, key=lambda case: (case.backend == COMPILED, turn(case.n, case.m)))


def versions() -> str:
    """What the peers ran on."""
    import triton

    return f"torch {torch.__version__}, triton {triton.__version__}, TF32 off"


def note_of(case: Case) -> Row:
    """What a reader of the row has to know about the peer."""
    return {"note": TMA_NOTE} if case.backend.startswith("meta_") else {}


def command_of(case: Case, dtype: str) -> str:
    """The line that reproduces a row."""
    return (
        f"m_falcon_peers.py --parts DIR --meta-repo REPO --backends {case.backend} --n {case.n} --m {case.m} "
        f"--dtype {dtype}"
    )


def run_group(arguments: argparse.Namespace) -> None:
    """All cases of one of `GROUPS` in this process, each written when it is done; or the references."""
    exact_float32()
    device, dtype = torch.device("cuda"), getattr(torch, PRECISIONS[arguments.dtype])
    parts: Path = arguments.parts
    with torch.inference_mode():
        if REFERENCE in arguments.backends:
            state = tensors_of(DLRM_V3)
            for n in arguments.n:
                counts = sorted(arguments.m)
                make_reference(n, counts, DLRM_V3, state, device, dtype).save(reference_path(parts, n, arguments.dtype))
            return
        peers = make_peers(arguments.backends, arguments.meta_repo, DLRM_V3, device, dtype)
        measured: dict[Case, Row] = {}
        for case in ordered(arguments.backends, arguments.n, arguments.m):
            if (parts / case.part_name).exists():
                continue
            started = time.perf_counter()
            try:
                reference = Reference.load(reference_path(parts, case.n, arguments.dtype))
                if case.measured not in measured:
                    row = run_case(peers[case.backend], case.measured, reference, DLRM_V3)
                    measured[case.measured] = row | note_of(case)
                row = finished(case, measured[case.measured])
            except Exception as error:
                row = {"status": status_of(error)}
            facts = {"dtype": arguments.dtype, "versions": versions()}
            write_part(parts, case, facts | row, command_of(case, arguments.dtype))
            print(f"{case.part_name}: {time.perf_counter() - started:.1f} s", flush=True)


def measure(arguments: argparse.Namespace) -> int:
    """The references, then each group in a process of its own; the last has the time that the others left."""
    parts: Path = arguments.parts.resolve()
    parts.mkdir(parents=True, exist_ok=True)
    started, missing = time.perf_counter(), False
    have = [reference_path(parts, n, arguments.dtype) for n in arguments.n]
    for group in GROUPS:
        is_reference, is_last = group == (REFERENCE,), group == GROUPS[-1]
        backends = [name for name in group if is_reference or name in arguments.backends]
        if not backends or (is_reference and all(path.exists() for path in have)):
            continue
        cases = [] if is_reference else ordered(backends, arguments.n, arguments.m)
        left = arguments.budget - (time.perf_counter() - started)
        failed = f"not run: the time budget of {arguments.budget:g} s was used up"
        if left > 5:
            command = [sys.executable, str(Path(__file__).resolve()), "--parts", str(parts), "--one-group"]
            command += ["--backends", *backends, "--dtype", arguments.dtype]
            command += ["--n", *map(str, arguments.n), "--m", *map(str, arguments.m)]
            if arguments.meta_repo is not None:
                command += ["--meta-repo", str(arguments.meta_repo.resolve())]
            limit = left if is_last else min(left, arguments.group_seconds)
            failed = ended(command, limit, parts / f"{backends[0]}.log")
        for case in cases:
            known = {"status": failed, "dtype": arguments.dtype}
            show_part(parts, case, known, command_of(case, arguments.dtype))
        if is_reference and not all(path.exists() for path in have):
            print(f"no references: {failed}", file=sys.stderr)
            return 1
        print(f"{', '.join(backends)}: {time.perf_counter() - started:.0f} s", flush=True)
        missing |= any(json.loads((parts / case.part_name).read_text())["status"] != "ok" for case in cases)
    return int(missing)


def ended(command: Sequence[str], limit: float, log: Path) -> str:
    """Run a command with its output in a file; returns how it ended."""
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=limit, cwd=log.parent, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return f"not run: its group was not finished in {limit:.0f} s"
    tail = " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-300:]
    return f"error: exit {code}: {tail}"


def compile_slice(meta_repo: Path, dtype: str, index: int, slices: int) -> None:
    """Run Meta's forwards with every `slices`-th candidate of each autotuner: compiles those into Triton's cache."""
    meta = import_meta(meta_repo)
    thin_autotuners(index, slices)
    exact_float32()
    device = torch.device("cuda")
    with torch.inference_mode():
        model = MetaModel(meta, tensors_of(DLRM_V3), DLRM_V3, device, getattr(torch, PRECISIONS[dtype]), "TRITON")
        # A length of 1 and one that 16 divides are compiled apart from the others.
        for m in (1, 64):
            features = model.upload(request(HISTORY_LENGTHS[0], m))
            model.packed(features)
            model.prime(features)
            model.score(features)
        torch.cuda.synchronize()


def compile_kernels(arguments: argparse.Namespace) -> int:
    """`compile_slice` in several processes at once: the tuners of one process compile one candidate at a time."""
    command = [sys.executable, str(Path(__file__).resolve()), "--compile-kernels", "--dtype", arguments.dtype]
    command += ["--meta-repo", str(arguments.meta_repo.resolve()), "--workers", str(arguments.workers), "--slice"]
    started = time.perf_counter()
    running = [subprocess.Popen([*command, str(index)]) for index in range(arguments.workers)]
    codes = [process.wait() for process in running]
    print(f"Meta's kernels compiled in {time.perf_counter() - started:.0f} s, exit codes {codes}")
    return int(any(codes))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, metavar="DIR", help="measure, and write one JSON per row here")
    parser.add_argument("--meta-repo", type=Path, metavar="REPO")
    parser.add_argument("--backends", nargs="+", choices=(REFERENCE, *PEERS), default=list(PEERS))
    parser.add_argument("--n", type=int, nargs="+", default=list(HISTORY_LENGTHS), help="history events")
    parser.add_argument("--m", type=int, nargs="+", default=list(CANDIDATE_COUNTS), help="candidates")
    parser.add_argument("--dtype", choices=("fp16", "bf16"), default="fp16")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds for all; later cases are rows 'not run'")
    parser.add_argument("--group-seconds", type=float, default=45.0, help="limit of a process but the last")
    parser.add_argument("--compile-kernels", action="store_true", help="only fill Triton's cache")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--slice", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--one-group", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.compile_kernels:
        if arguments.meta_repo is None:
            parser.error("--compile-kernels needs --meta-repo")
        if arguments.slice < 0:
            return compile_kernels(arguments)
        compile_slice(arguments.meta_repo, arguments.dtype, arguments.slice, arguments.workers)
        return 0
    if arguments.parts is None:
        print("m_falcon_peers.py measures on a GPU, with --parts; nothing was run")
        return 0
    if arguments.one_group:
        run_group(arguments)
        return 0
    return measure(arguments)


if __name__ == "__main__":
    sys.exit(main())
