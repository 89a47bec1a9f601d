"""A price on long answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rewards.contract import Reward, Sample, Score, ungraded


class SoftOverlong(Reward):
    """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13): 0 up to ``max_tokens - buffer`` tokens, then falling
    evenly to -1 at ``max_tokens``, and -1 beyond.

    All tokens that the policy chose count, end tokens too. With ``buffer = max_tokens`` it is a plain length penalty,
    ``-n / max_tokens``. For use in a :class:`rewards.WeightedSum`: the part is ``length``, so it never counts as
    accuracy. The DAPO agent applies it by itself.

    A sample without ``tokens`` whose completion is not empty is ungraded.

    Args:
        max_tokens: L_max, the number of tokens from which the punishment is -1.
        buffer: L_c, over how many tokens it grows; DAPO takes a fifth of ``max_tokens``.

    Raises:
        ValueError: not ``0 < buffer <= max_tokens``.

    Example:
        >>> overlong = SoftOverlong(max_tokens=100, buffer=20)
        >>> [overlong([Sample(prompt="", completion="", tokens=(7,) * n)])[0].value for n in (80, 90, 100, 101)]
        [0.0, -0.5, -1.0, -1.0]
    """

    name = "soft_overlong"

    def __init__(self, max_tokens: int, buffer: float) -> None:
        if not (0 < buffer <= max_tokens < math.inf):
            raise ValueError(f"buffer must be above 0 and at most max_tokens, got {buffer=} and {max_tokens=}")
        self.max_tokens = max_tokens
        self.buffer = buffer

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> Score:
        if sample.completion and not sample.tokens:
            return ungraded("length is counted in the sample's tokens, and it has none")
        punishment = punish_length(len(sample.tokens), self.max_tokens, self.buffer)
        return Score(punishment, {"length": punishment})


def punish_length(tokens: int, max_tokens: int, buffer: float) -> float:
    """``(max_tokens - buffer - tokens) / buffer``, between -1 and 0.

    Example:
        >>> punish_length(9, max_tokens=10, buffer=2)
        -0.5
    """
    return min(max((max_tokens - buffer - tokens) / buffer, -1.0), 0.0)
