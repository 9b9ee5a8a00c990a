"""Checkpoints in shards: what is read of them, what is left, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import random
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo  # what an index holds, and no public name has
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from hstu_compile import distributed_checkpoint
from hstu_compile.__main__ import main
from hstu_compile.artifacts import CheckpointSpec
from hstu_compile.checkpoint import config_from_file, model_from_spec, spec_from_checkpoint
from hstu_compile.errors import CheckpointError, HstuCompileError, UnsupportedModelError
from hstu_compile.inspection import inspect_path
from hstu_compile.model.ranking import RankingModel
from tests.dlrm_reference import DlrmForm, dlrm_state_dict, draw_requests, packed_inputs
from tests.research_reference import ResearchForm, research_state_dict
from tests.sharded_checkpoints import read_metadata, row_wise, save_meta, save_shares, table_wise, write_metadata

FORM = ResearchForm()
DLRM = DlrmForm(additional=("movie_category",), tasks=(("like", 0), ("minutes", 1)))
STATE = research_state_dict(FORM)
RANKING_STATE = dlrm_state_dict(DLRM)
TABLES = [key for key in RANKING_STATE if key.startswith("_embedding_collection.")]
ITEM = "_embedding_module._item_emb.weight"
META = Path(__file__).parents[3] / "shared" / "fixtures" / "meta_dlrm_ml100k"

OPTIMIZER = {"state": {key: {"exp_avg": value.clone()} for key, value in STATE.items()}, "param_groups": [{"lr": 0.1}]}


def dcp_save(folder: Path, content: Mapping[str, Any]) -> Path:
    dcp.save(dict(content), checkpoint_id=folder, no_dist=True)
    return folder


def same_spec(one: CheckpointSpec, other: CheckpointSpec) -> None:
    assert (one.dialect, one.config, one.ignored_keys) == (other.dialect, other.config, other.ignored_keys)
    assert list(one.state_dict) == list(other.state_dict)
    for name, tensor in one.state_dict.items():
        assert torch.equal(tensor, other.state_dict[name]), name


def single(folder: Path, state: Mapping[str, torch.Tensor]) -> Path:
    """The same state_dict as one file."""
    path = folder / "single.pt"
    torch.save({"model_state_dict": dict(state)}, path)
    return path


def ranking_spec(path: Path, **options: Any) -> CheckpointSpec:
    return spec_from_checkpoint(path, DLRM.user_config(), **options)


def external_config() -> dict[str, Any]:
    tables = {key.split(".")[2]: list(RANKING_STATE[key].shape) for key in TABLES}
    return {**DLRM.user_config(), "embedding_tables": tables}


def refusal(path: Path, code: str, *seen: str, config: Any = None, **options: Any) -> HstuCompileError:
    with pytest.raises(HstuCompileError) as caught:
        spec_from_checkpoint(path, FORM.user_config() if config is None else config, **options)
    error = caught.value
    assert error.code == code, str(error)
    for value in seen:
        assert value in str(error), f"{value!r} is not in: {error}"
    assert json.loads(json.dumps(error.to_dict()))["code"] == code
    return error


@pytest.fixture
def parts_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the parts that are read, as they are."""
    read: list[str] = []
    original = distributed_checkpoint.ShardFolder._loaded

    def recorded(self: Any, key: str, name: str, part: Any) -> Any:
        read.append(key)
        return original(self, key, name, part)

    monkeypatch.setattr(distributed_checkpoint.ShardFolder, "_loaded", recorded)
    return read


class Bomb:
    """Unpickling it would create the file `fired`."""

    def __init__(self, fired: Path) -> None:
        self.fired = fired

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.fired}",)


