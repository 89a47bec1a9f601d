"""The adapter of textenv's own agents: a real run of ``learn``, with a scripted task and eyes on engine and learner."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

import textenv
from agents.core.engines.base import Completions, Engine, OnEnd, Sampling
from agents.core.learner import Scored
from agents.core.lora import merged_state
from agents.core.policy import Policy
from agents.core.policy_gradient import PolicyGradient
from agents.core.training import Training
from agents.core.trajectories import Trajectories
from benchmarks.conform.cases import CONTEXT, EOS, Aggregation, Baseline, Case, Refused, Row, Run, Step, folder_of
from rewards import Reward, Sample, Score, ungraded
from textenv import Finish, Problem, Task, Transcript

ENV_ID = "textenv-conform/Case-v0"
NEVER = 1e-30
"""A learning rate that moves nothing."""
AGGREGATIONS: tuple[Aggregation, ...] = ("token_mean", "sequence_mean", "sequence_sum", "constant")
NAMES = {
    "new_tokens_mean": "new_tokens",
    "groups_without_spread": "flat_groups",
}
BASELINES: Mapping[str, Baseline] = {"ppo": "critic", "raft": "none"}
"""Of the agents that do not compare within groups."""


class Ours:
    """An agent class of the entry-point group ``textenv.agents``.

    Args:
        agent_class: one that samples what it learns from.
        settings: of its config, beside those that the case sets.
        name: default the agent's own.

    Raises:
        ValueError: the agent samples nothing.
    """

    def __init__(self, agent_class: type[PolicyGradient], name: str | None = None, **settings: Any) -> None:
        if not issubclass(agent_class, PolicyGradient):
            raise ValueError(
                f"the agent {agent_class.name!r} learns from nothing it sampled: there is nothing to check"
            )
        self.agent_class, self.settings = agent_class, settings
        self.name = name or agent_class.name
        self.baseline: Baseline = BASELINES.get(agent_class.name, "group")
        self.aggregations = AGGREGATIONS
        self.choices: Mapping[int, str] = {}

    def train(self, case: Case) -> Run:
        watch = Watch(case)
        with _registered(case), tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            try:
                agent = self._agent(case, folder)
                with contextlib.suppress(Killed):
                    watch.learn(agent, dies=case.killed_after is not None)
                if case.killed_after is not None:
                    agent = self._agent(case, folder, resume=True)
                    watch.learn(agent)
            except ValueError as error:
                raise Refused(str(error)) from error
        return Run(watch.steps, _state(agent.policy))

    def _agent(self, case: Case, folder: str, resume: bool = False) -> Any:
        known = {field.name for field in fields(self.agent_class.config_class)}
        if case.top_k:
            raise Refused("no cut of the distribution can be set for training")
        wanted = _settings(case) | {"kl_loss_coef" if "kl_loss_coef" in known else "kl_reward_coef": case.kl}
        if case.aggregation is not None:
            wanted["aggregation"] = case.aggregation
        settings = {name: value for name, value in wanted.items() if name in known} | self.settings
        return self.agent_class(ENV_ID, self.agent_class.config_class(run_dir=folder, **settings), resume=resume)


def _settings(case: Case) -> dict[str, Any]:
    """A case as settings; an agent has some of the last ones only."""
    return {
        "model": str(folder_of(case.model)),
        "device": "cpu",
        "seed": case.seed,
        "total_episodes": case.rows * case.steps,
        "prompts_per_step": case.prompts_per_step,
        "group_size": case.group,
        "temperature": case.temperature,
        "learning_rate": case.learning_rate or NEVER,
        "learning_rate_decay": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 1e30,
        "tokens_per_microbatch": 10**9 if case.rows_at_once is None else case.rows_at_once * _longest(case),
        "updates_per_batch": case.updates,
        "epochs_per_batch": 1,
        "lora_rank": 4 if case.lora else 0,
        "max_ungraded": 0.99,
        "eval_episodes": 1,
        "checkpoint_every": 10**9 if case.killed_after is None else 1,
        "gae_lambda": case.lam,
        "critic_warmup_steps": case.critic_warmup,
        "max_sampling": 1,
    }


def _longest(case: Case) -> int:
    """Tokens of the longest row that a case can have."""
    return max(map(len, case.prompts)) + case.max_new_tokens


# The scripted task --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _registered(case: Case) -> Iterator[None]:
    """The case as an environment."""
    kind = CaseTask if case.reply is None else TwoTurnTask
    textenv.register(ENV_ID, type("Task", (kind,), {"case": case}))
    try:
        yield
    finally:
        del textenv.registry[ENV_ID], gymnasium.registry[ENV_ID]


class CaseTask(Task):
    """A case's prompts in their order. A problem's reference is its number, None for evaluation."""

    holdout = 0
    max_tokens = CONTEXT
    case: Case

    def __init__(self) -> None:
        self.max_new_tokens = self.case.max_new_tokens
        self.reward = ScriptedReward(self.case)

    def problem(self, seed: int, split: str, index: int) -> Problem:
        if split == "eval":
            return Problem(self.case.prompts[0])
        return Problem(self.case.prompts[index % len(self.case.prompts)], index)


class TwoTurnTask(CaseTask):
    """Says the case's reply after the first turn."""

    turns = 2

    def reply(self, transcript: Transcript) -> str | None:
        return self.case.reply


