import json
import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.sandbox import wire

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text() | st.binary()
) | st.text(st.characters(categories=["Cs", "Lu"]))
hashable = st.recursive(scalars, lambda inner: st.lists(inner).map(tuple) | st.frozensets(inner), max_leaves=5)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(hashable, inner) | st.sets(hashable) | st.lists(inner).map(tuple),
    max_leaves=10,
)


def refuse(value):
    raise wire.Malformed("opaque")


def through(value):
    frame = wire.pack({"value": wire.encode(value, refuse)})
    data = memoryview(frame)

    def read(size):
        nonlocal data
        piece, data = data[:size], data[size:]
        return bytes(piece)

    return wire.decode(wire.unpack(read)["value"], refuse)


def exact(value):
    """Type and content, all the way down; tells 1 from True and 1.0, and nan from nothing."""
    if isinstance(value, dict):
        return "dict", [(exact(key), exact(item)) for key, item in value.items()]
    if isinstance(value, set | frozenset):
        return type(value).__name__, sorted(map(str, map(exact, value)))
    if isinstance(value, list | tuple):
        return type(value).__name__, list(map(exact, value))
    return type(value).__name__, hex(value) if isinstance(value, int) else repr(value)


@settings(max_examples=100, deadline=None)
@given(values)
def test_values_come_out_as_they_went_in(value):
    assert exact(through(value)) == exact(value)


@pytest.mark.parametrize(
    "value",
    [
        2**63,
        -(2**63) - 1,
        10**5000,
        math.nan,
        -math.inf,
        -0.0,
        complex(math.nan, 1),
        "\ud83d\ude00",
        "\ud83d\ude00"[::-1],
        "\ud800\x00",
        b"\x00\xff",
        {(): [], True: 1, "a": {2}, None: None},
        frozenset([frozenset()]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_edges_of_the_types_cross(value):
    assert exact(through(value)) == exact(value)


@pytest.mark.parametrize(
    "value", [2 ** (2**20 + 1), object(), bytearray(b"a"), range(3), type("L", (list,), {})()], ids=type
)
def test_what_is_not_a_builtin_value_is_opaque(value):
    with pytest.raises(wire.Malformed, match="opaque"):
        through(value)


def test_a_value_that_contains_itself_does_not_cross():
    loop = []
    loop.append(loop)
    with pytest.raises(wire.Malformed, match="64 deep"):
        through(loop)


@pytest.mark.parametrize(
    "forged",
    [
        {},
        {"list": [], "tuple": []},
        {"object": []},
        {"__class__": "int"},
        {"tuple": {"tuple": []}},
        {"tuple": "ab"},
        {"set": [[]]},
        {"dict": [1]},
        {"dict": [[], 1]},
        {"int": 7},
        {"int": "0xzz"},
        {"int": "f" * 2**20},
        {"str": "zz"},
        {"str": "ff"},
        {"bytes": [1]},
        {"complex": [1.0]},
        {"complex": ["1", "2"]},
        {"handle": [1]},
        {"handle": ["1", "a"]},
        {"handle": [True, "a"]},
        {"set": [n * (2**61 - 1) for n in range(100)]},
        {"dict": [n * (2**61 - 1) for n in range(200) for _ in (0, 1)]},
        json.loads("[" * 100 + "]" * 100),
    ],
)
def test_forged_values_are_refused(forged):
    with pytest.raises(wire.Malformed):
        wire.decode(forged, lambda number, name: None)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"nul", b"\xff", b"[" * 10**6, b'{"a":' + b"1" * 10**5 + b"}"])
def test_forged_frames_are_refused(body):
    data = memoryview(struct.pack(">I", len(body)) + body)

    def read(size):
        nonlocal data
        piece, data = data[:size], data[size:]
        return bytes(piece)

    with pytest.raises(wire.Malformed):
        wire.unpack(read)


def test_an_oversized_frame_is_refused_before_it_is_read():
    with pytest.raises(wire.Malformed, match="announces"):
        wire.unpack(lambda size: struct.pack(">I", 2**32 - 1))
