"""What must hold for the three graphs of a ranking bundle on any runtime: stored feeds, golden data, M-FALCON.

NumPy and onnx alone, so that it runs beside TensorRT 8.5. Every function takes sessions, or a way to open them, so that
ONNX Runtime can stand in for the engines where there is no GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from checks import Check, Checks

from hstu_compile import bundle as bundles
from hstu_compile.artifacts import Precision, TensorSpec
from hstu_compile.compare import error_bound
from hstu_compile.errors import RequestError
from hstu_compile.op_schema import is_attention, is_norm
from hstu_compile.recheck import stored_reference
from hstu_compile.runtime._feeds import converted
from hstu_compile.runtime.kv_layout import KvLayout
from hstu_compile.runtime.ranking import RankingSession
from hstu_compile.runtime.ranking_request import RankingRequest, RankingResult
from hstu_compile.runtime.ranking_spec import RankingSpec
from hstu_compile.runtime.session import Session
from hstu_compile.session_check import PREDICTIONS, Reference, check_session, tensor_error
from tests.ranking_requests import request_of

GRAPHS = ("packed", "prefill", "score")
GOLDEN_BATCHES = ("a", "b", "c")
#: Relative error of the original's predictions in float32 that the issue allows.
GOLDEN_BOUND = 1e-5
#: A comparison on fewer feeds would show little.
LEAST_FEEDS = 2
_MORE_THAN_THE_PROFILE = 40

Open = Callable[[str], Session]


@dataclasses.dataclass(frozen=True)
class PreparedBundle:
    """A ranking bundle without engines, and what the eager model answers.

    Attributes:
        name: of its folder, "dlrm-fp16".
        folder: the bundle.
        precision: of the graphs.
        max_batch: most users of a pass.
        spec: the manifest's ranking entry.
        references: feeds, float64 and eager outputs of each graph.
        tolerances: arguments of Polygraphy's --atol for each graph, as the build computed them.
    """

    name: str
    folder: Path
    precision: Precision
    max_batch: int
    spec: RankingSpec
    references: Mapping[str, Reference]
    tolerances: Mapping[str, Sequence[str]]

    @classmethod
    def read(cls, folder: Path) -> PreparedBundle:
        """Read what `hstu-compile build --m-falcon` wrote."""
        manifest = json.loads((folder / bundles.MANIFEST).read_text(encoding="utf-8"))
        graphs = {graph["name"]: graph for graph in manifest["graphs"]}
        words = {name: graph["verification"]["polygraphy_arguments"] for name, graph in graphs.items()}
        return cls(
            name=folder.name,
            folder=folder,
            precision=manifest["precision"]["requested"],
            max_batch=manifest["limits"]["max_batch"],
            spec=RankingSpec.from_manifest(manifest["ranking"]),
            references={name: stored_reference(folder, graphs[name]) for name in GRAPHS},
            tolerances={name: words[name][words[name].index("--atol") + 1 : -2] for name in GRAPHS},
        )

    def onnx(self, graph: str) -> Path:
        """A graph's file."""
        return self.folder / bundles.model_files(graph)[0]

    def num_plugin_nodes(self, graph: str) -> int:
        """Attention and norm nodes of a graph: `prefill` needs no attention for its last layer."""
        return sum(is_attention(node) or is_norm(node) for node in onnx.load(self.onnx(graph)).graph.node)

    @property
    def bound(self) -> float:
        """Largest difference of the logits of two right answers: both may lie a bound away from float64."""
        errors = [self.references[graph].eager_error["logits"] for graph in ("packed", "score")]
        return sum(error_bound(error, self.precision) for error in errors)


def fitting(reference: Reference, inputs: Sequence[TensorSpec]) -> tuple[Reference, list[str]]:
    """The part of a reference whose feeds the inputs can hold unchanged, and the names of the other feeds.

    TensorRT 8 has no int64: a time after 2038 cannot be asked about.
    """
    dtypes = {tensor.name: tensor.dtype for tensor in inputs}

    def fits(index: int) -> bool:
        arrays = reference.feeds[index].arrays
        return all(converted(array, dtypes[name]) is not None for name, array in arrays.items())

    kept = [index for index in range(len(reference.feeds)) if fits(index)]
    dropped = [feed.name for index, feed in enumerate(reference.feeds) if index not in kept]
    return chosen_feeds(reference, kept), dropped


def chosen_feeds(reference: Reference, indices: Sequence[int]) -> Reference:
    """Some of the feeds, with what belongs to them."""
    return dataclasses.replace(
        reference,
        feeds=tuple(reference.feeds[index] for index in indices),
        exact=tuple(reference.exact[index] for index in indices),
        eager=tuple(reference.eager[index] for index in indices),
    )


def check_feeds(checks: Checks, bundle: PreparedBundle, graph: str, session: Session) -> None:
    """Every stored feed through our session, under the rule of `hstu-compile verify`."""
    with checks.check(f"{bundle.name} {graph}: our session agrees with float64 on every feed") as check:
        reference, dropped = fitting(bundle.references[graph], session.inputs)
        check.facts |= {"feeds": [feed.name for feed in reference.feeds], "feeds_beyond_int32": dropped}
        check.facts["result"] = check_session(session, graph, reference, bundle.precision, lambda *_: None)
        result = check.facts["result"]
        complete = len(result.tensors) == len(reference.feeds) * len(session.outputs)
        check.passed = result.status == "PASS" and complete and len(reference.feeds) >= LEAST_FEEDS


