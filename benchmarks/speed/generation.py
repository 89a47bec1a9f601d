"""Generation: the native engine against transformers' ``generate`` and vLLM, and against what the machine could do.

Tokens per second are useful ones: what follows a completion's end does not count.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from agents.core.engines.base import Engine, Sampling
from agents.core.engines.native import NativeEngine
from agents.core.linear import multiplies_bfloat16
from agents.core.policy import Policy
from benchmarks.measure import Peer, Turn, ratios, seconds, spread
from benchmarks.speed.limits import least_seconds, matmul_rate, read_rate, step_costs
from benchmarks.speed.report import Settings, Table, seconds_on
from benchmarks.speed.shapes import LARGE, MIDDLE, SMALL, TOY, Shape, random_prompts, uneven_lengths

PROMPT_TOKENS = 16
GROUP = 8
"""Completions a prompt."""
MATMUL_SIZE = 2048
NATIVE = f"native, {GROUP} a prompt"
HALF = "native, bfloat16"


@dataclass(frozen=True)
class Workload:
    """What is to be written.

    Attributes:
        name: for tables.
        length_B: tokens of each completion; the ``GROUP`` of a prompt are neighbours.
    """

    name: str
    length_B: np.ndarray
    prompt_tokens: int = PROMPT_TOKENS

    def prompts(self, vocab: int) -> tuple[list[list[int]], list[list[int]]]:
        """The prompts, and each of them as often as it is asked."""
        prompts = random_prompts(len(self.length_B) // GROUP, self.prompt_tokens, vocab)
        return prompts, [prompt for prompt in prompts for _ in range(GROUP)]


def even(rows: int, tokens: int) -> Workload:
    return Workload(f"{rows} × {tokens} tokens", np.full(rows, tokens))


def uneven(rows: int, longest: int) -> Workload:
    return Workload(f"{rows} of 1 to {longest} tokens", uneven_lengths(rows, longest))


FULL = (
    (SMALL, (even(64, 64), uneven(128, 96))),
    (MIDDLE, (even(64, 64), uneven(128, 96))),
    (LARGE, (even(64, 32),)),
)
QUICK = ((TOY, (even(8, 2), uneven(16, 6))),)


def run(settings: Settings) -> Iterator[Table]:
    """A table a model."""
    size = 64 if settings.quick else MATMUL_SIZE
    for shape, workloads in QUICK if settings.quick else FULL:
        yield table(settings, shape, workloads, torch.float32, size)


def table(
    settings: Settings, shape: Shape, workloads: tuple[Workload, ...], dtype: torch.dtype, matmul_size: int
) -> Table:
    """Useful tokens per second of each engine and workload, and the machine's limit, all measured in turns."""
    rows: list[list[str]] = []
    with ExitStack() as stack:
        vllm = start_vllm(stack, settings, shape, workloads, dtype) if find_spec("vllm") else None
        for workload in workloads:
            rows += workload_rows(settings, shape, workload, dtype, matmul_size, vllm)
    return Table(
        f"generation, {shape.name} parameters, {short(dtype)}: useful tokens per second",
        ("completions", "engine", "tokens/s", "× our seconds", "share of the limit"),
        rows,
        (
            f"Fresh weights: {shape.layers} layers of width {shape.hidden}, vocabulary {shape.vocab:,}; prompts of "
            f"{workloads[0].prompt_tokens} tokens. The native engine returns log-probabilities, the others do not. The "
            "limit is that of decoding, by measured matrix products and reads of a step's bytes; what binds is in brackets.",
            *(() if find_spec("vllm") else ("vLLM is not installed, so it is not measured.",)),
        ),
    )


