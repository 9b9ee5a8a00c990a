from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hstu_compile.checkpoint import config_from_file, model_from_spec, spec_from_checkpoint
from hstu_compile.errors import CheckpointError, HstuCompileError, UnsupportedModelError
from hstu_compile.model import RetrievalModel
from hstu_compile.model.dialects import DLRM_V3
from hstu_compile.model.ranking import RankingModel
from tests.dlrm_reference import DlrmForm, dlrm_state_dict, draw_requests, packed_inputs
from tests.research_reference import ResearchForm, research_state_dict

FORM = ResearchForm()
ITEM = "_embedding_module._item_emb.weight"
POSITION = "_input_features_preproc._pos_emb.weight"
LAYER_0 = "_hstu._attention_layers.0."
LAYER_1 = "_hstu._attention_layers.1."

State = dict[str, torch.Tensor]


class Bomb:
    """Unpickling it would create the file `fired`."""

    def __init__(self, fired: Path) -> None:
        self.fired = fired

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.fired}",)


def saved(folder: Path, content: Any, name: str = "ckpt.pt", **options: Any) -> Path:
    path = folder / name
    torch.save(content, path, **options)
    return path


def valid(folder: Path, state: State | None = None) -> Path:
    return saved(folder, {"epoch": 1, "model_state_dict": state or research_state_dict(FORM)})


def changed(**tensors: torch.Tensor) -> State:
    """The valid state_dict with some tensors replaced; `__` stands for the dots of a key."""
    state = research_state_dict(FORM)
    for key, tensor in tensors.items():
        state[key] = tensor
    return state


def refusal(
    path: Path, code: str, *seen: str, config: dict[str, Any] | None = None, dialect: str | None = None
) -> HstuCompileError:
    """Read `path`, and check the whole of the refusal: class, code, exit code, three answers, offending values."""
    before = sorted(path.parent.iterdir())
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        spec_from_checkpoint(path, FORM.user_config() if config is None else config, dialect)
    error = caught.value
    assert error.code == code, str(error)
    assert error.exit_code == (4 if code == "HSTU-E110" else 3)
    assert isinstance(error, UnsupportedModelError if code == "HSTU-E110" else CheckpointError)
    assert error.what
    assert error.why
    assert error.fix
    text = str(error)
    for value in seen:
        assert value in text, f"{value!r} is not in: {text}"
    assert "weights_only=False" not in text
    assert "`weights_only` set to `False`" not in text
    assert "\x1b" not in text
    assert json.loads(json.dumps(error.to_dict()))["code"] == code
    assert sorted(path.parent.iterdir()) == before
    return error


