"""Run generated code in processes of its own.

:class:`Sandbox` keeps a warm fork server (``server.py``), which starts a process for each program. The process confines
itself (``lockdown.py``) before it reads the program. What it says afterwards is hostile until decoded (``wire.py``).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

from rewards.sandbox import backends, wire
from rewards.sandbox.backends import Isolation, Unavailable
from rewards.sandbox.server import remove

START_SECONDS = 30.0
"""The server must have started by then."""
STDERR_BYTES = 16 * 2**10
"""How much of the end of standard error is kept."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use.

    Raises:
        ValueError: a limit that is not positive.
    """

    seconds: float = 10.0
    """Wall-clock time in all: loading and every call. Our own time between calls does not count."""
    memory_bytes: int = 2**30
    """Address space. Beyond it there is a MemoryError inside."""
    scratch_bytes: int = 256 * 2**20
    """All files of the scratch folder. It is looked at every 50 ms, so a program can be ahead of it for that long."""
    file_bytes: int = 64 * 2**20
    """One file."""
    open_files: int = 256
    output_bytes: int = 2**20
    """How much of the standard output of a script is kept."""
    output_kill_bytes: int = 32 * 2**20
    """A script that writes more, to standard output and standard error, is ended."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"Limits.{name} must be positive, got {value}")


class Stopped(Exception):  # noqa: N818 - says what happened
    """A program was ended, or ended itself, before it answered.

    Attributes:
        outcome: ``"time-out"``, ``"scratch"``, ``"processes"`` (threads), ``"output"``, ``"exit"``, ``"killed"`` (also by its
            own doing), or ``"protocol"``: it sent what no honest program sends.
    """

    def __init__(self, why: str, outcome: str = "killed") -> None:
        super().__init__(why)
        self.outcome = outcome


class RemoteError(Exception):
    """A program raised.

    Attributes:
        type_name: the nearest builtin exception type.
        text: what ``str`` of the exception gave.
    """

    def __init__(self, type_name: str, text: str) -> None:
        super().__init__(f"{type_name}: {text}" if text else type_name)
        self.type_name = type_name
        self.text = text


@dataclass(frozen=True, slots=True)
class Handle:
    """Stands for an object that stays inside: of a class of the program, a generator, a function."""

    number: int
    type_name: str


@dataclass(frozen=True, slots=True)
class Ran:
    """How a script ended.

    Args:
        outcome: ``"ok"`` (exit status 0), ``"error"`` (another one), ``"time-out"``, ``"memory"``, ``"output"``,
            ``"scratch"``, ``"processes"``, ``"protocol"`` or ``"killed"``.
        stdout: the first ``output_bytes``, as UTF-8.
        stderr: the last 16 KiB.
        why: the outcome in words.
    """

    outcome: str
    stdout: str
    stderr: str
    why: str


