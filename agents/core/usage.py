"""How well a step uses the machine: the arithmetic that it has to do, against what the machine can do."""

from __future__ import annotations

import functools
import resource
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from agents.core.decoder import head_width
from agents.core.linear import linear
from agents.core.policy import Policy

TRIES = 3


def training_flops(policy: Policy, length_R: Tensor) -> float:
    """Floating-point operations that forward and backward pass of sequences of these lengths cannot do without.

    A parameter of a matrix takes 2 a token forward, 2 for the gradient of its input, and 2 for its own if it is trained: 6 N
    (PaLM, arXiv:2204.02311, appendix B). Attention adds 12 times layers, width and the tokens looked at, half of the square
    of the length. The table of input embeddings is looked up and not multiplied with.
    """
    config = policy.model.config.get_text_config()
    width = config.num_attention_heads * head_width(config)
    every, trained = _matrix_parameters(policy)
    length_R = length_R.double()
    looked_at = (length_R * (length_R + 1) / 2).sum()
    return float((4 * every + 2 * trained) * length_R.sum() + 12 * config.num_hidden_layers * width * looked_at)


def _matrix_parameters(policy: Policy) -> tuple[int, int]:
    """Parameters of the policy's matrices, and those of them that are trained; a table that is also the head counts."""
    table, head = policy.model.get_input_embeddings().weight, policy.model.get_output_embeddings().weight
    matrices = [p for p in policy.parameters() if p.dim() > 1 and (p is not table or p is head)]
    return sum(p.numel() for p in matrices), sum(p.numel() for p in matrices if p.requires_grad)


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the fastest matrix product that torch has here, measured once."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = torch.ones(2, size, size, device=device, dtype=dtype)
    seconds = min(_seconds(multiply, a, b) for multiply in (functional.linear, linear) for _ in range(TRIES))
    return 2 * size**3 / seconds


def _seconds(multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    _wait(a.device)
    started = time.perf_counter()
    multiply(a, b)
    _wait(a.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_peak_mb(device: torch.device) -> float:
    """Most memory that was in use so far, in MiB: torch's on a GPU, otherwise the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, on a Mac in bytes
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
