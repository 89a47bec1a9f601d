"""The learner: gradients by micro-batches, one optimiser step. It knows nothing of the algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from agents.core.critic import AdapterCritic, Critic
from agents.core.head import KEPT
from agents.core.linear import multiplies_bfloat16
from agents.core.lora import adapters, load_adapters, save_adapters
from agents.core.policy import Policy, Scorer, States
from agents.core.timing import Clock
from agents.core.trajectories import Trajectories
from textenv.episodes import Source

OPTIMIZER_FILE = "optimizer.safetensors"
CRITIC_FILE = "critic.safetensors"

Precision = Literal["float32", "bfloat16"]
SaveMemory = Literal["no", "recompute", "offload"]


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
        precision: of the products with weights; "bfloat16" rounds their operands, while weights, the optimiser's state,
            log-probabilities and losses stay as they are.
        save_memory: "recompute" keeps no activations inside the layers but computes them again for the gradient; "offload"
            also keeps the optimiser's state, and a reference while nobody asks it, in the memory of the CPU. Neither
            changes a result.

    Attributes:
        clock: the seconds spent in "forward" (scoring and losses), "backward" and "optimise".

    Raises:
        ValueError: the device cannot do the precision, or has no other memory to save its own; or the critic is an adapter
            on the policy's weights, whose activations cannot be computed again.
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
        precision: Precision = "float32",
        save_memory: SaveMemory = "no",
    ) -> None:
        check_precision(precision, policy.device)
        check_save_memory(save_memory, policy.device, adapts=isinstance(critic, AdapterCritic))
        self.policy, self.critic = policy, critic
        self.max_grad_norm = max_grad_norm
        self.tokens_per_microbatch = tokens_per_microbatch
        self.temperature = temperature
        self.precision, self.offloads = precision, save_memory == "offload"
        self.clock = Clock()
        if save_memory != "no":
            policy.recompute_layers()
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
        gaps: list[Tensor] = []

        def observed(scored: Scored) -> tuple[Tensor, dict[str, Tensor]]:
            share, metrics = loss(scored)
            gap_RT = (scored.logp_RT.detach() - scored.of(batch.logp_BT)).abs()
            gap_RT = torch.where(scored.sampled_RT, gap_RT, 0.0)
            gaps.append(gap_RT.max())
            batch.note("entropy", scored.entropy_RT, scored.rows)
            batch.note("ratio", (scored.logp_RT - scored.of(batch.logp_BT)).exp(), scored.rows)
            entropy, gap = scored.entropy_RT.sum() / tokens, gap_RT.sum() / tokens
            return share, metrics | {"loss": share.detach(), "entropy": entropy, "logp_gap": gap}

        sums: dict[str, Tensor] = {}
        for part in self.microbatches(batch, rows):
            self._add_gradient(self._forward(batch, part), observed, sums)
        if beside is not None:
            other, other_loss = beside
            for part in self.microbatches(other, other.rows):
                self._add_gradient(self._forward(other, part, valued=False), other_loss, sums)
        with self.clock("optimise"):
            return self._optimise(sums | {"logp_gap_max": torch.stack(gaps).max()})

    def _add_gradient(self, part: _Part, loss: Loss, sums: dict[str, Tensor]) -> None:
        """Add a micro-batch's gradient to the parameters', and its metrics to ``sums``.

        The output head is gone through by a few rows at a time, as far as their gradient in the states; then comes the trunk.
        """
        pieces = part.detached(KEPT // self.policy.vocab_size)
        for piece in pieces:
            with self.clock("forward"):
                share, metrics = loss(self._readout(piece))
            with self.clock("backward"):
                share.backward()
            for name, value in metrics.items():
                sums[name] = sums[name] + value if name in sums else value
        with self.clock("backward"):
            part.backward(pieces)

    def _optimise(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Change the weights. All metrics as numbers, fetched from the device at once."""
        groups = self.optimizer.param_groups
        norms = [get_total_norm([p.grad for p in group["params"] if p.grad is not None]) for group in groups]
        norms = [norm.to(self.policy.device) for norm in norms]  # that of no gradient at all is on the CPU
        names = ["grad_norm", "critic_grad_norm"][: len(norms)]
        values = torch.stack([*norms, *sums.values()]).tolist()
        metrics = dict(zip([*names, *sums], values, strict=True))
        for name in names:
            if not math.isfinite(metrics[name]):
                raise FloatingPointError(
                    f"the gradient's norm is {metrics[name]} at a loss of {metrics['loss']}; the weights were left as they "
                    "were. Lower the learning rate, or use float32"
                )
        # Long gradients are scaled down, the policy's and the critic's each on its own.
        for group, norm in zip(groups, norms, strict=True):
            clip_grads_with_norm_(group["params"], self.max_grad_norm, norm)
        if self.offloads:
            self._move_state(self.policy.device)
        self.optimizer.step()
        if self.offloads:
            self._move_state(torch.device("cpu"))
        self.policy.version += 1
        return metrics

    def _move_state(self, device: torch.device) -> None:
        for entry in self.optimizer.state.values():
            entry.update({name: tensor.to(device) for name, tensor in entry.items()})

    def score(self, batch: Trajectories, rows: Tensor, *, valued: bool = True) -> Scored:
        """Score ``rows`` with the current weights, cut to the longest of them; with a critic, value them too if ``valued``."""
        return self._readout(self._forward(batch, rows, valued=valued))

    def _forward(self, batch: Trajectories, rows: Tensor, *, valued: bool = True) -> _Part:
        """The way of ``rows`` through the trunk, or the trunks."""
        tokens_RT, sampled_RT = _cut(batch, rows)
        valued_NH = None
        with self.clock("forward"), self._in_precision():
            states = self.policy.states(tokens_RT, sampled_RT)
            if self.critic is not None and valued:
                valued_NH = self.critic.hidden(tokens_RT, sampled_RT, states.hidden_NH)
        return _Part(rows, tokens_RT, sampled_RT, states.hidden_NH, states.logits_NV, valued_NH)

    def _readout(self, part: _Part) -> Scored:
        """Their way through the heads."""
        sampled_RT, states = part.sampled_RT, States(part.hidden_NH, part.logits_NV)
        with self._in_precision():
            logp_N, entropy_N = self.policy.readout(states, part.tokens_RT[sampled_RT], self.temperature)
        zero_RT = logp_N.new_zeros(sampled_RT.shape)
        value_RT = None
        if part.valued_NH is not None:
            assert self.critic is not None
            value_RT = self.critic.values(sampled_RT, part.valued_NH)
        return Scored(
            part.rows,
            sampled_RT,
            zero_RT.masked_scatter(sampled_RT, logp_N),
            zero_RT.masked_scatter(sampled_RT, entropy_N),
            value_RT,
        )

    def _in_precision(self) -> AbstractContextManager:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.policy.device.type, dtype=torch.bfloat16)

    @torch.no_grad()
    def logprobs(self, batch: Trajectories, rows: Tensor, policy: Scorer | None = None) -> Tensor:
        """``logp_BT`` of ``rows`` under the current weights, or those of another policy; 0 in all other rows."""
        logp_BT = torch.zeros_like(batch.logp_BT)
        scorer = policy or self.policy
        with self.clock("forward"), self._at_hand(scorer), self._in_precision():
            for part in self.microbatches(batch, rows):
                tokens_RT, sampled_RT = _cut(batch, part)
                logp_RT, _ = scorer.logprobs(tokens_RT, sampled_RT, self.temperature)
                logp_BT[part, : logp_RT.shape[1]] = logp_RT
        return logp_BT

    @contextmanager
    def _at_hand(self, scorer: Scorer) -> Iterator[None]:
        """Offloading, a policy with weights of its own is on the device within alone."""
        if not self.offloads or scorer is self.policy or not isinstance(scorer, Policy):
            yield
            return
        scorer.to(self.policy.device)
        try:
            yield
        finally:
            scorer.to("cpu")

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
        if self.offloads:
            self._move_state(torch.device("cpu"))

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