def workload_rows(
    settings: Settings, shape: Shape, workload: Workload, dtype: torch.dtype, matmul_size: int, vllm: Peer | None
) -> list[list[str]]:
    """The lines of one workload: the limit of each type of number, and the engines."""
    halved = settings.device == "cpu" and dtype == torch.float32 and multiplies_bfloat16(torch.device("cpu"))
    engines = engine_measures(settings.device, shape, workload, dtype, vllm, halved)
    costs = {
        each: step_costs(shape, workload.prompt_tokens, workload.length_B, each.itemsize)
        for each in (dtype, *([torch.bfloat16] if halved else []))
    }
    rates: dict[str, Callable[[], float]] = {}
    for each, (_, bytes_T) in costs.items():
        rates[f"multiply {each}"] = partial(matmul_rate, settings.device, each, matmul_size)
        rates[f"read {each}"] = partial(read_rate, settings.device, each, float(bytes_T.mean()))
    results = settings.in_turns(engines | rates)

    tokens, rows = int(workload.length_B.sum()), []
    limit: dict[torch.dtype, float] = {}
    for each, (flops_T, bytes_T) in costs.items():
        best = max(results[f"multiply {each}"]), max(results[f"read {each}"])
        least, binds = least_seconds(flops_T, bytes_T, *best)
        limit[each] = tokens / least
        rows.append([workload.name, f"limit, {short(each)} ({binds})", f"{limit[each]:,.0f}", "", "100 %"])
    for name in engines:
        speed = spread([tokens / took for took in results[name]])
        slower = ratios(results[name], results[NATIVE]).text("{:.2f}")
        share = speed.median / limit[torch.bfloat16 if name == HALF else dtype]
        rows.append([workload.name, name, speed.text(), slower, f"{100 * share:.0f} %"])
    return rows


def engine_measures(
    device: str, shape: Shape, workload: Workload, dtype: torch.dtype, vllm: Peer | None, halved: bool
) -> dict[str, Callable[[], float]]:
    """What measures the seconds of each engine; if ``halved``, of the native one in bfloat16 too."""
    policy, length_B = shape.policy(device, dtype), workload.length_B
    prompts, repeated = workload.prompts(shape.vocab)
    calls = {
        NATIVE: partial(native, NativeEngine(policy), prompts, GROUP, length_B),
        "native, 1 a prompt": partial(native, NativeEngine(policy), repeated, 1, length_B),
        "transformers generate": partial(transformers_generate, policy, repeated, length_B),
    }
    if halved:
        calls[HALF] = partial(native, NativeEngine(policy, dtype="bfloat16"), prompts, GROUP, length_B)
    measures: dict[str, Callable[[], float]] = {name: partial(seconds_on, device, call) for name, call in calls.items()}
    if vllm is not None:
        measures["vLLM"] = partial(vllm, (repeated, length_B.tolist()))
    return measures


def short(dtype: torch.dtype) -> str:
    """A type's name without its module."""
    return str(dtype).removeprefix("torch.")


def native(engine: Engine, prompts: list[list[int]], n: int, length_B: np.ndarray) -> None:
    """``n`` completions a prompt, by textenv's own engine."""
    engine.generate(prompts, Sampling(max_new_tokens=int(length_B.max())), n, length_B.tolist())


@torch.inference_mode()
def transformers_generate(policy: Policy, prompts: list[list[int]], length_B: np.ndarray) -> None:
    """A completion a prompt; the batch goes on until its longest row ends."""
    prompt_BT = torch.tensor(prompts, device=policy.device)
    policy.model.generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        max_new_tokens=int(length_B.max()),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=0,
    )


def start_vllm(
    stack: ExitStack, settings: Settings, shape: Shape, workloads: tuple[Workload, ...], dtype: torch.dtype
) -> Peer:
    """vLLM with a model of this shape. It takes prompts and lengths, and answers with seconds."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    config = shape.config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    rows = max(len(workload.length_B) for workload in workloads)
    context = max(workload.prompt_tokens + int(workload.length_B.max()) for workload in workloads)
    blocks = -(-context // 128) + 1  # of keys and values, for each row; on a CPU one holds 128 tokens
    options = {
        "model": folder,
        "dtype": short(dtype),
        "max_model_len": context,
        "max_num_seqs": rows,
        "gpu_memory_utilization": 0.5,  # beside this process
        "kv_cache_memory_bytes": rows * blocks * 128 * shape.cache_bytes(dtype.itemsize),
        "enforce_eager": settings.quick,
    }
    return stack.enter_context(settings.peer(vllm_seconds, options))


def vllm_seconds(turn: Turn, options: dict[str, Any]) -> None:
    """A :class:`benchmarks.measure.Peer`'s program: seconds that vLLM takes for completions of given lengths."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    llm = LLM(load_format="dummy", skip_tokenizer_init=True, generation_config="vllm", seed=0, **options)
    request = turn(None)
    while True:
        prompts, lengths = request
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        sampling = [SamplingParams(max_tokens=n, ignore_eos=True, temperature=1.0, detokenize=False) for n in lengths]
        llm.reset_prefix_cache()  # the prompts are those of the round before
        request = turn(seconds(partial(llm.generate, asked, sampling, use_tqdm=False)))
