"""What an engine is: prompts and a sampling in, completions with their behaviour log-probabilities out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from agents.core.policy import Policy
from textenv.task import Finish


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn. Nothing else has a say: a model's own ``generation_config`` is never read.

    Raises:
        ValueError: a field is out of its range.
    """

    max_new_tokens: int
    """budget of one completion, in tokens, its end token included"""
    temperature: float = 1.0
    """divides the logits; 0 takes the likeliest token, with its log-probability at temperature 1"""
    top_k: int = 0
    """keep the k likeliest tokens, 0 all. For evaluation: log-probabilities become those of the cut distribution"""
    top_p: float = 1.0
    """keep the likeliest tokens until their probabilities reach this sum, 1 all. For evaluation, as top_k"""
    min_p: float = 0.0
    """keep the tokens at least this share as likely as the likeliest, 0 all. For evaluation, as top_k"""
    stop_ids: tuple[int, ...] = ()
    """ids that end a completion beside the tokenizer's end-of-sequence ids"""
    stop_texts: tuple[str, ...] = ()
    """texts that end a completion with the token that completes one of them, as the tokenizer decodes it"""
    seed: int | tuple[int, ...] = 0
    """of the draws; a completion's draws depend on this and its row, not on what else is in the batch"""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < np.inf:
            raise ValueError(f"temperature must be 0 (greedy) or a finite positive number, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or a positive number of tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], 1 being off, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], 0 being off, got {self.min_p}")
        if isinstance(self.stop_texts, str) or not all(self.stop_texts):
            raise ValueError(f"stop_texts must be a tuple of texts, none of them empty, got {self.stop_texts!r}")


@dataclass
class Completions:
    """What an engine wrote: one entry a completion, the n completions of a prompt beside each other."""

    tokens: list[np.ndarray]
    """int64 ids, the end token included"""
    logprobs: list[np.ndarray]
    """float32 log-probability of each token in the distribution it was drawn from"""
    finish: list[Finish]
    """EOS, STOP or LENGTH"""


OnEnd = Callable[[int, np.ndarray], None]


class EngineError(RuntimeError):
    """An engine that can no longer be used: it has to be restarted before it generates again."""


class Engine(ABC):
    """Generates completions for a policy.

    Attributes:
        policy: whose weights it holds.
        version: that policy's when it was taken (:attr:`agents.core.policy.Policy.version`).
        keep_contexts: True while contexts are to go on in a later call, as they do over several turns: an engine may then keep
            what it computed of them, until :meth:`release`.
    """

    policy: Policy
    version: int = 0
    keep_contexts: bool = False

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        budgets: Sequence[int] | None = None,
        on_end: OnEnd | None = None,
    ) -> Completions:
        """Write n completions a prompt.

        Args:
            prompts: the ids of each prompt, none empty.
            sampling: how to draw.
            n: completions a prompt.
            budgets: most new tokens of each completion, ``len(prompts) * n`` of them, each at least 1; for rows that
                have less room than ``sampling.max_new_tokens``.
            on_end: called with the number of a completion and its tokens as soon as it has ended; the others go on after.

        Raises:
            ValueError: a prompt is empty, or a completion would outgrow the model's context.
            EngineError: the engine died; :meth:`restart` may bring it back.
        """

    @abstractmethod
    def sync(self, policy: Policy) -> None:
        """Generate with this policy's weights from now on.

        Raises:
            EngineError: the weights did not arrive.
        """

    def plan(self, rows: int, places: int) -> str | None:
        """What writing ``rows`` completions of up to ``places`` tokens, prompts included, will take, in words; None if unknown.

        Raises:
            ValueError: it cannot be done.
        """
        return None

    def memory_needed(self, rows: int, places: int) -> int:
        """Bytes that writing ``rows`` completions of up to ``places`` tokens takes in this process and gives back after it.

        Raises:
            ValueError: it cannot be done.
        """
        return 0

    def release(self) -> None:  # noqa: B027 - an engine without such memory has nothing to do
        """Give back the memory that only generation needs. The next :meth:`generate` takes it again."""

    def restart(self, policy: Policy) -> None:
        """Begin anew, with this policy's weights, after an :class:`EngineError`."""
        self.sync(policy)

    def close(self) -> None:  # noqa: B027 - an engine that starts nothing has nothing to end
        """End all that the engine started. It generates no more."""


def check_budgets(
    prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, budgets: Sequence[int] | None, max_context: int | None
) -> np.ndarray:
    """Most new tokens of each completion ``(B,)``, checked against the prompts and the model's context.

    Arguments as in :meth:`Engine.generate`.

    Raises:
        ValueError: see there.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1 completion a prompt, got {n}")
    if not prompts or not all(map(len, prompts)):
        raise ValueError(
            "every prompt must hold at least one token; add a system message or a beginning-of-sequence token"
        )
    length_B = np.repeat([len(prompt) for prompt in prompts], n)
    budget_B = np.full(len(length_B), sampling.max_new_tokens)
    if budgets is not None:
        if len(budgets) != len(length_B) or min(budgets) < 1:
            raise ValueError(f"budgets must be {len(length_B)} numbers of at least 1, one a completion, got {budgets}")
        budget_B = np.minimum(budget_B, budgets)
    over_B = length_B + budget_B - (max_context or np.inf)
    if (over_B > 0).any():
        row = int(over_B.argmax())
        raise ValueError(
            f"a prompt of {length_B[row]} tokens and {budget_B[row]} new ones exceed the model's context of "
            f"{max_context}; shorten the prompt or lower max_new_tokens"
        )
    return budget_B
