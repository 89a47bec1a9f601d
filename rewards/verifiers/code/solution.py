"""The program's names as the tests see them: questions go over the pipe, and values come back.

What is asked of a program must not carry what the test compares with. So its objects have no operators: ``==``, ``<``, ``-``
or ``in`` would let them answer in the test's place. To compare one with a value of ours, a value is asked of the program.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from datetime import date, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

from rewards.sandbox import Handle, Module, RemoteError, Stopped
from rewards.sandbox.wire import Malformed

_AS_DICT = ("Counter", "OrderedDict", "defaultdict")
"""Types of the standard library that tests compare with a dict."""
_NUMBERS = (int, float, complex)
_SETS = (set, frozenset)
_ALIKE: dict[type, tuple[type, ...]] = {
    **{kind: (kind,) for kind in (tuple, list, dict, str, bytes)},
    **dict.fromkeys((bool, *_NUMBERS, Decimal, Fraction), _NUMBERS),
    **dict.fromkeys(_SETS, _SETS),
}
"""For a type of ours, those types of which a subclass in the program may equal it."""


def _fraction(text: str) -> Fraction:
    over, _, under = text.partition("/")  # Fraction itself would also read 1e999999999, for ever
    return Fraction(int(over), int(under or 1))


_FROM_TEXT: dict[str, Callable[[str], Any]] = {
    "Decimal": Decimal,
    "Fraction": _fraction,
    "date": date.fromisoformat,
    "datetime": datetime.fromisoformat,
}
"""Types of the standard library that cross as their text."""
_DUNDERS = ("__name__", "__qualname__")
"""The only names with double underscores that are asked of the program: others are hooks (numpy's reads raw memory)."""
_PREDICATES = frozenset(
    name
    for kind in (str, bytes, set, int, float)
    for name in dir(kind)
    if name.startswith(("is", "startswith", "endswith"))
)
"""Methods of builtin types that say yes or no."""


class Ended(BaseException):
    """The program's process is gone. Not an ``Exception``, lest a test that expects one takes it for the right one."""


class Uncrossable(BaseException):
    """The test hands over an object that cannot cross the pipe. It is the test's own: from there only values come."""


class Solution:
    """A loaded program.

    Args:
        module: the process that runs it.

    ``asked`` says whether a test has got anything from it, ``missing`` holds wanted names that it lacks, ``stopped`` is the
    outcome when its process is gone (empty while it is not).
    """

    def __init__(self, module: Module) -> None:
        self.module = module
        self.asked = False
        self.missing: set[str] = set()
        self.stopped = ""
        self._objects: dict[int, Opaque] = {}
        module.object_of = self._object_of
        module.handle_of = self._handle_of

    def bind(self, names: set[str]) -> dict[str, Any]:
        """What stands for those of ``names`` that the program has."""
        self.missing = names - set(self.module.names)
        itself = self._imported("solution")
        bound = {name: self._with_dicts(self.module.get(itself, name)) for name in names - self.missing}
        self.asked = not all(isinstance(value, Opaque) for value in bound.values())
        return bound

    def ask(self, question: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``question``, a method of the module, brings back.

        Raises:
            Exception: what the program raised, as a builtin kind of exception.
            Ended: the process is gone.
            Uncrossable: an argument cannot cross.
        """
        self.asked = True
        try:
            return self._with_dicts(question(*args, **kwargs))
        except Stopped as stopped:
            self.stopped = stopped.outcome
            raise Ended(str(stopped)) from None
        except RemoteError as error:
            raise _exception(error) from None
        except Malformed as error:
            raise Uncrossable(str(error)) from None

    def _object_of(self, handle: Handle) -> Opaque:
        return self._objects.setdefault(handle.number, Opaque(self, handle))

    def _handle_of(self, value: Any) -> Handle:
        if type(value) is Opaque:
            handle: Handle = value._Opaque__handle
            return handle
        name = getattr(value, "__name__", "")
        if getattr(builtins, name, None) is value:  # a test may hand over int, or len
            found = self.module.get(self._imported("builtins"), name)
            if type(found) is not Opaque:
                raise RemoteError("TypeError", f"{name} is a value")
            return self._handle_of(found)
        raise Malformed(f"an object of type {type(value).__name__} cannot be handed to a program")

    def _imported(self, name: str) -> Opaque:
        module = self.module.call("__import__", name)
        if type(module) is not Opaque:  # a program can put anything in its place
            raise RemoteError("ImportError", f"{name} is no module")
        return module

    def _with_dicts(self, value: Any) -> Any:
        """``value``, which is fresh from the pipe, with dicts for counters and the like."""
        if isinstance(value, Opaque):
            if value._Opaque__handle.type_name in _AS_DICT:
                return self._with_dicts(self.module.call("dict", value))
            return value
        if isinstance(value, dict):
            return {key: self._with_dicts(item) for key, item in value.items()}
        if isinstance(value, list | tuple):  # members of sets have hashes, as keys have: dicts do not
            return type(value)(map(self._with_dicts, value))
        return value


class Opaque:
    """A function, class or other object that stays in the program. What is not defined here is not asked of it."""

    def __init__(self, solution: Solution, handle: Handle) -> None:
        vars(self).update(_Opaque__solution=solution, _Opaque__handle=handle)

    def __ask(self, builtin: Any, *args: Any) -> Any:
        return self.__solution.ask(self.__solution.module.call, builtin, self, *args)

    def __get(self, name: str) -> Any:
        return self.__solution.ask(self.__solution.module.get, self, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__solution.ask(self.__solution.module.call, self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if (name.startswith("__") and name not in _DUNDERS) or name in _PREDICATES:
            raise AttributeError(f"{name} is not asked of a program's object")
        return self.__get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__ask("setattr", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self.__get("__getitem__")(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__get("__setitem__")(key, value)

    def __len__(self) -> Any:
        return self.__ask("len")

    def __bool__(self) -> bool:
        return self.__ask("bool") is True

    def __str__(self) -> Any:
        return self.__ask("str")

    def __iter__(self) -> Any:
        return self.__ask("iter")

    def __next__(self) -> Any:
        try:
            return self.__ask("next")
        except _IterationError:
            raise StopIteration from None

    def __eq__(self, other: object) -> bool:
        """Whether it is ``other``, or is of a builtin type and has its value: the program gives that, and we compare."""
        return self is other or any(value == other for value in self.__values(type(other)))

    __hash__ = object.__hash__

    def __lt__(self, other: object) -> bool:
        raise TypeError("a program's object is not ordered")

    __le__ = __gt__ = __ge__ = __lt__

    def __values(self, other: type) -> Iterator[Any]:
        """Its value, if it could equal one of type ``other``."""
        read = _FROM_TEXT.get(self.__handle.type_name)
        if read is not None and other in (*_ALIKE, date, datetime):
            yield read(self.__ask("str"))
        for kind in _ALIKE.get(other, ()):
            if self.__ask("isinstance", kind) is True:
                value = self.__text() if kind is str else self.__ask(kind)
                if type(value) is kind:  # one too large to cross is an object again
                    yield value

    def __text(self) -> Any:
        """As a ``str``: ``str()`` of a member of an ``Enum`` of texts gives its name."""
        return self.__solution.ask(self.__solution.module.get, str, "__str__")(self)


class _IterationError(RuntimeError):
    """What ends a loop in the program. Where a test does not ask for the next item it must not end one of the test's."""


def _exception(error: RemoteError) -> Exception:
    """The nearest ``Exception`` of ours."""
    kind = getattr(builtins, error.type_name)
    if issubclass(kind, StopIteration | StopAsyncIteration):
        kind = _IterationError
    elif not issubclass(kind, Exception) or issubclass(kind, BaseExceptionGroup):  # SystemExit is not for us to obey
        kind = RuntimeError
    return kind.__new__(kind, error.text)  # without the other arguments that some kinds want
