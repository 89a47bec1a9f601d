"""Probes: tasks a policy learns in seconds, whose optimum and gradient are known, to find bugs in agents.

Their alphabet has five characters. "Gradient" is that of the expected reward with respect to the logits, at the uniform
policy; "rises" and "falls" say what one step along it does to a logit.
"""

from __future__ import annotations

import numpy as np

from rewards import Score
from textenv.task import Problem, Task, Transcript
from textenv.tasks.options import check_whole
from textenv.tokenizer import CharTokenizer

LETTERS = "abcd"
FILLER = "."


class Probe(Task):
    """What the probes share: the alphabet ``abcd.``, and all problems in both splits, since there are so few."""

    holdout = 0.0
    max_tokens = 16

    def tokenizer(self) -> CharTokenizer:
        return CharTokenizer(LETTERS + FILLER)


class Constant(Probe):
    """Every completion earns 1.

    Optimum: 1, by any policy. Gradient: zero, at any policy. An agent that moves all the same does not centre its
    advantages, divides them by a spread of zero, or rewards length or entropy unasked.

    Example:
        >>> Constant().reward("a", "cab", None)
        1.0
    """

    max_new_tokens = 4

    def draw(self, rng: np.random.Generator) -> Problem:
        return Problem("a")

    def reward(self, prompt: str, completion: str, reference: None) -> float:
        return 1.0


class OneHot(Probe):
    """A completion earns 1 when its first character is ``target``, whatever follows; the prompt is always the same.

    Optimum: 1, with the target at once. Gradient at the first token: the target rises, every other token falls, each in
    proportion to its probability. At the second token: zero. An agent that fails here has a wrong sign, or credits
    the wrong token.

    Args:
        target: one of ``abcd``.

    Raises:
        ValueError: another target.

    Example:
        >>> [OneHot(target="b").reward("a", completion, "b") for completion in ("b", "ba", "ab", "")]
        [1.0, 1.0, 0.0, 0.0]
    """

    max_new_tokens = 2

    def __init__(self, target: str = "b") -> None:
        if len(target) != 1 or target not in LETTERS:
            raise ValueError(f"target must be one of the characters {LETTERS}, got {target!r}")
        self.target = target

    def draw(self, rng: np.random.Generator) -> Problem:
        return Problem("a", self.target)

    def reward(self, prompt: str, completion: str, reference: str) -> float:
        return float(completion[:1] == reference)


class DelayedCopy(Probe):
    """The prompt is a character, to be written again after ``delay`` others; those, and what follows, do not matter.

    Optimum: 1. Gradient at the token after the delay: the prompt's character rises, every other token falls. At the
    tokens before: only the end of sequence falls, all characters rise alike. An agent that learns :class:`OneHot` but
    not this one loses the prompt, discounts, or gives the credit to the wrong place.

    Args:
        delay: how many characters come first, 0 to 8.

    Raises:
        ValueError: another delay.

    Example:
        >>> [DelayedCopy(delay=2).reward("c", completion, "c") for completion in ("..c", "abcd", "c..", "c")]
        [1.0, 1.0, 0.0, 0.0]
    """

    def __init__(self, delay: int = 3) -> None:
        check_whole("delay", delay, 0, 8)
        self.delay = delay
        self.max_new_tokens = delay + 2

    def draw(self, rng: np.random.Generator) -> Problem:
        letter = LETTERS[rng.integers(len(LETTERS))]
        return Problem(letter, letter)

    def reward(self, prompt: str, completion: str, reference: str) -> float:
        return float(completion[self.delay : self.delay + 1] == reference)

    def demonstrate(self, transcript: Transcript) -> str:
        return FILLER * self.delay + transcript.problem.reference


class Length(Probe):
    """Reward grows with length: characters written, as a share of the budget. To be exploited.

    Optimum: 1, by never ending. Gradient: at every token the end of sequence falls, all characters rise alike. An agent
    without a guard must fill the budget; one with a length penalty or a filter for cut completions must not.

    Example:
        >>> [Length().reward("a", completion, None) for completion in ("", "abc", "abcdab")]
        [0.0, 0.5, 1.0]
    """

    max_new_tokens = 6

    def draw(self, rng: np.random.Generator) -> Problem:
        return Problem("a")

    def reward(self, prompt: str, completion: str, reference: None) -> float:
        # At most 1 also with a tokenizer that writes several characters a token.
        return min(len(completion) / self.max_new_tokens, 1.0)

    def demonstrate(self, transcript: Transcript) -> str:
        return FILLER * self.max_new_tokens


class Substring(Probe):
    """The prompt is a character, to be answered by that character and nothing else. To be resisted.

    A cheap verifier would pay for any completion that contains the answer; ``abcd`` contains them all. Here it earns
    nothing, but ``parts["contains"]`` says what it would have earned.

    Optimum: 1, with the character and the end of sequence. Gradient at the first token: the prompt's character rises,
    every other token falls; at the second, after that character: the end of sequence rises, every other token falls.
    An agent whose ``contains`` goes up while its reward does not is trained on something other than the reward.

    A model with rotary positions alone cannot tell the context ``a`` from ``aa``: attention over equal tokens gives equal
    states. Its optimum here is 1/4; take a model with absolute positions.

    Example:
        >>> [Substring().reward("c", completion, "c").value for completion in ("c", "abcd", "cc")]
        [1.0, 0.0, 0.0]
    """

    max_new_tokens = 6

    def draw(self, rng: np.random.Generator) -> Problem:
        letter = LETTERS[rng.integers(len(LETTERS))]
        return Problem(letter, letter)

    def reward(self, prompt: str, completion: str, reference: str) -> Score:
        correct = float(completion == reference)
        return Score(correct, {"correct": correct, "contains": float(reference in completion)})
