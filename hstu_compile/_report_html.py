"""HTML that is escaped unless it says otherwise, and the report's tables and frames of pictures. Level 1."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Sequence

from hstu_compile._report_text import NOT_APPLICABLE, printable


class Html(str):
    """Text that is markup already. Everything else is escaped where it enters the page."""

    __slots__ = ()


def escaped(value: object) -> Html:
    """Markup for `value`: itself if it is `Html`, else its text with everything that HTML could act on escaped."""
    return value if isinstance(value, Html) else Html(html.escape(printable(value), quote=True))


def joined(parts: Iterable[object], separator: str = "") -> Html:
    """Parts, escaped as needed, one after the other; `separator` is markup."""
    return Html(separator.join(escaped(part) for part in parts))


def element(name: str, *content: object, **attributes: object) -> Html:
    """An element. Attribute names lose a trailing `_` and have `_` for `-`; an attribute that is None is left out."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{shown}>{joined(content)}</{name}>")


def note(*content: object) -> Html:
    """A sentence in place of data that is not there, or beside data that needs one."""
    return element("p", *content, class_="note")


def code(value: object) -> Html:
    """A name, path or hash, in the monospaced face."""
    return element("code", value)


def status_mark(status: str) -> Html:
    """A status word. The word carries the meaning, the colour only repeats it."""
    kind = {"PASS": "pass", "FAIL": "fail"}.get(status, "open")
    return element("span", status, class_=f"status {kind}")


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        header: its title, with the unit.
        numeric: numbers are set flush right in digits of one width.
    """

    header: str
    numeric: bool = False


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows of a table under a heading of their own.

    Attributes:
        heading: spans the table's width; None for rows without one.
        rows: one cell for each column.
        failed: indices of the rows to be marked as failing.
    """

    heading: object | None
    rows: Sequence[Sequence[object]]
    failed: frozenset[int] = frozenset()


def table(caption: object, columns: Sequence[Column], groups: Sequence[Group], class_: str | None = None) -> Html:
    """A captioned table; the first cell of a row is its header.

    Raises:
        ValueError: if a row has another number of cells than there are columns.
    """
    head = joined(element("th", c.header, scope="col", class_="num" if c.numeric else None) for c in columns)
    bodies = []
    for group in groups:
        lines = []
        if group.heading is not None:
            lines.append(
                element("tr", element("th", group.heading, colspan=len(columns), scope="rowgroup"), class_="group")
            )
        for index, row in enumerate(group.rows):
            if len(row) != len(columns):
                raise ValueError(
                    f"table {caption!r}: row {index} has {len(row)} cells, the table {len(columns)} columns"
                )
            cells = [
                _cell(cell, column, first=place == 0)
                for place, (cell, column) in enumerate(zip(row, columns, strict=True))
            ]
            lines.append(element("tr", *cells, class_="failed" if index in group.failed else None))
        bodies.append(element("tbody", *lines))
    inner = element("table", element("caption", caption), element("thead", element("tr", head)), *bodies, class_=class_)
    # A wide table scrolls inside its own frame instead of widening the page; a frame that scrolls must take the focus.
    return element("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def simple_table(
    caption: object, columns: Sequence[Column], rows: Sequence[Sequence[object]], class_: str | None = None
) -> Html:
    """A table without headings inside."""
    return table(caption, columns, [Group(None, rows)], class_)


def svg(
    ident: str, title: str, description: str, width: float, height: float, class_: str, parts: Sequence[Html]
) -> Html:
    """A picture with a title and a description, which follows the page's schemes through its class.

    Args:
        ident: of the picture, alone on its page.
        title: what it shows.
        description: what it says, in words.
        width: of the view box.
        height: likewise.
        class_: of the picture.
        parts: markup inside.
    """
    return element(
        "svg",
        element("title", title, id=f"{ident}-title"),
        element("desc", description, id=f"{ident}-desc"),
        joined(parts),
        class_=class_,
        role="img",
        aria_labelledby=f"{ident}-title {ident}-desc",
        viewBox=f"0 0 {width:g} {height:g}",
    )


def _cell(cell: object, column: Column, *, first: bool) -> Html:
    classes = " ".join(filter(None, ("num" if column.numeric else "", "absent" if cell == NOT_APPLICABLE else "")))
    if first:
        return element("th", cell, scope="row", class_=classes or None)
    return element("td", cell, class_=classes or None)
