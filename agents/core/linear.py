"""Matrix products with weights, by the fastest exact kernel that torch has for them.

In float32 on a CPU torch's own ``linear`` calls MKL, which on some processors reaches half of what oneDNN does in the same
precision, so here oneDNN is called outright. Everything else goes to torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FEW_ROWS, SMALL_WEIGHT = 12, 2**18
"""A smaller weight is not worth packing; and where there are fewer rows besides, torch's own product is the faster one."""

LARGE = 2**22
"""Entries of a matrix that is not copied to round its rows."""


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
    return product_with(x, weight, bias)


class PackedLinear:
    """``x W^T + b`` for a weight that stays as it is for a while: what suits the kernel best is made of it once.

    Args:
        weight: ``(O, I)``; it must not change as long as this is used.
        bias: ``(O,)``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self._onednn, self._few = _by_onednn(weight, weight), 0
        if self._onednn and weight.numel() < SMALL_WEIGHT:
            self._few = FEW_ROWS
        elif self._onednn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """The map of ``x`` ``(N, I)``, plus ``added`` ``(N, O)`` if given."""
        if not self._onednn or len(x) < self._few:
            product = functional.linear(x, self.weight, self.bias)
            return product if added is None else product.add_(added)
        if added is None:
            return product_with(x, self.weight, self.bias)
        sum_NO = torch.ops.mkldnn._linear_pointwise.binary(rounded(x), rounded(added), self.weight, self.bias, "add")
        return sum_NO[: len(x)]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products in bfloat16, and need not imitate them."""
    if device.type == "cpu":
        return any(there for name, there in torch.cpu.get_capabilities().items() if "bf16" in name)
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu"):  # which would not reach oneDNN
        return False
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def product_with(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` by oneDNN, without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(rounded(x), weight, bias, "none", [], "")[: len(x)]


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """``grad^T x``, of ``x W^T`` the gradient in W: ``(O, I)`` of ``(N, O)`` and ``(N, I)``, without a gradient of its own."""
    if not _by_onednn(grad, x):
        return grad.t() @ x
    if grad.numel() < LARGE:
        grad, x = rounded(grad), rounded(x)
    return torch.ops.mkldnn._linear_pointwise(grad.t(), x.t(), None, "none", [], "")


def rounded(x: Tensor) -> Tensor:
    """``x`` with rows of zeros, up to one of 8 to 16 numbers an octave.

    For each number of rows oneDNN makes a program of its own, which takes longer than the product of a small model.
    """
    rows = len(x)
    missing = -rows % (8 if rows <= 64 else 2 ** (rows.bit_length() - 4))
    return functional.pad(x, (0, 0, 0, missing)) if missing else x


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.rows, x = len(x), rounded(x)
        ctx.save_for_backward(x, weight)
        return product_with(x, weight, bias)[: ctx.rows]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = rounded(grads[0])
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            product_with(grad, weight.t())[: ctx.rows] if of_x else None,
            weight_gradient(grad, x) if of_weight else None,
            grads[0].sum(dim=0) if of_bias else None,
        )
