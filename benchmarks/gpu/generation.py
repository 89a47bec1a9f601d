"""Generation by large models: the native engine against transformers' ``generate``, vLLM and the memory's bandwidth."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from agents.core.engines.native import NativeEngine
from benchmarks.gpu.sizes import dtype, sizes
from benchmarks.speed.generation import GROUP, native, table, transformers_generate
from benchmarks.speed.memory import GIBIBYTE, extra_peak, in_use
from benchmarks.speed.report import Settings, Table


def run(settings: Settings, out: Path) -> Iterator[Table]:
    """A table of speed and one of memory for each model."""
    size = sizes(settings)
    for shape in size.shapes:
        yield table(settings, shape, (size.workload,), dtype(settings), size.matmul)
        policy = shape.policy(settings.device, dtype(settings))
        prompts, repeated = size.workload.prompts(shape.vocab)
        before = in_use(settings.device)
        calls = {
            "native": partial(native, NativeEngine(policy), prompts, GROUP, size.workload.length_B),
            "transformers generate": partial(transformers_generate, policy, repeated, size.workload.length_B),
        }
        rows = [
            [name, f"{before / GIBIBYTE:.2f}", f"{extra_peak(settings.device, call) / GIBIBYTE:.2f}"]
            for name, call in calls.items()
        ]
        yield Table(f"memory of generation, {shape.name}, GiB", ("engine", "before", "extra at the peak"), rows)
