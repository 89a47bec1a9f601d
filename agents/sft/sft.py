"""Supervised fine-tuning: raise the likelihood of what the task demonstrates.

Loss: the mean of -log pi(token) over all demonstrated tokens of the batch, end tokens included; prompts and replies are
context only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from agents.core.agent import Agent
from agents.core.config import AgentConfig
from agents.core.learner import Learner, Scored
from agents.core.losses import aggregate, count_denominators
from agents.core.rollout import demonstrations, encode_demonstration
from agents.core.training import Callback
from agents.core.trajectories import Trajectories
from agents.core.usage import training_flops
from textenv.task import Finish, Task, Transcript
from textenv.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class SFTConfig(AgentConfig):
    """Settings of supervised fine-tuning. An episode is one demonstration."""

    @property
    def base_learning_rate(self) -> float:
        """Default 1e-3 for the tiny model, 2e-5 for others."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-3 if self.model == "tiny" else 2e-5


class SFT(Agent):
    """Supervised fine-tuning on any environment whose task demonstrates, datasets with text answers among them."""

    name = "sft"
    config_class = SFTConfig

    def learn(self, total_episodes: int | None = None, callback: Callback | None = None) -> Self:
        prompts = self.config.prompts_per_step
        rollout = self.rollout()
        check_demonstrations(self.task, self.policy.tokenizer)
        with self.training(total_episodes, prompts, callback) as training:
            for _ in training:
                batch = demonstrations(rollout.begin(training.episodes, prompts)).to(self.policy.device)
                metrics = sft_step(self.learner, batch, batch.rows)
                self.flops += training_flops(self.policy, batch.length_B)
                training.log(batch, metrics)
        return self


def check_demonstrations(task: Task, tokenizer: Tokenizer) -> None:
    """Refuse what cannot be learned from, before anything slow starts.

    Raises:
        ValueError: a problem that the task can preview is demonstrated by nothing, or by too much for its budget.
    """
    for problem in task.preview("train"):
        encode_demonstration(task, tokenizer, Transcript(problem, (), (), Finish.NONE))


def sft_step(learner: Learner, batch: Trajectories, rows: Tensor) -> dict[str, float]:
    """One optimiser step towards the sampled tokens of ``rows``."""
    denominators = count_denominators(batch.sampled_BT[rows], max_new_tokens=1)

    def loss(scored: Scored) -> tuple[Tensor, dict[str, Tensor]]:
        nll = aggregate(-scored.logp_RT, scored.sampled_RT, "token_mean", denominators)
        return nll, {"nll": nll.detach()}

    metrics = learner.step(batch, rows, loss)
    # Nobody sampled these tokens, so that there is no gap to tell.
    return {name: value for name, value in metrics.items() if not name.startswith("logp_gap")}
