"""One step late: the next batch is sampled while this one is learned from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from agents.core.rollout import Rollout
from agents.core.run import BEHAVIOUR_FILE
from agents.core.timing import Clock
from agents.core.trajectories import Trajectories

if TYPE_CHECKING:
    from agents.core.policy_gradient import PolicyGradient

Batch = TypeVar("Batch")


class Ahead(Generic[Batch]):
    """Samples the batch of a step while the step before learns, with a copy of the weights that this one began with.

    What a batch holds depends on the copy, on the state of the reward when its sampling began and on the numbers of the step
    and its first problem, and not on what the two threads do when. So a run can be repeated, and a checkpoint holds the copy
    and that state. Outside :meth:`sampling` nothing is being sampled: the engine may be used for an evaluation.

    Args:
        agent: whose policy samples; resumed, it goes on with the copy in its checkpoint.
        rollout: of this agent; from now on it samples with the copy.
        sample: the batch of a step, from its number and that of its first problem, by this rollout.

    Attributes:
        reward_state: of the reward when the sampling of the newest batch began.
        staleness: steps that the weights of the last batch taken were behind: 0 in the first step of a run, then 1.
    """

    def __init__(self, agent: PolicyGradient, rollout: Rollout, sample: Callable[[int, int], Batch]) -> None:
        self.agent, self.sample = agent, sample
        self.copy = rollout.policy = copy.deepcopy(agent.policy).requires_grad_(False)
        rollout.clock = Clock()  # the agent's tells the time of the other thread
        self.reward_state = agent.reward.state_dict()
        self.staleness = 0
        self._copied_in = agent.start
        self._next: Future[Batch] | None = None
        if agent.checkpoint is not None:
            self._copied_in -= 1
            self.copy.version -= 1  # older than the policy's, whatever number these had
            self._load(load_file(agent.checkpoint / BEHAVIOUR_FILE))

    def take(self, step: int, index: int) -> Batch:
        """The batch of a step whose first problem is number ``index``. Until :meth:`sampling` its weights stay."""
        if self._next is None:
            with self._beside(step, index):
                pass
        self.staleness = step - self._copied_in
        taken, self._next = self._next, None
        assert taken is not None
        return taken.result()

    @contextmanager
    def sampling(self, step: int, index: int | None) -> Iterator[None]:
        """Within, the batch of the step after ``step`` is sampled, with the weights as they are on entry.

        ``index`` is the number of its first problem; None, if there is to be no such step, only copies the weights.
        """
        self._load(self.trained())
        self._copied_in = step
        self.copy.version = self.agent.policy.version
        self.reward_state = self.agent.reward.state_dict()
        if index is None:
            yield
        else:
            with self._beside(step + 1, index):
                yield

    def measure_gap(self, batch: Trajectories) -> dict[str, float]:
        """How far the batch's first group is from what it was sampled with, at the weights that sampled it.

        To be called before :meth:`sampling` changes them.
        """
        rows = batch.rows[: self.agent.config.group_size]
        return self.agent.learner.measure_gap(batch, rows, policy=self.copy)

    def weights(self) -> dict[str, Tensor]:
        """Those of the copy which the policy's may differ from, by name."""
        names = self.trained()
        return {name: tensor for name, tensor in self.copy.named_parameters() if name in names}

    def trained(self) -> dict[str, Tensor]:
        """The policy's weights that change, by name."""
        return {name: tensor for name, tensor in self.agent.policy.named_parameters() if tensor.requires_grad}

    @contextmanager
    def _beside(self, step: int, index: int) -> Iterator[None]:
        with ThreadPoolExecutor(1) as thread:
            self._next = thread.submit(self.sample, step, index)
            yield
            with self.agent.clock("generate"):  # what learning has not hidden of it
                wait([self._next])

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> None:
        held = dict(self.copy.named_parameters())
        for name, tensor in weights.items():
            held[name].copy_(tensor)