# --- Files that are no checkpoint -------------------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    refusal(tmp_path / "absent.pt", "HSTU-E101", "absent.pt", "no such file")


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    refusal(tmp_path / "folder.pt", "HSTU-E101", "folder.pt", "it is a folder")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    refusal(tmp_path / "empty.pt", "HSTU-E101", "empty.pt", "0 bytes")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.99])
def test_truncated_file(tmp_path: Path, share: float) -> None:
    path = valid(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refusal(path, "HSTU-E101", "ckpt.pt", "copy the file again")


@pytest.mark.parametrize(
    "content",
    [
        b"hello world",
        # Read as a pickle, this names a function: it must not be taken for one that wants to run code.
        b"checkpoint of mine\nhello\n",
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        bytes(range(256)),
        b"\x00" * 4096,
        b"\x80\x02",
        b"\x80",
        b"{}",
        b"\xff\xfe\xfa",
    ],
)
def test_files_of_other_kinds(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    refusal(path, "HSTU-E101", "other.pt", "not a PyTorch checkpoint")


def test_zip_that_is_not_torch(tmp_path: Path) -> None:
    path = tmp_path / "archive.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes/a.txt", "hello")
    refusal(path, "HSTU-E101", "archive.pt", "not a PyTorch checkpoint")


def test_unreadable_file_is_not_called_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = valid(tmp_path)

    def denied(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", denied)
    error = refusal(path, "HSTU-E101", "Permission denied", "permissions")
    assert "truncated" not in str(error)


# --- Pickles that want to run code ------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["top", "inside"])
def test_pickle_bomb_is_refused_and_does_not_go_off(tmp_path: Path, legacy: bool, where: str) -> None:
    fired = tmp_path / "fired"
    content = Bomb(fired) if where == "top" else {"model_state_dict": research_state_dict(FORM), "extra": Bomb(fired)}
    path = saved(tmp_path, content, "bomb.pt", _use_new_zipfile_serialization=not legacy)
    refusal(path, "HSTU-E102", "bomb.pt", "system", "could run code")
    assert not fired.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_bare_pickle_bomb_does_not_go_off(tmp_path: Path, protocol: int) -> None:
    fired, path = tmp_path / "fired", tmp_path / "bomb.pt"
    path.write_bytes(pickle.dumps(Bomb(fired), protocol))
    # torch's unpickler knows protocols up to 3; it stops before it meets the function of a later one.
    refusal(path, "HSTU-E102" if protocol <= 3 else "HSTU-E101", "bomb.pt")
    assert not fired.exists()


def test_pickled_module_is_refused_by_its_class(tmp_path: Path) -> None:
    refusal(saved(tmp_path, torch.nn.Linear(2, 2)), "HSTU-E102", "torch.nn.modules.linear.Linear")


# --- Containers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        ({}, "an empty dict"),
        ([1, 2], "list"),
        (torch.zeros(3), "Tensor"),
        ({"epoch": 3, "optimizer_state_dict": {"a": torch.zeros(1)}}, "'epoch'"),
        ({"model_state_dict": {}}, "'model_state_dict'"),
        ({"model_state_dict": {"a": 1}}, "'model_state_dict'"),
        (None, "NoneType"),
    ],
)
def test_no_state_dict(tmp_path: Path, content: Any, seen: str) -> None:
    refusal(saved(tmp_path, content), "HSTU-E103", seen, "model_state_dict, state_dict, model")


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_accepted_containers_give_the_same_weights(tmp_path: Path, key: str | None, prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in research_state_dict(FORM).items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
    content: Any = state if key is None else {"epoch": 7, key: state, "optimizer_state_dict": optimizer}
    spec = spec_from_checkpoint(saved(tmp_path, content), FORM.user_config())
    reference = spec_from_checkpoint(valid(tmp_path), FORM.user_config())
    assert spec.dialect == "research"
    assert spec.ignored_keys == ("_attn_mask",)
    assert all(torch.equal(spec.state_dict[name], tensor) for name, tensor in reference.state_dict.items())
    assert len(spec.sha256) == 64


def test_legacy_format_is_accepted(tmp_path: Path) -> None:
    path = saved(tmp_path, research_state_dict(FORM), _use_new_zipfile_serialization=False)
    assert spec_from_checkpoint(path, FORM.user_config()).dialect == "research"


def test_same_parameter_with_and_without_prefix_is_refused(tmp_path: Path) -> None:
    state = research_state_dict(FORM)
    refusal(saved(tmp_path, {**state, f"module.{ITEM}": state[ITEM] + 1}), "HSTU-E105", f"module.{ITEM}", "twice")


# --- Families ---------------------------------------------------------------------------------------------------------


def test_unknown_family_names_what_it_saw(tmp_path: Path) -> None:
    path = saved(tmp_path, {"encoder.weight": torch.zeros(2, 2)})
    refusal(path, "HSTU-E104", "encoder.weight", "native, research")


def test_wrong_dialect_and_unknown_dialect(tmp_path: Path) -> None:
    path = valid(tmp_path)
    refusal(path, "HSTU-E104", "native", "_attn_mask", dialect="native")
    refusal(path, "HSTU-E104", "'dlrm'", "native, research", dialect="dlrm")


# --- Parameters -------------------------------------------------------------------------------------------------------


def test_missing_and_unexpected_keys_are_all_listed_with_the_nearest_name(tmp_path: Path) -> None:
    state = research_state_dict(FORM)
    state[LAYER_1 + "_o.biases"] = state.pop(LAYER_1 + "_o.bias")
    state["_similarity.weight"] = torch.zeros(3)
    del state[LAYER_1 + "_uvqk"]
    error = refusal(
        valid(tmp_path, state),
        "HSTU-E105",
        "missing 2",
        f"{LAYER_1}_o.bias (nearest: {LAYER_1}_o.biases)",
        f"{LAYER_1}_uvqk",
        "unexpected 2",
        "_similarity.weight",
    )
    assert error.context == {
        "missing": [LAYER_1 + "_o.bias", LAYER_1 + "_uvqk"],
        "unexpected": [LAYER_1 + "_o.biases", "_similarity.weight"],
    }


@pytest.mark.parametrize("key", [ITEM, POSITION, LAYER_0 + "_uvqk", LAYER_0 + "_o.weight"])
def test_every_key_that_sizes_the_model_is_named_when_missing(tmp_path: Path, key: str) -> None:
    state = research_state_dict(FORM)
    del state[key]
    refusal(valid(tmp_path, state), "HSTU-E105", key)


def test_long_lists_of_keys_end_with_their_number(tmp_path: Path) -> None:
    extra = {f"extra.{i}": torch.zeros(1) for i in range(100)}
    error = refusal(valid(tmp_path, {**research_state_dict(FORM), **extra}), "HSTU-E105", "unexpected 100", "60 more")
    assert len(error.context["unexpected"]) == 100


def test_layer_number_of_a_billion_does_not_hang(tmp_path: Path) -> None:
    state = changed(**{"_hstu._attention_layers.999999999._uvqk": torch.zeros(2, 2)})
    started = time.monotonic()
    refusal(valid(tmp_path, state), "HSTU-E105", "999999999")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("key", "shape", "seen"),
    [
        (LAYER_1 + "_uvqk", (12, 40), "[12, 40]"),
        (LAYER_1 + "_o.weight", (14, 12), "is [14, 12], the configuration needs [12, 14]"),
        (LAYER_1 + "_o.weight", (12, 14, 1), "is [12, 14, 1], the configuration needs [12, 14]"),
        (LAYER_0 + "_o.bias", (11,), "[11]"),
        (LAYER_1 + "_rel_attn_bias._pos_w", (41,), "is [41], the configuration needs [45]"),
        (LAYER_0 + "_rel_attn_bias._pos_w", (46,), "46 entries"),
        (LAYER_0 + "_rel_attn_bias._pos_w", (), "[]"),
        (LAYER_0 + "_rel_attn_bias._pos_w", (45, 1), "[45, 1]"),
        (LAYER_0 + "_rel_attn_bias._ts_w", (), "[]"),
        (LAYER_0 + "_rel_attn_bias._ts_w", (1,), "num_time_buckets"),
        (LAYER_0 + "_uvqk", (48,), "[48]"),
        (POSITION, (23, 12, 1), "[23, 12, 1]"),
        (POSITION, (23, 11), "[23, 11]"),
        (ITEM, (61, 8), "8 wide"),
        (ITEM, (1, 12), "num_items"),
        (ITEM, (0, 12), "num_items"),
        ("_input_features_preproc._rating_emb.weight", (6,), "[6]"),
        ("_input_features_preproc._rating_emb.weight", (6, 4), "rating"),
    ],
)
def test_shapes_that_contradict_the_configuration(tmp_path: Path, key: str, shape: tuple[int, ...], seen: str) -> None:
    refusal(valid(tmp_path, changed(**{key: torch.ones(shape)})), "HSTU-E106", seen)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_blocks", 3),
        ("embedding_dim", 16),
        ("num_items", 61),
        ("num_buckets", 64),
        ("num_heads", 3),
        ("num_heads", 10**30),
        ("linear_dim", 5),
        ("attention_dim", 7),
        ("concat_ua", True),
        ("max_output_len", 4),
        ("preprocessor", "LearnablePositionalEmbeddingRatedInputFeaturesPreprocessor"),
    ],
)
def test_configuration_that_contradicts_the_shapes(tmp_path: Path, field: str, value: Any) -> None:
    shown = "rated" if field == "preprocessor" else str(value).lower()
    refusal(valid(tmp_path), "HSTU-E106", shown, config={**FORM.user_config(), field: value})