class Sandbox:
    """Confined processes for programs, one each. The first use starts the server; after that a process takes milliseconds.

    A context manager; otherwise call :meth:`close`. May be used from any thread, but from one at a time.

    Args:
        backend: ``"process"`` confines each process by the means of the system (Landlock and seccomp on Linux; the macOS
            profile is untested); ``"bubblewrap"`` does so inside namespaces too, with a scratch folder in memory;
            ``"bare"`` is not a sandbox: limits and time-outs only. ``"auto"`` is the first of process and bubblewrap that
            allows no network, no foreign files and no processes on this machine.
        require: promises that must hold, of ``"network"``, ``"files"``, ``"processes"``, ``"memory"``.

    Raises:
        Unavailable: what is required does not hold here. With ``require`` the constructor raises it, else the first use.

    Example:
        >>> with Sandbox() as sandbox, sandbox.load("def double(n): return 2 * n") as module:
        ...     module.call("double", 21)
        42
        >>> with Sandbox() as sandbox:
        ...     sandbox.run("print(int(input()) + 1)", stdin="41").stdout
        '42\\n'
    """

    def __init__(self, limits: Limits | None = None, backend: str = "auto", require: Sequence[str] = ()) -> None:
        if backend not in ("auto", *backends.BACKENDS):
            raise ValueError(f"backend must be auto, {', '.join(backends.BACKENDS)}, got {backend!r}")
        if unknown := set(require) - set(backends.PROMISES):
            raise ValueError(f"require takes {', '.join(backends.PROMISES)}, got {', '.join(sorted(unknown))}")
        self.limits = limits or Limits()
        self.backend = backend
        self.require = tuple(require)
        self._server: _Server | None = None
        self._isolation: Isolation | None = None
        if require:
            self.describe()

    def describe(self) -> Isolation:
        """The backend, and what a probe on this machine found it to stop."""
        self._running()
        assert self._isolation is not None
        return self._isolation

    def load(self, source: str) -> Module:
        """A fresh process that has run ``source`` as a module named ``solution``. Its output goes nowhere.

        Raises:
            RemoteError: the source raised, or is no Python.
            Stopped: it ended, or did not end in time.
        """
        return Module(self._process(), source)

    def run(self, source: str, stdin: str = "", output_bytes: int = 0) -> Ran:
        """Run ``source`` as a script, from start to end. At least ``output_bytes`` of its output are kept."""
        frame = wire.pack({"source": source})
        kept = max(output_bytes, self.limits.output_bytes)
        limits = replace(self.limits, output_bytes=kept, output_kill_bytes=max(2 * kept, self.limits.output_kill_bytes))
        with tempfile.TemporaryFile() as given, _Output(limits) as output:
            given.write(stdin.encode("utf-8", "surrogatepass"))
            given.seek(0)
            try:
                process = self._process([given.fileno(), *output.theirs])
                with process.counting():
                    process.write(frame)
                    output.follow(process)
            except Stopped as stopped:  # as every process is in the end
                return output.ran(stopped)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """End all processes and remove their files."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _process(self, streams: Sequence[int] = ()) -> _Process:
        try:
            return _Process(self._running(), self.limits, streams)
        except _ServerDied:  # since it was last used: the program was not yet read, so try again
            return _Process(self._running(), self.limits, streams)

    def _running(self) -> _Server:
        if self._server is not None and not self._server.alive():
            self.close()
        if self._server is None:
            self._server = self._started()
        return self._server

    def _started(self) -> _Server:
        if self._isolation is not None:  # the probe is done; the server died since
            return _Server(self._isolation.backend, self.limits)
        needed = {*self.require, *(("network", "files", "processes") if self.backend == "auto" else ())}
        failures = []
        for backend in ("process", "bubblewrap") if self.backend == "auto" else (self.backend,):
            try:
                server = _Server(backend, self.limits)
            except Unavailable as error:
                failures.append(str(error))
                continue
            try:
                self._isolation = Isolation(backend, _probe(server, self.limits))
            except (Stopped, RemoteError) as error:
                server.close()
                failures.append(f"backend={backend!r} cannot run a program within {self.limits}: {error}")
                continue
            missing = needed - set(self._isolation.enforced)
            if not missing:
                return server
            server.close()
            self._isolation = None
            failures.append(f"backend={backend!r} does not keep {', '.join(sorted(missing))} on this machine")
        if self.backend == "auto":
            failures.append("backend='bare' would run programs without isolation")
        raise Unavailable("; ".join(failures))


class _Server:
    """Our side of the fork server."""

    def __init__(self, backend: str, limits: Limits) -> None:
        command = backends.command(backend, asdict(limits))
        self.pid = os.getpid()
        self.control, theirs = socket.socketpair()
        self.control.settimeout(START_SECONDS)
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            command,
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            env={"MALLOC_ARENA_MAX": "1"},  # else every thread takes 64 MiB of address space
            cwd="/",
            start_new_session=True,
        )
        theirs.close()
        self.numbers = iter(range(2**63))
        self.root: str | None = None
        self.answers = self.control.makefile("rb")
        try:
            root = self._answer()["root"]
        except _ServerDied:
            raise Unavailable(f"the server of backend={backend!r} did not start") from None
        self.root = root if backend != "bubblewrap" else None  # there it is not of our file system

    def alive(self) -> bool:
        """Whether it can be used: it runs, and is ours, not inherited by a fork."""
        return self.pid == os.getpid() and self.process.poll() is None

    def start(self, fds: Sequence[int]) -> int:
        number = next(self.numbers)
        self._ask({"do": "start", "number": number}, fds)
        return number

    def end(self, number: int) -> tuple[int, tuple[str, str]]:
        """Leave nothing of a program; its wait status, and the limit for which the server killed it, if it did."""
        answer = self._ask({"do": "end", "number": number})
        return answer["status"], tuple(answer["broke"])

    def _ask(self, request: Mapping[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        with self._exchange():
            socket.send_fds(self.control, [json.dumps(request).encode()], fds)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        with self._exchange():
            line = self.answers.readline()
            if not line:
                raise EOFError
        answer: dict[str, Any] = json.loads(line)
        return answer

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            self.close()
            raise _ServerDied from None
        except BaseException:  # Ctrl-C: the next answer would belong to this request
            self.close()
            raise

    def close(self) -> None:
        """The end of the stream tells the server to clear everything away. If it cannot, we do."""
        self.answers.close()
        self.control.close()
        if self.pid != os.getpid():
            return
        try:
            self.process.wait(timeout=START_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.root is not None:
            with contextlib.suppress(FileNotFoundError):
                remove(self.root)


class _ServerDied(Unavailable):
    """The fork server is gone, and with it all its processes."""

    def __init__(self) -> None:
        super().__init__("the sandbox's server was killed")


class _Process:
    """One program's process, and the time it has left."""

    def __init__(self, server: _Server, limits: Limits, streams: Sequence[int] = ()) -> None:
        self.server = server
        self.limits = limits
        self.left = limits.seconds
        self.stopped: Stopped | None = None
        self.channel, theirs = socket.socketpair()
        with theirs:
            try:
                self.number = server.start([theirs.fileno(), *streams])
            except BaseException:
                self.channel.close()
                raise
        with self.counting():
            answer = wire.unpack(self.read)
        if "ready" not in answer:  # the program was not yet read: this is our own word
            self.end()
            raise Unavailable(f"a process could not be confined: {answer['failed']}")

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """The program's time runs; what goes wrong with it becomes :class:`Stopped`."""
        if self.stopped is not None:
            raise Stopped(str(self.stopped), self.stopped.outcome)
        self.deadline = time.monotonic() + self.left
        try:
            yield
        except wire.Malformed as error:
            self.stop(f"sent {error}", "protocol")
        except TimeoutError:
            self.stop(f"took longer than {self.limits.seconds:g} s", "time-out")
        except (EOFError, OSError):
            self.stop()
        except Stopped:  # we have ended it already
            raise
        except BaseException:  # Ctrl-C
            self.stopped = Stopped("interrupted")
            self.end()
            raise
        self.left = self.deadline - time.monotonic()

    def read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            self.wait()
            piece = self.channel.recv(min(size - len(data), 2**20))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def write(self, data: bytes) -> None:
        self.wait()
        self.channel.sendall(data)

    def wait(self) -> None:
        """Sets how long the next step on the channel may take."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.channel.settimeout(left)

    def stop(self, why: str = "", outcome: str = "") -> NoReturn:
        """End the process, and say why it had to end."""
        found = self.end()
        self.stopped = Stopped(why, outcome) if why else Stopped(*found)
        raise self.stopped from None

    def end(self) -> tuple[str, str]:
        """Leave nothing of it: why it ended, and the outcome."""
        self.channel.close()
        try:
            status, (limit, did) = self.server.end(self.number)
        except _ServerDied as error:
            return str(error), "killed"
        if limit:
            return did, limit
        if os.WIFEXITED(status):
            return f"exited with status {os.WEXITSTATUS(status)}", "exit"
        name = signal.Signals(os.WTERMSIG(status)).name
        return f"ended by {name}", "time-out" if name == "SIGXCPU" else "killed"


class Module:
    """A program that was loaded. A context manager: at its end nothing of the program is left.

    Attributes:
        names: its top-level names: ``"function"``, ``"class"`` or ``"value"``.
        object_of: what comes in place of a handle, wherever one would come; by default the handle itself.
        handle_of: the handle for an argument of no builtin type. Raises ``wire.Malformed`` if there is none.
    """

    def __init__(self, process: _Process, source: str) -> None:
        self._process = process
        self._open = True
        self._asked = 0
        self.names: Mapping[str, str] = {}
        self.object_of: Callable[[Handle], Any] = lambda handle: handle
        self.handle_of: Callable[[Any], Handle] = _handle
        try:
            answer = self._ask({"do": "load", "source": source})
            with self._process.counting():
                self.names = _names(answer)
        except BaseException:
            self.close()
            raise

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """What a function of the program returns: a value of builtin types, or a :class:`Handle`.

        Lists, dicts and sets among the arguments that the function changes in place are changed for the caller.

        Args:
            target: a top-level name, else the name of a builtin (``call("list", handle)``), or a handle.

        Raises:
            RemoteError: the function raised.
            Stopped: the process ended, broke a limit, or sent what it must not.
            wire.Malformed: an argument that cannot cross.
        """
        name = target if isinstance(target, str) else self.handle_of(target).number
        sent = wire.encode((args, kwargs), self._outside)
        answer = self._ask({"do": "call", "target": name, "args": sent})
        with self._process.counting():
            value = wire.decode(answer.get("value"), self._inside)
            if "args" in answer:
                _copy_back((args, kwargs), wire.decode(answer["args"], self._inside))
        return value

    def get(self, target: Any, name: str) -> Any:
        """An attribute of an object inside; a method comes as a handle, to :meth:`call`."""
        answer = self._ask({"do": "get", "target": self.handle_of(target).number, "name": name})
        with self._process.counting():
            return wire.decode(answer.get("value"), self._inside)

    def close(self) -> None:
        if self._open and self._process.stopped is None:
            self._process.end()
        self._open = False

    def __enter__(self) -> Module:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        if not self._open:
            raise Stopped("the module is closed")
        process = self._process
        self._asked += 1
        frame = wire.pack({**question, "number": self._asked})
        with process.counting():
            process.write(frame)
            answer = wire.unpack(process.read)
            if answer.get("number") != self._asked:
                raise wire.Malformed("a message that nobody asked for")
            if "raised" not in answer:
                return answer
            name, text = _raised(answer)
        raise RemoteError(name, text)

    def _inside(self, number: int, type_name: str) -> Any:
        return self.object_of(Handle(number, type_name))

    def _outside(self, value: Any) -> Any:
        handle = self.handle_of(value)
        return {"handle": [handle.number, handle.type_name]}


def _handle(value: Any) -> Handle:
    if isinstance(value, Handle):
        return value
    raise wire.Malformed(f"an argument of type {type(value).__name__} cannot cross; builtin values and handles can")


def _raised(answer: Mapping[str, Any]) -> tuple[str, str]:
    match answer["raised"]:
        case [str(name), str(text)] if name in wire.EXCEPTIONS:
            return name, text
    raise wire.Malformed("an exception of no builtin type")


def _names(answer: Mapping[str, Any]) -> dict[str, str]:
    names = answer.get("names")
    if type(names) is not dict or not set(map(str, names.values())) <= {"function", "class", "value"}:
        raise wire.Malformed("names that are not names")
    return names


def _copy_back(ours: tuple[tuple[Any, ...], dict[str, Any]], theirs: Any) -> None:
    match theirs:
        case (tuple(args), dict(kwargs)) if len(args) == len(ours[0]) and kwargs.keys() == ours[1].keys():
            for old, new in zip(ours[0], args, strict=True):
                _changed(old, new)
            for name, old in ours[1].items():
                _changed(old, kwargs[name])
        case _:
            raise wire.Malformed("arguments that are not those of the call")


def _changed(old: Any, new: Any) -> Any:
    """``new``, in the containers of ``old`` as far as they are of the same type."""
    if type(old) is not type(new):
        return new
    if type(old) is list:
        old[:] = [*map(_changed, old, new), *new[len(old) :]]
        return old
    if type(old) is dict:
        items = {key: _changed(old[key], value) if key in old else value for key, value in new.items()}
        old.clear()
        old.update(items)
        return old
    if type(old) is set:
        old.clear()
        old.update(new)
        return old
    if type(old) is tuple and len(old) == len(new):
        return tuple(map(_changed, old, new))
    return new


class _Output:
    """The standard output and error of a script, as far as they are kept. A context manager."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        (self.out, out), (self.err, err) = os.pipe(), os.pipe()
        self.theirs = [out, err]
        self.kept = {self.out: bytearray(), self.err: bytearray()}
        self.bytes = 0

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *error: object) -> None:
        for fd in (*self.kept, *self.theirs):
            os.close(fd)

    def _begin(self) -> None:
        """The process has the writing ends now."""
        while self.theirs:
            os.close(self.theirs.pop())
        for fd in self.kept:
            os.set_blocking(fd, False)

    def follow(self, process: _Process) -> NoReturn:
        """Read until the process ends.

        Raises:
            EOFError: it did.
        """
        self._begin()
        with selectors.DefaultSelector() as selector:
            for fd in (*self.kept, process.channel.fileno()):
                selector.register(fd, selectors.EVENT_READ)
            while True:
                process.wait()
                for key, _ in selector.select(process.channel.gettimeout()):
                    if key.fd == process.channel.fileno():
                        process.read(1)
                        raise wire.Malformed("a message that nobody asked for")
                    if not self.read(key.fd):
                        selector.unregister(key.fd)
                if self.bytes > self.limits.output_kill_bytes:
                    process.stop(f"wrote more than {self.limits.output_kill_bytes} bytes", "output")

    def read(self, fd: int) -> bool:
        try:
            piece = os.read(fd, 2**16)
        except BlockingIOError:
            return False
        self.bytes += len(piece)
        kept = self.kept[fd]
        kept += piece
        if fd == self.out:
            del kept[self.limits.output_bytes :]
        else:
            del kept[:-STDERR_BYTES]
        return bool(piece)

    def ran(self, stopped: Stopped) -> Ran:
        """How the process ended, with what was still in the pipes."""
        self._begin()
        for fd in self.kept:
            while self.read(fd):
                pass
        stdout, stderr = (self.kept[fd].decode(errors="replace") for fd in (self.out, self.err))
        why, outcome = str(stopped), stopped.outcome
        if outcome == "exit":
            outcome = "ok" if why == "exited with status 0" else "error"
            if outcome == "error" and stderr.rstrip().rpartition("\n")[2].startswith("MemoryError"):
                outcome = "memory"
        return Ran(outcome, stdout, stderr, why)


