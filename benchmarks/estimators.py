"""What each estimator is in expectation, held against what it should be: ``python -m benchmarks.estimators``.

A tabular task has so few completions that every batch a policy can sample may be listed. The step that a loss asks for,
minus its gradient, is computed on all of them by autograd through the project's own functions, and weighted with their
probabilities. It is compared with a figure that knows nothing of samples: sums over the task's table, or dynamic
programming over its states, in numpy. Everything is float64; what the lines mean is told in agents/ESTIMATORS.md.

Shapes: S states, V vocabulary, C completions, T tokens, W prompts; K batches of G completions for each prompt lie one
after another in R = K·W·G rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from agents.core.advantages import gae, group_advantages, group_range, whiten
from agents.core.kl import Estimator, kl_estimate
from agents.core.losses import Aggregation, aggregate, clipped_surrogate, count_denominators, value_loss
from textenv import kl_penalty
from textenv.tasks.tabular import Tabular, log_probability, log_softmax, policy_gradient

TOLERANCE = 1e-6
GROUP_EPS, WHITEN_EPS = 1e-6, 1e-8
"""The defaults of :func:`group_advantages` and :func:`whiten`, which their closed forms here carry along."""


# What is exact.


@dataclass(frozen=True)
class World:
    """A tabular task's completions with their returns, a policy, and what can be said about them without sampling."""

    task: Tabular
    return_C: np.ndarray
    logits_SV: np.ndarray

    @cached_property
    def policy_SV(self) -> np.ndarray:
        return np.exp(log_softmax(self.logits_SV))

    @cached_property
    def logp_C(self) -> np.ndarray:
        return log_probability(self.logits_SV, self.task.choice_CSV)

    @cached_property
    def probability_C(self) -> np.ndarray:
        return np.exp(self.logp_C)

    @cached_property
    def length_C(self) -> np.ndarray:
        return self.task.choice_CSV.sum(axis=(1, 2))

    @cached_property
    def mean_return(self) -> float:
        return float(self.probability_C @ self.return_C)

    def gradient(self, weight_C: np.ndarray) -> np.ndarray:
        """E[weight ∇ log p] over completions, ``(S, V)``."""
        return policy_gradient(self.logits_SV, self.task.choice_CSV, weight_C)

    @cached_property
    def exact_SV(self) -> np.ndarray:
        """The policy gradient ∇E[R]."""
        return self.gradient(self.return_C)

    @cached_property
    def child_SV(self) -> np.ndarray:
        """The state that a choice leads to, -1 where it ends the completion."""
        index = {state: s for s, state in enumerate(self.task.states)}
        return np.array(
            [[index.get((*state, token), -1) for token in range(self.task.vocab)] for state in self.task.states]
        )

    @cached_property
    def reward_SV(self) -> np.ndarray:
        """The return of the completion that a choice ends, else 0."""
        paid = dict(zip(self.task.completions, self.return_C, strict=True))
        return np.array(
            [[paid.get((*state, token), 0.0) for token in range(self.task.vocab)] for state in self.task.states]
        )

    @cached_property
    def visits_S(self) -> np.ndarray:
        """The probability of passing each state."""
        visits_S = np.zeros(len(self.task.states))
        visits_S[0] = 1.0
        for s, token in np.argwhere(self.child_SV >= 0):  # states are listed before those they lead to
            visits_S[self.child_SV[s, token]] = visits_S[s] * self.policy_SV[s, token]
        return visits_S

    def future(self, x_SV: np.ndarray, discount: float = 1.0) -> np.ndarray:
        """E[x + discount x' + discount² x'' + …] over a choice and those that follow it, ``(S, V)``."""
        total_SV = x_SV.copy()
        for s, token in np.argwhere(self.child_SV >= 0)[::-1]:
            child = self.child_SV[s, token]
            total_SV[s, token] += discount * self.policy_SV[child] @ total_SV[child]
        return total_SV

    def after(self, value_S: np.ndarray) -> np.ndarray:
        """The value of the state that a choice leads to, 0 after the end: ``(S, V)``."""
        return np.where(self.child_SV >= 0, value_S[self.child_SV], 0.0)

    @cached_property
    def q_SV(self) -> np.ndarray:
        """The expected return of each choice."""
        return self.future(self.reward_SV)

    @cached_property
    def value_S(self) -> np.ndarray:
        """The expected return from each state on."""
        return (self.policy_SV * self.q_SV).sum(axis=1)

    def score(self, visits_S: np.ndarray, advantage_SV: np.ndarray) -> np.ndarray:
        """Σ visits π advantage ∇ log π over states and choices, ``(S, V)``."""
        weight_SV = visits_S[:, None] * self.policy_SV * advantage_SV
        return weight_SV - self.policy_SV * weight_SV.sum(axis=1, keepdims=True)