# --- Folders of a whole model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", [(), ("model",), ("state_dict",), ("model_state_dict",), ("app", "model")])
def test_state_dict_wherever_training_puts_it(tmp_path: Path, home: tuple[str, ...], parts_read: list[str]) -> None:
    content: dict[str, Any] = {**STATE, "optimizer": OPTIMIZER} if not home else dict(STATE)
    if home == ("app", "model"):
        content = {"app": {"model": STATE, "optim": OPTIMIZER}}
    elif home:
        content = {home[0]: STATE, "optimizer": OPTIMIZER, "epoch": 3, "step": torch.tensor(5)}
    spec = spec_from_checkpoint(dcp_save(tmp_path / "ckpt", content), FORM.user_config())
    same_spec(spec, spec_from_checkpoint(single(tmp_path, STATE), FORM.user_config()))
    assert spec.path == tmp_path / "ckpt"
    assert len(parts_read) == len(set(parts_read))
    assert not [key for key in parts_read if "optim" in key or key in ("epoch", "step")]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_removed(tmp_path: Path, prefix: str) -> None:
    wrapped = {prefix + key: value for key, value in STATE.items()}
    spec = spec_from_checkpoint(dcp_save(tmp_path / "ckpt", {"model": wrapped}), FORM.user_config())
    same_spec(spec, spec_from_checkpoint(single(tmp_path, STATE), FORM.user_config()))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_of_several_ranks(tmp_path: Path, ranks: int, dim: int) -> None:
    """As FSDP writes: every tensor in as many chunks as there are ranks, beside the optimizer's."""
    content = {("model", key): value for key, value in STATE.items()}
    content |= {("optimizer", "state", key, "exp_avg"): value for key, value in STATE.items()}
    folder = save_shares(tmp_path / "ckpt", row_wise(content, ranks, dim))
    assert len(list(folder.glob("*.distcp"))) == ranks
    spec = spec_from_checkpoint(folder, FORM.user_config())
    same_spec(spec, spec_from_checkpoint(single(tmp_path, STATE), FORM.user_config()))


def test_ranking_model_whose_tables_are_float16(tmp_path: Path) -> None:
    half = {key: value.half() if key in TABLES else value for key, value in RANKING_STATE.items()}
    folder = save_shares(tmp_path / "ckpt", row_wise({("model", key): value for key, value in half.items()}, 2))
    same_spec(ranking_spec(folder), ranking_spec(single(tmp_path, half)))


@pytest.fixture(scope="module")
def native_content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    spec = ranking_spec(single(tmp_path_factory.mktemp("native"), RANKING_STATE))
    config = dataclasses.replace(spec.config, dialect="native").to_dict()
    return {"format": "hstu-compile/1", "config": config, "state_dict": spec.state_dict}


def test_own_format_carries_its_configuration_in_shards_as_well(tmp_path: Path, native_content: dict[str, Any]) -> None:
    content = native_content
    file = tmp_path / "native.pt"
    torch.save(content, file)
    folder = dcp_save(tmp_path / "ckpt", content)
    spec = spec_from_checkpoint(folder)
    same_spec(spec, spec_from_checkpoint(file))
    assert spec.config.to_dict() == content["config"]
    # A configuration that is given is the one that counts, and then the file's is not needed.
    given = spec_from_checkpoint(folder, content["config"])
    same_spec(given, spec)
    assert given.sha256 != spec.sha256


def test_own_format_in_shards_of_a_version_that_is_not_known(tmp_path: Path, native_content: dict[str, Any]) -> None:
    folder = dcp_save(tmp_path / "ckpt", {**native_content, "format": "hstu-compile/2"})
    with pytest.raises(CheckpointError, match=r"(?s)HSTU-E104.*'hstu-compile/2'; known: 'hstu-compile/1'"):
        spec_from_checkpoint(folder)


def test_own_format_in_shards_without_its_configuration(tmp_path: Path, native_content: dict[str, Any]) -> None:
    folder = dcp_save(tmp_path / "ckpt", {"state_dict": native_content["state_dict"]})
    with pytest.raises(CheckpointError, match=r"(?s)HSTU-E109.*--config"):
        spec_from_checkpoint(folder)


def test_configuration_that_contradicts_itself_is_refused(tmp_path: Path, native_content: dict[str, Any]) -> None:
    folder = dcp_save(tmp_path / "ckpt", {**native_content, "config": {"a": 1, "a.b": 2}})
    metadata = read_metadata(folder)
    metadata.planner_data["config.a.b"] = ("config", "a", "b")
    write_metadata(folder, metadata)
    with pytest.raises(CheckpointError, match=r"(?s)HSTU-E101.*in the place of another value"):
        spec_from_checkpoint(folder)


def test_configuration_of_a_class_is_refused_and_may_be_given(tmp_path: Path) -> None:
    folder = dcp_save(tmp_path / "ckpt", {"model": STATE, "config": pathlib.PurePosixPath("a")})
    with pytest.raises(CheckpointError, match=r"(?s)HSTU-E102.*pathlib"):
        spec_from_checkpoint(folder)
    assert spec_from_checkpoint(folder, FORM.user_config()).dialect == "research"


