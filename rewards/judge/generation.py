"""Replies of a causal language model in this process.

Shapes: B chats of a batch, S those of them that sample, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from rewards.contract import RewardError
from rewards.judge.chat import Reply, Request
from rewards.judge.local import Sampling
from rewards.learned.scalar import default_device, encodable, quiet
from rewards.pretrained import read_pretrained


@dataclass(frozen=True, slots=True)
class Prompt:
    """A chat as token ids, up to where the reply begins, and how to draw that."""

    ids: list[int]
    sampling: Sampling

    @property
    def size(self) -> int:
        """Tokens at most, the reply's with them."""
        return len(self.ids) + self.sampling.max_tokens


class LocalModel:
    """A language model with its tokenizer and chat template, ready to reply.

    Args:
        source: a transformers folder or a name on the hub. Code that comes with it is not run.
        device: such as ``"cuda:1"``; None for a GPU where there is one.
        dtype: of the weights; ``"auto"`` for that in which they were saved.

    Raises:
        RewardError: there is no causal language model at ``source``, or it has no chat template.
    """

    def __init__(self, source: str, device: str | None, dtype: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            with quiet():
                tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
                model = read_pretrained(AutoModelForCausalLM, source, dtype=dtype)
        except (OSError, ValueError) as error:
            raise RewardError(f"no language model can be read from {source!r}: {str(error).splitlines()[0]}") from error
        if tokenizer.chat_template is None:
            raise RewardError(f"{source!r} has no chat template: it was not made to reply; give a model that was")
        self.tokenizer = tokenizer
        self.model = model.to(device or default_device()).eval()
        recommended = self.model.generation_config.eos_token_id
        also = recommended if isinstance(recommended, list) else [recommended]
        self.end_ids = sorted({token for token in (tokenizer.eos_token_id, *also) if token is not None})
        if not self.end_ids:
            raise RewardError(
                f"{source!r} names no token that ends a reply; set eos_token in its tokenizer_config.json"
            )
        # Of what the model recommends, the tokens that end a reply are all that counts.
        self.model.generation_config = GenerationConfig(eos_token_id=self.end_ids, pad_token_id=self.end_ids[0])
        self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def read(self, request: Request, sampling: Sampling) -> Prompt | str:
        """The request as tokens, or why it cannot be replied to."""
        try:
            text = self.tokenizer.apply_chat_template(request.messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            return f"the judge's chat template refuses the chat: {error}"
        # A template writes the special tokens itself.
        ids = self.tokenizer(encodable(text), add_special_tokens=False)["input_ids"]
        prompt = Prompt(ids, sampling)
        if self.context is not None and prompt.size > self.context:
            return (
                f"the judge's model has a context of {self.context} tokens, and the chat has {len(ids)} with "
                f"max_tokens={sampling.max_tokens} to come"
            )
        return prompt

    @torch.inference_mode()
    def reply(self, prompts: Sequence[Prompt]) -> list[Reply]:
        """A reply to each, all in one batch. What else is in the batch changes rounding only."""
        width = max(len(prompt.ids) for prompt in prompts)
        padding = [width - len(prompt.ids) for prompt in prompts]
        rows = [[self.end_ids[0]] * pad + prompt.ids for pad, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        device = self.model.device
        written_BT = self.model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=GenerationConfig(
                do_sample=False,  # the draw is ours
                max_new_tokens=max(prompt.sampling.max_tokens for prompt in prompts),
                eos_token_id=self.end_ids,
                pad_token_id=self.end_ids[0],
            ),
            logits_processor=[_Draw([prompt.sampling for prompt in prompts])],
            stopping_criteria=[_Limit(width, torch.tensor([p.sampling.max_tokens for p in prompts], device=device))],
        )[:, width:]
        return [self._reply(prompt, ids) for prompt, ids in zip(prompts, written_BT.tolist(), strict=True)]

    def _reply(self, prompt: Prompt, ids: list[int]) -> Reply:
        ids = ids[: prompt.sampling.max_tokens]  # padding comes after
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        written = len(ids) if end is None else end + 1
        finish = "length" if end is None else "stop"
        return Reply(text, finish, prompt_tokens=len(prompt.ids), completion_tokens=written)


class _Draw(LogitsProcessor):
    """Draws the tokens of chats that sample, and leaves each as its row's only possible one.

    A row's draw inverts its distribution function at numbers from a generator of its own. So it depends on no other row, and
    the generators of torch, which others use, stay as they are.
    """

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self.rows = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
        drawn = [samplings[row] for row in self.rows]
        self.temperature_S1 = torch.tensor([[sampling.temperature] for sampling in drawn], dtype=torch.float64)
        self.top_p_S1 = torch.tensor([[sampling.top_p] for sampling in drawn], dtype=torch.float64)
        self.generators = [np.random.default_rng(sampling.seed) for sampling in drawn]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not self.rows:
            return scores
        device = scores.device
        uniform_S1 = torch.tensor([[generator.random()] for generator in self.generators], dtype=torch.float64)
        logits_SV = scores[self.rows].double() / self.temperature_S1.to(device)
        token_S1 = draw(logits_SV.softmax(1), self.top_p_S1.to(device), uniform_S1.to(device))
        only_SV = torch.full_like(scores[self.rows], -torch.inf).scatter_(1, token_S1, 0.0)
        scores[self.rows] = only_SV
        return scores


def draw(p_SV: Tensor, top_p_S1: Tensor, uniform_S1: Tensor) -> Tensor:
    """A token of each row, int64 ``(S, 1)``, from the likeliest tokens that together have ``top_p``.

    Args:
        p_SV: probabilities, float64.
        top_p_S1: above 0, at most 1.
        uniform_S1: where in [0, 1) the distribution function is inverted.

    Example:
        >>> p, half = torch.tensor([[0.1, 0.6, 0.3]]).double(), torch.tensor([[0.5]]).double()
        >>> int(draw(p, torch.ones(1, 1), half)), int(draw(p, torch.ones(1, 1), half + 0.2)), int(draw(p, half, half + 0.2))
        (1, 2, 1)
    """
    sorted_SV, order_SV = p_SV.sort(dim=1, descending=True, stable=True)
    mass_SV = sorted_SV.cumsum(1)
    sorted_SV = sorted_SV.where(mass_SV - sorted_SV < top_p_S1, 0.0)
    mass_SV = sorted_SV.cumsum(1)
    # Scaled by the total and searched to the right, so that rounding never picks a token without probability.
    place_S1 = torch.searchsorted(mass_SV, uniform_S1 * mass_SV[:, -1:], right=True)
    return order_SV.gather(1, place_S1)


class _Limit(StoppingCriteria):
    """Ends each chat at its own number of tokens."""

    def __init__(self, start: int, most_B: Tensor) -> None:
        self.start = start
        self.most_B = most_B

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        return input_ids.shape[1] - self.start >= self.most_B  # type: ignore[return-value]
