"""Models and workloads of these programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.speed.generation import Workload
from benchmarks.speed.report import Settings
from benchmarks.speed.shapes import TOY, Shape, uneven_lengths

# Shapes of Qwen2.5, in the classes of Llama: what differs are the biases of queries, keys and values.
HALF_BILLION = Shape("0.5B", 896, 24, 14, 4864, 151_936, kv_heads=2, tied=True, context=4096)
ONE_AND_A_HALF_BILLION = Shape("1.5B", 1536, 28, 12, 8960, 151_936, kv_heads=2, tied=True, context=4096)
TOY_GROUPED = Shape("toy", 64, 1, 2, 64, 512, kv_heads=1, tied=True, context=256)
SCRATCH = Shape("26M", 512, 8, 8, 1408, 97)
"""Learns arithmetic from nothing, a token a character."""


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        shapes: models, the smaller first.
        scratch: the model that learns from nothing.
        prompts, group, prompt_tokens, new_tokens: of a step: P, G, and most tokens of each.
        matmul: width of the matrices whose product gives the peak rate.
    """

    shapes: tuple[Shape, ...] = (HALF_BILLION, ONE_AND_A_HALF_BILLION)
    scratch: Shape = SCRATCH
    prompts: int = 64
    group: int = 8
    prompt_tokens: int = 256
    new_tokens: int = 1024
    matmul: int = 8192

    @property
    def workload(self) -> Workload:
        length_B = uneven_lengths(self.prompts * self.group, self.new_tokens)
        return Workload(f"{len(length_B)} of 1 to {self.new_tokens:,} tokens", length_B, self.prompt_tokens)


TOYS = Sizes((TOY_GROUPED,), TOY, prompts=2, prompt_tokens=16, new_tokens=12, matmul=64)


def sizes(settings: Settings) -> Sizes:
    return TOYS if settings.quick else Sizes()


def precision(settings: Settings) -> dict[str, Any]:
    """What a learner's products with weights are made in: bfloat16 on a GPU, where weights and optimiser stay in float32."""
    return {"precision": "bfloat16"} if settings.device == "cuda" else {}


def dtype(settings: Settings) -> torch.dtype:
    """What an engine generates in: bfloat16 on a GPU, else float32."""
    return torch.bfloat16 if settings.device == "cuda" else torch.float32
