"""Inside a sandbox: read a program, run it, answer calls. Runs beside hostile code: nothing it says is to be trusted."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import io
import os
import sys
import threading
import traceback
import types
from typing import Any

if __package__:
    from rewards.sandbox.wire import EXCEPTIONS, Malformed, decode, encode, pack, unpack
else:  # inside there is no package
    from wire import EXCEPTIONS, Malformed, decode, encode, pack, unpack  # type: ignore[import-not-found,no-redef]

TEXT = 2_000
"""Longest text of an exception, in characters."""


class Solution:
    """A program that was loaded, and what it made that cannot cross the pipe."""

    def __init__(self, channel: int) -> None:
        self.channel = channel
        self.names: dict[str, Any] = {}
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}  # of the objects, by id

    def serve(self) -> None:
        """Answer one question after the other, until the process is ended."""
        while True:
            question = _receive(self.channel)
            number = question.pop("number")
            try:
                answer = getattr(self, question.pop("do"))(**question)
            except BaseException as error:  # noqa: BLE001 - whatever the program raised, SystemExit too, is an answer
                answer = {"raised": _described(error)}
            send(self.channel, {**answer, "number": number})

    def load(self, source: str) -> Any:
        module = sys.modules["solution"] = types.ModuleType("solution")
        self.names = vars(module)
        exec(_compiled(source, "<solution>"), self.names)
        return {"names": {name: _kind(value) for name, value in self.names.items() if name[:2] != "__"}}

    def call(self, target: str | int, args: Any) -> Any:
        """Of a top-level name, else of a builtin, or of an object that the other side holds."""
        if isinstance(target, int):
            function = self.objects[target]
        else:
            function = self.names[target] if target in self.names else getattr(builtins, target)
        positional, named = decode(args, self._inside)
        answer = self._answer(function(*positional, **named))
        after = encode((positional, named), self._outside, self.numbers)
        return answer if after == args else {**answer, "args": after}  # changed in place

    def get(self, target: int, name: str) -> Any:
        return self._answer(getattr(self.objects[target], name))

    def _answer(self, value: Any) -> dict[str, Any]:
        try:
            answer = {"value": encode(value, self._outside, self.numbers)}
            pack(answer)
        except Malformed:  # nested too deeply or too long: it stays here
            answer = {"value": self._outside(value)}
        return answer

    def _inside(self, number: int, name: str) -> Any:
        return self.objects[number]

    def _outside(self, value: Any) -> Any:
        number = self.numbers.setdefault(id(value), len(self.objects))
        if number == len(self.objects):
            self.objects.append(value)  # keeps it, and so its id
        return {"handle": [number, type(value).__name__]}


def script(channel: int) -> None:
    """Run the program that comes as ``__main__``, and leave with its exit status."""
    source = _receive(channel)["source"]
    stdin, stdout, stderr = (io.FileIO(fd, mode, closefd=False) for fd, mode in enumerate(("r", "w", "w")))
    sys.stdin = io.TextIOWrapper(io.BufferedReader(stdin), "utf-8", "surrogatepass")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(stdout), "utf-8", "strict")
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(stderr), "utf-8", "backslashreplace", line_buffering=True)
    vars(sys).update(__stdin__=sys.stdin, __stdout__=sys.stdout, __stderr__=sys.stderr)
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    status = 0
    try:
        exec(_compiled(source, "main.py"), vars(module))
    except SystemExit as error:
        status = _status(error.code)
    except BaseException as error:  # noqa: BLE001 - as the interpreter does with any exception
        traceback.print_exception(type(error), error, error.__traceback__ and error.__traceback__.tb_next)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter does at its end, without tearing down
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the program can put anything there
            stream.flush()
    os._exit(status)


def _compiled(source: str, name: str) -> types.CodeType:
    return compile(source, name, "exec", dont_inherit=True, optimize=0)


def _kind(value: Any) -> str:
    if isinstance(value, type):
        return "class"
    return "function" if callable(value) else "value"


def _described(error: BaseException) -> list[str]:
    """The nearest builtin type, and the text."""
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in EXCEPTIONS)
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001 - a program's own __str__
        text = "an exception without a text"
    return [name, text[:TEXT].encode("utf-8", "backslashreplace").decode()]


def _status(code: Any) -> int:
    if code is None or type(code) is int:
        return (code or 0) & 255
    print(code, file=sys.stderr)
    return 1


def _receive(channel: int) -> dict[str, Any]:
    message: dict[str, Any] = unpack(lambda size: _read(channel, size))
    return message


def _read(channel: int, size: int) -> bytes:
    pieces = bytearray()
    while len(pieces) < size:
        piece = os.read(channel, size - len(pieces))
        if not piece:
            os._exit(0)  # the other side is done
        pieces += piece
    return bytes(pieces)


def send(channel: int, message: dict[str, Any]) -> None:
    rest = memoryview(pack(message))
    while rest:
        rest = rest[os.write(channel, rest) :]
