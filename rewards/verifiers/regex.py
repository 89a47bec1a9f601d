"""A regular expression."""

from __future__ import annotations

from typing import Any

import regex  # type: ignore[import-untyped]  # not re: its searches can be stopped, and from any thread

from rewards.contract import Score, ungraded
from rewards.verifiers.base import Verifier, unreadable, verdict

SECONDS = 1.0
"""Limit of one match, in CPU time of the process: patterns backtrack, and a completion can be written to make them."""


class Regex(Verifier):
    """``1.0 if the pattern matches the completion else 0.0``, with the syntax of the ``regex`` package, a superset of
    ``re``.

    A match that takes longer than :data:`SECONDS` leaves the sample ungraded.

    Args:
        pattern: the pattern for every sample; None takes each sample's reference as its pattern (one that does not
            compile leaves the sample ungraded).
        fullmatch: the whole completion has to match; False looks for a match anywhere, which a completion that lists
            many answers can exploit.

    Raises:
        ValueError: the pattern does not compile.

    Example:
        >>> date = Regex(r"\\d{4}-\\d\\d-\\d\\d")
        >>> date.grade("2024-11-20", None).value, date.grade("on 2024-11-20", None).value
        (1.0, 0.0)
    """

    name = "regex"

    def __init__(self, pattern: str | None = None, fullmatch: bool = True) -> None:
        try:
            self.pattern = None if pattern is None else regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"the pattern {pattern!r} does not compile: {error}") from error
        self.fullmatch = fullmatch

    def grade(self, completion: str, reference: Any) -> Score:
        pattern = self.pattern or _compile(reference)
        if pattern is None:
            return unreadable(reference, wanted="a regular expression")
        match = pattern.fullmatch if self.fullmatch else pattern.search
        try:
            return verdict(match(completion, timeout=SECONDS) is not None)
        except TimeoutError:
            return ungraded(
                f"the pattern {pattern.pattern!r} took longer than {SECONDS} s; write one that backtracks less"
            )


def _compile(reference: Any) -> Any:
    """The reference as a pattern; None if it is not one."""
    try:
        return regex.compile(reference) if isinstance(reference, str) else None
    except regex.error:
        return None
