"""The stage and the command: statistics of the model's real activations, resumed and merged to the same bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hstu_compile import calibrate as stage
from hstu_compile.__main__ import main
from hstu_compile.calibrate import CalibrationRequest, calibrate
from hstu_compile.calibration.batches import retrieval_batch
from hstu_compile.calibration.observers import OBSERVERS
from hstu_compile.calibration.ranking_batches import ranking_batch
from hstu_compile.calibration.request_layout import offsets_of
from hstu_compile.calibration.site_statistics import SiteStatistics
from hstu_compile.calibration.table import CalibrationTable
from hstu_compile.checkpoint import model_from_spec, spec_from_checkpoint
from hstu_compile.cli import cli
from hstu_compile.errors import CalibrationError, HstuCompileError
from hstu_compile.model.product import product_sites, product_sizes
from tests.dlrm_reference import DlrmForm, dlrm_state_dict
from tests.exported_models import ranking_config, small_config, small_model
from tests.research_reference import (
    ResearchForm,
    draw_histories,
    jagged_inputs,
    reference_activations,
    research_state_dict,
)

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
META_RETRIEVAL, META_RANKING = FIXTURES / "meta_research_ml100k", FIXTURES / "meta_dlrm_ml100k"
needs_retrieval = pytest.mark.skipif(
    not META_RETRIEVAL.is_dir(), reason="../shared/fixtures/meta_research_ml100k is absent"
)
needs_ranking = pytest.mark.skipif(not META_RANKING.is_dir(), reason="../shared/fixtures/meta_dlrm_ml100k is absent")

FORM = ResearchForm()
LENGTHS = [3, 17, 0, 20, 8, 1]


def silent(what: str, done: int, total: int) -> None:
    pass


def save(path: Path, arrays: Mapping[str, Any]) -> Path:
    np.savez(path, **arrays)
    return path


def normed(x: NDArray[Any], eps: float = 1e-6) -> NDArray[Any]:
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps)


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """A checkpoint of Meta's family with random weights, and requests to it."""

    checkpoint: Path
    config: Path
    data: Path
    folder: Path

    def request(self, **changes: Any) -> CalibrationRequest:
        values = {
            "checkpoint": self.checkpoint,
            "output": self.folder / "table.json",
            "data": (self.data,),
            "config_file": self.config,
            **changes,
        }
        return CalibrationRequest(**values)


@pytest.fixture
def retrieval(tmp_path: Path) -> Retrieval:
    checkpoint, config = tmp_path / "ckpt.pt", tmp_path / "config.json"
    torch.save({"model_state_dict": research_state_dict(FORM)}, checkpoint)
    config.write_text(json.dumps(FORM.user_config()))
    arrays = {name: tensor.numpy() for name, tensor in jagged_inputs(draw_histories(FORM, LENGTHS), False).items()}
    return Retrieval(checkpoint, config, save(tmp_path / "feeds.npz", arrays), tmp_path)


@pytest.fixture
def ranking(tmp_path: Path) -> Retrieval:
    form = DlrmForm()
    checkpoint, config = tmp_path / "ckpt.pt", tmp_path / "config.json"
    torch.save(dlrm_state_dict(form), checkpoint)
    config.write_text(json.dumps(form.user_config()))
    batch = ranking_batch("", ranking_config(form), [3, 0, 12, 7], [2, 3, 0, 4], 0)
    return Retrieval(checkpoint, config, save(tmp_path / "feeds.npz", batch.arrays), tmp_path)


def test_statistics_are_those_of_the_family_written_down_once_more(retrieval: Retrieval) -> None:
    """What goes into the first product of a layer is its input, normed: computed here in float64, user by user."""
    result = calibrate(retrieval.request(), silent)
    state = research_state_dict(FORM)
    activations = [reference_activations(FORM, state, history) for history in draw_histories(FORM, LENGTHS)]
    for index in range(FORM.num_blocks):
        rows = normed(np.concatenate([layers[index] for layers in activations if len(layers[index])]))
        site = result.table.sites[f"layers.{index}.uvqk"]
        assert site.rows == sum(LENGTHS) == len(rows)
        np.testing.assert_allclose(site.channel_amax, np.abs(rows).max(axis=0), rtol=1e-4)
        # Bin by bin, but for values that rounding moved over an edge.
        expected = SiteStatistics.of("", rows.astype(np.float32), 1).histogram
        assert expected.exponent == site.histogram.exponent
        moved = np.abs(np.cumsum(expected.counts) - np.cumsum(site.histogram.counts)).max()
        assert moved <= 3
        assert site.histogram.total == rows.size


