from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
import torch

import hstu_compile
from hstu_compile import cli, pipeline
from hstu_compile.__main__ import main
from hstu_compile.errors import ERROR_CODES, EngineError
from hstu_compile.op_schema import is_attention, node_attributes
from tests.research_reference import ResearchForm, research_state_dict

FORM = ResearchForm(num_items=30, num_blocks=1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "ckpt.pt"
    torch.save({"model_state_dict": research_state_dict(FORM)}, path)
    (tmp_path / "config.json").write_text(json.dumps(FORM.user_config()))
    return path


def under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("command", sorted(cli.cli.commands))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "-h"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: hstu-compile {command}")
    assert cli.cli.commands[command].help


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert hstu_compile.__version__ in capsys.readouterr().out


def test_explain_lists_and_explains_every_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 0
    listed = capsys.readouterr().out
    for code, doc in ERROR_CODES.items():
        assert f"{code}  {doc.title}" in listed
        for spelling in (code, code.removeprefix("HSTU-"), code.lower()):
            assert main(["explain", spelling]) == 0
            assert doc.text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "seen"),
    [
        (["explain", "E000"], 2, "HSTU-E902"),
        (["build", "x.pt", "--fp16", "--bf16"], 2, "--fp16 and --bf16 exclude each other"),
        (["build", "x.pt", "--fp16", "--bf16", "--fp32"], 2, "--fp32 and --fp16 and --bf16"),
        (["build"], 2, "CHECKPOINT"),
        (["build", "x.pt", "--backend", "magic"], 2, "magic"),
        (["build", "x.pt", "--m-falcon", "micro-batch=" + "9" * 5000], 2, "HSTU-E901"),
        (["build", "x.pt", "--no-such-option"], 2, "--no-such-option"),
        (["no-such-command"], 2, "no-such-command"),
        (["inspect", "absent.pt"], 3, "HSTU-E101"),
        (["build", "absent.pt"], 3, "HSTU-E101"),
        (["verify", "absent"], 8, "HSTU-E803"),
        (["run", "absent", "--inputs", "a.npz", "--outputs", "b.npz"], 8, "HSTU-E803"),
    ],
)
def test_refusals_have_their_exit_code_no_traceback_and_leave_nothing(
    arguments: list[str],
    code: int,
    seen: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert seen in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert under(tmp_path) == set()


def test_json_refusal_has_the_fields_of_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "absent.pt", "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["code"], error["stage"], error["exit_code"]) == ("HSTU-E101", "checkpoint", 3)
    assert "absent.pt" in error["what"]


@pytest.mark.parametrize(
    ("error", "code", "seen"),
    [
        (KeyboardInterrupt(), 130, "nothing was left behind"),
        (click.Abort(), 130, "nothing was left behind"),
        (ZeroDivisionError("ours"), 70, "This is a bug"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "hstu-compile[export]"),
        (ModuleNotFoundError("No module named 'numpy'", name="numpy"), 2, "pip install 'hstu-compile'"),
        (ModuleNotFoundError("No module named 'hstu_compile.x'", name="hstu_compile.x"), 70, "This is a bug"),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_every_ending_has_its_exit_code(
    error: BaseException, code: int, seen: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(**options: Any) -> None:
        raise error

    monkeypatch.setattr(cli.cli, "main", ends)
    assert main([]) == code
    err = capsys.readouterr().err
    assert seen in err
    assert ("Traceback" in err) == (code == 70)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_that_native_code_turned_into_another_error_is_still_an_interrupt(
    kind: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def importing(**options: Any) -> None:
        try:
            signal.raise_signal(kind)
        except KeyboardInterrupt as error:
            raise EngineError("HSTU-E401", "onnxruntime", "initialization failed", "install it") from error

    monkeypatch.setattr(cli.cli, "main", importing)
    assert main([]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was left behind\n"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (["build", "x.pt", "--max-batch", "many"], "'many' is not a valid integer"),
        (["build"], "CHECKPOINT"),
        (["no-such-command"], "no-such-command"),
    ],
)
def test_an_option_that_click_refuses_is_json_too(
    arguments: list[str], seen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["stage"], error["exit_code"]) == ("usage", 2)
    assert seen in error["what"]


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (ZeroDivisionError("ours"), 70)])
def test_an_interrupt_and_a_bug_are_json_too(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(**options: Any) -> None:
        raise error

    monkeypatch.setattr(cli.cli, "main", ends)
    assert main(["env", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == code


def test_a_reader_that_has_gone_is_no_failure() -> None:
    """`hstu-compile explain | head -1` exited with 1, which stands for nothing."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "hstu_compile", "explain"], stdout=pipe, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("arguments", [["explain"], ["env", "--json"]])
def test_a_full_standard_output_is_not_called_a_bug(arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hstu_compile", *arguments], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 8
    assert b"HSTU-E802" in done.stderr
    assert b"Traceback" not in done.stderr


def test_inspect_checkpoint_as_json_and_as_text(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", str(checkpoint), "--config", str(checkpoint.with_name("config.json"))]
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["dialect"], facts["ignored_keys"]) == ("checkpoint", "research", ["_attn_mask"])
    assert facts["config"]["layer"]["attention"]["scaling_seq_len"] == 23.0
    assert facts["parameters"] == sum(
        tensor.numel() for key, tensor in research_state_dict(FORM).items() if key != "_attn_mask"
    )
    assert main(arguments) == 0
    assert "scaling_seq_len: 23\n" in capsys.readouterr().out


def test_dry_run_says_what_would_be_built_and_writes_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    before = under(checkpoint.parent)
    arguments = ["build", "ckpt.pt", "--config", "config.json", "--backend", "onnx", "--fp16", "--dry-run"]
    assert main(arguments) == 0
    assert "precision fp16" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["attention_nodes"], facts["attention_silu"]) == (1, "fast")
    assert main([*arguments, "--attention-silu", "accurate"]) == 0
    assert "SiLU accurate" in capsys.readouterr().out
    assert under(checkpoint.parent) == before


@pytest.mark.parametrize(
    ("options", "exit_code", "seen"),
    [
        (["-o", "/"], 8, "HSTU-E801"),
        (["-o", "own.pt"], 8, "HSTU-E801"),
        (["--data", "absent.npz"], 7, "HSTU-E706"),
        (["--data", "no_targets.npz"], 7, "HSTU-E831"),
        (["--max-batch", "99999999999"], 5, "which int32 offsets cannot count"),
    ],
)
def test_dry_run_refuses_what_the_build_would_refuse_before_it_traces(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    exit_code: int,
    seen: str,
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    Path("own.pt").write_text("mine")
    np.savez("no_targets.npz", item_ids=np.ones(1, np.int32))
    before = under(checkpoint.parent)
    arguments = ["build", "ckpt.pt", "--config", "config.json", "--backend", "onnx", *options]
    assert main([*arguments, "--dry-run"]) == exit_code
    said = capsys.readouterr().err
    assert seen in said
    monkeypatch.setattr(pipeline, "exported_from_served", lambda *_, **__: pytest.fail("the build traces"))
    assert main(arguments) == exit_code
    assert said in capsys.readouterr().err
    assert under(checkpoint.parent) == before


def test_a_build_writes_the_silu_and_the_norms_that_were_asked_for_into_graph_and_report(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    bundle = tmp_path / "accurate.hstu"
    arguments = ["build", "ckpt.pt", "--config", "config.json", "--backend", "onnx", "--no-verify", "-o", str(bundle)]
    assert main([*arguments, "--attention-silu", "accurate"]) == 0
    nodes = [node for node in onnx.load(bundle / "model.onnx").graph.node if is_attention(node)]
    assert [node_attributes(node)["silu"] for node in nodes] == [1]
    assert json.loads((bundle / "report.json").read_text())["attention_silu"] == "accurate"
    assert "SiLU of attention" in (bundle / "report.html").read_text()
    assert "HstuNorm" in {node.op_type for node in onnx.load(bundle / "model.onnx").graph.node}
    assert main([*arguments, "--no-fuse-norms", "--force"]) == 0
    kinds = {node.op_type for node in onnx.load(bundle / "model.onnx").graph.node}
    assert "LayerNormalization" in kinds
    assert "HstuNorm" not in kinds
    assert json.loads((bundle / "report.json").read_text())["fuse_norms"] is False
    assert main([*arguments, "--attention-silu", "exact"]) == 2
    assert "'exact' is not one of 'fast', 'accurate'" in capsys.readouterr().err


# Each starts Python and imports torch: the stages that trace and that write are those with the most to leave behind.
@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        (signal.SIGINT, 3),
        pytest.param(signal.SIGTERM, 3, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 5, marks=pytest.mark.slow),
    ],
)
def test_interrupted_build_leaves_nothing(checkpoint: Path, kind: signal.Signals, stage: int) -> None:
    folder = checkpoint.parent
    before = under(folder)
    command = [sys.executable, "-m", "hstu_compile", "build", "ckpt.pt", "--config", "config.json", "-v"]
    command += ["--backend", "onnx", "-o", "out/deep/model.hstu"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(f"[{stage}/"):
                break
        time.sleep(0.05)
        process.send_signal(kind)
        rest = process.stderr.read()
        # Python itself ends with SIGINT when the interrupt passed through exec(); a shell shows 130 for both.
        assert process.wait(60) in (130, -signal.SIGINT), rest
    assert "nothing was left behind" in rest
    assert under(folder) == before
