"""Every command of README and every link of a page does what it says; samples' READMEs name what exists."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu_compile.calibration.batches import retrieval_batch
from hstu_compile.model.ranking import RankingModel
from tests.e2e.conftest import CommandResult, hstu_compile
from tests.exported_models import small_config, small_model

import train
import train_ranker

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("", "docs", "plugins/**", "samples/**", "tests/**")
    for path in ROOT.glob(f"{folder}/*.md".removeprefix("/"))
)
# The demos are run whole by tests/e2e (slow), the last is what runs this test.
# Configuration keys of a DLRM-HSTU checkpoint that Meta's own configuration lacks.
OWN_KEYS = (
    *("scaling_seq_len", "time_bucket_fn", "time_bucket_clamp", "time_feature_precision"),
    *("min_history_counts", "external_embeddings", "embedding_tables"),
)
MAKE_COMMANDS = {"make demo", "make demo-ranking", "make test"}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shell_commands(text: str = README) -> list[str]:
    lines = [line.split("   #")[0].strip() for block in blocks("bash", text) for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks to the commands like the repository after the demos, with random weights."""
    folder = tmp_path_factory.mktemp("readme")
    # One layer each: what the commands do is the same, and there is less to trace.
    config = small_config(1)
    checkpoint = folder / "build" / "demo" / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True)
    torch.save(
        {
            "format": "hstu-compile/1",
            "config": config.to_dict(),
            "state_dict": small_model(config).state_dict(),
        },
        checkpoint,
    )
    torch.manual_seed(0)
    ranker = RankingModel(dataclasses.replace(train_ranker.ranker_config(), num_layers=1))
    train.save_checkpoint(ranker, folder / "build" / "demo-ranking" / train_ranker.CHECKPOINT_NAME)
    requests = folder / "build" / "quantisation" / "retrieval-earlier.npz"
    requests.parent.mkdir()
    np.savez(requests, **retrieval_batch("", config, [5, 9, 3], seed=0).arrays)
    program = shutil.which("hstu-compile", path=str(Path(sys.executable).parent)) or shutil.which("hstu-compile")
    assert program is not None, "hstu-compile is not installed beside this Python"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "hstu-compile").symlink_to(program)
    return folder


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_readme_has_the_make_commands():
    assert set(shell_commands()) >= MAKE_COMMANDS
    assert {command.split()[1] for command in MAKE_COMMANDS} <= make_targets()


def samples() -> list[Path]:
    return sorted((ROOT / "samples").glob("*/README.md"))


@pytest.mark.parametrize("readme", samples(), ids=lambda path: path.parent.name)
def test_samples_readme_names_what_exists(readme: Path):
    """Their commands are run by tests/e2e through the same programs; here, that they are still called so."""
    text = readme.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("## ")][:2] == ["## Introduction", "## Running"]
    commands = shell_commands(text)
    assert commands
    for command in commands:
        program, *arguments = command.split()
        if program == "make":
            assert set(arguments) <= make_targets()
        elif program == ".venv/bin/python":
            module = arguments[1] if arguments[0] == "-m" else None
            assert importlib.util.find_spec(module) if module else (ROOT / arguments[0]).is_file()
        elif readme.parent.name == "cpp_loader":
            # tests/cpp_loader runs every one of them.
            assert program in ("cmake", "build/cpp_loader/hstu_score")
        else:
            assert program == ".venv/bin/hstu-compile"
    assert f"samples/{readme.parent.name}" in README
    for name in re.findall(r"`(\w+\.py)`", text):
        assert (readme.parent / name).is_file(), f"{readme} names {name}"


@pytest.fixture(scope="module")
def results(workplace: Path) -> dict[str, CommandResult]:
    """What README's commands gave, run in order.

    The first of each subcommand is run as README has it. Further builds, and `calibrate`, run the same `main` in this
    process: their imports of torch and its exporter are as dear as what they do.
    """
    results: dict[str, CommandResult] = {}
    typed: set[str] = set()
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(workplace)
        for command in shell_commands():
            program, *arguments = command.split()
            if program != ".venv/bin/hstu-compile":
                continue
            if arguments[0] in typed | {"calibrate"}:
                results[command] = hstu_compile(*arguments)
            else:
                typed.add(arguments[0])
                done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
                results[command] = CommandResult(done.returncode, done.stdout, done.stderr)
    return results


