"""What a training will take of the memory: told before its first step, tried out where it will be tight.

The most that is in use at once is predicted as the sum of

- what is in use before the first step: the weights, their copies (a reference, the one of ``staleness``, a critic's), and on a
  CPU the process;
- a gradient of each trained parameter, and Adam's two averages of it, unless a resumed run holds these already;
- and the larger one of what comes in turn: what generation needs alone (keys and values, and packed weights), and what a full
  micro-batch needs alone; with ``save_memory`` "offload" also Adam's averages. With ``staleness`` generation goes on beside the
  learning, and adds to it.

A micro-batch is measured and not derived, so that any architecture, adapters and layers that are computed again are told
right. What its way through the trunk and back keeps alive after each operation is ``c + R (a T + b T²)`` for R rows of T
tokens. Three small passes, of (1, T), (1, 2T) and (2, T), tell a, b and c for every operation; at full size the largest counts.
The output head, of which only a few tokens are done at a time, adds a bound that follows from :mod:`agents.core.head`.

On a CPU the heap keeps gaps between tensors below 32 MiB, for which a micro-batch is taken :data:`GAPS` times. Where the C
library is told to keep none (``MALLOC_MMAP_THRESHOLD_=1000000``), the formula was measured within 7 % of the process's peak;
otherwise it was up to 24 % above it and 14 % below, with adapters 30 % below. Workspaces within a kernel are not seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agents.core.engines.native import free_memory
from agents.core.evaluate import EVAL_BATCH
from agents.core.head import AT_ONCE, KEPT
from agents.core.trajectories import Trajectories
from agents.core.usage import memory_peak_mb
from textenv.episodes import Source

if TYPE_CHECKING:
    from agents.core.agent import Agent
    from agents.core.learner import Learner

PROBE = 200
"""Tokens of a small pass: enough for the rounding of :func:`agents.core.linear.rounded` to be as for many."""
GAPS = 1.25
"""What a micro-batch takes on a CPU, over what its tensors take."""
TIGHT = 0.5
"""Share of what is free beyond which a dry run tells more than it costs."""
WHAT_TO_DO = "lower max_tokens, set save_memory to 'recompute', or take a smaller model"
SIGNS = ("DefaultCPUAllocator", "bad_alloc", "could not create a primitive", "could not execute a primitive")
"""Of the errors that PyTorch and oneDNN raise on a CPU without memory, for which they have no class."""


class NoMemoryError(RuntimeError):
    """There is no memory for something that cannot be made smaller."""

    def __init__(self, what: str, error: BaseException, advice: str) -> None:
        super().__init__(f"{what} found no memory ({str(error).splitlines()[0]}); {advice}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, and it may be tried with less."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    told = isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    return told and not isinstance(error, NoMemoryError)


@contextmanager
def needing(what: str, advice: str = WHAT_TO_DO) -> Iterator[None]:
    """Say in a sentence what found no memory within, and what can be done about it.

    Raises:
        NoMemoryError: there was none.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise NoMemoryError(what, error, advice) from error


@dataclass(frozen=True)
class Forecast:
    """The memory that a training will take, in bytes.

    Attributes:
        before: the most that was in use so far.
        now: in use already.
        held: what will be held besides, all at once.
        in_turn: of this only one part at a time.
    """

    before: int
    now: int
    held: dict[str, int]
    in_turn: dict[str, int]

    @property
    def more(self) -> int:
        """What is not in use yet."""
        return sum(self.held.values()) + max(self.in_turn.values())

    @property
    def peak(self) -> int:
        """As :func:`agents.core.usage.memory_peak_mb` will tell it."""
        return max(self.before, self.now + self.more)

    def __str__(self) -> str:
        held = [f"{name} {_mib(size)}" for name, size in {"now": self.now, **self.held}.items()]
        in_turn = " or ".join(f"{name} {_mib(size)}" for name, size in self.in_turn.items())
        before = f"; it was {_mib(self.before)} before" if self.before > self.now + self.more else ""
        parts = ", ".join([*held, in_turn])
        return f"{_mib(self.peak)} MiB predicted at the peak, were all answers as long as may be ({parts}{before})"


