"""The learner: gradients by micro-batches, one optimiser step. It knows nothing of the algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from agents.core.critic import AdapterCritic, Critic
from agents.core.gate import gap_metrics
from agents.core.head import KEPT
from agents.core.linear import multiplies_bfloat16
from agents.core.lora import ADAPTERS_FILE, adapter_state, adapters, load_adapters
from agents.core.memory import WHAT_TO_DO, NoMemoryError, gradient_at_hand, is_out_of_memory, needing
from agents.core.policy import Policy, Scorer, States
from agents.core.timing import Clock
from agents.core.trajectories import Trajectories
from textenv.episodes import Source

OPTIMIZER_FILE = "optimizer.safetensors"
CRITIC_FILE = "critic.safetensors"
LIMIT = "tokens_per_microbatch"
"""Beside the optimiser's state: how large micro-batches are by now."""
OF_OPTIMISER = "set save_memory to 'offload' on a GPU, train adapters (lora_rank), or take a smaller model"

Precision = Literal["float32", "bfloat16"]
SaveMemory = Literal["no", "recompute", "offload"]
Result = TypeVar("Result")


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
            changes no result. Where the memory does not hold as many it is halved, and all begins anew with the same gradient.
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
        self._tried = 1, 0
        """rows of the micro-batch under way, and their tokens, padding included"""
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
            ``loss``, ``grad_norm`` before clipping (and ``critic_grad_norm``), ``entropy`` in nats a token, how far tokens'
            log-probabilities are from those that they were sampled with (:func:`agents.core.gate.gap_metrics`), and the sums
            of the metrics that the losses give.

        Raises:
            FloatingPointError: the gradient is not finite; the weights are as before.
            NoMemoryError: for a single row, or for the optimiser's state.
        """

        def gather() -> dict[str, Tensor]:
            self.optimizer.zero_grad(set_to_none=True)
            return self._gather(batch, rows, loss, beside)

        sums = self._fitting(gather)
        with self.clock("optimise"), needing("the optimiser's state", OF_OPTIMISER):
            return self._optimise(sums)

    def _gather(self, batch: Trajectories, rows: Tensor, loss: Loss, beside: Beside | None) -> dict[str, Tensor]:
        """Add the gradient of a step to the parameters'. Returns the step's metrics."""
        tokens = batch.sampled_BT[rows].sum()
        gap_BT = torch.zeros_like(batch.logp_BT)

        def observed(scored: Scored) -> tuple[Tensor, dict[str, Tensor]]:
            share, metrics = loss(scored)
            gap_RT = scored.logp_RT.detach() - scored.of(batch.logp_BT)
            gap_BT[scored.rows, : gap_RT.shape[1]] = gap_RT
            batch.note("entropy", scored.entropy_RT, scored.rows)
            batch.note("ratio", gap_RT.exp(), scored.rows)
            return share, metrics | {"loss": share.detach(), "entropy": scored.entropy_RT.sum() / tokens}

        sums: dict[str, Tensor] = {}
        for part in self.microbatches(batch, rows):
            self._add_gradient(self.trunk(batch, part), observed, sums)
        if beside is not None:
            other, other_loss = beside
            for part in self.microbatches(other, other.rows):
                self._add_gradient(self.trunk(other, part, valued=False), other_loss, sums)
        return sums | gap_metrics(gap_BT[rows], batch.sampled_BT[rows])

    def _fitting(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returns; where the memory does not hold a micro-batch of it, it begins anew with smaller ones.

        Raises:
            NoMemoryError: for a single row.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                rows, tokens = self._tried
                if not is_out_of_memory(error):
                    raise
                if rows == 1:
                    raise NoMemoryError(f"a single row, of {tokens} tokens,", error, WHAT_TO_DO) from error
            # Only here is all given back that the error's traceback held.
            if self.policy.device.type == "cuda":
                torch.cuda.empty_cache()
            self.tokens_per_microbatch = tokens // 2
            print(
                f"a micro-batch of {rows} rows of {tokens // rows} tokens found no memory: from now on one has at most "
                f"{self.tokens_per_microbatch} tokens, with the same result",
                flush=True,
            )

    def rehearse(self, batch: Trajectories) -> None:
        """Learn from all of a batch and forget it: micro-batches that the memory does not hold are halved now.

        Raises:
            NoMemoryError: for a single row.
        """

        def loss(scored: Scored) -> tuple[Tensor, dict[str, Tensor]]:
            share = scored.logp_RT.sum()
            return (share if scored.value_RT is None else share + scored.value_RT.sum()), {}

        with gradient_at_hand(self.optimizer):
            self._fitting(lambda: self._gather(batch, batch.rows, loss, None))

    def _add_gradient(self, part: Part, loss: Loss, sums: dict[str, Tensor]) -> None:
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
        return self._readout(self.trunk(batch, rows, valued=valued))

    def trunk(self, batch: Trajectories, rows: Tensor, *, valued: bool = True) -> Part:
        """The way of ``rows`` through the trunk, or the trunks."""
        tokens_RT, sampled_RT = _cut(batch, rows)
        valued_NH = None
        with self.clock("forward"), self._in_precision():
            states = self.policy.states(tokens_RT, sampled_RT)
            if self.critic is not None and valued:
                valued_NH = self.critic.hidden(tokens_RT, sampled_RT, states.hidden_NH)
        return Part(rows, tokens_RT, sampled_RT, states.hidden_NH, states.logits_NV, valued_NH)

    def _readout(self, part: Part) -> Scored:
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
        scorer = policy or self.policy

        def score() -> Tensor:
            logp_BT = torch.zeros_like(batch.logp_BT)
            for part in self.microbatches(batch, rows):
                tokens_RT, sampled_RT = _cut(batch, part)
                logp_RT, _ = scorer.logprobs(tokens_RT, sampled_RT, self.temperature)
                logp_BT[part, : logp_RT.shape[1]] = logp_RT
            return logp_BT

        with self.clock("forward"), self._at_hand(scorer), self._in_precision():
            return self._fitting(score)

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

        def score() -> tuple[Tensor, Tensor]:
            logp_BT, value_BT = torch.zeros_like(batch.logp_BT), torch.zeros_like(batch.logp_BT)
            for part in self.microbatches(batch, rows):
                scored = self.score(batch, part)
                assert scored.value_RT is not None
                logp_BT[part, : scored.logp_RT.shape[1]] = scored.logp_RT
                value_BT[part, : scored.logp_RT.shape[1]] = scored.value_RT
            return logp_BT, value_BT

        return self._fitting(score)

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

    def measure_gap(self, batch: Trajectories, rows: Tensor, policy: Scorer | None = None) -> dict[str, float]:
        """How far ``rows`` are from what they were sampled with, as :meth:`step` has it, where there is no step to take.

        Args:
            policy: which scores them; default the one that is trained.
        """
        gap_RT = self.logprobs(batch, rows, policy=policy)[rows] - batch.logp_BT[rows]
        return {name: float(gap) for name, gap in gap_metrics(gap_RT, batch.sampled_BT[rows]).items()}

    def files(self) -> dict[str, dict[str, Tensor]]:
        """The optimiser's state, and what is trained that a saved policy does not hold: tensors by file and name."""
        state = self.optimizer.state_dict()["state"]
        files = {
            OPTIMIZER_FILE: {f"{at}/{name}": tensor for at, entry in state.items() for name, tensor in entry.items()}
        }
        if self.critic is not None:
            files[CRITIC_FILE] = self.critic.state_dict()
        if adapters(self.policy.model):
            files[ADAPTERS_FILE] = adapter_state(self.policy.model)
        files[OPTIMIZER_FILE][LIMIT] = torch.tensor(self.tokens_per_microbatch)
        return files

    def save(self, folder: Path) -> None:
        """Write :meth:`files` to ``folder``."""
        for name, tensors in self.files().items():
            save_file(tensors, folder / name)

    def load(self, folder: Path) -> None:
        """Take from ``folder`` what :meth:`save` left there."""
        if adapters(self.policy.model):
            load_adapters(self.policy, folder)
        if self.critic is not None:
            self.critic.load_state_dict(load_file(folder / CRITIC_FILE))
        tensors = load_file(folder / OPTIMIZER_FILE)
        if LIMIT in tensors:  # runs of old have none
            self.tokens_per_microbatch = min(self.tokens_per_microbatch, int(tensors.pop(LIMIT)))
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
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
            self._tried = len(part), len(part) * length
        if part:
            yield torch.tensor(part, device=rows.device)


@dataclass(frozen=True)
class Part:
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

    def detached(self, most: int) -> list[Part]:
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
        return [Part(*piece) for piece in zip(*rows, *map(leaves, self.made), strict=True)]

    def backward(self, pieces: Sequence[Part]) -> None:
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


def mean_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over the updates on one batch; but the gap to the engine is that of the first, when all was fresh."""
    first = updates[0]
    return {
        name: value if name.startswith("logp_gap") else sum(update[name] for update in updates) / len(updates)
        for name, value in first.items()
    }


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
