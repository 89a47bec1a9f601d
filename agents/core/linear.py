"""Matrix products with weights, by the fastest exact kernel that torch has for them.

In float32 on a CPU torch's own ``linear`` calls MKL, which on some processors reaches half of what oneDNN does in the same
precision, so here oneDNN is called outright. Everything else goes to torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FEW_ROWS, SMALL_WEIGHT = 12, 2**17
"""Rows, and entries of a weight, below both of which torch's own product is faster: oneDNN takes longer to start."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, differentiable.

    Args:
        x: ``(N, I)``.
        weight: W, ``(O, I)``.
        bias: b, ``(O,)``.
    """
    if not _by_onednn(x, weight):
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


class PackedLinear:
    """``x W^T + b`` for a weight that stays as it is for a while: what suits the kernel best is made of it once.

    Args:
        weight: ``(O, I)``; it must not change as long as this is used.
        bias: ``(O,)``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        onednn = _by_onednn(weight, weight)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight) if onednn else None
        self._plain_below = FEW_ROWS if weight.numel() < SMALL_WEIGHT else 0
        self._plain = weight if self._plain_below or not onednn else None

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """The map of ``x`` ``(N, I)``, plus ``added`` ``(N, O)`` if given."""
        if self._packed is None or len(x) < self._plain_below:
            assert self._plain is not None
            product = functional.linear(x, self._plain, self.bias)
            return product if added is None else product.add_(added)
        if added is None:
            return _product(x, self._packed, self.bias)
        return torch.ops.mkldnn._linear_pointwise.binary(x, added, self._packed, self.bias, "add")


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu"):  # which would not reach oneDNN
        return False
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.t()) if of_x else None,
            _product(grad.t(), x.t()) if of_weight else None,
            grad.sum(dim=0) if of_bias else None,
        )