def foresee(agent: Agent) -> Forecast:
    """Print what training ``agent`` will take, and a warning if there is not so much.

    The longest sample is learned from and forgotten. On a GPU, and where more is wanted than the share :data:`TIGHT` of what is
    free, it is a micro-batch as full as there will ever be, with all at hand that training holds: what does not fit is split
    now, and not after hours.
    """
    learner = agent.learner
    device = agent.policy.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    forecast = predict(agent)
    free = available(device)
    if forecast.more > free:
        print(
            f"memory: training is predicted to take {_mib(forecast.more)} MiB more, but {_mib(free)} are free; lower "
            f"tokens_per_microbatch from {learner.tokens_per_microbatch}, {WHAT_TO_DO}",
            flush=True,
        )
    limit = learner.tokens_per_microbatch
    if device.type == "cuda" or forecast.more > TIGHT * free:
        rows, length = rehearse(agent, forecast)
    else:
        rows, (_, length, sampled) = 1, fullest(agent)
        learner.rehearse(longest(learner, rows, length, sampled))
    if learner.tokens_per_microbatch < limit:
        forecast = predict(agent)
    print(
        f"memory: {forecast}; the dry run of {rows} × {length} tokens reached {memory_peak_mb(device):,.0f}", flush=True
    )
    return forecast


def predict(agent: Agent) -> Forecast:
    """What training ``agent`` will take, by the formula above.

    Raises:
        NoMemoryError: there is none even for a small pass.
    """
    learner, config, device = agent.learner, agent.config, agent.policy.device
    before, now = int(memory_peak_mb(device) * 2**20), in_use(device)
    gradient = sum(parameter.nbytes for parameter in trained(learner.optimizer))
    written = max(rows_of_a_step(config), min(config.eval_episodes, EVAL_BATCH))
    in_turn = {"micro-batch": microbatch_bytes(learner, *fullest(agent))}
    held = {"gradient": gradient}
    (in_turn if learner.offloads else held)["optimiser"] = 0 if learner.optimizer.state else 2 * gradient
    beside = bool(getattr(config, "staleness", 0))
    (held if beside else in_turn)["generation"] = agent.engine.memory_needed(written, agent.task.max_tokens)
    return Forecast(before, now, held, in_turn)


def rehearse(agent: Agent, forecast: Forecast) -> tuple[int, int]:
    """Learn from the fullest micro-batch beside all that training holds, and forget it.

    Returns:
        its rows and their tokens, of the largest that fit.
    """
    learner = agent.learner
    rows, length, sampled = fullest(agent)
    held = {name: size for name, size in forecast.held.items() if name != "gradient"}
    with needing(f"what training holds ({', '.join(held)})"):
        beside = torch.ones(sum(held.values()), dtype=torch.uint8, device=agent.policy.device)
    learner.rehearse(longest(learner, rows, length, sampled))
    del beside
    return fullest(agent)[:2]


