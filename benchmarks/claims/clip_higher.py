"""Whether a higher upper clip keeps entropy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from agents.grpo import GRPO
from benchmarks.claims.base import Claim, Measured, Verdict, conclude, differences, mean, told
from benchmarks.claims.training import Arm, Scale, accuracy, curve, entropy, make

FULL = Scale(steps=80, problems=256)
POINTS = 11
FEWEST = Scale(steps=POINTS - 1, problems=8)
LATE = slice(-2, None)
"""Looks at 90 and 100 % of the training."""
SHARED = {"aggregation": "token_mean", "updates_per_batch": 4}
ARMS = {
    "symmetric": Arm(GRPO, {**SHARED, "clip_high": 0.2}),
    "higher": Arm(GRPO, {**SHARED, "clip_high": 0.28}),
}


def experiment(seed: int, folder: Path, quick: bool = False) -> Measured:
    scale = FEWEST if quick else FULL
    found: dict[str, float | list[float]] = {}
    for name, arm in ARMS.items():
        agent = make(arm, folder / name, seed)
        entropies = curve(agent, scale, POINTS, entropy)
        found[f"{name} entropies"] = entropies
        found["entropy at the start"] = entropies[0]
        found[f"{name} entropy"] = float(np.mean(entropies[LATE]))
        found[f"{name} accuracy"] = accuracy(agent, scale.problems)
    return found


def judge(measured: Sequence[Measured]) -> Verdict:
    kept = differences(measured, "higher entropy", "symmetric entropy")
    right = differences(measured, "higher accuracy", "symmetric accuracy")
    sentence = (
        f"Entropy goes from {mean(measured, 'entropy at the start'):.3f} nats a token to "
        f"{mean(measured, 'symmetric entropy'):.3f} with 0.2 and {mean(measured, 'higher entropy'):.3f} with 0.28, which keeps "
        f"{told(kept)} more; its accuracy at the end, {mean(measured, 'higher accuracy'):.1%}, is "
        f"{told(right, '+.1f', 100)} points from the other's."
    )
    return conclude([kept], sentence)


CLAIM = Claim(
    name="clip_higher",
    statement="Raising the upper clip from 0.2 to 0.28 keeps the policy's entropy higher.",
    source="Yu et al. 2025 (DAPO), arXiv:2503.14476, section 3.1",
    protocol=f"GRPO with token mean from one start on textenv/Sort-v0, {FULL.steps} steps of 128 episodes, four updates a "
    "batch, clip 0.2/0.2 against 0.2/0.28. Entropy, exact over the vocabulary, of samples at temperature 1 on "
    f"{FULL.problems} held-out problems, the mean of looks at 90 and 100 % of the training. Decides: with the higher clip less "
    "with the symmetric one.",
    refuted_by="Entropy is lower with the higher clip.",
    experiment=experiment,
    judge=judge,
)
