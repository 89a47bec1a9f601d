"""Whether the start overtakes the trained policy when both may try often."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from agents.grpo import GRPO
from benchmarks.claims.base import Claim, Measured, Verdict, conclude, differences, mean, told
from benchmarks.claims.training import QUICK, Arm, Scale, make, right_counts, train
from benchmarks.statistics import pass_at_k

FULL = Scale(steps=100, problems=64, samples=128)
ARM = Arm(GRPO, {"aggregation": "token_mean"})


def experiment(seed: int, folder: Path, quick: bool = False) -> Measured:
    scale = QUICK if quick else FULL
    agent = make(ARM, folder / "grpo", seed)
    start_P = right_counts(agent, scale.problems, scale.samples)
    train(agent, scale.steps)
    trained_P = right_counts(agent, scale.problems, scale.samples)
    samples_P = np.full(scale.problems, scale.samples)
    ks = [2**i for i in range(scale.samples.bit_length() - 1)]
    curves = {
        name: [float(pass_at_k(samples_P, right_P, k).mean()) for k in ks]
        for name, right_P in (("start", start_P), ("trained", trained_P))
    }
    ends = {f"{name} pass@{end}": curve[i] for name, curve in curves.items() for end, i in (("1", 0), ("most", -1))}
    return {"k": [float(k) for k in ks], **curves, **ends}


def judge(measured: Sequence[Measured]) -> Verdict:
    overtakes = differences(measured, "start pass@most", "trained pass@most")
    gains = differences(measured, "trained pass@1", "start pass@1")
    ks = measured[0]["k"]
    assert isinstance(ks, list)
    most = f"{ks[-1]:.0f}"
    sentence = (
        f"Pass@1 goes from {mean(measured, 'start pass@1'):.1%} to {mean(measured, 'trained pass@1'):.1%}; at k = {most} the "
        f"start has {mean(measured, 'start pass@most'):.1%} and the trained policy "
        f"{mean(measured, 'trained pass@most'):.1%}: start less trained {told(overtakes, '+.1f', 100)} points."
    )
    return conclude([overtakes, gains], sentence)


CLAIM = Claim(
    name="pass_at_k",
    statement="Reinforcement raises pass@1, but at large k the start solves more problems than the trained policy.",
    source="Yue et al. 2025, arXiv:2504.13837, section 3",
    protocol=f"GRPO for {FULL.steps} steps of 128 episodes on textenv/Sort-v0. Start and trained policy write {FULL.samples} "
    f"completions at temperature 1 for each of {FULL.problems} held-out problems; pass@k unbiased up to k = "
    f"{FULL.samples // 2}. Decides: pass@{FULL.samples // 2} of the start less that of the trained policy, "
    "provided that pass@1 has risen.",
    refuted_by="The trained policy's pass@k is above the start's at the largest k.",
    experiment=experiment,
    judge=judge,
)
