"""The report: nothing of the dict is missing, nothing foreign acts, and a PASS cannot contradict its own numbers."""

from __future__ import annotations

import copy
import html
import json
import math
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from hstu_compile._report_html import Column, Group, element, table
from hstu_compile._report_text import decimal4, exact, number, printable, scientific
from hstu_compile.report import SCHEMA_VERSION, render_report, render_summary

HOSTILE = "<script>alert(1)</script>\"'&\x1b[2J\u202egpj.\udcff"
VOID_ELEMENTS = {"meta"}
#: Attributes through which an HTML or SVG element loads something.
LOADING_ATTRIBUTES = {
    "src",
    "srcset",
    "href",
    "xlink:href",
    "data",
    "action",
    "formaction",
    "poster",
    "background",
    "style",
}


class Page(HTMLParser):
    """What the tests look at: visible text, elements, ids, table cells; unbalanced markup is an error."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.style = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def all(self, tag: str, class_: str = "") -> list[dict[str, str | None]]:
        return [
            a for name, a in self.elements if name == tag and set(class_.split()) <= set((a.get("class") or "").split())
        ]


def tensor(name: str, feed: str, error: float, bound: float, status: str = "PASS") -> dict[str, Any]:
    return {"tensor": name, "feed": feed, "error": error, "bound": bound, "max_abs": 3.21 * error, "status": status}


def passing(num_layers: int = 2) -> dict[str, Any]:
    """A report with a number of its own in every place that holds one."""
    layers = [{"layer": i, "error": 1.13e-3 * (i + 1), "eager_error": 1.07e-3 * (i + 1)} for i in range(num_layers)]
    return {
        "schema": SCHEMA_VERSION,
        "status": "PASS",
        "title": "ml100k, fp16",
        "created": "2026-11-23T10:41:07+00:00",
        "hstu_compile": "0.1.0",
        "checkpoint": {
            "file": "checkpoint.pt",
            "sha256": "9f3a" * 16,
            "dialect": "research",
            "config": {"embedding_dim": 50, "norm": {"eps": 1.2345e-06}, "vocabulary": 65536, "blocks": [{"heads": 3}]},
        },
        "precision": "fp16",
        "backend": {
            "name": "tensorrt-rtx",
            "reason": "no GPU is visible",
            "version": "1.6.1",
            "compute_capabilities": ["9.0"],
        },
        "stages": [
            {"name": "checkpoint", "seconds": 0.1123, "summary": "2 layers, D=50"},
            {"name": "export", "seconds": 6.31, "summary": "opset 20"},
            {"name": "verify", "seconds": 9.46, "summary": "in bounds"},
        ],
        "graphs": [
            {
                "name": "retrieval",
                "file": "model.onnx",
                "bytes": 431_201,
                "nodes": 143,
                "initializers_bytes": 412_344,
                "operators": {"Gemm": 41, "HstuAttention": 2},
                "precision_counts": {"MatMul fp16": 38},
                "inputs": [{"name": "item_ids", "dtype": "int32", "shape": ["L"]}],
                "outputs": [{"name": "user_embeddings", "dtype": "float16", "shape": ["B", 51]}],
                "passes": [
                    {"name": "fuse_uvqk", "counts": {"uvqk fused": 17, "left": 4}, "seconds": 0.0413},
                    {"name": "eliminate_dead", "counts": {}, "seconds": 0.0222},
                ],
                "engine": {
                    "file": "model.engine",
                    "bytes": 641_024,
                    "seconds": 3.97,
                    "layers": {"fp16": 47, "fp32": 9},
                    "messages": ["tactic 77 skipped"],
                    "profiles": [
                        {
                            "name": "default",
                            "min": {"item_ids": [1]},
                            "opt": {"item_ids": [811]},
                            "max": {"item_ids": [12853]},
                        }
                    ],
                },
            },
        ],
        "verification": {
            "bound_rule": "at most twice the error of eager in the same precision",
            "worst_error": 1.91e-3,
            "worst_where": "top_scores, feed ragged",
            "feeds": [{"name": "ragged", "sequences": 64, "events": 3127, "max_len": 199}],
            "runs": [
                {
                    "runtime": "onnxruntime 1.31.1 CPU",
                    "artifact": "model.onnx",
                    "status": "PASS",
                    "reason": None,
                    "tensors": [
                        tensor("user_embeddings", "ragged", 1.64e-3, 2.22e-3),
                        tensor("top_scores", "ragged", 1.91e-3, 2.53e-3),
                    ],
                    "layers": layers,
                    "ranking": {"top10_overlap": 0.99894, "kendall_tau": 0.99713},
                },
                {
                    "runtime": "tensorrt-rtx 1.6.1",
                    "artifact": "model.engine",
                    "status": "NOT RUN",
                    "reason": "no CUDA device on this machine",
                    "tensors": [],
                    "layers": [],
                    "ranking": None,
                },
            ],
            "polygraphy": [
                {
                    "artifact": "model.onnx",
                    "command": "polygraphy run model.onnx --onnxrt",
                    "exit_code": 0,
                    "output_tail": "PASSED in 2.112 s",
                },
            ],
        },
        "metrics": {
            "columns": ["HR@10", "MRR"],
            "rows": [
                {"name": "eager fp32", "values": [0.21527, 0.10124]},
                {"name": "model.onnx", "values": [0.21633, 0.10124]},
            ],
        },
        "timings": [
            {"name": "onnxruntime", "batch": 8, "events": 512, "median_ms": 21.43, "p90_ms": 23.91, "note": "2 cores"}
        ],
        "environment": {"python": "3.11.7", "cpu": {"cores": 2}, "gpu": None},
        "files": [{"name": "model.onnx", "bytes": 431_201, "sha256": "0a1b" * 16}],
        "commands": [{"purpose": "Verify again", "command": "hstu-compile verify bundle"}],
    }


def failing() -> dict[str, Any]:
    report = passing()
    report["status"] = "FAIL"
    run = report["verification"]["runs"][0]
    run["status"] = "FAIL"
    run["tensors"][1].update(error=0.13, status="FAIL")
    report["verification"]["worst_error"] = 0.13
    return report


def several() -> dict[str, Any]:
    """A report of three graphs, each with numbers, engine, rows and a check of its own."""
    report = passing()
    verification = report["verification"]
    (first,), (run, _), (check,) = report["graphs"], verification["runs"], verification["polygraphy"]
    run["artifact"] = "model.onnx"
    report["graphs"], verification["runs"], verification["polygraphy"] = [], [], []
    for place, name in enumerate(("packed", "prefill", "score")):
        stem = "model" if name == "packed" else name
        graph = copy.deepcopy(first)
        graph |= {"name": name, "file": f"{stem}.onnx", "nodes": 143 + 11 * place, "bytes": 431_201 + 1009 * place}
        graph |= {"initializers_bytes": 412_344 + 1013 * place, "operators": {"Gemm": 51 + place, "HstuAttention": 2}}
        graph["inputs"] = [{"name": f"of_{name}", "dtype": "int32", "shape": [f"L{place}"]}]
        graph["passes"][0]["counts"] = {"uvqk fused": 17 + place, "left": 4}
        graph["engine"] |= {"file": f"{stem}.engine", "bytes": 641_024 + 2003 * place, "seconds": 3.97 + place}
        graph["engine"] |= {"messages": [f"{name} skipped a tactic"], "layers": {"fp16": 61 + place}}
        report["graphs"].append(graph)
        for artifact in (f"{stem}.onnx", f"{stem}.engine"):
            tensors = [tensor("logits", f"{name} feed", (1.64 + place / 10) * 1e-3, 2.22e-3)]
            verification["runs"].append({**run, "artifact": artifact, "tensors": tensors})
        verification["polygraphy"].append({**check, "artifact": f"{stem}.onnx", "command": f"polygraphy run {stem}"})
    return report


def empty(status: str = "NOT VERIFIED") -> dict[str, Any]:
    """Every value that may be None is None."""
    kept = {
        "schema": SCHEMA_VERSION,
        "status": status,
        "title": "nothing",
        "created": "2026-11-23",
        "hstu_compile": "0.1.0",
        "precision": "fp32",
    }
    return {key: kept.get(key) for key in passing()}


def leaves(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from leaves(value, (*path, index))
    else:
        yield path, tree


def with_leaf(report: dict[str, Any], path: tuple[str | int, ...], value: object) -> dict[str, Any]:
    changed = copy.deepcopy(report)
    node: Any = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return changed


@pytest.mark.parametrize("make", [passing, several])
def test_every_leaf_of_the_dict_is_on_the_page(make: Callable[[], dict[str, Any]]) -> None:
    report = make()
    text = Page(render_report(report)).text
    for path, value in leaves(report):
        if path == ("schema",) or value is None:
            continue
        if path[0] == "metrics" or path[-1] in ("top10_overlap", "kendall_tau"):
            shown = decimal4(value) if isinstance(value, float) else value
        elif path[0] in ("checkpoint", "environment") or isinstance(value, str):
            shown = exact(value)
        elif path[-1] in ("error", "bound", "max_abs", "eager_error", "worst_error"):
            shown = scientific(value)
        else:
            shown = number(value) if path[-1] != "item_ids" and "profiles" not in path else exact(value)
        assert re.search(rf"(?<![\w.]){re.escape(shown)}(?![\w])", text), (path, shown)


@pytest.mark.parametrize("make", [passing, several])
def test_changing_any_number_changes_the_page(make: Callable[[], dict[str, Any]]) -> None:
    report = make()
    before = render_report(report)
    for path, value in leaves(report):
        if path == ("schema",) or isinstance(value, (str, type(None))):
            continue
        changed = with_leaf(report, path, value + 1 if isinstance(value, int) else value * 0.9)
        if path[-1] == "exit_code":
            changed["status"] = "FAIL"
        assert render_report(changed) != before, path


@pytest.mark.parametrize("make", [passing, several, failing, empty])
def test_page_is_self_contained_balanced_and_accessible(make: Callable[[], dict[str, Any]]) -> None:
    page = Page(render_report(make()))
    names = {name for name, _ in page.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "image", "use", "base", "form"}
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for name, attributes in page.elements:
        for loading in LOADING_ATTRIBUTES & set(attributes):
            assert (name, loading) == ("a", "href")
            assert (attributes[loading] or "").removeprefix("#") in ids
        assert not any(key.startswith("on") for key in attributes)
        for reference in (attributes.get("aria-labelledby") or "").split():
            assert reference in ids
    assert not re.search(r"url\(|@import|https?:|//[a-z]", page.style)
    assert "prefers-color-scheme: dark" in page.style
    assert "@media print" in page.style
    assert len(page.all("table")) == len(page.all("caption"))
    svgs = page.all("svg")
    assert svgs
    assert all(svg["role"] == "img" and len((svg["aria-labelledby"] or "").split()) == 2 for svg in svgs)
    assert page.all("html")[0]["lang"] == "en"


def test_text_has_enough_contrast_in_both_schemes() -> None:
    style = Page(render_report(passing())).style
    schemes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    assert len(schemes) == 3

    def luminance(colour: str) -> float:
        channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for scheme in schemes:
        for ink in ("ink", "soft", "link", "pass", "fail", "open", "artifact", "eager", "bound"):
            for ground in ("page", "panel", "failed-row"):
                light, dark = sorted((luminance(scheme[ink]), luminance(scheme[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


def markup_of(report: dict[str, Any]) -> list[str]:
    """Names of the elements; without `text`, whose number follows how the words of a box wrap."""
    return [name for name, _ in Page(render_report(report)).elements if name != "text"]


def test_hostile_text_in_any_place_stays_text() -> None:
    report = passing()
    expected = markup_of(report)
    for path, value in leaves(report):
        if not isinstance(value, str) or path == ("status",) or path[-1] == "status":
            continue
        source = render_report(with_leaf(report, path, HOSTILE))
        source.encode("utf-8")
        assert markup_of(with_leaf(report, path, HOSTILE)) == expected, path
        assert "\x1b" not in source
        assert "\u202e" not in source
        assert html.escape(printable(HOSTILE), quote=True) in source, path


def test_hostile_keys_stay_text() -> None:
    report = passing()
    report["environment"] = {HOSTILE: {HOSTILE: 1}}
    (graph,) = report["graphs"]
    graph["operators"] = {HOSTILE: 3}
    graph["passes"][0]["counts"] = {HOSTILE: 2}
    graph["engine"]["layers"] = {HOSTILE: 5}
    source = render_report(report)
    assert not Page(source).all("script")
    assert source.count("&lt;script&gt;") >= 5


def test_summary_cannot_drive_the_terminal_or_break_its_lines() -> None:
    report = passing()
    before = render_summary(report).count("\n")
    report["title"] = report["verification"]["runs"][0]["runtime"] = f"a\r\nb{HOSTILE}"
    summary = render_summary(report)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", summary)
    assert summary.count("\n") == before


def test_pass_says_how_far_from_the_bound() -> None:
    page = Page(render_report(passing()))
    assert "All 2 comparisons in 1 runtime are within their bounds." in page.text
    assert "Worst error 1.91e-03, 75.5 % of its bound of 2.53e-03: top_scores, feed ragged" in page.text
    assert "Not run: tensorrt-rtx 1.6.1 (model.engine): no CUDA device on this machine" in page.text
    assert page.all("rect", "box pass")
    assert not page.all("tr", "failed")


def test_fail_names_the_tensor_and_marks_its_row() -> None:
    page = Page(render_report(failing()))
    assert "1 of 2 comparisons in 1 runtime exceeds the bound." in page.text
    assert "top_scores, feed ragged, onnxruntime 1.31.1 CPU (model.onnx), error 1.30e-01, bound 2.53e-03" in page.text
    assert len(page.all("tr", "failed")) == 1
    assert page.all("rect", "box fail")
    assert not page.all("rect", "box pass")


def test_list_that_fails_within_its_bound_says_why() -> None:
    report = failing()
    row = tensor("top_items", "ragged", 1e-9, 2e-3)
    row |= {"status": "FAIL", "detail": "sequence 3 lists an item of its own history"}
    report["verification"]["runs"][0]["tensors"][1] = row
    page = Page(render_report(report))
    assert "error 1.00e-09, bound 2.00e-03: sequence 3 lists an item of its own history" in page.text


def test_row_of_top_items_is_explained_where_there_is_one() -> None:
    report = passing()
    explained = "top_items: the error is the largest difference between a listed score and the item's float64 score"
    assert explained not in Page(render_report(report)).text
    report["verification"]["runs"][0]["tensors"].append(tensor("top_items", "ragged", 1e-3, 2e-3))
    assert explained in Page(render_report(report)).text


def test_worst_error_and_tightest_bound_are_told_apart() -> None:
    report = passing()
    report["verification"]["runs"][0]["tensors"][0].update(error=2.2e-4, bound=2.3e-4)
    text = Page(render_report(report)).text
    assert "Worst error 1.91e-03: top_scores, feed ragged." in text
    assert "Nearest to its bound: error 2.20e-04, 95.7 % of 2.30e-04: user_embeddings" in text


def test_nan_is_the_worst_error() -> None:
    report = failing()
    report["verification"]["runs"][0]["tensors"][0].update(error=math.nan, status="PASS")
    page = Page(render_report(report))
    assert "2 of 2 comparisons in 1 runtime exceed the bound." in page.text
    assert "Furthest beyond its bound: error NaN" in page.text
    assert len(page.all("tr", "failed")) == 2


def test_nothing_verified_is_said_plainly() -> None:
    report = passing()
    report["status"] = "NOT VERIFIED"
    report["verification"]["runs"] = [report["verification"]["runs"][1]]
    report["verification"]["worst_error"] = report["verification"]["worst_where"] = None
    for text in (Page(render_report(report)).text, render_summary(report)):
        assert "this bundle carries no proof. 1 artifact did not run." in text
        assert "no CUDA device on this machine" in text


@pytest.mark.parametrize(
    "sentence",
    [
        "verification was off for this build",
        "this build measured no ranking quality",
        "this build measured no latency",
        "Not run: the graph is as exported.",
        "no backend was chosen and no engine was built",
        "No environment was recorded.",
        "No files were recorded.",
        "No commands were recorded.",
        "no checkpoint was recorded",
        "this build has no graph",
        "No stages were recorded.",
    ],
)
def test_what_is_absent_is_said(sentence: str) -> None:
    assert sentence in Page(render_report(empty())).text


def test_absent_engine_gives_the_backends_reason() -> None:
    report = passing()
    report["graphs"][0]["engine"] = None
    page = Page(render_report(report))
    assert "Not applicable: no engine was built. Backend tensorrt-rtx: no GPU is visible." in page.text
    assert page.all("rect", "box absent")


@pytest.mark.parametrize("make", [passing, failing])
def test_empty_lists_render_as_absent_values(make: Callable[[], dict[str, Any]]) -> None:
    report = make()
    for path, value in [(path, value) for path, value in containers(report) if value]:
        if path[-1] in ("runs", "tensors"):
            continue
        changed = with_leaf(report, path, type(value)())
        if path[-1] in ("rows", "columns"):
            changed["metrics"] = {"columns": [], "rows": []}
        Page(render_report(changed))
        assert render_summary(changed).startswith(report["status"])


def containers(tree: dict[str, Any]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """The lists of the schema, and the mappings whose keys are data."""
    free_mappings = {"config", "operators", "precision_counts", "counts", "layers", "environment", "min", "opt", "max"}

    def walk(node: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            if (isinstance(value, list) and key != "values") or (isinstance(value, dict) and key in free_mappings):
                yield (*path, key), value
            if isinstance(value, (list, dict)):
                yield from walk(value, (*path, key))

    return walk(tree, ())


@pytest.mark.parametrize("num_layers", [1, 2, 64])
def test_layer_plot_has_a_mark_for_each_layer(num_layers: int) -> None:
    page = Page(render_report(passing(num_layers)))
    # One more of each in the legend.
    assert len(page.all("circle", "mark artifact")) == num_layers + 1
    assert len(page.all("rect", "mark eager")) == num_layers + 1
    assert all(0 < float(mark["cx"] or "nan") < 560 for mark in page.all("circle", "mark"))
    heights = [float(mark["cy"] or "nan") for mark in page.all("circle", "mark artifact")[:-1]]
    assert len(set(heights)) == len(heights), "errors of different size must not coincide"
    assert ("open" in page.all("details")[0]) == (num_layers <= 16)


def test_layer_plot_is_logarithmic() -> None:
    report = passing(3)
    for layer, error in zip(report["verification"]["runs"][0]["layers"], (1e-5, 1e-3, 1e-1), strict=True):
        layer.update(error=error, eager_error=error)
    first, second, third = (
        float(m["cy"] or "nan") for m in Page(render_report(report)).all("circle", "mark artifact")[-3:]
    )
    assert first - second == pytest.approx(second - third, abs=0.2)
    assert first > second


def test_layer_plot_gives_zeros_and_nan_places_outside_the_scale() -> None:
    report = passing(4)
    layers = report["verification"]["runs"][0]["layers"]
    layers[0]["error"], layers[2]["error"] = 0.0, math.nan
    page = Page(render_report(report))
    zero, small, broken, large = (float(m["cy"] or "nan") for m in page.all("circle", "mark artifact")[-4:])
    assert zero > small > large > broken
    assert "not finite" in page.texts
    (path,) = [drawn for drawn in (a["d"] or "" for a in page.all("path", "line artifact")) if "h26" not in drawn]
    # Layers 1 and 3 have no neighbour on the scale: two separate starts, no stroke through a value that is not there.
    assert path.count("M") == 2
    assert "L" not in path


def test_layer_plot_of_zeros_alone() -> None:
    report = passing(2)
    for layer in report["verification"]["runs"][0]["layers"]:
        layer.update(error=0.0, eager_error=0.0)
    page = Page(render_report(report))
    assert not re.search(r'="[^"]*(nan|inf)', render_report(report))
    assert len({mark["cy"] for mark in page.all("circle", "mark artifact")[-2:]}) == 1


def test_recorded_layer_bounds_replace_twice_eager_and_can_fail() -> None:
    report = failing()
    for layer in report["verification"]["runs"][0]["layers"]:
        layer["bound"] = layer["error"] / 2
    with_bounds = Page(render_report(report))
    assert "twice eager's error" not in with_bounds.text
    assert len(with_bounds.all("tr", "failed")) == 1 + 2
    assert "twice eager's error" in Page(render_report(failing())).text


def test_pipeline_shows_the_seven_boxes_with_their_facts() -> None:
    source = render_report(passing())
    picture = source[source.index('<svg class="pipeline"') : source.index("</svg>")]
    shown = re.findall(r'<text class="box-title"[^>]*>([^<]*)', picture)
    assert shown == ["Checkpoint", "Eager model", "ONNX", "Passes", "Engine", "Verification", "Bundle"]
    for fact in (
        "2 HstuAttention",
        "143 nodes in all",
        "fuse_uvqk 21",
        "worst error 1.91e-03",
        "1 of 2 artifacts run",
        "6.31 s",
    ):
        assert f">{fact}</text>" in picture
    lines = re.findall(r"<text[^>]*>([^<]*)", picture)
    assert max(len(html.unescape(line)) for line in lines) <= 20


def test_every_graph_has_its_facts_passes_and_engine_under_its_name() -> None:
    source = render_report(several())
    for section, facts in {
        "graph": ["154 nodes", "432,210 bytes", "413,357 bytes", "of_prefill", "L1"],
        "passes": ["Passes over prefill", "18"],
        "engine": ["prefill.engine", "643,027 bytes", "4.97 s", "prefill skipped a tactic", "62"],
        "verification": ["prefill.onnx", "prefill.engine", "prefill feed", "polygraphy run prefill"],
    }.items():
        text = Page(section_of(source, section)).text
        for fact in facts:
            assert fact in text, (section, fact)
    # Each graph's facts stand behind its name and before the next one's.
    graphs = Page(section_of(source, "graph")).text
    order = [graphs.index(each) for each in ("model.onnx", "of_packed", "prefill.onnx", "of_prefill", "score.onnx")]
    assert order == sorted(order)


def section_of(source: str, ident: str) -> str:
    """One section of the page."""
    return source[source.index(f'<section id="{ident}"') :].split("</section>")[0] + "</section>"


def test_graphs_on_one_runtime_are_not_several_runtimes() -> None:
    report = several()
    assert len(report["verification"]["runs"]) == 6
    text = Page(render_report(report)).text
    assert "All 6 comparisons in 1 runtime are within their bounds." in text
    assert "6 of 6 artifacts run" in text
    report["verification"]["runs"][1]["runtime"] = "tensorrt-rtx 1.6.1"
    assert "All 6 comparisons in 2 runtimes are within their bounds." in Page(render_report(report)).text


def test_the_kernels_of_an_engine_are_counted_and_listed() -> None:
    report = passing()
    assert "The backend does not tell which kernels a pass launches." in Page(render_report(report)).text
    names = {"<b>Fc & Add</b>": "product", "Slic": "copy", "Mean": "other"}
    launched = [*names, "Slic", "Slic", "<b>Fc & Add</b>"]
    report["graphs"][0]["engine"]["kernels"] = [{"name": name, "kind": names[name]} for name in launched]
    page = render_report(report)
    said = "A pass launches 6 kernels of the backend's at least: 2 products, 3 that only copy or convert, 1 other."
    assert said in Page(page).text
    rows = re.findall(r"<tr><th[^>]*><code>([^<]*)</code></th><td[^>]*>(\w+)</td><td[^>]*>(\d+)</td></tr>", page)
    assert [(html.unescape(name), kind, int(count)) for name, kind, count in rows] == [
        ("<b>Fc & Add</b>", "product", 2),
        ("Slic", "copy", 3),
        ("Mean", "other", 1),
    ]


def test_a_graph_without_an_engine_among_others_is_said() -> None:
    report = several()
    report["graphs"][1]["engine"] = None
    assert "no engine was built for prefill" in Page(render_report(report)).text


def test_pipeline_sums_over_the_graphs() -> None:
    source = render_report(several())
    picture = source[source.index('<svg class="pipeline"') : source.index("</svg>")]
    for fact in ("3 graphs", "6 HstuAttention", "462 nodes in all", "2 passes", "fuse_uvqk 66", "3 engines"):
        assert f">{fact}</text>" in picture, fact
    assert "1.84 MiB" in picture


def test_a_failing_check_of_a_later_graph_contradicts_a_pass() -> None:
    report = several()
    report["verification"]["polygraphy"][2]["exit_code"] = 1
    with pytest.raises(ValueError, match=r"polygraphy exited with 1 \(score.onnx\)"):
        render_report(report)
    report["status"] = "FAIL"
    assert Page(render_report(report)).all("span", "status fail")


def test_summary_is_aligned_and_complete() -> None:
    assert render_summary(passing()) == (
        "PASS  ml100k, fp16\n"
        "All 2 comparisons in 1 runtime are within their bounds.\n"
        "Worst error 1.91e-03, 75.5 % of its bound of 2.53e-03: top_scores, feed ragged.\n"
        "\n"
        "  runtime                 artifact      result   worst error     bound  % of bound\n"
        "  onnxruntime 1.31.1 CPU  model.onnx    PASS        1.91e-03  2.53e-03        75.5\n"
        "  tensorrt-rtx 1.6.1      model.engine  NOT RUN            -         -           -\n"
        "  tensorrt-rtx 1.6.1, model.engine: not run: no CUDA device on this machine\n"
        "\n"
        "  ranking      HR@10     MRR\n"
        "  eager fp32  0.2153  0.1012\n"
        "  model.onnx  0.2163  0.1012\n"
        "\n"
        "3 stages in 15.9 s\n"
    )


def test_report_survives_json() -> None:
    report = failing()
    report["verification"]["runs"][0]["tensors"][0]["error"] = math.inf
    assert render_report(json.loads(json.dumps(report))) == render_report(report)


def contradiction_row(report: dict[str, Any]) -> None:
    report["verification"]["runs"][0]["tensors"][0]["error"] = 2.3e-3


def contradiction_nan(report: dict[str, Any]) -> None:
    report["verification"]["runs"][0]["tensors"][0]["error"] = math.nan


def contradiction_status(report: dict[str, Any]) -> None:
    report["verification"]["runs"][0]["status"] = "FAIL"


def contradiction_polygraphy(report: dict[str, Any]) -> None:
    report["verification"]["polygraphy"][0]["exit_code"] = 1


def contradiction_nothing(report: dict[str, Any]) -> None:
    report["verification"]["runs"] = []


def contradiction_off(report: dict[str, Any]) -> None:
    report["verification"] = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (contradiction_row, "status is PASS, and these failed: user_embeddings, feed ragged"),
        (contradiction_nan, "status is PASS, and these failed: user_embeddings, feed ragged"),
        (contradiction_status, r"these failed: onnxruntime 1.31.1 CPU \(model.onnx\)"),
        (contradiction_polygraphy, r"polygraphy exited with 1 \(model.onnx\)"),
        (contradiction_nothing, "nothing was compared"),
        (contradiction_off, "nothing was compared"),
    ],
)
@pytest.mark.parametrize("render", [render_report, render_summary])
def test_pass_that_contradicts_its_numbers_is_refused(
    render: Callable[[dict[str, Any]], str], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    report = passing()
    change(report)
    with pytest.raises(ValueError, match=message):
        render(report)


def test_other_schema_missing_keys_and_unknown_status_are_refused() -> None:
    with pytest.raises(ValueError, match="schema is 1, this hstu-compile renders 2"):
        render_report({**passing(), "schema": 1})
    incomplete = passing()
    del incomplete["files"], incomplete["graphs"]
    with pytest.raises(ValueError, match="lacks the keys graphs, files"):
        render_report(incomplete)
    with pytest.raises(ValueError, match="status is 'OK', legal are PASS, FAIL, NOT VERIFIED"):
        render_report({**passing(), "status": "OK"})


def test_table_refuses_a_row_of_another_length() -> None:
    with pytest.raises(ValueError, match="row 0 has 1 cells, the table 2 columns"):
        table("sizes", [Column("a"), Column("b")], [Group(None, [("x",)])])


def test_markup_is_escaped_unless_it_says_otherwise() -> None:
    inner = element("b", "<i>")
    assert inner == "<b>&lt;i&gt;</b>"
    assert element("p", inner, title='"', class_=None) == '<p title="&quot;"><b>&lt;i&gt;</b></p>'