# --- Meta's layout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharding", ["rows", "columns", "tables", "one rank"])
def test_folder_of_metas_training(tmp_path: Path, sharding: str, parts_read: list[str]) -> None:
    tables = {("sparse_dict", key): RANKING_STATE[key] for key in TABLES}
    shares = {
        "rows": lambda: row_wise(tables, 3),
        "columns": lambda: row_wise(tables, 3, dim=1),
        "tables": lambda: table_wise(tables, 2),
        "one rank": lambda: row_wise(tables, 1),
    }[sharding]()
    spec = ranking_spec(save_meta(tmp_path / "5000", RANKING_STATE, TABLES, shares))
    reference = ranking_spec(single(tmp_path, RANKING_STATE))
    if sharding == "tables":  # The index has the tables in the order of the ranks.
        assert spec.config != reference.config
        assert {each.name: each for each in spec.config.tables} == {each.name: each for each in reference.config.tables}
        inputs = packed_inputs(DLRM, draw_requests(DLRM, [(5, 3), (30, 2)]))
        models = [model_from_spec(each, torch.float64) for each in (spec, reference)]
        logits = [model.packed(inputs).logits for model in models if isinstance(model, RankingModel)]
        assert torch.equal(*logits)
    else:
        same_spec(spec, reference)
    assert {key.removeprefix("sparse_dict.") for key in parts_read} == set(TABLES)


def test_external_embeddings_read_no_table(tmp_path: Path, parts_read: list[str]) -> None:
    folder = save_meta(tmp_path / "5000", RANKING_STATE, TABLES)
    reference = ranking_spec(single(tmp_path, RANKING_STATE), external_embeddings=True)
    same_spec(ranking_spec(folder, external_embeddings=True), reference)
    for shard in (folder / "sparse").glob("*.distcp"):
        shard.unlink()
    same_spec(ranking_spec(folder, external_embeddings=True), reference)
    shutil.rmtree(folder / "sparse")
    config = external_config()
    spec = spec_from_checkpoint(folder, config, external_embeddings=True)
    assert torch.equal(spec.state_dict["position_embedding"], reference.state_dict["position_embedding"])
    alone = spec_from_checkpoint(folder / "non_sparse.ckpt", config, external_embeddings=True)
    same_spec(alone, spec)
    assert alone.sha256 == spec.sha256
    assert parts_read == []


def test_external_embeddings_of_a_whole_model_read_no_table(tmp_path: Path, parts_read: list[str]) -> None:
    folder = save_shares(tmp_path / "ckpt", row_wise({("model", key): v for key, v in RANKING_STATE.items()}, 2))
    reference = ranking_spec(single(tmp_path, RANKING_STATE), external_embeddings=True)
    same_spec(ranking_spec(folder, external_embeddings=True), reference)
    assert parts_read
    assert not [key for key in parts_read if "_embedding_collection" in key]


def test_dense_file_alone_needs_the_folder_for_its_tables(tmp_path: Path) -> None:
    folder = save_meta(tmp_path / "5000", RANKING_STATE, TABLES)
    error = refusal(
        folder / "non_sparse.ckpt", "HSTU-E105", TABLES[0], "the folder sparse", str(folder), config=DLRM.user_config()
    )
    assert error.context["missing"] == sorted(TABLES)


@pytest.mark.parametrize("sparse", ["empty index", "empty folder", "no folder"])
def test_training_in_one_process_shards_nothing(tmp_path: Path, sparse: str) -> None:
    folder = save_meta(tmp_path / "5000", RANKING_STATE, [], [{}])
    if sparse != "empty index":
        shutil.rmtree(folder / "sparse")
    if sparse == "empty folder":
        (folder / "sparse").mkdir()
    reference = ranking_spec(single(tmp_path, RANKING_STATE))
    same_spec(ranking_spec(folder), reference)
    same_spec(ranking_spec(folder / "non_sparse.ckpt"), reference)


