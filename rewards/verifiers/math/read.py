r"""From the text of an answer to what it says: numbers, expressions and structures, in LaTeX or plain text.

Nothing is evaluated here, and nothing is guessed: what does not follow the grammar raises :class:`UnreadableError`.
"""

from __future__ import annotations

import re
from fractions import Fraction

from rewards.verifiers.math.clean import clean
from rewards.verifiers.math.node import MAX_CHARS, MAX_DEPTH, MAX_OPERATIONS, Node, UnreadableError, number
from rewards.verifiers.math.tokens import Token, tokens
from rewards.verifiers.math.vocabulary import (
    ARITHMETIC,
    CURRENCIES,
    FUNCTIONS,
    GREEK,
    HEDGES,
    MAGNITUDES,
    NUMERALS,
    PHRASES,
    RELATIONS,
    TRANSPARENT,
    UNITS,
)

_CLOSES = {"(": ")]", "[": "])", "\\{": ("\\}",), "langle": ("rangle",)}
_OPENS = ("(", "[", "{", "\\{", "langle", "|", "lfloor", "lceil", "begin")
_STOPS = frozenset(
    [
        ",",
        ";",
        "or",
        ")",
        "]",
        "}",
        "\\}",
        "rangle",
        "rfloor",
        "rceil",
        "&",
        "\\\\",
        "end",
        "cup",
        "cap",
        "setminus",
        ":",
        "!",
        *RELATIONS,
    ]
)


def read(text: str) -> Node:
    r"""What the answer ``text`` says.

    Raises:
        UnreadableError: it is no mathematics, or longer or deeper than an answer may be.

    Example:
        >>> read("\\frac12").args[1].value, read("1{,}000.50").places, read("[0, 1)").text, read("5 \\text{ cm}^2").text
        (Fraction(2, 1), 2, '[)', 'cm^2')
    """
    text = clean(text) if len(text) <= 2 * MAX_CHARS else text
    if not text:
        raise UnreadableError("there is nothing")
    if len(text) > MAX_CHARS:
        raise UnreadableError(f"an answer has at most {MAX_CHARS} characters")
    if based := re.fullmatch(
        r"\(?(-?[0-9][0-9A-Z .]*)\)?\s*_\s*(?:\{?\s*(?:\\text\s*\{)?\s*([0-9]{1,2}|[a-z]+)\s*\}?\}?)", text
    ):
        return _based(based[1].replace(" ", ""), based[2])
    if phrase := re.fullmatch(
        r"(?:\\(?:text|textbf|mathrm|mbox)\s*\{)?\s*([a-zA-Z]{2,5} [a-zA-Z ]{3,20}?)\s*\}?", text
    ):
        text = PHRASES.get(phrase[1].lower(), text)
    try:
        node = _Parser(tokens(text)).whole()
    except RecursionError:
        raise UnreadableError("too many signs in a row") from None
    if _depth(node) > MAX_OPERATIONS:
        raise UnreadableError(f"more than {MAX_OPERATIONS} operations on each other")
    return node


def _depth(node: Node) -> int:
    depth, level = 0, [node]
    while level:
        depth, level = depth + 1, [part for node in level for part in node.args]
    return depth