def random_world(seed: int, right: int | None = None, **options: int) -> World:
    """A random policy on a tabular task. With ``right`` that many completions, the best, return 1 and the others 0."""
    task = Tabular(**options)
    return_C = task.return_C
    if right is not None:
        return_C = (return_C >= np.sort(return_C)[-right]).astype(float)
    return World(task, return_C, _normal(seed, len(task.states), task.vocab))


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# What is estimated.


@dataclass(frozen=True)
class Batches:
    """Batches that a policy samples, with their probabilities, as the losses see them."""

    logits_WSV: Tensor
    """the policy's, which gradients are taken for"""
    weight_K: Tensor
    logp_RT: Tensor
    sampled_RT: Tensor
    return_R: Tensor
    group_R: Tensor
    """one number for each batch's completions of one prompt"""
    state_RT: Tensor
    """the state before each token"""
    token_RT: Tensor

    def look_up(self, table_SV: np.ndarray) -> Tensor:
        """A table's entries at the choices made, ``(R, T)``."""
        return torch.tensor(table_SV)[self.state_RT, self.token_RT]

    @cached_property
    def reward_RT(self) -> Tensor:
        """The returns, paid at the last token."""
        last_RT = self.sampled_RT & (self.sampled_RT.cumsum(dim=1) == self.sampled_RT.sum(dim=1, keepdim=True))
        return torch.where(last_RT, self.return_R[:, None], 0.0)


def every_batch(worlds: list[World], size: int, samplers: list[World] | None = None) -> Batches:
    """All batches of ``size`` completions of each prompt.

    Args:
        worlds: one a prompt, of one shape.
        size: G.
        samplers: with the policies that sample, where these are not the ones that learn.
    """
    prompt_N = np.repeat(np.arange(len(worlds)), size)
    completions = len(worlds[0].task.completions)
    completion_KN = np.indices([completions] * len(prompt_N)).reshape(len(prompt_N), -1).T
    probability_WC = np.stack([world.probability_C for world in samplers or worlds])
    return lay_out(worlds, completion_KN, probability_WC[prompt_N, completion_KN].prod(axis=1))


def lay_out(worlds: list[World], completion_KN: np.ndarray, weight_K: np.ndarray) -> Batches:
    """Batches of the completions named, N = W·G in each and those of one prompt beside each other."""
    task, batches, size = worlds[0].task, len(completion_KN), completion_KN.shape[1] // len(worlds)
    states = {state: s for s, state in enumerate(task.states)}
    state_CT, token_CT = np.zeros((2, len(task.completions), task.max_new_tokens), dtype=int)
    for c, completion in enumerate(task.completions):
        for t, token in enumerate(completion):
            state_CT[c, t], token_CT[c, t] = states[completion[:t]], token
    prompt_R = np.tile(np.repeat(np.arange(len(worlds)), size), batches)
    completion_R = completion_KN.reshape(-1)
    state_RT, token_RT = torch.tensor(state_CT[completion_R]), torch.tensor(token_CT[completion_R])

    logits_WSV = torch.tensor(np.stack([world.logits_SV for world in worlds]), requires_grad=True)
    logp_WSV = logits_WSV.log_softmax(dim=2)
    return Batches(
        logits_WSV=logits_WSV,
        weight_K=torch.tensor(weight_K),
        logp_RT=logp_WSV[torch.tensor(prompt_R)[:, None], state_RT, token_RT],
        sampled_RT=torch.arange(task.max_new_tokens) < torch.tensor(worlds[0].length_C[completion_R])[:, None],
        return_R=torch.tensor(np.stack([world.return_C for world in worlds])[prompt_R, completion_R]),
        group_R=torch.arange(batches * len(worlds)).repeat_interleave(size),
        state_RT=state_RT,
        token_RT=token_RT,
    )


