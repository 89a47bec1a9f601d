"""Tabular tasks: so small that every completion can be listed, and every expectation is an exact sum.

What agents estimate from samples is computed here in float64, to hold their estimators against. A policy is a table of
logits, one row a state. A state is what has been written so far; a completion ends with token 0, the end of
sequence, or by filling the horizon, as the environment ends it.

Shapes: C completions, S states, V vocabulary.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from textenv.task import Problem, Task, Transcript
from textenv.tasks.options import check_whole
from textenv.tokenizer import CharTokenizer

EOS = 0
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LARGEST_TREE = 1024

Tokens = tuple[int, ...]


def list_states(vocab: int, horizon: int) -> list[Tokens]:
    """All states, shortest first; the first is the empty one. Its place in the list is a state's index.

    Example:
        >>> list_states(vocab=3, horizon=2)
        [(), (1,), (2,)]
    """
    return [state for length in range(horizon) for state in product(range(1, vocab), repeat=length)]


def list_completions(vocab: int, horizon: int) -> list[Tokens]:
    """All completions: each state ended, then those that fill the horizon.

    Example:
        >>> list_completions(vocab=2, horizon=2)
        [(0,), (1, 0), (1, 1)]
    """
    ended = [(*state, EOS) for state in list_states(vocab, horizon)]
    return ended + list(product(range(1, vocab), repeat=horizon))


def list_choices(vocab: int, horizon: int) -> np.ndarray:
    """Which completion chooses which token in which state: ``(C, S, V)``, 1.0 or 0.0.

    Example:
        >>> list_choices(vocab=2, horizon=2)[1]  # (1, 0): token 1 in the first state, then token 0 in the second
        array([[0., 1.],
               [1., 0.]])
    """
    index = {state: s for s, state in enumerate(list_states(vocab, horizon))}
    completions = list_completions(vocab, horizon)
    choice_CSV = np.zeros((len(completions), len(index), vocab))
    for c, completion in enumerate(completions):
        for t, token in enumerate(completion):
            choice_CSV[c, index[completion[:t]], token] = 1.0
    return choice_CSV


def log_softmax(logits_SV: np.ndarray) -> np.ndarray:
    """The log-probability of each token in each state, ``(S, V)``."""
    return logits_SV - np.logaddexp.reduce(logits_SV, axis=-1, keepdims=True)


def log_probability(logits_SV: np.ndarray, choice_CSV: np.ndarray) -> np.ndarray:
    """The log-probability of each completion, ``(C,)``.

    Example:
        >>> np.exp(log_probability(np.zeros((2, 2)), list_choices(vocab=2, horizon=2))).round(6)
        array([0.5 , 0.25, 0.25])
    """
    return np.einsum("csv,sv->c", choice_CSV, log_softmax(logits_SV))


def expected_return(logits_SV: np.ndarray, choice_CSV: np.ndarray, return_C: np.ndarray) -> float:
    """E[R] of the policy, where a completion returns ``return_C``.

    Example:
        >>> expected_return(np.zeros((2, 2)), list_choices(vocab=2, horizon=2), np.array([1.0, 0.0, 0.5]))
        0.625
    """
    return float(np.exp(log_probability(logits_SV, choice_CSV)) @ return_C)


def policy_gradient(logits_SV: np.ndarray, choice_CSV: np.ndarray, return_C: np.ndarray) -> np.ndarray:
    """The gradient of :func:`expected_return` with respect to the logits, ``(S, V)``.

    It is the sum of p(c) R(c) ∇ log p(c) over the completions, where ∇ log p(c) is, in each state that c passes, its
    choice less the policy.

    Example:
        >>> policy_gradient(np.zeros((1, 2)), list_choices(vocab=2, horizon=1), np.array([0.0, 1.0]))
        array([[-0.25,  0.25]])
    """
    weight_C = np.exp(log_probability(logits_SV, choice_CSV)) * return_C
    chosen_SV = np.einsum("c,csv->sv", weight_C, choice_CSV)
    return chosen_SV - chosen_SV.sum(axis=1, keepdims=True) * np.exp(log_softmax(logits_SV))


class Tabular(Task):
    """Every completion has a return of its own, drawn at random: uniform, then scaled so that the best is 1.

    The prompt is always ``a``; tokens are the end of sequence and the first letters of the alphabet. The optimum is 1,
    by always writing the best completion. Expectations under any policy: :func:`expected_return` and
    :func:`policy_gradient` with ``choice_CSV`` and ``return_C``.

    Args:
        vocab: V, the end of sequence included, at least 2.
        horizon: tokens of a completion at most, the end of sequence included.
        table_seed: which table of returns.

    Attributes:
        states: S tuples of tokens: what may stand before a choice. Rows of a policy's ``logits_SV``.
        completions: C tuples of tokens.
        choice_CSV: float64, see :func:`list_choices`.
        return_C: float64, the return of each completion, from 0 to 1.

    Raises:
        ValueError: an option out of its range, or more than about a thousand completions.

    Example:
        >>> task = Tabular(vocab=3, horizon=2)
        >>> task.completions
        [(0,), (1, 0), (2, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
        >>> task.return_C.round(3)
        array([1.   , 0.168, 0.96 , 0.47 , 0.607, 0.077, 0.937])
    """

    holdout = 0.0

    def __init__(self, vocab: int = 3, horizon: int = 3, table_seed: int = 0) -> None:
        check_whole("vocab", vocab, 2, len(LETTERS) + 1)
        check_whole("horizon", horizon, 1, LARGEST_TREE)
        if vocab**horizon > LARGEST_TREE:
            raise ValueError(f"vocab**horizon must be at most {LARGEST_TREE}, got {vocab}**{horizon}")
        self.vocab = vocab
        self.max_new_tokens = horizon
        self.max_tokens = 1 + horizon
        self.states = list_states(vocab, horizon)
        self.completions = list_completions(vocab, horizon)
        self.choice_CSV = list_choices(vocab, horizon)
        table_C = np.random.default_rng([table_seed, vocab, horizon]).random(len(self.completions))
        self.return_C = table_C / table_C.max()
        # Which of the two ways a completion ended shows in its length, so its text says which one it is.
        texts = [self._text(completion) for completion in self.completions]
        self._return = dict(zip(texts, self.return_C.tolist(), strict=True))

    def _text(self, completion: Tokens) -> str:
        return self.tokenizer().decode([token for token in completion if token != EOS])

    def tokenizer(self) -> CharTokenizer:
        return CharTokenizer(LETTERS[: self.vocab - 1])

    def draw(self, rng: np.random.Generator) -> Problem:
        return Problem(LETTERS[0])

    def reward(self, prompt: str, completion: str, reference: None) -> float:
        return self._return[completion]

    def demonstrate(self, transcript: Transcript) -> str:
        return max(self._return, key=self._return.__getitem__)
