from __future__ import annotations

import ast
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

from hstu_compile import errors
from hstu_compile.errors import ERROR_CODES, HstuCompileError, InternalError

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("hstu_compile", "calibration")
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "errors.py"
)
CLASSES = {cls.__name__: cls for cls in HstuCompileError.__subclasses__()}

EXIT_CODES = {
    "UsageError": 2,
    "CheckpointError": 3,
    "UnsupportedModelError": 4,
    "ExportError": 5,
    "RewriteError": 5,
    "EngineError": 5,
    "PluginError": 5,
    "VerifyError": 6,
    "RequestError": 7,
    "BundleError": 8,
    "CalibrationError": 7,
}
# Which classes may carry the codes of a group: the group's first digit is its stage.
GROUPS = {
    "1": {"CheckpointError", "UnsupportedModelError"},
    "2": {"ExportError"},
    "3": {"RewriteError"},
    "4": {"EngineError"},
    "5": {"PluginError"},
    "6": {"VerifyError"},
    "7": {"RequestError"},
    "8": {"BundleError", "CalibrationError"},
    "9": {"UsageError"},
}


def literals(node: ast.AST) -> list[str]:
    """The fixed text of every string in an expression; text that a format fills in is left out."""
    inside = {id(part) for each in ast.walk(node) if isinstance(each, ast.JoinedStr) for part in each.values}
    return [
        each.value
        for each in ast.walk(node)
        if isinstance(each, ast.Constant) and isinstance(each.value, str) and id(each) not in inside
    ]


def raises() -> list[tuple[str, ast.Call, str]]:
    """Every construction of an error in the source: where, the call, and the class."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES:
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node, node.func.id))
    return found


def test_classes_have_the_documented_exit_codes() -> None:
    assert {name: cls.exit_code for name, cls in CLASSES.items()} == EXIT_CODES
    assert (errors.EXIT_INTERNAL, errors.EXIT_INTERRUPTED) == (70, 130)
    assert not issubclass(InternalError, HstuCompileError)


def test_every_code_is_raised_somewhere_and_every_code_in_the_source_is_documented() -> None:
    used = defaultdict(list)
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for code in re.findall(r"HSTU-E\d{3}\b", node.value):
                    used[code].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    codes = set(used)
    assert not codes - set(ERROR_CODES), {code: used[code] for code in codes - set(ERROR_CODES)}
    assert not set(ERROR_CODES) - codes


def test_every_raise_has_a_code_of_its_group_and_three_answers() -> None:
    wrong = []
    for where, call, name in raises():
        given = len(call.args) + len(call.keywords)
        if any(isinstance(argument, ast.Starred) for argument in call.args):
            continue
        if given < 4:
            wrong.append(f"{where}: {name} has {given} arguments; code, what, why and fix are needed")
        code = call.args[0] if call.args else None
        if isinstance(code, ast.Constant) and name not in GROUPS[code.value.removeprefix("HSTU-E")[0]]:
            wrong.append(f"{where}: {name} raised with {code.value}")
    assert not wrong, "\n".join(wrong)


def test_no_message_has_a_brace_that_a_missing_f_prefix_left_unfilled() -> None:
    allowed = ('{"num_heads"', "{'model_state_dict'", "{'format'")
    wrong = []
    for where, call, _ in raises():
        for argument in call.args[1:4]:
            for text in literals(argument):
                stripped = text
                for example in allowed:
                    stripped = stripped.replace(example, "")
                if "{" in stripped:
                    wrong.append(f"{where}: {text!r}")
    assert not wrong, "\n".join(wrong)


def test_no_answer_is_empty() -> None:
    empty = [
        where
        for where, call, _ in raises()
        for argument in call.args
        if isinstance(argument, ast.Constant) and argument.value == ""
    ]
    assert not empty


@pytest.mark.parametrize("code", ERROR_CODES)
def test_every_code_is_documented_in_whole_sentences(code: str) -> None:
    doc = ERROR_CODES[code]
    assert code.removeprefix("HSTU-E").isdigit()
    assert doc.title
    assert not doc.title.endswith(".")
    assert doc.text.endswith(".")
    assert "  " not in doc.text
    assert "{" not in doc.text.replace("{'model_state_dict'", "")


def test_message_answers_in_order_and_json_has_the_same_facts() -> None:
    error = errors.CheckpointError("HSTU-E101", "cannot read a.pt", "0 bytes", "copy it", {"bytes": 0})
    assert str(error) == (
        "error[HSTU-E101] checkpoint: cannot read a.pt\n  Why: 0 bytes\n  Fix: copy it\n"
        "  See: hstu-compile explain HSTU-E101"
    )
    assert json.loads(json.dumps(error.to_dict())) == {
        "code": "HSTU-E101",
        "stage": "checkpoint",
        "what": "cannot read a.pt",
        "why": "0 bytes",
        "fix": "copy it",
        "exit_code": 3,
        "context": {"bytes": 0},
    }


def test_undocumented_code_is_our_bug() -> None:
    with pytest.raises(InternalError, match="HSTU-E000"):
        errors.UsageError("HSTU-E000", "a", "b", "c")
