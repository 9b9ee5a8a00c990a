"""Write a protobuf message in text format, as Triton reads its config.pbtxt. Level 5; no protobuf is needed for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Union

#: A message is a mapping, a repeated field a sequence. Triton's maps are sequences of messages with key and value.
Field = Union[bool, int, str, "Word", Mapping[str, "Field"], Sequence["Field"]]
Message = Mapping[str, Field]


class Word(str):
    """The name of an enumeration's value, which is written without quotes."""


def pbtxt(message: Message) -> str:
    r"""The message as text.

    Raises:
        TypeError: for a value that no field holds.

    >>> print(pbtxt({"name": "m", "input": [{"data_type": Word("TYPE_INT32"), "dims": [-1]}]}), end="")
    name: "m"
    input {
      data_type: TYPE_INT32
      dims: -1
    }
    """
    return "".join(f"{line}\n" for name, value in message.items() for line in _field(name, value, ""))


def _field(name: str, value: Field, indent: str) -> list[str]:
    if isinstance(value, Mapping):
        inner = [line for key, each in value.items() for line in _field(key, each, indent + "  ")]
        return [f"{indent}{name} {{", *inner, f"{indent}}}"]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [line for each in value for line in _field(name, each, indent)]
    return [f"{indent}{name}: {_scalar(value)}"]


def _scalar(value: object) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return f'"{"".join(_escaped(byte) for byte in value.encode("utf-8"))}"'
    raise TypeError(f"no protobuf field holds a {type(value).__name__}")


def _escaped(byte: int) -> str:
    """One byte of a string; whatever is not plain ASCII as three octal digits."""
    plain = 32 <= byte < 127 and chr(byte) not in '"\\'
    return chr(byte) if plain else f"\\{byte:03o}"
