"""What a chat is: requests in, replies out, within a budget, with a cache and a log."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from rewards.contract import Reward
from rewards.judge.cache import Answers


@dataclass(frozen=True, slots=True)
class Request:
    """A chat to complete.

    Args:
        messages: ``{"role": ..., "content": ...}``, oldest first.
        sampling: fields of the request's body, such as ``temperature``, ``max_tokens`` or ``seed``.
        schema: what the answer should be as JSON, for servers with structured output. Others ignore it, or are asked
            without it: the answer may be any text. A local model ignores it. It is not sent either where ``sampling`` itself
            says what the answer looks like (``response_format``, or vLLM's ``structured_outputs``).
    """

    messages: Sequence[Mapping[str, str]]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of a request: a text, or an error.

    Args:
        text: the answer as it came; empty if there is an error.
        finish: the server's ``finish_reason``; ``"content_filter"`` also for a refusal that the server marks as such.
        error: why there is no answer.
        over_budget: the error is that the budget was used up.
        prompt_tokens, completion_tokens: what the answer cost when it was made.
        cached: it comes from the disk.
    """

    text: str = ""
    finish: str = "stop"
    error: str | None = None
    over_budget: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False


class OverBudgetError(Exception):
    """A call that the budget does not allow."""


class BaseChat(ABC):
    """A model that answers chats: what one behind a server and one in this process have in common.

    A copy is the chat itself, with its budget; what is pickled begins with what was spent until then.

    Args:
        model: its name.
        max_calls, max_tokens: budgets over the object's life; None for no limit.
        cache_dir: where answers (``answers.sqlite3``) and the log (``verdicts.jsonl``) are kept; None keeps nothing.

    Attributes:
        calls, tokens: spent so far.
        cached: requests that the disk answered.
        waits: whether an answer is waited for, while this process could do something else.

    Raises:
        ValueError: a budget below 0.
    """

    waits: bool = False

    def __init__(self, model: str, max_calls: int | None, max_tokens: int | None, cache_dir: str | Path | None) -> None:
        if min(max_calls or 0, max_tokens or 0) < 0:
            raise ValueError(f"budgets are 0 or more, got {max_calls=}, {max_tokens=}")
        self.model = model
        self.max_calls = max_calls
        self.max_tokens = max_tokens
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.calls = self.tokens = self.cached = 0
        self._answers: tuple[int, Answers] | None = None
        if self.cache_dir:
            self.cache_dir.mkdir(parents=True, exist_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one process."""
        return {**self.__dict__, "_answers": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def state_dict(self) -> dict[str, int]:
        """What was spent of the budgets; empty if nothing."""
        return {"calls": self.calls, "tokens": self.tokens} if self.calls else {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a :meth:`state_dict`."""
        self.calls, self.tokens = state.get("calls", 0), state.get("tokens", 0)

    @abstractmethod
    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply a request, in order. Any thread may call, also several at once."""

    def log(self, entries: Iterable[tuple[Request, Reply, Mapping[str, Any]]]) -> None:
        """Append ``(request, reply, what was read from it)`` to ``verdicts.jsonl``, a line each."""
        if not self.cache_dir:
            return
        lines = [
            json.dumps(
                {"time": time.time(), "model": self.model, **asdict(request), "reply": asdict(reply), "parsed": parsed}
            )
            for request, reply, parsed in entries
        ]
        # In one write, so that lines of other threads and processes do not fall between.
        with open(self.cache_dir / "verdicts.jsonl", "ab", buffering=0) as file:
            file.write("".join(line + "\n" for line in lines).encode())

    def find(self, key: str) -> Reply | None:
        """The answer that the disk has under ``key``."""
        found = self._disk().get(key)
        if not found:
            return None
        self.cached += 1
        return Reply(**json.loads(found), cached=True)

    def keep(self, key: str, reply: Reply) -> None:
        """Put an answer on the disk; errors and empty replies are not kept. A disk that fails is told and costs no answer."""
        if not reply.text:
            return
        try:
            self._disk().put(key, json.dumps({name: getattr(reply, name) for name in _KEPT}))
        except sqlite3.Error as error:
            warnings.warn(f"an answer of the judge could not be kept in {self.cache_dir}: {error}", stacklevel=2)

    def spend_call(self) -> None:
        """Count a call.

        Raises:
            OverBudgetError: the budget was used up before it.
        """
        for spent, budget, unit in ((self.calls, self.max_calls, "calls"), (self.tokens, self.max_tokens, "tokens")):
            if budget is not None and spent >= budget:
                raise OverBudgetError(f"the budget of {budget} {unit} is used up")
        self.calls += 1

    def _disk(self) -> Answers:
        if self._answers is None or self._answers[0] != os.getpid():  # a connection to SQLite does not survive a fork
            self._answers = os.getpid(), Answers(self.cache_dir and self.cache_dir / "answers.sqlite3")
        return self._answers[1]


class ChatReward(Reward):
    """A reward that asks a chat: what it has spent is its state."""

    chat: BaseChat

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self.chat.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.chat.load_state_dict(state)


_KEPT = ("text", "finish", "prompt_tokens", "completion_tokens")


def request_key(model: str, request: Request) -> str:
    """What an answer is kept under: a hash of all that it depends on."""
    # Not sorted: the order of a schema's properties is the order in which a server writes them.
    content = [model, list(request.messages), sorted(request.sampling.items()), request.schema]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
