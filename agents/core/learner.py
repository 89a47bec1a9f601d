"""The learner: gradients by micro-batches, one optimiser step. It knows nothing of the algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from agents.core.critic import Critic
from agents.core.lora import adapters, load_adapters, save_adapters
from agents.core.policy import Policy, Scorer
from agents.core.trajectories import Trajectories
from textenv.episodes import Source

OPTIMIZER_FILE = "optimizer.safetensors"
CRITIC_FILE = "critic.safetensors"


@dataclass(frozen=True)
class Scored:
    """Some rows of a batch as the current policy scores them: ``rows`` (R,) of the batch, cut to their own width T.

    ``logp_RT`` and, with a critic, ``value_RT`` carry the gradient; ``entropy_RT`` does not. All are 0 where ``sampled_RT``
    is False.
    """

    rows: Tensor
    sampled_RT: Tensor
    logp_RT: Tensor
    entropy_RT: Tensor
    value_RT: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """These rows of something of the whole batch, ``(B,)`` or ``(B, T)``."""
        return x[self.rows] if x.dim() == 1 else x[self.rows, : self.sampled_RT.shape[1]]


Loss = Callable[[Scored], tuple[Tensor, dict[str, Tensor]]]
"""A micro-batch's share of the batch's loss, a scalar, and of its metrics: the shares of any split must sum to the same."""


Beside = tuple[Trajectories, Loss]
"""Another batch to be learned in the same optimiser step, with its own loss."""


class Learner:
    """Adam with decoupled weight decay and gradient clipping. The learning rate is set from outside, step by step.

    Args:
        policy: what is trained; of a policy with adapters only these.
        critic: trained beside it, its gradient clipped on its own.
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
        critic: Critic | None = None,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        tokens_per_microbatch: int = 16_384,
        temperature: float = 1.0,
    ) -> None:
        self.policy, self.critic = policy, critic
        self.max_grad_norm = max_grad_norm
        self.tokens_per_microbatch = tokens_per_microbatch
        self.temperature = temperature
        of_critic = [] if critic is None else critic.trained_parameters()
        others = {id(parameter) for parameter in of_critic}
        of_policy = [p for p in policy.parameters() if p.requires_grad and id(p) not in others]
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters} for parameters in (of_policy, of_critic) if parameters],
            lr=0.0,
            betas=(0.9, 0.999),
            weight_decay=weight_decay,
            fused=True,
        )

    def set_learning_rate(self, rate: float) -> None:
        """Of the steps to come; the critic's is larger by its own factor."""
        rates = [rate] if self.critic is None else [rate, rate * self.critic.learning_rate_factor]
        for group, value in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = value

    def step(self, batch: Trajectories, rows: Tensor, loss: Loss, *, beside: Beside | None = None) -> dict[str, float]:
        """One optimiser step on ``rows`` of ``batch``, and on the whole of another batch beside it.

        Returns:
            ``loss``, ``grad_norm`` before clipping (and ``critic_grad_norm``), ``entropy`` in nats a token, ``logp_gap`` and
            ``logp_gap_max`` (absolute difference in nats between a token's log-probability as sampled and as scored here),
            and the sums of the metrics that the losses give.

        Raises:
            FloatingPointError: the gradient is not finite; the weights are as before.
        """
        self.optimizer.zero_grad(set_to_none=True)
        tokens = batch.sampled_BT[rows].sum()
        sums: dict[str, Tensor] = {}
        gap_max = torch.zeros((), device=rows.device)
        for part in self.microbatches(batch, rows):
            scored = self.score(batch, part)
            share, metrics = loss(scored)
            share.backward()
            gap_RT = (scored.logp_RT.detach() - batch.logp_BT[part, : scored.logp_RT.shape[1]]).abs()
            gap_RT = torch.where(scored.sampled_RT, gap_RT, 0.0)
            gap_max = torch.maximum(gap_max, gap_RT.max())
            metrics |= {
                "loss": share.detach(),
                "entropy": scored.entropy_RT.sum() / tokens,
                "logp_gap": gap_RT.sum() / tokens,
            }
            sums = {name: value + sums.get(name, 0.0) for name, value in metrics.items()}
        if beside is not None:
            other, other_loss = beside
            for part in self.microbatches(other, other.rows):
                share, metrics = other_loss(self.score(other, part, valued=False))
                share.backward()
                sums = {**sums, **{name: value + sums.get(name, 0.0) for name, value in metrics.items()}}
        norms = self._clip(float(sums["loss"]))
        self.optimizer.step()
        self.policy.version += 1
        totals = {name: float(value) for name, value in sums.items()}
        return {**totals, **norms, "logp_gap_max": float(gap_max)}

    def _clip(self, loss: float) -> dict[str, float]:
        """Scale long gradients down, the policy's and the critic's each on its own; their norms before that."""
        norms = {}
        for name, group in zip(("grad_norm", "critic_grad_norm"), self.optimizer.param_groups, strict=False):
            norms[name] = norm = float(torch.nn.utils.clip_grad_norm_(group["params"], self.max_grad_norm))
            if not math.isfinite(norm):
                raise FloatingPointError(
                    f"the gradient's norm is {norm} at a loss of {loss}; the weights were left as they were. "
                    "Lower the learning rate, or use float32"
                )
        return norms

    def score(self, batch: Trajectories, rows: Tensor, *, valued: bool = True) -> Scored:
        """Score ``rows`` with the current weights, cut to the longest of them; with a critic, value them too if ``valued``."""
        tokens_RT, sampled_RT = _cut(batch, rows)
        logp_RT, entropy_RT, hidden_NH = self.policy.score(tokens_RT, sampled_RT, self.temperature)
        value_RT = self.critic(tokens_RT, sampled_RT, hidden_NH) if self.critic is not None and valued else None
        return Scored(rows, sampled_RT, logp_RT, entropy_RT, value_RT)

    @torch.no_grad()
    def logprobs(self, batch: Trajectories, rows: Tensor, policy: Scorer | None = None) -> Tensor:
        """``logp_BT`` of ``rows`` under the current weights, or those of another policy; 0 in all other rows."""
        logp_BT = torch.zeros_like(batch.logp_BT)
        for part in self.microbatches(batch, rows):
            tokens_RT, sampled_RT = _cut(batch, part)
            logp_RT, _ = (policy or self.policy).logprobs(tokens_RT, sampled_RT, self.temperature)
            logp_BT[part, : logp_RT.shape[1]] = logp_RT
        return logp_BT

    @torch.no_grad()
    def logprobs_and_values(self, batch: Trajectories, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``logp_BT`` and ``value_BT`` of ``rows`` under the current weights, in one pass; 0 in all other rows."""
        logp_BT, value_BT = torch.zeros_like(batch.logp_BT), torch.zeros_like(batch.logp_BT)
        for part in self.microbatches(batch, rows):
            scored = self.score(batch, part)
            assert scored.value_RT is not None
            logp_BT[part, : scored.logp_RT.shape[1]] = scored.logp_RT
            value_BT[part, : scored.logp_RT.shape[1]] = scored.value_RT
        return logp_BT, value_BT

    def last_values(self, batch: Trajectories) -> Tensor:
        """The value of the state that each episode ended in ``(B,)``: the one that a further token would be chosen in."""
        end_B1 = batch.length_B.unsqueeze(1)
        further = replace(
            batch,
            tokens_BT=functional.pad(batch.tokens_BT, (0, 1)),
            source_BT=functional.pad(batch.source_BT, (0, 1)).scatter(1, end_B1, int(Source.SAMPLED)),
            logp_BT=functional.pad(batch.logp_BT, (0, 1)),
        )
        return self.logprobs_and_values(further, further.rows)[1].gather(1, end_B1).squeeze(1)

    def measure_gap(self, batch: Trajectories, rows: Tensor) -> dict[str, float]:
        """``logp_gap`` and ``logp_gap_max`` of ``rows``, as :meth:`step` has them, where there is no step to take."""
        sampled_RT = batch.sampled_BT[rows]
        gap_N = (self.logprobs(batch, rows)[rows] - batch.logp_BT[rows])[sampled_RT].abs()
        return {"logp_gap": float(gap_N.mean()), "logp_gap_max": float(gap_N.max())}

    def save(self, folder: Path) -> None:
        """Write the optimiser's state to ``folder``, and what is trained that a saved policy does not hold."""
        state = self.optimizer.state_dict()["state"]
        tensors = {f"{index}/{name}": tensor for index, entry in state.items() for name, tensor in entry.items()}
        save_file(tensors, folder / OPTIMIZER_FILE)
        if self.critic is not None:
            save_file(self.critic.state_dict(), folder / CRITIC_FILE)
        if adapters(self.policy.model):
            save_adapters(self.policy, folder)

    def load(self, folder: Path) -> None:
        """Take from ``folder`` what :meth:`save` left there."""
        if adapters(self.policy.model):
            load_adapters(self.policy, folder)
        if self.critic is not None:
            self.critic.load_state_dict(load_file(folder / CRITIC_FILE))
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in load_file(folder / OPTIMIZER_FILE).items():
            index, name = key.split("/")
            state.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

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


def _cut(batch: Trajectories, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of ``rows``, and which of them were sampled, as wide as the longest."""
    width = int(batch.length_B[rows].max())
    return batch.tokens_BT[rows, :width], batch.sampled_BT[rows, :width]


def shuffled_parts(rows: Tensor, parts: int, seed: tuple[int, ...]) -> Iterator[Tensor]:
    """``rows`` in a random order, in ``parts`` of equal size (to one row)."""
    order = np.random.default_rng(seed).permutation(len(rows))
    for part in np.array_split(order, parts):
        if len(part):
            yield rows[torch.from_numpy(part).to(rows.device)]


def check_logp_gap(metrics: Mapping[str, float], limit: float) -> None:
    """Hold engine and learner to one distribution, by what was measured on a fresh batch.

    Raises:
        RuntimeError: their log-probabilities differ by more than ``limit`` nats a token in the mean.
    """
    if metrics["logp_gap"] > limit:
        raise RuntimeError(
            f"the engine sampled from another distribution than the learner scores: log-probabilities differ by "
            f"{metrics['logp_gap']:.3g} nats a token in the mean, at most {metrics['logp_gap_max']:.3g}, and the limit "
            f"max_logp_gap is {limit:g}; check that engine and learner hold the same weights and dtype"
        )


def mean_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over the updates on one batch; but the gap to the engine is that of the first, when all was fresh."""
    means = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
    return means | {name: updates[0][name] for name in ("logp_gap", "logp_gap_max")}
