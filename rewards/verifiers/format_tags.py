"""Text in its tags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rewards.contract import Score
from rewards.verifiers.base import Verifier


class FormatTags(Verifier):
    """``1.0 if the completion is <a>…</a> <b>…</b> for the tags a, b else 0.0``.

    Every tag is opened once and closed once, in the order given, none inside another, with only whitespace outside
    them. What stands inside does not matter, and may be nothing. This grades form, not correctness: its part is
    ``format``, so it never counts as accuracy, alone or beside a verifier in a :class:`rewards.WeightedSum`.

    Args:
        tags: names of the tags, in their order.

    Raises:
        ValueError: no tags, a tag twice, one that is not a word, or a text in place of a list.

    Example:
        >>> tags = FormatTags()
        >>> tags.grade("<think>2 + 2</think> <answer>4</answer>", None).value
        1.0
        >>> tags.grade("<think>2 + 2</think> It is <answer>4</answer>", None).value
        0.0
    """

    name = "format_tags"

    def __init__(self, tags: Sequence[str] = ("think", "answer")) -> None:
        if isinstance(tags, str) or not tags or len(set(tags)) != len(tags) or not all(map(str.isidentifier, tags)):
            raise ValueError(f"tags must be different words such as ('think', 'answer'), got {tags!r}")
        self._marks = re.compile(rf"(</?(?:{'|'.join(tags)})>)")
        self._wanted = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]

    def grade(self, completion: str, reference: Any) -> Score:
        pieces = self._marks.split(completion)  # outside, <a>, inside, </a>, outside, …
        formed = pieces[1::2] == self._wanted and not "".join(pieces[0::4]).strip()
        return Score(float(formed), {"format": float(formed)})
