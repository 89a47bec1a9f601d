"""Whether RAFT++ leads early and GRPO late."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from agents.grpo import GRPO
from agents.raft import RAFT
from benchmarks.claims.base import Claim, Measured, Verdict, conclude, differences, mean, told
from benchmarks.claims.training import Arm, Scale, accuracy, curve, make

FULL = Scale(steps=400, problems=256)
POINTS = 11
FEWEST = Scale(steps=POINTS - 1, problems=8)
EARLY, LATE = slice(1, 3), slice(9, 11)
"""Looks at 10 and 20 % of the training, and at 90 and 100 %: chosen before any was run."""
SHARED = {"aggregation": "token_mean", "updates_per_batch": 2}
ARMS = {"grpo": Arm(GRPO, SHARED), "raft++": Arm(RAFT, {**SHARED, "variant": "raft++"})}


def experiment(seed: int, folder: Path, quick: bool = False) -> Measured:
    found: dict[str, float | list[float]] = {}
    for name, arm in ARMS.items():
        accuracies = curve(make(arm, folder / name, seed), FEWEST if quick else FULL, POINTS, accuracy)
        found[name] = accuracies
        found |= {f"{name} {when}": float(np.mean(accuracies[at])) for when, at in (("early", EARLY), ("late", LATE))}
    return found


def judge(measured: Sequence[Measured]) -> Verdict:
    early = differences(measured, "raft++ early", "grpo early")
    late = differences(measured, "grpo late", "raft++ late")
    sentence = (
        f"Early RAFT++ has {mean(measured, 'raft++ early'):.1%} and GRPO {mean(measured, 'grpo early'):.1%}, RAFT++'s lead "
        f"{told(early, '+.1f', 100)} points; late {mean(measured, 'raft++ late'):.1%} and {mean(measured, 'grpo late'):.1%}, "
        f"GRPO's lead {told(late, '+.1f', 100)}."
    )
    return conclude([late, early], sentence)


CLAIM = Claim(
    name="raft_early_grpo_late",
    statement="RAFT++ improves faster than GRPO early in training and is overtaken by it later.",
    source="Xiong et al. 2025, arXiv:2504.11343, section 3",
    protocol=f"Both from one start on textenv/Sort-v0, {FULL.steps} steps of 128 episodes, two updates a batch, token mean. "
    f"Accuracy sampled on {FULL.problems} held-out problems. Early is the mean at 10 and 20 % of the training, late that at 90 "
    "and 100 %. Decides: GRPO's lead late, and RAFT++'s early.",
    refuted_by="GRPO leads early, or RAFT++ late.",
    experiment=experiment,
    judge=judge,
)