def _based(digits: str, base: str) -> Node:
    value = int(base) if base.isdigit() else NUMERALS.get(base, 0)
    if not 2 <= value <= 36 or digits.count(".") > 1 or any(int(d, 36) >= value for d in digits if d not in "-."):
        raise UnreadableError(f"no number in base {base}")
    return Node("base", text=digits, value=Fraction(value)) if value != 10 else number(Fraction(digits))


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.bars = 0

    def peek(self, ahead: int = 0) -> str:
        """The text of the next token if it is a sign or a name, else nothing."""
        token = self.token(ahead)
        return token.text if token and token.kind in ("sign", "name") else ""

    def token(self, ahead: int = 0) -> Token | None:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else None

    def found(self) -> str:
        token = self.token()
        return repr(token.text) if token else "the end"

    def take(self, *texts: str) -> str:
        """The next token's text if it is one of ``texts``, and go on behind it."""
        if (text := self.peek()) and text in texts:
            self.at += 1
            return text
        return ""

    def need(self, *texts: str) -> str:
        if not (text := self.take(*texts)):
            raise UnreadableError(f"expected {' or '.join(texts)}, got {self.found()}")
        return text

    def whole(self) -> Node:
        items, ors = self.items()
        if self.token() is not None:
            raise UnreadableError(f"did not expect {self.found()}")
        if len(items) == 2 and _is_remark(items[1], items[0]):
            del items[1]
        return items[0] if len(items) == 1 else Node("list", tuple(items), text="or" if ors else ",")

    def items(self) -> tuple[list[Node], bool]:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError(f"nested deeper than {MAX_DEPTH}")
        items, ors = [self.item()], False
        while sign := self.take(",", ";", "or"):
            ors |= sign == "or"
            if follow := self.take(",", "or"):  # ", and"
                ors |= follow == "or"
            items.append(self.item())
        self.depth -= 1
        return items, ors

    def item(self) -> Node:
        """A relation, or one expression."""
        sides, signs = [self.ratio()], []
        while (sign := self.peek()) in RELATIONS:
            self.at += 1
            signs.append(RELATIONS[sign])
            sides.append(self.ratio())
        return Node("relation", tuple(sides), text=" ".join(signs)) if signs else sides[0]

    def ratio(self) -> Node:
        parts = [self.union()]
        while self.take(":"):
            parts.append(self.union())
        return Node("ratio", tuple(parts)) if len(parts) > 1 else parts[0]

    def union(self) -> Node:
        parts, signs = [self.quantity()], set()
        while sign := self.take("cup", "cap", "setminus"):
            signs.add(sign)
            parts.append(self.quantity())
        if len(signs) > 1:
            raise UnreadableError("different set operations without brackets")
        if signs == {"cup"} and all(part.kind == "set" for part in parts):
            return Node("set", tuple(element for part in parts for element in part.args))
        return Node("union", tuple(parts), text=signs.pop()) if signs else parts[0]

    def quantity(self) -> Node:
        """A sum, and the unit behind it."""
        currency = self.currency()
        value = self.sum()
        inner, unit = (value.args[0], value.text) if value.kind == "quantity" else (value, currency)
        words = self.unit() or self.currency()
        first, _, rest = words.partition(" ")
        if first in MAGNITUDES:
            inner, words = Node("*", (inner, number(MAGNITUDES[first]))), rest
        if words != unit:
            unit = f"{unit} {words}".strip()
        return Node("quantity", (inner,), text=unit) if unit else inner

    def currency(self) -> str:
        return CURRENCIES.get(self.take(*CURRENCIES), "")

    def unit(self) -> str:
        words: list[str] = []
        while (token := self.token()) and (
            token.kind == "text" or (words and token.text in ("/", "^") and token.kind == "sign")
        ):
            self.at += 1
            if token.text == "^":
                words.append("^" + self.argument_text())
            else:
                found = re.findall(r"[^\W\d_]+|[/%$^0-9]+", token.text)
                if any(word[0].isupper() and word.lower() not in UNITS for word in found):
                    raise UnreadableError("a name, not a unit")
                words += [UNITS.get(word, word) for word in map(str.lower, found)]
        if any(word in HEDGES for word in words) or (words and words[0] in ARITHMETIC):
            raise UnreadableError("prose, not a unit")
        return _unit_name(words)

    def argument_text(self) -> str:
        braced = self.take("{")
        token = self.token()
        if token is None or token.kind != "number":
            raise UnreadableError("expected the power of a unit")
        self.at += 1
        if braced:
            self.need("}")
        return token.text

    def sum(self) -> Node:
        sign = self.take("+", "-", "pm", "mp")
        left = self.signed(sign)
        while sign := self.take("+", "-", "pm", "mp"):
            left = Node(sign, (left, self.product()))
        return left

    def signed(self, sign: str) -> Node:
        """A product behind a sign of its own, or several."""
        count = 0
        while sign == "-" and self.take("-"):
            count += 1
        if sign in ("+", "-") and (currency := self.currency()):
            return Node("quantity", (self.signed(sign),), text=currency)
        value = self.product()
        if sign == "-" and count % 2 == 0:
            unit = value.text if value.kind == "quantity" else ""
            value = Node("neg", (value.args[0] if unit else value,))
            return Node("quantity", (value,), text=unit) if unit else value
        return Node(sign, (value,)) if sign in ("pm", "mp") else value

    def product(self) -> Node:
        left = self.power()
        while True:
            if sign := self.take("*", "/"):
                right = self.factor()
                left = self.mixed(left, right) if sign == "/" else Node("*", (left, right))
            elif self.begins_factor():
                left = self.juxtaposed(left, self.power())
            elif left.kind == "number" and self.begins_mixed():
                top, bottom = (number(int(self.tokens[self.at + n].text)) for n in (0, 2))
                self.at += 3
                left = Node("mixed", (left, Node("frac", (top, bottom))))
                if self.take("%"):
                    left = Node("quantity", (left,), text="%")
            else:
                return left

    def mixed(self, left: Node, right: Node) -> Node:
        both = left.kind == right.kind == "number" and left.places is None and right.places is None
        return Node("frac" if both else "/", (left, right))

    def begins_mixed(self) -> bool:
        """Whether ``1/2`` follows an integer, with a space between, as in ``3 1/2``."""
        parts = self.token(-1), self.token(), self.token(2)
        if self.peek(1) != "/" or not all(part and part.kind == "number" and part.text.isdigit() for part in parts):
            return False
        return parts[1].spaced and 0 < int(parts[1].text) < int(parts[2].text)  # type: ignore[union-attr]

    def factor(self) -> Node:
        """A power, with signs before it: ``2 * -3``."""
        if self.take("-"):
            return Node("neg", (self.factor(),))
        self.take("+")
        return self.power()

    def begins_factor(self) -> bool:
        token = self.token()
        if token is None or token.kind in ("number", "text"):
            return False  # two numbers in a row are no product
        if token.kind == "letters":
            return True
        if token.text == "|":
            return self.bars == 0
        return token.text in _OPENS or (
            token.kind == "name"
            and token.text not in _STOPS
            and token.text not in ("pm", "mp", "circ", "choose", "over", *CURRENCIES)
        )

    def juxtaposed(self, left: Node, right: Node) -> Node:
        proper = right.kind == "frac" and all(a.kind == "number" and a.places is None for a in right.args)
        if left.kind == "number" and left.places is None and right.kind == "quantity" and right.args[0].kind == "frac":
            return Node("quantity", (self.juxtaposed(left, right.args[0]),), right.text)
        if left.kind == "number" and left.places is None and proper and right.args[0].value < right.args[1].value:
            return Node("mixed", (left, right))
        if left.kind == "quantity":
            raise UnreadableError("something behind a unit")
        return Node("*", (left, right))

    def power(self) -> Node:
        base = self.atom()
        while True:
            if self.take("!"):
                base = Node("!", (base,))
            elif self.peek() in ("^", "**"):
                self.at += 1
                if self.circle():
                    base = Node("quantity", (base,), text="degree")
                else:
                    base = Node("^", (base, self.argument(signed=True)))
            elif self.take("circ"):
                base = Node("quantity", (base,), text="degree")
            elif self.take("%"):
                base = Node("quantity", (base,), text="%")
            else:
                return base

    def circle(self) -> bool:
        """Whether a degree sign follows behind ``^``; then also take the C or F of a temperature."""
        start = self.at
        braced = self.take("{")
        if self.take("circ") and (not braced or self.take("}")):
            if (token := self.token()) and token.kind == "letters" and token.text in ("C", "F"):
                self.at += 1
            return True
        self.at = start
        return False

    def argument(self, signed: bool = False) -> Node:
        """What a command or ``^`` applies to: a group in braces or one token."""
        if self.peek() == "{":
            return self.group()
        if signed and self.take("-"):
            return Node("neg", (self.argument(),))
        return self.atom()

    def digit(self) -> Node:
        r"""An argument of ``\frac``, which takes a single digit where there are no braces."""
        token = self.token()
        if token and token.kind == "number" and token.text.isdigit() and len(token.text) > 1:
            self.tokens[self.at] = Token("number", token.text[1:])
            return number(int(token.text[0]))
        return self.argument()

    def group(self) -> Node:
        self.need("{")
        items, _ = self.items()
        if len(items) == 1 and (infix := self.take("over", "choose")):
            items = [Node("frac" if infix == "over" else "binom", (items[0], self.sum()))]
        self.need("}")
        return items[0] if len(items) == 1 else Node("set", tuple(items))

    def atom(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError(f"nested deeper than {MAX_DEPTH}")
        node = self.plain_atom()
        self.depth -= 1
        return node

    def plain_atom(self) -> Node:
        token = self.token()
        if token is None:
            raise UnreadableError("something is missing at the end")
        if token.kind == "number":
            self.at += 1
            return self.decimal(token.text)
        if token.kind == "letters":
            self.at += 1
            return self.subscripted(token.text)
        if token.kind == "text":
            raise UnreadableError("words")
        if token.kind == "name":
            return self.named(token.text)
        if token.text in ("(", "[", "\\{"):
            return self.bracketed()
        if token.text == "{":
            return self.group()
        if token.text == "|":
            return self.absolute()
        raise UnreadableError(f"did not expect {token.text!r}")

    def decimal(self, text: str) -> Node:
        text = text.replace("{,}", "").replace(",", "").replace(" ", "")
        if len(text) > MAX_CHARS:
            raise UnreadableError("too many digits")
        if text.endswith("."):
            return self.repeating(text)
        if self.peek() == "_":
            self.at += 1
            braced = self.take("{")
            token = self.token()
            self.at += 1
            if token is None or token.kind not in ("number", "text") or not text.isdigit():
                raise UnreadableError("a number with an index")
            if braced:
                self.need("}")
            return _based(text, token.text)
        mantissa = re.split("[eE]", text)[0]
        if self.peek() in ("overline", "bar") and "." in text:
            return self.repeating(text)
        return Node("number", (), text, Fraction(text), len(mantissa.partition(".")[2]) if "." in mantissa else None)

    def repeating(self, text: str) -> Node:
        self.need("overline", "bar", "dot")
        self.need("{")
        token = self.token()
        if token is None or not (token.kind == "number" and token.text.isdigit()):
            raise UnreadableError("a bar over something other than digits")
        self.at += 1
        self.need("}")
        shown, period = Fraction(text + "0"), token.text
        return number(shown + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(text.partition(".")[2])))

    def subscripted(self, name: str) -> Node:
        if self.take("_"):
            start = self.at
            self.argument() if self.peek() == "{" else self.atom()
            name += "_" + "".join(token.text for token in self.tokens[start : self.at] if token.text not in "{}")
        return Node("symbol", text=name)

    def named(self, name: str) -> Node:
        self.at += 1
        if name == "frac":
            return Node("frac", (self.digit(), self.digit()))
        if name == "binom":
            return Node("binom", (self.digit(), self.digit()))
        if name == "sqrt":
            return self.root()
        if name in FUNCTIONS or name == "abs":
            return self.function(name)
        if name in ("lfloor", "lceil"):
            inner = self.sum()
            self.need("rfloor" if name == "lfloor" else "rceil")
            return Node("floor" if name == "lfloor" else "ceil", (inner,))
        if name == "langle":
            self.at -= 1
            return self.bracketed()
        if name == "begin":
            return self.environment()
        if name == "emptyset":
            return Node("set")
        if name in ("mathbb", "mathcal"):
            inner = self.argument()
            return Node("symbol", text=f"{name} {inner.text}")
        if name in TRANSPARENT:
            return self.argument()
        if name == "oo" or name in GREEK:
            return self.subscripted(name)
        if name in ("angle", "triangle", "measuredangle"):
            return self.power()
        raise UnreadableError(f"\\{name} is not known here")

    def root(self) -> Node:
        degree = number(2)
        if self.take("["):
            degree = self.sum()
            self.need("]")
        return Node("sqrt", (self.argument(), degree))

    def function(self, name: str) -> Node:
        power = base = None
        for _ in range(2):
            if self.take("^"):
                power = self.argument(signed=True)
            elif name == "log" and self.take("_"):
                base = self.argument()
        if name in ("gcd", "lcm", "max", "min"):
            inner = self.bracketed() if self.peek() in ("(", "\\{") else self.argument()
            args = inner.args if inner.kind in ("tuple", "set") else (inner,)
            return Node(name, args)
        value = Node(name, (self.applied(),) + ((base,) if base else ()))
        if power is None:
            return value
        if power.kind == "neg" and power.args[0].value == 1:
            return Node(f"arc{name}", value.args)
        return Node("^", (value, power))

    def applied(self) -> Node:
        r"""The argument of a function: brackets, or a product up to the next function (``\sin 2x \cos y``)."""
        if self.peek() in ("(", "[", "{"):
            return self.bracketed() if self.peek() != "{" else self.group()
        left = self.factor()
        while self.begins_factor() and self.peek() not in FUNCTIONS and self.peek() not in ("(", "["):
            left = self.juxtaposed(left, self.power())
        if self.peek() == "/" and left.kind in ("symbol", "number"):
            follow = self.token(1)
            if follow and follow.kind == "number" and (left.text == "pi" or left.kind == "number"):
                self.at += 1
                left = Node("/", (left, self.power()))
        return left

    def bracketed(self) -> Node:
        opening = self.need("(", "[", "\\{", "langle")
        bars, self.bars = self.bars, 0
        if opening == "\\{" and self.take("\\}"):
            self.bars = bars
            return Node("set")
        name = self.set_builder() if opening == "\\{" else ""
        items, _ = self.items()
        closing = self.need(*_CLOSES[opening])
        self.bars = bars
        if name:
            return _condition(name, items)
        if opening == "\\{":
            return Node("set", tuple(items))
        if len(items) == 1:
            if closing not in {"(": ")", "[": "]", "langle": "rangle"}[opening]:
                raise UnreadableError("brackets that do not match")
            return items[0]
        return Node("tuple", tuple(items), text="()" if opening == "langle" else opening + closing)

    def set_builder(self) -> str:
        r"""The name in ``\{x \in \mathbb R \mid`` behind the brace, or nothing."""
        token, start = self.token(), self.at
        if token and token.kind == "letters":
            self.at += 1
            if self.take("in") and not (self.take("mathbb") and self.argument().text == "R"):
                self.at = start
                return ""
            if self.take(":", "|"):
                return token.text
        self.at = start
        return ""

    def absolute(self) -> Node:
        self.need("|")
        self.bars += 1
        inner = self.sum()
        self.need("|")
        self.bars -= 1
        return Node("abs", (inner,))

    def environment(self) -> Node:
        self.need("{")
        name = ""
        while (token := self.token()) and token.text != "}":
            name += token.text
            self.at += 1
        self.need("}")
        if name not in ("pmatrix", "bmatrix", "matrix", "Bmatrix", "smallmatrix", "vmatrix", "Vmatrix", "array"):
            raise UnreadableError(f"the environment {name} is not known here")
        if name == "array" and self.take("{"):
            while self.token() and not self.take("}"):
                self.at += 1
        rows: list[Node] = []
        while not self.take("end"):
            row = [self.item()]
            while self.take("&"):
                row.append(self.item())
            rows.append(Node("row", tuple(row)))
            while self.take("\\\\"):
                pass
        while self.token() and not self.take("}"):
            self.at += 1
        if not rows or len({len(row.args) for row in rows}) != 1:
            raise UnreadableError("rows of different lengths")
        return Node("det" if name == "vmatrix" else "matrix", tuple(rows))


