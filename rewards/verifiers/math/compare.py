r"""Whether an answer says what the reference says: element by element, exactly where that is possible.

The rules, all of them here:

- **Names.** ``x = 5``, ``f(x) = 5`` and ``x \in \{5\}`` are answers to ``5``, and the other way round; ``x = 3 = 5`` is
  none. An equation or inequality that is not solved for a name is one up to a constant factor; a solved one must be
  solved in the answer too.
- **Units.** An answer may have a unit where the reference has none, and lack the sign of degrees or of a currency; two
  units must be the same. A base is no unit: ``204_5`` is not 204.
- **Forms.** The same answer in several forms is one: ``\frac12, 0.5``.
- **Order.** Lists and sets are in any order, ``\pm`` is a list of two, ``\{1, 2\}`` is ``1, 2``; tuples, intervals and
  matrices keep their order and intervals their brackets. Inequalities in one name (or its absolute value) and intervals
  are the same. Values of different names (``x = 1, y = 2``) are also the tuple of these values. A tuple with one ``\pm``
  is a list of two tuples.
- **Ratios.** ``2:4`` is ``1:2``, and also the fraction, unless that is a whole number.
- **Words.** "No solution" is the empty set, "all real numbers" is the line; ``(B) 12`` is 12 where the reference is no
  letter, and ``k \in \mathbb{Z}`` behind an expression in k says nothing more.
- **Rounding.** An exact number without a finite decimal may stand for a decimal reference, if that is the number rounded
  to the digits shown, at least four. Two exact numbers, two decimals, or a decimal and a number that can be written out
  must be equal.

And the conventions, which hold only when they are asked for:

- ``"unit"``: an answer may lack the reference's unit.
- ``"percent"``: ``28\%`` is 0.28, and is 28 where the other side has no percent sign and the reference is at least 1.
- ``"rounding"``: a decimal may stand for an exact reference too, under the same conditions.
- ``"decimal comma"``: ``2,74`` is 2.74 where the other side is a decimal.
"""

from __future__ import annotations

from collections.abc import Collection
from fractions import Fraction
from itertools import pairwise

from rewards.verifiers.math import symbolic
from rewards.verifiers.math.canonical import Canonical, canonical
from rewards.verifiers.math.node import Node, UnreadableError, names, number
from rewards.verifiers.math.vocabulary import CURRENCIES, UNITS

MIN_DIGITS = 4
"""A decimal of fewer digits is not taken for a rounded number."""
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
_INFINITY = Node("symbol", text="oo")
_MINUS_INFINITY = Node("neg", (_INFINITY,))
_REALS = Node("symbol", text="mathbb R")
_FUNCTION_NAMES = ("f", "g", "h", "F", "G", "P", "p", "q", "a")
_UNORDERED = ("list", "set")
SIGNS = {"degree", *CURRENCIES.values()}
"""Units that are signs, and often left out."""


