"""What the tasks' constructors share."""

from __future__ import annotations

TEMPLATE_ROOM = 64
"""Tokens kept free for what a chat template may put around a prompt; a task sizes its context in characters."""
TURN_ROOM = 24
"""The same for each further turn."""


def check_whole(name: str, value: int, low: int, high: int) -> None:
    """Refuse an option that is not a whole number from ``low`` to ``high``.

    Example:
        >>> check_whole("digits", 0, 1, 18)
        Traceback (most recent call last):
        ValueError: digits must be a whole number from 1 to 18, got 0
    """
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