def _is_remark(node: Node, item: Node) -> bool:
    r"""Whether ``node`` only says that a name in the equation or expression ``item`` is any integer: ``k \in \mathbb Z``."""
    if node.kind != "relation" or node.text != "in" or node.args[1].text != "mathbb Z" or item.text not in ("", "="):
        return False
    return node.args[0].kind == "symbol" and _contains(item, node.args[0])


def _contains(node: Node, part: Node) -> bool:
    return node == part or any(_contains(argument, part) for argument in node.args)


def _condition(name: str, items: list[Node]) -> Node:
    r"""What ``\{x : …\}`` says of x: the condition itself."""
    if len(items) > 1 or items[0].kind != "relation" or not _contains(items[0], Node("symbol", text=name)):
        raise UnreadableError(f"a set of all {name} by something other than one condition on it")
    return items[0]


def _unit_name(words: list[str]) -> str:
    """One name for a unit in its spellings: ``square feet``, ``sq ft`` and ``ft^2``."""
    name = (
        " ".join(words)
        .replace(" / ", " per ")
        .replace(" ^", "^")
        .replace("cubic ", "^3 ")
        .replace("square ", "^2 ")
        .replace("sq ", "^2 ")
    )
    name = re.sub(r"^(\^[23]) (.+)$", r"\2\1", name)
    return re.sub(r"\bsquared\b", "^2", name).replace(" ^", "^")
