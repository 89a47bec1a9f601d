"""A hidden number, to be found in several turns."""

from __future__ import annotations

import re

import numpy as np

from textenv.task import Problem, Task, Transcript
from textenv.tasks.options import TEMPLATE_ROOM, TURN_ROOM, check_whole

HIGHER, LOWER, UNREADABLE = "\nhigher\n", "\nlower\n", "\nnot a number\n"


class GuessNumber(Task):
    """Find a hidden number: every wrong guess is answered by ``higher``, ``lower`` or ``not a number``.

    The reward is 1 when the last guess is the number, else 0. ``demonstrate`` shows binary search, which needs
    ``log2(high + 1)`` turns, rounded up.

    Args:
        high: the number is uniform in 1 … high.
        turns: guesses at most, 2 or more.

    Raises:
        ValueError: an option out of its range.

    Example:
        >>> task = GuessNumber(high=20)
        >>> problem = task.problem(seed=0, split="train", index=0)
        >>> problem.prompt
        'Find the number from 1 to 20. You have 6 guesses.\\n'
        >>> problem.reference
        '6'
    """

    def __init__(self, high: int = 20, turns: int = 6) -> None:
        check_whole("high", high, 2, 999_999)
        check_whole("turns", turns, 2, 100)
        self.high = high
        self.turns = turns
        self.prompt = f"Find the number from 1 to {high}. You have {turns} guesses.\n"
        self.max_new_tokens = len(str(high)) + 2
        self.max_tokens = TEMPLATE_ROOM + len(self.prompt) + turns * (TURN_ROOM + self.max_new_tokens + len(UNREADABLE))

    def draw(self, rng: np.random.Generator) -> Problem:
        return Problem(self.prompt, str(rng.integers(1, self.high + 1)))

    def key(self, problem: Problem) -> str:
        return f"{problem.prompt}{problem.reference}"

    def reply(self, transcript: Transcript) -> str | None:
        guess, secret = read_guess(transcript.completions[-1]), int(transcript.problem.reference)
        if guess == secret or len(transcript.completions) == self.turns:
            return None
        if guess is None:
            return UNREADABLE
        return HIGHER if guess < secret else LOWER

    def demonstrate(self, transcript: Transcript) -> str:
        low, high = 1, self.high
        # The completion that awaits its reply, if there is one, tells nothing yet.
        for completion, reply in zip(transcript.completions, transcript.replies, strict=False):
            guess = read_guess(completion)
            if guess is not None and reply == HIGHER:
                low = max(low, guess + 1)
            elif guess is not None:
                high = min(high, guess - 1)
        return str((low + high) // 2)


def read_guess(completion: str) -> int | None:
    """The number guessed, or None when the completion is anything but a number.

    Example:
        >>> read_guess(" 12\\n"), read_guess("12 or 13"), read_guess("012")
        (12, None, None)
    """
    text = completion.strip()
    return int(text) if re.fullmatch(r"[1-9][0-9]{0,8}", text) else None