@pytest.mark.parametrize(("field", "value", "legal"), [("max_output_len", 23, 22), ("max_sequence_len", 24, 23)])
def test_one_length_alone_that_is_longer_than_the_tables_is_not_ignored(
    tmp_path: Path, field: str, value: int, legal: int
) -> None:
    config = {"num_heads": 2}
    refusal(valid(tmp_path), "HSTU-E106", f"{field} is {value}", "is 23", config={**config, field: value})
    assert spec_from_checkpoint(valid(tmp_path), {**config, field: legal}).config.layer.attention.max_seq_len == 23


def test_heads_cannot_be_inferred(tmp_path: Path) -> None:
    refusal(valid(tmp_path), "HSTU-E107", "48 columns", "num_heads", "--config", config={})
    path = valid(tmp_path)
    with pytest.raises(CheckpointError, match="HSTU-E107"):
        spec_from_checkpoint(path)


def test_head_dims_are_inferred_from_the_number_of_heads(tmp_path: Path) -> None:
    attention = spec_from_checkpoint(valid(tmp_path), {"num_heads": 2}).config.layer.attention
    assert (attention.attention_dim, attention.linear_dim, attention.scaling_seq_len) == (5, 7, 23.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_all_listed(tmp_path: Path, value: float) -> None:
    state = research_state_dict(FORM)
    state[ITEM][3, 2] = value
    state[LAYER_1 + "_o.bias"][:2] = value
    error = refusal(valid(tmp_path, state), "HSTU-E108", "2 parameters", f"{ITEM} (", f"{LAYER_1}_o.bias (")
    assert ("1 NaN" if value != value else "1 infinite") in error.why
    assert ("2 NaN" if value != value else "2 infinite") in error.why


def test_float64_weights_beyond_float32_are_refused_not_turned_into_infinity(tmp_path: Path) -> None:
    state = research_state_dict(FORM)
    state[ITEM] = state[ITEM].double()
    state[ITEM][1, 1] = 1e300
    refusal(valid(tmp_path, state), "HSTU-E108", ITEM, "1 infinite")


def test_weights_that_overflow_float16(tmp_path: Path) -> None:
    state = research_state_dict(FORM)
    state[LAYER_0 + "_uvqk"][0, 0] = 1e5
    spec = spec_from_checkpoint(valid(tmp_path, state), FORM.user_config())
    with pytest.raises(CheckpointError) as caught:
        model_from_spec(spec, torch.float16)
    assert (caught.value.code, caught.value.exit_code) == ("HSTU-E111", 3)
    assert "layers.0.uvqk_weight" in caught.value.why
    assert "--bf16" in caught.value.fix
    assert bool(torch.isfinite(model_from_spec(spec, torch.bfloat16).layers[0].uvqk_weight).all())


def test_bias_tables_beyond_float16_are_fine_because_they_stay_float32(tmp_path: Path) -> None:
    state = research_state_dict(FORM)
    state[LAYER_0 + "_rel_attn_bias._pos_w"][0] = 1e5
    spec = spec_from_checkpoint(valid(tmp_path, state), FORM.user_config())
    model = model_from_spec(spec, torch.float16)
    assert model.layers[0].pos_table.dtype == torch.float32
    assert float(model.layers[0].pos_table[0, 0]) == 1e5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {key: t.to(dtype) if t.is_floating_point() else t for key, t in research_state_dict(FORM).items()}
    spec = spec_from_checkpoint(valid(tmp_path, state), FORM.user_config())
    assert all(tensor.dtype == torch.float32 for tensor in spec.state_dict.values())
    assert torch.equal(spec.state_dict["item_embedding.weight"], state[ITEM].float())


@pytest.mark.parametrize(
    ("tensor", "seen"),
    [
        (torch.ones(61, 12, dtype=torch.int8), "int8"),
        (torch.ones(61, 12, dtype=torch.int64), "int64"),
        (torch.ones(61, 12, dtype=torch.bool), "bool"),
        (torch.ones(61, 12, dtype=torch.complex64), "complex64"),
        (torch.ones(61, 12).to_sparse(), "sparse_coo"),
    ],
)
def test_weights_that_are_not_plain_floats_are_refused(tmp_path: Path, tensor: torch.Tensor, seen: str) -> None:
    refusal(valid(tmp_path, changed(**{ITEM: tensor})), "HSTU-E110", ITEM, seen)


def test_tied_and_aliased_storage_gives_independent_weights(tmp_path: Path) -> None:
    state = research_state_dict(FORM)
    base = torch.randn(2, 12, 48)
    state[LAYER_0 + "_uvqk"], state[LAYER_1 + "_uvqk"] = base[0], base[1]
    state[LAYER_1 + "_o.weight"] = state[LAYER_0 + "_o.weight"]
    spec = spec_from_checkpoint(valid(tmp_path, state), FORM.user_config())
    assert torch.equal(spec.state_dict["layers.1.uvqk_weight"], base[1])
    spec.state_dict["layers.0.output_weight"].zero_()
    assert torch.equal(spec.state_dict["layers.1.output_weight"], state[LAYER_0 + "_o.weight"].t())


def test_strides_that_claim_more_than_the_file_holds_allocate_nothing(tmp_path: Path) -> None:
    hollow = torch.ones(1, 12).expand(10**9, 12)
    config = {**FORM.user_config(), "num_items": 10**9 - 1}
    refusal(valid(tmp_path, changed(**{ITEM: hollow})), "HSTU-E106", ITEM, "claim more elements", config=config)


# --- Configuration files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (b"not json", "is not JSON"),
        (b"", "is not JSON"),
        (b'{"num_heads": 1', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b"[1]", "list"),
        (b'"text"', "str"),
        (b"null", "NoneType"),
    ],
)
def test_configuration_file_that_is_not_a_json_object(tmp_path: Path, content: bytes, seen: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        config_from_file(path)
    assert (caught.value.code, caught.value.exit_code) == ("HSTU-E109", 3)
    assert seen in str(caught.value)
    assert str(path) in caught.value.what


def test_configuration_file_that_is_absent_or_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(CheckpointError, match=r"HSTU-E109.*cannot read the configuration"):
            config_from_file(path)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ('{"num_heads": 1, "num_heads": 2}', "'num_heads'"),
        ('{"layer": {"alpha": 1, "beta": 2, "alpha": 1}}', "'alpha'"),
    ],
)
def test_configuration_key_that_is_there_twice_is_not_decided_by_the_last(
    tmp_path: Path, content: str, key: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=rf"HSTU-E109[\s\S]*{key} more than once") as caught:
        config_from_file(path)
    assert str(path) in caught.value.what


