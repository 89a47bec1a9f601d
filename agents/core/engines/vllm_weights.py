"""Whether a vLLM model in this process computes with the weights of a policy, and if not, which of them it lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
EPSILON = torch.finfo(torch.float32).eps
ROUNDING = 4
"""How far a row's product with a vector may be off: so many epsilons of the sum of its terms' absolute values."""


@torch.no_grad()
def differing_parameters(model: Any, state: Mapping[str, Tensor], dtype: torch.dtype) -> list[str]:
    """Names of a policy's parameters of which vLLM's model holds other values, in the order of ``state``.

    A tensor is compared bit by bit. A matrix that was packed for a CPU kernel, and can be read no more, is known by what the
    kernel computes: its product with a fixed vector, a checksum of each row. Where vLLM fuses several matrices into
    one, such as ``qkv_proj``, each is compared with its own rows. What vLLM has under no such name, such as the experts of a
    mixture, is left out; what it lays out otherwise than the policy differs.

    Args:
        model: vLLM's, whole and not quantised.
        state: of the policy, under the names of a checkpoint; matrices are ``(out, in)``.
        dtype: in which vLLM computes.
    """
    modules = dict(model.named_modules())
    differing = []
    for name, tensor in state.items():
        path, start = _place(name, state, getattr(model, "packed_modules_mapping", None) or {})
        module, kind = modules.get(path), name.rpartition(".")[2]
        held = getattr(module, kind, None)
        if module is None or held is None:
            continue
        sent = tensor.detach().to(held.device, dtype)
        rows = slice(start, start + len(sent)) if sent.dim() else ...
        if kind == "weight" and _is_packed(module):
            same = _same_product(module.cpu_linear, held, rows, sent)
        else:
            same = _same_bits(held[rows].to(dtype), sent)
        if not same:
            differing.append(name)
    return differing


def refresh_tied_head(model: Any) -> None:
    """On a CPU vLLM keeps a packed copy of the output head, which reloading the embedding it is tied to does not renew."""
    for module in model.modules():
        if _is_packed_head(module):
            module.quant_method.process_weights_after_loading(module)


def _is_packed_head(module: Any) -> bool:
    return type(module).__name__ == "ParallelLMHead" and hasattr(module, "cpu_linear")


def _is_packed(module: Any) -> bool:
    """Whether a CPU kernel computes with a copy of the weight."""
    # An embedding has a kernel and its weight: it is the weight that is read.
    return hasattr(module, "cpu_linear") and (module.weight.numel() == 0 or _is_packed_head(module))


def _place(name: str, state: Mapping[str, Tensor], fused: Mapping[str, list[str]]) -> tuple[str, int]:
    """The path of the module that holds a parameter, and the first of its rows there."""
    path, _, kind = name.rpartition(".")
    outer, _, inner = path.rpartition(".")
    for whole, pieces in fused.items():
        if inner in pieces:
            before = [f"{outer}.{piece}.{kind}" for piece in pieces[: pieces.index(inner)]]
            return f"{outer}.{whole}", sum(len(state[other]) for other in before if other in state)
    return path, 0


def _same_bits(held: Tensor, sent: Tensor) -> bool:
    """As of numbers, but that a NaN is the same as itself."""
    bits = BITS[sent.dtype]
    return torch.equal(held.contiguous().view(bits), sent.contiguous().view(bits))


def _same_product(kernel: Callable[..., Tensor], weight: Tensor, rows: Any, sent: Tensor) -> bool:
    dtype = sent.dtype
    # Whole numbers, which every dtype has, and more of them above 0: a shift of a whole row must not cancel.
    drawn = torch.randint(3, (sent.shape[1],), generator=torch.Generator().manual_seed(0))
    vector = torch.tensor([-1, 1, 2])[drawn].to(sent)
    held = kernel(vector.unsqueeze(0), weight, None)[0, rows].float()
    sent, vector = sent.float(), vector.float()
    product = sent @ vector
    # The kernel adds up in float32 and rounds once.
    limit = ROUNDING * EPSILON * (sent.abs() @ vector.abs()) + torch.finfo(dtype).eps * product.abs()
    if held.shape != product.shape:
        return False
    same = ((held - product).abs() <= limit) | (held.isnan() & product.isnan())
    return bool(same.all())
