"""Questions with choices, in the formats of MMLU and ARC."""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewards.verifiers.choice import Choice
from textenv.datasets import DatasetTask
from textenv.task import Problem


class MultipleChoice(DatasetTask):
    """Choose the right one of several answers, by its letter: MMLU (Hendrycks et al., 2021), ARC (Clark et al., 2018).

    Choices are a list, or ``{"text": [...], "label": [...]}`` as in ARC; in the prompt they are lettered from A on. The
    answer is the place of the right choice as a whole number from 0 on, or its label; without labels its letter or its
    text. The reference and the demonstration are the letter.

    Args:
        data: data with a question, its choices and the answer; default the training part of MMLU on the hub; for ARC
            ``allenai/ai2_arc:ARC-Challenge`` with ``answer="answerKey"``; ``"sample"`` for a few questions of our own.
        eval_data: data to evaluate on, e.g. ``cais/mmlu:all@test``; default a share ``holdout`` of ``data``.
        question: name of the field with the question.
        choices: name of the field with the choices.
        answer: name of the field with the answer.
        letters: how many letters a completion may choose from, which is how many choices a row has at most.
        template: the text of a prompt, over the fields of a row and ``choices``, the lettered choices on a line each.
        shots: worked examples before each problem.

    Raises:
        ValueError: on first use, when a row has fewer than two choices, more than ``letters``, or an answer that is not
            one of them; else as :class:`DatasetTask`.

    Example:
        >>> row = {"question": "2+2?", "choices": ["3", "4"], "answer": 1}
        >>> problem = MultipleChoice(template="{question} {choices}").read_row(row)
        >>> problem.prompt, problem.reference
        ('2+2? A. 3\\nB. 4', 'B')
    """

    licence = "MIT (MMLU); another dataset's own"
    max_new_tokens = 256
    max_tokens = 4096
    template = "{question}\n{choices}\nAnswer with the letter of the right choice.\n"
    sample = "multiple_choice.jsonl"

    def __init__(
        self,
        data: str | Path = "cais/mmlu:all@auxiliary_train",
        eval_data: str | Path | None = None,
        question: str = "question",
        choices: str = "choices",
        answer: str = "answer",
        letters: int = 5,
        template: str | None = None,
        shots: int = 0,
    ) -> None:
        if not isinstance(letters, int) or not 2 <= letters <= 26:
            raise ValueError(f"letters must be a whole number from 2 to 26, got {letters!r}")
        super().__init__(data, question, None, eval_data, template, shots)
        self.choices = choices
        self.right = answer
        self.letters = string.ascii_uppercase[:letters]
        self.reward = Choice(self.letters)

    def fields(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        texts, _ = self._choices(row)
        lettered = "\n".join(f"{letter}. {text}" for letter, text in zip(self.letters, texts, strict=False))
        return {**row, "question": row[self.prompt], "choices": lettered}

    def read_row(self, row: Mapping[str, Any]) -> Problem:
        if self.right not in row:
            raise ValueError(f"wanted the field {self.right!r}, the fields there are {', '.join(map(repr, row))}")
        texts, labels = self._choices(row)
        answer = row[self.right]
        if isinstance(answer, int):
            places = {answer} & set(range(len(texts)))
        elif labels:
            places = {place for place, label in enumerate(labels) if label == answer}
        else:  # a letter or a text; what is the letter of one choice and the text of another is no answer
            places = {place for names in (self.letters, texts) for place, name in enumerate(names) if name == answer}
        if len(places) != 1 or max(places) >= len(texts):
            raise ValueError(f"the answer must be one of the choices {labels or texts}, got {answer!r}")
        return Problem(self.read_prompt(row), self.letters[places.pop()])

    def _choices(self, row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """The texts of a row's choices, and their labels if it gives any."""
        given = row.get(self.choices)
        texts, labels = (given.get("text"), given.get("label")) if isinstance(given, Mapping) else (given, [])
        if not isinstance(texts, list) or len(set(map(str, texts))) < 2:
            raise ValueError(f"the field {self.choices!r} must hold different choices, got {str(given)[:80]}")
        if len(texts) > len(self.letters):
            raise ValueError(f"it has {len(texts)} choices, but letters={len(self.letters)}; set letters to as many")
        return [str(text) for text in texts], labels or []
