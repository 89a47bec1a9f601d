"""A judge's model in this process, without a server."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from rewards.judge.chat import BaseChat, OverBudgetError, Reply, Request, request_key
from rewards.judge.client import Chat

if TYPE_CHECKING:
    from rewards.judge.generation import LocalModel, Prompt

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_generating = threading.Lock()
"""One batch at a time in a process: two would share its memory and be no faster."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a reply is drawn.

    Args:
        max_tokens: most tokens of the reply.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: keep the likeliest tokens until their probabilities reach this sum.
        seed: of the draws, which depend on nothing else that is random.

    Raises:
        ValueError: a field is out of its range.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.max_tokens >= 1 and 0 <= self.temperature < math.inf and 0 < self.top_p <= 1 and self.seed >= 0):
            raise ValueError(
                "a local chat's sampling has max_tokens of 1 or more, temperature of 0 or more, top_p above 0 and at most 1, "
                f"seed of 0 or more; got {self}"
            )


class LocalChat(BaseChat):
    """A causal language model of transformers, in the place of a server: small judges, tests, machines without one.

    A request's ``sampling`` must name ``max_tokens``, and may name ``temperature`` and ``top_p`` (1.0 each if it does not, as
    in the protocol of servers) and ``seed`` (0). Nothing else has a say: of the model's ``generation_config`` the tokens that
    end a reply are read, and no more. A ``schema`` is ignored. A chat longer than the model's context, or one that its chat
    template refuses, has an error for a reply.

    A reply depends on its request alone: what else is asked at the same time changes rounding only, which in float32 a greedy
    reply does not show; a draw depends on the request's own seed, and torch's generators stay as they are. Requests that are
    equal are replied to once. For throughput a server is better: here a batch goes on until its longest reply has ended.

    Args:
        model: a folder or a name on the hub, read at the first request that the disk cannot answer. Code that comes with it
            is not run. Its tokenizer needs a chat template.
        device: such as ``"cuda:1"``; default a GPU where there is one.
        dtype: of the weights; ``"auto"`` for that in which they were saved.
        tokens_per_batch: most tokens, prompts, padding and the longest possible replies, that the model holds at once;
            default 65,536 on a GPU and 16,384 on a CPU. Changes memory, not replies.
        max_calls: budget in calls over the object's life; a run that is resumed goes on from what it had spent. An answer from
            the disk is none.
        max_tokens: budget in tokens, of prompts and replies together. A batch under way when it is used up still finishes.
        cache_dir: where answers are kept (``answers.sqlite3``), with a log of verdicts (``verdicts.jsonl``), on a local
            disk; any number of processes may share it. An answer belongs to the folder's full path, or the hub's name, to
            the dtype, the messages, the sampling and the schema: where other weights take the place of those in a folder, or
            behind a name, give them their own directory. None keeps nothing and logs nothing.

    Attributes:
        calls, tokens: spent so far.
        cached: requests that the disk answered.

    Raises:
        ValueError: an unknown dtype, ``tokens_per_batch`` below 1, a budget below 0; from :meth:`ask`, a field of a request's
            sampling that is unknown, missing or out of range.
        RewardError: from :meth:`ask`, the model cannot be read, or was not made to reply.

    Example::

        chat = LocalChat("Qwen/Qwen3-0.6B", cache_dir="judge-cache")
        reply, = chat.ask([Request([{"role": "user", "content": "What is 6 * 7?"}], {"max_tokens": 64})])
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str | None = None,
        dtype: Dtype = "auto",
        tokens_per_batch: int | None = None,
        max_calls: int | None = None,
        max_tokens: int | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        if dtype not in get_args(Dtype):
            raise ValueError(f"a local chat's dtype is one of {', '.join(get_args(Dtype))}, got {dtype!r}")
        if tokens_per_batch is not None and tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch must be at least 1, got {tokens_per_batch}")
        super().__init__(str(model), max_calls, max_tokens, cache_dir)
        self.device = device
        self.dtype = dtype
        self.tokens_per_batch = tokens_per_batch
        self._loaded: LocalModel | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the model: another process reads its own."""
        return {**super().__getstate__(), "_loaded": None}

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply a request, in order. Any thread may call; one is served after the other."""
        samplings = [_sampling(request.sampling) for request in requests]
        keys = [request_key(self._identity(), request) for request in requests]
        asked = dict(zip(keys, zip(requests, samplings, strict=True), strict=True))
        with _generating:
            replies = {key: reply for key in asked if (reply := self.find(key))}
            replies |= self._generate({key: asked[key] for key in asked if key not in replies})
        return [replies[key] for key in keys]

    def _generate(self, asked: Mapping[str, tuple[Request, Sampling]]) -> dict[str, Reply]:
        """A reply to each, kept on the disk batch by batch."""
        if not asked:
            return {}
        from rewards.learned.scalar import batch_by_tokens

        model = self._model()
        read = {key: model.read(*request) for key, request in asked.items()}
        replies = {key: Reply(error=prompt) for key, prompt in read.items() if isinstance(prompt, str)}
        prompts = [(key, prompt) for key, prompt in read.items() if not isinstance(prompt, str)]
        tokens = self.tokens_per_batch or (16_384 if model.model.device.type == "cpu" else 65_536)
        for batch in batch_by_tokens([prompt.size for _, prompt in prompts], tokens):
            replies |= self._generate_batch(model, dict(prompts[place] for place in batch))
        return replies

    def _generate_batch(self, model: LocalModel, prompts: Mapping[str, Prompt]) -> dict[str, Reply]:
        replies, paid = {}, []
        for key in prompts:
            try:
                self.spend_call()
                paid.append(key)
            except OverBudgetError as error:
                replies[key] = Reply(error=str(error), over_budget=True)
        written = model.reply([prompts[key] for key in paid]) if paid else []
        for key, reply in zip(paid, written, strict=True):
            self.tokens += reply.prompt_tokens + reply.completion_tokens
            self.keep(key, reply)
            replies[key] = reply
        return replies

    def _model(self) -> LocalModel:
        if self._loaded is None:
            from rewards.judge.generation import LocalModel

            self._loaded = LocalModel(self.model, self.device, self.dtype)
        return self._loaded

    def _identity(self) -> str:
        """What answers are kept under: never the name under which a server's are."""
        folder = Path(self.model)
        return f"local {folder.resolve() if folder.is_dir() else self.model} {self.dtype}"


