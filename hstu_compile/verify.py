"""Stage 5: every artifact against the eager model. Level 4.

Input: the checkpoint, the shipped graphs and engines. Output: a `VerifyReport` and the `Reference` of each graph, which
goes into the bundle, so that the same check can be repeated without the checkpoint, without torch, and by Polygraphy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

from hstu_compile.artifacts import (
    CheckpointSpec,
    EngineArtifact,
    Feed,
    FusedEngines,
    OnnxGraph,
    Precision,
    is_tap,
)
from hstu_compile.calibration.append_batches import append_arrays
from hstu_compile.calibration.batches import RequestBatch
from hstu_compile.calibration.ranking_batches import prefill_arrays, score_arrays, single_user_arrays
from hstu_compile.compare import whole_error
from hstu_compile.config import Limits
from hstu_compile.errors import VerifyError
from hstu_compile.export import TORCH_DTYPES
from hstu_compile.model.fake_quantization import fake_quantized
from hstu_compile.model.families import HstuModel, model_from_state
from hstu_compile.model.other_roundings import other_roundings
from hstu_compile.model.ranking import RankingModel
from hstu_compile.model.ranking_config import RankingConfig
from hstu_compile.model.retrieval import RetrievalModel
from hstu_compile.quantized import QuantizationPlan
from hstu_compile.rewrite import affordable
from hstu_compile.rewrite.cut_at_attention import segmented_from_onnx
from hstu_compile.runtime.open_fused import open_fused_session
from hstu_compile.runtime.segmented_onnx_session import SegmentedOnnxSession
from hstu_compile.runtime.session import Session, open_session
from hstu_compile.served import ServedGraph, served_graphs
from hstu_compile.session_check import (
    PREDICTIONS,
    SEGMENTS,
    SESSION,
    ItemVectors,
    Outputs,
    Progress,
    Reference,
    RuntimeCheck,
    check_session,
    guarded_check,
    tensor_error,
)

# Not compared number by number: a list of items is judged by `top_items_problem`.
_LISTS = ("top_items", "top_scores")

# Eager runs in the build's precision beside the first, see `references_from_spec`.
_OTHER_ROUNDINGS = 3

# Least eager error of a quantised tensor, as a share of what the quantisation itself changes in it. Rounding moves each
# value by an error of variance step**2 / 12, and a value on the other side of its step moves by a whole step: if a
# share p of them is there, the difference is sqrt(12 p) of what the rounding changes. In float16 p is up to a percent,
# but a tensor of few rows may show none in the eager runs and one in the artifact. With twice these shares a row may
# have p = 1/12, which of a product of a dozen columns is one value, and the tensor as a whole p = 1/192.
_ROW_SHARE, _WHOLE_SHARE = 1 / 2, 1 / 8
_PRIMARY = {
    "retrieval": "user_embeddings",
    "packed": "logits",
    "prefill": "k_0",
    "score": "logits",
    "append": "user_embeddings",
}


@dataclasses.dataclass(frozen=True)
class References:
    """What the eager model answers to the verification's requests.

    Attributes:
        graphs: one per graph, in the order of `served_graphs`.
        session: what a session has to answer: for every candidate, or for every history; None without the graphs for
            one.
        quantization_cost: row error of each output of the first graph that the quantisation itself makes, without any
            other rounding, over all feeds; empty where nothing is quantised.
    """

    graphs: tuple[Reference, ...]
    session: Reference | None
    quantization_cost: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BuiltGraph:
    """One graph and what was built from it.

    Attributes:
        graph: as it is written to the bundle.
        engine: as it is written to the bundle, or None.
        onnx_file: its file name there.
        engine_file: the engine's.
        contextual_len: rows in front of every history.
        fused: the engines of its segments in place of `engine`, where it was cut at its attentions.
    """

    graph: OnnxGraph
    engine: EngineArtifact | None
    onnx_file: str
    engine_file: str
    contextual_len: int = 0
    fused: FusedEngines | None = None

    @property
    def engines(self) -> tuple[EngineArtifact, ...]:
        """Every engine of the graph: none, one, or those of its segments."""
        if self.fused is not None:
            return self.fused.engines
        return () if self.engine is None else (self.engine,)

    @property
    def runnable_file(self) -> str | None:
        """The file that stands for what a GPU runs: the engine, or the schedule of the segments; None for neither."""
        if self.fused is not None:
            return self.fused.schedule_file
        return None if self.engine is None else self.engine_file

    def affordable(self, feeds: Sequence[Feed]) -> onnx.ModelProto:
        """The graph as a CPU can run it on these requests."""
        return affordable(self.graph.model, [feed.arrays for feed in feeds], self.contextual_len)


def _feeds(
    served: ServedGraph, model: HstuModel, batches: Sequence[RequestBatch], cached: Sequence[Outputs], limits: Limits
) -> list[Feed]:
    """The requests as one graph takes them; `cached` are the keys and values of the prefill for them."""
    if served.name in ("retrieval", "packed"):
        return [Feed(batch.name, batch.arrays) for batch in batches]
    if isinstance(model, RetrievalModel):
        if served.name == "prefill":
            return [Feed(batch.name, batch.arrays) for batch in batches]
        assert limits.max_append is not None  # there is no such graph otherwise
        return [
            Feed(batch.name, append_arrays(model.config, batch.arrays, rows, limits.max_append, limits.top_k))
            for batch, rows in zip(batches, cached, strict=True)
        ]
    if served.name == "prefill":
        return [Feed(batch.name, prefill_arrays(model.config, batch.arrays)) for batch in batches]
    return [
        Feed(batch.name, score_arrays(model.config, batch.arrays, rows, served.max_candidates))
        for batch, rows in zip(batches, cached, strict=True)
    ]


def references_from_spec(
    spec: CheckpointSpec,
    precision: Precision,
    batches: Sequence[RequestBatch],
    limits: Limits,
    progress: Progress,
    *,
    prune: bool = True,
    quantization: QuantizationPlan | None = None,
) -> References:
    """Run every graph of the eager model in float64 and in the build's precision on every request.

    The eager error is the largest of several runs whose last bits differ. That of one run is a matter of luck where an
    answer hangs on few values: a row whose norm divides by next to nothing had an error of 4.9e-6 in one run in float32
    and of 2.9e-5 in the next.

    With a quantisation both models have it. Rounding to its grid is a step: a last bit decides on which side a value
    ends, and every evaluation in half precision has other last bits. So the other runs move the activations there, and
    the eager error is never below a share of what the quantisation itself changes.

    Args:
        spec: the checkpoint.
        precision: of the build.
        batches: requests to the first graph; those to the others are made from them.
        limits: of the build; they decide which graphs there are.
        progress: called with (what, done, total).
        prune: the last tap of the shipped graphs holds only the rows that are read.
        quantization: what of the graphs is quantised.
    """
    # No copies of the weights where their type is the same: the tables among them are larger than all else here.
    exact_model = model_from_state(spec.config, spec.state_dict, torch.float64)
    eager_model = model_from_state(spec.config, spec.state_dict, TORCH_DTYPES[precision])
    exact_graphs, eager_graphs = (
        served_graphs(model, limits.top_k, limits.micro_batch, limits.max_append)
        for model in (exact_model, eager_model)
    )
    # The cache is read in the type of the graph. NumPy has no bfloat16: its numbers come as float32.
    cache_dtype = np.dtype(np.float16 if precision == "fp16" else np.float32)
    items = _item_vectors(exact_model) if isinstance(exact_model, RetrievalModel) else None
    references: list[Reference] = []
    cached: list[Outputs] = []
    session, cost = None, {}
    plain: list[Outputs] = []
    for exact_graph, eager_graph in zip(exact_graphs, eager_graphs, strict=True):
        feeds = _feeds(exact_graph, exact_model, batches, cached, limits)
        if quantization is not None:
            plain = [exact_graph.reference(feed.arrays, prune) for feed in feeds]
        exact, eager = [], []
        with _rounded(exact_model, quantization), _rounded(eager_model, quantization):
            for index, feed in enumerate(feeds):
                progress(f"eager {exact_graph.name}", index, len(feeds))
                exact.append(exact_graph.reference(feed.arrays, prune))
                eager.append(eager_graph.reference(feed.arrays, prune))
        progress(f"eager {exact_graph.name}", len(feeds), len(feeds))
        if exact_graph.name == "prefill":
            cached = [_key_values(exact_graph, outputs, cache_dtype) for outputs in eager]
        error, whole = _eager_error(exact, eager), _whole_error(exact, eager)
        for seed in range(_OTHER_ROUNDINGS):
            progress(f"eager {exact_graph.name}, other roundings", seed, _OTHER_ROUNDINGS)
            with _rounded_otherwise(eager_model, quantization, seed):
                moved = [eager_graph.reference(feed.arrays, prune) for feed in feeds]
            error = _largest(error, _eager_error(exact, moved))
            whole = _largest(whole, _whole_error(exact, moved))
        progress(f"eager {exact_graph.name}, other roundings", _OTHER_ROUNDINGS, _OTHER_ROUNDINGS)
        if quantization is not None:
            changed = _eager_error(plain, exact)
            if not references:
                cost = {name: each for name, each in changed.items() if not is_tap(name)}
            error = _at_least(error, _ROW_SHARE, changed)
            whole = _at_least(whole, _WHOLE_SHARE, _whole_error(plain, exact))
        references.append(
            Reference(
                exact_graph.name,
                _PRIMARY[exact_graph.name],
                tuple(feeds),
                tuple(exact),
                tuple(eager),
                error,
                items,
                whole if quantization is not None else None,
            )
        )
    if isinstance(exact_model, RankingModel) and cached:
        with _rounded(exact_model, quantization), _rounded(eager_model, quantization):
            session = _session_reference(exact_model.config, references[0], exact_graphs[0], eager_graphs[0], progress)
        # The same rows as in the packed forward, at most with another divisor: its other roundings stand for these.
        known = {name: references[0].eager_error[name] for name in PREDICTIONS}
        session = dataclasses.replace(session, eager_error=_largest(session.eager_error, known))
    elif cached:
        session = _incremental_reference(references[0])
    return References(tuple(references), session, cost)


def _item_vectors(model: RetrievalModel) -> ItemVectors:
    return ItemVectors.of(lambda: (part.numpy() for part in model.item_parts()))


def _rounded(model: HstuModel, quantization: QuantizationPlan | None) -> contextlib.AbstractContextManager[object]:
    """The model with the quantisation, if there is one."""
    return contextlib.nullcontext() if quantization is None else fake_quantized(model, quantization)


def _rounded_otherwise(
    model: HstuModel, quantization: QuantizationPlan | None, seed: int
) -> contextlib.AbstractContextManager[object]:
    """The same with other last bits."""
    if quantization is None:
        return other_roundings(model, seed)
    return fake_quantized(model, quantization, seed)


def _largest(some: dict[str, float], others: dict[str, float]) -> dict[str, float]:
    return {name: max(error, others[name]) for name, error in some.items()}


def _at_least(some: dict[str, float], share: float, changed: dict[str, float]) -> dict[str, float]:
    """Errors, none below a share of what the quantisation changes, unless that is infinite, of a row of zeros."""
    return {
        name: max(error, share * changed[name]) if math.isfinite(changed[name]) else error
        for name, error in some.items()
    }


def _key_values(prefill: ServedGraph, outputs: Outputs, dtype: np.dtype) -> Outputs:
    return {name: outputs[name].astype(dtype) for name in prefill.outputs if name.startswith(("k_", "v_"))}


def _eager_error(exact: Sequence[Outputs], eager: Sequence[Outputs]) -> dict[str, float]:
    """Largest row error of each eager tensor over all feeds."""
    return {
        name: max(tensor_error(name, low[name], high[name]).error for low, high in zip(eager, exact, strict=True))
        for name in exact[0]
        if name not in _LISTS
    }


def _whole_error(exact: Sequence[Outputs], eager: Sequence[Outputs]) -> dict[str, float]:
    """`whole_error` of each eager tensor."""
    return {
        name: whole_error([low[name] for low in eager], [high[name] for high in exact])
        for name in exact[0]
        if name not in _LISTS
    }


def _session_reference(
    config: RankingConfig, packed: Reference, exact_graph: ServedGraph, eager_graph: ServedGraph, progress: Progress
) -> Reference:
    """What a session answers to the requests of `packed`.

    A session takes every request for a batch of its own. That is the packed forward's answer too, unless its divisor
    counts the longest of the batch: then every user is run alone.
    """

    def answers(graph: ServedGraph, known: Sequence[Outputs]) -> tuple[Outputs, ...]:
        if config.scaling != "batch":
            return tuple({name: each[name] for name in PREDICTIONS} for each in known)
        found = []
        for index, feed in enumerate(packed.feeds):
            progress("eager users alone", index, len(packed.feeds))
            users = [graph.run(arrays) for arrays in single_user_arrays(config, feed.arrays)]
            found.append({name: np.concatenate([user[name] for user in users]) for name in PREDICTIONS})
        progress("eager users alone", len(packed.feeds), len(packed.feeds))
        return tuple(found)

    exact, eager = answers(exact_graph, packed.exact), answers(eager_graph, packed.eager)
    return Reference(SESSION, packed.primary, packed.feeds, exact, eager, _eager_error(exact, eager), None)


def _incremental_reference(whole: Reference) -> Reference:
    """What a session answers to histories that grow in it: the same as to whole ones."""

    def answers(known: Sequence[Outputs]) -> tuple[Outputs, ...]:
        return tuple({whole.primary: each[whole.primary]} for each in known)

    exact, eager = answers(whole.exact), answers(whole.eager)
    error = {whole.primary: whole.eager_error[whole.primary]}
    return Reference(SESSION, whole.primary, whole.feeds, exact, eager, error, None)


def open_built(
    built: BuiltGraph, runtime: str, feeds: Sequence[Feed], plugin_library: Path | None, taps: Sequence[str] = ()
) -> Session:
    """Open one shipped graph in ONNX Runtime, or its engine or engines on their backend.

    Args:
        built: the graph and its engine.
        runtime: "onnxruntime", or the engine's backend.
        feeds: the largest requests that it has to take.
        plugin_library: plugin that the engine needs, or None.
        taps: intermediate values to give as well; ONNX Runtime only.
    """
    if runtime == "onnxruntime":
        return open_session(runtime, onnx=built.affordable(feeds), taps=taps, folder=built.graph.folder)
    allow_tf32 = built.graph.precision != "fp32"
    if (fused := built.fused) is not None:
        plans = [engine.plan for engine in fused.engines]
        return open_fused_session(fused.cut, plans, fused.kernels, allow_tf32=allow_tf32)
    assert built.engine is not None
    return open_session(
        runtime,
        engine=built.engine.plan,
        plugin_library=plugin_library if runtime == "tensorrt" else None,
        allow_tf32=allow_tf32,
    )


def open_segments(built: BuiltGraph, feeds: Sequence[Feed], taps: Sequence[str] = ()) -> Session:
    """Open one shipped graph in segments in ONNX Runtime, as its engines run it.

    Args:
        built: the graph.
        feeds: the largest requests that it has to take.
        taps: intermediate values to give as well.
    """
    graph = dataclasses.replace(built.graph, model=built.affordable(feeds))
    return SegmentedOnnxSession(segmented_from_onnx(graph), taps=taps)


def verify_artifacts(
    built: BuiltGraph, reference: Reference, plugin_library: Path | None, progress: Progress
) -> list[RuntimeCheck]:
    """Check one shipped graph in ONNX Runtime, layer by layer, and its engine where that can run.

    A graph that was cut is also checked in segments there: what its engines leave to show is that they compute them.

    Args:
        built: the graph and its engine.
        reference: of the same graph, checkpoint and precision.
        plugin_library: plugin that the engine needs, or None.
        progress: called with (what, done, total).

    Raises:
        VerifyError: HSTU-E602, if ONNX Runtime is not installed: then nothing could be verified.
    """
    taps = [name for name in reference.exact[0] if is_tap(name)]
    precision = built.graph.precision

    def check(artifact: str) -> Callable[[Session], RuntimeCheck]:
        return lambda session: check_session(session, artifact, reference, precision, progress)

    runs = [
        guarded_check(
            "onnxruntime",
            built.onnx_file,
            lambda: open_built(built, "onnxruntime", reference.feeds, plugin_library, taps),
            check(built.onnx_file),
        )
    ]
    if runs[0].status == "NOT RUN":
        raise VerifyError(
            "HSTU-E602",
            f"{built.onnx_file} could not be run",
            runs[0].reason or "",
            "install onnxruntime (pip install 'hstu-compile[cpu]'), or build with --no-verify",
        )
    if built.fused is not None:
        file = built.fused.schedule_file
        runs.append(
            guarded_check(SEGMENTS, file, lambda: open_segments(built, reference.feeds, taps), check(file)),
        )
    if built.runnable_file is not None:
        backend, file = built.engines[0].backend, built.runnable_file
        runs.append(
            guarded_check(
                backend, file, lambda: open_built(built, backend, reference.feeds, plugin_library), check(file)
            )
        )
    return runs
