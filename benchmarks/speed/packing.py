"""Completions of very different length: the learner's step against one that pads every row to the longest."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from agents.core.learner import Learner
from benchmarks.measure import ratios, spread
from benchmarks.speed.logprobs import full_step, own_step
from benchmarks.speed.report import Settings, Table, seconds_on
from benchmarks.speed.shapes import MIDDLE, TOY, random_batch

ROWS, PROMPT, SHORTEST, LONGEST = 24, 16, 16, 512
AGREEMENT = 1e-4
"""Largest difference of the two gradients, over their length."""
OURS, PADDED = "the learner's step", "right-padded to the longest"


def run(settings: Settings) -> Iterator[Table]:
    """Seconds of the same step by both ways, once it is sure that their gradients agree."""
    shape = TOY if settings.quick else MIDDLE
    shortest, longest = (2, 16) if settings.quick else (SHORTEST, LONGEST)
    length_B = mixed_lengths(ROWS, shortest, longest)
    batch = random_batch(shape.vocab, PROMPT, length_B, settings.device)
    # A rate of 0, and no clip: both ways have the same weights and the whole gradient, round after round.
    learner = Learner(shape.policy(settings.device, endless=False), max_grad_norm=float("inf"))
    steps = {OURS: partial(own_step, learner, batch), PADDED: partial(full_step, learner, batch)}
    gradients = {}
    for name, step in steps.items():
        step()
        gradients[name] = gradient(learner)
    gap = float((gradients[OURS] - gradients[PADDED]).norm() / gradients[PADDED].norm())
    if not gap <= AGREEMENT:
        raise RuntimeError(
            f"the two ways differ: their gradients by {gap:.2g} of their length, at most {AGREEMENT:g} wanted"
        )

    results = settings.in_turns({name: partial(seconds_on, settings.device, step) for name, step in steps.items()})
    rows = [
        [name, spread(took).text("{:.3f}"), ratios(took, results[OURS]).text("{:.2f}")]
        for name, took in results.items()
    ]
    padding = 1 - (length_B + PROMPT).sum() / (ROWS * (longest + PROMPT))
    yield Table(
        f"a learner's step on {ROWS} completions of {shortest} to {longest} tokens, {shape.name} parameters",
        ("", "seconds", "× ours"),
        rows,
        (
            f"Half of the lengths geometric with a mean of an eighth of the longest, half uniform; padded to the longest "
            f"{100 * padding:.0f} % of the batch is padding. The gradients differ by {gap:.1g} of their length.",
        ),
    )


def mixed_lengths(num: int, shortest: int, longest: int) -> np.ndarray:
    """Lengths ``(num,)``: half geometric with a mean of ``longest / 8``, half uniform; one is the longest."""
    rng = np.random.default_rng(0)
    length_B = np.concatenate(
        [rng.geometric(8 / longest, num // 2), rng.integers(shortest, longest + 1, num - num // 2)]
    )
    length_B[-1] = longest
    return length_B.clip(shortest, longest)


def gradient(learner: Learner) -> torch.Tensor:
    """The gradient of all parameters after a step, in one vector."""
    grads = [parameter.grad for parameter in learner.policy.parameters()]
    return torch.cat([grad.flatten() for grad in grads if grad is not None])
