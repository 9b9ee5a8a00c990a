"""The end-to-end benchmark's baselines: eager, torch.compile and AOTInductor, each also in a CUDA graph.

`Peers` are those of the ranking model; end_to_end_retrieval_peers.py has what differs of the retrieval model.

Run by bench_end_to_end.py, a family of backends in each process. First of all comes the family `reference`: answers in
float64, and a plan for each case, which attention of those given is the fastest that is right, and which form of the
projection is faster. Eager is measured in every form and the faster one counts; what compiles takes the plan's, or
with --all-forms torch.compile takes every one as well, and max-autotune the one that was faster there.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_plugin import clocks, status_of
from end_to_end_attention import PLAIN, attention, provide, provider_of, ranked_providers, version_of
from end_to_end_clock import TorchClock, call_times, timed
from end_to_end_model import FORMS, JOINT, SPLIT, PlainModel, cached_names
from end_to_end_reference import (
    AnswersTwice,
    Reference,
    ReferenceModel,
    make_reference,
    reference_path,
    torch_dtype,
)
from end_to_end_rows import (
    AOTI,
    COMPILE,
    EAGER,
    GRAPH,
    MAX_AUTOTUNE,
    keys_path,
    line_of,
    part_path,
    plan_path,
    save_keys,
    write_part,
)
from end_to_end_workload import CACHED, CONTEXT, AnyCase, AnySizes, Arrays, Case, packed_arrays, score_arrays
from m_falcon_workload import Sizes, state_dict
from torch import Tensor, nn

_MIB = 2.0**20
_MODES = {COMPILE: None, MAX_AUTOTUNE: "max-autotune-no-cudagraphs"}
#: Kernels are tuned on the inputs of the case. By default they are tuned on random numbers, of which some serve as
#: indices: a kernel that gathers then ends the process by its assertion.
_AOTI_CONFIGS = {"triton.autotune_at_compile_time": False}
#: Of `score_arrays`, what the baseline needs no tensor for.
_CONSTANT = ("cache_offsets", "scaling_seq_lens")

Row = dict[str, Any]
Run = Callable[[dict[str, Tensor]], Tensor]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the baselines compute a case.

    Attributes:
        full: attention of all rows.
        query: attention where candidates alone ask; None if there is none.
        form: of the projection; of retrieval, how histories of several lengths lie.
    """

    full: str
    query: str | None
    form: str

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read what the family `reference` left.

        Raises:
            RuntimeError: it could not plan the case; why.
        """
        if not path.exists():
            raise RuntimeError("the case was not planned: its reference is missing")
        content = json.loads(path.read_text(encoding="utf-8"))
        if "problem" in content:
            raise RuntimeError(content["problem"])
        return cls(**content)


class Inputs:
    """One case's inputs: on the host in page-locked memory, and on the device at places that stay.

    Args:
        arrays: the request.
        device: of the model.
        keys: keys and values of a cached case; they stay on the device.
    """

    def __init__(self, arrays: Arrays, device: torch.device, keys: Mapping[str, Tensor]) -> None:
        hosts = {name: torch.from_numpy(values) for name, values in arrays.items()}
        self._pinned = {name: host.pin_memory() if device.type == "cuda" else host for name, host in hosts.items()}
        self._hosts, self._keys = hosts, keys
        self._device = {name: host.to(device) for name, host in hosts.items()}

    @property
    def features(self) -> dict[str, Tensor]:
        """What a forward takes."""
        return {**self._device, **self._keys}

    def upload(self) -> None:
        """Copy the request from ordinary host memory to the device."""
        for name, host in self._hosts.items():
            pinned = self._pinned[name]
            if pinned is not host:
                pinned.copy_(host)
            self._device[name].copy_(pinned, non_blocking=True)


class Captured:
    """A forward in a CUDA graph; it reads its inputs where they were when it was captured.

    Args:
        run: the forward, which was called before.
        features: its inputs.

    Attributes:
        peak_bytes: allocated at most meanwhile.
    """

    def __init__(self, run: Run, features: dict[str, Tensor]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(features)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.output = run(features)
        self.peak_bytes = torch.cuda.max_memory_allocated()

    def __call__(self, features: dict[str, Tensor]) -> Tensor:
        """Replay it."""
        self._graph.replay()
        return self.output


class Peers:
    """One process's baselines of one model.

    Args:
        parts: folder of the rows, references and plans.
        scratch: folder for what is compiled ahead.
        sizes: of the model.
        device: the GPU, or a CPU to try the program.
        providers: names of the attentions that were loaded.
        all_forms: let torch.compile compile every form.
    """

    def __init__(
        self,
        parts: Path,
        scratch: Path,
        sizes: Any,
        device: torch.device,
        providers: Sequence[str],
        *,
        all_forms: bool,
    ) -> None:
        self._all_forms = all_forms
        self._parts, self._scratch, self._sizes, self._device = parts, scratch, sizes, device
        self._providers = list(providers)
        self._state = {key: torch.from_numpy(values) for key, values in self._parameters().items()}
        self._clock = TorchClock(device)
        self._clocks, self._gemm = clocks(), self._clock.gemm_tflops(torch.bfloat16)
        self._reference: AnswersTwice | None = None

    # What another model has in another way.

    def _parameters(self) -> Arrays:
        """By the original's keys."""
        return state_dict(self._sizes)

    def _reference_model(self) -> AnswersTwice:
        return ReferenceModel(self._sizes, self._device)

    # The family `reference`.

    def plan(self, case: AnyCase) -> None:
        """Write a case's reference, unless it is there, and its plan."""
        path = reference_path(self._parts, case)
        if not path.exists():
            if self._reference is None:
                self._reference = self._reference_model()
            make_reference(case, self._reference).save(path)
        reference = Reference.load(path)
        target = plan_path(self._parts, case)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            content = dataclasses.asdict(self._planned(case, reference))
        except RuntimeError as error:
            content = {"problem": str(error)}
        target.write_text(json.dumps(content) + "\n", encoding="utf-8")
        print(f"{case.name}: {content}", flush=True)

    def _planned(self, case: Any, reference: Reference) -> Plan:
        full = self._ranked(case, candidates_only=False)
        query = self._ranked(case, candidates_only=True) if case.mode == CACHED or case.is_pruned else []
        problems = [f"no attention for it among {', '.join(self._providers) or 'none'}"]
        # Without one for candidates alone a pruned layer lets all rows ask; a cached one cannot.
        queries: list[str | None] = [*query] if case.mode == CACHED else [*query, None]
        for one in full:
            for other in queries:
                plan = Plan(one, other, JOINT)
                try:
                    judged = reference.judged(self._answer(case, plan))
                except Exception as error:
                    problems.append(f"{one} and {other}: {status_of(error)}")
                    self._after_failure()
                    continue
                if judged["status"] == "ok":
                    self._keep_keys(case, plan)
                    return dataclasses.replace(plan, form=self._faster_form(case, plan))
                problems.append(f"{one} and {other}: {judged['status']}, off by {judged['max_err']:.3g}")
        raise RuntimeError("; ".join(problems)[:400])

    def _keep_keys(self, case: Case, plan: Plan) -> None:
        """Write the keys and values of a cached case for ours, so that all score against the same bits."""
        if case.mode != CACHED:
            return
        _, inputs = self._model(case, plan)
        history = CONTEXT + case.lengths[0]
        kept = {}
        for name in cached_names(self._sizes.num_layers):
            rows = inputs.features[name][:, :history].reshape(case.batch * history, self._sizes.num_heads, -1)
            kept[name.replace("keys", "k").replace("values", "v")] = rows.view(torch.int16).cpu().numpy()
        save_keys(keys_path(self._scratch, case), kept)

    def _ranked(self, case: Case, *, candidates_only: bool) -> list[str]:
        shape = case.attention(self._sizes, candidates_only=candidates_only)
        generator = torch.Generator(self._device).manual_seed(0)

        def drawn(rows: int, dim: int) -> Tensor:
            size = (rows, self._sizes.num_heads, dim)
            return torch.randn(size, generator=generator, device=self._device).to(torch_dtype(case))

        q = drawn(sum(shape.query_lengths), self._sizes.attention_dim)
        k, v = drawn(sum(shape.lengths), self._sizes.attention_dim), drawn(sum(shape.lengths), self._sizes.linear_dim)
        q_offsets, k_offsets = (
            torch.tensor([0, *lengths], device=self._device).cumsum(0).int()
            for lengths in (shape.query_lengths, shape.lengths)
        )
        targets = torch.full((case.batch,), case.candidates, dtype=torch.int32, device=self._device)
        fixed = (q, k, v, q_offsets, k_offsets, targets, max(shape.query_lengths), shape.max_len, shape.alpha)
        with torch.inference_mode():
            return ranked_providers(lambda name: attention(*fixed, name), self._providers)

    def _answer(self, case: AnyCase, plan: Plan) -> Any:
        model, inputs = self._model(case, plan)
        with torch.inference_mode():
            return model(inputs.features).float().cpu().numpy()

    def _faster_form(self, case: Case, plan: Plan) -> str:
        """The form whose projection is faster as a compiler leaves it: one product and a copy of it, or four products.

        A compiler fuses what follows a joint product into one kernel that reads and writes all of it.
        """
        if self._device.type != "cuda":
            return plan.form
        width = self._sizes.width

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch_dtype(case), device=self._device)

        x, bias, joint = drawn(case.tokens, width), drawn(4 * width), drawn(width, 4 * width)
        parts = [each.contiguous() for each in joint.split(width, dim=1)]
        forwards: dict[str, Run] = {
            JOINT: lambda given: torch.addmm(bias, given["x"], joint).clone(),
            SPLIT: lambda given: [torch.addmm(bias[:width], given["x"], part) for part in parts][-1],
        }
        times = {}
        with torch.inference_mode():
            for form, forward in forwards.items():
                graph = Captured(forward, {"x": x})
                times[form] = timed(self._clock.samples(functools.partial(graph, {})))["median_ms"]
        self._release()
        return min(times, key=lambda form: times[form])

    def _model(self, case: Any, plan: Plan, *, direct: bool = True) -> tuple[nn.Module, Inputs]:
        """A model and its inputs on the device.

        Args:
            case: which.
            plan: its attention and form.
            direct: call the attention itself and not the operator, which only compilers need.
        """

        def attend(*values: Any) -> Tensor:
            return provider_of(values[-1])(*values[:-1])

        given = (self._state, self._sizes, case, torch_dtype(case), plan.full, plan.query, plan.form)
        model = PlainModel(*given, attend=attend if direct else attention).to(self._device).eval()
        keys: dict[str, Tensor] = {}
        if case.mode == CACHED:
            packed = packed_arrays(case, self._sizes)
            keys = model.history_keys({n: torch.from_numpy(each).to(self._device) for n, each in packed.items()})
            scored = score_arrays(case, self._sizes)
            arrays = {name: values for name, values in scored.items() if name not in _CONSTANT}
        else:
            arrays = packed_arrays(case, self._sizes)
        return model, Inputs(arrays, self._device, keys)

    # The families that are timed.

    def measure(self, case: AnyCase, family: str) -> None:
        """Check and time the two backends of a family, and write their rows.

        Raises:
            RuntimeError: the GPU's context is lost.
        """
        rows: dict[str, Row] = {}
        try:
            plan = Plan.load(plan_path(self._parts, case))
            reference = Reference.load(reference_path(self._parts, case))
            forms = self._forms(case, family, plan)
        except Exception as error:
            rows = {backend: {"status": status_of(error)} for backend in (family, family + GRAPH)}
            forms = []
        for form in forms:
            for backend, row in self._form_rows(case, family, dataclasses.replace(plan, form=form), reference).items():
                if better(row, rows.get(backend)):
                    rows[backend] = row
            self._release()
        for backend, row in rows.items():
            facts = {"clocks": self._clocks, "l2": "cold", "gemm_tflops": self._gemm, "versions": self._versions()}
            write_part(self._parts, case, backend, facts | row, self._sizes)
            print(line_of(case.name, backend, row), flush=True)

    def _all_forms_of(self, case: Any) -> Sequence[str]:
        """In which a case could be computed."""
        return FORMS

    def _forms(self, case: AnyCase, family: str, plan: Plan) -> Sequence[str]:
        if family == EAGER or (family == COMPILE and self._all_forms):
            return self._all_forms_of(case)
        if family == MAX_AUTOTUNE:
            for backend in (COMPILE + GRAPH, COMPILE):
                path = part_path(self._parts, case.name, backend)
                row = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
                if row.get("status") == "ok":
                    return [str(row["form"]).split(",")[0]]
        return [plan.form]

    def _form_rows(self, case: AnyCase, family: str, plan: Plan, reference: Reference) -> dict[str, Row]:
        used = ", ".join(dict.fromkeys(filter(None, (plan.form, plan.full, plan.query))))
        rows: dict[str, Row] = {name: {"form": used} for name in (family, family + GRAPH)}
        held = torch.cuda.memory_allocated() if self._device.type == "cuda" else 0
        try:
            model, inputs = self._model(case, plan, direct=family == EAGER)
            started = time.perf_counter()
            run = self.runnable(case, family, model, inputs, plan)
            with torch.inference_mode(family != AOTI), torch.no_grad():
                run(inputs.features)
                built = {} if family == EAGER else {"build_s": time.perf_counter() - started}
                self._reset_peak()
                rows[family] |= built | self._checked(run, inputs, reference, held)
                rows[family + GRAPH] |= built | self._graph_row(run, inputs, reference, held)
        except Exception as error:
            failed = self._failure(error)
            rows = {name: {**row, **failed} if "status" not in row else row for name, row in rows.items()}
        return rows

    def _graph_row(self, run: Run, inputs: Inputs, reference: Reference, held: int) -> Row:
        if self._device.type != "cuda":
            return {"status": "not offered: a CUDA graph needs a GPU"}
        try:
            captured = Captured(run, inputs.features)
            captured.output.fill_(torch.nan)
            return self._checked(captured, inputs, reference, held, captured.peak_bytes)
        except Exception as error:
            return self._failure(error)

    def _checked(self, run: Run, inputs: Inputs, reference: Reference, held: int, captured_peak: int = 0) -> Row:
        """Compare, then time: a wrong answer gets no time."""
        features = inputs.features
        row = reference.judged(run(features).float().cpu().numpy())
        if row["status"] != "ok":
            return row
        if self._device.type == "cuda":
            row["peak_mib"] = (max(captured_peak, torch.cuda.max_memory_allocated()) - held) / _MIB

        def call() -> Any:
            inputs.upload()
            return run(features).float().cpu()

        return row | timed(self._clock.samples(lambda: run(features))) | call_times(call)

    def runnable(self, case: AnyCase, family: str, model: nn.Module, inputs: Inputs, plan: Plan) -> Run:
        """The forward as a family runs it; what it compiles it may compile at its first call."""
        if family == EAGER:
            return model
        if family == AOTI:
            return self._loaded_package(case, model, inputs, plan)
        # Models of other cases share its code, and would count as recompilations of it.
        torch._dynamo.reset()
        compiled: Run = torch.compile(model, dynamic=False, fullgraph=True, mode=_MODES[family])
        return compiled

    def _loaded_package(self, case: AnyCase, model: nn.Module, inputs: Inputs, plan: Plan) -> Run:
        path = self._scratch / f"{case.name}-{plan.form}-{plan.full}-{plan.query}.pt2"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with torch.no_grad():
                exported = torch.export.export(model, (inputs.features,), strict=False)
                aside = path.with_suffix(".partial.pt2")
                torch._inductor.aoti_compile_and_package(
                    exported, package_path=str(aside), inductor_configs=_AOTI_CONFIGS
                )
            aside.replace(path)
        # With its own threads' bookkeeping, which waits for events, it could not be captured.
        loaded: Run = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
        return loaded

    def warm(self, case: AnyCase, family: str) -> None:
        """Compile what `measure` will run, without timing anything."""
        plan = Plan.load(plan_path(self._parts, case))
        for form in self._forms(case, family, plan):
            chosen = dataclasses.replace(plan, form=form)
            model, inputs = self._model(case, chosen, direct=False)
            with torch.inference_mode(family != AOTI), torch.no_grad():
                self.runnable(case, family, model, inputs, chosen)(inputs.features)
            self._release()

    def traces(self, case: AnyCase, family: str, trace: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
        """What a function makes of a family's forward, as it is and in a CUDA graph: suffix of the backend and result.

        Args:
            case: which.
            family: which.
            trace: takes a function that enqueues a forward, and one that waits.
        """
        plan = Plan.load(plan_path(self._parts, case))
        plan = dataclasses.replace(plan, form=self._forms(case, family, plan)[0])
        model, inputs = self._model(case, plan, direct=family == EAGER)
        run = self.runnable(case, family, model, inputs, plan)
        with torch.inference_mode(family != AOTI), torch.no_grad():
            features = inputs.features
            yield "", trace(lambda: run(features), torch.cuda.synchronize)
            captured = Captured(run, features)
            yield GRAPH, trace(lambda: captured(features), torch.cuda.synchronize)

    # Housekeeping.

    def _versions(self) -> str:
        texts = [f"torch {torch.__version__}"]
        if self._device.type == "cuda":
            import triton

            texts.append(f"triton {triton.__version__}")
        texts += [version_of(name) for name in self._providers if name != PLAIN]
        return "; ".join(texts)

    def _reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def _release(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _after_failure(self) -> None:
        """Where the context is lost this raises: the process ends, and another goes on."""
        self._release()

    def _failure(self, error: Exception) -> Row:
        status = status_of(error)
        self._after_failure()
        return {"status": status}


def better(row: Row, other: Row | None) -> bool:
    """Whether a row replaces the one of another form: a time beats none, and the shorter time the longer."""
    if other is None or "median_ms" not in other:
        return other is None or "median_ms" in row
    return "median_ms" in row and row["median_ms"] < other["median_ms"]


def make_peers(
    parts: Path,
    scratch: Path,
    sizes: AnySizes,
    device: torch.device,
    libraries: Mapping[str, Path | None],
    *,
    all_forms: bool,
) -> Peers:
    """The baselines of a model, with the attentions that were given; on a CPU the plain one takes their place.

    Args:
        parts: folder of the rows.
        scratch: folder for what is compiled ahead.
        sizes: of the model; those of the retrieval model, whose attention no library has, load none.
        device: the GPU, or a CPU.
        libraries: meta_library, nvidia_library, meta_repo.
        all_forms: let torch.compile compile every form of the model.
    """
    if not isinstance(sizes, Sizes):
        from end_to_end_retrieval_peers import RetrievalPeers

        return RetrievalPeers(parts, scratch, sizes, device, (), all_forms=all_forms)
    names = provide(**libraries, plain=device.type != "cuda")
    return Peers(parts, scratch, sizes, device, names, all_forms=all_forms)
