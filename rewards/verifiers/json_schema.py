"""JSON, and a schema for it."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, SchemaError, ValidationError, validators  # type: ignore[import-untyped]
from referencing import Registry
from referencing.exceptions import Unresolvable

from rewards.contract import Score, ungraded
from rewards.verifiers.base import Verifier, verdict
from rewards.workers import Failure, Workers

SECONDS = 2.0
"""Limit of one validation: a schema's patterns backtrack, and its references can multiply."""
MAX_DEPTH = 64
"""JSON with a value inside more than so many others is refused: what validates it has one stack, for its schema too."""

_TOO_DEEP = f"nested deeper than {MAX_DEPTH}"
_FENCED = re.compile(r"\s*```(?:json)?[^\S\n]*\n(?P<inside>.*)\n[^\S\n]*```\s*", re.DOTALL | re.IGNORECASE)


class JSON(Verifier):
    """``1.0 if the completion is JSON that its schema allows else 0.0``.

    The completion as a whole is one JSON text (RFC 8259); whitespace may stand around it, nothing else. Refused besides
    what the grammar refuses: ``NaN`` and ``Infinity``, a key twice in an object, numbers beyond a double's range, and
    nesting deeper than :data:`MAX_DEPTH`. ``parts["readable"]`` is 0.0 for what is no such text, and ``info`` says what
    is wrong.

    The schema is read as draft 2020-12, whatever its ``$schema`` says. ``format`` is a remark there and is not checked.
    References lead within the schema; nothing is fetched. A sample whose validation takes longer than :data:`SECONDS`,
    or meets a reference that leads nowhere or in a circle, is ungraded.

    Args:
        schema: for every sample, as a mapping or JSON text. None takes each sample's reference as its schema: one that is
            no schema leaves the sample ungraded, and with None for a reference any JSON is right.
        fenced: also accept JSON in a Markdown code fence, if the fence is the whole completion.
        duplicate_keys: accept a key twice in an object; the last counts.

    Raises:
        ValueError: ``schema`` is no schema.

    Example:
        >>> point = JSON({"type": "object", "required": ["x"], "properties": {"x": {"type": "number"}}})
        >>> [point.grade(text, None).value for text in ('{"x": 1.5}', '{"x": "1.5"}', '{"x": NaN}', '{"x": 1} ok')]
        [1.0, 0.0, 0.0, 0.0]
    """

    name = "json"

    def __init__(
        self, schema: Mapping[str, Any] | str | None = None, fenced: bool = False, duplicate_keys: bool = False
    ) -> None:
        self.schema = None if schema is None else _read_schema(schema)
        self.fenced = fenced
        self.duplicate_keys = duplicate_keys
        self.workers = Workers("rewards.verifiers.json_schema:find_violation", seconds=SECONDS)

    def grade(self, completion: str, reference: Any) -> Score:
        schema = self.schema
        if schema is None and reference is not None:
            try:
                schema = _read_schema(reference)
            except ValueError as error:
                return ungraded(f"unreadable reference: {error}")
        fence = _FENCED.fullmatch(completion) if self.fenced else None
        text = fence["inside"] if fence else completion
        try:
            parse_json(text, self.duplicate_keys)
        except ValueError as error:
            return verdict(False, {"wrong": f"no JSON: {error}"}, readable=0.0)
        (violation,) = self.workers.map([[schema, text]]) if schema else [None]
        if isinstance(violation, Failure):
            return ungraded(f"validating by the schema failed: {violation.why}")
        return verdict(violation is None, {"wrong": violation} if violation else None, readable=1.0)


def parse_json(text: str, duplicate_keys: bool = False) -> Any:
    """The value of a JSON text, read as strictly as :class:`JSON` says.

    Raises:
        ValueError: it is no JSON text.

    Example:
        >>> parse_json(' {"a": [1, null]} ')
        {'a': [1, None]}
    """
    try:
        value = json.loads(
            text,
            parse_float=_finite_float,
            parse_int=_finite_int,
            parse_constant=_refuse_constant,
            object_pairs_hook=dict if duplicate_keys else _unique_keys,
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level, depth = [value], 0
    while level := [child for node in level for child in _children(node)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
    return value


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def _finite_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError("a number is beyond the range of a double")
    return value


def _finite_int(digits: str) -> int:
    _finite_float(digits)
    return int(digits)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return unique


def _read_schema(schema: Any) -> str:
    """``schema`` as JSON text."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        _validator(text)
    except (ValueError, TypeError, RecursionError, SchemaError) as error:
        why = error.message if isinstance(error, SchemaError) else error
        raise ValueError(f"wanted a JSON schema of draft 2020-12, got {reprlib.repr(schema)}: {why}") from None
    return text


def _multiple_of(validator: Any, factor: float, number: Any, schema: Any) -> Iterator[ValidationError]:
    """As written: 19.99 is a multiple of 0.01, though its nearest double is not."""
    if validator.is_type(number, "number") and Fraction(str(number)) % Fraction(str(factor)):
        yield ValidationError(f"{number!r} is not a multiple of {factor}")


def _pattern(validator: Any, pattern: str, text: Any, schema: Any) -> Iterator[ValidationError]:
    """``$`` is the end of the text, as in ECMA-262; in Python it is also before a last newline."""
    if validator.is_type(text, "string") and not re.search(re.sub(r"(?<!\\)\$$", r"\\Z", pattern), text):
        yield ValidationError(f"{text!r} does not match {pattern!r}")


_Validator = validators.extend(Draft202012Validator, {"multipleOf": _multiple_of, "pattern": _pattern})


@lru_cache(maxsize=1024)
def _validator(schema: str) -> Draft202012Validator:
    value = parse_json(schema)
    Draft202012Validator.check_schema(value)
    return _Validator(value, registry=Registry())  # a registry of its own, for the default one fetches


def find_violation(item: tuple[str, str]) -> str | None:
    """What a JSON text breaks of a schema first, for ``item = (schema, text)``, both JSON texts; None if nothing.

    Raises:
        ValueError: a reference of the schema leads nowhere or in a circle.

    Example:
        >>> find_violation(('{"items": {"type": "string"}}', '["a", 1]'))
        "$[1]: 1 is not of type 'string'"
    """
    schema, text = item
    try:
        error = next(_validator(schema).iter_errors(json.loads(text)), None)
    except (Unresolvable, RecursionError) as broken:
        raise ValueError(f"a $ref leads nowhere or in a circle ({broken})") from None
    return None if error is None else f"{error.json_path}: {error.message}"[:300]
