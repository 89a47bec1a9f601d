"""Whether the token view and the sequence view give one gradient in expectation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from agents.core.advantages import gae
from benchmarks.claims.base import Claim, Measured, Verdict, conclude, differences, mean
from benchmarks.estimators import Batches, every_batch, expected_step, fresh_loss, random_world

TOLERANCE = 1e-9
"""Largest relative difference that counts as rounding."""


def experiment(seed: int, folder: Path, quick: bool = False) -> Measured:
    world = random_world(seed, vocab=3, horizon=2 if quick else 5, table_seed=seed)
    one = every_batch([world], 1)
    sequence = expected_step(one, sequence_loss(one))
    critic_RT = torch.tensor(np.random.default_rng(seed).normal(size=len(world.task.states)))[one.state_RT]
    found: dict[str, float | list[float]] = {"completions": float(len(world.task.completions))}
    for name, lam in (("difference", 1.0), ("difference with lambda 0.95", 0.95)):
        advantage_RT, _ = gae(one.reward_RT, critic_RT, one.sampled_RT, lam=lam)
        token = expected_step(one, fresh_loss(one, advantage_RT))
        found[name] = float(np.abs(token - sequence).max() / np.abs(sequence).max())
    return {**found, "room": TOLERANCE - float(found["difference"])}  # type: ignore[arg-type]


def sequence_loss(one: Batches) -> torch.Tensor:
    """One action a completion: its ratio times its return, laid on its first token."""
    logp_R = torch.where(one.sampled_RT, one.logp_RT, 0.0).sum(dim=1)
    loss_RT = torch.zeros_like(one.logp_RT)
    loss_RT[:, 0] = -(logp_R - logp_R.detach()).exp() * one.return_R
    return loss_RT


def judge(measured: Sequence[Measured]) -> Verdict:
    difference = differences(measured, "difference")
    sentence = (
        f"Over all {mean(measured, 'completions'):.0f} completions the two expected gradients differ by "
        f"{mean(measured, 'difference'):.0e} of the largest entry with lambda 1; with lambda 0.95 and the same critic by "
        f"{mean(measured, 'difference with lambda 0.95'):.0%}."
    )
    return replace(conclude([differences(measured, "room")], sentence), interval=difference.difference)


CLAIM = Claim(
    name="views_agree",
    statement="Taking each token as an action, or the whole completion as one, gives the same policy gradient in expectation.",
    source="Ahmadian et al. 2024, arXiv:2402.14740, section 3",
    protocol="A random policy on textenv/Tabular-v0 with a table of its own for each seed. The expected step of both losses is "
    "summed over every completion with its probability, in float64, by the project's own functions: the ratio of the whole "
    "completion times its return, and the clipped surrogate of each token with GAE at lambda 1 and a random critic. Decides: "
    f"their largest difference, relative to the largest entry, against {TOLERANCE:g}.",
    refuted_by="The difference is above what rounding explains.",
    experiment=experiment,
    judge=judge,
)