def golden_feeds(arrays: Mapping[str, Any], batch: str, inputs: Sequence[TensorSpec]) -> dict[str, Any]:
    """What the packed graph takes of a golden batch: labels of candidates are not among it."""
    offsets = {"seq_offsets": "uih_lengths", "candidate_offsets": "num_candidates"}
    feeds = {}
    for tensor in inputs:
        if tensor.name in offsets:
            feeds[tensor.name] = np.concatenate([[0], np.cumsum(arrays[f"{batch}.{offsets[tensor.name]}"])])
        else:
            (key,) = (
                f"{batch}.{part}.{tensor.name}" for part in ("uih", "cand") if f"{batch}.{part}.{tensor.name}" in arrays
            )
            feeds[tensor.name] = arrays[key]
    return feeds


def check_golden(checks: Checks, bundle: PreparedBundle, arrays: Mapping[str, Any], session: Session) -> None:
    """The original's own predictions on real requests; a half engine may err as twice the eager half model does."""
    eager_error = bundle.references["packed"].eager_error["preds"]
    bound = GOLDEN_BOUND if bundle.precision == "fp32" else error_bound(eager_error, bundle.precision)
    for batch in GOLDEN_BATCHES:
        with checks.check(f"{bundle.name} packed: the original's predictions of batch {batch}") as check:
            actual = session.run(golden_feeds(arrays, batch, session.inputs))["preds"]
            expected = arrays[f"{batch}.preds"].T.astype(np.float64)
            relative = float((np.abs(actual - expected) / np.abs(expected)).max())
            error = relative if bundle.precision == "fp32" else tensor_error("preds", actual, expected).error
            check.facts |= {"candidates": len(actual), "difference": error, "bound": bound, "relative": relative}
            check.passed = actual.shape == expected.shape and error <= bound


def golden_requests(arrays: Mapping[str, Any], spec: RankingSpec) -> list[RankingRequest]:
    """The users of the golden batches, one request each."""
    requests = []
    for batch in GOLDEN_BATCHES:
        events, candidates = (
            np.concatenate([[0], np.cumsum(arrays[f"{batch}.{name}"])]) for name in ("uih_lengths", "num_candidates")
        )
        for user in range(len(events) - 1):
            history, asked = slice(*events[user : user + 2]), slice(*candidates[user : user + 2])
            requests.append(
                RankingRequest(
                    f"golden {batch} {user}",
                    {name: arrays[f"{batch}.uih.{name}"][history] for name in spec.history_names},
                    {name: arrays[f"{batch}.cand.{name}"][asked] for name in spec.candidate_names},
                    {
                        slot.name: arrays[f"{batch}.uih.{slot.name}"][user * slot.max_length :][: slot.max_length]
                        for slot in spec.contextual
                    },
                )
            )
    return requests


