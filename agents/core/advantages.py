"""Advantages: how much better than expected an episode was. Pure functions of rewards.

Shapes: B episodes, T tokens, N graded episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Normalise = Literal["group", "batch", "none"]


def group_advantages(
    reward_B: Tensor, group_B: Tensor, normalise: Normalise = "group", *, min_std: float = 0.0, eps: float = 1e-6
) -> Tensor:
    """Rewards less the mean of their group, divided by a standard deviation: ``(R - mean_g R) / (std_g R + eps)``.

    GRPO, arXiv:2402.03300, section 4.1.2; ``"none"`` is Dr. GRPO, arXiv:2503.20783. Standard deviations are unbiased.
    With ``"group"`` no advantage exceeds (G - 1) / sqrt(G) for a group of G, whatever its rewards.

    Args:
        reward_B: rewards, NaN for an ungraded episode: it leaves mean and deviation and gets 0.
        group_B: any integers; the episodes of one group share one and need not be neighbours.
        normalise: divide by the group's deviation, by that of the whole batch, or not at all.
        min_std: a group whose deviation is smaller gets 0.
        eps: added to the deviation, in units of reward.

    Returns:
        ``(B,)`` in the type of ``reward_B``. Exactly 0 in a group of one and in a group whose rewards differ by no more
        than the rounding of their mean.

    Raises:
        ValueError: a reward is infinite, or ``normalise`` is none of the three.
    """
    if reward_B.isinf().any():
        raise ValueError(f"rewards must be finite, or NaN for ungraded, got {reward_B[reward_B.isinf()].tolist()}")
    graded_B = ~reward_B.isnan()
    advantage_B = torch.zeros_like(reward_B)
    if not graded_B.any():
        return advantage_B
    reward_N = reward_B[graded_B].double()
    group_N = torch.unique(group_B[graded_B], return_inverse=True)[1]

    # In units of the group's largest reward, so that no square overflows or vanishes.
    scale_N = _per_group(reward_N.abs(), group_N, "amax").clamp(min=torch.finfo(torch.float64).tiny)
    scaled_N = reward_N / scale_N
    centred_N = scaled_N - _per_group(scaled_N, group_N, "mean")
    size_N = _per_group(torch.ones_like(reward_N), group_N, "sum")
    spread_N = _per_group(scaled_N, group_N, "amax") - _per_group(scaled_N, group_N, "amin")
    std_N = (_per_group(centred_N.square(), group_N, "sum") / (size_N - 1).clamp(min=1)).sqrt()

    if normalise == "group":
        result_N = centred_N / (std_N + eps / scale_N)
    elif normalise == "batch":
        largest = scale_N.max()
        std = (reward_N / largest).std() if len(reward_N) > 1 else 0.0
        result_N = centred_N * (scale_N / largest) / (std + eps / largest)
    elif normalise == "none":
        result_N = centred_N * scale_N
    else:
        raise ValueError(f"normalise must be 'group', 'batch' or 'none', got {normalise!r}")

    flat_N = (spread_N <= size_N * torch.finfo(torch.float64).eps) | (std_N < min_std / scale_N)
    advantage_B[graded_B] = result_N.masked_fill(flat_N, 0.0).to(reward_B.dtype)
    return advantage_B


def part_advantages(
    part_KB: Tensor,
    weights: Sequence[float],
    group_B: Tensor,
    normalise: Normalise = "group",
    *,
    min_std: float = 0.0,
    eps: float = 1e-6,
) -> Tensor:
    """Each part of a reward normalised by itself, then weighed: ``S / (std S + eps)``, ``S = sum_k w_k norm_g(R_k)``.

    GDPO, arXiv:2601.05242: the weights then say how much a part counts, and not its scale or how seldom it is earned. ``S``
    needs no centring, since every part is centred in its groups. Standard deviations are unbiased, the last over the batch.

    Args:
        part_KB: K parts of the rewards, ``(K, B)``, NaN where an episode is ungraded or its score lacks the part: it leaves
            that part's mean and deviation and gets 0 for it.
        weights: of the parts, K.
        group_B, normalise, min_std, eps: as in :func:`group_advantages`, for each part.

    Returns:
        ``(B,)`` in the type of ``part_KB``. Exactly 0 in a group in which no part differs.

    Raises:
        ValueError: see :func:`group_advantages`.

    Example:
        >>> part_KB = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0]])
        >>> part_advantages(part_KB, [1, 0.5], torch.zeros(4, dtype=torch.int64))
        tensor([ 0.3873, -0.3873,  1.1619, -1.1619])
    """
    sum_B = torch.zeros_like(part_KB[0])
    for part_B, weight in zip(part_KB, weights, strict=True):
        sum_B += weight * group_advantages(part_B, group_B, normalise, min_std=min_std, eps=eps)
    graded_B = ~part_KB.isnan().all(dim=0)
    return sum_B / (sum_B[graded_B].std() + eps) if graded_B.sum() > 1 else sum_B


def group_range(x_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest entry of each entry's group, ``(B,)`` each. NaN entries have no say in their group's."""
    group_B = torch.unique(group_B, return_inverse=True)[1]
    least_B = _per_group(x_B.nan_to_num(nan=torch.inf), group_B, "amin")
    return least_B, _per_group(x_B.nan_to_num(nan=-torch.inf), group_B, "amax")