def test_every_product_of_a_ranking_model_is_counted_with_the_rows_that_it_took(ranking: Retrieval) -> None:
    result = calibrate(ranking.request(), silent)
    form = DlrmForm()
    events, candidates, users = 3 + 0 + 12 + 7, 2 + 3 + 0 + 4, 4
    model = model_from_spec(spec_from_checkpoint(ranking.checkpoint, form.user_config()))
    assert {name: (site.inputs, site.outputs) for name, site in result.table.sites.items()} == product_sizes(model)
    rows = {name: site.rows for name, site in result.table.sites.items()}
    assert rows["content_mlp.hidden"] == events + candidates
    # The action of the candidates is one more row of each of the four batches.
    assert rows["action_mlp.hidden"] == events + users
    assert rows["contextual.0"] == users
    assert rows["layers.0.uvqk"] == rows["layers.1.output"] == events + candidates + users
    assert rows["item_mlp.hidden"] == rows["head.output"] == candidates


def test_the_table_names_its_checkpoint_and_its_data(retrieval: Retrieval) -> None:
    result = calibrate(retrieval.request(samples=4, seed=3, observer="mse"), silent)
    table = CalibrationTable.load(retrieval.folder / "table.json")
    assert table == result.table
    spec = spec_from_checkpoint(retrieval.checkpoint, FORM.user_config())
    table.require(spec.sha256, "research", spec.config.to_dict(), product_sizes(model_from_spec(spec)))
    assert (table.observer, table.dialect, table.samples) == ("mse", "research", 4)
    [data] = table.data
    assert (data.file, data.requests, data.samples, data.seed) == ("feeds.npz", 6, 4, 3)
    assert not result.warnings or "only 4 requests" in result.warnings[0]


def test_hooks_are_gone_afterwards_and_values_pass_unchanged(retrieval: Retrieval, monkeypatch: Any) -> None:
    models = []

    def kept(spec: Any) -> Any:
        models.append(model_from_spec(spec))
        return models[-1]

    monkeypatch.setattr(stage, "model_from_spec", kept)
    calibrate(retrieval.request(), silent)
    assert not any(site.module._forward_pre_hooks for site in product_sites(models[0]).values())


def test_two_shards_merge_to_the_table_of_both_files(retrieval: Retrieval) -> None:
    second = {name: t.numpy() for name, t in jagged_inputs(draw_histories(FORM, [5, 11], seed=9), False).items()}
    other = save(retrieval.folder / "second.npz", second)
    parts = [retrieval.folder / "a.json", retrieval.folder / "b.json"]
    for path, data in zip(parts, (retrieval.data, other), strict=True):
        calibrate(retrieval.request(data=(data,), output=path), silent)
    merged = calibrate(retrieval.request(data=(), merge=tuple(parts)), silent).table
    both = calibrate(retrieval.request(data=(retrieval.data, other)), silent).table
    added = calibrate(retrieval.request(data=(other,), merge=(parts[0],)), silent).table
    assert merged.data == both.data == added.data
    for name, site in both.sites.items():
        for table in (merged, added):
            assert table.sites[name].rows == site.rows
            # Batches are others, so products round otherwise; merging itself is exact.
            np.testing.assert_allclose(table.sites[name].channel_amax, site.channel_amax, rtol=1e-5)
    assert added.sites == merged.sites


def test_a_table_of_another_checkpoint_is_not_merged(retrieval: Retrieval) -> None:
    path = retrieval.folder / "old.json"
    calibrate(retrieval.request(output=path), silent)
    torch.save({"model_state_dict": research_state_dict(FORM, seed=1)}, retrieval.checkpoint)
    with pytest.raises(CalibrationError, match="stale") as caught:
        calibrate(retrieval.request(merge=(path,)), silent)
    assert caught.value.code == "HSTU-E813"
    assert not (retrieval.folder / "table.json").exists()


def test_the_same_data_is_not_counted_twice(retrieval: Retrieval) -> None:
    path = retrieval.folder / "first.json"
    calibrate(retrieval.request(output=path), silent)
    with pytest.raises(CalibrationError, match=r"feeds\.npz and feeds\.npz have the same content"):
        calibrate(retrieval.request(merge=(path,)), silent)


def many_batches(folder: Path) -> CalibrationRequest:
    """A ranking model takes each request alone: as many batches as requests."""
    form = DlrmForm()
    torch.save(dlrm_state_dict(form), folder / "ckpt.pt")
    (folder / "config.json").write_text(json.dumps(form.user_config()))
    batch = ranking_batch("", ranking_config(form), [3] * 80, [2] * 80, 0)
    data = save(folder / "feeds.npz", batch.arrays)
    return CalibrationRequest(folder / "ckpt.pt", folder / "table.json", (data,), config_file=folder / "config.json")


