"""The learner: gradients by micro-batches, one optimiser step. It knows nothing of the algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.core.policy import Policy
from agents.core.trajectories import Trajectories


@dataclass(frozen=True)
class Scored:
    """Some rows of a batch as the current policy scores them: ``rows`` (R,) of the batch, cut to their own width T.

    ``logp_RT`` carries the gradient; ``entropy_RT`` does not. Both are 0 where ``sampled_RT`` is False.
    """

    rows: Tensor
    sampled_RT: Tensor
    logp_RT: Tensor
    entropy_RT: Tensor


Loss = Callable[[Scored], Tensor]
"""Its share of the batch's loss, a scalar: the shares of any split must sum to the loss of the whole."""


class Learner:
    """Adam with decoupled weight decay, linear warm-up, gradient clipping.

    Args:
        policy: what is trained.
        learning_rate: after the warm-up.
        warmup_steps: optimiser steps over which the learning rate rises from 0.
        weight_decay: decoupled.
        max_grad_norm: longer gradients are scaled down to this.
        tokens_per_microbatch: most tokens, padding included, that go through the model at once; a memory setting that
            changes no result.
        temperature: of the sampling, so that tokens are scored in the distribution they were drawn from.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        learning_rate: float,
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        tokens_per_microbatch: int = 16_384,
        temperature: float = 1.0,
    ) -> None:
        self.policy = policy
        self.max_grad_norm = max_grad_norm
        self.tokens_per_microbatch = tokens_per_microbatch
        self.temperature = temperature
        self.optimizer = torch.optim.AdamW(
            policy.parameters(), lr=learning_rate, betas=(0.9, 0.999), weight_decay=weight_decay, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / (warmup_steps + 1))
        )

    def step(self, batch: Trajectories, rows: Tensor, loss: Loss) -> dict[str, float]:
        """One optimiser step on ``rows`` of ``batch``.

        Returns:
            ``loss``, ``grad_norm`` before clipping, and ``learning_rate``.

        Raises:
            FloatingPointError: the gradient is not finite; the weights are as before.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in self.microbatches(batch, rows):
            share = loss(self.score(batch, part))
            share.backward()
            total += share.item()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm).item()
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient's norm is {norm} at a loss of {total}; the weights were left as they were. "
                "Lower the learning rate, or use float32"
            )
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        return {"loss": total, "grad_norm": norm, "learning_rate": rate}

    def score(self, batch: Trajectories, rows: Tensor) -> Scored:
        """Score ``rows`` with the current weights, cut to the longest of them."""
        width = int(batch.length_B[rows].max())
        tokens_RT = batch.tokens_BT[rows, :width]
        sampled_RT = batch.sampled_BT[rows, :width]
        logp_RT, entropy_RT = self.policy.logprobs(tokens_RT, sampled_RT, self.temperature)
        return Scored(rows, sampled_RT, logp_RT, entropy_RT)

    @torch.no_grad()
    def logprobs(self, batch: Trajectories, rows: Tensor) -> Tensor:
        """``logp_BT`` of ``rows`` under the current weights, 0 in all other rows."""
        logp_BT = torch.zeros_like(batch.logp_BT)
        for part in self.microbatches(batch, rows):
            scored = self.score(batch, part)
            logp_BT[part, : scored.logp_RT.shape[1]] = scored.logp_RT
        return logp_BT

    def microbatches(self, batch: Trajectories, rows: Tensor) -> Iterator[Tensor]:
        """Split ``rows`` by length into parts of at most ``tokens_per_microbatch`` tokens, padding included."""
        lengths = batch.length_B[rows]
        order = lengths.argsort(stable=True)
        part: list[int] = []
        for row, length in zip(rows[order].tolist(), lengths[order].tolist(), strict=True):
            if part and (len(part) + 1) * length > self.tokens_per_microbatch:
                yield torch.tensor(part, device=rows.device)
                part = []
            part.append(row)
        if part:
            yield torch.tensor(part, device=rows.device)