def test_some_tables_may_be_dense(tmp_path: Path) -> None:
    """Of tables that every rank has whole, only the rest is sharded."""
    folder = save_meta(tmp_path / "5000", RANKING_STATE, TABLES[1:])
    spec, reference = ranking_spec(folder), ranking_spec(single(tmp_path, RANKING_STATE))
    assert len(TABLES) > 1
    same_spec(spec, reference)


def test_predictions_of_metas_own_checkpoint_in_its_own_layout(tmp_path: Path) -> None:
    if not META.is_dir():
        pytest.skip("../shared/fixtures/meta_dlrm_ml100k is absent")
    config = config_from_file(META / "config.json")
    state = torch.load(META / "ckpt.pt", weights_only=True)["model_state_dict"]
    tables = [key for key in state if key.startswith("_embedding_collection.")]
    assert tables
    folder = save_meta(tmp_path / "1000", state, tables)
    reference, spec = spec_from_checkpoint(META / "ckpt.pt", config), spec_from_checkpoint(folder, config)
    same_spec(spec, reference)
    with np.load(META / "golden.npz") as arrays:
        ends = {name: np.cumsum(arrays[f"a.{name}"]).tolist() for name in ("uih_lengths", "num_candidates")}
        inputs = {
            name.split(".")[1]: torch.from_numpy(arrays[f"a.{name}"])
            for name in (
                *("uih.user_id", "uih.movie_id", "uih.action_timestamp", "uih.item_weights"),
                *("cand.item_movie_id", "cand.item_query_time"),
            )
        }
    inputs["seq_offsets"] = torch.tensor([0, *ends["uih_lengths"]], dtype=torch.int32)
    inputs["candidate_offsets"] = torch.tensor([0, *ends["num_candidates"]], dtype=torch.int32)
    models = [model_from_spec(each) for each in (spec, reference)]
    predictions = [model.packed(inputs).preds for model in models if isinstance(model, RankingModel)]
    assert torch.equal(*predictions)
    for shard in (folder / "sparse").glob("*.distcp"):
        shard.unlink()
    external = spec_from_checkpoint(folder, config, external_embeddings=True)
    same_spec(external, spec_from_checkpoint(META / "ckpt.pt", config, external_embeddings=True))


# --- What is not whole ------------------------------------------------------------------------------------------------


def whole(folder: Path, ranks: int = 2) -> Path:
    return save_shares(folder / "ckpt", row_wise({("model", key): value for key, value in STATE.items()}, ranks))


def meta(folder: Path) -> Path:
    return save_meta(folder / "5000", RANKING_STATE, TABLES)


def test_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    refusal(tmp_path, "HSTU-E101", "it is a folder without non_sparse.ckpt or .metadata", "the .pt file inside it")
    whole(tmp_path)
    refusal(tmp_path, "HSTU-E101", "pass one of the checkpoints in it: ckpt")


@pytest.mark.parametrize("left", [[], [".metadata.tmp"], ["__0.metadata"]])
def test_missing_index_is_a_save_that_did_not_end(tmp_path: Path, left: list[str]) -> None:
    folder = whole(tmp_path)
    for name in left:
        (folder / name).write_bytes((folder / ".metadata").read_bytes())
    (folder / ".metadata").unlink()
    refusal(folder, "HSTU-E101", "has no .metadata", *left)


def test_missing_shard(tmp_path: Path) -> None:
    folder = whole(tmp_path)
    (folder / "__1_0.distcp").unlink()
    refusal(folder, "HSTU-E101", "__1_0.distcp: No such file")


def test_shard_that_is_a_folder_or_a_pipe(tmp_path: Path) -> None:
    folder = whole(tmp_path)
    for make in (os.mkfifo, os.mkdir):
        (folder / "__1_0.distcp").unlink()
        make(folder / "__1_0.distcp")
        refusal(folder, "HSTU-E101", "__1_0.distcp is not a file")


def test_truncated_shard_is_seen_before_anything_is_read(tmp_path: Path, parts_read: list[str]) -> None:
    folder = whole(tmp_path)
    shard = folder / "__1_0.distcp"
    os.truncate(shard, shard.stat().st_size - 1)
    refusal(folder, "HSTU-E101", "__1_0.distcp has", "truncated")
    assert parts_read == []


def test_empty_shard_of_tables(tmp_path: Path) -> None:
    folder = meta(tmp_path)
    (folder / "sparse" / "__1_0.distcp").write_bytes(b"")
    refusal(folder, "HSTU-E101", "has 0 bytes", config=DLRM.user_config())


