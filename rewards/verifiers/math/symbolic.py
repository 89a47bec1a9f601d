"""Whether two expressions are equal, by what they are at random points; the one part that needs the extra ``math``."""

from __future__ import annotations

import importlib.util
import logging
import random
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rewards.verifiers.math.canonical import Canonical
from rewards.verifiers.math.node import UnreadableError

POINTS = 8
"""So many points must agree."""
DRAWS = 48
"""At most so many are drawn: some functions are undefined at many."""
DIGITS = 50
CONFIRMED_DIGITS = 400
"""Expressions that agree at all points are compared once more, with so many digits: tanh 90 is not 1."""
MAX_EXPONENT = 40_000
"""Powers beyond 2 ** 40,000 are not evaluated."""

_COSTLY = re.compile(r"[0-9]{20}|\^[^\^]{0,20}\^|!")
"""Long numbers, towers and factorials are not given to math-verify."""


class MissingExtraError(RuntimeError):
    """The comparison needs the extra ``math``."""


class _UndefinedError(ArithmeticError):
    """An expression has no value at a point."""


def equal(one: Canonical, other: Canonical) -> bool:
    """Whether the two have the same values at all of eight random rational points, to 50 digits and at one to 400.

    The points are the same in every run. A point at which one of the two is no real number is passed over, unless one of
    them names the imaginary unit. No common point: not equal.

    Raises:
        MissingExtraError: the extra is not installed.
    """
    seen = 0
    for digits, points in ((DIGITS, POINTS), (CONFIRMED_DIGITS, 1)):
        for (x, y), small in _values(one, other, digits, points):
            if abs(x - y) > small:
                return False
            seen += 1
    return seen > 0


def ratio(one: Canonical, other: Canonical) -> int:
    """The sign of ``one / other`` where that is the same number other than zero at all points, else 0.

    Raises:
        MissingExtraError: the extra is not installed.
    """
    factors = []
    for (x, y), small in _values(one, other):
        if abs(x) <= small or abs(y) <= small:
            return 0
        factors.append(x / y)
    first = factors[0] if factors else 0
    if not first or any(abs(f - first) > abs(first) * 1e-30 for f in factors) or first.imag:
        return 0
    return 1 if first.real > 0 else -1


def near(one: Canonical, other: Fraction, tolerance: Fraction) -> bool:
    """Whether the constant ``one`` is within ``tolerance`` of ``other``."""
    return any(abs(x - y) * tolerance.denominator <= tolerance.numerator for (x, y), _ in _values(one, other))


def second_opinion(reference: str, answer: str) -> bool:
    """Whether math-verify, which knows sums and integrals, takes the two for equal in both directions.

    Raises:
        MissingExtraError: the extra is not installed.
    """
    _require_extra()
    if max(len(reference), len(answer)) > 500:
        return False
    if any(_COSTLY.search(text) for text in (reference, answer)):
        return False
    from math_verify import LatexExtractionConfig, parse, verify  # type: ignore[import-untyped]

    # It warns that its time limit is off; here the worker has one.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    one, other = (
        parse(f"$\\boxed{{{text.replace('$', ' ')}}}$", [LatexExtractionConfig()], parsing_timeout=None)
        for text in (reference, answer)
    )
    return all(verify(a, b, timeout_seconds=None) for a, b in ((one, other), (other, one))) if one and other else False


def _require_extra() -> None:
    if not _installed():
        raise MissingExtraError("comparing these expressions needs the extra: pip install 'textenv[math]'")


@lru_cache
def _installed() -> bool:
    """Whether the extra is there; math-verify itself takes a second to import and is rarely needed."""
    try:
        return all(importlib.util.find_spec(name) is not None for name in ("math_verify", "mpmath"))
    except ImportError:
        return False


def _values(
    one: Canonical, other: Canonical, digits: int = DIGITS, points: int = POINTS
) -> Iterator[tuple[tuple[Any, Any], Any]]:
    """Both values at points where both have one, and the difference that rounding can make."""
    _require_extra()
    import mpmath  # type: ignore[import-untyped]

    names = sorted(symbols(one) | symbols(other))
    free = [name for name in names if name not in ("pi", "e", "i", "oo")]
    draw = random.Random(0)
    found = 0
    with mpmath.workdps(digits + _digits(one) + _digits(other)):
        for _ in range(DRAWS if free else 1):
            point = {name: _rational(draw) for name in free}
            evaluator = _Evaluator(mpmath, point, "i" in names)
            try:
                pair = evaluator(one), evaluator(other)
            except (_UndefinedError, ArithmeticError, ValueError):
                continue
            yield pair, evaluator.scale * mpmath.mpf(10) ** (10 - mpmath.mp.dps)
            found += 1
            if found == points:
                return


