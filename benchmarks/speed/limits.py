"""What the machine itself could do: how fast it multiplies and reads, and how long a generation must take at least."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from agents.core.linear import linear
from benchmarks.speed.report import seconds_on
from benchmarks.speed.shapes import Shape

TRIES = 3
"""Measurements of a rate, of which the best counts."""


def matmul_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of a product of two ``size × size`` matrices: the best of a few, by torch's own
    product and by ours."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(_best_seconds(partial(multiply, a, b), device) for multiply in (functional.linear, linear))


def read_rate(device: str, dtype: torch.dtype, num_bytes: float) -> float:
    """Bytes a second at which so many of them are read time after time: the best of a few matrix-vector products, which
    read, and copies, which read one half and write the other. A processor's caches count where they hold it all."""
    columns = 1024
    matrix = torch.zeros(max(2, int(num_bytes) // dtype.itemsize // columns), columns, device=device, dtype=dtype)
    vector = torch.zeros(columns, device=device, dtype=dtype)
    source, copy = (half.clone() for half in matrix[: len(matrix) // 2 * 2].chunk(2))
    read = matrix.nbytes / _best_seconds(lambda: matrix @ vector, device)
    copied = 2 * source.nbytes / _best_seconds(lambda: copy.copy_(source), device)
    return max(read, copied)


def _best_seconds(call: Callable[[], object], device: str) -> float:
    call()
    return min(seconds_on(device, call) for _ in range(TRIES))


def step_costs(shape: Shape, prompt: int, length_B: np.ndarray, itemsize: int) -> tuple[np.ndarray, np.ndarray]:
    """Flops and bytes ``(T,)`` of each step of a generation that writes ``length_B`` tokens after ``prompt`` ones.

    Each step reads the weights once, and the keys and values of the rows that still go on. The prompts' own cost is left
    out, so the limit is a little too high.
    """
    step_T = np.arange(1, int(length_B.max()) + 1)
    rows_T = (length_B[:, None] >= step_T).sum(axis=0)
    context_T = prompt + step_T
    flops_T = rows_T * [shape.token_flops(context) for context in context_T.tolist()]
    bytes_T = shape.weight_bytes(itemsize) + rows_T * context_T * shape.cache_bytes(itemsize)
    return flops_T, bytes_T


def least_seconds(flops_T: np.ndarray, bytes_T: np.ndarray, flop_rate: float, byte_rate: float) -> tuple[float, str]:
    """What the steps take at least, each bound by its flops or its bytes, and which of the two binds on the whole."""
    compute_T, read_T = flops_T / flop_rate, bytes_T / byte_rate
    return float(np.maximum(compute_T, read_T).sum()), "flops" if compute_T.sum() > read_T.sum() else "bytes"
