"""Generation in this process, with the policy's own weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from agents.core.engines.base import Completions, Engine, OnEnd, Sampling, check_budgets
from agents.core.policy import Policy
from textenv.task import Finish

COMPACT_BELOW = 0.75
"""Finished rows leave once at most this share of the batch goes on: to leave earlier copies more than it saves."""
DRAWS_AT_ONCE = 64
"""Tokens for which uniform numbers are drawn at a time."""


class NativeEngine(Engine):
    """Decodes with the policy's model: each prompt is prefilled once for its n completions, and finished rows leave.

    Keys and values live in buffers that grow by doubling. Models with layers other than plain full attention (sliding
    windows, recurrent states) use transformers' own cache instead.

    Args:
        policy: whose weights to use.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def sync(self, policy: Policy) -> None:
        self.policy = policy
        self.version += 1

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        budgets: Sequence[int] | None = None,
        on_end: OnEnd | None = None,
    ) -> Completions:
        budget_B = check_budgets(prompts, sampling, n, budgets, self.policy.max_context)
        eos_ids = self.policy.tokenizer.eos_ids
        context = _Context(self.policy, prompts, n, int(budget_B.max()))
        row_B = np.arange(len(budget_B))  # which completion each row of the batch is
        alive_B = np.ones(len(row_B), dtype=bool)  # False for a row that ended and has not left yet
        finish = np.full(len(row_B), Finish.NONE)
        tokens_BT = np.zeros((len(row_B), int(budget_B.max())), dtype=np.int64)
        logp_BT = np.zeros(tokens_BT.shape, dtype=np.float32)
        length_B = np.zeros(len(row_B), dtype=np.int64)

        for length, uniform_B in enumerate(_uniforms(sampling.seed, len(row_B)), start=1):
            token_B, logp_B = self._draw(context.logits_BV, uniform_B[row_B], sampling)
            ids_B = token_B.cpu().numpy()
            tokens_BT[row_B[alive_B], length - 1] = ids_B[alive_B]
            logp_BT[row_B[alive_B], length - 1] = logp_B.cpu().numpy()[alive_B]
            finish_B = np.select(
                [np.isin(ids_B, eos_ids), np.isin(ids_B, sampling.stop_ids), budget_B[row_B] == length],
                [Finish.EOS, Finish.STOP, Finish.LENGTH],
                Finish.NONE,
            )
            finish[row_B[alive_B]] = finish_B[alive_B]
            length_B[row_B[alive_B]] = length
            if on_end is not None:
                for row in row_B[alive_B & (finish_B != Finish.NONE)]:
                    on_end(int(row), tokens_BT[row, :length])
            alive_B &= finish_B == Finish.NONE
            if not alive_B.any():
                break
            if alive_B.mean() <= COMPACT_BELOW:
                kept = torch.from_numpy(np.flatnonzero(alive_B)).to(token_B.device)
                context.keep(kept)
                token_B, row_B, alive_B = token_B[kept], row_B[alive_B], alive_B[alive_B]
            context.append(token_B)
        return Completions(
            tokens=[row[:length] for row, length in zip(tokens_BT, length_B, strict=True)],
            logprobs=[row[:length] for row, length in zip(logp_BT, length_B, strict=True)],
            finish=[Finish(reason) for reason in finish],
        )

    def _draw(self, logits_BV: Tensor, uniform_B: np.ndarray, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """A token and its log-probability for each row, by inverting the distribution function at ``uniform_B``."""
        logp_BV = self.policy.distribution(logits_BV, sampling.temperature or 1.0)
        if sampling.temperature == 0:
            token_B1 = logp_BV.argmax(dim=1, keepdim=True)
        else:
            if sampling.top_k or sampling.top_p < 1:
                logp_BV = _truncate(logp_BV, sampling.top_k, sampling.top_p)
            token_B1 = draw(logp_BV, uniform_B).unsqueeze(1)
        return token_B1.squeeze(1), logp_BV.gather(1, token_B1).squeeze(1)


def draw(logp_BV: Tensor, uniform_B: np.ndarray) -> Tensor:
    """A token of each row's distribution, int64 ``(B,)``: its distribution function inverted at ``uniform_B`` in [0, 1)."""
    mass_BV = logp_BV.double().exp().cumsum(dim=1)
    uniform_B1 = torch.from_numpy(uniform_B).to(logp_BV.device).unsqueeze(1)
    # Scaled by the total and searched to the right, so that rounding never picks an id without probability.
    return torch.searchsorted(mass_BV, uniform_B1 * mass_BV[:, -1:], right=True).squeeze(1)


class _Context:
    """The sequences being written: the model's cache, masks and positions, and the logits of the next token.

    Prompts are padded on the left; when all have one length there is neither mask nor position to pass.
    """

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], n: int, budget: int) -> None:
        self.policy = policy
        self.logits_BV: Tensor
        self.length = max(map(len, prompts))
        lengths_P = np.array([len(prompt) for prompt in prompts])
        tokens_PT = np.zeros((len(prompts), self.length), dtype=np.int64)
        real_PT = np.arange(self.length) >= self.length - lengths_P[:, None]
        tokens_PT[real_PT] = np.concatenate([np.asarray(prompt, dtype=np.int64) for prompt in prompts])

        self.cache: Any = _make_cache(policy.model.config)
        self.mask_BT: Tensor | None = None
        self.position_B: Tensor | None = None
        if not real_PT.all():
            real_PT = np.pad(real_PT, ((0, 0), (0, budget)), constant_values=True)
            self.mask_BT = torch.from_numpy(real_PT).to(policy.device)
            self.position_B = torch.from_numpy(lengths_P).to(policy.device)
        self._forward(torch.from_numpy(tokens_PT).to(policy.device), self._prefill_positions())
        if n > 1:
            self.keep(torch.arange(len(prompts), device=policy.device).repeat_interleave(n))
            self.logits_BV = self.logits_BV.repeat_interleave(n, dim=0)

    def append(self, token_B: Tensor) -> None:
        """Add one token to each row."""
        self.length += 1
        position_B1 = None
        if self.position_B is not None:
            # A row that ended but has not left yet stays within the model's positions.
            position_B1 = self.position_B.clamp(max=(self.policy.max_context or self.length) - 1).unsqueeze(1)
            self.position_B = self.position_B + 1
        self._forward(token_B.unsqueeze(1), position_B1)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, in this order, a row as often as it is named."""
        self.cache.reorder_cache(rows)
        if self.mask_BT is not None and self.position_B is not None:
            self.mask_BT, self.position_B = self.mask_BT[rows], self.position_B[rows]

    def _prefill_positions(self) -> Tensor | None:
        if self.mask_BT is None:
            return None
        return (self.mask_BT[:, : self.length].cumsum(dim=1) - 1).clamp(min=0)

    def _forward(self, tokens_BT: Tensor, position_BT: Tensor | None) -> None:
        logits_B1V, self.cache = self.policy.logits(
            tokens_BT,
            torch.tensor([tokens_BT.shape[1] - 1], device=tokens_BT.device),
            attention_mask=None if self.mask_BT is None else self.mask_BT[:, : self.length],
            position_ids=position_BT,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits_BV = logits_B1V[:, 0]


class GrowingLayer(DynamicLayer):
    """Keys and values in buffers that double when full, so that a step writes one column and copies no past."""

    capacity = 0
    key_buffer: Any
    value_buffer: Any

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self.capacity:
            self.capacity = max(end, 2 * self.capacity)
            self.key_buffer = _grown(self.keys, key_states, start, self.capacity)
            self.value_buffer = _grown(self.values, value_states, start, self.capacity)
            self.is_initialized = True
        self.key_buffer[:, :, start:end] = key_states
        self.value_buffer[:, :, start:end] = value_states
        self.keys, self.values = self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.key_buffer, self.value_buffer, self.capacity = self.keys, self.values, self.get_seq_length()


def _grown(past: Tensor | None, states: Tensor, length: int, capacity: int) -> Tensor:
    buffer = states.new_empty((*states.shape[:2], capacity, states.shape[3]))
    if past is not None:
        buffer[:, :, :length] = past
    return buffer


def _make_cache(config: Any) -> Cache:
    stock = DynamicCache(config=config)
    if all(type(layer) is DynamicLayer for layer in stock.layers):
        return Cache(layers=[GrowingLayer() for _ in stock.layers])
    return stock


def _uniforms(seed: int | tuple[int, ...], rows: int) -> Iterator[np.ndarray]:
    """Uniform numbers ``(rows,)`` in [0, 1), token after token; row i's do not depend on how many rows there are."""
    words = [seed] if isinstance(seed, int) else list(seed)
    for block in count():
        yield from np.random.default_rng([*words, block]).random((rows, DRAWS_AT_ONCE)).T


def _truncate(logp_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """The log-probabilities once all but the k likeliest, and those beyond a mass of p, are cut off."""
    sorted_BV, order_BV = logp_BV.sort(dim=1, descending=True, stable=True)
    before_BV = sorted_BV.exp().cumsum(dim=1) - sorted_BV.exp()
    cut_BV = before_BV >= top_p
    if top_k:
        cut_BV[:, top_k:] = True
    return torch.log_softmax(logp_BV.masked_fill(cut_BV.gather(1, order_BV.argsort(dim=1)), -torch.inf), dim=1)