class ScriptedReward(Reward):
    """The rewards of a case, whatever was written."""

    name = "scripted"

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        seen: Counter[int] = Counter()
        scores = []
        for sample in samples:
            number = sample.reference
            if number is None:
                scores.append(Score(0.0))
                continue
            step, prompt = divmod(number, self.case.prompts_per_step)
            value = self.case.rewards[step][prompt * self.case.group + seen[number]]
            seen[number] += 1
            scores.append(ungraded("the case says so") if value is None else Score(value))
        return scores


class ScriptedEngine(Engine):
    """Writes what a case says, or what another engine samples, and notes what it was sent and what it wrote."""

    def __init__(self, engine: Engine, policy: Policy, case: Case) -> None:
        self.engine, self.policy, self.case = engine, policy, case
        self.sent: list[list[int]] = []
        self.turns: list[list[list[int]]] = []
        self.weights: dict[str, Tensor] = {}
        self.noise = np.random.default_rng(case.seed)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        budgets: Sequence[int] | None = None,
        on_end: OnEnd | None = None,
    ) -> Completions:
        if sampling.temperature == 0:  # an evaluation, which no check looks at
            return Completions([np.array([EOS])] * len(prompts), [np.zeros(1, np.float32)] * len(prompts), [Finish.EOS])
        contexts = [list(prompt) for prompt in prompts for _ in range(n)]
        if not self.turns:
            self.sent, self.weights = contexts, _state(self.policy)
        if self.case.completions is None:
            completions = self.engine.generate(prompts, sampling, n, budgets, on_end)
        else:
            completions = self._scripted(contexts, sampling.temperature)
        self.turns.append([tokens.tolist() for tokens in completions.tokens])
        completions.logprobs = [
            logprobs + self.noise.normal(0, self.case.sampler_noise, len(logprobs)).astype(np.float32)
            for logprobs in completions.logprobs
        ]
        return completions

    def sync(self, policy: Policy) -> None:
        self.engine.sync(policy)
        self.policy, self.version = policy, policy.version

    @torch.no_grad()
    def _scripted(self, contexts: list[list[int]], temperature: float) -> Completions:
        assert self.case.completions is not None
        tokens = [np.array(turns[len(self.turns)]) for turns in self.case.completions]
        logprobs = []
        for context, completion in zip(contexts, tokens, strict=True):
            tokens_1T = torch.tensor([[*context, *completion]])
            sampled_1T = torch.arange(tokens_1T.shape[1]).unsqueeze(0) >= len(context)
            logprobs.append(self.policy.logprobs(tokens_1T, sampled_1T, temperature)[0][sampled_1T].numpy())
        ends = [completion[-1] in self.policy.tokenizer.eos_ids for completion in tokens]
        return Completions(tokens, logprobs, [Finish.EOS if ended else Finish.LENGTH for ended in ends])


# What is seen -------------------------------------------------------------------------------------------------------


class Killed(Exception):  # noqa: N818
    """The run dies here."""