_PROBE = """
import os, socket

def attempt(action, *arguments):
    try:
        return action(*arguments) is not False
    except OSError:
        return False

def connect(family, kind, address):
    with socket.socket(family, kind) as one:
        one.settimeout(1)
        one.connect(address)
        one.send(b"x")

def opened(path, flags):
    os.close(os.open(path, flags))

def fork():
    if os.fork() == 0:
        os._exit(0)
    os.wait()

def broken_promises(port, path, memory_bytes):
    broken = set()
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        if attempt(connect, socket.AF_INET, kind, ("127.0.0.1", port)):
            broken.add("network")
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
        if attempt(opened, path, flags):
            broken.add("files")
    if attempt(os.chmod, path, 0o600) or attempt(opened, path + "-new", os.O_WRONLY | os.O_CREAT):
        broken.add("files")
    if attempt(opened, "/proc/self/environ", os.O_RDONLY):
        broken.add("files")
    if attempt(fork) or attempt(os.kill, os.getppid(), 0):
        broken.add("processes")
    try:
        bytearray(memory_bytes)
        broken.add("memory")
    except MemoryError:
        pass
    return broken
"""


def _probe(server: _Server, limits: Limits) -> tuple[str, ...]:
    """The promises that hold: each is attacked from inside, against a listener and a file of ours."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        tempfile.TemporaryDirectory() as folder,
        Module(_Process(server, limits), _PROBE) as probe,
    ):
        path = os.path.join(folder, "file")
        with open(path, "w") as file:
            file.write("ours")
        port = listener.getsockname()[1]
        broken = probe.call("broken_promises", port, path, limits.memory_bytes)
        return tuple(name for name in backends.PROMISES if name not in broken)
