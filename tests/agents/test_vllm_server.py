"""The engine that talks to a vLLM server: what it refuses without one, and the rest with a real one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest
import torch

from agents.core.engines.base import EngineError
from agents.core.engines.native import NativeEngine
from agents.core.engines.vllm_server import VLLMServerEngine
from tests.agents.conftest import Undecodable
from tests.agents.test_native_engine import EVEN, RAGGED, sampling, texts
from tests.agents.test_vllm_engine import LONG, assert_scored_alike, changed, make_policy, needs_vllm
from textenv.task import Finish

READY_WITHIN_S, GONE_WITHIN_S = 240.0, 20.0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """A process group with a vLLM server in it, that may be started anew at the same address."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        options = {
            "model": self.folder,
            "host": "127.0.0.1",
            "port": self.port,
            "dtype": "float32",
            "max-model-len": 256,
            "max-num-seqs": 64,
            "kv-cache-memory-bytes": 128 << 20,
            "generation-config": "vllm",
            "logprobs-mode": "processed_logprobs",
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--enforce-eager", "--no-enable-chunked-prefill"]
        command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
        environment = {
            **os.environ,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait(self) -> None:
        """Until it is ready."""
        deadline = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                httpx2.get(f"{self.url}/health", timeout=5, trust_env=False)
                return
            except httpx2.TransportError:
                time.sleep(0.5)
        pytest.fail(f"vLLM did not start; it says:\n{self.log.read_text(errors='replace')[-5000:]}")

    def kill(self) -> None:
        """End its processes at once; none is left."""
        if self.process is None:
            return
        group = self.process.pid
        deadline = time.monotonic() + GONE_WITHIN_S
        while _members(group):
            os.killpg(group, signal.SIGKILL)
            assert time.monotonic() < deadline
            time.sleep(0.1)
        self.process.wait()
        self.process = None


def _members(group: int) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _belongs(process, group)]


def _belongs(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    served_policy(seed=9).save(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory) -> Iterator[Server]:
    """One that is ready, whatever a test before did to it."""
    server = Server(folder, tmp_path_factory.mktemp("log") / "vllm.log")
    try:
        server.start()
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture
def engine(server) -> Iterator[VLLMServerEngine]:
    engine = VLLMServerEngine(served_policy(), url=server.url)
    yield engine
    engine.close()


def served_policy(**changes):
    return make_policy(tokenizer=Undecodable(), vocab_size=20, **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "url looks like 'http://127.0.0.1:8000', got '127.0.0.1:8000'"),
        ({"folder": "/no/such/folder"}, "folder must be one that this process and the server can see, got '/no/such"),
        ({"timeout": 0}, "timeout must be more than 0 seconds, got 0"),
        ({"dtype": "half"}, "dtype must be one of float32, bfloat16, float16, got 'half'"),
    ],
)
def test_options_that_make_no_sense_are_refused(llama, options, message):
    with pytest.raises(ValueError, match=message):
        VLLMServerEngine(llama, **{"url": "http://127.0.0.1:8000"} | options)


def test_a_server_that_is_not_there_is_an_engine_error(llama):
    engine = VLLMServerEngine(llama, url=f"http://127.0.0.1:{free_port()}/v1/")
    with pytest.raises(EngineError, match="ConnectError"):
        engine.generate(EVEN, sampling())
    with pytest.raises(EngineError, match="can no longer be used"):
        engine.sync(llama)


