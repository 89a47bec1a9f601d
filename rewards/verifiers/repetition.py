"""A price on repeating oneself."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rewards.contract import Reward, Sample, Score, ungraded


class Repetition(Reward):
    """``max_penalty · (1 - distinct n-grams / n-grams)`` over the token ids that the policy chose; at most 0.

    0 if no n-gram occurs twice, close to ``max_penalty`` for one token over and over, and 0 for fewer than n tokens. The
    formula is that of Demystifying Long Chain-of-Thought (Yeo et al., arXiv:2502.03373) as implemented in TRL. For use in
    a :class:`rewards.WeightedSum`: the part is ``repetition``, the share of repeated n-grams, so it never counts as
    accuracy. In an episode of several turns n-grams run on from one to the next.

    A sample without ``tokens`` whose completion is not empty is ungraded.

    Args:
        ngram: n, at least 1.
        max_penalty: value for nothing but repetition, at most 0.

    Raises:
        ValueError: either is out of range.

    Example:
        >>> stutter = Sample(prompt="", completion="ha ha ha ha ha", tokens=(5, 5, 5, 5, 5))
        >>> Repetition(ngram=2)([stutter])[0].value
        -0.75
    """

    name = "repetition"

    def __init__(self, ngram: int = 3, max_penalty: float = -1.0) -> None:
        if not (isinstance(ngram, int) and ngram >= 1):
            raise ValueError(f"ngram must be an integer of at least 1, got {ngram!r}")
        if not (math.isfinite(max_penalty) and max_penalty <= 0):
            raise ValueError(f"max_penalty must be a finite number of at most 0, got {max_penalty!r}")
        self.ngram = ngram
        self.max_penalty = max_penalty

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> Score:
        if sample.completion and not sample.tokens:
            return ungraded("repetition is counted over the sample's tokens, and it has none")
        share = repeated_share(sample.tokens, self.ngram)
        return Score(self.max_penalty * share, {"repetition": share})


def repeated_share(tokens: Sequence[int], n: int) -> float:
    """``1 - distinct n-grams / n-grams``; 0 where there are none.

    Example:
        >>> repeated_share([1, 2, 1, 2, 1], 2)
        0.5
    """
    ngrams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
