"""Losses of reward models. Pure functions; everything returned is to be minimised.

Shapes: N answers, P pairs of answers to one prompt, T tokens, V vocabulary. Scores are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid


def bradley_terry(
    better_P: Tensor, worse_P: Tensor, margin_P: Tensor | float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """``-(1 - e) log sigmoid(d) - e log sigmoid(-d)`` of each pair, d = better - worse - margin.

    The Bradley-Terry model of preference, as InstructGPT fits it (arXiv:2203.02155, eq. 1), with the margin of Llama 2
    (arXiv:2307.09288, eq. 2). Smoothing takes a share e of the labels to be flipped (the conservative loss of Mitchell's
    note on DPO with noisy preferences).

    Args:
        better_P, worse_P: scores of the preferred answers and of the others.
        margin_P: by how much the better should win, in units of the score.
        label_smoothing: e, from 0 to below 0.5.

    Returns:
        ``(P,)``.

    Example:
        >>> round(bradley_terry(torch.tensor([1.2]), torch.tensor([0.3])).item(), 6)
        0.341154
    """
    assert better_P.shape == worse_P.shape, (better_P.shape, worse_P.shape)
    d_P = better_P - worse_P - margin_P
    return -(1 - label_smoothing) * logsigmoid(d_P) - label_smoothing * logsigmoid(-d_P)


def centring(better_P: Tensor, worse_P: Tensor) -> Tensor:
    """``(better + worse)²`` of each pair: holds scores, of which only differences are learned, around 0.

    Eisenstein et al., arXiv:2312.09244, eq. 2. To be weighted by a small number such as 0.01.
    """
    return (better_P + worse_P).square()


def ranked_pairs(sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of the answers to each prompt, and the weight that averages them over the prompt.

    With K answers a prompt has K(K-1)/2 pairs, which weigh 1 together (InstructGPT, arXiv:2203.02155, eq. 1): the sum of
    weighted losses over the number of prompts is the mean over prompts of the mean over pairs. Each answer is scored once,
    however many pairs it is in.

    Args:
        sizes: answers of each prompt. The answers stand prompt after prompt, each prompt's best first.

    Returns:
        positions of the better and of the worse answers, and the weights, each ``(P,)``.

    Example:
        >>> better_P, worse_P, weight_P = ranked_pairs([3])
        >>> better_P.tolist(), worse_P.tolist(), round(weight_P.sum().item(), 6)
        ([0, 0, 1], [1, 2, 2], 1.0)
    """
    better, worse, weight = [], [], []
    start = 0
    for size in sizes:
        pairs = list(combinations(range(start, start + size), 2))
        better += [first for first, _ in pairs]
        worse += [second for _, second in pairs]
        weight += [1 / len(pairs)] * len(pairs)
        start += size
    return torch.tensor(better), torch.tensor(worse), torch.tensor(weight)


def squared_error(score_N: Tensor, rating_N: Tensor) -> Tensor:
    """``(score - rating)²`` of each answer; ratings normalised to mean 0 and deviation 1 first."""
    assert score_N.shape == rating_N.shape, (score_N.shape, rating_N.shape)
    return (score_N - rating_N).square()


def answer_nll(logits_TV: Tensor, answer_T: Tensor) -> Tensor:
    """The mean of ``-log p(token)`` over an answer, a scalar: keeps the features of the language model in the trunk.

    A regulariser for a trunk that carries both heads (Yang et al., arXiv:2406.10216, section 3.2), on the preferred answer.

    Args:
        logits_TV: of each token of the answer, from the state before it.
        answer_T: the tokens, the end token included.
    """
    return cross_entropy(logits_TV.float(), answer_T)
