"""Many requests at once to an OpenAI-compatible server, from synchronous code."""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rewards.judge.chat import BaseChat, OverBudgetError, Reply, Request, request_key

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 8.0
"""Waits before retries: the first, doubled for each further one up to the longest, less up to a quarter by chance."""
LONGEST_RETRY_AFTER_S = 120.0
"""A server that asks for a longer wait than this is not asked again."""
SHORTEST_SECRET = 8
"""Shorter keys are dummies for servers that want none, and no secret: taking "1" out of replies would change scores."""
CHARACTERS_A_TOKEN = 4
"""For the budget, where a server does not say how many tokens it used."""

_RETRIED = {408, 409, 429}
_SHAPES = {"response_format", "structured_outputs"}
"""Fields of the sampling that say themselves what the answer looks like. vLLM refuses two such orders in one request."""
_NO_SCHEMA = {400, 415, 422}
"""How servers refuse a ``response_format`` that they do not know, and other things too."""


class Chat(BaseChat):
    """A model behind an OpenAI-compatible server (``vllm serve``, llama.cpp, a hosted one).

    The key is read from the environment when first needed, and is in no attribute, log, cache or error. A server that
    wants none needs none.

    Retried are connections that fail, time-outs and the statuses 408, 409, 429 and 5xx, after the server's ``Retry-After``
    or else a wait that doubles each time. Any other error fails its request at once, and no other. When as many requests in
    a row as may be under way have never reached the server, those that follow try once, until one is answered. Requests
    that are equal and under way at the same time are sent once. All calls, from all threads, share this, the limit on
    concurrency and the budget.

    The first request with a schema finds out whether the server takes it. A server that refuses it is not sent it again.

    Args:
        model: the name that the server knows it by.
        base_url: such as ``http://127.0.0.1:8000/v1``.
        concurrency: requests under way at once, at most.
        timeout: seconds for one attempt, from the first byte sent to the last received.
        retries: further attempts for a request, at most.
        max_calls: budget in calls over the object's life; a run that is resumed goes on from what it had spent. An attempt is
            a call; an answer from the disk is none.
        max_tokens: budget in tokens, of prompts and answers together. What is under way when it is used up still
            finishes, so it can be passed by up to ``concurrency`` answers.
        cache_dir: where answers are kept (``answers.sqlite3``), with a log of verdicts (``verdicts.jsonl``), on a local
            disk; any number of processes may share it. An answer belongs to the model's *name*, the messages, the
            sampling and the schema, not to the server: give another model under the same name its own directory. None
            keeps nothing and logs nothing.
        key_env: the environment variable that holds the key.

    Attributes:
        calls, tokens: spent so far.
        cached: requests that the disk answered.

    Raises:
        ImportError: without the extra ``textenv[judge]``.
        ValueError: a limit that makes no sense, a ``base_url`` that is no http address, or a key where its settings are.

    Example::

        chat = Chat("judge", "http://127.0.0.1:8000/v1", cache_dir="judge-cache", max_calls=10_000)
        reply, = chat.ask([Request([{"role": "user", "content": "What is 6 * 7?"}], {"max_tokens": 8})])
    """

    waits = True

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        concurrency: int = 32,
        timeout: float = 60.0,
        retries: int = 4,
        max_calls: int | None = None,
        max_tokens: int | None = None,
        cache_dir: str | Path | None = None,
        key_env: str = "OPENAI_API_KEY",
    ) -> None:
        try:
            import openai  # noqa: F401 - a missing extra shows here, not in the first batch
        except ImportError as error:
            raise ImportError('a judge needs openai: pip install "textenv[judge]"') from error
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url looks like 'http://127.0.0.1:8000/v1', got {base_url!r}")
        address = urlsplit(base_url)
        if address.username or address.password or address.query or not re.fullmatch(r"[A-Za-z_]\w*", key_env):
            # Settings are kept and shown, these too: what stands there is not repeated here.
            raise ValueError(
                "a key has no place in the settings, neither in base_url nor as key_env; put it into an environment variable, "
                'and the name of that into key_env, "OPENAI_API_KEY" by default'
            )
        if concurrency < 1 or timeout <= 0 or retries < 0:
            raise ValueError(
                "concurrency is 1 or more, timeout above 0, retries 0 or more, got "
                f"{concurrency=}, {timeout=}, {retries=}"
            )
        super().__init__(model, max_calls, max_tokens, cache_dir)
        self.base_url = base_url
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.key_env = key_env
        self._connected: _Connection | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the connection: another process opens its own."""
        return {**super().__getstate__(), "_connected": None}

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply a request, in order. Never raises for what a server does. Any thread may call, also several at once."""
        keys = [request_key(self.model, request) for request in requests]
        connection = self._connection()
        work = connection.answer_all(dict(zip(keys, requests, strict=True)))
        future = asyncio.run_coroutine_threadsafe(work, connection.loop)
        try:
            replies = future.result()
        except BaseException:  # Ctrl-C while waiting: leave no requests running behind
            future.cancel()
            raise
        return [replies[key] for key in keys]

    def _connection(self) -> _Connection:
        with _connecting:
            if self._connected is None or self._connected.pid != os.getpid():  # a fork has no event loop running
                self._connected = _Connection(self)
            return self._connected


