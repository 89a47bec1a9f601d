"""Processes for the cells of a suite: started in an instant, written to a log, and never left behind.

What agents import takes seconds, so it is imported once, in a server from which the processes are forked. Each is the leader
of a session of its own. It ends when the process that asked for it does, however that ends, and takes with it all that it
has started.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

PRELOADED = "benchmarks.harness.arena"
"""Imports what agents need."""


def preload() -> None:
    """Have the server import what agents need; to be called before the first process is started."""
    get_context("forkserver").set_forkserver_preload([PRELOADED])


def start_module(module: str, arguments: Sequence[str], log: Path) -> BaseProcess:
    """Start what ``python -m MODULE ARGUMENTS`` does, on one thread for each tensor operation."""
    return _start(_run_module, log, module, list(arguments))


def start_program(command: Sequence[str], log: Path) -> BaseProcess:
    """Start a command line, in the environment of this process."""
    return _start(_run_program, log, list(command), dict(os.environ))


def stop(process: BaseProcess) -> None:
    """End a process and all that it has started, and wait until it has ended."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has ended, or has no session yet
        process.kill()
    process.join()


def _start(target: Callable[..., None], log: Path, *arguments: Any) -> BaseProcess:
    process = get_context("forkserver").Process(target=_lead, args=(target, log, *arguments))
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the server, which the first process starts
    try:
        process.start()
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads
    return process


def _lead(target: Callable[..., None], log: Path, *arguments: Any) -> None:
    """Lead a session of its own, which ends with the parent, and write to the log."""
    os.setsid()
    Thread(target=_end_with_parent, daemon=True).start()
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(written, stream)
    target(*arguments)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


def _run_module(module: str, arguments: list[str]) -> None:
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _run_program(command: list[str], environment: dict[str, str]) -> None:
    sys.exit(subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode)
