"""Values of a pickle, computed without running anything of it: a machine for the data opcodes, and inert stand-ins.

Weights of others come as pickles, and unpickling is running a program. This machine executes no class or function that
a file names: `pickletools` (standard library) splits the bytes into opcodes, plain values are built from them, and each
call goes to a function of ours that knows a few names; every other call becomes an `Inert`, which only remembers.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

from hpc_gen.runtime.errors import DataError

_PUSHED = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_STORE = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_FETCH = frozenset({"GET", "BINGET", "LONG_BINGET"})
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()
_SCALARS = (str, int, float, bytes, type(None))


class Inert:
    """Stands for a class, a function or an object of theirs that a file names; nothing of it was imported or run.

    `name` is the dotted name in the file, `args` what it would have been called with, `state` what its attributes
    would have been set from, `items` what would have been put into it.
    """

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name, self.args = name, args
        self.state: Any = None
        self.items: list[Any] = []

    def __repr__(self) -> str:
        return f"<inert {self.name}>"


class PickleMachine:
    """Runs the opcodes of one pickle after another over plain values.

    `call(name, args)` is what a call of the global `name` gives; `persistent(value)` what a persistent id stands for.
    """

    def __init__(self, call: Callable[[str, tuple[Any, ...]], Any], persistent: Callable[[Any], Any]) -> None:
        self._call, self._persistent = call, persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: Any) -> Any:
        """The value of the pickle that begins at the stream's position; the stream is left behind its end.

        Raises DataError on opcodes that no weights need, and whatever a damaged pickle leads to (ValueError,
        IndexError, KeyError, TypeError ...).
        """
        self._stack, self._memo = [], {}
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, argument)
        raise DataError("the pickle has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _PUSHED:
            stack.append(argument)
        elif name in _STORE:
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in _FETCH:
            stack.append(self._memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            size = _TUPLES[name]
            parts = tuple(stack[len(stack) - size :])
            if len(parts) != size:
                raise DataError("the pickle takes from an empty stack")
            del stack[len(stack) - size :]
            stack.append(parts)
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "POP":
            stack.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP_MARK":
            self._marked()
        elif name not in ("PROTO", "FRAME"):
            self._containers(name, argument)

    def _containers(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}[name]())
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name == "LIST":
            stack.append(self._marked())
        elif name == "FROZENSET":
            stack.append(frozenset(_key(value) for value in self._marked()))
        elif name == "DICT":
            pairs = self._marked()
            stack.append({})
            _put(stack[-1], pairs)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            values = [stack.pop()] if name == "APPEND" else self._marked()
            _extend(stack[-1], values)
        elif name in ("SETITEM", "SETITEMS"):
            if name == "SETITEM":
                value = stack.pop()
                _put(stack[-2], [stack.pop(), value])
            else:
                pairs = self._marked()
                _put(stack[-1], pairs)
        else:
            self._objects(name, argument)

    def _objects(self, name: str, argument: Any) -> None:
        """What a real unpickler would import, call or hand to a library."""
        stack = self._stack
        if name == "GLOBAL":
            stack.append(Inert(_dotted(*argument.split(" ", 1))))
        elif name == "STACK_GLOBAL":
            attribute = stack.pop()
            stack.append(Inert(_dotted(stack.pop(), attribute)))
        elif name in ("REDUCE", "NEWOBJ"):
            args = stack.pop()
            stack.append(self._called(stack.pop(), args))
        elif name == "NEWOBJ_EX":
            keywords, args = stack.pop(), stack.pop()
            stack.append(self._called(stack.pop(), (*args, *keywords.values())))
        elif name == "OBJ":
            callee, *rest = self._marked()
            stack.append(self._called(callee, tuple(rest)))
        elif name == "INST":
            args = tuple(self._marked())
            stack.append(self._called(Inert(_dotted(*argument.split(" ", 1))), args))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Inert):
                stack[-1].state = state
            elif not isinstance(stack[-1], dict):  # of an OrderedDict: its attribute _metadata, which we need not
                raise DataError(f"the pickle sets attributes of a {type(stack[-1]).__name__}")
        elif name == "BINPERSID":
            stack.append(self._persistent(stack.pop()))
        else:
            raise DataError(f"the pickle holds the instruction {name}, which weights do not need")

    def _called(self, callee: Any, args: Any) -> Any:
        if not isinstance(callee, Inert) or not isinstance(args, tuple):
            raise DataError("the pickle calls something that is not a named function or class")
        return self._call(callee.name, args)

    def _marked(self) -> list[Any]:
        """Everything above the topmost mark, which goes too."""
        at = len(self._stack) - 1
        while at >= 0 and self._stack[at] is not _MARK:
            at -= 1
        if at < 0:
            raise DataError("the pickle closes what it never opened")
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values


def _dotted(module: Any, attribute: Any) -> str:
    if not isinstance(module, str) or not isinstance(attribute, str):
        raise DataError("the pickle names a class by something that is not text")
    return f"{module}.{attribute}"


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, Inert):
        target.items.extend(values)
    elif isinstance(target, list):
        target.extend(values)
    elif isinstance(target, set):
        target.update(_key(value) for value in values)
    else:
        raise DataError(f"the pickle appends to a {type(target).__name__}")


def _put(target: Any, flat: list[Any]) -> None:
    """Set items given as key, value, key, value ..."""
    if len(flat) % 2:
        raise DataError("the pickle holds a key without a value")
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    if isinstance(target, Inert):
        target.items.extend(pairs)
    elif isinstance(target, dict):
        for key, value in pairs:
            target[_key(key)] = value
    else:
        raise DataError(f"the pickle sets items of a {type(target).__name__}")


def _key(value: Any) -> Any:
    """A key that is hashed without recursion: a deeply nested tuple would overflow the stack of the interpreter."""
    parts = value if isinstance(value, tuple) else (value,)
    if all(isinstance(part, (*_SCALARS, Inert)) for part in parts):
        return value
    raise DataError("the pickle has a key that is neither text nor a number")