def test_tables_without_the_dense_half(tmp_path: Path) -> None:
    folder = meta(tmp_path)
    refusal(folder / "sparse", "HSTU-E103", "it holds tables alone", "non_sparse.ckpt", config=DLRM.user_config())
    (folder / "non_sparse.ckpt").unlink()
    refusal(folder, "HSTU-E101", "no non_sparse.ckpt", config=DLRM.user_config())


def test_dense_half_without_its_tables(tmp_path: Path) -> None:
    folder = meta(tmp_path)
    (folder / "sparse" / ".metadata").unlink()
    refusal(folder, "HSTU-E101", "lacks its tables", "sparse, which has no .metadata", config=DLRM.user_config())
    shutil.rmtree(folder / "sparse")
    refusal(folder, "HSTU-E101", "which is not there", "--embeddings external", config=DLRM.user_config())


def test_halves_of_two_trainings(tmp_path: Path) -> None:
    folder = meta(tmp_path)
    shutil.rmtree(folder / "sparse")
    tables = {("sparse_dict", key): RANKING_STATE[key] for key in TABLES[1:]}
    save_shares(folder / "sparse", row_wise({**tables, ("sparse_dict", "new"): torch.ones(4, 2)}, 2))
    error = refusal(folder, "HSTU-E105", "missing 1", "unexpected 1", config=DLRM.user_config())
    assert error.context == {"missing": [TABLES[0]], "unexpected": ["new"]}


def test_table_in_both_halves(tmp_path: Path) -> None:
    folder = meta(tmp_path)
    content = torch.load(folder / "non_sparse.ckpt", weights_only=True)
    content["dense_dict"][TABLES[0]] = RANKING_STATE[TABLES[0]]
    torch.save(content, folder / "non_sparse.ckpt")
    refusal(folder, "HSTU-E105", "twice", TABLES[0], config=DLRM.user_config())


@pytest.mark.parametrize(
    ("changes", "code", "seen"),
    [
        ({"dense_dict": None}, "HSTU-E103", "dense_dict is a NoneType"),
        ({"dense_dict": {"a": 1}}, "HSTU-E103", "not tensors by name"),
        ({"sparse_tensor_keys": 7}, "HSTU-E103", "sparse_tensor_keys is a int"),
        ({"sparse_tensor_keys": {1, 2}}, "HSTU-E103", "and not names"),
    ],
)
def test_dense_half_of_another_program(tmp_path: Path, changes: dict[str, Any], code: str, seen: str) -> None:
    folder = meta(tmp_path)
    content = torch.load(folder / "non_sparse.ckpt", weights_only=True)
    torch.save({**content, **changes}, folder / "non_sparse.ckpt")
    refusal(folder, code, seen, config=DLRM.user_config())
    torch.save([1], folder / "non_sparse.ckpt")
    refusal(folder, "HSTU-E103", "no dense_dict", config=DLRM.user_config())


def test_parameters_that_are_missing_unexpected_or_of_another_shape(tmp_path: Path, parts_read: list[str]) -> None:
    lacking = {key: value for key, value in STATE.items() if key != ITEM}
    refusal(dcp_save(tmp_path / "a", {"model": lacking}), "HSTU-E105", ITEM)
    refusal(dcp_save(tmp_path / "b", {"model": {**STATE, "new": torch.ones(2)}}), "HSTU-E105", "unexpected 1: new")
    folder = dcp_save(tmp_path / "c", {"model": {**STATE, "_hstu._attention_layers.1._uvqk": torch.ones(2, 2)}})
    refusal(folder, "HSTU-E106", "_uvqk is [2, 2]")
    assert parts_read == []


def test_values_that_are_not_finite_or_no_floats(tmp_path: Path) -> None:
    bad = STATE[ITEM].clone()
    bad[3, 2] = float("nan")
    folder = save_shares(tmp_path / "a", row_wise({("model", key): v for key, v in {**STATE, ITEM: bad}.items()}, 2))
    refusal(folder, "HSTU-E108", ITEM, "1 NaN")
    ints = {**STATE, ITEM: STATE[ITEM].to(torch.int8)}
    refusal(dcp_save(tmp_path / "b", {"model": ints}), "HSTU-E110", ITEM, "int8")