class Handler(BaseHTTPRequestHandler):
    """Answers as vLLM does, as far as an engine comes before it syncs; every token has the same log-probability."""

    version, logprob = "0.32.0", 0.0

    def do_GET(self) -> None:
        self.answer({"version": self.version, "data": [{"id": "policy", "max_model_len": 64}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/completions":
            self.answer({"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": [self.logprob]}}]})
        else:
            self.send_error(404)

    def answer(self, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None: ...


@pytest.mark.parametrize(
    ("fields", "context", "message"),
    [
        ({"version": "0.20.0"}, 64, "the server runs vLLM 0.20.0, and the engine is written for <0.34,>=0.24"),
        ({}, 128, "the server takes 64 tokens of context and the policy's is 128; start the server with a larger"),
        ({"logprob": -2.0}, 64, "of another distribution than it draws from; start it so: .* processed_logprobs"),
        ({}, 64, "does not have /collective_rpc; start it so: VLLM_SERVER_DEV_MODE=1 python -m vllm"),
    ],
    ids=["version", "context", "logprobs", "development"],
)
def test_a_server_that_was_started_otherwise_is_refused_with_what_to_do(llama, fields, context, message):
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Started", (Handler,), fields)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        engine = VLLMServerEngine(llama, url=f"http://127.0.0.1:{server.server_port}", context=context)
        with pytest.raises(EngineError, match=message):
            engine.sync(llama)
        engine.close()
        server.shutdown()


class TestServer:
    pytestmark = needs_vllm

    @pytest.mark.parametrize("temperature", [0, 0.6, 1.4])
    def test_behaviour_logprobs_equal_those_of_the_learner(self, engine, temperature):
        completions = engine.generate(RAGGED, sampling(temperature=temperature, seed=4), n=4)
        assert {int(i) for tokens in completions.tokens for i in tokens} <= {*range(14)} - {3, 5}
        assert_scored_alike(engine.policy, RAGGED, completions, 4, temperature)

    def test_greedy_tokens_and_their_ends_equal_those_of_the_native_engine(self, engine):
        among = sampling(temperature=0, max_new_tokens=30, stop_ids=(12,))
        got = engine.generate(RAGGED, among, budgets=[30, 3, 30, 30])
        expected = NativeEngine(engine.policy).generate(RAGGED, among, budgets=[30, 3, 30, 30])
        assert texts(got) == texts(expected)
        assert got.finish == expected.finish

    def test_completions_of_a_group_are_different_and_do_not_depend_on_the_batch(self, engine):
        told = {}
        completions = engine.generate(
            EVEN,
            sampling(seed=5, temperature=1.4),
            n=48,
            on_end=lambda row, tokens: told.update({row: tokens.tolist()}),
        )
        assert [told[row] for row in range(96)] == texts(completions)
        assert len(set(map(tuple, texts(completions)[:48]))) > 40
        assert texts(engine.generate(EVEN[:1], sampling(seed=5, temperature=1.4), n=8)) == texts(completions)[:8]
        assert {Finish.EOS, Finish.LENGTH} <= set(completions.finish)

    def test_each_parameter_arrives_and_no_old_prefix_is_read(self, engine):
        policy = engine.policy
        for parameter in policy.parameters():
            with torch.no_grad():
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            engine.sync(policy)
            assert_scored_alike(policy, LONG, engine.generate(LONG, sampling(), n=2), 2)

    def test_the_folder_holds_the_weights_until_the_end(self, server, tmp_path):
        engine = VLLMServerEngine(served_policy(), url=server.url, folder=tmp_path)
        engine.generate(EVEN, sampling())
        (inside,) = tmp_path.iterdir()
        assert [path.name for path in inside.iterdir()] == ["model.safetensors"]
        engine.close()
        assert not list(tmp_path.iterdir())

    def test_a_listener_that_fails_leaves_the_engine_alive(self, engine):
        with pytest.raises(ZeroDivisionError):
            engine.generate(EVEN, sampling(), n=64, on_end=lambda row, tokens: 1 / 0)
        engine.sync(changed(engine.policy))
        assert_scored_alike(engine.policy, EVEN, engine.generate(EVEN, sampling()))

    def test_a_weight_that_does_not_arrive_is_noticed(self, engine, monkeypatch):
        engine.generate(EVEN, sampling())
        send = engine._send
        monkeypatch.setattr(engine, "_send", lambda *args: None if args[1] == "/collective_rpc" else send(*args))
        with pytest.raises(EngineError, match="weights did not arrive"):
            engine.sync(changed(engine.policy))

    def test_a_server_that_dies_is_an_engine_error_and_one_started_anew_is_reached(self, engine, server):
        engine.generate(EVEN, sampling())
        server.kill()
        with pytest.raises(EngineError, match=r"generation ended in (ConnectError|ReadError|RemoteProtocolError)"):
            engine.generate(EVEN, sampling())
        server.start()
        server.wait()
        engine.restart(changed(engine.policy))
        completions = engine.generate(EVEN, sampling(), n=8)
        assert_scored_alike(engine.policy, EVEN, completions, 8)
        assert engine.version == engine.policy.version
        assert np.unique([len(tokens) for tokens in completions.tokens]).size > 1