class Comparison:
    """Compares one answer with its reference; :attr:`stage` then says how far that had to go."""

    def __init__(self, conventions: Collection[str] = ()) -> None:
        self.conventions = conventions
        self.used: set[str] = set()
        """The conventions without which it would not have been the same."""
        self.stage = "exact"

    def same(self, reference: Node, answer: Node) -> bool:
        """Whether the two say the same.

        Raises:
            symbolic.MissingExtraError: it takes the symbolic stage, and the extra is not installed.
        """
        reference, answer = _multiplied(reference), _multiplied(answer)
        if "relation" in (reference.kind, answer.kind):
            return self._relations(reference, answer)
        if reference.kind == "quantity":
            answer = _with_unit(answer) or answer
        kinds = {reference.kind, answer.kind}
        if "quantity" in kinds and not kinds & {*_UNORDERED, "tuple", "matrix"}:
            return self._quantities(reference, answer)
        if _has_sign(reference) or _has_sign(answer) or reference.kind in _UNORDERED or answer.kind in _UNORDERED:
            return self._unordered(reference, answer)
        if (_REALS in (reference, answer) or "setminus" in (reference.text, answer.text)) and reference != answer:
            sets = _as_set(reference) or reference, _as_set(answer) or answer
            if sets != (reference, answer):
                return self.same(*sets)
        structures = {"tuple", "union", "matrix", "row", "base", "ratio"}
        if reference.kind in structures or answer.kind in structures:
            return self._structures(reference, answer)
        return self._scalars(reference, answer)

    def _by(self, convention: str, same: bool) -> bool:
        """Whether it is the same by a convention, which must have been asked for."""
        same = same and convention in self.conventions
        if same:
            self.used.add(convention)
        return same

    # --- structures ---

    def _structures(self, reference: Node, answer: Node) -> bool:
        if reference.kind != answer.kind:
            return "ratio" in (reference.kind, answer.kind) and self._ratio_as_fraction(reference, answer)
        self._at_least("structure")
        if reference.kind == "base":
            return (reference.text, reference.value) == (answer.text, answer.value)
        if reference.kind == "union":
            compare = self._in_order if reference.text == "setminus" else self._matched
            return reference.text == answer.text and compare(reference.args, answer.args)
        if (
            reference.kind == "ratio"
            and len(reference.args) == len(answer.args)
            and not any(a.value == 0 and a.kind == "number" for a in reference.args + answer.args)
        ):
            first = reference.args[0], answer.args[0]
            return all(
                self._scalars(Node("*", (r, first[1])), Node("*", (a, first[0])))
                for r, a in zip(reference.args, answer.args, strict=True)
            )
        return reference.text == answer.text and self._in_order(reference.args, answer.args)

    def _ratio_as_fraction(self, reference: Node, answer: Node) -> bool:
        value = _rational(answer if reference.kind == "ratio" else reference)
        return value is not None and value.denominator > 1 and self._scalars(reference, answer)

    def _in_order(self, reference: tuple[Node, ...], answer: tuple[Node, ...]) -> bool:
        return len(reference) == len(answer) and all(map(self.same, reference, answer))

    def _unordered(self, reference: Node, answer: Node) -> bool:
        for listed, decimal in ((answer, reference), (reference, answer)):
            if decimal.kind == "number" and decimal.places and (value := _decimal_comma(listed)):
                return self._by("decimal comma", value.value == decimal.value)
        if (
            answer.kind == "list"
            and reference.kind not in (*_UNORDERED, "union", "tuple", "pm", "mp")
            and not _has_sign(reference)
        ):
            return all(self.same(reference, item) for item in answer.args)  # one answer in several forms
        values = _assigned(reference), _assigned(answer)
        if (values[0] is None) != (values[1] is None):  # only one has the names: what is given to them, in order
            bare = reference if values[0] is None else answer
            if not any(item.kind == "relation" for item in bare.args):
                pair = (values[0] or reference.args, values[1] or answer.args)
                return (bare.kind == "list" or bare.text == "()") and not _has_sign(bare) and self._in_order(*pair)
        union = _as_set(reference), _as_set(answer)
        signed = any(map(_signed_tuple, (reference, answer)))
        if "union" in (reference.kind, answer.kind) or ("tuple" in (reference.kind, answer.kind) and not signed):
            return None not in union and union != (reference, answer) and self.same(*union)  # type: ignore[arg-type]
        self._at_least("structure")
        return self._matched(_items(reference), _items(answer))

    def _matched(self, reference: tuple[Node, ...], answer: tuple[Node, ...]) -> bool:
        """Whether each of one has its own equal among the other."""
        left = list(answer)
        for wanted in reference:
            nested = wanted.kind == "set"
            match = next((n for n, i in enumerate(left) if (i.kind == "set") == nested and self.same(wanted, i)), None)
            if match is None:
                return False
            del left[match]
        return not left

    # --- relations ---

    def _relations(self, reference: Node, answer: Node) -> bool:
        if answer.kind != "relation":
            named = _named_value(reference)
            if named is not None:
                return self.same(named, answer)
            interval = _as_set(reference)
            return interval is not None and answer.kind in ("tuple", "union") and self.same(interval, answer)
        if reference.kind != "relation":
            if (value := _final_value(answer)) is not None:
                return self.same(reference, value)
            interval = _as_set(answer)
            return interval is not None and reference.kind in ("tuple", "union") and self.same(reference, interval)
        self._at_least("structure")
        if "in" in (reference.text, answer.text):
            sets = _as_set(reference) or _named_value(reference), _as_set(answer) or _named_value(answer)
            return sets[0] is not None and sets[1] is not None and self.same(sets[0], sets[1])
        return self._named(reference, answer) or self._equivalent(reference, answer)

    def _named(self, reference: Node, answer: Node) -> bool:
        """Whether both give a value to a name, and the same."""
        values = _named_value(reference), _final_value(answer)
        if values[0] is None or values[1] is None:
            return False
        names = reference.args[0], answer.args[0]
        plain = [name.kind == "symbol" for name in names]
        return (names[0] == names[1] or plain[0] != plain[1]) and self.same(values[0], values[1])

    def _equivalent(self, reference: Node, answer: Node) -> bool:
        """Whether two equations or inequalities are one, up to a factor; a solved one only up to its sign."""
        wanted, given = reference.text.split(), answer.text.split()
        if len(wanted) != len(given):
            return False
        if len(wanted) > 1:
            return any(
                signs == wanted and self._in_order(reference.args, sides)
                for signs, sides in (
                    (given, answer.args),
                    ([_FLIPPED.get(s, s) for s in given[::-1]], answer.args[::-1]),
                )
            )
        if wanted[0] not in _FLIPPED or given[0] not in _FLIPPED:
            return wanted == given and self._in_order(reference.args, answer.args)
        if _solved(reference) and not _solved(answer):
            return False
        try:
            left, right = (canonical(Node("-", relation.args)) for relation in (reference, answer))
        except UnreadableError:
            return wanted == given and self._in_order(reference.args, answer.args)
        if _solved(reference) and symbolic.symbols(left) != symbolic.symbols(right):
            return False
        sign = 1 if left == right else -1 if left == canonical(Node("neg", (Node("-", answer.args),))) else 0
        if not sign:
            self._at_least("symbolic")
            sign = symbolic.ratio(left, right)
        return sign != 0 and wanted[0] == (given[0] if sign > 0 else _FLIPPED[given[0]])

    # --- single values ---

    def _quantities(self, reference: Node, answer: Node) -> bool:
        wanted, given = (node.text if node.kind == "quantity" else "" for node in (reference, answer))
        inner = [node.args[0] if node.kind == "quantity" else node for node in (reference, answer)]
        if wanted == given:
            return self.same(inner[0], inner[1])
        if "%" in (wanted, given):
            if wanted and given:
                return False
            shares = (
                Node("/", (i, number(100))) if u == "%" else i for u, i in zip((wanted, given), inner, strict=True)
            )
            return self._by("percent", self.same(*shares) or self._as_percentage(wanted, *inner))
        words = set(wanted.split()), set(given.split())
        if not (words[0] <= words[1] or words[1] <= words[0]):
            return False
        same = self.same(inner[0], inner[1])
        return same if words[0] - words[1] <= SIGNS else self._by("unit", same)

    def _as_percentage(self, unit: str, reference: Node, answer: Node) -> bool:
        """Whether the two are the same number, of which one has a percent sign and the other means one."""
        value = _rational(reference)
        whole = unit == "%" or (value is not None and abs(value) >= 1)
        return whole and self.same(reference, answer)

    def _scalars(self, reference: Node, answer: Node) -> bool:
        try:
            wanted, given = canonical(reference), canonical(answer)
        except UnreadableError:
            return False
        if wanted == given:
            return True
        if isinstance(wanted, Fraction) and (quantity := _with_unit(answer)):
            return self._scalars(reference, quantity.args[0])
        if self._rounded(reference, answer, wanted, given):
            self._at_least("rounding")
            return _decimal(reference) is not None or self._by("rounding", True)
        if all(isinstance(value, Fraction) or value[0] == "symbol" for value in (wanted, given)):
            return False
        self._at_least("symbolic")
        return symbolic.equal(wanted, given)

    def _rounded(self, reference: Node, answer: Node, wanted: Canonical, given: Canonical) -> bool:
        """Whether one is the other, rounded to the digits it shows."""
        shown = _decimal(answer)
        decimal, exact = (shown, wanted) if shown else (_decimal(reference), given)
        if decimal is None or (shown and _decimal(reference)):
            return False
        places = decimal.places or 0
        digits = len(str(abs(decimal.value.numerator) * 10**places // decimal.value.denominator))
        if digits < MIN_DIGITS:
            return False
        half = Fraction(1, 2 * 10**places)
        sign = -1 if (answer if shown else reference).kind == "neg" else 1
        if isinstance(exact, Fraction):
            rest = exact.denominator
            while rest % 2 == 0 or rest % 5 == 0:
                rest //= 2 if rest % 2 == 0 else 5
            return rest > 1 and abs(exact - sign * decimal.value) <= half
        if symbolic.symbols(exact) - {"pi", "e"}:
            return False
        self._at_least("symbolic")
        return symbolic.near(exact, sign * decimal.value, half)

    def _at_least(self, stage: str) -> None:
        order = ("exact", "structure", "rounding", "symbolic")
        self.stage = max(self.stage, stage, key=order.index)


# --- what nodes look like --------------------------------------------------------------------------------------------


def _items(node: Node) -> tuple[Node, ...]:
    r"""The elements of a list or set, ``\pm`` written out; anything else is the only element."""
    if node.kind in _UNORDERED:
        return tuple(item for part in node.args for item in ((part,) if part.kind == "set" else _items(part)))
    if (
        node.kind == "relation"
        and (value := _named_value(node)) is not None
        and (_has_sign(value) or value.kind in _UNORDERED)
    ):
        return _items(value)
    return (_choose(node, "+"), _choose(node, "-")) if _has_sign(node) or _signed_tuple(node) else (node,)


def _multiplied(node: Node) -> Node:
    """A number times a matrix as a matrix."""
    if node.kind != "*" or node.args[1].kind != "matrix" or node.args[0].kind == "matrix":
        return node
    rows = (Node("row", tuple(Node("*", (node.args[0], item)) for item in row.args)) for row in node.args[1].args)
    return Node("matrix", tuple(rows))


def _has_sign(node: Node) -> bool:
    return node.kind in ("pm", "mp") or (
        node.kind not in ("tuple", "matrix", "union", *_UNORDERED) and any(map(_has_sign, node.args))
    )


def _signed_tuple(node: Node) -> bool:
    r"""Whether ``node`` is a tuple with ``\pm`` in one element, which makes it two tuples."""
    return node.kind == "tuple" and sum(map(_has_sign, node.args)) == 1


def _choose(node: Node, sign: str) -> Node:
    r"""``node`` with the upper (``+``) or the lower sign of every ``\pm``."""
    args = tuple(_choose(argument, sign) for argument in node.args)
    if node.kind in ("pm", "mp"):
        plus = (node.kind == "pm") == (sign == "+")
        return Node("+" if plus else "-", args) if len(args) == 2 else args[0] if plus else Node("neg", args)
    return Node(node.kind, args, node.text, node.value, node.places)


def _assigned(node: Node) -> tuple[Node, ...] | None:
    """The values of a list that gives each of several names one: ``x = 1, y = 2``."""
    if node.kind != "list" or not all(
        item.kind == "relation" and item.text == "=" and _is_name(item.args[0]) for item in node.args
    ):
        return None
    lefts = [item.args[0] for item in node.args]
    return tuple(item.args[1] for item in node.args) if all(lefts.count(left) == 1 for left in lefts) else None


def _solved(relation: Node) -> bool:
    """Whether it is a name against a value without names."""
    for name, value in (relation.args[:2], relation.args[1::-1]):
        bare = name.args[0] if name.kind == "neg" else name
        if bare.kind == "symbol" and not names(value):
            return True
    return False


def _as_set(node: Node) -> Node | None:
    """Intervals for inequalities in one name; other nodes that can be sets as they are."""
    if node.kind == "list" and node.text == "or":
        parts = [_as_set(item) for item in node.args]
        intervals = [i for part in parts if part for i in (part.args if part.kind == "union" else (part,))]
        return Node("union", tuple(intervals), text="cup") if all(parts) else None
    if node.kind == "relation" and node.text == "in" and _is_name(node.args[0]):
        return _as_set(node.args[1])
    if node == _REALS:
        return _interval("(", _MINUS_INFINITY, _INFINITY, ")")
    if node.kind == "union" and node.text == "setminus" and node.args[0] == _REALS and node.args[1].kind == "set":
        return _without(node.args[1].args)
    if node.kind == "relation":
        return _solutions(node)
    return node if node.kind in ("tuple", "union") else None


def _solutions(inequality: Node) -> Node | None:
    """Intervals for an inequality, or a chain of two, that is solved for one name."""
    signs, sides = inequality.text.split(), inequality.args
    if set(signs) <= {">", ">="}:
        signs, sides = [_FLIPPED[s] for s in signs[::-1]], sides[::-1]
    if signs == ["!="] and _is_name(sides[0]):
        return _outside(sides[1], ")", "(", sides[1])
    if len(signs) > 2 or not set(signs) <= {"<", "<="}:
        return None
    opening, closing = "(["[signs[0] == "<="], ")]"[signs[-1] == "<="]
    if len(signs) == 2:
        return _interval(opening, sides[0], sides[2], closing) if _is_name(sides[1]) else None
    less, more = sides
    if _is_name(less):
        return _interval("(", _MINUS_INFINITY, more, closing)
    if _is_name(more):
        return _interval(opening, less, _INFINITY, ")")
    if _is_absolute_value(less) and (_rational(more) or 0) > 0:
        return _interval(opening, Node("neg", (more,)), more, closing)
    if _is_absolute_value(more) and (_rational(less) or 0) > 0:
        return _outside(Node("neg", (less,)), closing, opening, less)
    return None


def _interval(opening: str, low: Node, high: Node, closing: str) -> Node:
    return Node("tuple", (low, high), opening + closing)


def _outside(low: Node, closing: str, opening: str, high: Node) -> Node:
    """All up to ``low`` and from ``high``."""
    ends = _interval("(", _MINUS_INFINITY, low, closing), _interval(opening, high, _INFINITY, ")")
    return Node("union", ends, text="cup")


def _is_absolute_value(node: Node) -> bool:
    return node.kind == "abs" and node.args[0].kind == "symbol"


def _without(points: tuple[Node, ...]) -> Node | None:
    """The real numbers without ``points``, as intervals; None unless the points are rational."""
    rational = sorted(value for point in points if (value := _rational(point)) is not None)
    if not rational or len(rational) < len(points):
        return None
    ends = [_MINUS_INFINITY, *map(number, rational), _INFINITY]
    return Node("union", tuple(_interval("(", low, high, ")") for low, high in pairwise(ends)), "cup")


def _is_name(node: Node) -> bool:
    """Whether ``node`` names something: ``x``, ``AB``, ``f(x)``, ``(x, y)``, ``AB : CD``."""
    if node.kind == "abs":
        return node.args[0].kind == "*" and _is_name(node.args[0])
    if node.kind == "^":  # an inverse
        return node.args[0].kind == "symbol" and node.args[0].text in _FUNCTION_NAMES and node.args[1].kind == "neg"
    if node.kind == "*" and not names(node.args[1]):  # f(2)
        return node.args[0].kind == "symbol" and node.args[0].text in _FUNCTION_NAMES
    return node.kind == "symbol" or (node.kind in ("*", "tuple", "ratio", "frac") and all(map(_is_name, node.args)))


def _named_value(relation: Node) -> Node | None:
    """What ``name = …``, ``… = name`` or ``name in …`` says of the name."""
    signs = relation.text.split()
    if relation.kind != "relation" or not set(signs) <= {"=", "~", "in"}:
        return None
    if _is_name(relation.args[0]):
        return _before_approximation(relation)
    if len(signs) == 1 and _is_name(relation.args[1]) and not names(relation.args[0]):
        return relation.args[0]
    return None


def _final_value(relation: Node) -> Node | None:
    """Where a chain of equal things ends: ``x = 3 + 4 = 7``, ``3 + 4 = 7``."""
    signs = relation.text.split()
    if (value := _named_value(relation)) is not None:
        return None if _contradicts_itself(relation) else value
    if not set(signs) <= {"=", "~"} or (names(relation.args[0]) and len(signs) == 1):
        return None
    value = relation.args[0] if signs[0] == "~" else _before_approximation(relation)
    return None if _false_statement(relation, value) else value


def _false_statement(relation: Node, value: Node) -> bool:
    """Whether ``relation`` says that a number is another one: ``5 = 6``."""
    signs = relation.text.split()
    try:
        sides = [canonical(side) for side in (*relation.args[: len(signs) - signs.count("~") + 1], value)]
    except UnreadableError:
        return True
    return len({side for side in sides if isinstance(side, Fraction)}) > 1


def _contradicts_itself(relation: Node) -> bool:
    """Whether a chain gives its name two numbers: ``x = 3 = 12``, but not ``x = 1/3 = 0.333``."""
    numbers = []
    for sign, side in zip(relation.text.split(), relation.args[1:], strict=True):
        if sign == "=" and (value := _rational(side)) is not None:
            decimal = _decimal(side)
            numbers.append((value, Fraction(1, 2 * 10 ** (decimal.places or 0)) if decimal else Fraction(0)))
    return any(
        abs(one - other) > max(slack) for (one, other), slack in (zip(*pair, strict=True) for pair in pairwise(numbers))
    )


def _before_approximation(relation: Node) -> Node:
    signs = relation.text.split()
    return relation.args[signs.index("~")] if "~" in signs[1:] else relation.args[-1]


def _rational(node: Node) -> Fraction | None:
    try:
        value = canonical(node)
    except UnreadableError:
        return None
    return value if isinstance(value, Fraction) else None


def _decimal(node: Node) -> Node | None:
    """The decimal that ``node`` is, without its sign."""
    bare = node.args[0] if node.kind == "neg" else node
    return bare if bare.kind == "number" and bare.places else None


def _decimal_comma(node: Node) -> Node | None:
    """``2,74`` read as 2.74."""
    if node.kind == "list" and len(node.args) == 2 and all(part.text.isdigit() for part in node.args):
        whole, part = (part.text for part in node.args)
        return number(Fraction(f"{whole}.{part}"), len(part))
    return None


def _with_unit(node: Node) -> Node | None:
    """``node`` as a quantity if it is a number before a unit of one letter: ``5m``, ``5 m^2``."""
    unit = node.args[1] if node.kind == "*" and node.args[0].kind == "number" else None
    letter, power = (unit.args[0], f"^{unit.args[1].text}") if unit and unit.kind == "^" else (unit, "")
    if letter is None or letter.kind != "symbol" or letter.text not in "mgshlL":
        return None
    return Node("quantity", node.args[:1], UNITS[letter.text.lower()] + power)


def is_number(node: Node) -> bool:
    if node.kind in ("neg", "quantity"):
        return is_number(node.args[0])
    return node.kind in ("number", "mixed") or (node.kind in ("frac", "/") and all(map(is_number, node.args)))


def unfinished(answer: Node) -> bool:
    """Whether plain arithmetic is left to do; a number times a power of ten is not."""
    if answer.kind in ("+", "-"):
        return True
    if answer.kind == "*":
        return not (
            answer.args[1].kind == "^" and answer.args[1].args[0].value == 10 and not unfinished(answer.args[0])
        )
    if answer.kind in ("/", "frac") and all(a.kind == "number" for a in answer.args):
        value = answer.args[0].value / answer.args[1].value
        return value.denominator == 1 and answer.args[1].value != 1
    return answer.kind in ("neg", "quantity", "/", "frac") and any(map(unfinished, answer.args))
