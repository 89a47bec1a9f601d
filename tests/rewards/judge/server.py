"""A scripted OpenAI-compatible server that can do what real ones do wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Fault:
    """A reply that is no chat completion."""

    status: int = 500
    body: bytes = b'{"error": {"message": "scripted"}}'
    headers: Mapping[str, str] = field(default_factory=lambda: {"retry-after": "0"})
    hang_s: float = 0.0
    drip: bool = False
    hang_up: bool = False


def said(text: str | None, finish: str = "stop", **message: Any) -> Fault:
    """The chat completion with this text."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return Fault(200, json.dumps(body).encode(), {})


Script = Callable[[dict[str, Any], int], "str | Fault"]
"""(the request's body, how many requests came before it) -> text of the reply, or a fault"""


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *args: Any) -> None:
        """A client that gives up is what some tests are about."""


class Server:
    """Runs a script on a free port of the loopback until closed."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.http = _Quiet(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def prompts(self) -> list[str]:
        """The last message of each request."""
        return [body["messages"][-1]["content"] for body in self.bodies]

    def _handler(server) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - self is the handler's, below
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with server.lock:
                    number = len(server.bodies)
                    server.bodies.append(body)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    server.busy += 1
                    server.most_busy = max(server.most_busy, server.busy)
                try:
                    answer = server.script(body, number)
                    self._send(answer if isinstance(answer, Fault) else said(answer))
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    with server.lock:
                        server.busy -= 1

            def _send(self, fault: Fault) -> None:
                time.sleep(fault.hang_s)
                if fault.hang_up:
                    self.close_connection = True
                    return
                self.send_response(fault.status)
                for name, value in {"content-type": "application/json", **fault.headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(fault.body)))
                self.end_headers()
                for i in range(0, len(fault.body), 1 if fault.drip else len(fault.body)):
                    self.wfile.write(fault.body[i : i + (1 if fault.drip else len(fault.body))])
                    if fault.drip:
                        self.wfile.flush()
                        time.sleep(0.05)

        return Handler