def _sampling(given: Mapping[str, Any]) -> Sampling:
    known = [field.name for field in fields(Sampling)]
    unknown = sorted(given.keys() - set(known))
    if unknown or "max_tokens" not in given:
        fault = f"does not know {', '.join(unknown)}" if unknown else "needs max_tokens"
        raise ValueError(f"a local chat's sampling is of {', '.join(known)}, and {fault}; got {dict(given)}")
    return Sampling(**given)


def as_chat(chat: BaseChat | Mapping[str, Any]) -> BaseChat:
    """A chat as it is, or made of its arguments: with a ``base_url`` a :class:`Chat`, without one a :class:`LocalChat`.

    Raises:
        TypeError: ``chat`` is something else, or an argument is missing or unknown.

    Example:
        >>> as_chat({"model": "Qwen/Qwen3-0.6B", "dtype": "bfloat16"}).dtype
        'bfloat16'
    """
    if isinstance(chat, BaseChat):
        return chat
    if not isinstance(chat, Mapping):
        raise TypeError(
            "a judge's chat is a Chat, a LocalChat or a mapping of its arguments, such as "
            f'{{"model": "judge", "base_url": "http://127.0.0.1:8000/v1"}}, got {chat!r}'
        )
    kind = Chat if "base_url" in chat else LocalChat
    known = list(inspect.signature(kind).parameters)
    if "model" not in chat or (unknown := sorted(chat.keys() - set(known))):
        wrong = f"there is no {unknown[0]!r}" if "model" in chat else "'model' is missing"
        # Without the values: a key may be among them.
        raise TypeError(f"the arguments of a {kind.__name__} are {', '.join(known)}; {wrong} in {list(chat)}")
    return kind(**chat)
