"""CONTRIBUTING's tables say what the code has."""

from __future__ import annotations

import re
from pathlib import Path

from tests.architecture.levels import LEVELS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_level_table_is_that_of_the_import_test():
    rows = re.findall(r"^\| (\d) \| (.*) \|$", PAGE, re.MULTILINE)
    stated = {
        name.split("/")[0].removesuffix("/"): int(level) for level, row in rows for name in re.findall(r"`(.+?)`", row)
    }
    # Private parts of a module, and the package itself, are nobody's entry point.
    wanted = {name: level for name, level in LEVELS.items() if name and not name.startswith("_report")}
    assert stated == wanted


def test_files_that_are_named_exist():
    names = set(re.findall(r"`((?:[a-z_]+/)+[\w.]+\.(?:py|md|yaml))`", PAGE))
    assert len(names) > 10
    lacking = [name for name in names if not any((folder / name).is_file() for folder in (ROOT, ROOT / "hstu_compile"))]
    assert not lacking
