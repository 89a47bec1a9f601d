"""The numbers game: make a target out of given numbers."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from rewards import Score
from rewards.verifiers.base import Verifier, unreadable, verdict
from textenv.task import Problem, Task, Transcript
from textenv.tasks.options import TEMPLATE_ROOM, check_whole

LARGEST_TARGET = 999
LONGEST_ANSWER = 100
"""Characters of an expression that are looked at; six numbers need 25, and this bounds how deep it can nest."""

_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class CountdownReward(Verifier):
    """1 for an expression that uses only the given numbers, each at most once, and makes the target; else 0.

    The expression is the last line of the completion that is not blank: whole numbers, ``+ - * /`` and parentheses.
    Division is exact. The reference is ``{"numbers": [...], "target": n}``; without these a sample is ungraded.

    Example:
        >>> reference = {"numbers": [3, 5, 7], "target": 36}
        >>> [CountdownReward().grade(answer, reference).value for answer in ("(5+7)*3", "36", "5*7+1")]
        [1.0, 0.0, 0.0]
    """

    name = "countdown"

    def grade(self, completion: str, reference: Any) -> Score:
        if not _is_reference(reference):
            return unreadable(reference, wanted="{'numbers': [whole numbers], 'target': whole number}")
        try:
            used, value = evaluate(completion.strip().split("\n")[-1])
        except (ValueError, ZeroDivisionError):  # not an expression, or one without a value: a wrong answer
            return verdict(False)
        return verdict(used <= Counter(reference["numbers"]) and value == reference["target"])


def _is_reference(reference: Any) -> bool:
    return (
        isinstance(reference, dict)
        and isinstance(reference.get("target"), int)
        and isinstance(reference.get("numbers"), list)
        and all(isinstance(number, int) for number in reference["numbers"])
    )


def evaluate(expression: str) -> tuple[Counter[int], Fraction]:
    """The numbers an expression uses, and its exact value. Nothing is executed.

    Raises:
        ValueError: not an expression of whole numbers, ``+ - * /`` and parentheses, or a very long one.
        ZeroDivisionError: it divides by zero.

    Example:
        >>> evaluate("6/4*(1+1)")
        (Counter({1: 2, 6: 1, 4: 1}), Fraction(3, 1))
    """
    # The parser never sees a letter, an underscore or a dot, so no name, call or fancy literal either.
    if len(expression) > LONGEST_ANSWER or not re.fullmatch(r"[0-9+\-*/() ]+", expression):
        raise ValueError(f"not an arithmetic expression: {expression[:LONGEST_ANSWER]!r}")
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"not an arithmetic expression: {expression!r}") from error
    used: Counter[int] = Counter()
    return used, _value(tree, used)


def _value(node: ast.expr, used: Counter[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used[node.value] += 1
        return Fraction(node.value)
    # No unary operators: a sign is no number that was given.
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise ValueError(f"only whole numbers, + - * / and parentheses may be used, got {ast.unparse(node)}")


class Countdown(Task):
    """Make a target out of given numbers, each used at most once, with ``+ - * /`` and parentheses.

    The answer is an expression such as ``(5+7)*3``, on the last line of the completion; every problem has a solution,
    and no target is itself one of the numbers. The reward is :class:`CountdownReward`.

    Args:
        numbers: how many numbers are given, 2 to 6.
        largest: they are uniform in 1 … largest, at most 99. Targets go up to 999.

    Raises:
        ValueError: an option out of its range.

    Example:
        >>> problem = Countdown(numbers=3, largest=9).problem(seed=0, split="train", index=0)
        >>> problem.prompt
        'Use 5, 6, 8, each at most once, with + - * / and ( ) to make 19: '
        >>> problem.reference
        {'numbers': [5, 6, 8], 'target': 19, 'solution': '(8+6)+5'}
    """

    reward = CountdownReward()
    max_tokens = TEMPLATE_ROOM + 192

    def __init__(self, numbers: int = 4, largest: int = 25) -> None:
        check_whole("numbers", numbers, 2, 6)
        check_whole("largest", largest, 1, 99)
        self.numbers = numbers
        self.largest = largest
        self.max_new_tokens = 8 * numbers

    def draw(self, rng: np.random.Generator) -> Problem:
        while True:
            # In order, so that the same numbers are the same problem and cannot stand in both splits.
            numbers = sorted(rng.integers(1, self.largest + 1, size=self.numbers).tolist())
            target, solution = _combine(numbers, rng)
            if target not in numbers:
                break
        prompt = f"Use {', '.join(map(str, numbers))}, each at most once, with + - * / and ( ) to make {target}: "
        return Problem(prompt, {"numbers": numbers, "target": target, "solution": solution})

    def demonstrate(self, transcript: Transcript) -> str:
        return transcript.problem.reference["solution"]


def _combine(numbers: list[int], rng: np.random.Generator) -> tuple[int, str]:
    """Join random pairs of ``numbers`` until one is left: its value and the expression that makes it."""
    terms = [(number, str(number)) for number in numbers]
    while len(terms) > 1:
        first, second, *rest = (terms[i] for i in rng.permutation(len(terms)))
        (a, left), (b, right) = max(first, second), min(first, second)
        results = {"+": a + b, "*": a * b}
        if a > b:
            results["-"] = a - b
        if a % b == 0:
            results["/"] = a // b
        # Never empty: a-b is small, and where a equals b, so is a/b.
        possible = [(value, sign) for sign, value in results.items() if value <= LARGEST_TARGET]
        value, sign = possible[rng.integers(len(possible))]
        terms = [*rest, (value, f"({left}{sign}{right})")]
    value, expression = terms[0]
    return value, expression[1:-1]