def _rational(draw: random.Random) -> Fraction:
    """A random point; three in four are positive, so that roots and logarithms have enough."""
    return draw.choice((1, 1, 1, -1)) * Fraction(draw.randint(1, 4000), draw.randint(1000, 2000))


def symbols(form: Canonical) -> set[str]:
    """The names in ``form``, constants included."""
    if isinstance(form, Fraction):
        return set()
    if form[0] == "symbol":
        return {form[1]}
    return set().union(*map(symbols, form[1:]))


def _digits(form: Canonical) -> int:
    """How many digits the numbers in ``form`` have, so that none of them is lost to rounding."""
    if isinstance(form, Fraction):
        return (form.numerator.bit_length() + form.denominator.bit_length()) // 3
    return 0 if form[0] == "symbol" else sum(map(_digits, form[1:]))


class _Evaluator:
    """The value of a canonical form at one point, real unless the imaginary unit is in it."""

    def __init__(self, mp: Any, point: dict[str, Fraction], imaginary: bool) -> None:
        self.mp = mp
        self.imaginary = imaginary
        self.scale = mp.mpf(1) / 10**9
        """The largest number on the way: what rounding errors are relative to."""
        self.symbols = {name: self.number(value) for name, value in point.items()}
        self.symbols |= {"pi": mp.pi + 0, "e": mp.e + 0, "i": mp.mpc(0, 1)}

    def number(self, value: Fraction) -> Any:
        return self.mp.mpf(value.numerator) / value.denominator

    def __call__(self, form: Canonical) -> Any:
        value = self.number(form) if isinstance(form, Fraction) else self.apply(form)
        if not self.mp.isfinite(value) or (not self.imaginary and isinstance(value, self.mp.mpc)):
            raise _UndefinedError
        self.scale = max(self.scale, abs(value))
        return value

    def apply(self, form: tuple) -> Any:
        name = form[0]
        if name == "symbol":
            if form[1] not in self.symbols:
                raise _UndefinedError  # infinity
            return self.symbols[form[1]]
        args = [self(argument) for argument in form[1:]]
        if name == "+":
            return sum(args)
        if name == "*":
            return self.mp.fprod(args)
        if name == "^":
            return self.power(args[0], args[1], form[2])
        return self.function(name, args)

    def power(self, base: Any, exponent: Any, exact: Canonical) -> Any:
        if base == 0:
            if self.mp.re(exponent) <= 0:
                raise _UndefinedError
            return base
        if abs(exponent) * (abs(self.mp.log(abs(base), 2)) + 1) > MAX_EXPONENT:
            raise _UndefinedError
        negative = not isinstance(base, self.mp.mpc) and base < 0
        if negative and not self.imaginary and isinstance(exact, Fraction) and exact.denominator % 2:
            sign = -1 if exact.numerator % 2 else 1  # the real root of odd degree
            return sign * self.mp.power(-base, exponent)
        return self.mp.power(base, exponent)

    def function(self, name: str, args: list[Any]) -> Any:
        mp, x = self.mp, args[0]
        if name in ("exp", "sinh", "cosh", "tanh", "coth", "sech", "csch", "!", "binom") and any(
            abs(a) > 10_000 for a in args
        ):
            raise _UndefinedError
        if name == "log" and len(args) == 2:
            return mp.log(x) / mp.log(args[1])
        functions: dict[str, Callable[..., Any]] = {
            "arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan, "arccot": mp.acot, "arcsec": mp.asec, "arccsc": mp.acsc,
            "arcsinh": mp.asinh, "arccosh": mp.acosh, "arctanh": mp.atanh, "log": mp.log, "ln": mp.log, "lg": mp.log10,
            "abs": abs, "!": mp.factorial, "binom": mp.binomial, "Re": mp.re, "Im": mp.im, "arg": mp.arg, "ceil": mp.ceil,
            "max": max, "min": min, "deg": mp.mpf, "floor": mp.floor,
        }  # fmt: skip
        if name in ("gcd", "lcm"):
            raise UnreadableError(f"{name} of expressions")
        return functions[name](*args) if name in functions else getattr(mp, name)(*args)
