"""TOML files that people write: what is wrong in one is told with its line and the nearest name that would be right."""

from __future__ import annotations

import difflib
import tomllib
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

Keys = tuple[str, ...]
"""What leads to a value: ``("agents", "grpo", "settings", "group_size")``."""
T = TypeVar("T")


class TomlFile:
    """A TOML file, its values checked as they are asked for.

    Raises:
        ValueError: it is not valid TOML.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.text = path, path.read_text(encoding="utf-8")
        try:
            self.tables = tomllib.loads(self.text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from None

    def __contains__(self, keys: Keys) -> bool:
        try:
            _follow(self.tables, keys)
        except KeyError:
            return False
        return True

    def read(self, keys: Keys, hint: Any) -> Any:
        """The value there.

        Raises:
            ValueError: there is none, or it is of another type than ``hint``.
        """
        if keys not in self:
            self.fail(keys, f"{'.'.join(keys)} is missing")
        value = _follow(self.tables, keys)
        if not _fits(value, hint):
            self.fail(keys, f"{keys[-1]} is {_describe(hint)}, got {value!r}")
        return value

    def names(self, keys: Keys) -> list[str]:
        """The keys of the table there; none where there is no table."""
        return list(self.read(keys, dict)) if keys in self else []

    def record(self, keys: Keys, kind: Callable[..., T], /, **defaults: Any) -> T:
        """The table there as an instance of the dataclass ``kind``, each value of the type that its field has.

        Raises:
            ValueError: an unknown or a missing name, a value of a wrong type, or one that ``kind`` refuses.
        """
        hints = get_type_hints(kind, include_extras=True)
        given = {}
        for name in self.names(keys):
            self.check_name((*keys, name), f"key {name!r}", name, hints)
            given[name] = self.read((*keys, name), hints[name])
        for one in fields(kind):  # type: ignore[arg-type]
            if one.name not in {**defaults, **given} and one.default is one.default_factory is MISSING:
                self.fail(keys, f"{'.'.join((*keys, one.name))} is missing")
        return self.checked(keys, kind, **{**defaults, **given})

    def check_names(self, keys: Keys, known: Collection[str]) -> None:
        """Refuse keys in the table there that are not known.

        Raises:
            ValueError: there is one.
        """
        for name in _follow(self.tables, keys):
            self.check_name((*keys, name), f"key {name!r}", name, known)

    def check_name(self, keys: Keys, what: str, name: str, known: Collection[str]) -> None:
        """Refuse a name that is not known; ``what`` says what it should name.

        Raises:
            ValueError: it is not known.
        """
        if name not in known:
            self.fail(keys, f"no {what}; {nearest(name, known)}")

    def checked(self, keys: Keys, function: Callable[..., T], /, *arguments: Any, **named: Any) -> T:
        """What ``function`` returns. If it refuses what stands there, the error gets the line.

        Raises:
            ValueError: the function has raised one.
        """
        try:
            return function(*arguments, **named)
        except ValueError as error:
            self.fail(keys, str(error))

    def fail(self, keys: Keys, message: str) -> NoReturn:
        """Refuse what stands there; the line is that of the innermost table where nothing does.

        Raises:
            ValueError: always.
        """
        while keys and keys not in self:
            keys = keys[:-1]
        raise ValueError(f"{self.path}{f', line {self._line(keys)}' if keys else ''}: {message}")

    def _line(self, keys: Keys) -> int:
        """Where a value stands: the shortest beginning of the file that has it ends there."""
        lines = self.text.splitlines()
        for number in range(1, len(lines)):
            try:
                _follow(tomllib.loads("\n".join(lines[:number])), keys)
            except (tomllib.TOMLDecodeError, KeyError):
                continue
            return number
        return len(lines)


def nearest(name: str, known: Iterable[str]) -> str:
    """What to write instead.

    Example:
        >>> nearest("gpro", ["grpo", "ppo"])
        'did you mean grpo? there are grpo, ppo'
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}there {'is' if len(names) == 1 else 'are'} {', '.join(names) or 'none'}"


def _follow(tables: Mapping[str, Any], keys: Keys) -> Any:
    inside: Any = tables
    for key in keys:
        if not isinstance(inside, Mapping):
            raise KeyError(key)
        inside = inside[key]
    return inside


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a TOML file is of a type; a whole number may stand for any number."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Annotated:
        return _fits(value, inner[0])
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is list or origin is tuple:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if origin is not None:
        return isinstance(value, dict) and all(_fits(one, inner[1]) for one in value.values())
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _describe(hint: Any) -> str:
    """A type for people."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _describe(inner[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(one) for one in inner if one is not type(None))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is list or origin is tuple:
        return f"a list, and each of it {_describe(inner[0])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return names.get(hint, "a table")