def expected_step(
    batches: Batches,
    loss_RT: Tensor,
    aggregation: Aggregation = "sequence_sum",
    *,
    kept_R: Tensor | None = None,
    parameters: Tensor | None = None,
) -> np.ndarray:
    """Minus the expected gradient of a loss, in the shape of ``parameters``; by default the logits, ``(W, S, V)``.

    Args:
        batches: what is sampled.
        loss_RT: the loss of each token.
        aggregation: how a batch's losses are averaged.
        kept_R: the rows that are trained on, by default all; the others do not count in the denominators either.
        parameters: which the loss depends on.
    """
    sampled_RT = batches.sampled_RT if kept_R is None else batches.sampled_RT & kept_R[:, None]
    sampled_KNT = sampled_RT.view(len(batches.weight_K), -1, sampled_RT.shape[1])
    weighted_KNT = loss_RT.view(sampled_KNT.shape) * batches.weight_K[:, None, None]
    counts_K2 = torch.stack([sampled_KNT.sum(dim=(1, 2)), sampled_KNT.any(dim=2).sum(dim=1)], dim=1)
    loss = torch.zeros((), dtype=torch.float64)
    for counts in counts_K2.unique(dim=0):  # batches with the same denominators add up in one go
        alike_K = (counts_K2 == counts).all(dim=1)
        denominators = count_denominators(sampled_KNT[alike_K][0], sampled_RT.shape[1])
        rows = weighted_KNT[alike_K].flatten(0, 1), sampled_KNT[alike_K].flatten(0, 1)
        loss = loss + aggregate(*rows, aggregation, denominators)
    (gradient,) = torch.autograd.grad(loss, batches.logits_WSV if parameters is None else parameters, retain_graph=True)
    return -gradient.numpy()


def fresh_loss(batches: Batches, advantage: Tensor) -> Tensor:
    """The clipped surrogate on a batch that was just sampled: its ratio is 1."""
    return clipped_surrogate(batches.logp_RT, batches.logp_RT.detach(), advantage, 0.2, 0.2)


def mixed(batches: Batches) -> Tensor:
    """Which rows are of a group with right and wrong answers."""
    least_R, most_R = group_range(batches.return_R, batches.group_R)
    return least_R < most_R


# The lines of the table.


@dataclass(frozen=True)
class Line:
    """An estimator's expected step, what it is said to be, and the exact gradient that it stands for."""

    estimator: str
    claim: str
    got: np.ndarray
    claimed: np.ndarray
    exact: np.ndarray

    @property
    def difference(self) -> float:
        return float(np.abs(self.got - self.claimed).max())

    @property
    def holds(self) -> bool:
        return self.difference <= TOLERANCE

    @property
    def angle(self) -> float | None:
        """Degrees between the step and the exact gradient; None where there is no step."""
        lengths = np.linalg.norm(self.got) * np.linalg.norm(self.exact)
        if lengths < TOLERANCE**2:
            return None
        return float(np.degrees(np.arccos(np.clip((self.got * self.exact).sum() / lengths, -1.0, 1.0))))

    @property
    def verdict(self) -> str:
        if not self.holds:
            return "WRONG"
        if np.abs(self.claimed - self.exact).max() <= TOLERANCE:
            return "unbiased"
        return "scaled" if self.angle is not None and self.angle < 1e-3 else "biased"

    def __str__(self) -> str:
        angle = "none" if self.angle is None else f"{self.angle:.1f}°"
        return f"| {self.estimator} | {self.claim} | {angle} | {_band(self.difference)} | {self.verdict} |"


def _band(difference: float) -> str:
    """Rounding differs from machine to machine, so what may be rounding is shown as one thing."""
    return "< 1e-9" if difference < 1e-9 else f"{difference:.0e}"


def baselines() -> Iterator[Line]:
    world = random_world(0)
    exact = world.exact_SV[None]
    one = every_batch([world], 1)
    yield Line("REINFORCE, no baseline", "∇J", expected_step(one, fresh_loss(one, one.return_R)), exact, exact)
    for size in (2, 3):
        groups = every_batch([world], size)
        return_KG = groups.return_R.view(-1, size)
        others_KG = (return_KG.sum(dim=1, keepdim=True) - return_KG) / (size - 1)
        got = expected_step(groups, fresh_loss(groups, (return_KG - others_KG).view(-1)))
        yield Line(f"baseline: mean of the others, G = {size}", "∇J", got, exact, exact)
        advantage_R = group_advantages(groups.return_R, groups.group_R, "none")
        got = expected_step(groups, fresh_loss(groups, advantage_R))
        factor = (size - 1) / size
        yield Line(f"baseline: mean of the group, G = {size}", "(G - 1)/G ∇J", got, factor * exact, exact)


