"""One form for expressions that are written differently, in exact arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from rewards.verifiers.math.node import Node, UnreadableError
from rewards.verifiers.math.vocabulary import FUNCTIONS

Canonical = Fraction | tuple
"""An exact rational, or ``(operation, *arguments)`` with sums and products in one order; symbols are ``("symbol", name)``."""

MAX_BITS = 33_220  # 10,000 decimal digits
MAX_FACTORIAL = 3_000


def canonical(node: Node) -> Canonical:
    """``node`` with everything rational computed and the rest in one order.

    What would be too large to compute stays as it is written.

    Raises:
        UnreadableError: it is no expression but a structure, or divides by zero.

    Example:
        >>> from rewards.verifiers.math.read import read
        >>> canonical(read("2 + x + 1/2")) == canonical(read("x + \\\\frac52")), canonical(read("\\\\sqrt{9/4}"))
        (True, Fraction(3, 2))
    """
    if node.kind == "number":
        return node.value
    if node.kind == "symbol":
        return ("symbol", node.text)
    args = [canonical(argument) for argument in node.args] if node.kind in _BUILD else []
    if not args or (node.kind == "ratio" and len(args) != 2):
        raise UnreadableError(f"a {node.kind} is no expression")
    if node.kind == "quantity":
        return _quantity(args[0], node.text)
    return _BUILD[node.kind](*args)


def _quantity(value: Canonical, unit: str) -> Canonical:
    if unit == "%":
        return _product(value, Fraction(1, 100))
    if unit == "degree":
        return _product(value, Fraction(1, 180), ("symbol", "pi"))
    raise UnreadableError("a unit within an expression")


def _flat(sign: str, args: tuple[Canonical, ...]) -> list[Canonical]:
    return [part for a in args for part in (a[1:] if isinstance(a, tuple) and a[0] == sign else (a,))]


def _sum(*args: Canonical) -> Canonical:
    parts = _flat("+", args)
    constant = sum((p for p in parts if isinstance(p, Fraction)), Fraction(0))
    terms: list[Canonical] = sorted((p for p in parts if not isinstance(p, Fraction)), key=repr)
    if constant or not terms:
        terms.append(constant)
    return terms[0] if len(terms) == 1 else ("+", *terms)


def _product(*args: Canonical) -> Canonical:
    parts = _flat("*", args)
    constant = math.prod((p for p in parts if isinstance(p, Fraction)), start=Fraction(1))
    if constant == 0 and ("symbol", "oo") not in parts:
        return constant
    factors: list[Canonical] = sorted((p for p in parts if not isinstance(p, Fraction)), key=repr)
    if constant != 1 or not factors:
        factors.append(constant)
    if len(factors) == 2 and constant != 1 and isinstance(factors[0], tuple) and factors[0][0] == "+":
        return _sum(*(_product(constant, term) for term in factors[0][1:]))
    return factors[0] if len(factors) == 1 else ("*", *factors)


def _power(base: Canonical, exponent: Canonical) -> Canonical:
    if exponent == 1:
        return base
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        exact = _rational_power(base, exponent)
        if exact is not None:
            return exact
    if isinstance(base, tuple) and base[0] == "^" and isinstance(exponent, Fraction) and exponent.denominator == 1:
        return _power(base[1], _product(base[2], exponent))
    return ("^", base, exponent)


def _rational_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if base == 0 and exponent <= 0:
        raise UnreadableError("zero has no such power")
    if base in (0, 1):
        return base
    if abs(exponent) * bits > MAX_BITS:
        return None
    if exponent.denominator == 1:
        return base**exponent.numerator
    if base > 0 and exponent.denominator <= 64:
        top, bottom = (_root(part, exponent.denominator) for part in (base.numerator, base.denominator))
        if top is not None and bottom is not None:
            return Fraction(top, bottom) ** exponent.numerator
    return None


def _root(number: int, degree: int) -> int | None:
    """The exact root of a whole number, if it has one."""
    low, high = 0, 1 << (number.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= number else (low, middle - 1)
    return low if low**degree == number else None


def _root_of(base: Canonical, degree: Canonical) -> Canonical:
    exponent = _power(degree, Fraction(-1))
    if (
        isinstance(base, Fraction)
        and base < 0
        and isinstance(degree, Fraction)
        and degree.denominator == 1
        and degree % 2
    ):
        return _product(Fraction(-1), _power(-base, exponent))
    return _power(base, exponent)


def _factorial(value: Canonical) -> Canonical:
    if isinstance(value, Fraction):
        if value.denominator != 1 or value < 0:
            raise UnreadableError("a factorial of something other than a whole number")
        if value <= MAX_FACTORIAL:
            return Fraction(math.factorial(int(value)))
    return ("!", value)


def _binomial(top: Canonical, bottom: Canonical) -> Canonical:
    if (
        isinstance(top, Fraction)
        and isinstance(bottom, Fraction)
        and top.denominator == bottom.denominator == 1
        and bottom >= 0
        and 0 <= top <= MAX_FACTORIAL
    ):
        return Fraction(math.comb(int(top), int(bottom)))
    return ("binom", top, bottom)


def _absolute(value: Canonical) -> Canonical:
    return abs(value) if isinstance(value, Fraction) else ("abs", value)


def _rounded(name: str, value: Canonical) -> Canonical:
    if isinstance(value, Fraction):
        return Fraction(math.floor(value) if name == "floor" else math.ceil(value))
    return (name, value)


def _integers(name: str, *args: Canonical) -> Canonical:
    """gcd, lcm, max or min."""
    exact = [a for a in args if isinstance(a, Fraction)]
    if len(exact) == len(args):
        if name in ("max", "min"):
            return max(exact) if name == "max" else min(exact)
        if all(a.denominator == 1 for a in exact):
            return Fraction((math.gcd if name == "gcd" else math.lcm)(*map(int, exact)))
    return (name, *sorted(args, key=repr))


def _named(name: str, *args: Canonical) -> Canonical:
    return (name, *args)


_MINUS_ONE = Fraction(-1)
_EVALUATED = {"gcd", "lcm", "max", "min"}
_BUILD: dict[str, Callable[..., Canonical]] = {
    "+": _sum,
    "-": lambda a, b: _sum(a, _product(_MINUS_ONE, b)),
    "*": _product,
    "/": lambda a, b: _product(a, _power(b, _MINUS_ONE)),
    "frac": lambda a, b: _product(a, _power(b, _MINUS_ONE)),
    "ratio": lambda a, b: _product(a, _power(b, _MINUS_ONE)),
    "mixed": _sum,
    "neg": lambda a: _product(_MINUS_ONE, a),
    "^": _power,
    "sqrt": _root_of,
    "!": _factorial,
    "binom": _binomial,
    "abs": _absolute,
    "quantity": lambda a: a,
    **{name: lambda a, name=name: _rounded(name, a) for name in ("floor", "ceil")},
    **{name: lambda *a, name=name: _integers(name, *a) for name in _EVALUATED},
    **{name: lambda *a, name=name: _named(name, *a) for name in FUNCTIONS - _EVALUATED},
}
