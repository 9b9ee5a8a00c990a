"""What a profile found: the report's section of kernels with its picture, and the lines on a terminal. Level 2.

All are made from the dict that profile.json holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hstu_compile._report_html import Column, Group, Html, code, element, joined, note, svg, table
from hstu_compile._report_text import aligned, number, one_line, plural
from hstu_compile.kernel_timeline import ATTENTION, COPY, GAPS, KINDS, OTHER, PRODUCT

#: Kinds of time as they are called, in the order in which a bar shows them.
_LABELS = {ATTENTION: "attention", PRODUCT: "products", COPY: "copies", OTHER: "norms and other", GAPS: "gaps"}
#: Classes of the style sheet.
_CLASSES = {ATTENTION: "attention", PRODUCT: "product", COPY: "copy", OTHER: "other", GAPS: "gaps"}

_WIDTH, _RIGHT = 760, 96
_BAR, _PITCH, _TOP = 13, 40, 34
#: Letters of a bar's name that fit above it.
_NAME_CHARS = 100
#: More tables than this are folded away on the screen.
_OPEN_TABLES = 2


def timing_note(measured: Mapping[str, Any], gpu: str) -> str:
    """How a row of the section Timings was measured.

    Args:
        measured: an entry of the profile's `passes`.
        gpu: name of the GPU.
    """
    if measured["latency"] is None:
        return f"not run on {gpu}: {measured['reason']}"
    return f"{plural(measured['latency']['calls'], 'call')} on {gpu}, host arrays to host arrays"


def kernels_section(profile: Mapping[str, Any]) -> Html:
    """Where the time of each pass goes: a picture by kind, then every kernel.

    Args:
        profile: the content of profile.json.
    """
    said = element("p", _measured_where(profile))
    skipped = [each for each in profile["passes"] if each["latency"] is None]
    notes = [note(f"Not run: {_name(each)}: {each['reason']}.") for each in skipped]
    traced = [each for each in profile["passes"] if each["timeline"] is not None]
    if not traced:
        return joined((said, *notes, note("Not run: no kernels were traced (--no-timeline).")))
    guide = note(
        "A timeline is of whole passes, copies from and to the host included, while a profiler watched: launches that "
        "are not in a CUDA graph take longer than in the latencies above, and so do their gaps. Shares are of the span "
        "from the first kernel's beginning to the last one's end; kernels that overlap each count in full."
    )
    is_open = "" if len(traced) <= _OPEN_TABLES else None
    tables = [
        element("details", element("summary", _span_of(each)), _kernel_table(each), open=is_open) for each in traced
    ]
    return joined((said, *notes, guide, element("figure", _figure(traced)), *tables))


def profile_table(profile: Mapping[str, Any]) -> str:
    """The same in short, as text."""
    header = ("pass", "events", "median ms", "p90 ms", "span us", "gaps", "attention", "launches")
    lines = aligned([header, *(_table_row(each) for each in profile["passes"])])
    return "\n".join((f"{one_line(profile['gpu'])}, {_count_in_words(profile)}", *lines))


def _table_row(measured: Mapping[str, Any]) -> tuple[str, ...]:
    latency, timeline = measured["latency"], measured["timeline"]
    times = ("-", "-") if latency is None else (number(latency["median_ms"]), number(latency["p90_ms"]))
    rest = ("-", "-", "-", "-")
    if timeline is not None:
        shares = _shares(timeline)
        found = (number(timeline["span_us"]), f"{shares[GAPS]:.0%}", f"{shares[ATTENTION]:.0%}")
        rest = (*found, number(timeline["launches"]))
    return (_name(measured), number(measured["events"]), *times, *rest)


def _count_in_words(profile: Mapping[str, Any]) -> str:
    return (
        f"{plural(profile['calls'], 'call')} a row, after {number(profile['warm_up_ms'])} ms of calls that do not count"
    )


def _measured_where(profile: Mapping[str, Any]) -> str:
    tracer = f", kernels traced by torch {one_line(profile['torch'])}" if profile["torch"] else ""
    driver = f", driver {one_line(profile['driver'])}" if profile["driver"] else ""
    return (
        f"Measured on {one_line(profile['gpu'])}{driver}, at {one_line(profile['created'])} by hstu-compile "
        f"{one_line(profile['hstu_compile'])}: {_count_in_words(profile)}{tracer}."
    )


def _name(measured: Mapping[str, Any]) -> str:
    return one_line(f"{measured['graph']}, {measured['request']}, {measured['way']}")


def _span_of(measured: Mapping[str, Any]) -> str:
    timeline = measured["timeline"]
    return f"{_name(measured)}: {number(timeline['span_us'])} us, launches: {number(timeline['launches'])}"


def _shares(timeline: Mapping[str, Any]) -> dict[str, float]:
    """Share of the span by kind."""
    shares = dict.fromkeys(KINDS, 0.0)
    for kernel in timeline["kernels"]:
        shares[kernel["kind"]] += kernel["share"]
    return shares | {GAPS: timeline["gaps_share"]}


def _kernel_table(measured: Mapping[str, Any]) -> Html:
    timeline = measured["timeline"]
    columns = (
        Column("kernel"),
        Column("kind"),
        Column("launches", numeric=True),
        Column("us", numeric=True),
        Column("share", numeric=True),
    )
    rows = [
        (code(each["kernel"]), each["kind"], number(each["launches"]), number(each["us"]), f"{each['share']:.1%}")
        for each in timeline["kernels"]
    ]
    ends = [
        ("gaps", "", "", number(timeline["gaps_us"]), f"{timeline['gaps_share']:.1%}"),
        ("span", "", number(timeline["launches"]), number(timeline["span_us"]), "100.0%"),
    ]
    caption = f"Kernels of {_name(measured)}, in the order of their first launch; medians of {timeline['calls']} passes"
    return table(caption, columns, [Group(None, rows), Group("All together", ends)], "kernels")


def _figure(traced: Sequence[Mapping[str, Any]]) -> Html:
    """A bar for each pass, of its kinds in one order, all of one length: the spans stand beside them."""
    parts = list(_legend())
    for place, measured in enumerate(traced):
        parts.append(_bar(measured, _TOP + place * _PITCH))
    described = "; ".join(f"{_name(each)}: {_shares_in_words(each['timeline'])}" for each in traced)
    title = "Shares of each pass by kind"
    return svg("kernels", title, described, _WIDTH, _TOP + len(traced) * _PITCH, "shares", parts)


def _legend() -> Iterator[Html]:
    x = 0.0
    for kind, label in _LABELS.items():
        yield element("rect", class_=f"share {_CLASSES[kind]}", x=round(x, 1), y=4, width=_BAR, height=_BAR)
        yield element("text", label, class_="legend", x=round(x + _BAR + 6, 1), y=15)
        x += _BAR + 6 + 6.6 * len(label) + 18


def _bar(measured: Mapping[str, Any], y: int) -> Html:
    timeline = measured["timeline"]
    shares, name = _shares(timeline), _name(measured)
    # Kernels that overlap make more than the span.
    whole = max(sum(shares.values()), 1.0)
    shown = name if len(name) <= _NAME_CHARS else f"{name[: _NAME_CHARS - 1]}…"
    parts = [element("text", shown, x=0, y=y + 11)]
    x = 0.0
    for kind, label in _LABELS.items():
        width = (_WIDTH - _RIGHT) * shares[kind] / whole
        if shares[kind] > 0:
            rect = element(
                "rect",
                class_=f"share {_CLASSES[kind]}",
                x=round(x, 1),
                y=y + 16,
                width=round(width, 1),
                height=_BAR,
            )
            parts.append(element("g", element("title", f"{label}: {shares[kind]:.1%}"), rect))
        x += width
    span = f"{number(timeline['span_us'])} us"
    parts.append(element("text", span, class_="tick", x=_WIDTH - _RIGHT + 8, y=y + 16 + _BAR - 2))
    return element("g", *parts)


def _shares_in_words(timeline: Mapping[str, Any]) -> str:
    shares = _shares(timeline)
    return ", ".join(f"{label} {shares[kind]:.0%}" for kind, label in _LABELS.items())
