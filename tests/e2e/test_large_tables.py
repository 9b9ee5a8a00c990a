"""Bundles whose tables are files of their own: what lies in them, what is refused, and a table beyond 2 GiB."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from hstu_compile import table_files
from hstu_compile.bundle import load_bundle
from hstu_compile.files import writing_to
from hstu_compile.polygraphy_files import load_feeds
from hstu_compile.runtime.onnxruntime_session import OnnxRuntimeSession
from hstu_compile.table_files import read_model, table_names
from tests.dlrm_reference import DlrmForm
from tests.e2e.conftest import CommandResult, hstu_compile, save_checkpoint, save_ranking_checkpoint
from tests.e2e.test_bundle_files import manifest_of, rehash
from tests.exported_models import small_config
from tests.large_tables import with_tables_inside

pytestmark = pytest.mark.e2e

TABLES = {"tables.0.bin", "tables.1.bin"}
GRAPHS = ("model.onnx", "prefill.onnx", "score.onnx")


@pytest.fixture(scope="module")
def ranking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ranking bundle of three graphs that share two tables, and its intermediate graphs beside it."""
    folder = tmp_path_factory.mktemp("tables")
    # Small beside its tables: three graphs are traced.
    form = DlrmForm(num_layers=1, action_weights=(), postprocessor="l2_norm")
    checkpoint, config = save_ranking_checkpoint(folder, form)
    with pytest.MonkeyPatch.context() as patch:
        # 40 rows of 6 float16.
        patch.setattr(table_files, "TABLE_BYTES", 480)
        built = hstu_compile(
            *("build", checkpoint, "--config", config, "-o", folder / "b.hstu", "--fp16", "--backend", "onnx"),
            *("--m-falcon", "micro-batch=4", "--keep-intermediates", folder / "kept"),
        )
    assert built.exit_code == 0, built.stderr
    return folder / "b.hstu"


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "TABLE_BYTES", 480)


@pytest.fixture
def copy_of(ranking: Path, tmp_path: Path) -> Path:
    """The bundle, to be damaged."""
    return Path(shutil.copytree(ranking, tmp_path / "copy.hstu"))


def checked(bundle: Path) -> CommandResult:
    return hstu_compile("verify", bundle)


def test_all_graphs_of_a_bundle_name_one_file_a_table(ranking: Path) -> None:
    manifest = manifest_of(ranking)
    found = {entry["onnx"]: set(entry["tables"]) for entry in manifest["graphs"]}
    assert set(found) == set(GRAPHS)
    for file, tables in found.items():
        assert set(table_names(onnx.load(ranking / file, load_external_data=False))) == tables
    # Who is asked about is no candidate: the scoring graph looks nobody up.
    assert found["model.onnx"] >= TABLES
    assert found["prefill.onnx"] >= TABLES
    assert "tables.0.bin" in found["score.onnx"]
    assert {name for name in manifest["files"] if name.endswith(".bin")} == set().union(*found.values())
    report = json.loads((ranking / "report.json").read_text())
    assert {entry["name"] for entry in report["files"]} >= TABLES


def test_it_is_verified_again_from_its_own_files(ranking: Path, patched: None) -> None:
    done = checked(ranking)
    assert done.exit_code == 0, done.stderr
    assert "polygraphy run model.onnx --onnxrt" in done.stdout


def test_it_answers_as_the_same_graphs_in_one_file(ranking: Path, patched: None) -> None:
    stored = json.loads((ranking / "manifest.json").read_text())["graphs"][0]
    whole = with_tables_inside(read_model(ranking / stored["onnx"]), ranking)
    with load_bundle(ranking) as bundle, OnnxRuntimeSession(whole) as session:
        for feed in load_feeds(ranking / "feeds.json"):
            expected, actual = session.run(feed), bundle.session.run(feed)
            for name, array in expected.items():
                np.testing.assert_array_equal(actual[name], array)


def test_intermediate_graphs_have_their_tables_beside_them(ranking: Path) -> None:
    kept = ranking.with_name("kept")
    for path in (kept / "02_exported_packed.onnx", *sorted((kept / "03_rewritten_packed").iterdir())):
        if path.suffix == ".onnx":
            onnx.checker.check_model(str(path))
    assert {file.name for file in kept.iterdir()} >= TABLES


@pytest.mark.parametrize("name", sorted(TABLES))
@pytest.mark.parametrize("damage", ["missing", "altered", "truncated"])
def test_a_damaged_table_is_named(copy_of: Path, name: str, damage: str) -> None:
    file = copy_of / name
    content = bytearray(file.read_bytes())
    file.unlink()
    if damage != "missing":
        content[7] ^= 1
        file.write_bytes(content if damage == "altered" else content[:-1])
    done = checked(copy_of)
    assert done.exit_code == 8
    assert "HSTU-E803" in done.stderr
    expected = "is missing" if damage == "missing" else "has another sha256 than the manifest records"
    assert f"{name} {expected}" in done.stderr


@pytest.mark.parametrize("location", ["../secret.bin", "{folder}/secret.bin", "link.bin"])
def test_a_bundle_whose_table_leaves_its_folder_is_refused(copy_of: Path, location: str, patched: None) -> None:
    secret = copy_of.with_name("secret.bin")
    shutil.copyfile(copy_of / "tables.0.bin", secret)
    (copy_of / "link.bin").symlink_to(secret)
    model = onnx.load(copy_of / "model.onnx", load_external_data=False)
    (table,) = (tensor for tensor in model.graph.initializer if tensor.name == "model.tables.0.weight")
    (entry,) = (entry for entry in table.external_data if entry.key == "location")
    entry.value = location.format(folder=copy_of.parent)
    (copy_of / "model.onnx").write_bytes(model.SerializeToString())
    rehash(copy_of)
    done = checked(copy_of)
    assert done.exit_code != 0
    assert f"model.tables.0.weight is in the file {entry.value!r}, which is not in the folder" in done.stderr


