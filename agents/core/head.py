"""What the output head says of given tokens, without its logits ever being held for all of them.

A vocabulary is many times wider than the states that its logits are made from, so the logits of a batch are by far its
largest tensor, and their gradient is another. Here they are made for a few tokens at a time, and only what the gradient
needs is kept of them, if that is small; else it is computed again.

Shapes: N tokens, E width of the states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from agents.core.linear import linear, weight_gradient

KEPT = 2**25
"""Most entries ``N·V`` whose probabilities are kept for the gradient; more are computed again in the backward pass."""
AT_ONCE = 2**23
"""Entries of the logits that are made at once on a CPU, few enough for its caches; elsewhere they are :data:`KEPT`."""
NEVER = -1e30
"""The logit of an id that is not allowed: finite, so that its share of the entropy is 0 and not undefined."""


def token_logprobs(
    hidden_NE: Tensor,
    weight_VE: Tensor,
    bias_V: Tensor | None,
    tokens_N: Tensor,
    temperature: float,
    allowed_V: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given tokens, and the entropies of the distributions that they are from.

    The distribution is :meth:`agents.core.policy.Policy.distribution` of the logits ``hidden W^T + b``. The logits have the
    states' type, all else is in float32 (in float64 for float64). Within ``torch.autocast`` they have its type.

    Args:
        hidden_NE: the states.
        weight_VE: W, of the head.
        bias_V: b.
        tokens_N: int64, a token for each state.
        temperature: greater than 0; the logits are divided by it.
        allowed_V: bool; no other id has any probability. None allows all.

    Returns:
        ``logp_N``, differentiable in states, weight and bias; ``entropy_N`` in nats, without gradient.
    """
    device = hidden_NE.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_NE, weight_VE = hidden_NE.to(dtype), weight_VE.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    if not len(hidden_NE):  # still something to call backward on
        return hidden_NE.sum(dim=1), hidden_NE.new_zeros(0)
    learned = any(x is not None and x.requires_grad for x in (hidden_NE, weight_VE, bias_V))
    if torch.is_grad_enabled() and learned:
        return _TokenLogprobs.apply(hidden_NE, weight_VE, bias_V, tokens_N, temperature, allowed_V)
    parts = [
        (logp_N, entropy_N)
        for _, logp_N, entropy_N, _ in _pieces(hidden_NE, weight_VE, bias_V, tokens_N, temperature, allowed_V)
    ]
    return _joined(parts)


class _TokenLogprobs(torch.autograd.Function):
    """Of a token's log-probability the gradient in the logits is ``(onehot - p) / temperature``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor | None,
        tokens_N: Tensor,
        temperature: float,
        allowed_V: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden_NE, weight_VE, bias_V, tokens_N, allowed_V)
        ctx.temperature = temperature
        small = len(hidden_NE) * len(weight_VE) <= KEPT
        ctx.slope_NV = hidden_NE.new_empty(len(hidden_NE), len(weight_VE)) if small else None
        parts = []
        for piece, logp_N, entropy_N, prob_NV in _pieces(
            hidden_NE, weight_VE, bias_V, tokens_N, temperature, allowed_V
        ):
            parts.append((logp_N, entropy_N))
            if small:
                ctx.slope_NV[piece] = _slope(prob_NV, logp_N, tokens_N[piece])
        logp_N, entropy_N = _joined(parts)
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NE, weight_VE, bias_V, tokens_N, allowed_V = ctx.saved_tensors
        scale_N1 = (grads[0] / -ctx.temperature).unsqueeze(1)
        if ctx.slope_NV is not None:
            # Turned into the gradient where it lies; a second backward pass, which is rare, computes it again.
            slope_NV, ctx.slope_NV = ctx.slope_NV, None
            pieces: Any = [(slice(None), slope_NV)]
        else:
            pieces = (
                (piece, _slope(prob_NV, logp_N, tokens_N[piece]).to(hidden_NE.dtype))
                for piece, logp_N, _, prob_NV in _pieces(
                    hidden_NE, weight_VE, bias_V, tokens_N, ctx.temperature, allowed_V
                )
            )
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        hidden_grads, weight_grad, bias_grad = [], None, None
        for piece, grad_NV in pieces:
            grad_NV.mul_(scale_N1[piece])
            if of_hidden:
                hidden_grads.append(linear(grad_NV, weight_VE.t()))
            if of_weight:
                weight_grad = _added(weight_grad, weight_gradient(grad_NV, hidden_NE[piece]))
            if of_bias:
                bias_grad = _added(bias_grad, grad_NV.sum(dim=0))
        return torch.cat(hidden_grads) if of_hidden else None, weight_grad, bias_grad, None, None, None


def _pieces(
    hidden_NE: Tensor,
    weight_VE: Tensor,
    bias_V: Tensor | None,
    tokens_N: Tensor,
    temperature: float,
    allowed_V: Tensor | None,
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """A few tokens at a time: which, their log-probabilities and entropies, and all probabilities ``(n, V)``."""
    size = max((AT_ONCE if hidden_NE.device.type == "cpu" else KEPT) // len(weight_VE), 1)
    for start in range(0, len(hidden_NE), size):
        piece = slice(start, start + size)
        logits_NV = linear(hidden_NE[piece], weight_VE, bias_V)
        if logits_NV.dtype in (torch.float16, torch.bfloat16):
            logits_NV = logits_NV.float()
        if temperature != 1:
            logits_NV = logits_NV.div_(temperature)
        if allowed_V is not None:
            logits_NV = logits_NV.masked_fill_(~allowed_V, NEVER)
        logp_NV = torch.log_softmax(logits_NV, dim=1)
        prob_NV = torch.exp(logp_NV, out=logits_NV)
        logp_N = logp_NV.gather(1, tokens_N[piece].unsqueeze(1)).squeeze(1)
        if allowed_V is not None:
            logp_N = logp_N.masked_fill(~allowed_V[tokens_N[piece]], -torch.inf)
        yield piece, logp_N, -logp_NV.mul_(prob_NV).sum(dim=1), prob_NV


def _slope(prob_NV: Tensor, logp_N: Tensor, tokens_N: Tensor) -> Tensor:
    """``p - onehot``, in the memory of ``prob_NV``. ``expm1`` keeps the digits of ``p - 1`` where p is almost 1."""
    return prob_NV.scatter_(1, tokens_N.unsqueeze(1), torch.expm1(logp_N).unsqueeze(1))


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    logp_N, entropy_N = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return logp_N, entropy_N


def _added(total: Tensor | None, x: Tensor) -> Tensor:
    return x if total is None else total.add_(x)
