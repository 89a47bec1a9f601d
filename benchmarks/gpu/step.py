"""A whole GRPO step of the smaller model, long answers included, and TRL's where it is installed.

The model's weights are fresh and the reward is a coin flipped by the completion. One id in so many ends a completion that
lengths are spread as reasoning's are.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import textenv
from agents.core.models import load_model
from agents.grpo import GRPO
from benchmarks.gpu.sizes import Sizes, dtype, precision, sizes
from benchmarks.measure import Turn
from benchmarks.sample_efficiency import THEIRS
from benchmarks.speed.generation import short
from benchmarks.speed.report import Settings, Table
from benchmarks.speed.shapes import Shape
from benchmarks.speed.step import (
    OUR_GRPO,
    RATE,
    TRL_GRPO,
    WARM_UP,
    Figures,
    Laps,
    parts_table,
    train_agent,
    train_trl,
    trainers_table,
)
from textenv.tokenizer import CHARACTERS

ENV_ID = "benchmarks/Coin-v0"
TRL_ROWS = 8
"""Of a micro-batch; TRL computes the logits of whole rows."""


def run(settings: Settings, out: Path) -> Iterator[Table]:
    """Seconds a step, of ours and TRL's in turns, and the parts of ours."""
    size = sizes(settings)
    shape = size.shapes[0]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        save_model(shape, size, folder)
        measures: dict[str, Callable[[], Figures]] = {
            OUR_GRPO: stack.enter_context(settings.peer(our_steps, folder, settings))
        }
        if find_spec("trl"):
            batches = WARM_UP + settings.rounds + 1
            measures[TRL_GRPO] = stack.enter_context(settings.peer(trl_steps, folder, batches, settings))
        figures = settings.in_turns(measures)
    title = (
        f"a GRPO step, {shape.name}: {size.prompts} prompts of {size.prompt_tokens} tokens × {size.group} completions "
        f"of 1 to {size.new_tokens:,}"
    )
    yield trainers_table(figures, title)
    yield parts_table(figures[OUR_GRPO])


def save_model(shape: Shape, size: Sizes, folder: str) -> None:
    """Save a fresh model of which so many ids end a completion that it has a sixth of ``new_tokens`` in the mean."""
    policy = shape.policy(endless=False)
    policy.tokenizer.eos_ids = tuple(range(0, shape.vocab, max(1, size.new_tokens // 6)))
    policy.save(folder)


def our_steps(turn: Turn, model: str, settings: Settings) -> None:
    """A :class:`benchmarks.measure.Peer`'s program: GRPO's steps, one a turn."""
    size = register_coin(settings)
    config = {"model": model, "device": settings.device, "learning_rate": RATE, "learning_rate_decay": "constant"}
    config |= {"prompts_per_step": size.prompts, "group_size": size.group, **precision(settings)}
    config |= {"engine": f"native dtype {short(dtype(settings))}"} if settings.device == "cuda" else {}
    train_agent(Laps(turn, 1), GRPO, ENV_ID, config)


def trl_steps(turn: Turn, model: str, batches: int, settings: Settings) -> None:
    """A :class:`benchmarks.measure.Peer`'s program: the steps of TRL's GRPO on the same task, one a turn."""
    size = register_coin(settings)
    policy = load_model(model)
    config: dict[str, Any] = {
        **THEIRS,
        "learning_rate": RATE,
        "loss_type": "grpo",
        "use_cpu": settings.device == "cpu",
        "bf16": settings.device == "cuda",
        "max_completion_length": size.new_tokens,
        "generation_kwargs": {"eos_token_id": list(policy.tokenizer.eos_ids)},
        "num_generations": size.group,
        "per_device_train_batch_size": TRL_ROWS,
        "gradient_accumulation_steps": size.prompts * size.group // TRL_ROWS,
    }
    train_trl(Laps(turn, 1), policy, textenv.make_task(ENV_ID), size.prompts * batches, config)


def register_coin(settings: Settings) -> Sizes:
    """Register the task in this process: random prompts, and a reward that half of all completions get."""
    size = sizes(settings)

    def random_prompt(rng: np.random.Generator) -> tuple[str, str]:
        return "".join(rng.choice(list(CHARACTERS.strip()), size.prompt_tokens)), ""

    textenv.register(
        ENV_ID,
        random_prompt,
        reward=flip,
        max_new_tokens=size.new_tokens,
        max_tokens=size.prompt_tokens + size.new_tokens,
    )
    return size


def flip(prompt: str, completion: str, reference: object) -> float:
    """1 or 0, whatever the completion's checksum says."""
    return float(zlib.crc32(completion.encode()) % 2)
