"""Calls to a judge a second, against a scripted server on this machine: ``python -m benchmarks.judge_calls``.

The server runs in a process of its own and answers each request after a fixed latency, so the least possible time is
``calls / concurrency * latency``. Every answer names the question that it belongs to: none may be lost or out of order. Each
round is a run on an empty cache and one on the full one, each with a client of its own, as a second program would have.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import statistics
import tempfile
from multiprocessing.connection import Connection

import tyro

from benchmarks.measure import machine, seconds
from rewards import Sample
from rewards.judge import Chat, Judge


def serve(latency: float, ready: Connection) -> None:
    """A server that scores each answer by the last digit in it, for ever; sends its port when it listens."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:  # the client hung up
                writer.close()
                return
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            prompt = json.loads(await reader.readexactly(int(length.split(b":")[1])))["messages"][0]["content"]
            number = int(prompt.split("answer number ")[1].split()[0])
            await asyncio.sleep(latency)
            reply = json.dumps({"reason": f"this is {number}", "score": 1 + number % 10})
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}
            usage = {"prompt_tokens": 300, "completion_tokens": 20, "total_tokens": 320}
            body = json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body))
            writer.write(body)

    async def run() -> None:
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def measure(url: str, calls: int, concurrency: int) -> tuple[float, float]:
    """Seconds for all calls on an empty cache, and again on the full one.

    Raises:
        RuntimeError: a score that is missing or not its sample's, or a second run that asked the server.
    """
    samples = [Sample(prompt="Which number?", completion=f"answer number {i} of many") for i in range(calls)]
    times = []
    with tempfile.TemporaryDirectory() as directory:
        for cached in (0, calls):
            chat = Chat("scripted", url, concurrency=concurrency, cache_dir=directory)
            judge = Judge(chat)
            scores: list = []
            times.append(seconds(lambda judge=judge, scores=scores: scores.extend(judge(samples))))  # type: ignore[misc]
            wrong = sum(score.parts.get("judge") != 1 + i % 10 for i, score in enumerate(scores))
            # A call may be tried again where the machine is busy; none may be asked again that is in the cache.
            if wrong or chat.calls < calls - cached or (cached and chat.calls) or chat.cached != cached:
                raise RuntimeError(f"{wrong} wrong scores, {chat.calls} calls and {chat.cached} cached of {calls}")
    return times[0], times[1]


def main(calls: int = 1000, latency: float = 0.05, concurrency: int = 32, rounds: int = 5) -> None:
    """Measure and print.

    Args:
        calls: samples to judge, one call each.
        latency: seconds that the server takes for a reply.
        concurrency: requests under way at once.
        rounds: how often to measure.
    """
    context = multiprocessing.get_context("spawn")
    ready, theirs = context.Pipe()
    server = context.Process(target=serve, args=(latency, theirs), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{ready.recv()}/v1"
    times = [measure(url, calls, concurrency) for _ in range(rounds)]
    server.terminate()
    print(machine())
    print(f"{calls} calls, {latency * 1000:g} ms latency, {concurrency} at a time, {rounds} rounds; median (all)")
    for name, column in zip(("empty cache", "full cache"), zip(*times, strict=True), strict=True):
        print(f"{name}: {statistics.median(column):.2f} s ({', '.join(f'{time:.2f}' for time in column)})")
    print(f"least possible: {calls / concurrency * latency:.2f} s")


if __name__ == "__main__":
    tyro.cli(main)
