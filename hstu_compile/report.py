"""The report of a build, for people: one self-contained HTML page, and the closing lines on a terminal. Level 3.

Both are made from the dict that the bundle holds as report.json, and from nothing else. What did not happen is said to
be "not run" or "not applicable", with the reason where the dict records one; it is never left out. The page has no
script, loads nothing, and escapes every text that it is given.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from hstu_compile._report_figures import layer_bounds, layer_error_figures, pipeline_figure
from hstu_compile._report_fused import fused_section
from hstu_compile._report_html import Column, Group, Html, code, element, joined, note, simple_table, status_mark, table
from hstu_compile._report_kernels import kernels_section
from hstu_compile._report_quantization import quantization_section
from hstu_compile._report_text import (
    NOT_APPLICABLE,
    decimal4,
    exact,
    flattened,
    mebibytes,
    number,
    one_line,
    plural,
    scientific,
    shape,
    share_of_bound,
)

SCHEMA_VERSION = 2
STATUSES = ("PASS", "FAIL", "NOT VERIFIED")

_KEYS = (
    *("schema", "status", "title", "created", "hstu_compile", "checkpoint", "precision", "backend", "stages"),
    *("graphs", "verification", "metrics", "timings", "environment", "files", "commands"),
)

#: Nothing is loaded and nothing runs, even if an escape were missing somewhere.
_CONTENT_POLICY = Html(
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
)

#: What `session_check` compares of a list of items, which is no tensor of numbers.
_TOP_ITEMS = (
    "top_items: the error is the largest difference between a listed score and the item's float64 score, as a share of "
    "the largest score that could be (longest user embedding times longest item vector); max abs is that difference. "
    "The bound is that of user_embeddings. A list passes if no score is further off, no item left out is better than a "
    "listed one by more than twice that, and it is in order, without seen items and without gaps."
)

#: A list of layers longer than this is folded away on the screen.
_OPEN_LAYERS = 16


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """One compared tensor, and the run that it belongs to."""

    run: Mapping[str, Any]
    row: Mapping[str, Any]

    @property
    def share(self) -> float:
        """Error in percent of the bound."""
        return share_of_bound(self.row["error"], self.row["bound"])

    @property
    def failed(self) -> bool:
        """A row fails by its status, and by its numbers whatever its status says."""
        return self.row["status"] == "FAIL" or not self.share <= 100.0

    @property
    def where(self) -> str:
        return f"{self.row['tensor']}, feed {self.row['feed']}, {self.run['runtime']} ({self.run['artifact']})"


def render_report(report: Mapping[str, Any]) -> str:
    """The report as one HTML page.

    Args:
        report: the content of report.json.

    Returns:
        The page, to be written as UTF-8.

    Raises:
        ValueError: if the schema is another one, keys are missing, or the status PASS contradicts the comparisons.
    """
    _check(report)
    title = f"{report['status']}: {one_line(report['title'])}"
    sections = [
        ("pipeline", "Pipeline", _pipeline(report)),
        ("verification", "Verification", _verification(report)),
        ("metrics", "Ranking metrics", _metrics(report["metrics"])),
        *_quantization(report),
        ("timings", "Timings", _timings(report["timings"] or ())),
        *_kernels(report),
        ("graph", "Graphs and precision", _graphs(report["graphs"] or ())),
        ("passes", "Graph passes", _passes(report["graphs"] or ())),
        ("engine", "Engines and profiles", _engines(report)),
        ("configuration", "Checkpoint and configuration", _checkpoint(report["checkpoint"])),
        ("environment", "Environment", _environment(report)),
        ("files", "Files", _files(report["files"] or ())),
        ("commands", "Commands", _commands(report["commands"] or ())),
    ]
    links = joined((element("a", heading, href=f"#{ident}") for ident, heading, _ in sections), " ")
    body = joined(
        element(
            "section",
            element("h2", heading, id=f"{ident}-heading"),
            content,
            id=ident,
            aria_labelledby=f"{ident}-heading",
        )
        for ident, heading, content in sections
    )
    head = joined(
        (
            Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
            _CONTENT_POLICY,
            element("title", title),
            element("style", Html(_style_sheet())),
        )
    )
    main = element("main", _header(report), element("nav", links, aria_label="Sections"), body)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{main}</body></html>\n'


def render_summary(report: Mapping[str, Any]) -> str:
    """The closing table for a terminal: verdict, one line for each runtime, ranking metrics, total time.

    Args:
        report: the content of report.json.

    Returns:
        Plain text, ending in a newline, without control characters.

    Raises:
        ValueError: as `render_report`.
    """
    _check(report)
    lines = [f"{report['status']}  {one_line(report['title'])}", *_verdict(report)]
    runs = _runs(report)
    if runs:
        header = ("runtime", "artifact", "result", "worst error", "bound", "% of bound")
        lines += ["", *_aligned(header, [_summary_row(run) for run in runs], numeric=(3, 4, 5))]
    lines += [
        "  " + one_line(f"{run['runtime']}, {run['artifact']}: not run: {_reason(run['reason'])}")
        for run in runs
        if run["status"] == "NOT RUN"
    ]
    metrics = report["metrics"]
    if metrics is not None and metrics["rows"]:
        names = ("ranking", *(one_line(name) for name in metrics["columns"]))
        rows = [(one_line(row["name"]), *(decimal4(value) for value in row["values"])) for row in metrics["rows"]]
        lines += ["", *_aligned(names, rows, numeric=range(1, len(names)))]
    else:
        lines += ["", "ranking metrics: not run"]
    seconds = _total_seconds(report)
    if seconds is not None:
        lines += ["", f"{plural(len(report['stages']), 'stage')} in {number(seconds)} s"]
    return "\n".join(lines) + "\n"


# --- what the dict says -----------------------------------------------------------------------------------------------


def _check(report: Mapping[str, Any]) -> None:
    """Refuses a dict that cannot be rendered truthfully."""
    if report.get("schema") != SCHEMA_VERSION:
        raise ValueError(f"report schema is {report.get('schema')!r}, this hstu-compile renders {SCHEMA_VERSION}")
    missing = [key for key in _KEYS if key not in report]
    if missing:
        raise ValueError(f"report lacks the keys {', '.join(missing)}")
    if report["status"] not in STATUSES:
        raise ValueError(f"report status is {report['status']!r}, legal are {', '.join(STATUSES)}")
    if report["status"] != "PASS":
        return
    comparisons = _comparisons(report)
    if not comparisons:
        raise ValueError("report status is PASS, and nothing was compared")
    against = [item.where for item in comparisons if item.failed]
    against += [f"{run['runtime']} ({run['artifact']})" for run in _runs(report) if run["status"] == "FAIL"]
    against += [
        f"polygraphy exited with {check['exit_code']} ({check['artifact']})"
        for check in report["verification"]["polygraphy"] or ()
        if check["exit_code"] != 0
    ]
    if against:
        raise ValueError(f"report status is PASS, and these failed: {'; '.join(against)}")


def _runs(report: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return (report["verification"] or {}).get("runs") or ()


def _comparisons(report: Mapping[str, Any]) -> list[_Comparison]:
    return [_Comparison(run, row) for run in _runs(report) for row in run["tensors"] or ()]


def _total_seconds(report: Mapping[str, Any]) -> float | None:
    seconds = [stage["seconds"] for stage in report["stages"] or () if stage["seconds"] is not None]
    return sum(seconds) if seconds else None


def _verdict(report: Mapping[str, Any]) -> list[str]:
    """The result in sentences: how many comparisons are within bounds, the worst error, and the tightest bound."""
    comparisons, runs = _comparisons(report), _runs(report)
    if not comparisons:
        skipped = f" {plural(len(runs), 'artifact')} did not run." if runs else ""
        return [
            f"Nothing was compared with the eager model: this bundle carries no proof.{skipped}",
            *_quality_in_words(report["metrics"]),
        ]
    failed = sum(item.failed for item in comparisons)
    place = f"in {plural(len({run['runtime'] for run in runs if run['tensors']}), 'runtime')}"
    if failed:
        verb = "exceeds" if failed == 1 else "exceed"
        counted = f"{number(failed)} of {plural(len(comparisons), 'comparison')} {place} {verb} the bound."
    elif len(comparisons) == 1:
        counted = f"The only comparison {place} is within its bound."
    else:
        counted = f"All {number(len(comparisons))} comparisons {place} are within their bounds."
    return [
        counted,
        *_worst_in_words(report["verification"], max(comparisons, key=lambda item: item.share)),
        *_quality_in_words(report["metrics"]),
    ]


def _quality_in_words(metrics: Mapping[str, Any] | None) -> list[str]:
    """Whether the artifacts keep the quality budget, where there is one."""
    budget = (metrics or {}).get("budget")
    if metrics is None or budget is None:
        return []
    verb = "is within" if metrics["within"] else "exceeds"
    return [
        f"The largest change of ranking quality on {_labelled_in_words(metrics['data'])} {verb} its budget: "
        f"{scientific(metrics['worst'])} of {scientific(budget)}."
    ]


def _labelled_in_words(data: Mapping[str, Any]) -> str:
    return f"{plural(data['requests'], 'request')} of {one_line(data['file'])}"


def _worst_in_words(verification: Mapping[str, Any], tightest: _Comparison) -> list[str]:
    """The recorded worst error, and the comparison with the largest share of its bound where that is another one."""
    error, bound = tightest.row["error"], tightest.row["bound"]
    share = f"{number(tightest.share)} % of" if math.isfinite(tightest.share) else "beyond"
    worst = verification["worst_error"]
    if worst == error:
        where = one_line(verification["worst_where"])
        return [f"Worst error {scientific(worst)}, {share} its bound of {scientific(bound)}: {where}."]
    side = "Furthest beyond its bound" if tightest.failed else "Nearest to its bound"
    sentences = [f"{side}: error {scientific(error)}, {share} {scientific(bound)}: {one_line(tightest.where)}."]
    if worst is not None:
        sentences.insert(0, f"Worst error {scientific(worst)}: {one_line(verification['worst_where'])}.")
    return sentences


# --- terminal ---------------------------------------------------------------------------------------------------------


def _summary_row(run: Mapping[str, Any]) -> tuple[str, ...]:
    name = (one_line(run["runtime"]), one_line(run["artifact"]), one_line(run["status"]))
    comparisons = [_Comparison(run, row) for row in run["tensors"] or ()]
    if not comparisons:
        return (*name, "-", "-", "-")
    worst = max(comparisons, key=lambda item: item.share)
    return (*name, scientific(worst.row["error"]), scientific(worst.row["bound"]), number(worst.share))


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int]) -> Iterator[str]:
    """Lines of a table in columns: text flush left, numbers flush right."""
    widths = [max(len(line[place]) for line in (header, *rows)) for place in range(len(header))]
    for line in (header, *rows):
        cells = (
            cell.rjust(width) if place in numeric else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        yield ("  " + "  ".join(cells)).rstrip()


# --- sections ---------------------------------------------------------------------------------------------------------


def _precision(report: Mapping[str, Any]) -> str:
    found = report.get("quantization")
    if found is None:
        return str(report["precision"])
    return f"{found['kind']} in {plural(len(found['sites']), 'product')}, {report['precision']} elsewhere"


def _header(report: Mapping[str, Any]) -> Html:
    checkpoint, backend = report["checkpoint"], report["backend"]
    skipped = [run for run in _runs(report) if run["status"] == "NOT RUN"]
    failures = [item for item in _comparisons(report) if item.failed]
    seconds = _total_seconds(report)
    facts: list[tuple[str, object]] = [
        (
            "Checkpoint",
            NOT_APPLICABLE
            if checkpoint is None
            else joined((code(checkpoint["file"]), f", dialect {checkpoint['dialect']}")),
        ),
        ("Precision", _precision(report)),
        *((("SiLU of attention", report["attention_silu"]),) if "attention_silu" in report else ()),
        ("Backend", NOT_APPLICABLE if backend is None else _backend_in_words(backend)),
        ("Built", joined((element("time", report["created"]), f" by hstu-compile {report['hstu_compile']}"))),
        (
            "Time",
            NOT_APPLICABLE if seconds is None else f"{number(seconds)} s in {plural(len(report['stages']), 'stage')}",
        ),
    ]
    return element(
        "header",
        element("div", element("h1", report["title"]), status_mark(report["status"]), class_="title"),
        *(element("p", sentence, class_="verdict") for sentence in _verdict(report)),
        _bullets(
            joined(
                (
                    "Beyond the bound: ",
                    item.where,
                    f", error {scientific(item.row['error'])}, bound {scientific(item.row['bound'])}",
                    f": {item.row['detail']}" if item.row.get("detail") else "",
                )
            )
            for item in failures
        ),
        _bullets(
            joined((f"Not run: {run['runtime']} ({run['artifact']}): ", _reason(run["reason"]))) for run in skipped
        ),
        element("dl", *(joined((element("dt", name), element("dd", value))) for name, value in facts), class_="facts"),
    )


def _backend_in_words(backend: Mapping[str, Any]) -> Html:
    name = " ".join(str(part) for part in (backend["name"], backend["version"]) if part)
    targets = ", ".join(str(item) for item in backend["compute_capabilities"] or ()) or "none named"
    return joined((f"{name}, chosen because ", _reason(backend["reason"]), f"; compute capabilities: {targets}"))


def _pipeline(report: Mapping[str, Any]) -> Html:
    picture = element(
        "div",
        element("figure", pipeline_figure(report)),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label="Pipeline picture",
    )
    stages = report["stages"] or ()
    if not stages:
        return joined((picture, note("No stages were recorded.")))
    columns = (Column("stage"), Column("time, s", numeric=True), Column("result"))
    rows: list[tuple[object, ...]] = [(stage["name"], number(stage["seconds"]), stage["summary"]) for stage in stages]
    rows.append((element("strong", "total"), number(_total_seconds(report)), ""))
    return joined((picture, simple_table("Stages in the order in which they ran", columns, rows)))


def _verification(report: Mapping[str, Any]) -> Html:
    verification = report["verification"]
    if verification is None:
        return note(
            "Not run: verification was off for this build, so nothing shows that the artifact equals the eager model."
        )
    runs = _runs(report)
    parts: list[object] = [element("p", "Bound: ", verification["bound_rule"])] if verification["bound_rule"] else []
    parts.append(_errors(runs) if runs else note("Not run: no runtime was tried."))
    parts.append(element("div", _feeds(verification["feeds"] or ()), _agreement(runs), class_="columns"))
    parts.append(_layers(runs))
    parts.append(_polygraphy(verification["polygraphy"] or ()))
    return joined(parts)


def _feeds(feeds: Sequence[Mapping[str, Any]]) -> Html:
    if not feeds:
        return note("No feeds were recorded.")
    columns = (
        Column("feed"),
        Column("sequences", numeric=True),
        Column("events", numeric=True),
        Column("longest sequence", numeric=True),
    )
    rows = [
        (feed["name"], number(feed["sequences"]), number(feed["events"]), number(feed["max_len"])) for feed in feeds
    ]
    return simple_table("Inputs that the comparison used", columns, rows)


def _errors(runs: Sequence[Mapping[str, Any]]) -> Html:
    columns = (
        Column("tensor"),
        Column("feed"),
        Column("error", numeric=True),
        Column("bound", numeric=True),
        Column("error, % of bound", numeric=True),
        Column("max abs", numeric=True),
        Column("result"),
    )
    groups = []
    has_lists = any(row["tensor"] == "top_items" for run in runs for row in run["tensors"] or ())
    for run in runs:
        comparisons = [_Comparison(run, row) for row in run["tensors"] or ()]
        heading: list[object] = [f"{run['runtime']}, {run['artifact']}: ", status_mark(run["status"])]
        if run["reason"]:
            heading.append(f" ({run['reason']})")
        elif not comparisons:
            heading.append(" (no tensor was compared; no reason was recorded)")
        rows = [
            (
                code(item.row["tensor"]),
                item.row["feed"],
                scientific(item.row["error"]),
                scientific(item.row["bound"]),
                number(item.share),
                scientific(item.row["max_abs"]),
                status_mark(item.row["status"]),
            )
            for item in comparisons
        ]
        groups.append(
            Group(joined(heading), rows, frozenset(place for place, item in enumerate(comparisons) if item.failed))
        )
    shown = table("Error of every output against the float64 reference", columns, groups)
    return joined((shown, note(_TOP_ITEMS))) if has_lists else shown


def _layers(runs: Sequence[Mapping[str, Any]]) -> Html:
    heading = element("h3", "Error of each layer")
    with_layers = [run for run in runs if run["layers"]]
    if not with_layers:
        return joined((heading, note("Not run: no runtime recorded the error of single layers.")))
    guide = note("The verdict rests on the outputs above. The layers show where an error enters and how it grows.")
    plots = element("div", *layer_error_figures(with_layers), class_="plots")
    numbers = element("div", *(_layer_table(run) for run in with_layers), class_="columns")
    short = max(len(run["layers"]) for run in with_layers) <= _OPEN_LAYERS
    details = element("details", element("summary", "Numbers of the plots"), numbers, open="" if short else None)
    return joined((heading, guide, plots, details))


def _layer_table(run: Mapping[str, Any]) -> Html:
    bounds = layer_bounds(run["layers"])
    columns = (
        Column("layer", numeric=True),
        Column("error", numeric=True),
        Column("eager error", numeric=True),
        Column(bounds.label, numeric=True),
        Column("error, % of it", numeric=True),
    )
    shares = [share_of_bound(layer["error"], bound) for layer, bound in zip(run["layers"], bounds.values, strict=True)]
    rows = [
        (
            str(layer["layer"]),
            scientific(layer["error"]),
            scientific(layer["eager_error"]),
            scientific(bound),
            number(share),
        )
        for layer, bound, share in zip(run["layers"], bounds.values, shares, strict=True)
    ]
    # Twice eager's error is a guide to the eye unless the run was judged by it: then, and only then, a row can fail.
    failed = frozenset(place for place, share in enumerate(shares) if bounds.recorded and not share <= 100.0)
    return table(f"{run['runtime']}, {run['artifact']}", columns, [Group(None, rows, failed)])


def _agreement(runs: Sequence[Mapping[str, Any]]) -> Html:
    columns = (
        Column("runtime"),
        Column("artifact"),
        Column("top-10 overlap", numeric=True),
        Column("Kendall tau", numeric=True),
    )
    rows = [
        (
            run["runtime"],
            run["artifact"],
            decimal4(run["ranking"]["top10_overlap"]),
            decimal4(run["ranking"]["kendall_tau"]),
        )
        for run in runs
        if run["ranking"] is not None
    ]
    if not rows:
        return note("Agreement of rankings: not run.")
    return simple_table("Agreement of the ranking with the eager model's; 1 is the same ranking", columns, rows)


def _polygraphy(checks: Sequence[Mapping[str, Any]]) -> Html:
    heading = element("h3", "The same check by Polygraphy")
    if not checks:
        return joined((heading, note("Not run.")))
    parts: list[object] = [heading]
    for check in checks:
        exit_code = check["exit_code"]
        mark = status_mark("PASS" if exit_code == 0 else "FAIL")
        parts.append(element("p", code(check["artifact"]), ": ", mark, f", exit code {exact(exit_code)}"))
        parts.append(element("pre", check["command"]))
        parts.append(element("pre", check["output_tail"]) if check["output_tail"] else note("It printed nothing."))
    return joined(parts)


def _metrics(metrics: Mapping[str, Any] | None) -> Html:
    if metrics is None or not metrics["rows"]:
        return note("Not run: this build measured no ranking quality.")
    columns = [Column("model"), *(Column(name, numeric=True) for name in metrics["columns"])]
    first, *others = metrics["rows"]
    groups = [Group(None, [(row["name"], *(decimal4(value) for value in row["values"])) for row in metrics["rows"]])]
    if others:
        differences = [(row["name"], *map(_signed, row["values"], first["values"])) for row in others]
        groups.append(Group(f"Difference from {first['name']}", differences))
    shown = table("Ranking quality, to the fourth decimal", columns, groups)
    if "data" not in metrics:
        return shown
    return joined((element("p", f"Measured on {_labelled_in_words(metrics['data'])}."), shown))


def _signed(value: float | None, baseline: float | None) -> str:
    if value is None or baseline is None:
        return NOT_APPLICABLE
    difference = f"{value - baseline:+.4f}"
    return "0.0000" if float(difference) == 0 else difference


def _quantization(report: Mapping[str, Any]) -> list[tuple[str, str, Html]]:
    """The section, in reports of quantised builds."""
    found = report.get("quantization")
    return [("quantization", "Quantisation", quantization_section(found))] if found is not None else []


def _timings(timings: Sequence[Mapping[str, Any]]) -> Html:
    if not timings:
        return note("Not run: this build measured no latency.")
    columns = (
        Column("what"),
        Column("sequences", numeric=True),
        Column("events", numeric=True),
        Column("median, ms", numeric=True),
        Column("90th percentile, ms", numeric=True),
        Column("note"),
    )
    rows = [
        (
            item["name"],
            number(item["batch"]),
            number(item["events"]),
            number(item["median_ms"]),
            number(item["p90_ms"]),
            item["note"] or "",
        )
        for item in timings
    ]
    return simple_table("Latency of one batch", columns, rows)


def _kernels(report: Mapping[str, Any]) -> list[tuple[str, str, Html]]:
    """The section, in reports of profiles."""
    found = report.get("profile")
    return [("kernels", "Kernels", kernels_section(found))] if found is not None else []


def _environment(report: Mapping[str, Any]) -> Html:
    built = _settings("Where the bundle was built", report["environment"], "No environment was recorded.")
    found = report.get("profile")
    if found is None:
        return built
    profiled = _settings("Where it was profiled", found["environment"], "No environment was recorded.")
    return element("div", built, profiled, class_="columns")


def _graphs(graphs: Sequence[Mapping[str, Any]]) -> Html:
    if not graphs:
        return note("Not applicable: this build has no graph.")
    return joined(_graph(graph) for graph in graphs)


def _heading(graph: Mapping[str, Any]) -> Html:
    return element("h3", f"{graph['name']}: ", code(graph["file"]))


def _graph(graph: Mapping[str, Any]) -> Html:
    name = graph["name"]
    size = element(
        "p",
        f"File of {_size(graph['bytes'])}: {plural(graph['nodes'], 'node')}, weights of "
        f"{_size(graph['initializers_bytes'])}.",
    )
    tensors = (Column("name"), Column("type"), Column("shape"))
    ports = [
        Group(kind, [(code(port["name"]), port["dtype"], code(shape(port["shape"]))) for port in graph[kind] or ()])
        for kind in ("inputs", "outputs")
    ]
    counts = (
        _counted(f"Operators of {name}", "operator", graph["operators"] or {}),
        _counted(f"Types, as counted in {name}", "operator and type", graph["precision_counts"] or {}),
    )
    interface = table(f"Interface of {name}", tensors, ports)
    return joined((_heading(graph), size, element("div", *counts, interface, class_="columns")))


def _counted(caption: str, kind: str, counts: Mapping[str, int]) -> Html:
    """Counts, the most frequent first."""
    if not counts:
        return note(f"{caption}: none were recorded.")
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return simple_table(
        caption, (Column(kind), Column("count", numeric=True)), [(name, number(count)) for name, count in ordered]
    )


def _passes(graphs: Sequence[Mapping[str, Any]]) -> Html:
    if not graphs:
        return note("Not run: the graph is as exported.")
    return joined(_passes_of(graph) for graph in graphs)


def _passes_of(graph: Mapping[str, Any]) -> Html:
    if not graph["passes"]:
        return note(f"Not run: the graph {graph['name']} is as exported.")
    columns = (Column("pass"), Column("counted"), Column("count", numeric=True), Column("time, s", numeric=True))
    groups = []
    for record in graph["passes"]:
        counts = list(record["counts"].items()) or [("nothing counted", None)]
        rows = [
            (
                code(record["name"]) if place == 0 else "",
                kind,
                number(count),
                number(record["seconds"]) if place == 0 else "",
            )
            for place, (kind, count) in enumerate(counts)
        ]
        groups.append(Group(None, rows))
    return table(f"Passes over {graph['name']} in order, and what each counted", columns, groups)


def _engines(report: Mapping[str, Any]) -> Html:
    graphs, backend = report["graphs"] or (), report["backend"]
    if not any(graph["engine"] for graph in graphs):
        if backend is None:
            return note("Not applicable: no backend was chosen and no engine was built.")
        return note(
            f"Not applicable: no engine was built. Backend {backend['name']}: ", _reason(backend["reason"]), "."
        )
    return joined(_engine(graph) for graph in graphs)


def _engine(graph: Mapping[str, Any]) -> Html:
    name, engine = graph["name"], graph["engine"]
    if engine is None:
        return note(f"Not applicable: no engine was built for {name}.")
    heading = element("h3", f"{name}: ", code(engine["file"]))
    size = element("p", f"{_size(engine['bytes'])}, built in {number(engine['seconds'])} s.")
    layers = _settings(
        f"Layers of {name}, by the inspector", engine["layers"], "The backend does not show the engine's layers."
    )
    facts = element("div", _profiles(name, engine["profiles"] or ()), layers, class_="columns")
    messages = engine["messages"] or ()
    said = (
        joined((element("p", "Messages of the builder:"), element("pre", "\n".join(str(line) for line in messages))))
        if messages
        else note("The builder gave no warnings.")
    )
    segments = fused_section(name, graph["fused"]) if graph.get("fused") else Html("")
    return joined((heading, size, segments, facts, _launched(name, engine.get("kernels")), said))


def _launched(name: str, kernels: Sequence[Mapping[str, str]] | None) -> Html:
    """The kernels that a pass launches, each name once, and how many of them only copy."""
    if kernels is None:
        return note("The backend does not tell which kernels a pass launches.")
    launches = Counter((kernel["name"], kernel["kind"]) for kernel in kernels)
    kinds = Counter(kernel["kind"] for kernel in kernels)
    line = (
        f"A pass launches {plural(len(kernels), 'kernel')} of the backend's at least: "
        f"{plural(kinds['product'], 'product')}, {number(kinds['copy'])} that only copy or convert, "
        f"{plural(kinds['other'], 'other')}."
    )
    columns = (Column("kernel"), Column("kind"), Column("launches", numeric=True))
    rows = [(code(kernel), kind, number(count)) for (kernel, kind), count in launches.items()]
    shown = simple_table(f"Kernels of {name}, in the order of their first launch", columns, rows)
    return joined((element("p", line), element("details", element("summary", f"Kernels of {name}"), shown)))


def _profiles(name: str, profiles: Sequence[Mapping[str, Any]]) -> Html:
    if not profiles:
        return note(f"The engine of {name} has no optimisation profile.")
    columns = (Column("input"), Column("min"), Column("opt"), Column("max"))
    groups = [
        Group(
            f"profile {profile['name']}",
            [
                (code(port), *(code(shape(profile[bound].get(port))) for bound in ("min", "opt", "max")))
                for port in profile["opt"]
            ],
        )
        for profile in profiles
    ]
    return table(f"Shapes that the engine of {name} accepts", columns, groups)


def _checkpoint(checkpoint: Mapping[str, Any] | None) -> Html:
    if checkpoint is None:
        return note("Not applicable: no checkpoint was recorded.")
    facts = {key: checkpoint[key] for key in ("file", "sha256", "dialect")}
    parts = (
        _settings("Checkpoint", facts, ""),
        _settings(
            "Configuration of the model, every digit kept", checkpoint["config"], "No configuration was recorded."
        ),
    )
    return element("div", *parts, class_="columns")


def _settings(caption: str, tree: Mapping[str, Any] | None, absent: str) -> Html:
    """A nested mapping as a table of dotted names."""
    if not tree:
        return note(absent)
    return simple_table(
        caption, (Column("name"), Column("value")), [(name, code(value)) for name, value in flattened(tree)], "text"
    )


def _files(files: Sequence[Mapping[str, Any]]) -> Html:
    if not files:
        return note("No files were recorded.")
    columns = (Column("file"), Column("bytes", numeric=True), Column("sha256"))
    return simple_table(
        "Files of the bundle", columns, [(code(f["name"]), number(f["bytes"]), code(f["sha256"])) for f in files]
    )


def _commands(commands: Sequence[Mapping[str, Any]]) -> Html:
    if not commands:
        return note("No commands were recorded.")
    return joined(joined((element("h3", item["purpose"]), element("pre", item["command"]))) for item in commands)


def _bullets(lines: Iterator[Html]) -> Html:
    items = [element("li", line) for line in lines]
    return element("ul", *items, class_="plain") if items else Html("")


def _size(num_bytes: int | None) -> str:
    return f"{number(num_bytes)} bytes ({mebibytes(num_bytes)} MiB)"


def _reason(reason: object) -> object:
    return reason if reason else "no reason was recorded"


def _style_sheet() -> str:
    return resources.files("hstu_compile").joinpath("templates/report.css").read_text(encoding="utf-8")
