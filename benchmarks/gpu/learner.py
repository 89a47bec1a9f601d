"""An optimiser step on long answers: how much of the GPU's arithmetic it uses, and how much memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from agents.core.learner import Learner
from benchmarks.gpu.sizes import dtype, precision, sizes
from benchmarks.measure import spread
from benchmarks.speed.generation import short
from benchmarks.speed.limits import matmul_rate
from benchmarks.speed.logprobs import own_step
from benchmarks.speed.memory import GIBIBYTE, extra_peak, in_use
from benchmarks.speed.report import Settings, Table, seconds_on
from benchmarks.speed.shapes import Shape, random_batch

DATA_SHEET = {"H100": 989e12, "H200": 989e12}
"""Dense bfloat16 operations a second, by what a GPU's name contains."""


def run(settings: Settings, out: Path) -> Iterator[Table]:
    """Figures of a step for each model. Its flops are those of forward and backward on real tokens, padding and what is
    computed again left out."""
    for shape in sizes(settings).shapes:
        yield learner_table(settings, shape)


def learner_table(settings: Settings, shape: Shape) -> Table:
    size, device = sizes(settings), settings.device
    length_B = size.workload.length_B
    learner = Learner(shape.policy(device, endless=False), **precision(settings))
    batch = random_batch(shape.vocab, size.prompt_tokens, length_B, device)
    step = partial(own_step, learner, batch)
    step()  # makes gradient and optimiser state
    before, extra = in_use(device), extra_peak(device, step)
    measures: dict[str, Callable[[], float]] = {
        "step": partial(seconds_on, device, step),
        "matmul": partial(matmul_rate, device, dtype(settings), size.matmul),
    }
    results = settings.in_turns(measures)
    tokens = int(length_B.sum()) + len(length_B) * size.prompt_tokens
    flops = shape.update_flops(length_B + size.prompt_tokens, length_B)
    rate = spread([flops / took for took in results["step"]])
    peak, sheet = max(results["matmul"]), data_sheet(device)
    rows = [
        ["seconds", spread(results["step"]).text("{:.3f}")],
        ["tokens a second, prompts included", spread([tokens / took for took in results["step"]]).text()],
        ["TFLOP/s", spread([flops / took / 1e12 for took in results["step"]]).text("{:.2f}")],
        [f"share of a matrix product's {peak / 1e12:,.2f} TFLOP/s", f"{100 * rate.median / peak:.1f} %"],
        *(
            [[f"MFU, of the data sheet's {sheet / 1e12:,.0f} TFLOP/s", f"{100 * rate.median / sheet:.1f} %"]]
            if sheet
            else []
        ),
        ["memory of model, gradient and optimiser, GiB", f"{before / GIBIBYTE:.2f}"],
        ["extra at the peak, GiB", f"{extra / GIBIBYTE:.2f}"],
    ]
    title = f"a learner's step, {shape.name}, {size.workload.name} after prompts of {size.prompt_tokens}"
    note = f"Weights and optimiser state in float32, products with weights in {short(dtype(settings))}."
    return Table(title, ("", "figure"), rows, (note,))


def data_sheet(device: str) -> float | None:
    """The data sheet's rate for this GPU, if it is known."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((rate for part, rate in DATA_SHEET.items() if part in name), None)
