"""The calibration table: exact merging, a readable file that reads back, and every refusal by name."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from hstu_compile.calibration.observers import OBSERVERS, QUANTIZATIONS
from hstu_compile.calibration.sealed_json import write_sealed
from hstu_compile.calibration.site_statistics import SiteStatistics
from hstu_compile.calibration.table import CalibrationData, CalibrationTable
from hstu_compile.errors import CalibrationError

SHA = "a" * 64
CONFIG = {"num_layers": 1, "layer": {"epsilon": 1e-6, "attention": {"max_seq_len": 200, "silu": "exact"}}}
SIZES = {"layers.0.uvqk": (6, 16), "layers.0.output": (4, 6)}
ROWS = arrays(np.float32, st.tuples(st.integers(0, 7), st.just(3)), elements=st.floats(-100, 100, width=32))


def activations(seed: int, inputs: int, rows: int = 50) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, inputs)).astype(np.float32)


def table(seed: int = 0, **changes: Any) -> CalibrationTable:
    sites = {name: SiteStatistics.of(name, activations(seed, i), o) for name, (i, o) in SIZES.items()}
    data = (CalibrationData(f"feeds{seed}.npz", f"{seed:064d}", 90, 50, seed),)
    return dataclasses.replace(CalibrationTable(SHA, "research", CONFIG, "percentile", data, sites), **changes)


@given(ROWS, ROWS, ROWS)
def test_statistics_of_parts_add_up_to_those_of_the_whole(
    a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]
) -> None:
    whole = SiteStatistics.of("s", np.concatenate([a, b, c]), 5)
    x, y, z = (SiteStatistics.of("s", part, 5) for part in (a, b, c))
    assert x.merged(y).merged(z) == x.merged(y.merged(z)) == z.merged(y).merged(x) == whole
    assert whole.merged(SiteStatistics.empty("s", 3, 5)) == whole
    together = np.abs(np.concatenate([a, b, c]))
    assert whole.channel_amax == tuple(together.max(axis=0, initial=0).tolist())
    assert (whole.rows, whole.amax) == (len(together), float(together.max(initial=0)))


def test_different_products_do_not_merge() -> None:
    one = SiteStatistics.of("s", activations(0, 3), 5)
    for other in (SiteStatistics.of("t", activations(0, 3), 5), SiteStatistics.of("s", activations(0, 3), 6)):
        with pytest.raises(ValueError, match="different products"):
            one.merged(other)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_statistics_of_what_is_not_finite_are_refused(bad: float) -> None:
    values = activations(0, 3)
    values[7, 1] = bad
    with pytest.raises(ValueError, match=r"NaN or an infinity|not finite"):
        SiteStatistics.of("s", values, 5)


def test_bounds_are_those_of_the_site_and_of_the_tables_own_observer() -> None:
    one = table(observer="mse")
    for name, site in one.sites.items():
        assert one.bound(name, None, "int8") == site.bound("mse", "int8") == one.bound(name, "mse", "int8")
        for observer in OBSERVERS:
            for quantization in QUANTIZATIONS:
                assert 0 < one.bound(name, observer, quantization) <= site.amax
        assert one.bound(name, "amax", "fp8") == site.amax
    assert one.bound("layers.0.uvqk", "mse", "int8") != one.bound("layers.0.uvqk", "mse", "fp8")
    with pytest.raises(KeyError, match=r"layers\.7"):
        one.bound("layers.7.uvqk", None, "int8")


def test_a_table_reads_back_and_writes_the_same_bytes(tmp_path: Path) -> None:
    one = table()
    one.save(tmp_path / "a.json")
    again = CalibrationTable.load(tmp_path / "a.json")
    assert again == one
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_table_is_readable(tmp_path: Path) -> None:
    """Provenance first, a line for every fact, and one line for a histogram however many bins it has."""
    table().save(tmp_path / "a.json")
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert lines[1:17] == [
        ' "format": "hstu-compile/calibration-2",',
        f' "checkpoint_sha256": "{SHA}",',
        ' "dialect": "research",',
        ' "config": {',
        '  "num_layers": 1,',
        '  "layer": {',
        '   "epsilon": 1e-06,',
        '   "attention": {',
        '    "max_seq_len": 200,',
        '    "silu": "exact"',
        "   }",
        "  }",
        " },",
        ' "observer": "percentile",',
        ' "samples": 50,',
        ' "data": [',
    ]
    assert json.loads(lines[17]) == {
        "file": "feeds0.npz",
        "sha256": "0" * 64,
        "requests": 90,
        "samples": 50,
        "seed": 0,
    }
    assert sum('"counts"' in line for line in lines) == len(SIZES)
    assert len(lines) < 60


def test_tables_of_shards_merge_to_the_table_of_all(tmp_path: Path) -> None:
    parts = [table(seed) for seed in range(3)]
    merged = CalibrationTable.merged(parts)
    for name, (inputs, outputs) in SIZES.items():
        rows = np.concatenate([activations(seed, inputs) for seed in range(3)])
        assert merged.sites[name] == SiteStatistics.of(name, rows, outputs)
    assert [data.file for data in merged.data] == ["feeds0.npz", "feeds1.npz", "feeds2.npz"]
    assert merged.samples == 150
    two_steps = CalibrationTable.merged([CalibrationTable.merged(parts[:2]), parts[2]])
    assert two_steps == merged == CalibrationTable.merged([merged])
    assert CalibrationTable.merged(parts, "entropy").observer == "entropy"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: table(1, checkpoint_sha256="b" * 64), "tables 1 and 2 are of different checkpoints"),
        (lambda: table(1, dialect="native"), "different families"),
        (lambda: table(1, config={**CONFIG, "num_layers": 2}), "configurations(?s:.*)num_layers 1, num_layers 2"),
        (lambda: table(1, sites={"layers.0.uvqk": table(1).sites["layers.0.uvqk"]}), r"only one.*layers.0.output"),
        (lambda: table(1, observer="mse"), "mse, percentile"),
        (lambda: table(0), "feeds0.npz and feeds0.npz have the same content"),
    ],
)
def test_tables_that_do_not_belong_together_are_refused(other: Callable[[], CalibrationTable], message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        CalibrationTable.merged([table(0), other()])
    assert caught.value.code == "HSTU-E815"


def test_a_table_of_this_model_is_accepted() -> None:
    table().require(SHA, "research", CONFIG, SIZES)
    table().require(SHA, "research", {**CONFIG, "external_embeddings": True}, SIZES)


def test_a_table_made_with_another_configuration_is_refused_by_name() -> None:
    other = {"num_layers": 1, "layer": {"epsilon": 1e-5, "attention": {"max_seq_len": 200}}, "more": [1, 2]}
    with pytest.raises(CalibrationError, match="another configuration") as caught:
        table().require(SHA, "research", other, SIZES)
    assert caught.value.code == "HSTU-E813"
    assert caught.value.why == (
        "layer.epsilon is 1e-06 in the table and 1e-05 here, "
        'layer.attention.silu is "exact" in the table and absent here, more is absent in the table and [1, 2] here'
    )
    assert "--config" in caught.value.fix


def test_a_table_of_the_first_form_is_refused_with_the_reason(tmp_path: Path) -> None:
    """Such a table was accepted with any --config: it does not say which one it was made with."""
    values = {name: value for name, value in table().to_dict().items() if name != "config"}
    write_sealed(tmp_path / "old.json", "hstu-compile/calibration-1", values)
    with pytest.raises(CalibrationError, match=r"calibration-1'(?s:.*)configuration(?s:.*)calibration-2") as caught:
        CalibrationTable.load(tmp_path / "old.json")
    assert caught.value.code == "HSTU-E812"
    assert "hstu-compile calibrate" in caught.value.fix


@pytest.mark.parametrize(
    ("sha", "dialect", "sites", "code", "message"),
    [
        ("b" * 64, "research", SIZES, "HSTU-E813", f"stale(?s:.*){SHA}(?s:.*){'b' * 64}"),
        (SHA, "dlrm_v3", SIZES, "HSTU-E813", "family research, the checkpoint is of dlrm_v3"),
        (SHA, "research", {**SIZES, "layers.1.uvqk": (6, 16)}, "HSTU-E814", r"missing: layers\.1\.uvqk"),
        (SHA, "research", {"layers.0.uvqk": (6, 16)}, "HSTU-E814", r"extra: layers\.0\.output"),
        (
            SHA,
            "research",
            {**SIZES, "layers.0.output": (8, 6)},
            "HSTU-E814",
            r"layers\.0\.output is \[4, 6\] in the table and \[8, 6\] in the model",
        ),
    ],
)
def test_a_table_of_another_model_is_refused(
    sha: str, dialect: str, sites: dict[str, tuple[int, int]], code: str, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        table().require(sha, dialect, CONFIG, sites)
    assert caught.value.code == code


def test_all_faults_of_the_products_are_told_at_once() -> None:
    sites = {"layers.0.uvqk": (7, 16), **{f"layers.{index}.output": (4, 6) for index in range(1, 20)}}
    with pytest.raises(CalibrationError) as caught:
        table().require(SHA, "research", CONFIG, sites)
    assert "missing: layers.1.output" in caught.value.why
    assert "and 9 more" in caught.value.why
    assert "extra: layers.0.output" in caught.value.why
    assert "layers.0.uvqk is" in caught.value.why
    assert len(caught.value.context["missing"]) == 19


def site(values: dict[str, Any]) -> dict[str, Any]:
    inner: dict[str, Any] = values["sites"]["layers.0.uvqk"]
    return inner


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a larger amax": (lambda v: site(v).update(amax=9.0), r"site layers\.0\.uvqk: amax is 9\.0"),
    "a larger channel": (
        lambda v: (site(v).update(amax=9.0), site(v)["channel_amax"].__setitem__(0, 9.0)),
        "not in the last bin",
    ),
    "a channel less": (lambda v: site(v)["channel_amax"].pop(0), "5 numbers for 6 inputs"),
    "a count more": (lambda v: site(v)["histogram"]["counts"].__setitem__(0, 10**6), "50 rows of 6 have 300"),
    "rows": (lambda v: site(v).update(rows=51), "51 rows of 6 have 306"),
    "NaN": (lambda v: site(v).update(channel_amax=[float("nan")] * 6), "not finite"),
    "an infinite amax": (lambda v: site(v)["channel_amax"].__setitem__(0, float("inf")), "not finite"),
    "a word": (lambda v: site(v).update(amax="large"), "must be numbers"),
    "a site less": (lambda v: v["sites"].pop("layers.0.uvqk"), "changed after it was written"),
    "a site renamed": (
        lambda v: v["sites"].update({"layers.9.uvqk": v["sites"].pop("layers.0.uvqk")}),
        "changed after it was written",
    ),
    "the checkpoint": (lambda v: v.update(checkpoint_sha256="b" * 64), "changed after it was written"),
    "the samples": (lambda v: v.update(samples=51), "samples is 51 and its data have 50"),
    "the digest": (lambda v: v.update(sha256="0" * 64), "does not have the sha256 '0000"),
    "the observer": (lambda v: v.update(observer="median"), "observer is 'median'"),
    "a field less": (lambda v: v.pop("dialect"), "dialect is missing"),
    "a field more": (lambda v: v.update(note="mine"), "note is unknown"),
    "a field of a site": (lambda v: site(v).pop("rows"), r"site layers\.0\.uvqk: rows is missing"),
    "data that is a number": (lambda v: v.update(data=[3]), "expected an object, found '3'"),
    "sites that are a list": (lambda v: v.update(sites=[]), "list"),
    "another version": (lambda v: v.update(format="hstu-compile/calibration-3"), "calibration-3"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_table_is_refused(tmp_path: Path, edit: str) -> None:
    path = tmp_path / "table.json"
    table().save(path)
    values = json.loads(path.read_text())
    EDITS[edit][0](values)
    path.write_text(json.dumps(values))
    with pytest.raises(CalibrationError, match=EDITS[edit][1]) as caught:
        CalibrationTable.load(path)
    assert caught.value.code == "HSTU-E812"
    assert str(path) in caught.value.what


def test_white_space_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4, sort_keys=True))
    assert CalibrationTable.load(path).sites == table().sites


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_table_is_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "table.json"
    table().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CalibrationError, match="truncated or not JSON") as caught:
        CalibrationTable.load(path)
    assert caught.value.code == "HSTU-E812"


@pytest.mark.parametrize(
    ("content", "message"), [(b"[1]", "a list"), (b"7", "a int"), (b"{}", "None"), (b"\xff\xfe", "JSON")]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        CalibrationTable.load(path)


def test_an_absent_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=re.escape(str(tmp_path / "none.json"))):
        CalibrationTable.load(tmp_path / "none.json")
    with pytest.raises(CalibrationError, match="directory"):
        CalibrationTable.load(tmp_path)
