"""New weights into a running vLLM engine, against the other parts of a step: 16 prompts × 8 completions of 64 tokens."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np

from agents.core.engines.base import Sampling
from agents.core.learner import Learner
from benchmarks.measure import Turn, ratios, spread
from benchmarks.speed.logprobs import own_step
from benchmarks.speed.report import Settings, Table, seconds_on
from benchmarks.speed.shapes import MIDDLE, TOY, Shape, random_batch, random_prompts

PROMPTS, GROUP, PROMPT, NEW = 16, 8, 16, 64
TARGET = 0.05
ENGINE = "agents.core.engines.vllm"
PARTS = ("generate", "update", "sync")


def run(settings: Settings) -> Iterator[Table]:
    """Seconds of generation, optimiser step and sync, and the share of the sync."""
    shape, prompts, new = sizes(settings.quick)
    title = f"in-place sync of vLLM, {shape.name} parameters, against a step of {prompts} × {GROUP} × {new} tokens"
    missing = [name for name in ("vllm", ENGINE) if not find_spec(name)]
    if missing:
        yield Table(title, ("part",), (), (f"Not measured: there is no {' and no '.join(missing)} here.",))
        return
    with settings.peer(step_parts, settings) as peer:
        turns = settings.in_turns({"step": peer})["step"]
    parts = {name: [turn[name] for turn in turns] for name in PARTS}
    whole = [sum(turn.values()) for turn in turns]
    rows = [
        [name, spread(took).text("{:.3f}"), ratios(took, whole).text("{:.3f}"), f"{TARGET:g}" if name == "sync" else ""]
        for name, took in parts.items()
    ]
    yield Table(title, ("part", "seconds", "share of the three", "at most"), rows)


def sizes(quick: bool) -> tuple[Shape, int, int]:
    """The model, prompts, and new tokens of a completion."""
    return (TOY, 2, 4) if quick else (MIDDLE, PROMPTS, NEW)


def step_parts(turn: Turn, settings: Settings) -> None:
    """A :class:`benchmarks.measure.Peer`'s program: seconds of each part of a step with a vLLM engine."""
    from agents.core.engines.vllm import VLLMEngine

    device = settings.device
    shape, prompts, new = sizes(settings.quick)
    policy = shape.policy(device)
    settings.use_threads()
    engine, learner = VLLMEngine(policy), Learner(policy)
    asked = random_prompts(prompts, PROMPT, shape.vocab)
    batch = random_batch(shape.vocab, PROMPT, np.full(prompts * GROUP, new), device)
    steps = {
        "generate": lambda: engine.generate(asked, Sampling(max_new_tokens=new), n=GROUP),
        "update": lambda: own_step(learner, batch),
        "sync": lambda: engine.sync(policy),
    }
    turn(None)
    try:
        while True:
            turn({name: seconds_on(device, step) for name, step in steps.items()})
    finally:
        engine.close()
