"""Competition problems in the format of MATH: a worked solution with the answer in ``\\boxed``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards.verifiers.math import Math
from textenv.datasets import DatasetTask
from textenv.task import Problem, Transcript


class MATH(DatasetTask):
    """Competition mathematics (Hendrycks et al., 2021, arXiv:2103.03874). The answer is an expression in ``\\boxed``.

    The reference is the row's ``answer`` where it has one, else what the solution's last ``\\boxed`` holds.
    ``info["solution"]`` holds the worked solution, which ``demonstrate`` shows. The reward is ``math``; units and percent
    signs of the reference may be missing, as the benchmark's own grader has it.

    Args:
        data: the official folder ``MATH/train``, with a json file for each problem, or any data with the fields
            ``problem`` and ``solution``, and ``level`` and ``type`` (MATH-500: ``subject``) if they are to be chosen by;
            default a copy on the hub, as the official one is gone; ``"sample"`` for a few problems of our own.
        eval_data: the official folder ``MATH/test`` or ``HuggingFaceH4/MATH-500@test``, to evaluate on it; default a
            share ``holdout`` of ``data``.
        levels: only problems of these levels, of 1 (easy) to 5, e.g. ``[4, 5]``.
        types: only problems of these types, e.g. ``["Algebra", "Geometry"]``.
        template: the text of a prompt, over the fields of a row.
        shots: worked examples before each problem.

    Raises:
        ValueError: levels or types that are no list; on first use, when a row has neither an answer nor a box, or lacks
            what it is to be chosen by; else as :class:`DatasetTask`.

    Example:
        >>> row = {"problem": "Half of $x$?", "solution": r"It is $\\boxed{\\frac{x}{2}}$."}
        >>> MATH().read_row(row).reference
        '\\\\frac{x}{2}'
    """

    reward = Math(conventions=("unit", "percent"))
    answer_types = (str,)
    licence = "MIT"
    max_new_tokens = 1024
    max_tokens = 4096
    template = "{problem}\nWork step by step, and put the final answer in \\boxed{{}}.\n"
    sample = "math.jsonl"

    def __init__(
        self,
        data: str | Path = "DigitalLearningGmbH/MATH-lighteval:default",
        eval_data: str | Path | None = None,
        levels: Sequence[int] | None = None,
        types: Sequence[str] | None = None,
        template: str | None = None,
        shots: int = 0,
    ) -> None:
        for name, chosen, example in (("levels", levels, "[4, 5]"), ("types", types, '["Algebra"]')):
            if chosen is not None and (not isinstance(chosen, Sequence) or isinstance(chosen, str) or not chosen):
                raise ValueError(f"{name} must be a list such as {example}, got {chosen!r}")
        super().__init__(data, "problem", "solution", eval_data, template, shots)
        self.levels = levels
        self.types = types

    def wanted(self, row: Mapping[str, Any]) -> bool:
        return (self.levels is None or _level(row) in self.levels) and (self.types is None or _type(row) in self.types)

    def read_row(self, row: Mapping[str, Any]) -> Problem:
        answer = row.get("answer") or last_boxed(row["solution"])
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"the solution must have its answer in \\boxed{{}}, got {row['solution'][-60:]!r}")
        return Problem(self.read_prompt(row), answer.strip(), {"solution": row["solution"]})

    def demonstrate(self, transcript: Transcript) -> str:
        return transcript.problem.info["solution"]


def _level(row: Mapping[str, Any]) -> int:
    """``"Level 5"`` as 5. A few official rows say ``"Level ?"``: 0, which no choice of levels has."""
    level = str(_field(row, "level")).removeprefix("Level ")
    return int(level) if level.isdecimal() else 0


def _type(row: Mapping[str, Any]) -> str:
    return _field(row, "subject" if "subject" in row else "type")


def _field(row: Mapping[str, Any], field: str) -> Any:
    if field not in row:
        raise ValueError(f"wanted the field {field!r} to choose by, the fields there are {', '.join(map(repr, row))}")
    return row[field]


def last_boxed(text: str) -> str | None:
    """What the last ``\\boxed{…}`` or ``\\fbox{…}`` with balanced braces holds, or the word behind ``\\boxed ``.

    Example:
        >>> last_boxed(r"so $\\boxed{1}$, or rather $\\boxed{\\frac{1}{2}}$"), last_boxed(r"$\\boxed 5$"), last_boxed("5")
        ('\\\\frac{1}{2}', '5', None)
    """
    at = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if at < 0:
        return None
    held = text[at:].removeprefix("\\boxed").removeprefix("\\fbox").lstrip()
    if not held.startswith("{"):
        word = re.match(r"[^\s$\\.,]+", held)
        return word and word[0]
    depth = 0
    for i, character in enumerate(held):
        # An escaped brace is part of the answer, not of its frame.
        depth += (character == "{") - (character == "}") if held[i - 1 : i] != "\\" else 0
        if depth == 0:
            return held[1:i]
    return None
