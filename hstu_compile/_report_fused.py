"""The report's section on a graph that was cut at its attentions: engines, and what crosses between them. Level 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hstu_compile._report_html import Column, Html, code, element, joined, simple_table
from hstu_compile._report_text import mebibytes, number, shape


def fused_section(name: str, fused: Mapping[str, Any]) -> Html:
    """Engines in order, the steps, and the tensors between them.

    Args:
        name: of the graph.
        fused: its entry `fused` in the report.
    """
    engines = simple_table(
        f"Engines of {name}, one a segment",
        (Column("file"), Column("bytes", numeric=True), Column("built in, s", numeric=True)),
        [(code(each["file"]), number(each["bytes"]), number(each["seconds"])) for each in fused["engines"]],
    )
    columns = (
        Column("tensor"),
        Column("type"),
        Column("shape"),
        Column("from step", numeric=True),
        Column("to step", numeric=True),
        Column("typical bytes", numeric=True),
        Column("largest bytes", numeric=True),
    )
    rows = [
        (
            code(each["name"]),
            each["dtype"],
            code(shape(each["shape"])),
            number(each["first_step"]),
            number(each["last_step"]),
            number(each["typical_bytes"]),
            number(each["largest_bytes"]),
        )
        for each in fused["crossing"]
    ]
    block = fused["block_bytes"]
    steps = element("p", "Steps, from 0: ", joined((code(step) for step in fused["steps"]), ", "), ".")
    memory = element(
        "p",
        f"Between the steps {mebibytes(block['typical'])} MiB are in use for the typical shapes of the profile, "
        f"{mebibytes(block['largest'])} MiB for the largest, without workspaces of the attentions.",
    )
    crossing = simple_table(f"Tensors of {name} that outlive the step that makes them", columns, rows)
    return joined((steps, engines, memory, crossing))