@pytest.mark.parametrize(
    ("field", "value", "seen"),
    [
        ("num_heads", "2", "'2'"),
        ("num_heads", 2.0, "2.0"),
        ("num_heads", True, "True"),
        ("num_heads", -1, "-1"),
        ("num_heads", 0, "num_heads is 0"),
        ("num_heads", [1], "[1]"),
        ("concat_ua", "false", "'false'"),
        ("concat_ua", 0, "0"),
        ("item_l2_norm", None, "None"),
        ("linear_activation", ["silu"], "['silu']"),
        ("linear_activation", 1, "1"),
        ("postprocessor", {}, "{}"),
        ("max_sequence_len", "200", "'200'"),
    ],
)
def test_configuration_values_of_a_wrong_type(tmp_path: Path, field: str, value: Any, seen: str) -> None:
    refusal(valid(tmp_path), "HSTU-E109", field, seen, config={**FORM.user_config(), field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("normalization", "softmax_rel_bias"),
        ("preprocessor", "CombinedItemAndRatingInputFeaturesPreprocessor"),
        ("postprocessor", "none"),
        ("linear_activation", "relu"),
        ("hour_encoding", "rotary"),
    ],
)
def test_settings_that_are_not_compiled(tmp_path: Path, field: str, value: str) -> None:
    refusal(valid(tmp_path), "HSTU-E110", field, f"'{value}'", config={**FORM.user_config(), field: value})


