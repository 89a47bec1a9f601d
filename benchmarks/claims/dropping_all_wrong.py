"""Whether GRPO gains by dropping groups that are all wrong, rather than by dividing by the standard deviation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import torch

from agents.core.advantages import group_range
from agents.core.policy_gradient import GroupConfig, PolicyGradient, policy_loss
from agents.core.training import Callback
from agents.core.trajectories import Trajectories, summary
from agents.grpo import GRPO
from agents.raft import RAFT
from benchmarks.claims.base import Claim, Measured, Verdict, conclude, differences, mean, told
from benchmarks.claims.training import QUICK, Arm, Scale, accuracy, make, train

FULL = Scale(steps=60, problems=512)


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig(GroupConfig):
    """Settings of plain REINFORCE."""

    drop_all_wrong: bool = False
    """Leave groups without a right answer out of the gradient."""


class Reinforce(PolicyGradient):
    """REINFORCE without a baseline: 1 for a right answer and -1 for a wrong one, which is what the claim started from."""

    name = "reinforce"
    config_class = ReinforceConfig
    config: ReinforceConfig

    def learn(self, total_episodes: int | None = None, callback: Callback | None = None) -> Self:
        config = self.config
        rollout = self.rollout()
        with self.training(total_episodes, config.prompts_per_step * config.group_size, callback) as training:
            for step in training:
                batch = self.sample(rollout, training.episodes // config.group_size, (step,))
                advantage_B = plus_minus_one(batch, drop_all_wrong=config.drop_all_wrong)
                loss = partial(policy_loss, config=config, advantage=advantage_B)
                metrics = self.update(batch, loss, step, trained_B=advantage_B != 0)
                training.log(batch, summary(batch) | metrics)
        return self


def plus_minus_one(batch: Trajectories, *, drop_all_wrong: bool) -> torch.Tensor:
    """The advantage of each episode ``(B,)``, float32: 1 or -1; 0 where its group is left out."""
    _, most_B = group_range(batch.outcome_B, batch.group_B)
    advantage_B = torch.where(batch.outcome_B >= 1, 1.0, -1.0)
    return torch.where((most_B < 1) & drop_all_wrong, 0.0, advantage_B).float()


# All with one aggregation, so that neighbours differ in one thing. With "constant" GRPO without the deviation is Dr. GRPO.
ARMS = {
    "grpo": Arm(GRPO, {"aggregation": "constant"}),
    "dr_grpo": Arm(GRPO, {"aggregation": "constant", "scale_rewards": "none"}),
    "reinforce_rej": Arm(RAFT, {"aggregation": "constant", "variant": "reinforce-rej"}),
    "raft++": Arm(RAFT, {"aggregation": "constant", "variant": "raft++"}),
    "reinforce": Arm(Reinforce, {"aggregation": "constant"}),
    "reinforce_dropping": Arm(Reinforce, {"aggregation": "constant", "drop_all_wrong": True}),
}


def experiment(seed: int, folder: Path, quick: bool = False) -> Measured:
    scale = QUICK if quick else FULL
    found: dict[str, float | list[float]] = {}
    for name, arm in ARMS.items():
        agent = make(arm, folder / name, seed)
        found.setdefault("start", accuracy(agent, scale.problems))
        train(agent, scale.steps)
        found[name] = accuracy(agent, scale.problems)
    dropping = float(found["reinforce_dropping"]) - float(found["reinforce"])  # type: ignore[arg-type]
    dividing = float(found["grpo"]) - float(found["dr_grpo"])  # type: ignore[arg-type]
    return {**found, "gain of dropping": dropping, "gain of dividing": dividing}


def judge(measured: Sequence[Measured]) -> Verdict:
    larger = differences(measured, "gain of dropping", "gain of dividing")
    dropping, dividing = (differences(measured, f"gain of {what}") for what in ("dropping", "dividing"))
    arms = ", ".join(f"{name} {mean(measured, name):.1%}" for name in ("start", *ARMS))
    sentence = (
        f"Dropping is worth {told(dropping, '+.1f', 100)} points to REINFORCE, dividing {told(dividing, '+.1f', 100)} to GRPO; "
        f"the one more than the other by {told(larger, '+.1f', 100)}. Accuracies: {arms}."
    )
    return conclude([larger, dropping], sentence)


CLAIM = Claim(
    name="dropping_all_wrong",
    statement="What GRPO gains over REINFORCE comes from leaving out the groups that are all wrong, not from dividing by the "
    "group's standard deviation.",
    source="Xiong et al. 2025, arXiv:2504.11343, section 3",
    protocol=f"Six trainings of {FULL.steps} steps of 128 episodes from one start on textenv/Sort-v0: GRPO, Dr. GRPO (no "
    "deviation), Reinforce-Rej, RAFT++, and REINFORCE with rewards 1 and -1 on all groups and without those that are all "
    f"wrong; all aggregate as Dr. GRPO. Accuracy sampled on {FULL.problems} held-out problems at the end. Decides: what "
    "dropping is worth to REINFORCE less what dividing is worth to GRPO, provided that dropping helps.",
    refuted_by="Dropping the groups that are all wrong does not help REINFORCE, or helps less than dividing helps GRPO.",
    experiment=experiment,
    judge=judge,
)
