"""Short strings to reverse, sort or copy."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from textenv.task import Problem, Task
from textenv.tasks.options import TEMPLATE_ROOM, check_whole

LETTERS = "abcdefgh"


class StringTask(Task):
    """Rewrite a word of random letters ``a`` … ``h``. A subclass says what to ask and how the answer follows.

    Args:
        min_length: length of the shortest words.
        max_length: length of the longest; each length is as likely as the others.

    Raises:
        ValueError: lengths outside 1 … 64, or the shortest longer than the longest.
    """

    instruction: ClassVar[str]

    def __init__(self, min_length: int = 3, max_length: int = 5) -> None:
        check_whole("max_length", max_length, 1, 64)
        check_whole("min_length", min_length, 1, max_length)
        self.min_length = min_length
        self.max_length = max_length
        # The end token, and some room for answers that are too long.
        self.max_new_tokens = max_length + 3
        self.max_tokens = TEMPLATE_ROOM + 32 + 2 * max_length

    def rewrite(self, word: str) -> str:
        """The right answer."""
        raise NotImplementedError(f"{type(self).__name__} must define rewrite(word) -> str")

    def draw(self, rng: np.random.Generator) -> Problem:
        length = rng.integers(self.min_length, self.max_length + 1)
        word = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=length))
        return Problem(f"{self.instruction} {word}: ", self.rewrite(word))


class Reverse(StringTask):
    """Write a word backwards: ``Reverse abc:`` wants ``cba``. Options: see :class:`StringTask`.

    Example:
        >>> Reverse().problem(seed=0, split="train", index=0)
        Problem(prompt='Reverse abg: ', reference='gba', info={})
    """

    instruction = "Reverse"

    def rewrite(self, word: str) -> str:
        return word[::-1]


class Sort(StringTask):
    """Write the letters of a word in order: ``Sort cab:`` wants ``abc``. Options: see :class:`StringTask`.

    Example:
        >>> Sort().problem(seed=0, split="train", index=0)
        Problem(prompt='Sort fecca: ', reference='accef', info={})
    """

    instruction = "Sort"

    def rewrite(self, word: str) -> str:
        return "".join(sorted(word))


class Copy(StringTask):
    """Write a word again: ``Copy cab:`` wants ``cab``. Options: see :class:`StringTask`.

    Example:
        >>> Copy().problem(seed=0, split="train", index=0)
        Problem(prompt='Copy abg: ', reference='abg', info={})
    """

    instruction = "Copy"

    def rewrite(self, word: str) -> str:
        return word
