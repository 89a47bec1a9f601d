"""The sequences that an engine is writing: what the model has read of them, and the logits of what comes next.

Rows are the first ones of whatever holds them, in an order that the caller follows. Shapes: R rows, N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from agents.core.decoder import Decoder
from agents.core.engines.cache import Cache, Reading
from agents.core.policy import Policy

PREFILL_TOKENS = 16_384
"""Tokens of prompts that go through the model at once."""
ROWS_STEP, PLACES_STEP = 32, 256
"""A static step has multiples of so many rows and places."""
PLACES_MORE = 16
"""Places by which rows grow that are no static step's; long ones by four times as many."""


class Contexts(Protocol):
    """What an engine asks of the sequences it writes."""

    rows: int
    most_rows: int
    """that are still to find room, those there included"""

    @property
    def open(self) -> bool:
        """Whether further rows may enter now."""

    def admit(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Read prompts, each once for several rows: the logits of the new rows, and which prompt each of them has."""

    def append(self, token_R: Tensor) -> Tensor:
        """Add a token to each row: the logits after it."""

    def leave(self, holes: Tensor, movers: Tensor, live: int) -> None:
        """Go on with ``live`` rows: those in ``movers`` take the places ``holes`` of rows that have ended."""


class FlatContexts:
    """Rows in a cache of our own, which enter and leave at any time.

    Args:
        decoder: packed.
        cache: is emptied, but for the rows that are taken up.
        most_rows: to make room for, beside those in it.
        most_places: that any row may need; on a GPU room is made for all of them at once, elsewhere as rows grow.
        park: keep rows that have left, as long as their room is not needed.
    """

    open = True

    @property
    def static(self) -> bool:
        """Whether steps are recorded, in memory that stays where it is."""
        return self.device.type == "cuda"

    def __init__(self, decoder: Decoder, cache: Cache, most_rows: int, most_places: int, *, park: bool = False) -> None:
        self.decoder, self.cache = decoder, cache
        self.most_rows, self.most_places, self.park = most_rows, most_places, park
        self.device = cache.keys[0].device
        self.rows = 0
        self.length_R = torch.zeros(0, dtype=torch.int64, device=self.device)
        """tokens of each row that the cache holds"""
        self.longest = 0
        self.past: list[int] = []
        """tokens of the first rows to enter that the cache holds already"""
        self._steps: dict[tuple[int, int], StaticStep] = {}

    def resume(self, rows: Sequence[int], past: Sequence[int]) -> None:
        """Let the first prompts to enter begin with ``past`` tokens each that ``rows`` of the cache hold."""
        if any(past):
            self.cache.take(torch.tensor(rows, device=self.device))
            self.past = list(past)

    def admit(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> tuple[Tensor, list[int]]:
        first, new = self.rows, sum(copies)
        past, self.past = self.past or [0] * len(prompts), []
        lengths = [len(prompt) for prompt in prompts]
        self._make_room(first + new, max(lengths), held=self.cache.rows if self.park or any(past) else first)
        logits = [
            self._prefill(prompts[start:end], past[start:end], first + start)
            for start, end in pairwise(_chunks(lengths))
        ]
        prompt_of_row = [*range(len(prompts))]
        for prompt, number in enumerate(copies):
            prompt_of_row += [prompt] * (number - 1)
        owner_R = torch.tensor(prompt_of_row, device=self.device)
        if new > len(prompts):
            self.cache.repeat(first, len(prompts), owner_R[len(prompts) :])
        self.length_R = torch.cat([self.length_R, torch.tensor(lengths, device=self.device)[owner_R]])
        self.rows, self.longest = first + new, max(self.longest, max(lengths))
        return torch.cat(logits)[owner_R], prompt_of_row

    def _prefill(self, prompts: Sequence[Sequence[int]], past: Sequence[int], first: int) -> Tensor:
        fresh = [prompt[held:] for prompt, held in zip(prompts, past, strict=True)]
        count = np.array([len(part) for part in fresh])
        row_N = np.repeat(np.arange(first, first + len(fresh)), count)
        position_N = np.concatenate([np.arange(held, held + n) for held, n in zip(past, count, strict=True)])
        tokens_N = np.concatenate([np.asarray(part, dtype=np.int64) for part in fresh])
        row, position, tokens = (torch.from_numpy(x).to(self.device) for x in (row_N, position_N, tokens_N))
        hidden_NE = self.decoder(tokens, position, Reading(self.cache, row, position, len(fresh), first))
        return self.decoder.head(hidden_NE[torch.from_numpy(count.cumsum() - 1).to(self.device)])

    def append(self, token_R: Tensor) -> Tensor:
        self.longest = min(self.longest + 1, self.most_places)
        if self.static:
            return self._append_static(token_R)
        self._make_room(self.rows, self.longest, held=self.cache.rows if self.park else self.rows)
        row_R, position_R = torch.arange(self.rows, device=self.device), self._next_position()
        hidden_RE = self.decoder(token_R, position_R, Reading(self.cache, row_R, position_R, self.rows))
        return self.decoder.head(hidden_RE)

    def _append_static(self, token_R: Tensor) -> Tensor:
        rows = min(_round(self.rows, ROWS_STEP), self.cache.rows)
        places = min(_round(self.longest, PLACES_STEP), self.cache.places)
        if (rows, places) not in self._steps:
            self._steps[rows, places] = StaticStep(self.decoder, self.cache, rows, places)
        return self._steps[rows, places](token_R, self._next_position())

    def _next_position(self) -> Tensor:
        # A row that has ended and not left yet stays where it is.
        position_R = self.length_R.clamp(max=self.most_places - 1)
        self.length_R = self.length_R + 1
        return position_R

    def leave(self, holes: Tensor, movers: Tensor, live: int) -> None:
        if len(holes):
            (self.cache.swap if self.park else self.cache.copy)(movers, holes)
            self.length_R[holes] = self.length_R[movers]
        self.rows, self.length_R = live, self.length_R[:live]
        self.longest = int(self.length_R.max()) if live else 0

    def _make_room(self, rows: int, places: int, held: int) -> None:
        if self.static:
            # Rows that only fill up a static step write to a last place, at which no other looks.
            places = self.most_places + 1
        if rows <= self.cache.rows and places <= self.cache.places:
            return
        self._steps = {}
        rows, places = max(rows, held, self.most_rows), max(places, self.cache.places)
        if self.static:
            self.cache.resize(_round(rows, ROWS_STEP), places, held)
        else:
            room = _round(places, PLACES_MORE if places < 512 else 4 * PLACES_MORE)
            if room + PLACES_MORE > self.most_places:  # what would be left is not worth another move
                room = max(places, self.most_places)
            self.cache.resize(rows, room, held, self.most_places)


class StaticStep:
    """One more token for a fixed number of rows, in memory that stays where it is.

    A GPU is told each of a forward pass's hundreds of operations, which takes longer than most of them; recorded once, it
    repeats them by itself.

    Args:
        decoder, cache: stay as they are.
        rows: computed; those beyond the ones asked for come to nothing.
        places: of each row that are looked at.
    """

    def __init__(self, decoder: Decoder, cache: Cache, rows: int, places: int) -> None:
        self.decoder, self.cache, self.places = decoder, cache, places
        self.row_R = torch.arange(rows, device=cache.keys[0].device)
        self.token_R = torch.zeros_like(self.row_R)
        self.position_R = torch.full_like(self.row_R, cache.places - 1)
        self._replay = _record(self._compute)

    def __call__(self, token_R: Tensor, position_R: Tensor) -> Tensor:
        self.token_R[: len(token_R)] = token_R
        self.position_R[: len(token_R)] = position_R
        self.position_R[len(token_R) :] = self.cache.places - 1
        return self._replay()[: len(token_R)]

    def _compute(self) -> Tensor:
        reading = Reading(self.cache, self.row_R, self.position_R, len(self.row_R), places=self.places)
        return self.decoder.head(self.decoder(self.token_R, self.position_R, reading))


def _record(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What computes the same again into the same memory, by a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is set up at a first call must not be recorded
        compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = compute()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class ModelContexts:
    """Rows of any causal LM of transformers, in its own cache: they enter together, padded on the left.

    Args:
        policy: whose model reads.
        budget: most tokens that any row will get.
    """

    def __init__(self, policy: Policy, budget: int) -> None:
        self.policy, self.budget = policy, budget
        self.rows = self.most_rows = 0

    @property
    def open(self) -> bool:
        return self.rows == 0

    def admit(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> tuple[Tensor, list[int]]:
        device, width = self.policy.device, max(map(len, prompts))
        length_P = np.array([len(prompt) for prompt in prompts])
        real_PT = np.arange(width) >= width - length_P[:, None]
        tokens_PT = np.zeros(real_PT.shape, dtype=np.int64)
        tokens_PT[real_PT] = np.concatenate([np.asarray(prompt, dtype=np.int64) for prompt in prompts])
        self.cache: Any = DynamicCache(config=self.policy.model.config)
        self.length = 0
        # Without padding there is neither a mask nor a position to pass.
        self.mask_RT = self.position_R = None
        if not real_PT.all():
            self.mask_RT = torch.from_numpy(np.pad(real_PT, ((0, 0), (0, self.budget)), constant_values=True)).to(
                device
            )
            self.position_R = torch.from_numpy(length_P).to(device)
        logits_PV = self._forward(torch.from_numpy(tokens_PT).to(device))
        prompt_of_row = np.repeat(np.arange(len(prompts)), copies)
        owner_R = torch.from_numpy(prompt_of_row).to(device)
        self._keep(owner_R)
        return logits_PV[owner_R], prompt_of_row.tolist()

    def append(self, token_R: Tensor) -> Tensor:
        return self._forward(token_R.unsqueeze(1))

    def leave(self, holes: Tensor, movers: Tensor, live: int) -> None:
        row_R = torch.arange(live, device=self.policy.device)
        row_R[holes] = movers
        self._keep(row_R)

    def _keep(self, row_R: Tensor) -> None:
        self.cache.reorder_cache(row_R)
        self.rows = len(row_R)
        if self.mask_RT is not None and self.position_R is not None:
            self.mask_RT, self.position_R = self.mask_RT[row_R], self.position_R[row_R]

    def _forward(self, tokens_RT: Tensor) -> Tensor:
        started, self.length = self.length > 0, self.length + tokens_RT.shape[1]
        mask_RT = None if self.mask_RT is None else self.mask_RT[:, : self.length]
        position_RT = None
        if mask_RT is not None and not started:
            position_RT = (mask_RT.cumsum(dim=1) - 1).clamp(min=0)
        elif self.position_R is not None:
            # A row that has ended and not left yet stays within the model's positions.
            position_RT = self.position_R.clamp(max=(self.policy.max_context or self.length) - 1).unsqueeze(1)
            self.position_R = self.position_R + 1
        logits_R1V, self.cache = self.policy.logits(
            tokens_RT,
            torch.tensor([tokens_RT.shape[1] - 1], device=tokens_RT.device),
            attention_mask=mask_RT,
            position_ids=position_RT,
            past_key_values=self.cache,
            use_cache=True,
        )
        return logits_R1V[:, 0]


def _round(number: int, step: int) -> int:
    """Up to a multiple."""
    return -(-number // step) * step


def _chunks(lengths: Sequence[int]) -> list[int]:
    """Where to cut prompts into parts of at most :data:`PREFILL_TOKENS` tokens, or of one prompt."""
    cuts, tokens = [0], 0
    for number, length in enumerate(lengths):
        if tokens and tokens + length > PREFILL_TOKENS:
            cuts.append(number)
            tokens = 0
        tokens += length
    return [*cuts, len(lengths)]
