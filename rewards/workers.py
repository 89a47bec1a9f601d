"""Work in processes that can be killed: a deadline that holds on every thread, and all cores for a batch."""

from __future__ import annotations

import atexit
import json
import os
import pkgutil
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache
from queue import SimpleQueue
from threading import Thread
from typing import Any

MEMORY_BYTES = 4 * 2**30
"""Address space of a worker. What needs more raises MemoryError there."""
ITEMS_A_PROCESS = 5_000
"""A worker starts afresh after so many items: libraries cache without bound."""

_SERVE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rewards.workers import _serve; _serve(sys.argv[2])"
)


@dataclass(frozen=True, slots=True)
class Failure:
    """What stands in the place of a result that never came, and why."""

    why: str
    timed_out: bool = False


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Workers:
    """Processes that run one function on JSON values, an item at a time.

    They start when first needed, stay warm, are shared by all :class:`Workers` of the same function and number, and end
    with this process. An item that takes too long, or that ends its process, costs that process and nothing else: another
    takes its place, as one does where a process was killed while it had nothing to do. Any thread may call, also several at
    once.

    Args:
        function: what to run, as an import string ``"package.module:function"``: one JSON value in, one out.
        seconds: wall-clock limit of an item.
        workers: how many processes at most; by default one for each core that may be used.

    Example:
        >>> Workers("operator:neg", seconds=10).map([1, -2])
        [-1, 2]
    """

    function: str
    seconds: float = field(kw_only=True)
    workers: int = field(kw_only=True, default_factory=usable_cores)

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and self.workers >= 1):
            raise ValueError(f"workers need time and at least one of them, got {self.seconds=} and {self.workers=}")

    def map(self, items: Sequence[Any]) -> list[Any]:
        """The results in the order of ``items``; a :class:`Failure` where there is none.

        That is where the function raised, was killed or died, and where an item or its result cannot be written as JSON.
        """
        pool = _pool(self.function, self.workers, os.getpid())
        results: list[Future[Any]] = [pool.submit(item, self.seconds) for item in items]
        try:
            return [result.result() for result in results]
        finally:  # after Ctrl-C nobody waits for the rest
            for result in results:
                result.cancel()


class _Pool:
    """The processes for one function, and a thread for each to wait with.

    The threads are daemons, so that what hangs in a process does not keep this one from ending.
    """

    def __init__(self, function: str, workers: int) -> None:
        self.questions: SimpleQueue[tuple[Any, float, Future[Any]]] = SimpleQueue()
        for _ in range(workers):
            Thread(target=self._work, args=[_Process(function)], name=function, daemon=True).start()

    def submit(self, item: Any, seconds: float) -> Future[Any]:
        result: Future[Any] = Future()
        self.questions.put((item, seconds, result))
        return result

    def _work(self, process: _Process) -> None:
        while True:
            item, seconds, result = self.questions.get()
            if result.set_running_or_notify_cancel():
                try:
                    result.set_result(process.ask(item, seconds))
                except Exception as error:  # noqa: BLE001 - it is for the one who waits
                    result.set_exception(error)


@cache
def _pool(function: str, workers: int, pid: int) -> _Pool:
    """One pool a process: ``pid`` is there because pipes and threads do not survive a fork."""
    return _Pool(function, workers)


class _Process:
    """One worker, started when first asked and again after it was killed."""

    def __init__(self, function: str) -> None:
        self.function = function
        self.process: subprocess.Popen[bytes] | None = None
        self.asked = 0
        atexit.register(self.kill)

    def ask(self, item: Any, seconds: float) -> Any:
        try:
            message = json.dumps([item, seconds]).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            return Failure(f"an item for {self.function} cannot be written as JSON: {error}")
        if self.process is not None and self.process.poll() is not None:
            self.kill()  # it died between two items, so it is none's fault
        if self.process is None:
            command = [sys.executable, "-c", _SERVE, json.dumps(sys.path), self.function]
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for us; a worker ends when its pipe closes
            )
            self._read_line(None)  # it says so when it has imported the function; that time is not the item's
            self.asked = 0
        self.asked += 1
        answer = self._exchange(message, seconds)
        if isinstance(answer, Failure) or self.asked == ITEMS_A_PROCESS:
            self.kill()
        if isinstance(answer, Failure):
            return answer
        try:
            result, why = json.loads(answer)
        except ValueError:
            self.kill()
            return Failure(f"the worker of {self.function} answered with something else")
        return result if why is None else Failure(why)

    def _exchange(self, message: bytes, seconds: float) -> bytes | Failure:
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(message)
            self.process.stdin.flush()
        except BrokenPipeError:
            return Failure(f"the worker of {self.function} ended (exit status {self.process.wait()})")
        line = self._read_line(time.monotonic() + seconds)
        if line is None:
            return Failure(f"took longer than {seconds:g} s", timed_out=True)
        if not line.endswith(b"\n"):
            return Failure(f"the worker of {self.function} ended (exit status {self.process.wait()})")
        return line

    def _read_line(self, deadline: float | None) -> bytes | None:
        """A line from the worker; what came before it ended, without a newline, if it did; None after the deadline."""
        assert self.process is not None
        assert self.process.stdout is not None
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        pieces: list[bytes] = []
        while not pieces or not pieces[-1].endswith(b"\n"):
            left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            if not poll.poll(left):
                return None
            piece = os.read(self.process.stdout.fileno(), 2**16)
            if not piece:
                break
            pieces.append(piece)
        return b"".join(pieces)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _serve(function: str) -> None:
    """The worker's side: read an item, answer, until the pipe closes."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the function prints must not look like an answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    work = pkgutil.resolve_name(function)
    answers.write(b"ready\n")
    answers.flush()
    for line in questions:
        item, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)  # ends this process, also when nobody is left to kill it
        answers.write(_answer(work, item).encode() + b"\n")
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.flush()


def _answer(work: Any, item: Any) -> str:
    try:
        return json.dumps([work(item), None])
    except Exception:  # noqa: BLE001 - whatever it was goes to the caller, as text
        return json.dumps([None, traceback.format_exc()])