@pytest.mark.parametrize("name", ["rel_bias", "hstu_rel_bias"])
def test_both_names_of_the_supported_normalisation(tmp_path: Path, name: str) -> None:
    spec = spec_from_checkpoint(valid(tmp_path), {**FORM.user_config(), "normalization": name})
    assert spec.config.layer.silu_scope == "uvqk"


def test_misspelt_field_is_not_taken_for_a_note(tmp_path: Path) -> None:
    config = {**FORM.user_config(), "linear_activaton": "none"}
    refusal(valid(tmp_path), "HSTU-E109", "linear_activaton", "linear_activation", config=config)


# --- Our own format ---------------------------------------------------------------------------------------------------


def native_content() -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = ResearchForm()
        config = _native_config(shape)
        model = RetrievalModel(config)
    return {"format": "hstu-compile/1", "config": config.to_dict(), "state_dict": model.state_dict()}


def _native_config(form: ResearchForm) -> Any:
    import dataclasses

    from hstu_compile.model.dialects import RESEARCH

    shapes = {key: tuple(tensor.shape) for key, tensor in research_state_dict(form).items()}
    return dataclasses.replace(RESEARCH.config(shapes, form.user_config()), dialect="native")


@pytest.mark.parametrize("found", ["hstu-compile/2", "hstu-compile/", "other/1", 1, "x" * 500, torch.ones(2)])
def test_own_format_of_a_version_that_is_not_known_is_not_read_as_the_first(tmp_path: Path, found: Any) -> None:
    path = saved(tmp_path, {**native_content(), "format": found})
    with pytest.raises(CheckpointError, match=r"HSTU-E104[\s\S]*known: 'hstu-compile/1'") as caught:
        spec_from_checkpoint(path)
    assert repr(found)[:12] in caught.value.why
    assert len(caught.value.why) < 120


def test_own_format_of_a_later_version_with_other_names_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, {"format": "hstu-compile/2", "state_dict": {"tokens": torch.ones(2)}})
    refusal(path, "HSTU-E104", "'hstu-compile/2'", "'hstu-compile/1'")


def test_own_format_may_be_left_out(tmp_path: Path) -> None:
    content = native_content()
    del content["format"]
    assert spec_from_checkpoint(saved(tmp_path, content)).dialect == "native"


def test_format_of_another_familys_file_is_its_own_matter(tmp_path: Path) -> None:
    path = saved(tmp_path, {"format": "theirs/7", "model_state_dict": research_state_dict(FORM)})
    assert spec_from_checkpoint(path, FORM.user_config()).dialect == "research"


def test_own_format_carries_its_configuration(tmp_path: Path) -> None:
    content = native_content()
    spec = spec_from_checkpoint(saved(tmp_path, content))
    assert spec.dialect == "native"
    assert spec.config.to_dict() == content["config"]
    assert all(torch.equal(spec.state_dict[name], tensor) for name, tensor in content["state_dict"].items())


def native_refusal(folder: Path, content: Any, code: str, *seen: str) -> None:
    path = saved(folder, content)
    with pytest.raises(CheckpointError) as caught:
        spec_from_checkpoint(path)
    assert caught.value.code == code, str(caught.value)
    for value in seen:
        assert value in str(caught.value)


def test_own_format_without_configuration(tmp_path: Path) -> None:
    native_refusal(tmp_path, native_content()["state_dict"], "HSTU-E109", "'config'", "--config")


