"""Kullback-Leibler divergence to a reference, estimated token by token on what the policy sampled.

Shapes: B episodes, T tokens.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logp_BT: Tensor, ref_BT: Tensor, estimator: Estimator) -> Tensor:
    """KL(policy || reference) in nats at each sampled token. Schulman, "Approximating KL Divergence", 2020.

    With ``d = logp - ref``, clamped to ±20: k1 = d; k2 = d²/2; k3 = exp(-d) - 1 + d, in turn clamped to at most 10
    (verl's clamps). All three estimate the same number, k1 and k3 without bias, k3 never negative, but their gradients
    differ. As a term of the loss on fresh samples k1 has zero expected gradient, k2 that of KL(policy || reference), k3
    that of KL(reference || policy). In the reward use k1. Beyond a clamp the gradient is 0.

    Args:
        logp_BT: log-probabilities of the tokens under the policy.
        ref_BT: under the reference.
        estimator: which of the three.

    Returns:
        ``(B, T)``. Where no token was sampled it means nothing and is for :func:`agents.core.losses.aggregate` to leave
        out.

    Raises:
        ValueError: there is no such estimator.
    """
    difference_BT = (logp_BT - ref_BT).clamp(-20, 20)
    if estimator == "k1":
        return difference_BT
    if estimator == "k2":
        return difference_BT.square() / 2
    if estimator == "k3":
        return ((-difference_BT).exp() - 1 + difference_BT).clamp(max=10)
    raise ValueError(f"estimator must be 'k1', 'k2' or 'k3', got {estimator!r}")


def adapt_penalty_coef(coef: float, kl: float, target: float) -> float:
    """The weight of PPO's KL penalty for the next batch: halved below ``target / 1.5``, doubled above ``1.5 target``.

    arXiv:1707.06347, section 4. The KL is that of one batch's updates, KL(old || new), not that to a reference.

    Args:
        coef: of this batch.
        kl: measured on it, in nats a token.
        target: wanted, in the same unit.
    """
    if kl < target / 1.5:
        return coef / 2
    return coef * 2 if kl > 1.5 * target else coef


def adapt_kl_coef(coef: float, kl: float, target: float, episodes: int, horizon: int = 10_000) -> float:
    """The KL coefficient for the next batch: ``coef (1 + clip(kl / target - 1, -0.2, 0.2) episodes / horizon)``.

    Ziegler et al., arXiv:1909.08593, section 2.2.

    Args:
        coef: of this batch.
        kl: measured on it, in nats a sequence: the mean over episodes of the k1 estimate summed over tokens.
        target: wanted, in the same unit.
        episodes: in the batch.
        horizon: episodes over which a KL that is 20 % too large raises the coefficient e^0.2-fold.

    Example:
        >>> round(adapt_kl_coef(0.2, kl=7.0, target=5.0, episodes=50, horizon=1000), 6)
        0.202
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * episodes / horizon)