def test_triton_models_get_the_tables_of_their_graph(ranking: Path, tmp_path: Path, patched: None) -> None:
    for backend, folder in (("python", "rank/1/bundle"), ("tensorrt", "rank_engine")):
        repository = tmp_path / backend
        done = hstu_compile("triton", ranking, "-o", repository, "--backend", backend, "--name", "rank")
        assert done.exit_code == 0, done.stderr
        for name in TABLES:
            assert (repository / folder / name).read_bytes() == (ranking / name).read_bytes()
        assert "tables.0.bin" in (repository / folder.split("/")[0] / "SHA256SUMS").read_text()


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "small.pt", small_config(num_layers=1))
    done = hstu_compile("build", checkpoint, "-o", tmp_path / "b", "--fp32", "--backend", "onnx", "--no-verify")
    assert done.exit_code == 0, done.stderr
    assert {file.name for file in (tmp_path / "b").iterdir()} == {
        *("model.onnx", "report.json", "report.html", "manifest.json"),
    }
    onnx.checker.check_model(onnx.load(tmp_path / "b" / "model.onnx").SerializeToString(), full_check=True)


def test_a_build_that_fails_behind_the_export_leaves_no_table(
    tmp_path: Path, patched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def full(self: table_files.TableFiles, tensor: str, content: memoryview) -> str:
        real(self, tensor, content)
        seen.extend(self.folder.iterdir())
        with writing_to(self.folder / tensor):
            raise OSError(errno.ENOSPC, "No space left on device")

    real: Callable[..., str] = table_files.TableFiles.add
    monkeypatch.setattr(table_files.TableFiles, "add", full)
    checkpoint = save_checkpoint(tmp_path / "small.pt", small_config(num_layers=1))
    done = hstu_compile("build", checkpoint, "-o", tmp_path / "b", "--fp32", "--backend", "onnx")
    assert done.exit_code == 8
    assert "HSTU-E802" in done.stderr
    assert "free some disk space" in done.stderr
    assert [file.name for file in seen] == ["item_embedding.bin"]
    assert [file.name for file in tmp_path.iterdir()] == ["small.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["--fp32", "--bf16"])
def test_lists_of_items_and_growing_histories_share_the_tables(tmp_path: Path, patched: None, precision: str) -> None:
    config = small_config(num_items=300)
    checkpoint = save_checkpoint(tmp_path / "small.pt", config)
    common = ("build", checkpoint, precision, "--backend", "onnx", "--top-k", 5, "--incremental", "max-append=4")
    done = hstu_compile(*common, "-o", tmp_path / "outside")
    assert done.exit_code == 0, done.stderr
    graphs = manifest_of(tmp_path / "outside")["graphs"]
    assert all({"item_embedding.bin", "item_vectors.bin"} <= set(each["tables"]) for each in graphs)
    assert checked(tmp_path / "outside").exit_code == 0
    table_files.TABLE_BYTES = 64 << 20
    assert hstu_compile(*common, "-o", tmp_path / "inside").exit_code == 0
    assert not any(each["tables"] for each in manifest_of(tmp_path / "inside")["graphs"])
    with load_bundle(tmp_path / "inside") as inside, load_bundle(tmp_path / "outside") as outside:
        for feed in load_feeds(tmp_path / "inside" / "feeds.json"):
            expected, actual = inside.session.run(feed), outside.session.run(feed)
            for name, array in expected.items():
                np.testing.assert_array_equal(actual[name], array)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_table_beyond_what_one_message_holds(tmp_path: Path) -> None:
    rows, width = 2_300_000, 256
    if shutil.disk_usage(tmp_path).free < 8 << 30:
        pytest.skip("less than 8 GiB of disk space")
    config = small_config(2, {"attention_dim": 64, "linear_dim": 64}, embedding_dim=width)
    small = save_checkpoint(tmp_path / "small.pt", config)
    state = torch.load(small, weights_only=True)["state_dict"]
    generator = torch.Generator().manual_seed(0)
    state["item_embedding.weight"] = torch.empty(rows + 1, width).uniform_(-1, 1, generator=generator)
    large = {**config.to_dict(), "num_items": rows}
    torch.save({"format": "hstu-compile/1", "config": large, "state_dict": state}, tmp_path / "large.pt")
    done = hstu_compile("build", tmp_path / "large.pt", "-o", tmp_path / "b", "--fp32", "--backend", "onnx")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "b" / "item_embedding.bin").stat().st_size == 4 * (rows + 1) * width > 1 << 31
    assert (tmp_path / "b" / "model.onnx").stat().st_size < 4 << 20
    assert checked(tmp_path / "b").exit_code == 0
    last = np.array([rows, 1], np.int32)
    feeds = {
        "item_ids": last,
        "timestamps": np.array([10, 20], np.int64),
        "seq_offsets": np.array([0, 1, 2], np.int32),
        "request_timestamps": np.array([30, 30], np.int64),
    }
    with load_bundle(tmp_path / "b") as bundle:
        users = bundle.run(feeds)["user_embeddings"]
    assert not np.array_equal(users[0], users[1])