_connecting = threading.Lock()


@cache
def _event_loop(pid: int) -> asyncio.AbstractEventLoop:
    """The one event loop of this process, on a thread of its own, for callers on threads with and without one."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="judge", daemon=True).start()
    return loop


@dataclass(slots=True)
class _Work:
    """A request under way, and how many wait for it."""

    task: asyncio.Task[Reply]
    waiting: int = 0


class _Connection:
    """What a :class:`Chat` has in one process. All methods run on the event loop, so nothing here needs a lock."""

    def __init__(self, chat: Chat) -> None:
        from openai import AsyncOpenAI

        self.chat = chat
        self.pid = os.getpid()
        self.loop = _event_loop(self.pid)
        self.key = os.environ.get(chat.key_env, "").strip() or "none"
        self.client = AsyncOpenAI(base_url=chat.base_url, api_key=self.key, timeout=chat.timeout, max_retries=0)
        self.under_way: dict[str, _Work] = {}
        self.slots = asyncio.Semaphore(chat.concurrency)
        self.takes_schema: dict[str, bool] = {}
        """of the schemas that were tried, whether the server takes them"""
        self.unreached = 0
        """requests in a row that never reached the server"""
        self.tried: set[str] = set()
        self.probing = asyncio.Lock()

    async def answer_all(self, requests: Mapping[str, Request]) -> dict[str, Reply]:
        works = {key: self.join(key, request) for key, request in requests.items()}
        try:
            if works:
                await asyncio.wait([work.task for work in works.values()])  # leaves them running if this is cancelled
            return {key: work.task.result() for key, work in works.items()}
        finally:
            for key, work in works.items():
                work.waiting -= 1
                if not work.waiting and not work.task.done():  # all who asked have given up
                    work.task.cancel()
                    self.forget(key, work)

    def join(self, key: str, request: Request) -> _Work:
        """The work on a request: what is under way already, or new."""
        work = self.under_way.get(key)
        if work is None:
            work = self.under_way[key] = _Work(self.loop.create_task(self.answer(key, request)))
            work.task.add_done_callback(lambda _: self.forget(key, work))
        work.waiting += 1
        return work

    def forget(self, key: str, work: _Work) -> None:
        if self.under_way.get(key) is work:
            del self.under_way[key]

    async def answer(self, key: str, request: Request) -> Reply:
        if found := self.chat.find(key):
            return found
        async with self.slots:
            try:
                reply = await self.complete(request)
            except OverBudgetError as error:
                return Reply(error=str(error), over_budget=True)
            except Exception as error:  # noqa: BLE001 - the boundary to a server, which may send anything
                return Reply(error=f"the judge's server failed: {self.clean(_describe(error))[:500]}")
        self.chat.keep(key, reply)
        return reply

    async def complete(self, request: Request) -> Reply:
        if _SHAPES & request.sampling.keys():
            request = replace(request, schema=None)
        if request.schema is None:
            return await self.attempt(request)
        schema = json.dumps(request.schema)
        if schema not in self.tried:
            async with self.probing:  # the first finds out for all, the others wait
                if schema not in self.tried:
                    try:
                        return await self.complete_with_schema(request, schema)
                    finally:
                        self.tried.add(schema)
        return await self.complete_with_schema(request, schema)

    async def complete_with_schema(self, request: Request, schema: str) -> Reply:
        from openai import APIStatusError

        plain, taken = replace(request, schema=None), self.takes_schema.get(schema)
        if taken is False:
            return await self.attempt(plain)
        try:
            reply = await self.attempt(request)
        except APIStatusError as error:
            if taken or error.status_code not in _NO_SCHEMA:
                raise
            reply = await self.attempt(plain)  # if this is refused as well, it was not for the schema
            self.takes_schema[schema] = False
        else:
            self.takes_schema[schema] = True
        return reply

    async def attempt(self, request: Request) -> Reply:
        """Send the request, up to 1 + ``retries`` times."""
        from openai import APIConnectionError

        body = {"model": self.chat.model, "messages": list(request.messages), **request.sampling}
        if request.schema is not None:
            schema = {"name": "verdict", "schema": request.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        attempt = 0
        while True:
            self.chat.spend_call()
            try:
                async with asyncio.timeout(self.chat.timeout):  # the client's own limit starts anew with each byte
                    # Plain JSON: the client's typed method takes an eighth more time, for objects that nothing here needs.
                    completion = await self.client.post("/chat/completions", body=body, cast_to=object)
                self.unreached = 0
                return self.read(request, completion)
            except Exception as error:
                wait = _wait_before_retry(error, attempt)
                # Where so many failed one after the other the server is gone: what is left tries it once.
                gone = self.unreached >= self.chat.concurrency
                if wait is None or gone or attempt == self.chat.retries:
                    self.unreached += isinstance(error, TimeoutError | APIConnectionError)
                    raise
            attempt += 1
            await asyncio.sleep(wait)

    def read(self, request: Request, completion: Any) -> Reply:
        try:
            choice, usage = completion["choices"][0], completion.get("usage") or {}
            message = choice["message"]
            refusal = message.get("refusal") or ""
            text = (message.get("content") or "") + refusal
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ValueError("the server's answer is no chat completion") from None
        prompt_tokens = usage.get("prompt_tokens") or _guess_tokens(m["content"] for m in request.messages)
        completion_tokens = usage.get("completion_tokens") or _guess_tokens([text])
        self.chat.tokens += prompt_tokens + completion_tokens
        finish = "content_filter" if refusal else choice.get("finish_reason") or "stop"
        return Reply(self.clean(text), finish, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)

    def clean(self, text: str) -> str:
        """``text`` as valid Unicode, without the key: servers quote one that they do not accept."""
        text = text.encode("utf-8", "replace").decode()
        return text.replace(self.key, "[key]") if len(self.key) >= SHORTEST_SECRET else text


def _guess_tokens(texts: Iterable[str]) -> int:
    return sum(map(len, texts)) // CHARACTERS_A_TOKEN


def _wait_before_retry(error: Exception, attempt: int) -> float | None:
    """Seconds to wait after an attempt that failed; None if another would fail as well."""
    from openai import APIConnectionError, APIStatusError

    wait = min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S) * random.uniform(0.75, 1.0)
    if isinstance(error, TimeoutError | APIConnectionError):
        return wait
    if not isinstance(error, APIStatusError) or error.code == "insufficient_quota":
        return None
    if error.status_code not in _RETRIED and error.status_code < 500:
        return None
    asked = _seconds(error.response.headers.get("retry-after"))
    if asked is None:
        return wait
    return asked if asked <= LONGEST_RETRY_AFTER_S else None


def _seconds(retry_after: str | None) -> float | None:
    """A ``Retry-After`` header in seconds from now; it holds seconds or a date (RFC 9110, 10.2.3)."""
    if retry_after is None:
        return None
    try:
        return max(float(retry_after), 0.0)
    except ValueError:
        date = email.utils.parsedate_tz(retry_after)
        return max(email.utils.mktime_tz(date) - time.time(), 0.0) if date else None


def _describe(error: Exception) -> str:
    text = "no reply in time" if isinstance(error, TimeoutError) else str(error)
    return f"{type(error).__name__}: {text}"