def deviations() -> Iterator[Line]:
    """Dividing by a standard deviation."""
    world = random_world(0)
    claimed, exact = world.gradient(rank_advantage(world))[None], world.exact_SV[None]
    claim = "E[(P(R' < R) - P(R' > R)) ∇log p]/√2"
    yield Line("GRPO's deviation, G = 2, any rewards", claim, grpo_step(world, 2)[None], claimed, exact)

    prompts = easy_and_hard()
    exact = mean_over(prompts, lambda world: world.exact_SV)

    got, claimed = mean_over(prompts, grpo_step, 3), mean_over(prompts, grpo_gradient, 3)
    yield Line("GRPO's deviation, right or wrong, G = 3", "2/√3 ∇p", got, claimed, exact)
    got, claimed = mean_over(prompts, grpo_step, 6), mean_over(prompts, grpo_gradient, 6)
    yield Line("GRPO's deviation, right or wrong, G = 6", "w_G(p) ∇p", got, claimed, exact)
    got, claimed = mean_over(prompts, grpo_step, 6, 0.45), mean_over(prompts, grpo_gradient, 6, 0.45)
    yield Line("the same with min_std = 0.45", "w_G(p) ∇p without k = 1 and 5", got, claimed, exact)

    got = mean_over(prompts, grpo_step, 3, 0.0, "sequence_mean")
    claimed = mean_over(prompts, lambda world: world.gradient(grpo_advantage(world, 3) / world.length_C))
    yield Line("GRPO as published, right or wrong, G = 3", "E[A/n ∇log p]", got, claimed, exact)

    both = every_batch(prompts, 2)
    batches = zip(both.return_R.split(4), both.group_R.split(4), strict=True)
    advantage_R = torch.cat([group_advantages(return_B, group_B, "batch") for return_B, group_B in batches])
    got = expected_step(both, fresh_loss(both, advantage_R))
    easy, hard = prompts
    claimed = mean_over([(easy, hard), (hard, easy)], lambda pair: batch_weight(2, *pair) * pair[0].exact_SV)
    yield Line("deviation of the batch, two prompts, G = 2", "w(p, p') ∇p", got, claimed, exact)


def easy_and_hard() -> list[World]:
    """Two prompts, one that is answered right with probability 0.75 and one with 0.04."""
    return [random_world(5, right=2, vocab=2, table_seed=4), random_world(1, right=1, vocab=2, table_seed=3)]


def mean_over(prompts: Sequence[Any], gradient: Callable[..., Any], *options: Any) -> np.ndarray:
    """The gradient for the mean over prompts, each of which has parameters of its own: ``(W, S, V)``."""
    return np.stack([gradient(prompt, *options) for prompt in prompts]) / len(prompts)


def grpo_step(world: World, size: int, min_std: float = 0.0, aggregation: Aggregation = "sequence_sum") -> np.ndarray:
    """GRPO's expected step on one prompt, ``(S, V)``."""
    groups = every_batch([world], size)
    advantage_R = group_advantages(groups.return_R, groups.group_R, min_std=min_std)
    return expected_step(groups, fresh_loss(groups, advantage_R), aggregation)[0]


def rank_advantage(world: World) -> np.ndarray:
    """GRPO's expected advantage of each completion beside one other, ``(C,)``: only which of them is better counts."""
    apart_CC = world.return_C[:, None] - world.return_C
    return (apart_CC / 2 / (np.abs(apart_CC) / 2**0.5 + GROUP_EPS)) @ world.probability_C


def _deviation(right: np.ndarray, size: int) -> np.ndarray:
    """The unbiased standard deviation of ``size`` rewards of which ``right`` are 1 and the others 0."""
    return np.sqrt(right * (size - right) / (size * (size - 1)))


def grpo_weight(p: float, size: int, min_std: float = 0.0) -> float:
    """``w_G(p) = (G - 1)/G · E[s_k² / (s_k + eps)] / (p (1 - p))`` with k ~ Binomial(G, p) right answers.

    Where an answer is right with probability p, the advantage of a right one is a = E[(1 - k/G)/s_k | it is right] and of
    a wrong one b = -E[(k/G)/s_k | it is wrong] in expectation, with s_k the deviation of k ones and G - k zeros. So the
    step is a ∇p + b ∇(1 - p) = (a - b) ∇p. Bayes' rule gives a = E[k/G (1 - k/G)/s_k]/p and -b the same over 1 - p, and
    s_k² is G/(G - 1) times k/G (1 - k/G). Groups with s_k below ``min_std`` leave the sum.
    """
    right = np.arange(size + 1)
    deviation = _deviation(right, size)
    kept = np.where(deviation >= min_std, deviation**2 / (deviation + GROUP_EPS), 0.0)
    return float((size - 1) / size * (binom.pmf(right, size, p) @ kept) / (p * (1 - p)))


