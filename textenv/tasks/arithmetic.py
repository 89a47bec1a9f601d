"""Arithmetic on whole numbers."""

from __future__ import annotations

import numpy as np

from textenv.task import Problem, Task
from textenv.tasks.options import check_whole

RESULTS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


class Arithmetic(Task):
    """Add, subtract or multiply two whole numbers: ``12+34=`` wants ``46``, ``3-10=`` wants ``-7``.

    Args:
        digits: the numbers are uniform in 0 … 10**digits - 1.
        operators: any of ``+-*``, each as likely as the others.

    Raises:
        ValueError: digits outside 1 … 18, or other operators.

    Example:
        >>> Arithmetic(digits=1).problem(seed=0, split="train", index=0)
        Problem(prompt='8+6=', reference='14', info={})
    """

    def __init__(self, digits: int = 2, operators: str = "+") -> None:
        check_whole("digits", digits, 1, 18)
        if not operators or not set(operators) <= set(RESULTS):
            raise ValueError(f"operators must be some of {''.join(RESULTS)}, got {operators!r}")
        self.digits = digits
        self.operators = operators
        # A product has 2·digits digits; then the end token, and some room for answers that are too long.
        self.max_new_tokens = 2 * digits + 4
        self.max_tokens = 16 * digits

    def draw(self, rng: np.random.Generator) -> Problem:
        a, b = rng.integers(10**self.digits, size=2).tolist()
        operator = self.operators[rng.integers(len(self.operators))]
        return Problem(f"{a}{operator}{b}=", str(RESULTS[operator](a, b)))
