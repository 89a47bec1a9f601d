"""Generation in this process, with the policy's own weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import psutil
import torch
from torch import Tensor

from agents.core.decoder import Decoder, head_width
from agents.core.engines.base import Completions, Engine, OnEnd, Sampling, check_budgets
from agents.core.engines.cache import Cache
from agents.core.engines.contexts import Contexts, FlatContexts, ModelContexts
from agents.core.engines.sampling import Uniforms, choose
from agents.core.linear import multiplies_bfloat16
from agents.core.lora import merged_state
from agents.core.policy import Policy
from textenv.task import Finish

LEAVE_SHARE = 8
"""Rows that have ended leave once they are one in so many, since each time costs a few copies."""
LOOK = {"cuda": 16}
"""Tokens that a device writes between two looks at what has ended, if each look has to wait for it; default 1."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NativeEngine(Engine):
    """A decoding loop of our own over the :data:`agents.core.decoder.FAMILIES`, and over transformers' forward for others.

    A prompt is read once for its n completions. A row that has ended leaves, and a waiting one enters, so that no answer
    waits for a longer one. What is drawn depends on the sampling's seed and a completion's number, not on the batch.

    Args:
        policy: whose weights to use, as they are at each call.
        dtype: "float32", "bfloat16" or "float16", to generate in; default the policy's own. Log-probabilities of a coarser
            type than the learner's differ from the learner's, see the metric ``logp_gap``.
        max_rows: most completions written at once; default as many as the memory holds.
        memory: GiB for keys and values; default half of what is free.

    Raises:
        ValueError: an unknown dtype, one that the processor has no instructions for, or one for a model of an unknown family.
    """

    def __init__(
        self, policy: Policy, *, dtype: str | None = None, max_rows: int | None = None, memory: float | None = None
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be {', '.join(DTYPES)}, got {dtype!r}")
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        if memory is not None and not 0 < memory < np.inf:
            raise ValueError(f"memory must be a finite number of GiB above 0, got {memory}")
        self.policy, self.version = policy, policy.version
        self.max_rows, self.memory = max_rows, memory
        self.dtype = next(policy.model.parameters()).dtype if dtype is None else DTYPES[dtype]
        check_dtype(self.dtype, policy.device)
        if self.unsupported is not None and (dtype is not None or memory is not None):
            raise ValueError(f"the engine's dtype and memory can be set for known models only: {self.unsupported}")
        self._cache: Cache | None = None
        self._parked: dict[bytes, int] = {}

    @property
    def unsupported(self) -> str | None:
        """Why transformers has to run the model, or None."""
        return None if self.policy.decoder() is not None else self.policy.undecoded

    def sync(self, policy: Policy) -> None:
        self.release()
        self.policy, self.version = policy, policy.version

    def release(self) -> None:
        self._cache, self._parked = None, {}

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        budgets: Sequence[int] | None = None,
        on_end: OnEnd | None = None,
    ) -> Completions:
        budget_B = check_budgets(prompts, sampling, n, budgets, self.policy.max_context)
        length_B = np.repeat([len(prompt) for prompt in prompts], n)
        places = int((length_B + budget_B).max())
        contexts: Contexts
        if self.unsupported is None:
            rows = min(len(budget_B), self.room(places))
            contexts = self._flat(prompts, rows, places)
        else:
            rows = self.max_rows or len(budget_B)
            warnings.warn(
                f"generating by transformers' own forward pass, which is slower: {self.unsupported}", stacklevel=2
            )
            contexts = ModelContexts(self.policy, int(budget_B.max()))
        batch = _Batch(self.policy, contexts, rows, sampling, budget_B, on_end)
        batch.write(prompts, n)
        if self.keep_contexts:
            self._park(batch, prompts, n)
        return batch.completions()

    def plan(self, rows: int, places: int) -> str | None:
        if self.unsupported is not None:
            return None
        at_once = min(rows, self.room(places))
        size = self._cache_bytes(rows, places) / 2**20
        waiting = "" if at_once == rows else f", {rows - at_once} waiting"
        return f"completions written at once: {at_once}{waiting}; keys and values of up to {size:,.0f} MiB"

    def memory_needed(self, rows: int, places: int) -> int:
        if self.unsupported is not None:
            return 0
        packed = sum(p.numel() for p in self.policy.model.parameters() if p.dim() > 1) * self.dtype.itemsize
        return self._cache_bytes(rows, places) + packed

    def _cache_bytes(self, rows: int, places: int) -> int:
        """Most memory of keys and values."""
        return min(rows, self.room(places)) * places * self._place_bytes

    def room(self, places: int) -> int:
        """How many completions of ``places`` tokens, prompt included, are written at once.

        Raises:
            ValueError: not even one fits, or fewer than ``max_rows``.
        """
        row, wanted = self._place_bytes * places, self.max_rows or 1
        limit = int(self.memory * 2**30) if self.memory is not None else free_memory(self.policy.device) // 2
        fit = limit // row
        if fit < wanted:
            raise ValueError(
                f"keys and values of {wanted} completions of {places} tokens take {wanted * row / 2**20:.3g} MiB, but there "
                f"are {limit / 2**20:.3g} MiB for them: {fit} would fit; lower max_rows or max_new_tokens, or raise the "
                "engine's memory"
            )
        return min(fit, self.max_rows or fit)

    @property
    def _place_bytes(self) -> int:
        """Memory of the keys and values of one token in all layers, and in the room for one more that a cache has."""
        config = self.policy.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return (2 * config.num_hidden_layers + 1) * heads * head_width(config) * self.dtype.itemsize

    def _flat(self, prompts: Sequence[Sequence[int]], rows: int, places: int) -> FlatContexts:
        policy = self.policy
        decoder = Decoder(policy.model, self._weights())
        if self._cache is None or not self._parked:  # one that has grown is all looked at, whatever is in it
            self._cache = Cache(len(decoder.blocks), decoder.key_heads, decoder.width, self.dtype, policy.device)
        contexts = FlatContexts(decoder, self._cache, rows, places, park=self.keep_contexts)
        if self._parked and len(prompts) <= rows:
            contexts.resume(*zip(*(self._parked_prefix(prompt) for prompt in prompts), strict=True))
        self._parked = {}
        return contexts

    def _weights(self) -> dict[str, Tensor]:
        """The policy's weights as they are now, in the engine's type, adapters merged."""
        device = self.policy.device
        return {name: x.to(device, self.dtype) for name, x in merged_state(self.policy.model).items()}

    def _park(self, batch: _Batch, prompts: Sequence[Sequence[int]], n: int) -> None:
        """Remember which rows of the cache hold which contexts, for prompts that go on from them."""
        for row, number in batch.parked.items():
            # The last token was drawn, but never read.
            tokens = np.concatenate([np.asarray(prompts[number // n]), batch.tokens(number)[:-1]])
            self._parked[tokens.astype(np.int64).tobytes()] = row

    def _parked_prefix(self, prompt: Sequence[int]) -> tuple[int, int]:
        """The row that holds the longest beginning of a prompt, its last token aside, and how much it holds; 0 of row 0."""
        tokens = np.asarray(prompt, dtype=np.int64).tobytes()
        for size in sorted({len(key) for key in self._parked}, reverse=True):
            if size < len(tokens) and tokens[:size] in self._parked:
                return self._parked[tokens[:size]], size // 8
        return 0, 0


class _Batch:
    """Completions being written. Shapes: B completions, R rows of those being written now, T tokens."""

    def __init__(
        self,
        policy: Policy,
        contexts: Contexts,
        most_rows: int,
        sampling: Sampling,
        budget_B: np.ndarray,
        on_end: OnEnd | None,
    ) -> None:
        self.policy, self.contexts, self.most_rows = policy, contexts, most_rows
        self.sampling, self.on_end = sampling, on_end
        device = policy.device
        num, self.longest = len(budget_B), int(budget_B.max())
        self.uniforms = Uniforms(sampling.seed, num, self.longest, device)
        self.allowed_V = None if policy.allowed_V.all() else policy.allowed_V
        self.ends = torch.tensor([*policy.tokenizer.eos_ids, *sampling.stop_ids], device=device)
        self.longest_stop = max(map(len, sampling.stop_texts), default=0)
        self.budget_B = torch.from_numpy(budget_B).to(device)
        # What a row draws after its end goes to a column of its own.
        self.tokens_BT = torch.zeros(num, self.longest + 1, dtype=torch.int64, device=device)
        self.logp_BT = torch.zeros(num, self.longest + 1, device=device)
        self.length_B = torch.zeros(num, dtype=torch.int64, device=device)
        self.row_R = torch.zeros(0, dtype=torch.int64, device=device)
        self.length_R = self.limit_R = self.row_R
        """tokens that each row has written, and those that it may write"""
        self.alive_R = torch.zeros(0, dtype=torch.bool, device=device)
        self.logits_RV: Tensor
        self.latest = 0
        """an upper bound of the tokens that any row has by now"""
        self.parked: dict[int, int] = {}
        """of the rows of the contexts that have left: which completion each holds"""
        self.told: set[int] = set()
        """completions whose end has been told"""
        self.searched_B = np.zeros(num, dtype=np.int64)
        """tokens of each completion that hold no stop text"""
        self.stopped: set[int] = set()
        """completions that one has ended"""

    def write(self, prompts: Sequence[Sequence[int]], n: int) -> None:
        """Write ``n`` completions of each prompt, those that find no room as soon as there is some."""
        waiting = [(prompt, number * n, number * n + n) for number, prompt in enumerate(prompts)]
        look = min(LOOK.get(self.policy.device.type, 1), self.longest)
        step = 0
        while waiting or self.contexts.rows:
            waiting = self._admit(waiting)
            token_R = self._draw()
            step += 1
            if step % look == 0:
                self._stop_at_texts()
                token_R = self._let_leave(token_R)
            if self.contexts.rows:
                self.logits_RV = self.contexts.append(token_R)

    def _admit(self, waiting: list[tuple[Sequence[int], int, int]]) -> list[tuple[Sequence[int], int, int]]:
        """Let waiting completions enter, if there is room for enough of them to be worth a pass; those still waiting."""
        free = self.most_rows - self.contexts.rows
        left = sum(end - start for _, start, end in waiting)
        if not left or not self.contexts.open or free < min(left, max(1, self.most_rows // LEAVE_SHARE)):
            return waiting
        entering = []
        while waiting and free:
            prompt, start, end = waiting.pop(0)
            entering.append((prompt, start, min(end, start + free)))
            if end > start + free:
                waiting.insert(0, (prompt, start + free, end))
            free -= entering[-1][2] - start
        first = self.contexts.rows
        logits, owners = self.contexts.admit(
            [prompt for prompt, _, _ in entering], [end - start for _, start, end in entering]
        )
        following = [start for _, start, _ in entering]
        numbers = []
        for owner in owners:
            numbers.append(following[owner])
            following[owner] += 1
        row_R = torch.tensor(numbers, device=self.row_R.device)
        self.row_R = torch.cat([self.row_R, row_R])
        self.length_R = torch.cat([self.length_R, torch.zeros_like(row_R)])
        self.limit_R = torch.cat([self.limit_R, self.budget_B[row_R]])
        self.alive_R = torch.cat([self.alive_R, torch.ones_like(row_R, dtype=torch.bool)])
        self.logits_RV = logits if first == 0 else torch.cat([self.logits_RV, logits])
        if not waiting:
            self.contexts.most_rows = 0
        return waiting

    def _draw(self) -> Tensor:
        """A token for every row, written down for those that have not ended."""
        row_R, length_R = self.row_R, self.length_R
        uniform_R = self.uniforms.at(row_R, length_R.clamp(max=self.longest - 1), self.latest)
        token_R, logp_R = choose(self.logits_RV, uniform_R, self.sampling, self.allowed_V)
        self.latest = min(self.latest + 1, self.longest - 1)
        column_R = torch.where(self.alive_R, length_R, self.longest)
        self.tokens_BT[row_R, column_R], self.logp_BT[row_R, column_R] = token_R, logp_R
        self.length_R = length_R + self.alive_R
        self.alive_R = self.alive_R & (token_R.unsqueeze(1) != self.ends).all(dim=1) & (self.length_R < self.limit_R)
        return token_R

    def _stop_at_texts(self) -> None:
        """End the rows whose text now holds a stop text, at the token that completes it."""
        if not self.sampling.stop_texts:
            return
        for row, (number, written) in enumerate(zip(self.row_R.tolist(), self.length_R.tolist(), strict=True)):
            tokens = self.tokens_BT[number, :written].tolist()
            for length in range(int(self.searched_B[number]) + 1, len(tokens) + 1):
                # A text of n characters ends within as many tokens, but for some that stand for parts of characters.
                text = self.policy.tokenizer.decode(tokens[max(0, length - 4 * self.longest_stop) : length])
                if any(stop in text for stop in self.sampling.stop_texts):
                    self.stopped.add(number)
                    self.length_R[row], self.alive_R[row] = length, False
                    break
            self.searched_B[number] = len(tokens)

    def _let_leave(self, token_R: Tensor) -> Tensor:
        """Let rows that have ended leave, if they are enough to be worth it; the tokens of those that go on."""
        alive_R = self.alive_R.cpu().numpy()
        rows, live = len(alive_R), int(alive_R.sum())
        if live == rows:
            return token_R
        self.length_B[self.row_R] = self.length_R
        if self.on_end is not None:
            self._tell(np.flatnonzero(~alive_R))
        if live and rows - live < max(1, rows // LEAVE_SHARE):
            return token_R
        movers, holes = live + np.flatnonzero(alive_R[live:]), np.flatnonzero(~alive_R[:live])
        order = np.arange(rows)
        order[holes], order[movers] = movers, holes
        numbers = self.row_R.cpu().numpy()[order]
        self.parked |= {row: int(numbers[row]) for row in range(live, rows)}
        device = token_R.device
        self.contexts.leave(torch.from_numpy(holes).to(device), torch.from_numpy(movers).to(device), live)
        order_R = torch.from_numpy(order[:live]).to(device)
        self.row_R, self.alive_R = self.row_R[order_R], self.alive_R[order_R]
        self.length_R, self.limit_R = self.length_R[order_R], self.limit_R[order_R]
        return token_R[order_R]

    def _tell(self, ended: np.ndarray) -> None:
        assert self.on_end is not None
        for number in self.row_R.cpu().numpy()[ended].tolist():
            if number not in self.told:
                self.told.add(number)
                self.on_end(number, self.tokens(number))

    def tokens(self, number: int) -> np.ndarray:
        """Those of a completion so far."""
        return self.tokens_BT[number, : int(self.length_B[number])].cpu().numpy()

    def completions(self) -> Completions:
        tokens_BT, logp_BT, length_B = (x.cpu().numpy() for x in (self.tokens_BT, self.logp_BT, self.length_B))
        last_B = tokens_BT[np.arange(len(length_B)), length_B - 1]
        finish_B = np.select(
            [
                np.isin(last_B, self.policy.tokenizer.eos_ids),
                np.isin(last_B, self.sampling.stop_ids) | np.isin(np.arange(len(last_B)), list(self.stopped)),
            ],
            [Finish.EOS, Finish.STOP],
            Finish.LENGTH,
        )
        return Completions(
            tokens=[row[:length] for row, length in zip(tokens_BT, length_B, strict=True)],
            logprobs=[row[:length] for row, length in zip(logp_BT, length_B, strict=True)],
            finish=[Finish(reason) for reason in finish_B],
        )


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a type that a processor computes with only by imitating it.

    Raises:
        ValueError: it has no instructions for it.
    """
    half = dtype == torch.float16 and device.type == "cpu"
    if half or (dtype == torch.bfloat16 and not multiplies_bfloat16(device)):
        raise ValueError(f"this processor has no instructions for {dtype}; generate in float32")


def free_memory(device: torch.device) -> int:
    """Bytes that are free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