class StopError(Exception):
    """What an interrupt is in a test."""


def interrupted(request: CalibrationRequest, after: int) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done == after:
            raise StopError

    with pytest.raises(StopError):
        calibrate(request, stop)


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    request = many_batches(tmp_path)
    calibrate(request, silent)
    whole = request.output.read_bytes()
    for after in (10, 32, 70):
        request.output.unlink()
        interrupted(request, after)
        assert not request.output.exists()
        counted: list[int] = []
        result = calibrate(
            dataclasses.replace(request, resume=True), lambda what, done, total, seen=counted: seen.append(done)
        )
        assert request.output.read_bytes() == whole, after
        assert result.resumed_requests == after // 32 * 32
        assert counted == list(range(result.resumed_requests + 1, 81))
        assert not request.partial.exists()


def test_without_resume_an_interrupted_run_begins_again(tmp_path: Path) -> None:
    request = many_batches(tmp_path)
    interrupted(request, 40)
    assert request.partial.exists()
    assert calibrate(request, silent).resumed_requests == 0
    assert not request.partial.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": 1, "samples": 70}, "data, batches differ"), ({"samples": 60}, "data, batches differ")],
)
def test_another_task_is_not_gone_on_with(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    request = many_batches(tmp_path)
    interrupted(request, 40)
    with pytest.raises(CalibrationError, match=message) as caught:
        calibrate(dataclasses.replace(request, resume=True, **change), silent)
    assert caught.value.code == "HSTU-E816"


def test_a_damaged_partial_table_is_refused_and_is_no_table(tmp_path: Path) -> None:
    request = many_batches(tmp_path)
    interrupted(request, 40)
    with pytest.raises(CalibrationError, match="calibration-partial-2"):
        CalibrationTable.load(request.partial)
    request.partial.write_bytes(request.partial.read_bytes()[:-200])
    with pytest.raises(CalibrationError, match="truncated") as caught:
        calibrate(dataclasses.replace(request, resume=True), silent)
    assert caught.value.code == "HSTU-E816"


@pytest.mark.parametrize("layer", [0, 1])
def test_an_activation_that_is_not_finite_is_named(tmp_path: Path, layer: int) -> None:
    """Weights are finite, what they make of a request is not."""
    model = small_model(small_config())
    with torch.no_grad():
        # The largest finite float32 in one column of the projection overflows the residual stream behind the layer.
        model.layers[layer].uvqk_weight.fill_(3e38)
    checkpoint = tmp_path / "ckpt.pt"
    content = {"format": "hstu-compile/1", "model_state_dict": model.state_dict()}
    torch.save({**content, "config": model.config.to_dict()}, checkpoint)
    data = save(tmp_path / "feeds.npz", retrieval_batch("", model.config, [4, 5], 0).arrays)
    with pytest.raises(CalibrationError) as caught:
        calibrate(CalibrationRequest(checkpoint, tmp_path / "table.json", (data,)), silent)
    assert caught.value.code == "HSTU-E811"
    assert caught.value.context["site"] == f"layers.{layer}.output"
    assert "feeds.npz" in caught.value.why
    assert caught.value.context["nan"] + caught.value.context["infinite"] > 0
    assert list(tmp_path.glob("table.json*")) == []


def test_requests_that_leave_a_product_idle_are_refused(ranking: Retrieval) -> None:
    batch = ranking_batch("", ranking_config(DlrmForm()), [3, 4], [0, 0], 0)
    data = save(ranking.folder / "no_candidates.npz", batch.arrays)
    with pytest.raises(
        CalibrationError, match=r"no row of activations went into .*item_mlp\.hidden, item_mlp\.output"
    ) as caught:
        calibrate(ranking.request(data=(data,)), silent)
    assert caught.value.code == "HSTU-E810"


def test_requests_with_embedding_rows_calibrate_the_same_products(ranking: Retrieval) -> None:
    form = DlrmForm()
    config = ranking_config(form, external_embeddings=True)
    batch = ranking_batch("", config, [3, 4], [2, 2], 0)
    data = save(ranking.folder / "rows.npz", batch.arrays)
    result = calibrate(ranking.request(data=(data,), external_embeddings=True), silent)
    content = np.concatenate([batch.arrays["movie_id"], batch.arrays["item_movie_id"]])
    site = result.table.sites["content_mlp.hidden"]
    assert site == SiteStatistics.of("content_mlp.hidden", content, form.hidden)


# --- The command ----------------------------------------------------------------------------------------------------


def command(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["calibrate", *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


def test_the_command_writes_a_table_and_prints_every_bound(retrieval: Retrieval) -> None:
    output = retrieval.folder / "table.json"
    options = ("--config", retrieval.config, "--data", retrieval.data, "-o", output)
    code, out, err = command(retrieval.checkpoint, *options)
    assert code == 0
    table = CalibrationTable.load(output)
    lines = out.splitlines()
    assert lines[0].split() == ["INT8", "bounds", "rows", *OBSERVERS]
    for line, (name, site) in zip(lines[1:], table.sites.items(), strict=False):
        assert line.split() == [name, str(site.rows), *(f"{site.bound(each, 'int8'):.4g}" for each in OBSERVERS)]
    assert lines[-1] == f"{output}  6 requests, observer {stage.DEFAULT_OBSERVER}"
    assert "warning: there are only 6 requests" in err

    code, out, _ = command(retrieval.checkpoint, *options, "--json", "--observer", "entropy")
    facts = json.loads(out)
    assert code == 0
    assert facts["observer"] == CalibrationTable.load(output).observer == "entropy"
    assert facts["warnings"]
    for name, site in table.sites.items():
        assert facts["sites"][name]["bounds"]["fp8"]["mse"] == site.bound("mse", "fp8")


def test_the_command_offers_the_observers_there_are() -> None:
    [option] = [each for each in cli.commands["calibrate"].params if each.name == "observer"]
    assert tuple(option.type.choices) == OBSERVERS  # type: ignore[attr-defined]
    assert f"default: {stage.DEFAULT_OBSERVER}" in option.help  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "code", "seen"),
    [
        ((), 2, "neither --data nor --merge"),
        (("--data", "feeds.npz", "--samples", "1"), 2, "--samples is at least 2"),
        (("--data", "feeds.npz", "--seed", "-1"), 2, "--seed at least 0"),
        (("--data", "feeds.npz", "--observer", "median"), 2, "median"),
        (("--data", "none.npz"), 7, "HSTU-E706"),
        (("--data", "ranking.npz"), 7, "look like requests to a ranking model"),
        (("--data", "one.npz"), 7, "has 1 request; at least 2"),
        (("--data", "empty.npz"), 7, "has 0 requests"),
        (("--data", "feeds.npz", "--data", "copy.npz"), 7, "feeds.npz and copy.npz have the same content"),
        (("--merge", "config.json"), 7, "HSTU-E812"),
        (("--data", "feeds.npz", "--dialect", "dlrm_v3"), 3, "HSTU-E104"),
    ],
)
def test_the_command_refuses_what_it_cannot_use(
    retrieval: Retrieval, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, seen: str
) -> None:
    monkeypatch.chdir(retrieval.folder)
    config = spec_from_checkpoint(retrieval.checkpoint, FORM.user_config()).config
    save(Path("one.npz"), retrieval_batch("", config, [4], 0).arrays)  # type: ignore[arg-type]
    save(Path("empty.npz"), retrieval_batch("", config, [], 0).arrays)  # type: ignore[arg-type]
    save(Path("ranking.npz"), ranking_batch("", ranking_config(DlrmForm()), [3, 3], [2, 2], 0).arrays)
    Path("copy.npz").write_bytes(Path("feeds.npz").read_bytes())
    exit_code, out, err = command("ckpt.pt", "--config", "config.json", "-o", "table.json", *arguments)
    assert (exit_code, out) == (code, "")
    assert seen in err
    assert "Traceback" not in err
    assert not Path("table.json").exists()


@pytest.mark.parametrize("output", ["ckpt.pt", "feeds.npz", "config.json"])
def test_a_table_does_not_overwrite_what_it_is_made_of(
    retrieval: Retrieval, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.chdir(retrieval.folder)
    before = Path(output).read_bytes()
    exit_code, _, err = command("ckpt.pt", "--config", "config.json", "--data", "feeds.npz", "-o", output)
    assert exit_code == 2
    assert f"{output} is not written" in err
    assert Path(output).read_bytes() == before


def test_an_interrupted_command_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = many_batches(tmp_path)
    counted = 0

    def interrupt(self: Any, what: str, done: int, total: int) -> None:
        nonlocal counted
        counted += 1
        if counted == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr("hstu_compile.cli._Console.stage_progress", interrupt)
    options = ("--config", request.config_file, "--data", *request.data, "-o", request.output)
    code, _, err = command(request.checkpoint, *options)
    assert code == 130
    assert f"{request.partial} keeps what was counted: repeat with --resume" in err
    code, out, _ = command(request.checkpoint, *options, "--resume")
    assert code == 0
    assert "80 requests, 32 of them before it was interrupted" in out


# --- Meta's checkpoints on MovieLens-100K ---------------------------------------------------------------------------


def golden_feeds(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    lengths = arrays["past_lengths"]
    inside = np.arange(arrays["past_ids"].shape[1]) < lengths[:, None]
    return {
        "item_ids": arrays["past_ids"][inside],
        "timestamps": arrays["timestamps"][inside],
        "seq_offsets": offsets_of(lengths),
        "request_timestamps": arrays["timestamps"][np.arange(len(lengths)), lengths],
    }


@needs_retrieval
def test_statistics_of_metas_retrieval_checkpoint_are_those_of_the_original_code(tmp_path: Path) -> None:
    with np.load(META_RETRIEVAL / "golden.npz") as file:
        golden = dict(file)
    data = save(tmp_path / "golden.npz", golden_feeds(golden))
    request = CalibrationRequest(
        META_RETRIEVAL / "ckpt.pt", tmp_path / "table.json", (data,), config_file=META_RETRIEVAL / "config.json"
    )
    result = calibrate(request, silent)
    assert result.table.dialect == "research"
    for index in range(2):
        rows = normed(golden[f"layer_{index}"].astype(np.float64))
        site = result.table.sites[f"layers.{index}.uvqk"]
        assert site.rows == len(rows)
        np.testing.assert_allclose(site.channel_amax, np.abs(rows).max(axis=0), rtol=1e-4)
    # Sixteen real users are few, and neither constant nor random.
    assert len(result.warnings) == 1
    assert "only 16 requests" in result.warnings[0]


@needs_ranking
def test_metas_ranking_checkpoint_calibrates_on_its_own_batches(tmp_path: Path) -> None:
    with np.load(META_RANKING / "golden.npz") as file:
        golden = dict(file)
    files = []
    for batch in "abc":
        arrays = {name: golden[f"{batch}.uih.{name}"] for name in ("movie_id", "action_timestamp", "item_weights")}
        arrays |= {name: golden[f"{batch}.cand.{name}"] for name in ("item_movie_id", "item_query_time")}
        arrays["user_id"] = golden[f"{batch}.uih.user_id"]
        arrays["seq_offsets"] = offsets_of(golden[f"{batch}.uih_lengths"])
        arrays["candidate_offsets"] = offsets_of(golden[f"{batch}.num_candidates"])
        files.append(save(tmp_path / f"{batch}.npz", arrays))
    request = CalibrationRequest(
        META_RANKING / "ckpt.pt", tmp_path / "table.json", tuple(files), config_file=META_RANKING / "config.json"
    )
    table = calibrate(request, silent).table
    assert [data.requests for data in table.data] == [8, 5, 2]
    assert table.sites["layers.2.uvqk"].rows == 788 + 576 + 119 + 244 + 35 + 128 + 15
    assert table.sites["item_mlp.hidden"].rows == 244 + 35 + 128
    # What the head multiplies is written down in the golden file. There users of a batch share a divisor, which is
    # that of the longest; here each has its own, and the norm behind it takes most of the difference away again.
    products = np.concatenate(
        [golden[f"{b}.candidates_user_embeddings"] * golden[f"{b}.candidates_item_embeddings"] for b in "abc"]
    )
    seen = np.array(table.sites["head.hidden"].channel_amax)
    differences = np.abs(seen / np.abs(products).max(axis=0) - 1)
    assert differences.max() < 0.2
    assert np.median(differences) < 0.01


@needs_retrieval
def test_a_thousand_real_requests_take_seconds_and_raise_no_warning(tmp_path: Path) -> None:
    import prepare_data

    try:
        histories = prepare_data.load_histories(prepare_data.fetch())
    except prepare_data.DataError as error:
        pytest.skip(f"MovieLens-100K: {error}")
    (batch,) = prepare_data.evaluation_feeds(histories, batch_size=histories.num_users)
    data = save(tmp_path / "ml100k.npz", {**batch.feeds, "target_ids": batch.target_ids})
    request = CalibrationRequest(
        META_RETRIEVAL / "ckpt.pt", tmp_path / "table.json", (data,), config_file=META_RETRIEVAL / "config.json"
    )
    started = time.process_time()
    result = calibrate(request, silent)
    assert result.warnings == ()
    assert result.table.samples == 943
    assert result.table.sites["layers.0.uvqk"].rows == len(batch.feeds["item_ids"])
    # 2 to 4 s of one core; ten times that would mean that histograms are no longer counted in one go.
    assert time.process_time() - started < 40


def test_refusals_are_user_errors() -> None:
    assert issubclass(CalibrationError, HstuCompileError)
    assert CalibrationError.exit_code == 7
