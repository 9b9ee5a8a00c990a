"""A pickle read as data: nothing in it is imported or called. Level 0, standard library only.

What unpickling would do with a class, this writes down: a `Record` is the class's name and the state that the file has
for it. So a file can at most be refused; it cannot run code.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

#: A class or function by its module and its name in it.
Global = tuple[str, str]

_LARGEST_INT = 2**63 - 1


class RefusedGlobalError(ValueError):
    """The pickle names a class or function that is not of the kind of file it is taken for.

    Attributes:
        name: `module.name`.
    """

    def __init__(self, name: str) -> None:
        # The name comes from the file, and is shown on a terminal.
        self.name = ascii(name)[1:-1][:200]
        super().__init__(f"it names {self.name}")


class MalformedPickleError(ValueError):
    """The bytes are not a pickle of plain data and records."""


class Record:
    """An object of a class that the reader knows by name alone; compared and hashed by identity.

    Attributes:
        kind: name of its class, without the module.
        state: what the pickle says of it: a dict of attributes, or a tuple; None where it says nothing.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: Any = None


class _Named:
    """A class or function on the stack: what is made or called must be one."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


def _plain(item: Any) -> Any:
    """What an operand is in the result: a class there is its names."""
    return (item.module, item.name) if type(item) is _Named else item


def read_records(
    content: bytes,
    records: Collection[Global],
    calls: Mapping[Global, Callable[..., Any]],
    constants: Collection[Global] = (),
) -> Any:
    """The object that a pickle describes, with a `Record` in place of every object of a class.

    Args:
        content: the pickle, of protocol 2 or newer.
        records: classes whose objects become records.
        calls: what stands for the call of a class or function; given the call's operands, in which a class or
            constant is the pair of its names. May raise ValueError or TypeError.
        constants: objects that are known by their names, and become the pair of names.

    Returns:
        None, bool, int (64 bits), float, str, list, dict (keys: str, int or records), tuple, record, or a constant's
        names.

    Raises:
        RefusedGlobalError: for any other class or function.
        MalformedPickleError: if it is truncated, or says what plain data never needs.
    """
    machine = _Machine(frozenset(records), calls, frozenset(constants))
    try:
        for opcode, argument, _ in pickletools.genops(content):
            machine.run(opcode.name, argument)
        return machine.result()
    except (RefusedGlobalError, MalformedPickleError):
        raise
    except RecursionError as error:
        raise MalformedPickleError("it is nested too deeply") from error
    # A damaged file fails in whatever operation the damage leads to.
    except (ValueError, TypeError, LookupError, OverflowError, UnicodeError, AttributeError) as error:
        raise MalformedPickleError(f"{type(error).__name__}: {ascii(str(error))[1:-1][:200]}") from error


def _malformed(message: str) -> NoReturn:
    raise MalformedPickleError(message)


class _Machine:
    """The stack on which a pickle builds its object: the few operations that plain data and records need."""

    def __init__(
        self, records: frozenset[Global], calls: Mapping[Global, Callable[..., Any]], constants: frozenset[Global]
    ) -> None:
        self._records, self._calls, self._constants = records, calls, constants
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        # Each is given what follows it in the file, None for nothing.
        self._operations: dict[str, Callable[[Any], None]] = {
            # They say where the data is, not what it is.
            **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda _: None),
            **dict.fromkeys(("MEMOIZE", "BINPUT", "LONG_BINPUT"), self._memoize),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), self._recall),
            **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), self._push_text),
            **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), self._push_number),
            "NONE": lambda _: self._stack.append(None),
            "NEWTRUE": lambda _: self._stack.append(True),
            "NEWFALSE": lambda _: self._stack.append(False),
            "EMPTY_TUPLE": lambda _: self._stack.append(()),
            "EMPTY_LIST": lambda _: self._stack.append([]),
            "EMPTY_DICT": lambda _: self._stack.append({}),
            "MARK": self._mark,
            "TUPLE": lambda _: self._push_tuple(self._since_mark()),
            "TUPLE1": lambda _: self._push_tuple(self._popped(1)),
            "TUPLE2": lambda _: self._push_tuple(self._popped(2)),
            "TUPLE3": lambda _: self._push_tuple(self._popped(3)),
            "APPEND": lambda _: self._append(self._popped(1)),
            "APPENDS": lambda _: self._append(self._since_mark()),
            "SETITEM": lambda _: self._set_items(self._popped(2)),
            "SETITEMS": lambda _: self._set_items(self._since_mark()),
            "STACK_GLOBAL": lambda _: self._push_global(*self._popped(2)),
            # INST would make the object as well. Only protocols before 2 have it, and then it is refused by the name.
            **dict.fromkeys(("GLOBAL", "INST"), lambda names: self._push_global(*names.split(" ", maxsplit=1))),
            "NEWOBJ": self._new_record,
            "REDUCE": self._call,
            "BUILD": self._set_state,
        }

    def result(self) -> Any:
        if len(self._stack) != 1 or self._marks:
            _malformed("it ends in the middle of an object")
        return _plain(self._stack.pop())

    def run(self, opcode: str, argument: Any) -> None:
        operation = self._operations.get(opcode)
        if operation is None:
            _malformed(f"{opcode} has no place in plain data")
        operation(argument)

    def _popped(self, count: int) -> list[Any]:
        if count > len(self._stack):
            _malformed("an operation lacks its operands")
        items = [_plain(item) for item in self._stack[-count:]]
        del self._stack[-count:]
        return items

    def _since_mark(self) -> list[Any]:
        items = [_plain(item) for item in self._stack]
        self._stack = self._marks.pop()
        return items

    def _last(self, kind: type) -> Any:
        if not self._stack or type(self._stack[-1]) is not kind:
            _malformed(f"an operation on a {kind.__name__} has none")
        return self._stack[-1]

    def _memoize(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def _recall(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _mark(self, _: Any) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _push_text(self, text: str) -> None:
        if not text.isascii():
            text.encode()  # Half of a surrogate pair cannot be printed, and no parameter is named so.
        self._stack.append(text)

    def _push_number(self, number: float) -> None:
        if isinstance(number, int) and abs(number) > _LARGEST_INT:
            _malformed("it holds an integer of more than 64 bits")
        self._stack.append(number)

    def _push_tuple(self, items: list[Any]) -> None:
        self._stack.append(tuple(items))

    def _append(self, items: list[Any]) -> None:
        self._last(list).extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._last(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A tuple's hash is that of what it holds, to any depth, without a check of the depth.
            if not isinstance(key, (str, int, Record)):
                _malformed(f"a {type(key).__name__} is the key of a dict")
            target[key] = value

    def _push_global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            _malformed("a class is named by something else than text")
        known = (module, name)
        if known not in self._records and known not in self._calls and known not in self._constants:
            raise RefusedGlobalError(f"{module}.{name}")
        self._stack.append(_Named(module, name))

    def _new_record(self, _: Any) -> None:
        (arguments,) = self._popped(1)
        named = self._last(_Named)
        if (named.module, named.name) not in self._records or arguments != ():
            _malformed(f"{named.name} is not made so")
        self._stack[-1] = Record(named.name)

    def _call(self, _: Any) -> None:
        (arguments,) = self._popped(1)
        named = self._last(_Named)
        standing_in = self._calls.get((named.module, named.name))
        if standing_in is None or not isinstance(arguments, tuple):
            _malformed(f"{named.name} is not called so")
        self._stack[-1] = standing_in(*arguments)

    def _set_state(self, _: Any) -> None:
        (state,) = self._popped(1)
        record = self._last(Record)
        if record.state is not None or not isinstance(state, (dict, tuple)):
            _malformed(f"the state of a {record.kind} is no dict or tuple, or is set twice")
        record.state = state