def synthetic_requests(spec: RankingSpec) -> list[RankingRequest]:
    """Users of every kind: the longest history and none, the most candidates and none."""
    most, cap = spec.max_history_len, spec.max_candidates
    sizes = [(most, min(cap, 70)), (most // 3, 3), (0, 1), (7, 0), (most // 2, min(cap, 20)), (1, cap)]
    return [request_of(spec, f"user {index}", *size) for index, size in enumerate(sizes)]


@contextlib.contextmanager
def ranking_session(spec: RankingSpec, open_graph: Open, users: int) -> Iterator[RankingSession]:
    """A session over the three graphs whose cache holds that many users of full length."""
    layout = KvLayout(spec.num_layers, spec.num_heads, spec.attention_dim, spec.linear_dim, spec.kv_dtype)
    budget = users * layout.entry_bytes(spec.contextual_len + spec.max_history_len)
    with contextlib.ExitStack() as opened:
        packed, prefill, score = (opened.enter_context(open_graph(graph)) for graph in GRAPHS)
        session = RankingSession(spec, packed, prefill, score, kv_budget_bytes=budget)
        opened.pop_all()
    with session:
        yield session


def difference(actual: Sequence[RankingResult], expected: Sequence[RankingResult]) -> float:
    """Largest error of logits and predictions over all requests; infinite where a shape differs."""
    if [result.logits.shape for result in actual] != [result.logits.shape for result in expected]:
        return float("inf")
    errors = []
    for name in PREDICTIONS:
        both = [np.concatenate([getattr(result, name) for result in results]) for results in (actual, expected)]
        errors.append(tensor_error(name, both[0], both[1].astype(np.float64)).error)
    return max(errors)


def same_bits(actual: Sequence[RankingResult], expected: Sequence[RankingResult]) -> bool:
    """Whether all predictions and logits are the same to the last bit."""
    return all(
        getattr(one, name).tobytes() == getattr(other, name).tobytes()
        for one, other in zip(actual, expected, strict=True)
        for name in PREDICTIONS
    )


def micro_batches_of(spec: RankingSpec) -> list[int]:
    """A few sizes up to what the score graph takes: one that leaves a short last pass, one for very small passes."""
    return sorted({max(1, spec.micro_batch // 16), max(1, spec.micro_batch // 5), spec.micro_batch})


def check_m_falcon(
    checks: Checks, bundle: PreparedBundle, open_graph: Open, requests: Sequence[RankingRequest]
) -> None:
    """Cached scores equal packed ones for every micro-batch; warm equals cold; nothing and too much are served."""
    spec = bundle.spec
    cap = spec.max_candidates
    beyond = request_of(spec, "beyond the profile", min(spec.max_history_len, 200), cap + _MORE_THAN_THE_PROFILE)
    answers: list[list[RankingResult]] = []
    for micro_batch in micro_batches_of(spec):
        label = f"{bundle.name}, micro-batch {micro_batch}"
        narrow = dataclasses.replace(spec, micro_batch=micro_batch)
        with (
            checks.check(f"{label}: the session serves") as served,
            ranking_session(narrow, open_graph, len(requests) + 1) as session,
        ):
            _check_cold_and_warm(checks, label, bundle.bound, session, requests)
            _check_shapes(checks, label, session)
            with checks.check(f"{label}: {cap + _MORE_THAN_THE_PROFILE} candidates, {cap} fit a packed pass") as check:
                answers.append(session.score([beyond]))
                check.facts["packed"] = _packed_beyond(session, beyond)
                check.facts["difference"] = difference(answers[-1], answers[0])
                check.facts["bound"] = bundle.bound
                check.passed = _refused_as_documented(check, spec) and check.facts["difference"] <= bundle.bound
            served.facts["stats"] = session.stats()
            served.passed = True


def _check_cold_and_warm(
    checks: Checks, label: str, bound: float, session: RankingSession, requests: Sequence[RankingRequest]
) -> None:
    scored = [len(request.candidates[session.spec.candidate_time]) > 0 for request in requests]
    with checks.check(f"{label}: cached scores equal packed ones") as check:
        cold = session.score(requests)
        prefills = session.stats().prefill_passes
        packed = [session.score_packed([request])[0] for request in requests]
        check.facts |= {
            "difference": difference(cold, packed),
            "bound": bound,
            "outcomes": [each.cache for each in cold],
        }
        check.facts |= {"users": sum(scored), "prefill_passes": prefills}
        expected = ["miss" if each else "off" for each in scored]
        check.passed = check.facts["difference"] <= bound and check.facts["outcomes"] == expected
    with checks.check(f"{label}: several users share a pass") as check:
        together = session.score_packed(requests)
        check.facts |= {"difference": difference(together, packed), "bound": bound, "prefill_passes": prefills}
        # With the divisor of each request, users share a packed pass only where it is the same.
        shares = session.spec.max_batch == 1 or prefills < sum(scored)
        check.passed = check.facts["difference"] <= bound and shares
    with checks.check(f"{label}: warm equals cold, to the bit") as check:
        warm = session.score(requests)
        check.facts |= {"difference": difference(warm, cold), "outcomes": [each.cache for each in warm]}
        hits = check.facts["outcomes"] == ["hit" if each else "off" for each in scored]
        check.passed = hits and same_bits(warm, cold) and session.stats().prefill_passes == prefills
    with checks.check(f"{label}: one user's pass equals the pass shared with others") as check:
        alone = [session.score([request])[0] for request in reversed(requests)][::-1]
        check.facts |= {"difference": difference(alone, cold), "bound": bound}
        check.passed = check.facts["difference"] <= bound


def _check_shapes(checks: Checks, label: str, session: RankingSession) -> None:
    with checks.check(f"{label}: zero candidates are an empty answer") as check:
        spec = session.spec
        none = request_of(spec, "nothing asked", 5, 0)
        results = [*session.score([none]), *session.score_packed([none]), *session.score([])]
        check.facts["shapes"] = [list(result.preds.shape) for result in results]
        check.passed = check.facts["shapes"] == [[0, len(spec.tasks)]] * 2
    with checks.check(f"{label}: passes are candidates over the micro-batch, rounded up") as check:
        before = session.stats()
        count = min(spec.max_candidates, 3 * spec.micro_batch - 1)
        session.score([request_of(spec, "counted", 9, count)])
        after = session.stats()
        passes = after.score_passes - before.score_passes
        check.facts |= {"candidates": count, "passes": passes}
        check.passed = passes == -(-count // spec.micro_batch) and after.candidates - before.candidates == count


def _packed_beyond(session: RankingSession, request: RankingRequest) -> str:
    """What scoring without the cache says to more candidates than a pass takes: "scored", or the error's code."""
    try:
        session.score_packed([request])
    except RequestError as error:
        return error.code
    return "scored"


def _refused_as_documented(check: Check, spec: RankingSpec) -> bool:
    # A divisor that counts the candidates of a pass cannot be had from parts of them.
    expected = "HSTU-E704" if spec.scaling == "batch" else "scored"
    return bool(check.facts["packed"] == expected)
