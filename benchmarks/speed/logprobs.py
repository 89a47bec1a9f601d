"""Log-probabilities with their gradient over a large vocabulary: the learner's own way against full logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from agents.core.learner import Learner, Scored
from agents.core.losses import aggregate, count_denominators
from agents.core.policy import Policy
from agents.core.trajectories import Trajectories
from benchmarks.measure import Turn, in_turns, ratios, spread
from benchmarks.speed.memory import MEBIBYTE, extra_peak
from benchmarks.speed.report import Settings, Table, seconds_on
from benchmarks.speed.shapes import TOY, Shape, random_batch

SHAPE = Shape("15M", hidden=256, layers=8, heads=4, intermediate=704, vocab=32_000, tied=True)
ROWS, PROMPT, COMPLETION = 8, 128, 384
OURS, FULL = "the learner's step", "full logits in plain torch"


def run(settings: Settings) -> Iterator[Table]:
    """Seconds and extra peak memory of an optimiser step, each round in fresh processes."""
    measures = {name: partial(measure, settings, name) for name in (OURS, FULL)}
    results = in_turns(measures, settings.rounds)
    shape, prompt, completion = sizes(settings.quick)
    rows = []
    for name, figures in results.items():
        took, extra = ([figure[i] for figure in figures] for i in range(2))
        ours_took, ours_extra = ([figure[i] for figure in results[OURS]] for i in range(2))
        rows.append(
            [
                name,
                spread(took).text("{:.2f}"),
                ratios(took, ours_took).text("{:.2f}"),
                spread(extra).text(),
                ratios(extra, ours_extra).text("{:.2f}"),
            ]
        )
    yield Table(
        f"log-probabilities with gradient, {shape.name} parameters, vocabulary {shape.vocab:,}, "
        f"{ROWS} × {prompt + completion} tokens, {ROWS} × {completion} scored",
        ("", "seconds", "× ours", "extra peak, MiB", "× ours"),
        rows,
        ("Extra is what the peak lies above the model, its gradient and the optimiser's state.",),
    )


def sizes(quick: bool) -> tuple[Shape, int, int]:
    return (TOY, 4, 8) if quick else (SHAPE, PROMPT, COMPLETION)


def measure(settings: Settings, name: str) -> tuple[float, float]:
    """Seconds and MiB of one way, in a fresh process: a heap that has grown before would hide what is needed."""
    with settings.peer(step_cost, name, settings) as peer:
        return peer()


def step_cost(turn: Turn, name: str, settings: Settings) -> None:
    """A :class:`benchmarks.measure.Peer`'s program: seconds and extra peak MiB of an optimiser step."""
    device = settings.device
    shape, prompt, completion = sizes(settings.quick)
    learner = Learner(shape.policy(device, endless=False))
    settings.use_threads()
    step = {OURS: own_step, FULL: full_step}[name]
    step(learner, random_batch(shape.vocab, 2, np.array([2]), device))  # makes gradient and optimiser state
    batch = random_batch(shape.vocab, prompt, np.full(ROWS, completion), device)
    turn(None)
    extra = extra_peak(device, partial(step, learner, batch))
    took = seconds_on(device, partial(step, learner, batch))
    turn((took, extra / MEBIBYTE))


def own_step(learner: Learner, batch: Trajectories) -> None:
    """An optimiser step towards the sampled tokens, as agents take it."""
    denominators = count_denominators(batch.sampled_BT, 1)

    def loss(scored: Scored) -> tuple[Tensor, dict[str, Tensor]]:
        return aggregate(-scored.logp_RT, scored.sampled_RT, "token_mean", denominators), {}

    learner.step(batch, batch.rows, loss)


def full_step(learner: Learner, batch: Trajectories) -> None:
    """The same step from the logits of every token of the padded batch, entropies included."""
    learner.optimizer.zero_grad(set_to_none=True)
    full_loss(learner.policy, batch).backward()
    torch.nn.utils.clip_grad_norm_(learner.policy.parameters(), learner.max_grad_norm)
    learner.optimizer.step()


def full_loss(policy: Policy, batch: Trajectories) -> Tensor:
    """The mean negative log-probability of the sampled tokens, in plain torch."""
    logits_BTV = policy.model(input_ids=batch.tokens_BT[:, :-1], use_cache=False).logits
    logp_BTV = torch.log_softmax(logits_BTV.float(), dim=-1)
    logp_BT = logp_BTV.gather(2, batch.tokens_BT[:, 1:].unsqueeze(2)).squeeze(2)
    with torch.no_grad():
        torch.special.entr(logp_BTV.exp()).sum(dim=2)
    return -logp_BT[batch.sampled_BT[:, 1:]].mean()
