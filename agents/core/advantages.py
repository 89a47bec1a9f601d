"""Advantages: how much better than expected an episode was. Pure functions of rewards.

Shapes: B episodes, N graded episodes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Normalise = Literal["group", "batch", "none"]


def group_advantages(reward_B: Tensor, group_B: Tensor, normalise: Normalise = "group", eps: float = 1e-6) -> Tensor:
    """Rewards less the mean of their group, divided by a standard deviation: ``(R - mean_g R) / (std_g R + eps)``.

    GRPO, arXiv:2402.03300, section 4.1.2; ``"none"`` is Dr. GRPO, arXiv:2503.20783. Standard deviations are unbiased.
    With ``"group"`` no advantage exceeds (G - 1) / sqrt(G) for a group of G, whatever its rewards.

    Args:
        reward_B: rewards, NaN for an ungraded episode: it leaves mean and deviation and gets 0.
        group_B: any integers; the episodes of one group share one and need not be neighbours.
        normalise: divide by the group's deviation, by that of the whole batch, or not at all.
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

    if normalise == "group":
        std_N = (_per_group(centred_N.square(), group_N, "sum") / (size_N - 1).clamp(min=1)).sqrt()
        result_N = centred_N / (std_N + eps / scale_N)
    elif normalise == "batch":
        largest = scale_N.max()
        std = (reward_N / largest).std() if len(reward_N) > 1 else 0.0
        result_N = centred_N * (scale_N / largest) / (std + eps / largest)
    elif normalise == "none":
        result_N = centred_N * scale_N
    else:
        raise ValueError(f"normalise must be 'group', 'batch' or 'none', got {normalise!r}")

    flat_N = spread_N <= size_N * torch.finfo(torch.float64).eps
    advantage_B[graded_B] = result_N.masked_fill(flat_N, 0.0).to(reward_B.dtype)
    return advantage_B


def _per_group(x_N: Tensor, group_N: Tensor, reduce: str) -> Tensor:
    """Each entry's group reduced: ``(N,)``."""
    groups = int(group_N.max()) + 1
    return x_N.new_zeros(groups).scatter_reduce(0, group_N, x_N, reduce, include_self=False)[group_N]
