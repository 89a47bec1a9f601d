"""A language model that gives a text one number: a scalar head on the state at the text's last token.

The shape is transformers' own ``AutoModelForSequenceClassification`` with one label. Shapes: B texts of a batch, T tokens,
H hidden width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.contract import RewardError
from rewards.pretrained import read_pretrained

Row = Sequence[int]
"""The token ids of a text."""
ByPrefix = dict[tuple[int, ...], list[tuple[int, ...]]]
"""Rows by what they begin with."""


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt with its answer, as the model reads them.

    Args:
        ids: the tokens, at most as many as the model's context holds.
        cut: tokens taken off the front to fit.
        answer_cut: those of them that belong to the answer; where there are any, the text should not be scored.
    """

    ids: list[int]
    cut: int = 0
    answer_cut: int = 0


class ScalarModel:
    """A model with its tokenizer: how the two read a text, in learning and in use alike.

    A text is the tokenizer's chat template with the prompt as the user's turn and the answer as the assistant's; without a
    template, the prompt followed by the answer. It ends with the tokenizer's end token, added where the template does not
    close the turn with it. Of a text longer than the context, the end is read: the front of the prompt goes.

    Args:
        model: a classifier with one label whose head is called ``score``. Its dropout is switched off.
        tokenizer: a transformers tokenizer with an end token.
        max_tokens: most tokens of a text; default, and at most, the model's context.

    Raises:
        RewardError: the model or the tokenizer is of another kind.
    """

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int | None = None) -> None:
        if not hasattr(model, "score"):  # what the head is called wherever the trunk is a causal language model
            raise RewardError(f"a reward model is made of a causal language model, got a {type(model).__name__}")
        if tokenizer.eos_token_id is None:
            raise RewardError("a reward model's tokenizer needs an end token, this one has no eos_token")
        self.model = model.eval()
        self.model.score.float()  # in bfloat16 close scores would be ties
        self.tokenizer = tokenizer
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_tokens = min((limit for limit in (context, max_tokens) if limit is not None), default=None)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[Text]:
        """The texts of ``(prompt, answer)`` pairs."""
        return [self._fit(pair, ids) for pair, ids in zip(pairs, self._tokenize(pairs), strict=True)]

    def answer_start(self, prompt: str, answer: str) -> int:
        """The number of tokens before the answer, nothing cut: those that a text with an empty answer begins with too."""
        return _shared(*self._tokenize([(prompt, answer), (prompt, "")]))

    def _fit(self, pair: tuple[str, str], ids: list[int]) -> Text:
        if self.max_tokens is None or len(ids) <= self.max_tokens:
            return Text(ids)
        cut = len(ids) - self.max_tokens
        return Text(ids[cut:], cut, max(cut - self.answer_start(*pair), 0))

    def _tokenize(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        if not pairs:
            return []
        templated = self.tokenizer.chat_template is not None
        texts = [encodable(render(self.tokenizer, prompt, answer)) for prompt, answer in pairs]
        # A template writes the special tokens itself.
        ids = self.tokenizer(texts, add_special_tokens=not templated, truncation=False)["input_ids"]
        return [
            row if templated and text.rstrip().endswith(self.tokenizer.eos_token) else _ended(row, self._eos_id)
            for text, row in zip(texts, ids, strict=True)
        ]

    @property
    def _eos_id(self) -> int:
        return self.tokenizer.eos_token_id

    def states(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """The tokens ``(B, T)`` of some texts, padded on the right, and the states ``(B, T, H)`` at them, differentiable."""
        tokens_BT, real_BT = self._padded(rows)
        output = self.model.base_model(input_ids=tokens_BT, attention_mask=real_BT, use_cache=False)
        return tokens_BT, output.last_hidden_state

    def head(self, states_BTH: Tensor, rows: Sequence[Row]) -> Tensor:
        """The number ``(B,)`` of each text, float32: the head at its last token."""
        last_B = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        last_BH = states_BTH[torch.arange(len(rows), device=self.device), last_B]
        return self.model.score(last_BH.float()).squeeze(1)

    @torch.inference_mode()
    def score(self, rows: Sequence[Row], tokens_per_batch: int | None = None) -> list[float]:
        """The number of each text. What texts share, such as their prompt, is read once; that changes rounding only.

        Args:
            rows: token ids of the texts.
            tokens_per_batch: most tokens, padding included, that go through the model at once; default 16,384 on a GPU, and
                on a CPU 1,024, since the states of more leave its caches.
        """
        if not rows:
            return []
        if tokens_per_batch is None:
            tokens_per_batch = 1_024 if self.device.type == "cpu" else 16_384
        texts = {tuple(row) for row in rows}
        by_prefix: ByPrefix = shared_prefixes(texts) if self._keeps_prefixes else {(): sorted(texts)}
        whole = by_prefix.pop((), [])
        found = []
        for places in batch_by_tokens([len(row) for row in whole], tokens_per_batch):
            batch = [whole[place] for place in places]
            found.append((batch, self.head(self.states(batch)[1], batch)))
        prefixes = list(by_prefix)
        for places in batch_by_tokens([len(prefix) for prefix in prefixes], tokens_per_batch):
            found += self._score_after({prefixes[i]: by_prefix[prefixes[i]] for i in places}, tokens_per_batch)
        # Only now, since reading a number waits for the device.
        scores = {row: head for batch, head_B in found for row, head in zip(batch, head_B.tolist(), strict=True)}
        return [scores[tuple(row)] for row in rows]

    @cached_property
    def _keeps_prefixes(self) -> bool:
        """Whether the model can go on from a prefix several times: whether its layers keep keys and values, and no more."""
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        taken = signature(self.model.base_model.forward).parameters
        layers = DynamicCache(config=self.model.config).layers
        return {"position_ids", "past_key_values"} <= taken.keys() and all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
        )

    def _score_after(self, by_prefix: ByPrefix, tokens: int) -> Iterator[tuple[list[tuple[int, ...]], Tensor]]:
        """Texts and their numbers in batches, by the prefixes that they share, which are read once.

        The layout is that of batched generation: prefixes padded on the left, so that what follows is next to them.
        """
        prefixes = list(by_prefix)
        tokens_PT, real_PT = self._padded(prefixes, left=True)
        position_PT = (real_PT.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": tokens_PT, "attention_mask": real_PT, "position_ids": position_PT}
        cache = self.model.base_model(**inputs, use_cache=True).past_key_values
        width = tokens_PT.shape[1]
        texts = [(place, row) for place, prefix in enumerate(prefixes) for row in by_prefix[prefix]]
        lengths = [width + len(row) - len(prefixes[place]) for place, row in texts]
        for batch in batch_by_tokens(lengths, tokens):
            places, rows = zip(*(texts[i] for i in batch), strict=True)
            ends = [row[len(prefixes[place]) :] for place, row in zip(places, rows, strict=True)]
            tokens_BT, real_BT = self._padded(ends)
            place_B = torch.tensor(places, device=self.device)
            position_BT = position_PT[place_B, -1:] + real_BT.cumsum(1)
            inputs = {"input_ids": tokens_BT, "position_ids": position_BT}
            inputs["attention_mask"] = torch.cat([real_PT[place_B], real_BT], 1)
            output = self.model.base_model(**inputs, past_key_values=_selected(cache, place_B), use_cache=True)
            yield list(rows), self.head(output.last_hidden_state, ends)

    def _padded(self, rows: Sequence[Row], left: bool = False) -> tuple[Tensor, Tensor]:
        """Rows as tokens ``(B, T)``, padded on the right or the left, and which are real: 1 or 0, ``(B, T)``."""
        lengths_B = torch.tensor([len(row) for row in rows])
        width = int(lengths_B.max())
        place_T = torch.arange(width)
        real_BT = place_T >= width - lengths_B[:, None] if left else place_T < lengths_B[:, None]
        # Any id may pad: which tokens are real is told by the lengths alone.
        tokens_BT = torch.full(real_BT.shape, self._eos_id)
        tokens_BT[real_BT] = torch.tensor(list(chain.from_iterable(rows)))
        return tokens_BT.to(self.device), real_BT.long().to(self.device)


def shared_prefixes(rows: Iterable[tuple[int, ...]]) -> ByPrefix:
    """Different rows by the beginning that they share; rows that share none with others by an empty one.

    Rows in order are parted where two neighbours share less than half of what one of them shares with its other neighbour.

    Example:
        >>> shared_prefixes([(7, 1, 2, 3), (8, 5), (7, 1, 2, 4, 5), (7, 1, 2, 4)])
        {(7, 1, 2): [(7, 1, 2, 3), (7, 1, 2, 4), (7, 1, 2, 4, 5)], (): [(8, 5)]}
    """
    ordered = sorted(rows)
    # What each row shares with the one before it.
    shared = [0, *(_shared(*neighbours) for neighbours in pairwise(ordered)), 0]
    parts = (place for place in range(1, len(ordered)) if 2 * shared[place] < max(shared[place - 1], shared[place + 1]))
    groups: ByPrefix = defaultdict(list)
    for start, end in pairwise([0, *parts, len(ordered)]):
        first, last = ordered[start], ordered[end - 1]
        # What the outermost share, all do. Some token is left for the end.
        groups[first[: _shared(first[:-1], last)] if end - start > 1 else ()] += ordered[start:end]
    return dict(groups)


def _shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """The number of tokens that both begin with."""
    return next((place for place, (a, b) in enumerate(zip(ids, others)) if a != b), min(len(ids), len(others)))  # noqa: B905


def _selected(cache: Any, place_B: Tensor) -> Any:
    """A cache of some rows of another, which stays as it is."""
    cache = copy(cache)
    cache.layers = [copy(layer) for layer in cache.layers]
    cache.batch_select_indices(place_B)
    return cache


def batch_by_tokens(lengths: Sequence[int], tokens: int, rows: Sequence[int] | None = None) -> list[list[int]]:
    """Positions in batches of like lengths, each with at most ``tokens`` tokens, padding included, or one item.

    Args:
        lengths: of each item, that of its longest row.
        tokens: most of a batch.
        rows: of each item; default one.

    Example:
        >>> batch_by_tokens([3, 9, 4, 2], tokens=10)
        [[1], [2, 0], [3]]
    """
    batches: list[list[int]] = []
    room = 0
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        needed = 1 if rows is None else rows[item]
        if not batches or needed > room:
            batches.append([])
            room = tokens // max(lengths[item], 1)
        batches[-1].append(item)
        room -= needed
    return batches


def _ended(ids: list[int], eos_id: int) -> list[int]:
    return ids if ids[-1:] == [eos_id] else [*ids, eos_id]


def render(tokenizer: Any, prompt: str, answer: str) -> str:
    """A prompt with its answer by the tokenizer's chat template, or without one the answer right after the prompt."""
    if tokenizer.chat_template is None:
        return prompt + answer
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(turns, tokenize=False)


def defused(tokenizer: Any, text: str) -> str:
    """``text`` with a space in what the tokenizer would read as its special tokens: a policy cannot close its own turn."""
    for token in tokenizer.all_special_tokens:
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def encodable(text: str) -> str:
    """``text`` without lone surrogates, which no tokenizer takes."""
    return text.encode(errors="replace").decode()


@contextmanager
def on_device(model: Any, device: str | torch.device, offload: bool) -> Iterator[None]:
    """With ``model`` on ``device``; it goes back to main memory after if it is to be offloaded."""
    model.to(device)
    try:
        yield
    finally:
        if offload:
            model.to("cpu")


def load_scalar_model(source: str | Path, *, dtype: torch.dtype, max_tokens: int | None = None) -> ScalarModel:
    """A reward model from a transformers folder or the hub. Code that comes with a model is not run.

    Raises:
        RewardError: there is none at ``source``, or what is there is something else.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    kind, labels = describe(source)
    if not kind.endswith("ForSequenceClassification") or labels != 1:
        raise RewardError(
            f"a reward model is a sequence classifier with one label, but {str(source)!r} is a {kind} with {labels}; "
            "to fit one to preferences, see rewards.learned.fit"
        )
    with reading(source):
        model, loading = read_pretrained(
            AutoModelForSequenceClassification, source, dtype=dtype, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if loading["missing_keys"]:
        raise RewardError(f"{str(source)!r} lacks weights: {', '.join(sorted(loading['missing_keys'])[:3])}")
    return ScalarModel(model, tokenizer, max_tokens)


def describe(source: str | Path) -> tuple[str, int]:
    """The class of the model at ``source``, and its number of labels, from its config alone.

    Raises:
        RewardError: there is no model.
    """
    from transformers import AutoConfig

    with reading(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    return (config.architectures or ["model of no known class"])[0], config.num_labels


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """One line where a model cannot be read, and quiet as in :func:`quiet`."""
    try:
        with quiet():
            yield
    except (OSError, ValueError) as error:
        here = "" if Path(source).exists() else "there is no such folder, and "
        why = str(error).splitlines()[0]
        raise RewardError(f"no model can be read from {str(source)!r}: {here}{why}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars, and its report of a head that is new."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def default_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