def grpo_gradient(world: World, size: int, min_std: float = 0.0) -> np.ndarray:
    """What :func:`grpo_step` should be, in the closed form of :func:`grpo_weight`."""
    return grpo_weight(world.mean_return, size, min_std) * world.exact_SV


def grpo_advantage(world: World, size: int) -> np.ndarray:
    """The expected advantage of each completion, right or wrong, ``(C,)``: a and b of :func:`grpo_weight`."""
    others = np.arange(size)
    chance = binom.pmf(others, size - 1, world.mean_return)
    if_right = chance @ ((1 - (others + 1) / size) / (_deviation(others + 1, size) + GROUP_EPS))
    if_wrong = chance @ (-others / size / (_deviation(others, size) + GROUP_EPS))
    return np.where(world.return_C == 1, if_right, if_wrong)


def batch_weight(size: int, world: World, other: World) -> float:
    """As :func:`grpo_weight` for one of two prompts, where the deviation is that of both groups together."""
    p, right = world.mean_return, np.arange(size + 1)
    chance = np.outer(binom.pmf(right, size, p), binom.pmf(right, size, other.mean_return))
    deviation = _deviation(right[:, None] + right, 2 * size) + GROUP_EPS
    mean = (chance * _deviation(right, size)[:, None] ** 2 / deviation).sum()
    return float((size - 1) / size * mean / (p * (1 - p)))


def aggregations() -> Iterator[Line]:
    world = random_world(0)
    exact, length_C = world.exact_SV[None], world.length_C
    pairs = every_batch([world], 2)
    loss_RT = fresh_loss(pairs, pairs.return_R)
    claims: list[tuple[Aggregation, str, np.ndarray]] = [
        ("sequence_sum", "∇J", exact),
        ("constant", "∇J/max_new_tokens", exact / world.task.max_new_tokens),
        ("sequence_mean", "E[R/n ∇log p]", world.gradient(world.return_C / length_C)[None]),
        ("token_mean", "E[R 2/(n + n') ∇log p]", world.gradient(world.return_C * pair_share(world))[None]),
    ]
    for aggregation, claim, claimed in claims:
        got = expected_step(pairs, loss_RT, aggregation)
        yield Line(f"{aggregation}, a batch of 2", claim, got, claimed, exact)
    one = every_batch([world], 1)
    got = expected_step(one, fresh_loss(one, one.return_R), "token_mean")
    yield Line("token_mean, a batch of 1", "E[R/n ∇log p]", got, claims[2][2], exact)


def pair_share(world: World) -> np.ndarray:
    """What token_mean weights each completion's tokens with, E[2/(n + n')] over the other of a batch of two: ``(C,)``."""
    return (2 / (world.length_C[:, None] + world.length_C)) @ world.probability_C


def critics() -> Iterator[Line]:
    """PPO's advantages and the critic's own loss."""
    world = random_world(0)
    exact = world.exact_SV[None]
    one = every_batch([world], 1)
    lam, wrong_S = 0.95, _normal(3, len(world.task.states))

    def step(lam: float, critic_S: np.ndarray) -> np.ndarray:
        advantage_RT, _ = gae(one.reward_RT, torch.tensor(critic_S)[one.state_RT], one.sampled_RT, lam=lam)
        return expected_step(one, fresh_loss(one, advantage_RT))

    yield Line("GAE, lam = 1, any critic", "∇J", step(1.0, wrong_S), exact, exact)
    yield Line("GAE, lam = 0.95, critic = V", "∇J", step(lam, world.value_S), exact, exact)
    error_SV = (1 - lam) * world.future(world.after(wrong_S - world.value_S), lam)
    claimed = exact + world.score(world.visits_S, error_SV)[None]
    claim = "∇J + Σ d π (1 - lam) E[e' + lam e'' + …] ∇log π"
    yield Line("GAE, lam = 0.95, critic = V + e", claim, step(lam, wrong_S), claimed, exact)

    yield _cut_off(world, one)
    yield _whitened(lam)

    value_S = torch.tensor(wrong_S, requires_grad=True)
    value_RT = value_S[one.state_RT]
    exact = world.visits_S * (world.value_S - wrong_S)
    ahead_SV = world.future(world.reward_SV + world.after(wrong_S) - wrong_S[:, None], lam)
    ahead_S = world.visits_S * (world.policy_SV * ahead_SV).sum(axis=1)
    for target_lam, claim, claimed in ((1.0, "d (V - U)", exact), (lam, "d (E[lam-return of U] - U)", ahead_S)):
        _, return_RT = gae(one.reward_RT, value_RT.detach(), one.sampled_RT, lam=target_lam)
        loss_RT = value_loss(value_RT, value_RT.detach(), return_RT, clip=0.2)
        got = expected_step(one, loss_RT, parameters=value_S)
        yield Line(f"loss of a critic U, lam = {target_lam:g}", claim, got, claimed, exact)