def test_two_models_in_one_folder(tmp_path: Path) -> None:
    folder = dcp_save(tmp_path / "a", {"student": {"model": STATE}, "teacher": {"model": STATE}})
    refusal(folder, "HSTU-E103", "holds 2 models", "student.model, teacher.model")
    folder = dcp_save(tmp_path / "b", {"model": {**STATE, "module." + ITEM: STATE[ITEM]}})
    refusal(folder, "HSTU-E105", "twice", ITEM)
    refusal(dcp_save(tmp_path / "c", {"optimizer": OPTIMIZER}), "HSTU-E103", "no tensors")
    refusal(dcp_save(tmp_path / "d", {"weights": {"deep": STATE}}), "HSTU-E103", "found weights")


# --- An index that lies -----------------------------------------------------------------------------------------------


def item_place(metadata: Metadata, row: bool = True) -> tuple[MetadataIndex, _StorageInfo]:
    """Where the index puts the first chunk of the items' table, or its second."""
    places = sorted(
        ((place, info) for place, info in metadata.storage_data.items() if place.fqn == "model." + ITEM),
        key=lambda each: tuple(each[0].offset),
    )
    return places[0 if row else 1]


def item_entry(metadata: Metadata) -> TensorStorageMetadata:
    entry = metadata.state_dict_metadata["model." + ITEM]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


def set_info(metadata: Metadata, **changes: Any) -> None:
    place, info = item_place(metadata)
    metadata.storage_data[place] = dataclasses.replace(info, **changes)


def drop_place(metadata: Metadata) -> None:
    del metadata.storage_data[item_place(metadata)[0]]


def drop_chunk(metadata: Metadata) -> None:
    item_entry(metadata).chunks.pop()


def repeat_chunk(metadata: Metadata) -> None:
    entry = item_entry(metadata)
    entry.chunks.append(entry.chunks[0])


def shift_chunk(metadata: Metadata) -> None:
    entry = item_entry(metadata)
    entry.chunks[1].offsets = torch.Size([entry.chunks[1].offsets[0] - 1, 0])
    place, info = item_place(metadata, row=False)
    metadata.storage_data[MetadataIndex(place.fqn, entry.chunks[1].offsets)] = info


def overhanging_chunk(metadata: Metadata) -> None:
    entry = item_entry(metadata)
    entry.chunks[1].sizes = torch.Size([entry.chunks[1].sizes[0] + 1, entry.chunks[1].sizes[1]])


def flat_chunk(metadata: Metadata) -> None:
    entry = item_entry(metadata)
    entry.chunks[1].sizes = torch.Size([entry.chunks[1].sizes[0]])


def same_bytes_twice(metadata: Metadata) -> None:
    place, _ = item_place(metadata, row=False)
    metadata.storage_data[place] = item_place(metadata)[1]


def huge(metadata: Metadata) -> None:
    entry = item_entry(metadata)
    rows = 10**9
    entry.size = torch.Size([rows, entry.size[1]])
    entry.chunks[1].sizes = torch.Size([rows - entry.chunks[0].sizes[0], entry.size[1]])


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda m: set_info(m, relative_path="../__0_0.distcp"), "names the file '../__0_0.distcp'"),
        (lambda m: set_info(m, relative_path="/etc/passwd"), "names the file '/etc/passwd'"),
        (lambda m: set_info(m, relative_path="sub\\file"), "names the file"),
        (lambda m: set_info(m, relative_path=".."), "names the file '..'"),
        (lambda m: set_info(m, relative_path=""), "names the file ''"),
        (lambda m: set_info(m, relative_path="a\0b"), "names the file"),
        (lambda m: set_info(m, offset=10**9), "truncated"),
        (lambda m: set_info(m, length=10**18), "truncated"),
        (lambda m: set_info(m, length=10), "takes"),
        (lambda m: set_info(m, offset=-1), "no file, offset and length"),
        (lambda m: set_info(m, length=2**70), "more than 64 bits"),
        (lambda m: set_info(m, relative_path=None), "no file, offset and length"),
        (lambda m: set_info(m, transform_descriptors=["zstd"]), "written with 'zstd', which is not read"),
        (lambda m: set_info(m, transform_descriptors=7), "transform_descriptors"),
        (drop_place, "does not say where its chunk at [0, 0] is"),
        (drop_chunk, "parts of it are missing"),
        (repeat_chunk, "chunks overlap"),
        (shift_chunk, "2 chunks hold"),
        (overhanging_chunk, "lies outside of"),
        (flat_chunk, "has not the 2 dimensions"),
        (same_bytes_twice, "are those of"),
        (lambda m: setattr(m, "state_dict_metadata", None), "no state_dict_metadata"),
        (lambda m: setattr(m, "storage_data", [1]), "no storage_data"),
        (lambda m: m.state_dict_metadata.update(x=3), "a TensorStorageMetadata is a int"),
        (lambda m: m.state_dict_metadata.update(x=m), "a TensorStorageMetadata is a Metadata"),
        (lambda m: m.storage_data.update({"x": 1}), "a MetadataIndex is a str"),
        (lambda m: setattr(item_entry(m), "chunks", 3), "no properties or no chunks"),
        (lambda m: setattr(item_entry(m), "size", "ab"), "size of a TensorStorageMetadata"),
        (lambda m: setattr(item_entry(m).properties, "dtype", "float32"), "has no dtype"),
    ],
)
def test_index_that_contradicts_the_files(
    tmp_path: Path, parts_read: list[str], change: Callable[[Metadata], None], seen: str
) -> None:
    folder = whole(tmp_path)
    metadata = read_metadata(folder)
    change(metadata)
    write_metadata(folder, metadata)
    refusal(folder, "HSTU-E101", seen)
    assert parts_read == []


