"""The letter of a choice."""

from __future__ import annotations

import re
from typing import Any

from rewards.contract import Score
from rewards.verifiers.base import Verifier, unreadable, verdict
from rewards.verifiers.reasoning import without_reasoning

# "wrong ", "not the right ", "I don't think that the best " before "answer is B"; ") is clearly not" and the like behind it
_DENIED_BEFORE = r"""(?ix:
    \b(?:wrong|incorrect|false|worst)\s{1,3}
  | (?:\bnot|n['’]t|\bnever)\s{1,3} (?:(?:think|believe|say|said|saying|mean|true|the\scase)\s{1,3} (?:that\s{1,3})?)?
    (?:the|an?|my)\s{1,3} (?:(?:right|correct|best|final)\s{1,3})?
)"""
_DENIED_AFTER = r"""(?ix:
    [)\]"',:]{0,3} \s{1,3}
    (?: (?:is|was) (?: \s{1,3}(?:an?|the|also|clearly|definitely|certainly|obviously|simply|just)){0,2}
        (?:n['’]t | \s{1,3}(?:not|never|wrong|incorrect|false))
      | can(?:not|['’]t|\s{1,3}not) \s{1,3} be
    )\b
)"""


class Choice(Verifier):
    """``1.0 if the letter that the completion chooses == that of the reference else 0.0``.

    A completion chooses a letter by stating it (``the answer is B``, ``Answer: (B)``) or, if it states none, by opening
    with it: ``B``, ``(B)``, ``B.``, ``B) Paris``. From there on it must not name another choice: a completion that
    does, or that chooses nothing, scores 0.0 with ``parts["readable"]`` 0.0. Naming a choice is a capital letter
    standing alone, but for the article in ``A dog`` and the pronoun in ``I think``; so ``B) Vitamin C`` names two.
    Reasoning before the statement may name any; that between ``<think>`` tags does not count, nor what follows an open
    tag. What is denied is not chosen: ``the wrong answer is B``, ``I don't think the answer is B``, ``(B) is not right``.
    The reference is read by the same rule; if it chooses nothing the sample is ungraded.

    Args:
        choices: the letters to choose from, as they are written (case counts).

    Raises:
        ValueError: fewer than two letters, or not all different letters and digits.

    Example:
        >>> choice = Choice()
        >>> [choice.grade(text, "B").value for text in ("B", "Not A, so the answer is **B**.", "A or B", "B is wrong")]
        [1.0, 1.0, 0.0, 0.0]
    """

    name = "choice"

    def __init__(self, choices: str = "ABCDE") -> None:
        if not (choices.isalnum() and len(choices) == len(set(choices)) >= 2):
            raise ValueError(f"choices must be at least two different letters such as 'ABCD', got {choices!r}")
        self.choices = choices
        letter = rf"(?P<letter>\b[{choices}]\b(?!['’-]\w))"
        chosen = rf"{letter}(?!{_DENIED_AFTER})"
        states = r"(?i:\b(?:answer|choice|option)(?:\s{0,3}(?:is\b|[:=]))+\s{0,3}(?:(?:choice|option)\s)?)"
        self._stated = re.compile(rf"(?P<denied>{_DENIED_BEFORE})?{states}[\s(\[\"']{{0,4}}{chosen}")
        self._opening = re.compile(rf"\s*[(\[]?{chosen}(?:[)\].:,]|\s*$)")
        self._named = re.compile(rf"{letter}(?!(?<=[AI]) (?!and\b|or\b|is\b)[a-z])")

    def grade(self, completion: str, reference: Any) -> Score:
        wanted = self._read(str(reference))
        if wanted is None:
            return unreadable(reference, wanted=f"one of the choices {', '.join(self.choices)}")
        answer = self._read(without_reasoning(completion) or "")
        return verdict(answer == wanted, readable=float(answer is not None))

    def _read(self, text: str) -> str | None:
        text = text.replace("*", "")  # bold
        stated = (match for match in self._stated.finditer(text) if not match["denied"])
        chosen = next(stated, None) or self._opening.match(text)
        if chosen is None:
            return None
        others = set(self._named.findall(text, chosen.end("letter"))) - {chosen["letter"]}
        return None if others else chosen["letter"]