def fullest(agent: Agent) -> tuple[int, int, int]:
    """Rows of the fullest micro-batch that there can be, their tokens, and how many of these are sampled."""
    config, task = agent.config, agent.task
    rows = math.ceil(rows_of_a_step(config) / getattr(config, "updates_per_batch", 1))
    fit = max(1, agent.learner.tokens_per_microbatch // task.max_tokens)
    return min(rows, fit), task.max_tokens, min(task.max_tokens - 1, task.max_new_tokens * task.turns)


def rows_of_a_step(config: Any) -> int:
    return config.prompts_per_step * getattr(config, "group_size", 1)


def microbatch_bytes(learner: Learner, rows: int, length: int, sampled: int) -> int:
    """Most memory that the gradient of ``rows`` rows of ``length`` tokens takes beside the gradient itself."""
    read = length - 1  # a row's last token is not read

    def measure(rows: int, tokens: int) -> np.ndarray:
        return alive_after_each(learner, longest(learner, rows, tokens + 1, max(1, round(sampled / read * tokens))))

    size = max(1, min(PROBE, (learner.policy.max_context or 2 * PROBE) // 2 - 1))
    with gradient_at_hand(learner.optimizer), needing(f"a pass of {2 * size} tokens and a gradient of the weights"):
        if rows * read <= 2 * size:
            alive = measure(rows, read)
        else:
            long = longest(learner, 1, 2 * size + 1, 1)
            learner.logprobs(long, long.rows)  # makes what is kept from pass to pass
            passes = [measure(*shape) for shape in ((1, size), (1, 2 * size), (2, size))]
            if len({len(alive) for alive in passes}) > 1:  # another way through the model for each size
                passes = [np.array([alive[0], alive.max()]) for alive in passes]
            one, twice_as_long, two = passes
            square = (twice_as_long - two) / (2 * size**2)
            linear = (two - one) / size - square * size
            alive = 2 * one - two + rows * (linear * read + square * read**2)
    most = max(alive.max(), alive[0] + head_bytes(learner, rows, sampled))
    return int(most * (GAPS if learner.policy.device.type == "cpu" else 1))


def head_bytes(learner: Learner, rows: int, sampled: int) -> int:
    """A bound of what the output head takes for ``rows`` rows of ``sampled`` tokens beside what their trunk keeps."""
    policy = learner.policy
    width, all_tokens = policy.vocab_size, rows * sampled
    together = min(all_tokens, max(sampled, KEPT // width))  # whole rows
    if policy.decoder() is None:  # all logits are there, with a gradient; a few are made into a distribution
        return 4 * width * (all_tokens + 5 * together)
    entries = together * width
    slopes = entries if entries <= KEPT else 0
    logits = min(entries, AT_ONCE if policy.device.type == "cpu" else KEPT)
    return 4 * (slopes + 2 * logits + (width + 2 * all_tokens) * policy.hidden_size)


def alive_after_each(learner: Learner, batch: Trajectories) -> np.ndarray:
    """Bytes that a pass of ``batch`` through the trunk and back keeps alive: at the turn, and then after every operation."""
    with _Alive() as alive:
        part = learner.trunk(batch, batch.rows)
        turn = alive.now
        made = [x for x in part.made if x is not None and x.requires_grad]
        torch.autograd.backward(made, [torch.zeros_like(x) for x in made])
    return np.array([turn, *alive.after], dtype=float)


def longest(learner: Learner, rows: int, length: int, sampled: int) -> Trajectories:
    """Rows of random tokens, the last ``sampled`` of which count as such, with no common beginnings if there are ids enough."""
    vocab, device = learner.policy.vocab_size, learner.policy.device
    tokens_BT = torch.from_numpy(np.random.default_rng(0).integers(vocab, size=(rows, length)))
    tokens_BT[:, 0] = torch.arange(rows) % vocab
    source_BT = torch.full((rows, length), int(Source.PROMPT), dtype=torch.uint8)
    source_BT[:, -sampled:] = int(Source.SAMPLED)
    return Trajectories(
        tokens_BT=tokens_BT,
        source_BT=source_BT,
        logp_BT=torch.zeros(rows, length),
        reward_BT=torch.zeros(rows, length, dtype=torch.float64),
        penalty_B=torch.zeros(rows, dtype=torch.float64),
        group_B=torch.arange(rows),
        scores=[],
        finish_B=np.zeros(rows, dtype=np.uint8),
        prompts=[],
        completions=[],
        references=[],
    ).to(device)


def trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that have a gradient."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextmanager
def gradient_at_hand(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within there is a gradient to be added to, as there is after the first micro-batch; then there is none."""
    try:
        with needing("a gradient of the weights", "train adapters (lora_rank), or take a smaller model"):
            for parameter in trained(optimizer):
                parameter.grad = torch.ones_like(parameter)
        yield
    finally:
        optimizer.zero_grad(set_to_none=True)


def in_use(device: torch.device) -> int:
    """Bytes in use now: torch's on a GPU, otherwise the process's."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def available(device: torch.device) -> int:
    """Bytes that can still be had."""
    free = free_memory(device)
    if device.type == "cuda":  # torch holds some that nothing lies in
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free


class _Alive(TorchDispatchMode):
    """Adds up the memory of the tensors that are made within as long as they live, and notes the sum after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.after: list[int] = []
        self._known: dict[int, ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(made):
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known and key not in given:
                self.now += size
                self._known[key] = ref(storage, partial(self._forget, key, size))
        self.after.append(self.now)
        return made

    def _forget(self, key: int, size: int, _: ref[Any]) -> None:
        self.now -= size
        del self._known[key]


def _storages(tree: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"
