"""A language model that judges every step of an answer: the probability that it is right.

Two shapes are public. A *token classifier* labels the last token of the separator after each step; a *language model*
answers a tag after each step with a good or a bad token. With the output rows of those two tokens alone the second is a
token classifier too. Shapes: B texts of a batch, T tokens, K labels, S steps of all these texts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch

from rewards.contract import RewardError
from rewards.learned.scalar import batch_by_tokens, describe, encodable, reading
from rewards.pretrained import read_pretrained


@dataclass(frozen=True, slots=True)
class Solution:
    """A prompt with the steps of an answer, as the model reads them.

    Args:
        ids: the tokens, at most as many as the model's context holds.
        ends: the token, from 0, at which each step is judged.
        cut: tokens taken off the front to fit.
        answer_cut: those of them that belong to the answer; where there are any, the steps should not be judged.
    """

    ids: list[int]
    ends: list[int]
    cut: int = 0
    answer_cut: int = 0


class StepModel:
    """A model with its tokenizer: how the two read an answer's steps.

    Args:
        model: gives each token the logits of its labels, from bad to good. Its dropout is switched off.
        tokenizer: a transformers tokenizer.
        separator: what the model was trained to see between steps.
        tag: what follows each step of a model that answers tags; None for a token classifier.
        neutral_is_good: what the middle one of three labels counts as.
        max_tokens: most tokens of a text; default, and at most, the model's context.

    Raises:
        RewardError: the tokenizer has no token for the separator, or for a tag does not tell where in a text tokens stand.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        separator: str,
        tag: str | None = None,
        neutral_is_good: bool = True,
        max_tokens: int | None = None,
    ) -> None:
        if not tokenizer.encode(separator, add_special_tokens=False):
            raise RewardError(f"the process reward model's tokenizer has no token for the separator {separator!r}")
        if tag is not None and not tokenizer.is_fast:
            raise RewardError("to find its tags, a process reward model needs a fast tokenizer, one that tells offsets")
        self.model = model.eval()
        self.model.config.use_cache = False
        self.tokenizer = tokenizer
        self.separator = separator
        self.tag = tag
        self.first_good = 1 if neutral_is_good else -1
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_tokens = min((limit for limit in (context, max_tokens) if limit is not None), default=None)

    def encode(self, prompt: str, steps: Sequence[str]) -> Solution:
        """The tokens of a prompt and the steps of its answer, of which there is at least one."""
        prompt, *steps = map(encodable, (prompt, *steps))
        tag = self.tag
        encoded = self._encode_parts(prompt, steps) if tag is None else self._encode_tagged(prompt, steps, tag)
        ids, start, ends = encoded
        cut = 0 if self.max_tokens is None else max(len(ids) - self.max_tokens, 0)
        return Solution(ids[cut:], [end - cut for end in ends], cut, max(cut - start, 0))

    def _encode_parts(self, prompt: str, steps: Sequence[str]) -> tuple[list[int], int, list[int]]:
        """As TRL's ``PRMTrainer``: parts are encoded one by one, and the last step is followed by a separator too."""
        parts = self.tokenizer([prompt, *steps, self.separator], add_special_tokens=False)["input_ids"]
        begin = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        step_ids = [ids + parts[-1] for ids in parts[1:-1]]
        start = len(begin) + len(parts[0])
        ends = [start + length - 1 for length in accumulate(map(len, step_ids))]
        return [*begin, *parts[0], *chain.from_iterable(step_ids)], start, ends

    def _encode_tagged(self, prompt: str, steps: Sequence[str], tag: str) -> tuple[list[int], int, list[int]]:
        """As Math-Shepherd's models: one text, ``{prompt} {step} {tag}``, with the separator before each further step.

        Only the tags added here are read: where a policy writes one itself, it is a part of its step.
        """
        judged = [f"{step} {tag}" for step in steps]
        answer = len(prompt) + 1
        before = answer - len(self.separator)
        lasts = [before + end - 1 for end in accumulate(len(self.separator) + len(step) for step in judged)]
        encoded = self.tokenizer(f"{prompt} {self.separator.join(judged)}", return_offsets_mapping=True)
        # Tokens that stand for some of the text, which beginning and end tokens do not.
        spans = [(*span, token) for token, span in enumerate(encoded["offset_mapping"]) if span[0] < span[1]]
        begins = [begin for begin, _, _ in spans]
        ends = [spans[bisect_right(begins, last) - 1][2] for last in lasts]
        return encoded["input_ids"], next(token for _, end, token in spans if end > answer), ends

    @torch.inference_mode()
    def judge(self, solutions: Sequence[Solution], tokens_per_batch: int | None = None) -> list[list[float]]:
        """The probability of each step of each solution. Which ones share a batch changes rounding only.

        Args:
            solutions: what is read.
            tokens_per_batch: most tokens, padding included, that go through the model at once; default 16,384 on a GPU, and
                on a CPU 1,024.
        """
        if tokens_per_batch is None:
            tokens_per_batch = 1_024 if self.model.device.type == "cpu" else 16_384
        places = batch_by_tokens([len(solution.ids) for solution in solutions], tokens_per_batch)
        judged = [self._judge([solutions[place] for place in batch]) for batch in places]
        found: list[list[float]] = [[] for _ in solutions]
        for batch, good_S in zip(places, judged, strict=True):  # only now, since reading a number waits for the device
            numbers = iter(good_S.tolist())
            for place in batch:
                found[place] = [next(numbers) for _ in solutions[place].ends]
        return found

    def _judge(self, solutions: Sequence[Solution]) -> torch.Tensor:
        width = max(len(solution.ids) for solution in solutions)
        # Any id may pad: which tokens are real is told by the mask.
        tokens_BT = torch.tensor([solution.ids + [0] * (width - len(solution.ids)) for solution in solutions])
        real_BT = torch.tensor([[1] * len(each.ids) + [0] * (width - len(each.ids)) for each in solutions])
        device = self.model.device
        logits_BTK = self.model(input_ids=tokens_BT.to(device), attention_mask=real_BT.to(device)).logits
        rows_S, ends_S = torch.tensor(
            [(row, end) for row, solution in enumerate(solutions) for end in solution.ends], device=device
        ).T
        return logits_BTK[rows_S, ends_S].float().softmax(-1)[:, self.first_good :].sum(-1)


