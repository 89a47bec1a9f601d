"""How much memory a call needs: of the GPU by torch's count, else of this process by Linux's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

MEBIBYTE, GIBIBYTE = 2**20, 2**30


def extra_peak(device: str, call: Callable[[], object]) -> int:
    """Bytes by which the peak during a call lies above what was in use before it.

    In a process whose heap has been larger before, Linux counts too little: measure in a fresh one.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = in_use(device)
        call()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is in use
    before = in_use(device)
    call()
    return max(0, _status("VmHWM") - before)  # Linux counts in batches: the peak can read as just under what was in use


def in_use(device: str) -> int:
    """Bytes in use now."""
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def _status(field: str) -> int:
    (kibibytes,) = re.findall(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(kibibytes)
