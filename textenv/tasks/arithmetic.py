"""Arithmetic on whole numbers."""

from __future__ import annotations

import numpy as np

from textenv.task import Problem, Task
from textenv.tasks.options import TEMPLATE_ROOM, check_whole

RESULTS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


class Arithmetic(Task):
    """Add, subtract or multiply two whole numbers: ``12+34=`` wants ``46``, ``13-20=`` wants ``-7``.

    Args:
        digits: how many digits each number has, the first of them not 0; single digits are 0 to 9.
        operators: any of ``+-*``, each as likely as the others.

    Raises:
        ValueError: digits outside 1 … 18, or other operators.

    Example:
        >>> Arithmetic(digits=1).problem(seed=0, split="train", index=0)
        Problem(prompt='5+2=', reference='7', info={})
    """

    def __init__(self, digits: int = 2, operators: str = "+") -> None:
        check_whole("digits", digits, 1, 18)
        if not operators or not set(operators) <= set(RESULTS):
            raise ValueError(f"operators must be some of {''.join(RESULTS)}, got {operators!r}")
        self.digits = digits
        self.operators = operators
        # A product has 2·digits digits; then the end token, and some room for answers that are too long.
        self.max_new_tokens = 2 * digits + 4
        self.max_tokens = TEMPLATE_ROOM + 16 * digits

    def key(self, problem: Problem) -> str:
        """``12+34=`` and ``34+12=`` are one problem: who has seen one has seen the other."""
        for operator in "+*":
            if operator in problem.prompt:
                return operator.join(sorted(problem.prompt.rstrip("=").split(operator)))
        return problem.prompt

    def draw(self, rng: np.random.Generator) -> Problem:
        smallest = 0 if self.digits == 1 else 10 ** (self.digits - 1)
        a, b = rng.integers(smallest, 10**self.digits, size=2).tolist()
        operator = self.operators[rng.integers(len(self.operators))]
        return Problem(f"{a}{operator}{b}=", str(RESULTS[operator](a, b)))