def _cut_off(world: World, one: Batches) -> Line:
    """Episodes that something outside cuts after two tokens: the critic stands for what would have come."""
    first_RT = one.sampled_RT & (torch.arange(one.sampled_RT.shape[1]) < 2)
    value_RT = torch.tensor(world.value_S)[one.state_RT]
    last_R = torch.where(one.sampled_RT[:, 2], value_RT[:, 2], 0.0)
    advantage_RT, _ = gae(one.reward_RT, value_RT, first_RT, last_value_B=last_R)
    got = expected_step(one, torch.where(first_RT, fresh_loss(one, advantage_RT), 0.0))
    before_S = np.array([len(state) < 2 for state in world.task.states])
    claimed = np.where(before_S[:, None], world.exact_SV, 0.0)[None]
    return Line("GAE, cut off after 2 tokens, last value = V", "∇J before the cut", got, claimed, claimed)


def _whitened(lam: float) -> Line:
    """PPO's whole loss on a batch that holds every completion in proportion to its probability, as a large one does.

    With V as critic the differences in GAE are uncorrelated, so E[A²] is the sum of their squares' expectations.
    """
    task = Tabular()
    sixths_SV = np.random.default_rng(4).permuted(np.tile([1.0, 2.0, 3.0], (len(task.states), 1)), axis=1)
    world = World(task, task.return_C, np.log(sixths_SV))
    count_C = np.rint(6**task.max_new_tokens * world.probability_C).astype(int)
    batch = lay_out([world], np.repeat(np.arange(len(count_C)), count_C)[None], np.ones(1))
    value_RT = torch.tensor(world.value_S)[batch.state_RT]
    advantage_RT, _ = gae(batch.reward_RT, value_RT, batch.sampled_RT, lam=lam)
    got = expected_step(batch, fresh_loss(batch, whiten(advantage_RT, batch.sampled_RT)), "token_mean")

    tokens, length = count_C @ world.length_C, world.probability_C @ world.length_C
    square_SV = world.future((world.q_SV - world.value_S[:, None]) ** 2, lam**2)
    variance = world.visits_S @ (world.policy_SV * square_SV).sum(axis=1) / length * tokens / (tokens - 1)
    claimed = world.exact_SV[None] / (length * np.sqrt(variance + WHITEN_EPS))
    return Line("GAE whitened, token_mean, a large batch", "∇J/(E[n] std(A))", got, claimed, world.exact_SV[None])