def gae(
    reward_BT: Tensor, value_BT: Tensor, sampled_BT: Tensor, *, lam: float = 0.95, last_value_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates, undiscounted: ``A_t = delta_t + lam A_next``, ``delta_t = r_t + V_next - V_t``.

    arXiv:1506.02438, eq. 16, with gamma = 1. "Next" is the next token that the policy chose: tokens of prompts, replies and
    padding are skipped, so a reply costs nothing and its value is never read. After the last chosen token the advantage is
    0, and the value ``last_value_B``.

    Args:
        reward_BT: rewards at the sampled tokens.
        value_BT: value of the state before each sampled token was chosen.
        sampled_BT: bool, True where the policy chose the token.
        lam: 1 trusts the rewards that came, 0 the critic.
        last_value_B: value of the state that an episode was cut off in from outside; default 0, an episode that ended.

    Returns:
        ``advantage_BT`` and the critic's target ``return_BT = advantage_BT + value_BT``, both 0 where not sampled.

    Example:
        >>> r, v = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.3]])
        >>> gae(r, v, torch.ones(1, 3, dtype=torch.bool))[0]
        tensor([[0.4368, 0.5650, 0.7000]])
    """
    advantage_BT, return_BT = torch.zeros_like(reward_BT), torch.zeros_like(reward_BT)
    next_B = torch.zeros_like(reward_BT[:, 0])
    value_B = next_B if last_value_B is None else last_value_B.to(reward_BT.dtype)
    for t in reversed(range(reward_BT.shape[1])):
        sampled_B = sampled_BT[:, t]
        advantage_B = reward_BT[:, t] + value_B - value_BT[:, t] + lam * next_B
        next_B = torch.where(sampled_B, advantage_B, next_B)
        value_B = torch.where(sampled_B, value_BT[:, t], value_B)
        advantage_BT[:, t] = torch.where(sampled_B, advantage_B, 0.0)
        return_BT[:, t] = torch.where(sampled_B, advantage_B + value_BT[:, t], 0.0)
    return advantage_BT, return_BT


def whiten(x_BT: Tensor, sampled_BT: Tensor, eps: float = 1e-8) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` over the sampled tokens of the whole batch; 0 elsewhere.

    The variance is unbiased. With fewer than two sampled tokens, or without any spread, everything is 0.

    Example:
        >>> whiten(torch.tensor([[0.43675, 0.565, 0.7]]), torch.ones(1, 3, dtype=torch.bool))
        tensor([[-0.9913, -0.0171,  1.0084]])
    """
    x_N = x_BT[sampled_BT].double()
    if len(x_N) < 2 or x_N.min() == x_N.max():
        return torch.zeros_like(x_BT)
    white_N = (x_N - x_N.mean()) / (x_N.var() + eps).sqrt()
    return torch.zeros_like(x_BT).masked_scatter(sampled_BT, white_N.to(x_BT.dtype))


def _per_group(x_N: Tensor, group_N: Tensor, reduce: str) -> Tensor:
    """Each entry's group reduced: ``(N,)``."""
    groups = int(group_N.max()) + 1
    return x_N.new_zeros(groups).scatter_reduce(0, group_N, x_N, reduce, include_self=False)[group_N]
