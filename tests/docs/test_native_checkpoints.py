"""docs/native-checkpoints.md: its example runs, and its tables name every tensor, shape and field."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu_compile.__main__ import main
from hstu_compile.checkpoint import model_from_spec, spec_from_checkpoint
from hstu_compile.model.config import AttentionConfig, LayerConfig, RetrievalConfig
from hstu_compile.model.families import HstuModel, model_from_config
from hstu_compile.model.ranking_config import RankingConfig
from tests.exported_models import small_config

import train_ranker

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "native-checkpoints.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def rows() -> list[list[str]]:
    lines = [line.strip().strip("|") for line in PAGE.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder in which the page's Python ran, and its names."""
    folder, names = tmp_path_factory.mktemp("native"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks("python"):
            exec(compile(block, "native-checkpoints.md", "exec"), names)  # noqa: S102 - our own page is what is tested
    return folder, names


def test_the_file_of_the_example_is_the_model_that_was_compared(example: tuple[Path, dict[str, Any]]) -> None:
    folder, names = example
    spec = spec_from_checkpoint(folder / "own.pt")
    assert (spec.dialect, spec.config) == ("native", names["config"])
    torch.testing.assert_close(model_from_spec(spec).state_dict(), names["model"].state_dict(), rtol=0, atol=0)


def test_the_comparison_of_the_example_notices_every_mistake(example: tuple[Path, dict[str, Any]]) -> None:
    """The tolerance is not so wide that exchanged columns, a reversed table or a forgotten factor pass."""
    _, names = example
    good, model = {name: tensor.detach().clone() for name, tensor in names["weights"].items()}, names["model"]
    width = names["HEADS"] * names["HEAD_DIM"]
    u, v, q, k = good["layers.0.uvqk_weight"].split(width, dim=1)
    mistakes = {
        "layers.0.uvqk_weight": torch.cat([v, u, q, k], dim=1),
        "layers.1.pos_table": good["layers.1.pos_table"].flip(1),
        "item_embedding.weight": names["own"].items.weight.detach(),
    }
    comparison = next(block for block in blocks("python") if "assert_close" in block)
    for name, wrong in mistakes.items():
        model.load_state_dict({**good, name: wrong})
        with pytest.raises(AssertionError, match="not close"):
            exec(compile(comparison, "native-checkpoints.md", "exec"), names)  # noqa: S102 - likewise
    model.load_state_dict(good)


def test_the_commands_of_the_example_run(
    example: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(example[0])
    for line in blocks("bash")[0].splitlines():
        program, command, *arguments = line.split()
        assert program == "hstu-compile"
        # Builds are tested elsewhere; here, that this one is planned.
        assert main([command, *arguments, *(["--dry-run"] if command == "build" else [])]) == 0
    assert "dialect native" in capsys.readouterr().out


def retrieval_configs() -> list[RetrievalConfig]:
    configs = []
    for affine, per_head, group, concat, rated in itertools.product(
        (False, True), (False, True), ("layer", "group"), ("gated", "u_norm_gated"), (False, True)
    ):
        base = small_config()
        attention = dataclasses.replace(
            base.layer.attention, num_heads=2, attention_dim=6, linear_dim=8, bias_per_head=per_head
        )
        layer = dataclasses.replace(
            base.layer,
            attention=attention,
            uvqk_bias=affine,
            input_norm_affine=affine,
            output_norm=group,
            output_norm_affine=affine,
            output_concat=concat,
            output_bias=not affine,
        )
        item_dim = layer.embedding_dim - 4 if rated else layer.embedding_dim
        configs.append(
            dataclasses.replace(
                base,
                layer=layer,
                preprocessor="rated" if rated else "positional",
                item_embedding_dim=item_dim,
                num_ratings=3 if rated else 0,
            )
        )
    return configs


def ranking_configs() -> list[RankingConfig]:
    base = train_ranker.ranker_config()
    features = (*base.sequence_features, dataclasses.replace(base.sequence_features[0], history="h2", candidate="c2"))
    return [
        dataclasses.replace(base, postprocessor=postprocessor, sequence_features=chosen)
        for postprocessor in ("timestamp_layer_norm", "layer_norm", "l2_norm")
        for chosen in (base.sequence_features, features)
    ]


def symbols(config: RetrievalConfig | RankingConfig) -> dict[str, Any]:
    """What the letters of the page stand for."""
    layer, attention = config.layer, config.layer.attention
    values = {
        **{name: getattr(config, name) for name in dir(config) if not name.startswith("_")},
        "num_time_buckets": attention.num_time_buckets,
        "D": layer.embedding_dim,
        "H": attention.num_heads,
        "dqk": attention.attention_dim,
        "dv": attention.linear_dim,
        "N": attention.pos_table_len,
        "heads": attention.num_heads if attention.bias_per_head else 1,
        "parts": 1 if layer.output_concat == "gated" else 3,
        "group_norm": layer.output_norm == "group",
    }
    if isinstance(config, RankingConfig):
        values |= {"F": config.table_dim, "A": len(config.action_weights)}
        values |= {name: len(values[name]) for name in ("sequence_features", "item_features", "tasks")}
        values["num_time_buckets"] = config.num_time_buckets
    return values


def documented(model: HstuModel) -> dict[str, list[int]]:
    """Every tensor that the page's tables allow this model, with its shape."""
    config, names = model.config, symbols(model.config)
    found: dict[str, list[int]] = {}

    def evaluated(text: str, **more: Any) -> Any:
        return eval(text.strip("`"), {}, {**names, **more})  # noqa: S307 - our own page

    for row in rows():
        key = row[0].strip("`")
        if len(row) == 3 and row[1].startswith("`["):
            if "{t}" in key:
                if isinstance(config, RankingConfig):
                    for index, table in enumerate(config.tables):
                        found[key.format(t=index)] = evaluated(row[1], num_rows=table.num_rows)
                continue
            try:
                shape = evaluated(row[1])
            except NameError:  # a symbol of the other kind of model
                continue
            count = getattr(config, "contextual_len", 0) if "{c}" in key else config.num_layers
            found |= {key.format(i=index, c=index): shape for index in range(count)}
        elif len(row) == 5 and isinstance(config, RankingConfig) and key != "network":
            inputs, hidden, outputs = (evaluated(cell) for cell in row[1:4])
            parts = {"hidden.weight": [inputs, hidden], "hidden.bias": [hidden], "output.weight": [hidden, outputs]}
            parts |= {"hidden_norm.weight": [hidden], "hidden_norm.bias": [hidden], "output.bias": [outputs]}
            if key != "head":
                parts |= {"output_norm.weight": [outputs], "output_norm.bias": [outputs]}
            found |= {f"{key}.{part}": shape for part, shape in parts.items()}
    return found


def test_the_tables_name_every_tensor_with_its_shape() -> None:
    seen: set[str] = set()
    for config in (*retrieval_configs(), *ranking_configs()):
        with torch.device("meta"):
            model = model_from_config(config)
        allowed = documented(model)
        actual = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        assert {name: allowed.get(name) for name in actual} == actual
        seen |= {re.sub(r"\.\d+\.", ".0.", name) for name in actual}
    # A row that stands for no tensor of any model would be an invention.
    allowed_names = {
        re.sub(r"\.\d+\.", ".0.", name)
        for config in (retrieval_configs()[-1], ranking_configs()[-1])
        for name in documented(model_from_config(config))
    }
    assert allowed_names <= seen


@pytest.mark.parametrize("kind", [AttentionConfig, LayerConfig, RetrievalConfig, RankingConfig])
def test_the_tables_name_every_field(kind: type[Any]) -> None:
    table = PAGE.split(f"| `{kind.__name__}` | value |")[1].split("\n\n")[0]
    named = [name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.strip("|").split(" | ")[0])]
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(kind))
