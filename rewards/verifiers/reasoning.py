"""Reasoning before an answer, as models mark it."""

from __future__ import annotations

import re

_THINK = re.compile(r"<\s?(/?)\s?(?:think|thinking|thought|reasoning|scratchpad)\s?>", re.IGNORECASE)


def without_reasoning(text: str, prompt: str = "") -> str | None:
    """What follows the reasoning; None if the reasoning, which the prompt may have begun, never ends.

    Example:
        >>> without_reasoning("<think>4 or 5</think>5"), without_reasoning("<think>It is 4"), without_reasoning("4")
        ('5', None, '4')
    """
    tags = list(_THINK.finditer(text))
    closed = [tag.end() for tag in tags if tag[1]]
    if any(not tag[1] and (not closed or tag.start() >= closed[-1]) for tag in tags):
        return None
    begun = [tag[1] for tag in _THINK.finditer(prompt[-100:])]
    if begun and not begun[-1] and not closed:
        return None
    return text[closed[-1] :] if closed else text