@pytest.mark.parametrize(
    ("path", "value", "seen"),
    [
        (("num_items",), "many", "'many'"),
        (("num_items",), 0, "num_items is 0"),
        (("num_layers",), 10**12, "1000000000000"),
        (("layer",), None, "NoneType"),
        (("layer", "silu_scope"), "q", "'q'"),
        (("layer", "silu_scope"), ["u"], "['u']"),
        (("layer", "norm_eps"), 0.0, "norm_eps"),
        (("layer", "norm_eps"), float("nan"), "nan"),
        (("layer", "attention", "alpha"), 10**400, "float"),
        (("layer", "attention", "attention_dim"), 257, "257"),
        (("layer", "attention", "scaling_seq_len"), -1.0, "-1.0"),
        (("layer", "attention", "max_seq_len"), 24, "pos_table_len 23"),
        (("preprocessor",), "rated", "num_ratings"),
        (("surprise",), 1, "surprise"),
    ],
)
def test_own_format_with_a_configuration_that_cannot_be(
    tmp_path: Path, path: tuple[str, ...], value: Any, seen: str
) -> None:
    content = native_content()
    target = content["config"]
    for name in path[:-1]:
        target = target[name]
    target[path[-1]] = value
    native_refusal(tmp_path, content, "HSTU-E109", seen)


def test_own_format_lists_all_missing_fields(tmp_path: Path) -> None:
    content = native_content()
    del content["config"]["num_items"], content["config"]["postprocessor"]
    native_refusal(tmp_path, content, "HSTU-E109", "num_items, postprocessor")


def test_own_format_with_another_shape(tmp_path: Path) -> None:
    content = native_content()
    content["config"]["num_items"] = 10**9
    native_refusal(tmp_path, content, "HSTU-E106", "item_embedding.weight is [61, 12]", "[1000000001, 12]")


# --- Damage of any kind -----------------------------------------------------------------------------------------------


def _small_checkpoint(legacy: bool) -> bytes:
    form = ResearchForm(max_sequence_len=3, max_output_len=1, num_items=3, item_dim=2, num_blocks=1, num_heads=1)
    buffer = io.BytesIO()
    state = research_state_dict(form)
    torch.save({"epoch": 1, "model_state_dict": state}, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


SMALL = {"zip": _small_checkpoint(False), "legacy": _small_checkpoint(True)}


@pytest.mark.parametrize("kind", SMALL)
@settings(
    max_examples=250, deadline=4000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_bytes_end_in_a_documented_error(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    content = bytearray(SMALL[kind])
    flips = data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(1, 255)), max_size=6))
    for at, mask in flips:
        content[at] ^= mask
    keep = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path = tmp_path / "damaged.pt"
    path.write_bytes(bytes(content[:keep]))
    try:
        spec = spec_from_checkpoint(path, {"num_heads": 1})
    except (CheckpointError, UnsupportedModelError):
        return
    assert all(bool(torch.isfinite(tensor).all()) for tensor in spec.state_dict.values())


# --- Ranking ----------------------------------------------------------------------------------------------------------

DLRM = DlrmForm(additional=("movie_category",), tasks=(("like", 0), ("minutes", 1)))
PREPROCESSOR = "_hstu_transducer._input_preprocessor."
ENCODER = "_hstu_transducer._positional_encoder."
POSTPROCESSOR = "_hstu_transducer._output_postprocessor."


def dlrm_refusal(folder: Path, code: str, *seen: str, **tensors: torch.Tensor | None) -> HstuCompileError:
    """The refusal of a ranking checkpoint with some tensors replaced; None takes one out."""
    state = {**dlrm_state_dict(DLRM), **tensors}
    path = saved(folder, {key: tensor for key, tensor in state.items() if tensor is not None})
    return refusal(path, code, *seen, config=DLRM.user_config())


def test_ranking_family_is_detected_and_may_be_named(tmp_path: Path) -> None:
    path = saved(tmp_path, dlrm_state_dict(DLRM))
    for dialect in (None, "dlrm_v3"):
        assert spec_from_checkpoint(path, DLRM.user_config(), dialect).dialect == "dlrm_v3"
    refusal(path, "HSTU-E104", "research", config=DLRM.user_config(), dialect="research")
    refusal(valid(tmp_path), "HSTU-E104", "dlrm_v3", dialect="dlrm_v3")


