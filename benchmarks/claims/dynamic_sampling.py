"""Whether dynamic sampling saves updates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agents.core.training import Training
from agents.dapo import DAPO
from agents.grpo import GRPO
from benchmarks.claims.base import Claim, Measured, Verdict, conclude, differences, mean, told
from benchmarks.claims.training import QUICK, Arm, Scale, accuracy, make, train

FULL = Scale(steps=200, problems=256)
"""No training takes more steps than these; one that gets no further counts with them."""
GOAL = 0.35
LOOK_EVERY = 5
# DAPO with all but its dynamic sampling taken away, and the same without.
ARMS = {
    "dynamic": Arm(DAPO, {"clip_high": 0.2, "updates_per_batch": 1, "overlong_buffer": 0.0}),
    "plain": Arm(GRPO, {"aggregation": "token_mean"}),
}


def experiment(seed: int, folder: Path, quick: bool = False) -> Measured:
    scale = QUICK if quick else FULL
    found: dict[str, float | list[float]] = {}
    for name, arm in ARMS.items():
        agent = make(arm, folder / name, seed)
        reached = [accuracy(agent, scale.problems)]

        def look(training: Training, agent=agent, reached=reached) -> bool:
            if training.step % LOOK_EVERY == 0:
                reached.append(accuracy(agent, scale.problems))
            return reached[-1] < GOAL

        logged = train(agent, scale.steps, look)
        found |= {
            f"{name} updates": float(len(logged)),
            f"{name} episodes": logged[-1]["episodes"],
            f"{name} reached": float(reached[-1] >= GOAL),
            f"{name} accuracy": reached,
        }
    return found


def judge(measured: Sequence[Measured]) -> Verdict:
    saved = differences(measured, "plain updates", "dynamic updates")
    episodes = differences(measured, "plain episodes", "dynamic episodes")
    sentence = (
        f"To {GOAL:.0%} it takes {mean(measured, 'plain updates'):.0f} updates without and "
        f"{mean(measured, 'dynamic updates'):.0f} with dynamic sampling, {told(saved, '+.0f')} saved; in episodes "
        f"{mean(measured, 'plain episodes'):,.0f} and {mean(measured, 'dynamic episodes'):,.0f}, "
        f"{told(episodes, '+,.0f')} saved. The goal was reached in {mean(measured, 'plain reached'):.0%} and "
        f"{mean(measured, 'dynamic reached'):.0%} of the trainings."
    )
    return conclude([saved], sentence)


CLAIM = Claim(
    name="dynamic_sampling",
    statement="Sampling until the batch is full of groups with right and wrong answers reaches the same accuracy in fewer "
    "updates.",
    source="Yu et al. 2025 (DAPO), arXiv:2503.14476, section 3.2",
    protocol="DAPO without its other three changes against GRPO with token mean, which is the same loss without dynamic "
    "sampling, from one start on textenv/Sort-v0, 16 groups of 8 an update. Accuracy sampled on "
    f"{FULL.problems} held-out problems every {LOOK_EVERY} updates, until {GOAL:.0%} or {FULL.steps} updates. Decides: updates "
    "saved; the episodes that they cost are told beside.",
    refuted_by="It takes more updates with dynamic sampling.",
    experiment=experiment,
    judge=judge,
)
