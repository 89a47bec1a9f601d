"""The program's names as the tests see them: questions go over the pipe, and values come back.

What is asked of a program must not carry what the test compares with. So its objects have no operators: ``==``, ``<``, ``-``
or ``in`` would let them answer in the test's place.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

from rewards.sandbox import Handle, Module, RemoteError, Stopped
from rewards.sandbox.wire import Malformed

_SCALARS = (type(None), bool, int, float, complex, str, bytes, Handle)
_AS_DICT = ("Counter", "OrderedDict", "defaultdict")
"""Types of the standard library that tests compare with a dict."""


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

    def bind(self, names: set[str]) -> dict[str, Any]:
        """What stands for those of ``names`` that the program has."""
        self.missing = names - set(self.module.names)
        itself = self.module.call("__import__", "solution")
        bound = {name: self._wrap(self.module.get(itself, name)) for name in names - self.missing}
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
            return self._wrap(question(*self._unwrap(args), **self._unwrap(kwargs)))
        except Stopped as stopped:
            self.stopped = stopped.outcome
            raise Ended(str(stopped)) from None
        except RemoteError as error:
            raise _exception(error) from None
        except Malformed as error:
            raise Uncrossable(str(error)) from None

    def _wrap(self, value: Any) -> Any:
        """``value``, which is fresh from the pipe, with an :class:`Opaque` for each handle."""
        if isinstance(value, Handle):
            if value.type_name in _AS_DICT:
                return self._wrap(self.module.call("dict", value))
            return self._objects.setdefault(value.number, Opaque(self, value))
        if isinstance(value, dict):
            return {self._wrap(key): self._wrap(item) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return type(value)(map(self._wrap, value))
        return value

    def _unwrap(self, value: Any) -> Any:
        """``value`` with handles for what stays in the program; itself if nothing does, to be changed in place."""
        kind = type(value)
        if kind is Opaque:
            return value._Opaque__handle
        if kind in _SCALARS:
            return value
        if kind in (dict, list, tuple, set, frozenset):
            old = [item for pair in value.items() for item in pair] if kind is dict else list(value)
            new = [self._unwrap(item) for item in old]
            if all(a is b for a, b in zip(old, new, strict=True)):
                return value
            return dict(zip(new[::2], new[1::2], strict=True)) if kind is dict else kind(new)
        name = getattr(value, "__name__", "")
        if getattr(builtins, name, None) is value:  # a test may hand over int, or len
            return self.module.get(self.module.call("__import__", "builtins"), name)
        raise Uncrossable(f"an object of type {kind.__name__} cannot be handed to a program")


class Opaque:
    """A function, class or other object that stays in the program. What is not defined here is not asked of it."""

    def __init__(self, solution: Solution, handle: Handle) -> None:
        vars(self).update(_Opaque__solution=solution, _Opaque__handle=handle)

    def __ask(self, builtin: str, *args: Any) -> Any:
        return self.__solution.ask(self.__solution.module.call, builtin, self, *args)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__solution.ask(self.__solution.module.call, self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return self.__solution.ask(self.__solution.module.get, self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__ask("setattr", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self.__getattr__("__getitem__")(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__getattr__("__setitem__")(key, value)

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