@pytest.mark.parametrize(
    ("changes", "code", "seen"),
    [
        ({"hstu_num_heads": None}, "HSTU-E107", "hstu_num_heads must be given"),
        ({"hstu_num_heads": 3}, "HSTU-E106", "hstu_num_heads 3"),
        ({"action_weights": [1, 2, 4, 8]}, "HSTU-E106", "_combined_action_weights is [1, 2, 4, 8, 16]"),
        ({"action_weights": None}, "HSTU-E105", "_action_encoder._action_embedding_table"),
        ({"enable_postprocessor": False}, "HSTU-E105", "_time_feature_combiner.weight"),
        ({"use_layer_norm_postprocessor": True}, "HSTU-E105", "_time_feature_combiner.weight"),
        ({"hstu_group_norm": True}, "HSTU-E106", "_output_norm_weight is [14], the configuration needs [2]"),
        ({"multitask_configs": [{"task_name": "like", "task_type": 0}]}, "HSTU-E106", "is [2, 14], the configuration"),
        (
            {"contextual_feature_to_max_length": {}, "contextual_feature_to_min_uih_length": {}},
            "HSTU-E105",
            "_batched_contextual_linear_weights",
        ),
        ({"contextual_feature_to_max_length": {"user_id": 2}}, "HSTU-E106", "the configuration needs [2, 6, 12]"),
        ({"user_embedding_feature_names": ["movie_id"]}, "HSTU-E106", "0 additional features"),
        ({"scaling_seq_len": 0}, "HSTU-E109", "scaling_seq_len is 0"),
        ({"time_bucket_fn": "log2"}, "HSTU-E110", "'log2'"),
        ({"hstu_group_nrom": True}, "HSTU-E109", "nearest: hstu_group_norm"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_ranking_configuration_of_another_checkpoint(
    tmp_path: Path, changes: dict[str, Any], code: str, seen: str
) -> None:
    refusal(saved(tmp_path, dlrm_state_dict(DLRM)), code, seen, config={**DLRM.user_config(), **changes})


def test_ranking_checkpoint_without_its_configuration(tmp_path: Path) -> None:
    path = saved(tmp_path, dlrm_state_dict(DLRM))
    with pytest.raises(CheckpointError, match=r"(?s)HSTU-E109.*DlrmHSTUConfig"):
        spec_from_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value", "seen"),
    [
        ("_action_encoder._combined_action_weights", [1, 2, 4, 8, 32], "expected [1, 2, 4, 8, 16]"),
        ("_period_units", [[3600.0, 604800.0]], "expected [[3600.0, 86400.0]]"),
        ("_units_per_period", [[12.0, 7.0]], "expected [[24.0, 7.0]]"),
        ("_units_per_period", [[24.0]], "is [[24.0]], expected [[24.0, 7.0]]"),
    ],
)
def test_buffers_that_are_not_the_familys_constants(tmp_path: Path, key: str, value: Any, seen: str) -> None:
    """The arithmetic with them is compiled as constants: a file with others is another model."""
    full = (PREPROCESSOR if key.startswith("_action") else POSTPROCESSOR) + key
    dlrm_refusal(tmp_path, "HSTU-E106", "1 buffers", full, seen, **{full: torch.tensor(value)})


def test_buffers_that_claim_a_billion_numbers_are_not_written_out(tmp_path: Path) -> None:
    key, started = POSTPROCESSOR + "_period_units", time.monotonic()
    hollow = torch.ones(1, 1, dtype=torch.float64).expand(10**10, 2)
    dlrm_refusal(tmp_path, "HSTU-E106", "1 buffers", "is of shape [10000000000, 2], expected", **{key: hollow})
    assert time.monotonic() - started < 5


def test_buffers_may_be_absent_or_wider(tmp_path: Path) -> None:
    state = dlrm_state_dict(DLRM)
    buffers = [key for key in state if key.endswith(("_combined_action_weights", "_period_units", "_units_per_period"))]
    assert len(buffers) == 3
    reference = spec_from_checkpoint(saved(tmp_path, state), DLRM.user_config())
    for changes in ({key: state[key].double() for key in buffers}, dict.fromkeys(buffers)):
        changed = {key: tensor for key, tensor in {**state, **changes}.items() if tensor is not None}
        spec = spec_from_checkpoint(saved(tmp_path, changed), DLRM.user_config())
        assert spec.config == reference.config
        assert all(torch.equal(spec.state_dict[name], tensor) for name, tensor in reference.state_dict.items())


@pytest.mark.parametrize(
    "key",
    [
        PREPROCESSOR + "_content_embedding_mlp.1.bias",
        PREPROCESSOR + "_additional_embedding_mlp.2.weight",
        PREPROCESSOR + "_action_embedding_mlp.3.weight",
        PREPROCESSOR + "_action_encoder._target_action_embedding_table",
        PREPROCESSOR + "_batched_contextual_linear_bias",
        POSTPROCESSOR + "_layer_norm.bias",
        "_hstu_transducer._stu_module._stu_layers.1._uvqk_beta",
        "_item_embedding_mlp.3.bias",
        "_multitask_module._prediction_module.1.weight",
    ],
)
def test_ranking_weights_that_are_missing_are_named(tmp_path: Path, key: str) -> None:
    dlrm_refusal(tmp_path, "HSTU-E105", "missing 1", key, **{key: None})


def test_ranking_tables_of_another_width_or_hollow(tmp_path: Path) -> None:
    table = "_embedding_collection.embeddings.movie_category.weight"
    dlrm_refusal(tmp_path, "HSTU-E106", "movie_category is 7 wide", **{table: torch.ones(40, 7)})
    dlrm_refusal(tmp_path, "HSTU-E106", table, "claim more", **{table: torch.ones(1, 6).expand(10**9, 6)})
    dlrm_refusal(tmp_path, "HSTU-E106", "num_rows of movie_category", **{table: torch.ones(1, 6).expand(10**11, 6)})
    dlrm_refusal(tmp_path, "HSTU-E110", table, "int8", **{table: torch.ones(40, 6, dtype=torch.int8)})
    dlrm_refusal(tmp_path, "HSTU-E108", table, "1 NaN", **{table: torch.tensor([[float("nan")] + [0.0] * 5])})


@pytest.mark.parametrize(
    ("key", "rows", "code", "seen"),
    [
        ("_position_embeddings_weight", 10**9, "HSTU-E106", "claim more elements than the file stores"),
        ("_position_embeddings_weight", 10**11, "HSTU-E109", "num_positions is 100000000000"),
        ("_timestamp_embeddings_weight", 10**6, "HSTU-E106", "claim more elements than the file stores"),
        ("_timestamp_embeddings_weight", 10**9, "HSTU-E109", "num_time_buckets is 999999999"),
    ],
)
def test_hollow_position_and_time_tables_allocate_nothing(
    tmp_path: Path, key: str, rows: int, code: str, seen: str
) -> None:
    started = time.monotonic()
    dlrm_refusal(tmp_path, code, seen, **{ENCODER + key: torch.ones(1, 12).expand(rows, 12)})
    assert time.monotonic() - started < 5


def native_ranking() -> tuple[dict[str, Any], RankingModel]:
    shapes = {key: tuple(tensor.shape) for key, tensor in dlrm_state_dict(DLRM).items()}
    config = dataclasses.replace(DLRM_V3.config(shapes, DLRM.user_config()), dialect="native")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RankingModel(config).eval()
    return {"format": "hstu-compile/1", "config": config.to_dict(), "state_dict": model.state_dict()}, model


def test_own_format_holds_ranking_models_too(tmp_path: Path) -> None:
    content, model = native_ranking()
    spec = spec_from_checkpoint(saved(tmp_path, content))
    assert (spec.dialect, spec.ignored_keys) == ("native", ())
    assert spec.config == model.config
    loaded = model_from_spec(spec)
    assert isinstance(loaded, RankingModel)
    inputs = packed_inputs(DLRM, draw_requests(DLRM, [(5, 3), (0, 2), (30, 1)]))
    assert torch.equal(loaded.packed(inputs).logits, model.packed(inputs).logits)


def test_own_format_of_a_family_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    family = spec_from_checkpoint(saved(tmp_path, dlrm_state_dict(DLRM)), DLRM.user_config())
    content = {"format": "hstu-compile/1", "config": family.config.to_dict(), "state_dict": family.state_dict}
    native = spec_from_checkpoint(saved(tmp_path, content, "native.pt"))
    assert native.config == family.config
    inputs = packed_inputs(DLRM, draw_requests(DLRM, [(5, 3), (0, 2), (30, 1)]))
    models = [model_from_spec(spec, torch.float64) for spec in (family, native)]
    assert all(isinstance(model, RankingModel) for model in models)
    first, second = (model.packed(inputs) for model in models if isinstance(model, RankingModel))
    assert torch.equal(first.logits, second.logits)


@pytest.mark.parametrize(
    ("path", "value", "code", "seen"),
    [
        (("num_positions",), "many", "HSTU-E109", "'many'"),
        (("num_time_buckets",), 10**12, "HSTU-E109", "1000000000000"),
        (("num_positions",), 10**9, "HSTU-E106", "position_embedding is [30, 12]"),
        (("tables", 0, "num_rows"), 10**9, "HSTU-E106", "tables.0.weight is [40, 6]"),
        (("tables", 0, "name"), 7, "HSTU-E109", "name is 7"),
        (("tables",), {}, "HSTU-E109", "expected a list, got dict"),
        (("tasks", 0, "kind"), "bce", "HSTU-E109", "'bce'"),
        (("tasks",), [], "HSTU-E109", "tasks is empty"),
        (("action_weights",), [1], "HSTU-E106", "action_embedding is [5, 8]"),
        (("layer", "embedding_dim"), 10**30, "HSTU-E109", "embedding_dim is 1000"),
        (("layer", "attention", "max_seq_len"), 20, "HSTU-E109", "max_seq_len 20"),
        (("layer", "attention", "alpha"), 10**400, "HSTU-E109", "float"),
        (("num_layers",), 10**8, "HSTU-E109", "num_layers is 100000000"),
        (("surprise",), 1, "HSTU-E109", "surprise"),
    ],
)
def test_own_format_with_a_ranking_configuration_that_cannot_be(
    tmp_path: Path, path: tuple[Any, ...], value: Any, code: str, seen: str
) -> None:
    content, _ = native_ranking()
    target = json.loads(json.dumps(content["config"]))
    content["config"] = target
    for name in path[:-1]:
        target = target[name]
    target[path[-1]] = value
    native_refusal(tmp_path, content, code, seen)
