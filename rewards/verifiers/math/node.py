"""What an answer says, as a tree."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

MAX_CHARS = 2_000
MAX_DEPTH = 50
"""So deep brackets and braces may be nested."""
MAX_OPERATIONS = 200
"""So many operations may stand on each other; a sum of n terms has n - 1."""


class UnreadableError(ValueError):
    """A text that is not mathematics as this reader knows it."""


@dataclass(frozen=True, slots=True)
class Node:
    """A piece of mathematics, as written.

    ``kind`` is one of

    - ``number`` (``value``; ``text`` as written; ``places`` counts the digits behind a decimal point), ``symbol``
      (``text``);
    - an operation: ``+ - * / ^ neg frac mixed sqrt pm mp !``, or the name of a function;
    - a structure: ``list``, ``set``, ``tuple`` (``text`` holds its two brackets; intervals are tuples), ``union`` (``text``
      is the set operation), ``matrix`` (of ``row``), ``relation`` (``text`` holds its signs, separated by spaces), ``base``
      (``text`` are the digits, ``value`` the base), ``ratio``;
    - ``quantity`` (``text`` is the unit: ``%``, ``degree``, ``dollar``, ``cm^2`` …).
    """

    kind: str
    args: tuple[Node, ...] = ()
    text: str = ""
    value: Fraction = Fraction(0)
    places: int | None = None


def number(value: Fraction | int, places: int | None = None) -> Node:
    return Node("number", value=Fraction(value), places=places)


def names(node: Node) -> bool:
    """Whether a name stands in ``node``: a symbol that is no constant."""
    return (node.kind == "symbol" and node.text not in ("pi", "e", "i", "oo")) or any(map(names, node.args))
