"""A language model that gives a text one number: a scalar head on the state at the text's last token.

The shape is transformers' own ``AutoModelForSequenceClassification`` with one label. Shapes: B texts of a batch, T tokens,
H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.contract import RewardError


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
        shared = takewhile(lambda ids: ids[0] == ids[1], zip(*self._tokenize([(prompt, answer), (prompt, "")])))  # noqa: B905
        return sum(1 for _ in shared)

    def _fit(self, pair: tuple[str, str], ids: list[int]) -> Text:
        if self.max_tokens is None or len(ids) <= self.max_tokens:
            return Text(ids)
        cut = len(ids) - self.max_tokens
        return Text(ids[cut:], cut, max(cut - self.answer_start(*pair), 0))

    def _tokenize(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        if not pairs:
            return []
        templated = self.tokenizer.chat_template is not None
        texts = [_encodable(self._render(prompt, answer)) for prompt, answer in pairs]
        # A template writes the special tokens itself.
        ids = self.tokenizer(texts, add_special_tokens=not templated, truncation=False)["input_ids"]
        return [
            row if templated and text.rstrip().endswith(self.tokenizer.eos_token) else _ended(row, self._eos_id)
            for text, row in zip(texts, ids, strict=True)
        ]

    @property
    def _eos_id(self) -> int:
        return self.tokenizer.eos_token_id

    def _render(self, prompt: str, answer: str) -> str:
        if self.tokenizer.chat_template is None:
            return prompt + answer
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False)

    def states(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """The tokens ``(B, T)`` of some texts, padded on the right, and the states ``(B, T, H)`` at them, differentiable."""
        width = max(map(len, rows))
        # Any id may pad: which tokens are real is told by the lengths alone.
        tokens_BT = torch.tensor([row + [self._eos_id] * (width - len(row)) for row in rows]).to(self.device)
        lengths_B = torch.tensor([len(row) for row in rows], device=self.device)
        real_BT = torch.arange(width, device=self.device) < lengths_B[:, None]
        output = self.model.base_model(input_ids=tokens_BT, attention_mask=real_BT.long(), use_cache=False)
        return tokens_BT, output.last_hidden_state

    def head(self, states_BTH: Tensor, rows: Sequence[list[int]]) -> Tensor:
        """The number ``(B,)`` of each text, float32: the head at its last token."""
        last_B = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        last_BH = states_BTH[torch.arange(len(rows), device=self.device), last_B]
        return self.model.score(last_BH.float()).squeeze(1)

    @torch.inference_mode()
    def score(self, rows: Sequence[list[int]], tokens_per_batch: int | None = None) -> list[float]:
        """The number of each text. Which texts share a batch changes rounding only.

        Args:
            rows: token ids of the texts.
            tokens_per_batch: most tokens, padding included, that go through the model at once; default 16,384 on a GPU, and
                on a CPU 1,024, since the states of more leave its caches.
        """
        if tokens_per_batch is None:
            tokens_per_batch = 1_024 if self.device.type == "cpu" else 16_384
        places = batch_by_tokens([len(row) for row in rows], tokens_per_batch)
        batches = [[rows[place] for place in batch] for batch in places]
        heads = [self.head(self.states(batch)[1], batch) for batch in batches]
        scores = [0.0] * len(rows)
        for batch, head_B in zip(places, heads, strict=True):  # only now, since reading a number waits for the device
            for place, head in zip(batch, head_B.tolist(), strict=True):
                scores[place] = head
        return scores


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


def _encodable(text: str) -> str:
    """``text`` without lone surrogates, which no tokenizer takes."""
    return text.encode(errors="replace").decode()


def load_scalar_model(
    source: str | Path, *, device: str | torch.device, dtype: torch.dtype, max_tokens: int | None = None
) -> ScalarModel:
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
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if loading["missing_keys"]:
        raise RewardError(f"{str(source)!r} lacks weights: {', '.join(sorted(loading['missing_keys'])[:3])}")
    return ScalarModel(model.to(device), tokenizer, max_tokens)


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
        raise RewardError(f"no reward model can be read from {str(source)!r}: {str(error).splitlines()[0]}") from error


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
