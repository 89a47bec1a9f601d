"""Losses per token, and the ways to average them. Pure functions; everything returned is to be minimised.

Shapes: B episodes, T tokens. A micro-batch is some rows of an update batch. Its share of the loss is divided by the
whole batch's denominators, so the shares of any split sum to the same loss and the same gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


@dataclass(frozen=True)
class Denominators:
    """What losses are divided by, counted over a whole update batch."""

    tokens: int
    """sampled tokens"""
    sequences: int
    """rows with at least one sampled token"""
    max_new_tokens: int
    """most tokens that a sequence could have, a constant of the task"""


def count_denominators(sampled_BT: Tensor, max_new_tokens: int) -> Denominators:
    """Count the denominators of a whole update batch, before it is split.

    Rows without a sampled token do not count as sequences. A batch without any counts as one, so that its loss is 0.
    """
    tokens, sequences = int(sampled_BT.sum()), int(sampled_BT.any(dim=1).sum())
    return Denominators(max(tokens, 1), max(sequences, 1), max_new_tokens)


def aggregate(x_BT: Tensor, sampled_BT: Tensor, mode: Aggregation, denominators: Denominators) -> Tensor:
    """Average per-token terms over the sampled tokens: a micro-batch's share, a scalar.

    With n_i sampled tokens in row i, N tokens and S sequences in the whole batch: ``token_mean`` is sum / N (DAPO,
    arXiv:2503.14476, eq. 8; PPO), ``sequence_mean`` is sum_i (sum_t x_it / n_i) / S (GRPO, arXiv:2402.03300, eq. 3),
    ``sequence_sum`` is sum / S (the policy gradient of a terminal reward), ``constant`` is sum / (S · max_new_tokens)
    (Dr. GRPO, arXiv:2503.20783).

    Args:
        x_BT: terms of the micro-batch; entries where nothing was sampled may hold anything.
        sampled_BT: bool, True where the policy chose the token.
        mode: which average.
        denominators: of the whole update batch.

    Raises:
        ValueError: there is no such mode.
    """
    kept_BT = torch.where(sampled_BT, x_BT, 0.0)
    if mode == "token_mean":
        return kept_BT.sum() / denominators.tokens
    if mode == "sequence_mean":
        return (kept_BT.sum(dim=1) / sampled_BT.sum(dim=1).clamp(min=1)).sum() / denominators.sequences
    if mode == "sequence_sum":
        return kept_BT.sum() / denominators.sequences
    if mode == "constant":
        return kept_BT.sum() / (denominators.sequences * denominators.max_new_tokens)
    raise ValueError(f"mode must be 'token_mean', 'sequence_mean', 'sequence_sum' or 'constant', got {mode!r}")


def clipped_surrogate(
    logp_BT: Tensor, old_BT: Tensor, advantage: Tensor, low: float, high: float, ratio_max: float | None = None
) -> Tensor:
    """PPO's clipped surrogate at each token: ``max(-r A, -clip(r, 1 - low, 1 + high) A)`` with r = exp(logp - old).

    PPO, arXiv:1707.06347, eq. 7; ``high`` above ``low`` is DAPO's clip-higher, arXiv:2503.14476, eq. 10. The clip is
    one-sided: it only takes away the gradient that would move r further out, so where A < 0 the loss grows with r without
    end, unless ``ratio_max`` caps r there (INTELLECT-2, arXiv:2505.07291; the same as the dual clip of
    arXiv:1912.09729). Log ratios are clamped to ±20 first.

    Args:
        logp_BT: log-probabilities under the current policy, differentiable.
        old_BT: under the policy that the update started from.
        advantage: ``(B,)``, or ``(B, T)`` and finite also where nothing was sampled.
        low, high: how far the ratio may fall below and rise above 1.
        ratio_max: largest ratio of a token with negative advantage, above ``1 + high``; beyond it the gradient is 0.

    Returns:
        ``(B, T)``. Where no token was sampled it means nothing and is for :func:`aggregate` to leave out.
    """
    ratio_BT, advantage_BT = token_ratio(logp_BT, old_BT), _per_token(advantage)
    loss_BT = torch.maximum(-ratio_BT * advantage_BT, -ratio_BT.clamp(1 - low, 1 + high) * advantage_BT)
    if ratio_max is None:
        return loss_BT
    return torch.where(advantage_BT < 0, torch.minimum(loss_BT, -ratio_max * advantage_BT), loss_BT)


def value_loss(value_BT: Tensor, old_value_BT: Tensor, return_BT: Tensor, clip: float | None) -> Tensor:
    """Half the squared error of the critic at each token: ``max((V - ret)², (clip(V, V_old ± clip) - ret)²) / 2``.

    The clipped form of the first PPO implementations, compared in arXiv:2006.05990.

    Args:
        value_BT: values under the current critic, differentiable.
        old_value_BT: before the first update on the batch.
        return_BT: what they should be. All three finite also where nothing was sampled.
        clip: in units of reward; None does not clip.

    Returns:
        ``(B, T)``. Where no token was sampled it means nothing.
    """
    loss_BT = (value_BT - return_BT).square()
    if clip is not None:
        near_BT = old_value_BT + (value_BT - old_value_BT).clamp(-clip, clip)
        loss_BT = torch.maximum(loss_BT, (near_BT - return_BT).square())
    return loss_BT / 2


@torch.no_grad()
def clip_fractions(
    logp_BT: Tensor,
    old_BT: Tensor,
    advantage: Tensor,
    sampled_BT: Tensor,
    low: float,
    high: float,
    denominators: Denominators,
) -> tuple[Tensor, Tensor]:
    """Shares of the batch's sampled tokens where the clip binds: A < 0 and r < 1 - low; A > 0 and r > 1 + high.

    Arguments as in :func:`clipped_surrogate`. The shares of the micro-batches of one batch sum to the batch's.
    """
    ratio_BT, advantage_BT = token_ratio(logp_BT, old_BT), _per_token(advantage)
    low_BT = sampled_BT & (advantage_BT < 0) & (ratio_BT < 1 - low)
    high_BT = sampled_BT & (advantage_BT > 0) & (ratio_BT > 1 + high)
    return low_BT.sum() / denominators.tokens, high_BT.sum() / denominators.tokens


def token_ratio(logp_BT: Tensor, old_BT: Tensor) -> Tensor:
    """``exp(logp - old)``, the log ratio clamped to ±20, wide enough never to touch a normal one."""
    return (logp_BT - old_BT).clamp(-20, 20).exp()


def _per_token(advantage: Tensor) -> Tensor:
    return advantage.unsqueeze(1) if advantage.dim() == 1 else advantage