@dataclass(frozen=True)
class _Part:
    """Rows between trunk and heads: the N states of their sampled tokens, row after row, and those that are valued."""

    rows: Tensor
    tokens_RT: Tensor
    sampled_RT: Tensor
    hidden_NH: Tensor
    logits_NV: Tensor | None
    valued_NH: Tensor | None

    @property
    def made(self) -> tuple[Tensor | None, ...]:
        """What the trunks made, and gradients flow back into."""
        return self.hidden_NH, self.logits_NV, self.valued_NH

    def detached(self, most: int) -> list[_Part]:
        """Consecutive rows of at most ``most`` sampled tokens, one at least, each with states that keep their gradient."""
        counts = self.sampled_RT.sum(dim=1).tolist()
        rows_in, states_in = [0], [0]
        for count in counts:
            if rows_in[-1] and states_in[-1] + count > most:
                rows_in.append(0)
                states_in.append(0)
            rows_in[-1] += 1
            states_in[-1] += count

        def leaves(x: Tensor | None) -> list[Tensor] | list[None]:
            if x is None:
                return [None] * len(rows_in)
            return [leaf.requires_grad_(x.requires_grad) for leaf in x.detach().split(states_in)]

        rows = (x.split(rows_in) for x in (self.rows, self.tokens_RT, self.sampled_RT))
        return [_Part(*piece) for piece in zip(*rows, *map(leaves, self.made), strict=True)]

    def backward(self, pieces: Sequence[_Part]) -> None:
        """Hand what the ``pieces`` have gathered on to the trunks."""
        roots, grads = [], []
        for whole, *leaves in zip(self.made, *(piece.made for piece in pieces), strict=True):
            if whole is not None and any(leaf.grad is not None for leaf in leaves):
                roots.append(whole)
                grads.append(torch.cat([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]))
        if roots:
            torch.autograd.backward(roots, grads)


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


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raises ValueError: there is no such precision, or the device cannot multiply in it."""
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be 'float32' or 'bfloat16', got {precision!r}")
    if precision == "float32":
        return
    if not multiplies_bfloat16(device):
        raise ValueError(
            f"precision 'bfloat16' wants a processor that multiplies in it (avx512_bf16, amx_bf16, a GPU from Ampere on), and "
            f"this {device.type} does not; use 'float32'"
        )


def check_save_memory(save_memory: SaveMemory, device: torch.device, *, adapts: bool = False) -> None:
    """Raises ValueError: there is no such way, it does nothing on this device, or the critic adapts the policy's layers."""
    if save_memory not in ("no", "recompute", "offload"):
        raise ValueError(f"save_memory must be 'no', 'recompute' or 'offload', got {save_memory!r}")
    if save_memory == "offload" and device.type == "cpu":
        raise ValueError(
            "save_memory 'offload' keeps in the CPU's memory what a GPU need not hold; on a CPU use 'recompute'"
        )
    if save_memory != "no" and adapts:
        raise ValueError(
            f"save_memory {save_memory!r} computes layers again after their forward pass, when the critic's adapter is no "
            "longer active; use another critic than \"lora\", or save_memory 'no' and smaller micro-batches"
        )
