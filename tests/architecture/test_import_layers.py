from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.architecture.levels import LEVELS, SIDEWAYS

ROOT = Path(__file__).parents[2]
FOLDERS = {"hstu_compile": "", "model": "model", "calibration": "calibration", "plugins": "plugins"}


def modules() -> dict[str, Path]:
    """Name inside hstu_compile to file, for every module of the package wherever its folder is."""
    found = {}
    for folder, prefix in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [part for part in path.relative_to(ROOT / folder).with_suffix("").parts if part != "__init__"]
            found[".".join([part for part in (prefix, *parts) if part])] = path
    return found


MODULES = modules()


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def statements(block: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All statements of a block and of the blocks inside, but for those that only type checkers see."""
    for node in block:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        for inner in ("body", "orelse", "handlers", "finalbody", "cases"):
            yield from statements(getattr(node, inner, ()))


@functools.cache
def imports(path: Path) -> tuple[tuple[int, str], ...]:
    """Line and full name of every import, but for those that only type checkers see."""
    found = []
    for node in statements(parsed(path).body):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return tuple(found)


def group(name: str) -> str:
    """The unit that has a level: a module, or a package whose modules are one stage."""
    return name.split(".", maxsplit=1)[0]


def own_imports(path: Path) -> Iterator[tuple[int, str]]:
    for line, name in imports(path):
        if name == "hstu_compile" or name.startswith("hstu_compile."):
            inside = name.removeprefix("hstu_compile").removeprefix(".")
            first = group(inside)
            yield line, first if first in {group(each) for each in MODULES} else ""


def test_every_module_has_a_level_and_every_level_a_module() -> None:
    assert {group(name) for name in MODULES} == set(LEVELS)


def test_modules_import_only_from_lower_levels() -> None:
    upward = []
    for name, path in MODULES.items():
        for line, target in own_imports(path):
            source = group(name)
            # The package itself is its version and its lazy names; asking for those is no upward import.
            if target in ("", source) or (source, target) in SIDEWAYS:
                continue
            if LEVELS[target] >= LEVELS[source]:
                where = f"{path.relative_to(ROOT)}:{line}"
                upward.append(f"{where}: {source} (level {LEVELS[source]}) imports {target} (level {LEVELS[target]})")
    assert not upward, "\n".join(upward)


def test_every_meant_sideways_import_exists() -> None:
    seen = {(group(name), target) for name, path in MODULES.items() for _, target in own_imports(path)}
    assert set(SIDEWAYS) <= seen


def test_docstrings_name_the_level_of_the_table() -> None:
    wrong = []
    for name, path in MODULES.items():
        doc = ast.get_docstring(parsed(path)) or ""
        stated = re.search(r"\bLevel (\d)", doc)
        if stated and int(stated[1]) != LEVELS[group(name)]:
            wrong.append(f"{path.relative_to(ROOT)}: says {stated[0]}, the table {LEVELS[group(name)]}")
    assert not wrong, "\n".join(wrong)


def test_every_public_module_has_a_docstring() -> None:
    assert not [name for name, path in MODULES.items() if not ast.get_docstring(parsed(path))]


def test_folders_are_imported_by_their_package_names_alone() -> None:
    """A user's own model.py, in the working directory, would be imported in their place."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for folder in (*FOLDERS, "tests", "samples")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in imports(path)
        if name.split(".")[0] in ("model", "calibration", "plugins")
    ]
    assert not wrong, "\n".join(wrong)


def test_model_raises_only_value_and_type_errors() -> None:
    raised = set()
    for name, path in MODULES.items():
        if group(name) == "model":
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    raised.add(ast.unparse(node.exc.func))
    assert raised <= {"ValueError", "TypeError", "DialectError"}


BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""
TRAINING = ("torch", "onnxscript", "tensorrt", "tensorrt_rtx", "triton", "onnxruntime")
SERVING = (
    "bundle", "bundle_profile", "cli", "doctor", "engine", "engine_stage", "environment", "graph_plugin", "inspection",
    "plugin_library", "plugin_stage", "polygraphy_files", "ranking_bundle", "recheck", "report", "retrieval_bundle",
    "runtime", "runtime.kv_cache", "runtime.onnxruntime_session", "runtime.ranking", "runtime.request",
    "runtime.retrieval", "runtime.session", "runtime.tensorrt_session", "serving.answering", "serving.checking",
    "serving.repository", "session_check",
)  # fmt: skip


def run_blocked(code: str, blocked: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    program = f"BLOCKED = {blocked!r}\n{BLOCKER}\n{code}"
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)


def test_serving_side_imports_without_the_training_stack_or_any_runtime(tmp_path: Path) -> None:
    code = f"""
import importlib, json
failed = {{}}
for name in {SERVING!r}:
    try:
        importlib.import_module("hstu_compile." + name)
    except ImportError as error:
        failed[name] = repr(error)
print(json.dumps(failed))
"""
    done = run_blocked(code, TRAINING, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}


@pytest.mark.parametrize("arguments", [["-h"], ["--version"], ["explain"], ["explain", "E101"], ["build", "-h"]])
def test_help_needs_nothing_but_click(arguments: list[str], tmp_path: Path) -> None:
    code = f"from hstu_compile.__main__ import main\nsys.exit(main({arguments!r}))"
    done = run_blocked(code, (*TRAINING, "numpy", "onnx", "polygraphy", "yaml"), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_importing_the_package_needs_the_standard_library_alone(tmp_path: Path) -> None:
    blocked = (*TRAINING, "numpy", "onnx", "polygraphy", "yaml", "click")
    done = run_blocked("import hstu_compile\nprint(hstu_compile.__version__, dir(hstu_compile))", blocked, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "compile_checkpoint" in done.stdout


def test_missing_exporter_is_a_refusal_and_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(b"x")
    code = "from hstu_compile.__main__ import main\nsys.exit(main(['build', 'ckpt.pt']))"
    done = run_blocked(code, ("torch",), tmp_path)
    assert done.returncode == 2
    assert "HSTU-E903" in done.stderr
    assert "hstu-compile[export]" in done.stderr
    assert "Traceback" not in done.stderr


def test_users_own_model_py_is_not_imported(tmp_path: Path) -> None:
    for name in ("model", "calibration", "plugins"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported the wrong one')")
    code = "import hstu_compile.model, hstu_compile.calibration, hstu_compile.plugins"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