def test_claimed_sizes_take_no_memory(tmp_path: Path, parts_read: list[str]) -> None:
    folder = whole(tmp_path)
    metadata = read_metadata(folder)
    huge(metadata)
    write_metadata(folder, metadata)
    config = {name: value for name, value in FORM.user_config().items() if name != "num_items"}
    refusal(folder, "HSTU-E101", "takes", "has", config=config)
    assert parts_read == []


def test_chunk_of_another_shape_or_type_than_the_index_says(tmp_path: Path) -> None:
    folder = whole(tmp_path)
    metadata = read_metadata(folder)
    entry = item_entry(metadata)
    entry.properties.dtype = torch.int32
    write_metadata(folder, metadata)
    refusal(folder, "HSTU-E101", "torch.float32, the index says", "int32")


def replace_item(folder: Path, content: bytes) -> None:
    """Put other bytes in the place of the items' table, which is in one chunk."""
    (folder / "other.distcp").write_bytes(content)
    metadata = read_metadata(folder)
    place, _ = item_place(metadata)
    metadata.storage_data[place] = _StorageInfo("other.distcp", 0, len(content))
    write_metadata(folder, metadata)


def test_part_that_names_code_runs_nothing(tmp_path: Path) -> None:
    folder, fired, buffer = whole(tmp_path, ranks=1), tmp_path / "fired", io.BytesIO()
    # As long as the table, or it would not be read.
    torch.save([Bomb(fired), torch.zeros(STATE[ITEM].shape)], buffer)
    replace_item(folder, buffer.getvalue())
    refusal(folder, "HSTU-E102", "other.distcp", "posix.system")
    assert not fired.exists()


def test_part_that_is_no_tensor(tmp_path: Path) -> None:
    folder, buffer = whole(tmp_path, ranks=1), io.BytesIO()
    torch.save([torch.zeros(STATE[ITEM].shape)], buffer)
    replace_item(folder, buffer.getvalue())
    refusal(folder, "HSTU-E101", "its chunk in other.distcp is list")


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_records_that_unpack_to_more_than_the_file_are_refused(tmp_path: Path, kind: int) -> None:
    """A record of zeros, packed, is a thousandth of its size: a small file would fill the memory."""
    table = torch.zeros(STATE[ITEM].shape)
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save(table, plain)
    with zipfile.ZipFile(plain) as archive, zipfile.ZipFile(packed, "w", kind) as other:
        for record in archive.infolist():
            other.writestr(record.filename, archive.read(record))
        other.writestr("archive/padding", random.Random(0).randbytes(table.nbytes))
    folder = whole(tmp_path, ranks=1)
    replace_item(folder, packed.getvalue())
    if kind == zipfile.ZIP_STORED:
        assert spec_from_checkpoint(folder, FORM.user_config()).state_dict["item_embedding.weight"].abs().sum() == 0
    else:
        refusal(folder, "HSTU-E101", "its records are compressed")
    (tmp_path / "file.pt").write_bytes(packed.getvalue())
    code = "HSTU-E103" if kind == zipfile.ZIP_STORED else "HSTU-E101"
    refusal(tmp_path / "file.pt", code)