class Watch:
    """Collects the steps of a case while an agent learns."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.steps: list[Step] = []

    def learn(self, agent: Any, dies: bool = False) -> None:
        """Let the agent learn, and die after ``killed_after`` steps."""
        self.agent, self.dies = agent, dies
        self.engine = agent.engine = ScriptedEngine(agent.engine, agent.policy, self.case)
        self._update, self._step = agent.update, agent.learner.step
        agent.update, agent.learner.step = self.update, self.step
        agent.learner.optimizer.register_step_pre_hook(self.note_gradient)
        if agent.learner.critic is not None and not agent.resumed:
            torch.nn.init.constant_(agent.learner.critic.head.bias, self.case.value)
        self.start_step()
        agent.learn(callback=self.end_step)

    def start_step(self) -> None:
        self.engine.turns = []
        self.batch: Trajectories | None = None
        self.gradient: dict[str, Tensor] | None = None

    def update(self, batch: Trajectories, *arguments: Any, **options: Any) -> dict[str, float]:
        self.batch = batch
        shape = batch.tokens_BT.shape
        self.logp_BT, self.ratio_BT = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        self.advantage_BT, self.credit_BT = torch.zeros(shape), torch.zeros(shape)
        return self._update(batch, *arguments, **options)

    def step(self, batch: Trajectories, rows: Tensor, loss: partial, **options: Any) -> dict[str, float]:
        parts: list[Scored] = []

        def watched(scored: Scored) -> tuple[Tensor, dict[str, Tensor]]:
            scored.logp_RT.retain_grad()
            parts.append(scored)
            return loss(scored)

        metrics = self._step(batch, rows, watched, **options)
        given = loss.keywords
        advantage = given["advantage_BT"] if "advantage_BT" in given else given["advantage"]
        for scored in parts:
            logp_RT, sampled_RT = scored.logp_RT.detach(), scored.sampled_RT
            old_RT = logp_RT if given["old_BT"] is None else scored.of(given["old_BT"])
            advantage_RT = scored.of(advantage)
            if advantage_RT.dim() == 1:
                advantage_RT = advantage_RT.unsqueeze(1).expand(sampled_RT.shape)
            gradient_RT = scored.logp_RT.grad
            self._note(self.logp_BT, scored, logp_RT.masked_fill(~sampled_RT, torch.nan))
            self._note(self.ratio_BT, scored, (logp_RT - old_RT).exp().masked_fill(~sampled_RT, torch.nan))
            self._note(self.advantage_BT, scored, advantage_RT.masked_fill(~sampled_RT, 0.0))
            self._note(self.credit_BT, scored, torch.zeros(()) if gradient_RT is None else -gradient_RT)
        return metrics

    @staticmethod
    def _note(x_BT: Tensor, scored: Scored, x_RT: Tensor) -> None:
        x_BT[scored.rows, : scored.sampled_RT.shape[1]] = x_RT.to(x_BT.dtype)

    def note_gradient(self, *_: Any) -> None:
        if self.gradient is None:
            named = self.agent.policy.model.named_parameters()
            self.gradient = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def end_step(self, training: Training) -> None:
        assert self.batch is not None
        logged = {NAMES.get(name, name): value for name, value in training.metrics.items()}
        rows = [self._row(self.batch, i) for i in range(len(self.batch))]
        self.steps.append(Step(self.engine.weights, rows, self.gradient or {}, logged))
        if self.dies and len(self.steps) == self.case.killed_after:
            raise Killed
        self.start_step()

    def _row(self, batch: Trajectories, i: int) -> Row:
        length = int(batch.length_B[i])

        def cut(x_BT: Tensor) -> np.ndarray:
            return x_BT[i, :length].numpy()

        return Row(
            sent=self.engine.sent[i],
            written=tuple(turn[i] for turn in self.engine.turns),
            tokens_T=cut(batch.tokens_BT),
            sampled_T=cut(batch.sampled_BT),
            logp_T=cut(self.logp_BT),
            ratio_T=cut(self.ratio_BT),
            advantage_T=cut(self.advantage_BT),
            credit_T=cut(self.credit_BT),
            behaviour_T=cut(batch.logp_BT),
            reward_T=cut(batch.reward_BT),
        )


def _state(policy: Policy) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in merged_state(policy.model).items()}
