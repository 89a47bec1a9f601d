"""The same number."""

from __future__ import annotations

from typing import Any

from rewards.contract import Score
from rewards.verifiers.base import Verifier, unreadable, verdict
from rewards.verifiers.number import read_number


class Numeric(Verifier):
    """``1.0 if |completion - reference| <= tolerance else 0.0``, in exact arithmetic.

    The completion as a whole must be one number; :func:`rewards.verifiers.number.read_number` says what is read as one
    (``50%`` is 1/2, so it equals ``0.5`` and not ``50``; ``12/4`` is no number). Words and units are not accepted. What
    cannot be read scores 0.0, with ``parts["readable"]`` 0.0; a reference that cannot be read leaves the sample
    ungraded.

    Args:
        tolerance: largest absolute difference that still counts as right. ``0.1`` means exactly one tenth.

    Raises:
        ValueError: a tolerance that is negative or not a number.

    Example:
        >>> numeric = Numeric()
        >>> [numeric.grade(text, "1234").value for text in ("1,234.0", "1234 1235", "12,34")]
        [1.0, 0.0, 0.0]
        >>> Numeric(tolerance=0.1).grade("3.1", "3").value
        1.0
    """

    name = "numeric"

    def __init__(self, tolerance: float = 0) -> None:
        exact = read_number(str(tolerance))
        if exact is None or exact < 0:
            raise ValueError(f"tolerance must be a number of at least 0, got {tolerance!r}")
        self.tolerance = exact

    def grade(self, completion: str, reference: Any) -> Score:
        wanted = read_number(str(reference))
        if wanted is None:
            return unreadable(reference, wanted="a number")
        answer = read_number(completion)
        if answer is None:
            return verdict(False, readable=0.0)
        return verdict(abs(answer - wanted) <= self.tolerance, readable=1.0)