def divergences() -> Iterator[Line]:
    """The KL to a reference, in the loss and in the reward."""
    world = random_world(0)
    reference_SV = log_softmax(_normal(5, *world.logits_SV.shape))
    one = every_batch([world], 1)
    reference_RT = one.look_up(reference_SV)
    ratio_SV = np.log(world.policy_SV) - reference_SV
    ratio_C = world.logp_C - log_probability(reference_SV, world.task.choice_CSV)
    exact = -world.gradient(ratio_C)[None]
    reverse_SV = world.visits_S[:, None] * world.policy_SV * (ratio_SV - (world.policy_SV * ratio_SV).sum(1)[:, None])
    forward_SV = world.visits_S[:, None] * (world.policy_SV - np.exp(reference_SV))
    claims: list[tuple[Estimator, str, np.ndarray]] = [
        ("k1", "0", 0 * exact),
        ("k2", "-Σ d(s) ∇KL(π ‖ ref at s)", -reverse_SV[None]),
        ("k3", "-Σ d(s) ∇KL(ref ‖ π at s)", -forward_SV[None]),
    ]
    for estimator, claim, claimed in claims:
        got = expected_step(one, kl_estimate(one.logp_RT, reference_RT, estimator))
        yield Line(f"{estimator} in the loss", claim, got, claimed, exact)

    beta = 0.1
    reward_RT = one.reward_RT + kl_penalty(one.logp_RT.detach(), reference_RT, beta)
    exact = world.gradient(world.return_C - beta * ratio_C)[None]
    critic_RT = torch.tensor(_normal(3, len(world.task.states)))[one.state_RT]
    advantage_RT, _ = gae(reward_RT, critic_RT, one.sampled_RT, lam=1.0)
    return_R = torch.where(one.sampled_RT, reward_RT, 0.0).sum(dim=1)
    claim = "∇(J - beta KL(π ‖ ref))"
    for name, advantage in (("REINFORCE", return_R), ("GAE, lam = 1", advantage_RT)):
        yield Line(f"k1 in the reward, {name}", claim, expected_step(one, fresh_loss(one, advantage)), exact, exact)


def ratios() -> Iterator[Line]:
    """The clipped surrogate on batches of another policy than the one that learns."""
    world = random_world(0)
    exact = world.exact_SV[None]
    one = every_batch([world], 1)
    loss_RT = clipped_surrogate(one.logp_RT, one.logp_RT.detach(), one.return_R - 0.5, 0.2, 0.28, ratio_max=10)
    yield Line("clip, fresh batch", "∇J", expected_step(one, loss_RT), exact, exact)

    bandit = random_world(6, vocab=5, horizon=1)
    exact = bandit.exact_SV[None]
    yield Line("ratio, no clip, one token", "∇J", _stale_step(bandit, _drifted(bandit)), exact, exact)

    old, exact = _drifted(world), world.exact_SV[None]
    claimed = world.score(old.visits_S, old.q_SV)[None]
    claim = "Σ d_old π Q_old ∇log π"
    yield Line("ratio, no clip, three tokens", claim, _stale_step(world, old), claimed, exact)

    stale = every_batch([world], 1, samplers=[old])
    old_RT = stale.look_up(np.log(old.policy_SV))
    advantage_RT, _ = gae(stale.reward_RT, torch.tensor(old.value_S)[stale.state_RT], stale.sampled_RT, lam=0.0)
    got = expected_step(
        stale, clipped_surrogate(stale.logp_RT, old_RT, advantage_RT, low=0.2, high=0.28, ratio_max=1.5)
    )
    better_SV, ratio_SV = old.q_SV - old.value_S[:, None], world.policy_SV / old.policy_SV
    up_SV = (better_SV > 0) & (ratio_SV <= 1.28)
    down_SV = (better_SV < 0) & (ratio_SV >= 0.8) & (ratio_SV <= 1.5)
    claimed = world.score(old.visits_S, np.where(up_SV | down_SV, better_SV, 0.0))[None]
    claim = "the same over what the clip lets pass"
    yield Line("ratio, clip 0.2/0.28, cap 1.5", claim, got, claimed, exact)


def _drifted(world: World) -> World:
    """A policy some updates away."""
    return World(world.task, world.return_C, world.logits_SV + 0.7 * _normal(9, *world.logits_SV.shape))


def _stale_step(world: World, old: World) -> np.ndarray:
    stale = every_batch([world], 1, samplers=[old])
    old_RT = stale.look_up(np.log(old.policy_SV))
    loss_RT = clipped_surrogate(stale.logp_RT, old_RT, stale.return_R, low=1.0, high=float("inf"))
    return expected_step(stale, loss_RT)