def load_judge(source: str | Path, *, answers: tuple[str, str] | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model that judges steps, and its tokenizer, from a transformers folder or the hub. Code that comes with it is not run.

    Args:
        source: the folder or the name.
        answers: how a language model answers a tag, the bad answer first; None for a token classifier.
        dtype: of its weights.

    Raises:
        RewardError: there is none at ``source``, what is there is something else, or an answer is not one token.
    """
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

    kind, labels = describe(source)
    if answers is None and not (kind.endswith("ForTokenClassification") and labels in (2, 3)):
        raise RewardError(
            f"without a tag, a process reward model is a token classifier with 2 or 3 labels, but {str(source)!r} is a "
            f"{kind} with {labels}; one that answers steps with a good or a bad token needs its tag"
        )
    if answers is not None and not kind.endswith(("ForCausalLM", "LMHeadModel")):
        raise RewardError(f"a process reward model with a tag is a language model, but {str(source)!r} is a {kind}")
    auto: Any = AutoModelForTokenClassification if answers is None else AutoModelForCausalLM
    with reading(source):
        model, loading = read_pretrained(auto, source, dtype=dtype, output_loading_info=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if loading["missing_keys"]:
        raise RewardError(f"{str(source)!r} lacks weights: {', '.join(sorted(loading['missing_keys'])[:3])}")
    if answers is not None:
        _keep_answers(model, [_only_token(tokenizer, answer) for answer in answers])
    return model, tokenizer


def _only_token(tokenizer: Any, answer: str) -> int:
    ids = tokenizer.encode(answer, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise RewardError(
            f"a good and a bad answer are one token each, but {answer!r} is {ids} to the model's tokenizer"
        )
    return ids[0]


def _keep_answers(model: Any, ids: list[int]) -> None:
    """Let a language model give the logits of a few tokens only, with all that it does to logits."""
    head = model.get_output_embeddings()
    kept = torch.nn.Linear(head.in_features, len(ids), bias=head.bias is not None, dtype=head.weight.dtype)
    with torch.no_grad():
        kept.weight.copy_(head.weight[ids])
        if head.bias is not None:
            kept.bias.copy_(head.bias[ids])
    model.set_output_embeddings(kept)