# --- Damage of any kind -----------------------------------------------------------------------------------------------


def test_damaged_folders_end_in_a_documented_error(tmp_path: Path) -> None:
    form = ResearchForm(max_sequence_len=3, max_output_len=1, num_items=3, item_dim=2, num_blocks=1, num_heads=1)
    state = research_state_dict(form)
    folder = save_shares(tmp_path / "ckpt", row_wise({("model", key): value for key, value in state.items()}, 2))
    originals = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    rng = random.Random(5)
    refused = 0
    for number in range(120):
        path = rng.choice([folder / ".metadata", *originals])
        content = bytearray(originals[path])
        for _ in range(rng.randint(0, 4)):
            content[rng.randrange(len(content))] ^= rng.randint(1, 255)
        if number % 3 == 0:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            spec = spec_from_checkpoint(folder, {"num_heads": 1})
        except (CheckpointError, UnsupportedModelError):
            refused += 1
        else:
            assert all(bool(torch.isfinite(tensor).all()) for tensor in spec.state_dict.values())
        path.write_bytes(originals[path])
    assert refused > 50
    assert spec_from_checkpoint(folder, {"num_heads": 1}).dialect == "research"


# --- What identifies a folder, and the commands that take one ---------------------------------------------------------


def test_sha256_of_a_folder_covers_what_was_read(tmp_path: Path) -> None:
    config = FORM.user_config()

    def digest(name: str, state: Mapping[str, torch.Tensor], **more: Any) -> str:
        content = {("model", key): value for key, value in state.items()}
        content |= {("optimizer", "state", key): value for key, value in more.items()}
        return spec_from_checkpoint(save_shares(tmp_path / name, row_wise(content, 2)), config).sha256

    first = digest("a", STATE)
    assert len(first) == 64
    assert int(first, 16) > 0
    assert digest("b", STATE) == first
    assert digest("c", STATE, exp_avg=torch.ones(3)) == first
    assert digest("d", {**STATE, ITEM: STATE[ITEM] + 1}) != first


def test_sha256_of_metas_folder(tmp_path: Path) -> None:
    folder, other = (
        meta(tmp_path),
        save_meta(tmp_path / "6000", {**RANKING_STATE, TABLES[0]: RANKING_STATE[TABLES[0]] + 1}, TABLES),
    )
    assert ranking_spec(folder).sha256 != ranking_spec(other).sha256
    # The tables that stay outside are not covered.
    external = [ranking_spec(each, external_embeddings=True).sha256 for each in (folder, other)]
    assert external == [hashlib.sha256((folder / "non_sparse.ckpt").read_bytes()).hexdigest()] * 2


def test_inspect_tells_a_checkpoint_folder_from_a_bundle(tmp_path: Path) -> None:
    folder = whole(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(FORM.user_config()))
    facts = inspect_path(folder, tmp_path / "config.json")
    assert (facts["kind"], facts["dialect"]) == ("checkpoint", "research")
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="HSTU-E101"):
        inspect_path(folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(HstuCompileError, match="HSTU-E803"):
        inspect_path(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HstuCompileError, match="HSTU-E803"):
        inspect_path(tmp_path / "empty")


def test_dry_run_and_inspect_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = meta(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(external_config()))
    for shard in (folder / "sparse").glob("*.distcp"):
        shard.unlink()
    arguments = ["build", str(folder), "--config", str(config), "--embeddings", "external", "--dry-run", "--json"]
    assert main([*arguments, "--backend", "onnx"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["checkpoint"]["file"] == "5000"
    # As the current folder it has a name as well.
    monkeypatch.chdir(folder)
    arguments[1] = "."
    assert main([*arguments, "--backend", "onnx"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == facts["checkpoint"]
    inspect = ["inspect", ".", "--config", str(config), "--json"]
    assert main([*inspect, "--embeddings", "external"]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == facts["checkpoint"]["sha256"]
    assert main(inspect) == 3  # with the tables, whose shards are gone
    assert "HSTU-E101" in capsys.readouterr().err
