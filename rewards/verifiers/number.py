"""How a number is read: exactly, or not at all."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_CHARS = 100
"""Longer texts are no numbers, so that no answer can be made expensive to compare."""

_NUMBER = re.compile(
    r"""(?: (?P<fraction> [+-]? [0-9]+ / [1-9][0-9]*)
          | (?P<decimal> [+-]? [$€£]? (?: (?: [1-9][0-9]{0,2} (?:,[0-9]{3})+ | [0-9]+ ) (?:\.[0-9]+)? | \.[0-9]+ )
                         (?: [eE] [+-]? [0-9]{1,4} )? )
            (?P<percent> [ ]?% )?
        ) \.?""",
    re.VERBOSE,
)


def read_number(text: str) -> Fraction | None:
    """The number that ``text`` is, or None if it is anything else or holds anything besides.

    - Digits 0 to 9 with a decimal point, a sign (the typographic minus too), an exponent of up to four digits, a
      currency sign before and one full stop after. Commas are thousands separators and must stand where those do.
    - ``50%`` is 1/2.
    - A fraction is one in lowest terms: ``3/4``. ``12/4`` is a division that nobody has done yet; reading it would pay
      for repeating the question.

    Example:
        >>> [str(read_number(text)) for text in ("-1,234.50", "$5.00", "50%", "3/4", "1e3")]
        ['-2469/2', '5', '1/2', '3/4', '1000']
        >>> [read_number(text) for text in ("1,23", "12/4", "4 apples", "1e999999", "nan")]
        [None, None, None, None, None]
    """
    text = text.strip().replace("\N{MINUS SIGN}", "-")
    match = _NUMBER.fullmatch(text) if len(text) <= MAX_CHARS else None
    if match is None:
        return None
    if fraction := match["fraction"]:
        value = Fraction(fraction)
        return value if str(value) == fraction.removeprefix("+") else None
    value = Fraction(re.sub("[$€£,]", "", match["decimal"]))
    return value / 100 if match["percent"] else value