def selections() -> Iterator[Line]:
    """Supervised training on the best, or on what is right. RAFT++ is the same with a ratio, which is 1 here."""
    world = random_world(0)
    groups = every_batch([world], 3)
    best_R = (groups.return_R.view(-1, 3).argmax(dim=1)[:, None] == torch.arange(3)).view(-1)
    got = expected_step(groups, -groups.logp_RT, kept_R=best_R)
    at_most_C = (world.return_C[:, None] >= world.return_C) @ world.probability_C
    best_C = at_most_C**3 - (at_most_C - world.probability_C) ** 3
    claimed, claim = world.gradient(best_C / world.probability_C)[None], "E[∇log p] over the best of 3"
    yield Line("RAFT, the best of 3", claim, got, claimed, world.exact_SV[None])

    def right_step(world: World, size: int) -> np.ndarray:
        groups = every_batch([world], size)
        return expected_step(groups, -groups.logp_RT, kept_R=groups.return_R == 1)[0]

    def some_right(world: World, size: int) -> np.ndarray:
        p = world.mean_return
        return (1 - (1 - p) ** size) * world.exact_SV / p

    prompts = easy_and_hard()
    exact = mean_over(prompts, lambda world: world.exact_SV)
    got, claimed = mean_over(prompts, right_step, 3), mean_over(prompts, some_right, 3)
    yield Line("RAFT, what is right, one prompt a batch, G = 3", "(1 - (1 - p)^G) ∇log p", got, claimed, exact)

    both, (easy, hard) = every_batch(prompts, 2), prompts
    got = expected_step(both, -both.logp_RT, kept_R=both.return_R == 1)
    claimed = mean_over([(easy, hard), (hard, easy)], lambda pair: right_weight(2, *pair) * pair[0].exact_SV)
    claim = "E[B/(1 + others right)] ∇p"
    yield Line("RAFT, what is right, two prompts a batch, G = 2", claim, got, claimed, exact)

    got = expected_step(both, fresh_loss(both, both.return_R))
    yield Line("RAFT++, sequence_sum over all", "∇J", got, exact, exact)
    world = random_world(0, right=10)
    pairs = every_batch([world], 2)
    got = expected_step(pairs, fresh_loss(pairs, pairs.return_R), "token_mean")
    claimed, claim = world.gradient(world.return_C * pair_share(world))[None], "E[R 2/(n + n') ∇log p]"
    yield Line("RAFT++, token_mean over all, a batch of 2", claim, got, claimed, world.exact_SV[None])


def right_weight(size: int, world: World, other: World) -> float:
    """E[B / (1 + right ones among the other B - 1 answers)], for an answer to one of two prompts, B = 2 G."""
    own, others = np.arange(size), np.arange(size + 1)
    chance = np.convolve(binom.pmf(own, size - 1, world.mean_return), binom.pmf(others, size, other.mean_return))
    return float(chance @ (2 * size / (1 + np.arange(2 * size))))


def filters() -> Iterator[Line]:
    """Leaving out groups that are all right or all wrong."""
    prompts = easy_and_hard()
    exact = mean_over(prompts, lambda world: world.exact_SV)

    def rejecting_step(world: World, size: int) -> np.ndarray:
        groups = every_batch([world], size)
        reward_R = torch.where(mixed(groups), groups.return_R, 0.0)
        return expected_step(groups, fresh_loss(groups, reward_R))[0]

    got = mean_over(prompts, rejecting_step, 3)
    claimed = mean_over(prompts, lambda world: (1 - world.mean_return**2) * world.exact_SV)
    yield Line("Reinforce-Rej, G = 3", "(1 - p^(G - 1)) ∇p", got, claimed, exact)

    def kept_step(world: World, size: int) -> np.ndarray:
        groups = every_batch([world], size)
        advantage_R = group_advantages(groups.return_R, groups.group_R)
        return expected_step(groups, fresh_loss(groups, advantage_R), kept_R=mixed(groups))[0]

    def kept_share(world: World, size: int) -> float:
        groups = every_batch([world], size)
        return float(groups.weight_K @ mixed(groups).view(-1, size)[:, 0].double())

    def mixed_probability(world: World, size: int) -> float:
        return 1 - world.mean_return**size - (1 - world.mean_return) ** size

    got = mean_over(prompts, kept_step, 6) / mean_over(prompts, kept_share, 6).sum()
    claimed = mean_over(prompts, grpo_gradient, 6) / mean_over(prompts, mixed_probability, 6).sum()
    yield Line("DAPO's dynamic sampling, G = 6", "w_G(p) ∇p/P(a group is mixed)", got, claimed, exact)


PARTS = (baselines, deviations, aggregations, critics, divergences, ratios, selections, filters)

HEADER = """\
| estimator | its expected step | angle to the exact gradient | largest difference | verdict |
|---|---|---|---|---|"""


def table(lines: Iterable[Line]) -> str:
    return "\n".join([HEADER, *map(str, lines)])


def main() -> None:
    lines = [line for part in PARTS for line in part()]
    print(table(lines))
    wrong = [line.estimator for line in lines if not line.holds]
    if wrong:
        sys.exit(f"not what they are said to be: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
