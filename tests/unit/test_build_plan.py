"""What a build would do: limits against the model, graphs, and the numbers behind each graph's profile."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu_compile import build_plan, pipeline
from hstu_compile.build_plan import BuildPlan, check_engine_options, plan_build
from hstu_compile.config import BuildConfig
from hstu_compile.environment import BackendChoice
from hstu_compile.errors import UsageError
from hstu_compile.graph_limits import GraphLimits
from hstu_compile.model.ranking_config import RankingConfig
from hstu_compile.profiles import check_counts
from hstu_compile.trt_options import EngineOptions
from tests.dlrm_reference import DlrmForm, dlrm_state_dict
from tests.exported_models import ranking_model, small_config, small_model

FORM = DlrmForm(contextual=(("user_id", 1, 20), ("genres", 3, 5)))


@pytest.fixture(scope="module")
def ranking(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ranking")
    torch.save(dlrm_state_dict(FORM), folder / "ckpt.pt")
    (folder / "config.json").write_text(json.dumps(FORM.user_config()))
    return {"checkpoint": folder / "ckpt.pt", "config_file": folder / "config.json"}


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    config = small_config(num_layers=1)
    path = tmp_path_factory.mktemp("retrieval") / "ckpt.pt"
    state = small_model(config).state_dict()
    torch.save({"format": "hstu-compile/1", "config": config.to_dict(), "state_dict": state}, path)
    return {"checkpoint": path}


def planned(files: dict[str, Path], **settings: Any) -> BuildPlan:
    return plan_build(BuildConfig(**files, backend="onnx", **settings))


def test_a_ranking_model_brings_its_own_limits(ranking: dict[str, Path]) -> None:
    plan = planned(ranking)
    assert plan.graphs == ("packed",)
    limits = plan.limits
    assert (limits.max_batch, limits.opt_batch, limits.max_seq_len, limits.opt_seq_len) == (64, 8, 48, 24)
    assert (limits.max_candidates, limits.micro_batch, limits.contextual_len, limits.top_k) == (24, None, 4, 0)
    assert plan.graph_limits("packed") == GraphLimits("packed", 48, 24, 4)


def test_options_narrow_the_model_as_well_as_the_profile(ranking: dict[str, Path]) -> None:
    plan = planned(ranking, max_seq_len=10, max_candidates=3, max_batch=16, micro_batch=7, opt_seq_len=4, opt_batch=3)
    assert isinstance(plan.spec.config, RankingConfig)
    assert (plan.spec.config.max_history_len, plan.spec.config.max_candidates) == (10, 3)
    assert plan.spec.config.layer.attention.max_seq_len == 4 + 10 + 3
    assert plan.graphs == ("packed", "prefill", "score")
    assert [plan.graph_limits(name) for name in plan.graphs] == [
        GraphLimits("packed", 10, 3, 4),
        GraphLimits("prefill", 10, 0, 4),
        GraphLimits("score", 10, 7, 4, cache_rows=(2**30 - 1) // (2 * 7)),
    ]
    ranges = {name: plan.sizes(name).axis("T") for name in plan.graphs}
    # A packed forward takes each user's candidates, a scoring pass one micro-batch of all users' together.
    assert ranges == {"packed": (1, 4, 48), "prefill": None, "score": (1, 4, 7)}
    assert plan.sizes("score").axis("Lc") == (1, 3 * (4 + 4), 16 * (10 + 4))
    # Our kernels take the whole cache, and a sequence in front of every user's.
    whole = plan.sizes("score", has_kernels=True)
    assert whole.axis("Lc") == (1, 3 * (4 + 4), (2**30 - 1) // (2 * 7))
    assert whole.axis("B_plus_1") == (2, 2 * 3 + 1, 2 * 16 + 1)
    assert plan.sizes("prefill", has_kernels=True) == plan.sizes("prefill")


def test_a_longer_history_than_in_training_is_legal_for_ranking_alone(
    ranking: dict[str, Path], retrieval: dict[str, Path]
) -> None:
    plan = planned(ranking, max_seq_len=5000, max_candidates=300)
    assert (plan.limits.max_seq_len, plan.limits.max_candidates) == (5000, 300)
    assert plan.spec.config.layer.attention.max_seq_len == 4 + 5000 + 300
    with pytest.raises(UsageError, match="--max-seq-len 21 cannot be used"):
        planned(retrieval, max_seq_len=21)


def test_external_tables_leave_the_weights_of_the_tables_out(ranking: dict[str, Path]) -> None:
    inside, outside = planned(ranking), planned(ranking, embeddings="external")
    assert isinstance(outside.spec.config, RankingConfig)
    assert outside.spec.config.external_embeddings
    tables = [name for name in inside.spec.state_dict if name.startswith("tables.")]
    assert len(tables) == 3
    assert set(inside.spec.state_dict) - set(outside.spec.state_dict) == set(tables)


def test_a_retrieval_model_has_one_graph(retrieval: dict[str, Path]) -> None:
    plan = planned(retrieval, top_k=40, max_seq_len=12)
    assert plan.graphs == ("retrieval",)
    assert plan.graph_limits("retrieval") == GraphLimits("retrieval", 12, 0, 0)
    assert plan.spec.config.max_seq_len == 12
    assert plan.sizes("retrieval").axis("L") == (1, 8 * 6, 64 * 12)


def test_incremental_adds_two_graphs_to_a_retrieval_model(retrieval: dict[str, Path]) -> None:
    plan = planned(retrieval, max_append=4, max_batch=16, opt_batch=2)
    assert plan.graphs == ("retrieval", "prefill", "append")
    assert [plan.graph_limits(name) for name in plan.graphs] == [
        GraphLimits("retrieval", 20),
        GraphLimits("prefill", 20),
        GraphLimits("append", 20, max_append=4),
    ]
    assert plan.sizes("append").axis("A") == (1, 2 * 3, 16 * 5)
    assert plan.sizes("retrieval").axis("A") is None
    assert plan.to_dict()["limits"]["max_append"] == 4


@pytest.mark.parametrize(
    ("attention", "why"),
    [
        ({"contextual_seq_len": 2}, "the first 2 rows see the whole history"),
        ({"max_attn_len": 4, "min_full_attn_seq_len": 3}, "the last 3 rows of a history see beyond the window"),
    ],
    ids=["context", "full tail"],
)
def test_a_retrieval_model_whose_rows_see_later_events_is_not_built_incrementally(
    tmp_path: Path, attention: dict[str, Any], why: str
) -> None:
    config = small_config(1, attention)
    state = small_model(config).state_dict()
    torch.save({"format": "hstu-compile/1", "config": config.to_dict(), "state_dict": state}, tmp_path / "ckpt.pt")
    assert planned({"checkpoint": tmp_path / "ckpt.pt"}).graphs == ("retrieval",)
    with pytest.raises(UsageError) as caught:
        planned({"checkpoint": tmp_path / "ckpt.pt"}, max_append=4)
    assert (caught.value.code, caught.value.why) == ("HSTU-E904", why)
    assert caught.value.what == "--incremental max-append=4 cannot be used with this native model"


def test_a_ranking_model_is_not_built_incrementally(ranking: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="positions count back from the query") as caught:
        planned(ranking, max_append=4)
    assert (caught.value.code, caught.value.exit_code) == ("HSTU-E904", 2)
    assert caught.value.what == "--incremental max-append=4 cannot be used with this dlrm_v3 model"
    assert "--m-falcon" in caught.value.fix


RANKING_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"top_k": 1}, "--top-k 1 cannot be used"),
    ({"max_seq_len": 10, "opt_seq_len": 11}, "--opt-seq-len 11 cannot be used"),
    ({"max_batch": 4, "opt_batch": 5}, "--opt-batch 5 cannot be used"),
]
RETRIEVAL_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"top_k": 41}, "--top-k 41 cannot be used"),
    ({"micro_batch": 256}, "--m-falcon micro-batch=256 cannot be used"),
    ({"max_candidates": 10}, "--max-candidates 10 cannot be used"),
    ({"max_append": 12, "max_seq_len": 12}, "--incremental max-append=12 cannot be used"),
]


@pytest.mark.parametrize(("settings", "message"), RANKING_REFUSALS, ids=str)
def test_each_limit_that_a_ranking_model_cannot_have(
    ranking: dict[str, Path], settings: dict[str, Any], message: str
) -> None:
    check_refused(ranking, settings, message)


@pytest.mark.parametrize(("settings", "message"), RETRIEVAL_REFUSALS, ids=str)
def test_each_limit_that_a_retrieval_model_cannot_have(
    retrieval: dict[str, Path], settings: dict[str, Any], message: str
) -> None:
    check_refused(retrieval, settings, message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embeddings": "external"}, "--tabulate-towers and --embeddings external exclude each other"),
        (
            {"precision": "fp16", "quantization": "int8", "calibration": Path("absent.json")},
            "--tabulate-towers and --int8 exclude each other",
        ),
    ],
    ids=["external", "int8"],
)
def test_towers_are_no_tables_where_there_is_none_or_where_their_products_are_quantised(
    ranking: dict[str, Path], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=f"HSTU-E901.*{message}"):
        planned(ranking, tabulate_towers=True, **settings)


def test_towers_are_tables_wherever_they_can_be(ranking: dict[str, Path]) -> None:
    assert planned(ranking).tabulate_towers
    assert not planned(ranking, tabulate_towers=False).tabulate_towers
    assert not planned(ranking, embeddings="external").tabulate_towers


def test_a_retrieval_model_has_no_towers(ranking: dict[str, Path], retrieval: dict[str, Path]) -> None:
    assert planned(ranking).to_dict()["tabulate_towers"] is True
    assert planned(retrieval).to_dict()["tabulate_towers"] is False
    with pytest.raises(UsageError, match=r"HSTU-E901[\s\S]*--tabulate-towers cannot be used[\s\S]*has no towers"):
        planned(retrieval, tabulate_towers=True)


COUNTS = {
    "max_batch": "--max-batch ",
    "opt_batch": "--opt-batch ",
    "max_seq_len": "--max-seq-len ",
    "opt_seq_len": "--opt-seq-len ",
    "max_candidates": "--max-candidates ",
    "micro_batch": "--m-falcon micro-batch=",
    "max_append": "--incremental max-append=",
}


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("field", COUNTS)
def test_a_count_below_one_is_not_taken_for_the_default(
    ranking: dict[str, Path], retrieval: dict[str, Path], field: str, value: int
) -> None:
    for files in (ranking, retrieval):
        check_refused(files, {field: value}, f"{COUNTS[field]}{value} cannot be used")


@pytest.mark.parametrize(("field", "option"), [("top_k", "--top-k"), ("seed", "--seed")])
def test_a_number_below_zero_is_refused(
    ranking: dict[str, Path], retrieval: dict[str, Path], field: str, option: str
) -> None:
    for files in (ranking, retrieval):
        check_refused(files, {field: -1}, f"{option} -1 cannot be used")
        assert planned(files, **{field: 0})


def test_every_wrong_number_is_named_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        planned({"checkpoint": tmp_path / "absent.pt"}, max_batch=0, max_seq_len=-3, micro_batch=0)
    assert caught.value.what == "--max-batch 0, --max-seq-len -3, --m-falcon micro-batch=0 cannot be used"
    assert caught.value.why == "allowed: 1 or more"
    assert (
        "pass --max-seq-len N, or leave it out for the longest history that the model was made for" in caught.value.fix
    )
    assert "pass --m-falcon micro-batch=N, or leave it out" in caught.value.fix


def test_every_option_that_counts_has_words_for_its_absence() -> None:
    for option in [*(each.rstrip() for each in COUNTS.values()), "--top-k", "--seed"]:
        with pytest.raises(UsageError, match=r"leave it out for [a-z0-9]"):
            check_counts({option: -1})


def check_refused(files: dict[str, Path], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        planned(files, **settings)
    assert (caught.value.code, caught.value.exit_code) == ("HSTU-E901", 2)
    assert message in caught.value.what
    assert caught.value.why.startswith("allowed: ")
    assert message.split()[0] in caught.value.fix


def test_the_plan_as_json(ranking: dict[str, Path]) -> None:
    facts = json.loads(json.dumps(planned(ranking, micro_batch=7).to_dict()))
    assert facts["graphs"] == ["packed", "prefill", "score"]
    assert facts["checkpoint"]["dialect"] == "dlrm_v3"
    assert facts["limits"]["micro_batch"] == 7
    assert facts["attention_nodes"] == 2
    assert facts["parameters"] == sum(weight.numel() for weight in ranking_model(FORM).parameters())


@pytest.mark.parametrize(
    ("backend", "version", "asked", "pruned"),
    [
        ("tensorrt", "8.5.3.1", None, False),
        ("tensorrt", "8.5.3.1", True, True),
        ("tensorrt", "10.14.1", None, True),
        ("tensorrt-rtx", None, None, True),
        ("onnx", "8.5.3.1", None, True),
        ("onnx", None, False, False),
    ],
)
def test_a_retrieval_graph_keeps_its_last_layer_for_the_builder_that_crashes_without(
    retrieval: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    version: str | None,
    asked: bool | None,
    pruned: bool,
) -> None:
    monkeypatch.setattr(build_plan, "choose_backend", lambda wanted: BackendChoice(backend, "for this test"))
    monkeypatch.setattr(build_plan, "installed_tensorrt_version", lambda: version)
    plan = planned(retrieval, prune=asked)
    assert plan.prune is pruned
    assert plan.to_dict()["prune_last_layer"] is pruned


def test_a_ranking_graph_is_pruned_for_every_builder(ranking: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_plan, "choose_backend", lambda wanted: BackendChoice("tensorrt", "for this test"))
    monkeypatch.setattr(build_plan, "installed_tensorrt_version", lambda: "8.5.3.1")
    assert planned(ranking).prune
    assert not planned(ranking, prune=False).prune


def test_options_of_the_engine_builder_are_refused_where_no_engine_is_built(
    retrieval: dict[str, Path], tmp_path: Path
) -> None:
    config = BuildConfig(**retrieval, backend="onnx", output=tmp_path / "b.hstu")
    options = EngineOptions(no_tf32=True, timing_cache=Path("t.cache"), max_shapes=(("item_ids", (8,)),))
    with pytest.raises(UsageError) as rehearsed:
        pipeline.rehearse(config, options)
    assert rehearsed.value.code == "HSTU-E901"
    assert rehearsed.value.what == "nothing reads --maxShapes, --timingCacheFile, --noTF32"
    assert "--backend onnx: no engine is built" in rehearsed.value.why
    with pytest.raises(UsageError) as built:
        pipeline.compile_checkpoint(config, options)
    assert str(built.value) == str(rehearsed.value)
    assert not (tmp_path / "b.hstu").exists()
    assert pipeline.rehearse(config, EngineOptions()).backend.name == "onnx"
    with_engine = dataclasses.replace(planned(retrieval), backend=BackendChoice("tensorrt-rtx", "asked for"))
    check_engine_options(with_engine, options)
