"""What a manifest holds, as types: one that was edited or damaged is refused by the names of what is wrong. Level 2.

Keys that nobody here reads are not looked at: a newer build may write more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, cast

#: Yields what is wrong with a value, for the place where it stands, such as `graphs[0].name`.
Form = Callable[[Any, str], Iterator[str]]

_NAMES = {str: "text", int: "an integer", float: "a number", list: "a list", dict: "an object"}


def _is(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def of(*kinds: type) -> Form:
    """A value of one of these types; integers count as float, bools as neither."""

    def check(value: Any, where: str) -> Iterator[str]:
        if not any(_is(value, kind) for kind in kinds):
            yield f"{where} is {_shown(value)}, not {' or '.join(_NAMES[kind] for kind in kinds)}"

    return check


def one_of(*names: str) -> Form:
    """One of these words."""

    def check(value: Any, where: str) -> Iterator[str]:
        if value not in names:
            yield f"{where} is {_shown(value)}, not one of {', '.join(names)}"

    return check


def or_null(form: Form) -> Form:
    """null, or what `form` allows."""

    def check(value: Any, where: str) -> Iterator[str]:
        if value is not None:
            yield from form(value, where)

    return check


def plain_file(value: Any, where: str) -> Iterator[str]:
    """The name of a file in the bundle's own folder."""
    if not isinstance(value, str) or not value or PurePath(value).name != value:
        yield f"{where} is {_shown(value)}, not a plain file name"


def list_of(form: Form) -> Form:
    """A list, each entry of which `form` allows."""

    def check(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, list):
            yield f"{where} is {_shown(value)}, not a list"
            return
        for index, each in enumerate(value):
            yield from form(each, f"{where}[{index}]")

    return check


def each_of(form: Form) -> Form:
    """An object under whose names, whatever they are, `form` holds."""

    def check(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{where} is {_shown(value)}, not an object"
            return
        for name, each in value.items():
            yield from form(each, f"{where}.{name}")

    return check


def object_with(needed: Mapping[str, Form], optional: Mapping[str, Form] | None = None) -> Form:
    """An object with these names and perhaps those."""

    def check(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{where or 'the manifest'} is {_shown(value)}, not an object"
            return
        for name, form in {**needed, **(optional or {})}.items():
            place = f"{where}.{name}" if where else name
            if name in value:
                yield from form(value[name], place)
            elif name in needed:
                yield f"{place} is missing"

    return check


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


_TEXT = of(str)
_TENSORS = list_of(object_with({"name": _TEXT, "dtype": _TEXT, "shape": list_of(of(int, str))}))
_ERRORS = each_of(of(float))
_VERIFIED = object_with(
    {"primary": _TEXT, "feeds": list_of(_TEXT), "eager_error": _ERRORS, "polygraphy_arguments": list_of(_TEXT)},
    {"eager_whole_error": or_null(_ERRORS)},
)
_SHAPES = each_of(list_of(of(int)))
_PROFILES = list_of(object_with({"name": _TEXT, "min": _SHAPES, "opt": _SHAPES, "max": _SHAPES}))
_GRAPH = object_with(
    {"name": _TEXT, "onnx": plain_file, "inputs": _TENSORS, "outputs": _TENSORS},
    {
        "tables": list_of(plain_file),
        "engine": or_null(plain_file),
        "fused": or_null(object_with({"schedule": plain_file, "engines": list_of(plain_file)})),
        "profiles": _PROFILES,
        "verification": or_null(_VERIFIED),
    },
)
_MANIFEST = object_with(
    {
        "inputs": _TENSORS,
        "outputs": _TENSORS,
        "limits": each_of(or_null(of(int))),
        "precision": object_with({"requested": one_of("fp32", "fp16", "bf16")}),
        "status": _TEXT,
        "graphs": list_of(_GRAPH),
    },
    {
        "checkpoint": of(dict),
        "operator": of(dict),
        "backend": object_with({"name": _TEXT}),
        "verification": or_null(object_with({}, {"session": or_null(object_with({"eager_error": _ERRORS}))})),
        "quantization": or_null(object_with({"kind": one_of("int8", "fp8")})),
        "profiles": _PROFILES,
        "ranking": or_null(of(dict)),
        "retrieval": or_null(of(dict)),
        "kernels": or_null(object_with({"file": plain_file})),
        "plugin": or_null(of(dict)),
        "versions": of(dict),
        "hstu_compile": _TEXT,
    },
)


def _missing_together(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What other entries of a manifest, each of which is right by itself, ask for."""
    graphs = manifest["graphs"]
    if any(graph.get("fused") for graph in graphs) and not manifest.get("kernels"):
        yield "kernels is missing, and a graph is in segments"
    if any(graph.get("fused") or graph.get("engine") for graph in graphs) and not manifest.get("backend"):
        yield "backend is missing, and a graph has an engine"
    if manifest.get("verification"):
        for index, graph in enumerate(graphs):
            if not graph.get("verification"):
                yield f"graphs[{index}].verification is missing, and the bundle says that it was verified"


def manifest_problems(manifest: object) -> list[str]:
    """What a manifest has that it cannot have, and lacks; of format 1.

    >>> manifest_problems([])
    ['the manifest is [], not an object']
    """
    return list(_MANIFEST(manifest, "")) or list(_missing_together(cast(Mapping[str, Any], manifest)))
