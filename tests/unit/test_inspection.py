"""What `hstu-compile inspect` prints for people."""

from __future__ import annotations

from typing import Any

import pytest

from hstu_compile.inspection import render_inspection

FACTS: dict[str, Any] = {
    "kind": "bundle",
    "retrieval": None,
    "is_pruned": True,
    "alpha": 0.1767766952966369,
    "tasks": ["like", "share"],
    "session": {"eager_error": {"preds": 5.76520490162232e-07}},
    "graphs": [
        {
            "name": "packed",
            "engine": None,
            "inputs": [
                {"name": "ids", "dtype": "int32", "shape": ["L"]},
                {"name": "k_0", "dtype": "float16", "shape": ["L", 2, 32]},
            ],
            "profiles": [
                {"name": "packed", "min": {"ids": [1], "k_0": [1, 2, 32]}, "max": {"ids": [9], "k_0": [9, 2]}}
            ],
        },
        {"name": "score", "engine": "score.engine", "inputs": [], "profiles": []},
    ],
    "towers": [{"count": 1}, {"count": 2}],
    "files": {"a.onnx": {"bytes": 12, "sha256": "ab"}, "model.engine": {"bytes": 7, "sha256": "c"}},
}

TEXT = """\
kind: bundle
retrieval: none
is_pruned: yes
alpha: 0.176777
tasks: [like, share]
session:
  eager_error:
    preds: 5.7652e-07
graphs:
  packed:
    engine: none
    inputs:
           dtype    shape
      ids  int32    [L]
      k_0  float16  [L, 2, 32]
    profiles:
      packed:
             ids  k_0
        min  [1]  [1, 2, 32]
        max  [9]  [9, 2]
  score:
    engine: score.engine
    inputs: none
    profiles: none
towers:
     count
  0  1
  1  2
files:
                bytes  sha256
  a.onnx        12     ab
  model.engine  7      c"""


def test_inspect_prints_no_python_dicts() -> None:
    assert render_inspection(FACTS) == TEXT


@pytest.mark.parametrize("odd", [{}, [], [{}], {"a": {}}, {"a": 1, "b": {}}, [{"a": []}], [{"n": "x"}, {"n": "x"}]])
def test_inspect_prints_whatever_is_there(odd: Any) -> None:
    assert "{" not in render_inspection({"odd": odd})
