"""Rewards from what causal language models make of each token of an answer.

Shapes: B texts of a batch, T tokens of one answer, V vocabulary. Log-probabilities are in nats, of the softmax over all of a
model's logits at temperature 1.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.contract import Reward, RewardError, Sample, Score, ungraded
from rewards.learned.credit import place
from rewards.learned.reward_model import Dtype, check_options, reading_models
from rewards.learned.scalar import (
    batch_by_tokens,
    default_device,
    defused,
    describe,
    encodable,
    on_device,
    reading,
    render,
)
from rewards.pretrained import read_pretrained

CUT = ("length", "context")
"""The ``finish`` of completions that the policy did not end itself."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt with its answer, as models read them.

    Args:
        ids: the tokens, up to the last one that counts.
        start: how many of them come before the answer, at least one.
        written: for each token of the answer, how far it brings the completion, in characters. Tokens after these end the
            turn.
        cut: tokens of the prompt taken off the front to fit.
    """

    ids: list[int]
    start: int
    written: list[int]
    cut: int


class Reader:
    """How models read samples: as texts put together as by :class:`~rewards.learned.scalar.ScalarModel`.

    What counts is the answer and, unless the completion was cut (:data:`CUT`), the end of the turn: that with which the chat
    template closes it, or else the tokenizer's end token. Of a text longer than the context the front of the prompt goes.

    Args:
        tokenizer: a fast transformers tokenizer with an end token.
        max_tokens: most tokens of a text; None for no limit.

    Raises:
        RewardError: the tokenizer is of another kind.
    """

    def __init__(self, tokenizer: Any, max_tokens: int | None = None) -> None:
        if not tokenizer.is_fast or tokenizer.eos_token_id is None:
            raise RewardError("a language model that rewards needs a fast tokenizer with an eos_token")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        # A character of private use tells where a template puts the answer.
        self._closing = render(tokenizer, "?", "\ue000").rpartition("\ue000")[2]

    def read(self, samples: Sequence[Sample]) -> list[Answer | str]:
        """Each sample as an answer, or why it cannot be read."""
        if not samples:
            return []
        texts = [render(self.tokenizer, encodable(sample.prompt), encodable(sample.completion)) for sample in samples]
        # A template writes the special tokens itself.
        special = self.tokenizer.chat_template is None
        encoded = self.tokenizer(texts, add_special_tokens=special, return_offsets_mapping=True)
        rows = zip(samples, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [self._answer(*row) for row in rows]

    def _answer(self, sample: Sample, text: str, ids: list[int], spans: list[tuple[int, int]]) -> Answer | str:
        completion, eos_id = encodable(sample.completion), self.tokenizer.eos_token_id
        if completion != defused(self.tokenizer, completion):
            return "the completion writes a special token of the tokenizer, and could end its turn by itself"
        # Templates may strip the space around an answer.
        forms = (completion, completion.rstrip(), completion.lstrip(), completion.strip())
        kept = next((form for form in forms if text.endswith(form + self._closing)), None)
        if kept is None:
            return "the chat template rewrites the completion, whose tokens then cannot be told from others"
        if ids[-1:] != [eos_id]:
            ids, spans = [*ids, eos_id], [*spans, (0, 0)]
        spans = [*spans[:-1], (len(text), len(text) + 1)]  # an end token that is not part of the text has no span
        end = len(text) - len(self._closing)
        first, closed = end - len(kept), len(text) - len(self._closing.lstrip())
        start = sum(stop <= first for _, stop in spans)
        stops = [min(stop, end) for begin, stop in spans if stop > first and begin < end]
        size = start + len(stops) if sample.finish in CUT else sum(stop <= closed for _, stop in spans) + 1
        cut = 0 if self.max_tokens is None else max(size - self.max_tokens, 0)
        if start == 0:
            return "nothing comes before the completion, so its first token has no probability; give a prompt"
        if start <= cut:
            return f"the completion has {size - start} tokens, and the model reads {size - cut - 1} after a prompt"
        stripped = completion.index(kept)
        return Answer(ids[cut:size], start - cut, [stripped + stop - first for stop in stops], cut)


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A causal language model that reads answers.

    Args:
        model: any causal LM of transformers, with dropout off.
        device: where it runs.
        tokens_per_batch: most tokens, padding included, that go through the model at once.
        offload: keep the weights in main memory between uses.
    """

    model: Any
    device: str
    tokens_per_batch: int
    offload: bool = False

    @torch.inference_mode()
    def read(self, answers: Sequence[Answer], reduce: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """What ``reduce`` makes of each answer's logits, on the CPU. Logits are held for one batch at a time.

        Args:
            answers: from a :class:`Reader`.
            reduce: gets ``logits_TV`` in float32 and ``tokens_T``, of the tokens that count.
        """
        with on_device(self.model, self.device, self.offload):
            reduced = [torch.empty(0)] * len(answers)
            for batch in batch_by_tokens([len(answer.ids) for answer in answers], self.tokens_per_batch):
                for i, found in zip(batch, self._read([answers[i] for i in batch], reduce), strict=True):
                    reduced[i] = found
            return [found.cpu() for found in reduced]  # only now, since reading a number waits for the device

    def _read(self, answers: Sequence[Answer], reduce: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        width = max(len(answer.ids) for answer in answers)
        # Causal attention never looks at what stands on the right, so any id may pad, and no mask is needed.
        rows = [answer.ids + [0] * (width - len(answer.ids)) for answer in answers]
        tokens_BT = torch.tensor(rows, device=self.device)
        skipped = min(answer.start for answer in answers) - 1
        output = self.model(input_ids=tokens_BT, logits_to_keep=width - skipped, use_cache=False)
        reduced = []
        for answer, tokens_T, logits_TV in zip(answers, tokens_BT, output.logits, strict=True):
            start, end = answer.start, len(answer.ids)
            # The logits of a token stand at the token before it.
            reduced.append(reduce(logits_TV[start - 1 - skipped : end - 1 - skipped].float(), tokens_T[start:end]))
        return reduced


def log_probs(logits_TV: Tensor, tokens_T: Tensor) -> Tensor:
    """The log-probability ``(T,)`` of each token."""
    return logits_TV.log_softmax(-1).gather(-1, tokens_T[:, None]).squeeze(-1)


class LanguageModelReward(Reward):
    """A number for each token of an answer, from frozen language models; the value is their sum.

    Each number is credited to the token of the completion that writes the same character as the model's own token ends
    with, found in the text, so that the models may have another tokenizer than the policy; what ends the turn, to the last
    token. Samples that cannot be decoded, as from a file, get the value alone.

    Args:
        sources: folders or names on the hub, read on first use; one vocabulary for all. Code in them is not run.
        device, dtype, tokens_per_batch, max_tokens, offload: see the rewards.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        *,
        device: str | None,
        dtype: Dtype,
        tokens_per_batch: int | None,
        max_tokens: int | None,
        offload: bool,
    ) -> None:
        check_options(dtype, tokens_per_batch, max_tokens)
        self.sources = sources
        self.device = device
        self.dtype = dtype
        self.tokens_per_batch = tokens_per_batch
        self.max_tokens = max_tokens
        self.offload = offload

    @abstractmethod
    def token_rewards(
        self, models: Sequence[LanguageModel], answers: Sequence[Answer]
    ) -> Iterable[tuple[Tensor, Mapping[str, float]]]:
        """The numbers ``(T,)`` of each answer, float64, and its parts."""

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        if not samples:
            return []
        with reading_models:
            reader, models = self._loaded
            answers = reader.read(samples)
            found = iter([*self.token_rewards(models, [answer for answer in answers if isinstance(answer, Answer)])])
        return [
            ungraded(answer) if isinstance(answer, str) else self._score(sample, answer, *next(found))
            for sample, answer in zip(samples, answers, strict=True)
        ]

    def _score(self, sample: Sample, answer: Answer, reward_T: Tensor, parts: Mapping[str, float]) -> Score:
        rewards, words = reward_T.tolist(), len(answer.written)
        if not all(map(math.isfinite, rewards)):
            return ungraded(f"{self.name}: a token's reward is not finite")
        try:
            credit = place(sample, zip(answer.written, rewards[:words], strict=True))
        except ValueError as error:  # a completion that its tokens do not write
            return ungraded(str(error))
        if credit is not None:
            credit = (*credit[:-1], credit[-1] + math.fsum(rewards[words:]))
        size = answer.cut + len(answer.ids)
        info = {"cut": f"{answer.cut} of {size} tokens at the front of the prompt"} if answer.cut else {}
        return Score(math.fsum(rewards), {**parts, "tokens": len(rewards)}, credit, info=info)

    @cached_property
    def _loaded(self) -> tuple[Reader, list[LanguageModel]]:
        pairs = [_load(source, getattr(torch, self.dtype)) for source in self.sources]
        shared = _vocabulary(pairs[0][1])
        for source, (_, tokenizer) in zip(self.sources, pairs, strict=True):
            if _vocabulary(tokenizer) != shared:
                raise RewardError(
                    f"{str(source)!r} has another vocabulary, or other special tokens, than {str(self.sources[0])!r}; "
                    "the probabilities of two models compare over the same tokens alone"
                )
        contexts = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model, _ in pairs]
        limit = min((limit for limit in (self.max_tokens, *contexts) if limit is not None), default=None)
        device = self.device or default_device()
        tokens = self.tokens_per_batch or (1_024 if device == "cpu" else 4_096)
        models = [LanguageModel(model, device, tokens, self.offload) for model, _ in pairs]
        return Reader(pairs[0][1], limit), models


def _load(source: str | Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """A language model and its tokenizer from a transformers folder or the hub.

    Raises:
        RewardError: there is none, or it is something else.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind, _ = describe(source)
    if kind.endswith("ForSequenceClassification"):
        raise RewardError(f"a language model is needed, but {str(source)!r} is a {kind}")
    with reading(source):
        model, loading = read_pretrained(AutoModelForCausalLM, source, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if loading["missing_keys"]:
        raise RewardError(f"{str(source)!r} lacks weights: {', '.join(sorted(loading['missing_keys'])[:3])}")
    return model.eval(), tokenizer


def _vocabulary(tokenizer: Any) -> tuple[Any, ...]:
    return tokenizer.get_vocab(), tokenizer.bos_token, tokenizer.eos_token