@pytest.mark.timeout(300)
def test_readme_commands_run_in_order(results: dict[str, CommandResult]):
    commands = [command for command in shell_commands() if command not in MAKE_COMMANDS]
    assert len(commands) >= 8
    for command in commands:
        assert command in results, f"README has a command that no test runs: {command}"
        done = results[command]
        assert done.exit_code == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip(), f"{command} printed nothing"


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("results")
def test_readme_python_examples_run(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    """The second and the third example open bundles that the commands made."""
    retrieval, growing, ranking = blocks("python")
    monkeypatch.chdir(workplace)
    feeds = {
        "item_ids": np.array([1, 2, 3], np.int32),
        "timestamps": np.array([1_700_000_000, 1_700_000_100, 1_700_000_000], np.int64),
        "seq_offsets": np.array([0, 2, 3], np.int32),
        "request_timestamps": np.array([1_700_000_200, 1_700_000_200], np.int64),
    }
    names: dict[str, Any] = {"feeds": feeds}
    exec(compile(retrieval, "README.md", "exec"), names)  # noqa: S102 - our own README is what is tested
    assert names["answers"]["user_embeddings"].shape[0] == 2

    names = {}
    exec(compile(growing, "README.md", "exec"), names)  # noqa: S102 - our own README is what is tested
    results = [names[name] for name in ("first", "later", "again", "alone")]
    assert [(result.cache, result.encoded) for result in results] == [
        ("miss", 3),
        ("appended", 2),
        ("hit", 1),
        ("off", 4),
    ]
    np.testing.assert_allclose(names["later"].user_embedding, names["alone"].user_embedding, rtol=0, atol=1e-6)
    assert (names["growth"].encoded, names["growth"].reused) == (10, 5)

    names = {}
    exec(compile(ranking, "README.md", "exec"), names)  # noqa: S102 - our own README is what is tested
    assert [names[name].cache for name in ("first", "second", "alone")] == ["miss", "hit", "off"]
    assert names["first"].preds.shape == (100, 1)
    assert np.ptp(names["first"].preds) > 1e-3
    assert np.array_equal(names["first"].preds, names["second"].preds)
    np.testing.assert_allclose(names["alone"].preds, names["first"].preds, rtol=1e-5)
    stats = names["stats"]
    assert (stats.cache.hits, stats.cache.misses, stats.prefill_passes, stats.score_passes) == (1, 1, 1, 4)
    # More candidates than --max-candidates: two parts of 64 in one pass.
    assert (stats.packed_passes, stats.candidates) == (1, 2 * 100 + 2 * 64)


def test_readme_names_every_command_family_and_configuration_key():
    from hstu_compile.cli import cli
    from hstu_compile.model.dialects import DIALECTS

    for name in cli.commands:
        assert f"`{name}" in README, f"README does not mention hstu-compile {name}"
    for dialect in DIALECTS:
        assert f"| `{dialect.name}` |" in README, f"README does not mention the family {dialect.name}"
    for key in OWN_KEYS:
        assert f"| `{key}` |" in README, f"README does not mention the configuration key {key}"


def test_readme_names_what_a_session_can_refuse():
    from hstu_compile.errors import ERROR_CODES

    codes = set(re.findall(r"\bE(7\d\d)\b", README))
    assert codes >= {"703", "704", "705", "707", "708", "709"}
    assert {f"HSTU-E{code}" for code in codes} <= set(ERROR_CODES)


def anchors(text: str) -> set[str]:
    """Of every heading, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pages_are_found():
    assert {"README.md", "CONTRIBUTING.md", "docs/m-falcon.md", "samples/02_ranking/README.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    path = ROOT / page
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{page} links to {link}, which does not exist"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page} links to {link}: no such heading"


def test_every_public_name_loads():
    import hstu_compile

    assert [name for name in hstu_compile.__all__ if not hasattr(hstu_compile, name)] == []
    for line in re.findall(r"^from hstu_compile import (.+)$", README, re.MULTILINE):
        assert set(line.split(", ")) <= set(hstu_compile.__all__)


def test_version_is_stated_once():
    import hstu_compile

    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert stated is not None
    assert stated[1] == hstu_compile.__version__
