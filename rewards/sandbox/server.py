"""The fork server: a warm interpreter that starts a confined process for each program, watches it, and clears it away.

Runs outside of our process with ``python -I -S`` and an empty environment, holds no secrets, and never runs a program
itself. Its standard input is a stream socket to us. One JSON line a request, ``start`` (with the channel, and perhaps
standard streams, as file descriptors) or ``end``; one line in answer. At the end of the stream it ends all and leaves.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import importlib
import json
import os
import resource
import select
import signal
import site
import socket
import stat
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

IMPORTED = """
abc array ast asyncio base64 bisect calendar cmath collections collections.abc concurrent.futures
contextlib copy csv ctypes dataclasses datetime decimal difflib enum fractions functools hashlib
heapq inspect io itertools json keyword logging math numbers operator os pathlib pprint queue random
re secrets shutil statistics string struct sys tempfile textwrap threading time timeit traceback
types typing unittest uuid warnings weakref zlib zoneinfo
"""
"""What programs use most is there before they start."""
TICK = 0.05
"""Seconds between two looks at what programs write."""
ENTRIES = 1_000
"""Most files and folders of a program."""
THREADS = 256
"""Most threads of a program: no other limit counts them."""


@dataclass
class Child:
    pid: int
    scratch: str
    broke: tuple[str, str] = ("", "")
    """The limit that it was killed for, and what it did."""


class Server:
    def __init__(self, control: socket.socket, config: dict[str, Any]) -> None:
        self.control = control
        self.config = config
        self.parent = os.getppid()
        self.children: dict[int, Child] = {}
        self.root = tempfile.mkdtemp(prefix="sandbox-", dir=config["folder"])

    def serve(self) -> None:
        try:
            self._send({"root": self.root})
            while os.getppid() == self.parent:  # a fork of it may keep the socket open
                if select.select([self.control], [], [], TICK if self.children else 1)[0]:
                    message, fds, _, _ = socket.recv_fds(self.control, 2**16, 4)
                    if not message:
                        break
                    self._obey(json.loads(message), fds)
                self._watch()
        finally:
            for number in list(self.children):
                self._end(number)
            with contextlib.suppress(FileNotFoundError):
                remove(self.root)

    def _send(self, message: dict[str, Any]) -> None:
        self.control.sendall(json.dumps(message).encode() + b"\n")

    def _obey(self, request: dict[str, Any], fds: list[int]) -> None:
        number = request["number"]
        if request["do"] == "start":
            self._start(number, fds)
            self._send({})
        else:
            status, broke = self._end(number)
            self._send({"status": status, "broke": broke})

    def _start(self, number: int, fds: list[int]) -> None:
        scratch = f"{self.root}/{number}"
        os.mkdir(scratch, 0o700)
        us = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                self._child(us, scratch, fds)
            finally:
                os._exit(70)
        self.children[number] = Child(pid, scratch)
        for fd in fds:
            os.close(fd)

    def _child(self, server: int, scratch: str, fds: list[int]) -> None:
        """In the new process: give up everything, say so, then read the program."""
        _, lockdown, guest = (sys.modules.pop(name) for name in ("wire", "lockdown", "guest"))
        os.setsid()
        lockdown.die_with_parent(server)
        channel = _only(fds)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["main.py"]
        sys.path[:] = self.config["path"]
        os.environ.clear()
        os.environ.update(HOME=scratch, TMPDIR=scratch)
        tempfile.tempdir = None
        os.chdir(scratch)
        try:
            lockdown.limit(self.config)
            if self.config["confine"]:
                lockdown.confine(scratch, self.config["readable"])
        except (OSError, ValueError, lockdown.Unconfined) as error:
            guest.send(channel, {"failed": str(error)})
            return
        guest.send(channel, {"ready": True})
        if len(fds) > 1:
            guest.script(channel)
        else:
            guest.Solution(channel).serve()

    def _watch(self) -> None:
        for child in self.children.values():
            if not any(child.broke):
                child.broke = self._broken(child)
                if any(child.broke):
                    os.kill(child.pid, signal.SIGKILL)

    def _broken(self, child: Child) -> tuple[str, str]:
        try:
            used = space(child)
        except OSError as error:  # a name too long, or a folder without rights: made to hide what is in it
            return "scratch", f"made files that cannot be counted ({os.strerror(error.errno or 0)})"
        if used > self.config["scratch_bytes"]:
            return "scratch", f"wrote more than {self.config['scratch_bytes']} bytes to its scratch folder"
        if threads(child) > THREADS:
            return "processes", f"started more than {THREADS} threads"
        return "", ""

    def _end(self, number: int) -> tuple[int, tuple[str, str]]:
        """Leave no process and no file of a program; its wait status, and the limit that it broke."""
        child = self.children.pop(number)
        with contextlib.suppress(ProcessLookupError):  # before it made its session, or with none of it left
            os.killpg(child.pid, signal.SIGKILL)
        os.kill(child.pid, signal.SIGKILL)
        _, status = os.waitpid(child.pid, 0)
        self._end_orphans()
        with contextlib.suppress(FileNotFoundError):  # a program without confinement can delete it
            remove(child.scratch)
        return status, child.broke

    def _end_orphans(self) -> None:
        """What got away from its session (only without seccomp) has become our child."""
        known = {child.pid for child in self.children.values()}
        while orphans := _children() - known:
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _children() -> set[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return set(map(int, file.read().split()))
    except FileNotFoundError:  # no Linux
        return set()


def _only(fds: list[int]) -> int:
    """Keep the standard streams and the channel, which becomes 3; close all other file descriptors."""
    channel, *streams = [fcntl.fcntl(fd, fcntl.F_DUPFD, 16) for fd in fds]
    for target, fd in enumerate([*(streams or [0, 1, 1]), channel]):
        os.dup2(fd, target)
    os.closerange(4, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 2**16))
    return 3


def space(child: Child) -> int:
    """Bytes of the files of a program, also of those that it deleted and holds open."""
    sizes: dict[tuple[int, int], int] = {}

    def count(status: os.stat_result) -> None:
        sizes[status.st_dev, status.st_ino] = status.st_blocks * 512
        if len(sizes) > ENTRIES:
            raise OSError(errno.EMFILE, "too many files")

    folders = [child.scratch]
    while folders:
        with contextlib.suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    count(entry.stat(follow_symlinks=False))
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
    with contextlib.suppress(FileNotFoundError, PermissionError), os.scandir(f"/proc/{child.pid}/fd") as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                if stat.S_ISREG(status.st_mode):
                    count(status)
    return sum(sizes.values())


def threads(child: Child) -> int:
    try:
        return os.stat(f"/proc/{child.pid}/task").st_nlink - 2
    except OSError:  # it has ended, or this is no Linux
        return 0


def remove(folder: str) -> None:
    """Delete ``folder``, however deep it is and whatever the rights in it. Goes step by step, as paths have a limit."""
    here = _step(None, folder)
    names: list[str] = []  # where we are
    left = [_delete_files(here)]  # folders to go into, for every level down to here
    while left:
        if left[-1]:
            names.append(left[-1].pop())
            os.chmod(names[-1], 0o700, dir_fd=here)
            here = _step(here, names[-1])
            left.append(_delete_files(here))
        else:
            left.pop()
            if names:
                here = _step(here, "..")
                os.rmdir(names.pop(), dir_fd=here)
    os.close(here)
    os.rmdir(folder)


def _step(here: int | None, name: str) -> int:
    there = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
    if here is not None:
        os.close(here)
    return there


def _delete_files(here: int) -> list[str]:
    """Delete what is not a folder; the names of the folders."""
    folders = []
    with os.scandir(here) as entries:
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
            else:
                os.unlink(entry.name, dir_fd=here)
    return folders


def main() -> None:
    control = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    config = json.loads(sys.argv[1])
    here = os.path.dirname(os.path.abspath(__file__))
    config["path"] = list(sys.path)
    config["readable"] = [*sys.path, *config["readable"]]
    sys.path.append(here)
    import guest  # type: ignore[import-not-found]  # noqa: F401
    import lockdown  # type: ignore[import-not-found]

    sys.path.pop()
    for name in IMPORTED.split():
        importlib.import_module(name)
    site.setquit()  # exit() and help() are there in every interpreter, but for -S
    site.sethelper()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lockdown.adopt_orphans()
    gc.freeze()  # what is here now need not be looked at, nor copied, by every child
    Server(control, config).serve()


if __name__ == "__main__":
    main()
