"""What crosses the pipe between us and a program in a sandbox: JSON frames that hold values of exact builtin types.

JSON carries None, bool, float, str, list and small int as they are. Everything else is an object with one key that names
its type, from a closed table. Both sides import this file, the inner one without the package, so it needs only the
standard library. Whatever comes from inside may be forged: :func:`decode` builds nothing but builtin values.
"""

from __future__ import annotations

import builtins
import json
import struct
from collections.abc import Callable, Collection
from typing import Any

FRAME_BYTES = 8 * 2**20
"""Longest frame."""
DEPTH = 64
"""Containers within containers."""
INT_BITS = 2**20
"""Longest integer."""
EQUAL_HASHES = 64
"""Members of a set, or keys of a dict, that may share a hash: many of them would make ours slow."""
EXCEPTIONS = frozenset(
    name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)
)


class Malformed(ValueError):  # noqa: N818 - says what happened
    """A value that cannot cross, or a frame that is not what it must be."""


def pack(message: Any) -> bytes:
    """``message``, of JSON types, as a frame.

    Raises:
        Malformed: it is too long.
    """
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > FRAME_BYTES:
        raise Malformed(f"a message may have {FRAME_BYTES} bytes, this one has {len(body)}")
    return struct.pack(">I", len(body)) + body


def unpack(read: Callable[[int], bytes]) -> dict[str, Any]:
    """The message of the next frame; ``read(n)`` gives n bytes.

    Raises:
        Malformed: it is too long, or not a JSON object.
    """
    (length,) = struct.unpack(">I", read(4))
    if length > FRAME_BYTES:
        raise Malformed(f"a message may have {FRAME_BYTES} bytes, this one announces {length}")
    body = read(length)
    try:
        message = json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise Malformed(f"a message that is not JSON: {type(error).__name__}") from None
    if type(message) is not dict:
        raise Malformed(f"a message must be an object, got {type(message).__name__}")
    return message


def encode(value: Any, other: Callable[[Any], Any], held: Collection[int] = (), depth: int = DEPTH) -> Any:
    """``value`` as JSON types. ``other`` says what stands for an object of no builtin type, or with an id in ``held``.

    Raises:
        Malformed: containers nested too deeply.
    """
    kind = type(value)
    if held and id(value) in held:
        return other(value)
    if value is None or kind is bool or kind is float:
        return value
    if kind is int:
        if -(2**63) <= value < 2**63:
            return value
        return {"int": hex(value)} if value.bit_length() <= INT_BITS else other(value)
    if kind is str:
        return {"str": value.encode("utf-8", "surrogatepass").hex()} if _has_surrogates(value) else value
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind not in (list, tuple, dict, set, frozenset):
        return other(value)
    if depth == 0:
        raise Malformed(f"containers may be nested {DEPTH} deep")
    items = [item for pair in value.items() for item in pair] if kind is dict else value
    body = [encode(item, other, held, depth - 1) for item in items]
    return body if kind is list else {kind.__name__: body}


def decode(data: Any, handle: Callable[[int, str], Any], depth: int = DEPTH) -> Any:
    """The value that :func:`encode` wrote, or whatever a liar wrote in its style.

    ``handle(number, type name)`` gives what stands for an object of no builtin type.

    Raises:
        Malformed: not a value.
    """
    try:
        return _decode(data, handle, depth)
    except Malformed:
        raise
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise Malformed(f"a message with a malformed value: {type(error).__name__}") from None


def _decode(data: Any, handle: Callable[[int, str], Any], depth: int) -> Any:
    if depth < 0:
        raise Malformed(f"containers may be nested {DEPTH} deep")
    if type(data) is list:
        return [_decode(item, handle, depth - 1) for item in data]
    if type(data) is not dict:
        return data
    ((tag, body),) = data.items()
    if tag in ("tuple", "set", "frozenset", "dict"):
        return _CONTAINERS[tag]([_decode(item, handle, depth - 1) for item in _exactly(list, body)])
    if tag == "handle":
        number, name = body
        return handle(_exactly(int, number), _exactly(str, name)[:100])
    if tag == "complex":
        real, imaginary = body
        return complex(_exactly(float, real), _exactly(float, imaginary))
    return _SCALARS[tag](_exactly(str, body))


def _exactly(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise Malformed(f"a message with a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _integer(text: str) -> int:
    if len(text) > INT_BITS // 4 + 3:
        raise Malformed(f"an integer may have {INT_BITS} bits")
    return int(text, 16)


def _hashed(items: list[Any]) -> list[Any]:
    """``items``, if a hash table of them is not slow on purpose."""
    hashes = sorted(map(hash, items))
    if any(first == last for first, last in zip(hashes, hashes[EQUAL_HASHES:], strict=False)):
        raise Malformed("a set or dict with hashes that collide")
    return items


def _dict(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(_hashed(items[::2]), items[1::2], strict=True))


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


_CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "set": lambda items: set(_hashed(items)),
    "frozenset": lambda items: frozenset(_hashed(items)),
    "dict": _dict,
}
_SCALARS: dict[str, Callable[[str], Any]] = {
    "int": _integer,
    "str": lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass"),
    "bytes": bytes.fromhex,
}
