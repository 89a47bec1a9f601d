"""Where the fork server runs, and a probe of what that place really stops."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BACKENDS = ("process", "bubblewrap", "bare")
PROMISES = {
    "network": "no network",
    "files": "no file but those of its scratch folder",
    "processes": "no other processes",
    "memory": "limited memory",
}

_HERE = os.path.dirname(os.path.abspath(__file__))
_LIBRARIES = [
    f"{sys.base_prefix}/lib",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/share/zoneinfo",
    "/etc/localtime",
    "/etc/ld.so.cache",
]


class Unavailable(RuntimeError):  # noqa: N818 - says what happened
    """The isolation that was asked for does not work on this machine."""


@dataclass(frozen=True, slots=True)
class Isolation:
    """What keeps programs in: the backend, and which promises a probe found kept on this machine.

    Example:
        >>> print(Isolation("process", ("network", "files", "processes", "memory")))
        process: no network, no file but those of its scratch folder, no other processes, limited memory
        >>> print(Isolation("bare", ()))
        bare: not a sandbox, a program may do what you may
    """

    backend: str
    enforced: tuple[str, ...]

    def __str__(self) -> str:
        kept = ", ".join(text for name, text in PROMISES.items() if name in self.enforced)
        if {"network", "files", "processes"}.isdisjoint(self.enforced):
            kept = f"not a sandbox, a program may do what you may{f'; {kept}' if kept else ''}"
        return f"{self.backend}: {kept}"


def command(backend: str, limits: Mapping[str, Any]) -> list[str]:
    """What starts the fork server.

    Raises:
        Unavailable: the backend's program is missing, or does nothing.
    """
    python = os.path.realpath(sys.executable)  # the interpreter itself: the server has no use for a virtual environment
    folder = tempfile.gettempdir() if backend != "bubblewrap" else "/scratch"
    config = {**limits, "folder": folder, "readable": _LIBRARIES, "confine": backend != "bare"}
    server = [python, "-I", "-S", "-X", "utf8", f"{_HERE}/server.py", json.dumps(config)]
    if backend != "bubblewrap":
        return server
    namespaces = _bubblewrap(python, limits["scratch_bytes"])
    _check(namespaces)
    return [*namespaces, *server]


def _bubblewrap(python: str, scratch_bytes: int) -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        raise Unavailable("backend='bubblewrap' needs the program bwrap (package bubblewrap); it is not on the path")
    options = ["--unshare-all", "--new-session", "--cap-drop", "ALL", "--dev", "/dev", "--proc", "/proc"]
    for path in [*_LIBRARIES, python, _HERE]:
        options += ["--ro-bind-try", path, path]
    return [program, *options, "--size", str(scratch_bytes), "--tmpfs", "/scratch", "--remount-ro", "/"]


def _check(namespaces: list[str]) -> None:
    """Many systems forbid namespaces to ordinary users: see whether they work."""
    try:
        done = subprocess.run(
            [*namespaces, os.path.realpath(sys.executable), "-I", "-S", "-c", ""],
            env={}, capture_output=True, text=True, timeout=5, cwd="/",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Unavailable("backend='bubblewrap' hangs on this machine; use backend='process'") from None
    if done.returncode != 0:
        why = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise Unavailable(f"backend='bubblewrap' does not work on this machine: {why[0]}")
