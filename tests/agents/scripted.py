"""Rollouts whose outcomes a test writes down: what an agent makes of them is then known by hand."""

import json
from dataclasses import replace

import numpy as np
import torch

from agents.core.trajectories import Trajectories
from rewards import Score, ungraded
from textenv import Finish, Source


def metrics_of(agent):
    with open(f"{agent.config.run_dir}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def scores_of(outcomes):
    return [ungraded("time-out") if x is None else Score(x, {"correct": x}) for x in outcomes]


def script(agent, outcomes_of, cut=()):
    """Play real episodes, but let problem i's group have ``outcomes_of(i)``; ``cut`` rows of a batch end by length.

    Returns the (index, prompts) of every call.
    """
    asked, sample = [], agent.sample

    def scripted(rollout, index, seed, prompts=None):
        batch = sample(rollout, index, seed, prompts)
        asked.append((index, len(batch) // agent.config.group_size))
        outcomes = [x for problem in range(index, index + asked[-1][1]) for x in outcomes_of(problem)]
        finish_B = np.array([Finish.LENGTH if row in cut else Finish.EOS for row in range(len(batch))])
        return replace(batch, scores=scores_of(outcomes), finish_B=finish_B)

    agent.sample = scripted
    return asked


def cycle(*groups):
    return lambda problem: groups[problem % len(groups)]


def batch_of(*groups, returns=None):
    """Episodes of one sampled token, with these outcomes."""
    scores = scores_of([x for group in groups for x in group])
    if returns is not None:
        scores = [replace(score, value=value) for score, value in zip(scores, returns, strict=True)]
    rows = len(scores)
    return Trajectories(
        tokens_BT=torch.zeros(rows, 2, dtype=torch.int64),
        source_BT=torch.tensor([[Source.PROMPT, Source.SAMPLED]] * rows, dtype=torch.uint8),
        logp_BT=torch.zeros(rows, 2),
        reward_BT=torch.zeros(rows, 2, dtype=torch.float64),
        penalty_B=torch.zeros(rows, dtype=torch.float64),
        group_B=torch.tensor([number for number, group in enumerate(groups) for _ in group]),
        scores=scores,
        finish_B=np.full(rows, Finish.EOS),
        prompts=["?"] * rows,
        completions=[["!"]] * rows,
        references=[None] * rows,
    )


def watch_updates(agent):
    """What the learner is given from now on: (rows, denominators, advantage) of every update."""
    seen, step = [], agent.learner.step

    def spy(batch, rows, loss, **beside):
        seen.append((rows.tolist(), loss.keywords["denominators"], loss.keywords["advantage"]))
        return step(batch, rows, loss, **beside)

    agent.learner.step = spy
    return seen
