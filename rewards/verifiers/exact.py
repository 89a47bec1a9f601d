"""The same text."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from rewards.contract import Score
from rewards.verifiers.base import Verifier, unreadable, verdict


class Exact(Verifier):
    """``1.0 if completion.strip() == reference.strip() else 0.0``.

    Nothing is given for an answer that is in there somewhere. The reference is text that is not blank, or an integer;
    with any other the sample is ungraded.

    Args:
        ignore_case: compare without regard to upper and lower case.

    Example:
        >>> exact = Exact()
        >>> exact.grade(" Paris\\n", "Paris").value, exact.grade("Paris, London or Rome", "Paris").value
        (1.0, 0.0)
    """

    name = "exact"

    def __init__(self, ignore_case: bool = False) -> None:
        self.ignore_case = ignore_case

    def grade(self, completion: str, reference: Any) -> Score:
        if not isinstance(reference, str | Integral) or not str(reference).strip():
            return unreadable(reference, wanted="text or an integer")
        return verdict(self._plain(completion) == self._plain(str(reference)))

    def _plain(self, text: str) -> str:
        return text.strip().casefold() if self.ignore_case else text.strip()
