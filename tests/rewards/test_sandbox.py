"""Every promise of the sandbox, attacked for real."""

import contextlib
import dataclasses
import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

import pytest

from rewards.sandbox import Handle, Limits, RemoteError, Sandbox, Stopped, Unavailable, backends
from rewards.sandbox.server import remove

MIB = 2**20
SMALL = Limits(seconds=5.0, memory_bytes=256 * MIB, scratch_bytes=8 * MIB, file_bytes=4 * MIB)


def started(backend, limits=SMALL, require=("network", "files", "processes", "memory")):
    try:
        return Sandbox(limits, backend, require)
    except Unavailable as error:
        if sys.platform == "linux" and backend == "process" and os.path.exists("/sys/kernel/security/landlock"):
            raise
        pytest.skip(f"needs {'bubblewrap' if backend == 'bubblewrap' else 'Landlock and seccomp'}: {error}")


@pytest.fixture(scope="module", params=["process", pytest.param("bubblewrap", marks=pytest.mark.slow)])
def sandbox(request):
    with started(request.param) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def confined():
    with started("process") as sandbox:
        yield sandbox


def server_of(sandbox):
    return sandbox._server.process.pid


def descendants(pid):
    found = [pid]
    for one in found:
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{one}/task/{one}/children") as file:
            found += map(int, file.read().split())
    return set(found[1:])


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(condition):
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.05)
    return False


# Calls and values


def test_a_function_is_called_with_values_and_returns_values(sandbox):
    with sandbox.load("def both(a, *, b=2): return {'a': (a, b)}\nclass C: pass\nn = 1") as module:
        assert module.names == {"both": "function", "C": "class", "n": "value"}
        assert module.call("both", [1.5, None], b={"x"}) == {"a": ([1.5, None], {"x"})}
        assert module.call("len", [1, 2]) == 2


def test_objects_stay_inside_and_are_used_through_handles(sandbox):
    source = """
    import collections
    class Stack:
        def __init__(self): self.items = []
        def push(self, item): self.items.append(item); return self
    def squares():
        for n in range(3): yield n * n
    def count(text): return collections.Counter(text)
    """
    with sandbox.load(textwrap.dedent(source)) as module:
        stack = module.call("Stack")
        assert isinstance(stack, Handle)
        assert stack.type_name == "Stack"
        module.call(module.get(stack, "push"), 7)
        assert module.get(stack, "items") == [7]
        assert module.call("callable", stack) is False
        assert module.call("list", module.call("squares")) == [0, 1, 4]
        assert module.call("dict", module.call("count", "aab")) == {"a": 2, "b": 1}
        assert [type(item) for item in module.call("list", [stack, 1])] == [Handle, int]


def test_changes_in_place_are_made_for_the_caller(sandbox):
    source = """
    def change(numbers, table, names, *, rows):
        numbers.sort(); numbers.append(9); table["b"] = 2; del table["a"]; names.discard("x"); rows[0][0] = 5; rows.pop()
    """
    with sandbox.load(textwrap.dedent(source)) as module:
        numbers, table, names, row = [3, 1], {"a": 1}, {"x", "y"}, [0]
        rows = [row, [1]]
        module.call("change", numbers, table, names, rows=rows)
        assert (numbers, table, names, rows) == ([1, 3, 9], {"b": 2}, {"y"}, [[5]])
        assert rows[0] is row


def test_exceptions_cross_as_the_nearest_builtin_type_and_text(sandbox):
    source = """
    class Mine(KeyError): pass
    class Rude(ValueError):
        def __str__(self): raise SystemExit(3)
    def fail(kind): raise {"mine": Mine("a"), "rude": Rude(), "exit": SystemExit(0), "stop": KeyboardInterrupt()}[kind]
    """
    with sandbox.load(textwrap.dedent(source)) as module:
        for kind, name in (
            ("mine", "KeyError"),
            ("rude", "ValueError"),
            ("exit", "SystemExit"),
            ("stop", "KeyboardInterrupt"),
        ):
            with pytest.raises(RemoteError) as raised:
                module.call("fail", kind)
            assert raised.value.type_name == name
        with pytest.raises(RemoteError, match="AttributeError"):
            module.call("no_such_name")
        assert module.call("abs", -1) == 1


@pytest.mark.parametrize(
    ("source", "name"), [("def f(:", "SyntaxError"), ("1/0", "ZeroDivisionError"), ("raise SystemExit", "SystemExit")]
)
def test_a_source_that_raises_says_so(confined, source, name):
    with pytest.raises(RemoteError, match=name):
        confined.load(source)


def test_an_argument_that_cannot_cross_is_our_own_mistake(confined):
    with confined.load("def f(x): return x") as module:
        with pytest.raises(ValueError, match="argument of type object cannot cross"):
            module.call("f", object())
        assert module.call("f", 1) == 1


def test_what_is_too_large_to_cross_stays_inside(confined):
    with confined.load("def text(n): return 'x' * n\ndef number(n): return 1 << n") as module:
        assert isinstance(module.call("text", 9 * MIB), Handle)
        assert isinstance(module.call("number", 2**21), Handle)
        assert module.call("len", module.call("text", 9 * MIB)) == 9 * MIB


def test_ordinary_programs_run(sandbox):
    source = """
    import asyncio, collections, concurrent.futures, dataclasses, datetime, decimal, enum, functools, hashlib, heapq, itertools
    import json, math, random, re, statistics, string, tempfile, threading, typing, zoneinfo

    @dataclasses.dataclass
    class Point:
        x: int

    def threads():
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            return sum(pool.map(lambda n: n * n, range(100)))

    def loop():
        async def one(n):
            await asyncio.sleep(0.001)
            return n
        async def main():
            return await asyncio.gather(*(one(n) for n in range(5)))
        return asyncio.run(main())

    def files():
        with tempfile.TemporaryFile("w+") as file, open("note.txt", "w") as note:
            file.write("a"); note.write("b")
            file.seek(0)
            return file.read()

    def deep(n): return 0 if n == 0 else 1 + deep(n - 1)

    def stack():
        import sys
        sys.setrecursionlimit(10**6)
        threading.stack_size(64 * 2**20)
        answers = []
        thread = threading.Thread(target=lambda: answers.append(deep(20_000)))
        thread.start(); thread.join()
        return answers

    def rest():
        print("noise"); help; random.random(); hashlib.sha256(b"").hexdigest()
        return [Point(1).x, str(decimal.Decimal("1.10")), zoneinfo.ZoneInfo("UTC").key]
    """
    with sandbox.load(textwrap.dedent(source)) as module:
        assert module.call("threads") == 328350
        assert module.call("loop") == [0, 1, 2, 3, 4]
        assert module.call("files") == "a"
        assert module.call("stack") == [20_000]
        assert module.call("rest") == [1, "1.10", "UTC"]


# Scripts


@pytest.mark.parametrize(
    ("source", "stdin", "outcome", "stdout"),
    [
        ("print(sum(map(int, open(0).read().split())))", "1 2\n3", "ok", "6\n"),
        ("import sys\nfor line in sys.stdin: print(line.strip()[::-1])", "ab\ncd\n", "ok", "ba\ndc\n"),
        ("print(__name__, input() == '\\ud800\\x00')", "\ud800\x00", "ok", "__main__ True\n"),
        ("print(1)\nraise ValueError('no')", "", "error", "1\n"),
        ("import sys\nprint(2)\nsys.exit('bad')", "", "error", "2\n"),
        ("import sys\nsys.stdout.write('x')\nsys.exit()", "", "ok", "x"),
        ("import os\nprint(3, flush=True)\nos._exit(4)", "", "error", "3\n"),
        ("import atexit\natexit.register(print, 'end')", "", "ok", "end\n"),
        (
            "import threading, time\nthreading.Thread(target=lambda: (time.sleep(.1), print('late'))).start()",
            "",
            "ok",
            "late\n",
        ),
        ("import os\nprint('a', flush=True)\nos.kill(os.getpid(), 9)", "", "killed", "a\n"),
        ("x = [0] * 10**9", "", "memory", ""),
        ("while True: pass", "", "time-out", ""),
        ("import time\ntime.sleep(60)", "", "time-out", ""),
        ("def f(", "", "error", ""),
        ("print(4)\nexit(3)", "", "error", "4\n"),
        ("import os\nos.write(3, b'forged')", "", "protocol", ""),
        ("import sys\nsys.stdout = None", "", "ok", ""),
        ("print('\\udc80')", "", "error", ""),
    ],
)
def test_scripts(sandbox, hasty, source, stdin, outcome, stdout):
    ran = (hasty if outcome == "time-out" else sandbox).run(source, stdin)
    assert (ran.outcome, ran.stdout) == (outcome, stdout)


def test_standard_error_is_kept_from_its_end(confined):
    ran = confined.run("import sys\nprint('x' * 10**5, file=sys.stderr)\nraise ValueError('the end')")
    assert ran.stderr.endswith("ValueError: the end\n")
    assert len(ran.stderr) <= 16 * 1024


def test_output_is_kept_up_to_a_limit_and_ended_at_another():
    with started("process", Limits(output_bytes=MIB)) as sandbox:
        sandbox.describe()
        server = server_of(sandbox)
        ran = sandbox.run("print('a' * (4 * 2**20))")
        assert (ran.outcome, ran.stdout) == ("ok", "a" * MIB)
        assert sandbox.run("print('a' * (4 * 2**20))", output_bytes=3 * MIB).stdout == "a" * 3 * MIB
        ran = sandbox.run("import os\nwhile True: os.write(1, b'a' * 2**16); os.write(2, b'b' * 2**16)")
        assert (ran.outcome, len(ran.stdout)) == ("output", MIB)
        assert sandbox.run("print(1)").stdout == "1\n"
        assert server_of(sandbox) == server  # the flood cost that script alone


# Attacks. Each is followed by an honest program in the same sandbox.


ENDING = {
    "exits": ("import os\ndef f(): os._exit(0)", "exit"),
    "exits while it loads": ("import os\nos._exit(0)", "exit"),
    "loops": ("def f():\n while True: pass", "time-out"),
    "loops while it loads": ("while True: pass", "time-out"),
    "sleeps": ("import time\ndef f(): time.sleep(100)", "time-out"),
    "loops in C": ("def f(): return 10 ** (10**9) % 7", "time-out"),
    "swallows exceptions": (
        "def f():\n while True:\n  try:\n   while True: pass\n  except BaseException: pass",
        "time-out",
    ),
    "ignores signals": (
        "import signal\nfor n in range(1, 65):\n try: signal.signal(n, signal.SIG_IGN)\n except Exception: pass\n"
        "def f():\n while True: pass",
        "time-out",
    ),
    "stops itself": ("import os\ndef f(): os.kill(os.getpid(), 19)", "time-out"),
    "ends itself": ("import os\ndef f(): os.kill(os.getpid(), 9)", "killed"),
    "crashes": ("import ctypes\ndef f(): ctypes.string_at(0)", "killed"),
    "aborts": ("import os\ndef f(): os.abort()", "killed"),
    "closes its channel": ("import os\ndef f():\n os.closerange(0, 100)\n while True: pass", "killed"),
    "forges a length": ("import os\ndef f(): os.write(3, b'\\xff' * 8)", "protocol"),
    "forges a body": ("import os, struct\ndef f(): os.write(3, struct.pack('>I', 3) + b'abc')", "protocol"),
    "forges half a frame": (
        "import os, struct\ndef f():\n os.write(3, struct.pack('>I', 9) + b'{')\n os._exit(0)",
        "exit",
    ),
    "forges half a frame and waits": (
        "import os, struct, time\ndef f():\n os.write(3, struct.pack('>I', 9) + b'{')\n time.sleep(100)",
        "time-out",
    ),
}
ENDING["forges a type"] = (
    'import os, struct\ndef f():\n body = b\'{"number": 2, "value": {"object": []}}\'\n'
    " os.write(3, struct.pack('>I', len(body)) + body)",
    "protocol",
)
ENDING["forges an exception"] = (
    ENDING["forges a type"][0].replace('"value": {"object": []}', '"raised": ["Mine", ""]'),
    "protocol",
)
ENDING["forges names"] = ("import os\nos.write(3, b'\\0\\0\\0\\x0c{\"number\":1}')", "protocol")
ENDING["starts many threads"] = (
    "import threading, time\nthreading.stack_size(2**15)\n"
    "def f():\n for _ in range(10**5): threading.Thread(target=time.sleep, args=(9,)).start()",
    "processes",
)
ENDING["fills the disk"] = (
    "def f():\n for n in range(10**6):\n  with open(str(n), 'wb') as file: file.write(bytes(2**20))",
    "scratch",
)
ENDING["fills the disk with deleted files"] = (
    "import os\nkept = []\ndef f():\n for n in range(200):\n  file = open('a', 'wb'); os.unlink('a')\n"
    "  file.write(bytes(2**20)); file.flush(); kept.append(file)\n while True: pass",
    "scratch",
)
ENDING["makes many files"] = (
    "import time\ndef f():\n for n in range(10**5): open(str(n), 'w').close()\n time.sleep(9)",
    "scratch",
)
ENDING["hides files"] = (
    "import os, time\ndef f():\n os.mkdir('a', 0o300)\n os.chdir('a')\n time.sleep(9)",
    "scratch time-out",
)
ENDING["hides files deep"] = (
    "import os, time\ndef f():\n for n in range(300):\n  os.mkdir('a' * 200); os.chdir('a' * 200)\n time.sleep(9)",
    "scratch",
)


@pytest.fixture(scope="module")
def hasty():
    with started("process", Limits(seconds=0.5)) as sandbox:
        yield sandbox


def assert_it_ends_alone(sandbox, attack):
    source, outcome = ENDING[attack]
    with pytest.raises((Stopped, RemoteError)) as stopped, sandbox.load(source) as module:
        module.call("f")
    if stopped.type is RemoteError:  # the scratch folder of bubblewrap is full, not too full
        assert (outcome, sandbox.describe().backend) == ("scratch", "bubblewrap")
    else:
        assert stopped.value.outcome in outcome.split(), stopped.value
    with sandbox.load("def f(): return 1") as module:
        assert module.call("f") == 1
    assert_nothing_is_left(sandbox)


@pytest.mark.parametrize("attack", [name for name, (_, outcome) in ENDING.items() if "time-out" not in outcome])
def test_what_ends_a_program_ends_it_alone(sandbox, attack):
    assert_it_ends_alone(sandbox, attack)


@pytest.mark.parametrize("attack", [name for name, (_, outcome) in ENDING.items() if "time-out" in outcome])
@pytest.mark.slow
def test_what_takes_too_long_is_ended_alone(hasty, attack):
    assert_it_ends_alone(hasty, attack)


def test_deep_recursion_costs_itself_and_nothing_else(sandbox):
    source = "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return sorted([1], key=lambda _: f())"
    with pytest.raises((Stopped, RemoteError)), sandbox.load(source) as module:
        module.call("f")
    with sandbox.load("def f(n): return 0 if n == 0 else 1 + f(n - 1)") as module:
        assert module.call("f", 800) == 800


def assert_nothing_is_left(sandbox):
    if sandbox.describe().backend == "process":
        assert descendants(server_of(sandbox)) == set()
        assert os.listdir(sandbox._server.root) == []


def frame(body):
    return len(body).to_bytes(4, "big") + body


def test_an_answer_nobody_asked_for_ends_the_program(sandbox):
    forged = frame(b'{"number":2,"value":42}')
    with sandbox.load(f"import os\ndef f(): os.write(3, {forged!r}); return 1\ndef g(): return 2") as module:
        assert module.call("f") == 42  # it may lie about its own value
        for _ in range(2):
            with pytest.raises(Stopped, match="nobody asked") as stopped:
                module.call("g")
            assert stopped.value.outcome == "protocol"


def test_an_answer_prepared_for_later_ends_the_program(sandbox):
    forged = frame(b'{"number":3,"value":42}')
    with (
        sandbox.load(f"import os\ndef f(): os.write(3, {forged!r}); return 1") as module,
        pytest.raises(Stopped, match="nobody asked"),
    ):
        module.call("f")


def test_a_program_cannot_write_more_into_our_arguments_than_it_was_given(sandbox):
    forged = frame(b'{"number":2,"value":1,"args":{"tuple":[{"tuple":[[1],[2]]},{"dict":[]}]}}')
    with sandbox.load(f"import os\ndef f(x): os.write(3, {forged!r})") as module:
        ours = [7]
        with pytest.raises(Stopped, match="arguments"):
            module.call("f", ours)
        assert ours == [7]


def test_the_time_of_all_calls_counts(hasty):
    with hasty.load("import time\ndef f(): time.sleep(0.3)") as module:
        module.call("f")
        with pytest.raises(Stopped, match="longer than"):
            module.call("f")


HELD = {
    "memory": "len(bytearray(2**30))",
    "memory in threads": "[threading.Thread(target=time.sleep, args=(9,)).start() for _ in range(10**4)]",
    "a memory file": "os.memfd_create('a')",
    "a large file": "open('a', 'wb').write(bytes(8 * 2**20))",
    "many open files": "[open('a', 'w') for _ in range(1000)]",
    "fork": "os.fork()",
    "spawn": "subprocess.run(['/bin/true'])",
    "posix spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "exec": "os.execv('/bin/true', ['true'])",
    "multiprocessing": "multiprocessing.Process(target=print).start()",
    "vfork by number": "libc.syscall(58) == -1 and 1/0",
    "clone3 by number": "libc.syscall(435, 0, 0) == -1 and 1/0",
    "signal the parent": "os.kill(os.getppid(), 0)",
    "signal 1": "os.kill(1, 0)",
    "signal all": "os.kill(-1, 0)",
    "signal the group": "os.killpg(0, 0)",
    "pidfd": "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
    "signals by fcntl": "fcntl.fcntl(3, 8, os.getpid())",
    "signals by ioctl": "fcntl.ioctl(3, 0x8901, os.getpid().to_bytes(4, 'little'))",
    "a session": "os.setsid()",
    "limits": "resource.setrlimit(resource.RLIMIT_AS, (1, 1))",
    "limits of the parent": "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "the death signal": "libc.prctl(1, 0) == -1 and 1/0",
    "ptrace": "libc.ptrace(16, os.getppid(), 0, 0) == -1 and 1/0",
    "memory of the parent": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "io_uring": "libc.syscall(425, 1, ctypes.create_string_buffer(256)) == -1 and 1/0",
    "bpf": "libc.syscall(321, 0, 0, 0) == -1 and 1/0",
    "mount": "libc.mount(b'none', b'.', b'tmpfs', 0, None) == -1 and 1/0",
    "namespaces": "libc.unshare(0x10000000) == -1 and 1/0",
    "become root": "os.setuid(0) or os.setgroups([0])",
    "chmod": "os.chmod('.', 0o777)",
    "chown": "os.chown('.', 0, 0)",
    "times of a file": "os.utime('/dev/null')",
    "write in tmp": "open('/tmp/left-by-a-program', 'w')",
    "write in shared memory": "open('/dev/shm/left-by-a-program', 'w')",
    "write beside": "open('../left', 'w')",
    "delete its folder": "os.rmdir(os.getcwd())",
    "read the password file": "open('/etc/passwd')",
    "read home": "os.listdir(os.path.expanduser('~root'))",
    "read by a link": "os.symlink('/etc/passwd', 'a') or open('a')",
    "read by a hard link": "os.link('/etc/passwd', 'b')",
    "list the root": "os.listdir('/')",
    "environment": "open('/proc/self/environ')",
    "environment of the parent": "open(f'/proc/{os.getppid()}/environ')",
    "tcp": "socket.socket()",
    "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "unix": "socket.socket(socket.AF_UNIX)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "datagram pair": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "pass a file": "socket.send_fds(socket.socket(fileno=3), [b'a'], [0])",
    "shared memory": "libc.shmget(0, 4096, 0o1600) == -1 and 1/0",
    "device": "os.mknod('null', 0o020666, os.makedev(1, 3))",
    "the clock": "time.clock_settime(time.CLOCK_REALTIME, 0)",
    "a profile": "libc.syscall(298, 0, 0, -1, -1, 0) == -1 and 1/0",
}


@pytest.mark.skipif(sys.platform != "linux", reason="attacks Linux")
@pytest.mark.parametrize("attack", HELD)
def test_what_is_refused_raises_inside_and_the_program_goes_on(sandbox, attack):
    source = f"""
    import ctypes, fcntl, multiprocessing, os, resource, signal, socket, subprocess, threading, time
    libc = ctypes.CDLL(None)
    def f(): {HELD[attack]}
    def g(): return 1
    """
    with sandbox.load(textwrap.dedent(source)) as module:
        with pytest.raises(RemoteError) as raised:
            module.call("f")
        assert raised.value.type_name in (
            *("PermissionError", "OSError", "MemoryError", "RuntimeError", "ZeroDivisionError", "BlockingIOError"),
            *("FileNotFoundError", "ValueError", "ProcessLookupError"),
        )
        assert module.call("g") == 1


def test_no_listener_hears_from_a_program(sandbox, tmp_path):
    source = """
    import socket
    def knock(kind, family, address):
        try:
            with socket.socket(family, kind) as one:
                one.connect(address); one.send(b"x")
        except OSError as error: return type(error).__name__
    """
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as unix,
        sandbox.load(textwrap.dedent(source)) as module,
    ):
        udp.bind(("127.0.0.1", 0))
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        for listener, address in ((tcp, tcp.getsockname()), (udp, udp.getsockname()), (unix, unix.getsockname())):
            assert module.call("knock", int(listener.type), int(listener.family), address) == "PermissionError"
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.recv(1) if listener is udp else listener.accept()


def test_files_outside_are_neither_read_nor_changed(sandbox, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("key")
    os.chmod(tmp_path, 0o777)
    os.chmod(secret, 0o666)
    source = f"""
    import os, shutil
    path, folder = {str(secret)!r}, {str(tmp_path)!r}
    attempts = [
        lambda: open(path).read(), lambda: open(path, "w"), lambda: open(path, "a"), lambda: os.truncate(path, 0),
        lambda: os.open(path, os.O_RDONLY | os.O_TRUNC), lambda: os.unlink(path), lambda: os.rename(path, "mine"),
        lambda: os.rename(path, path + "2"), lambda: os.link(path, "mine"), lambda: os.chmod(path, 0),
        lambda: os.mkdir(folder + "/a"),
        lambda: os.symlink(path, folder + "/b"), lambda: os.listdir(folder), lambda: shutil.rmtree(folder),
        lambda: os.utime(path, (0, 0)), lambda: os.setxattr(path, "user.a", b"b"), lambda: os.mkfifo(folder + "/c"),
    ]
    def f():
        done = []
        for number, attempt in enumerate(attempts):
            try: attempt()
            except OSError: continue
            done.append(number)
        return done
    """
    with sandbox.load(textwrap.dedent(source)) as module:
        assert module.call("f") == []
    assert secret.read_text() == "key"
    assert os.listdir(tmp_path) == ["secret"]
    assert secret.stat().st_mtime > 0


def test_our_environment_is_not_inside(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "abc-secret")
    with started("process") as sandbox:
        ran = sandbox.run("import os, sys\nprint(dict(os.environ), sys.argv, sys.orig_argv)")
        assert ran.outcome == "ok"
        assert "abc-secret" not in ran.stdout
        with open(f"/proc/{server_of(sandbox)}/environ") as environ:
            assert "abc-secret" not in environ.read()


def test_a_program_sees_only_its_own_file_descriptors(sandbox):
    source = """
    import os
    def f():
        found = []
        for fd in range(256):
            try: os.fstat(fd)
            except OSError: continue
            found.append(fd)
        return found
    """
    with sandbox.load("def f(): return 1"), sandbox.load(textwrap.dedent(source)) as module:
        assert module.call("f") == [0, 1, 2, 3]


def test_programs_do_not_see_each_other(sandbox):
    with (
        sandbox.load("import builtins, math\nbuiltins.sum = lambda x: 42\nmath.sqrt = None\nopen('mark', 'w').close()"),
        sandbox.load("import math, os\ndef f(): return sum([1]), math.sqrt(4), os.listdir('.')") as module,
    ):
        assert module.call("f") == (1, 2, [])


def test_programs_draw_different_random_numbers(confined):
    drawn = set()
    for _ in range(3):
        with confined.load("import random\ndef f(): return random.random()") as module:
            drawn.add(module.call("f"))
    assert len(drawn) == 3


# Nothing is left


def test_a_closed_sandbox_leaves_no_process_and_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sandbox = started("process")
    hanging = sandbox.load(
        "open('a', 'w').close()\nimport threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()"
    )
    pids = {server_of(sandbox), *descendants(server_of(sandbox))}
    assert len(pids) == 2
    assert glob.glob(f"{tmp_path}/sandbox-*/*/a")
    sandbox.close()
    assert not any(map(alive, pids))
    assert os.listdir(tmp_path) == []
    hanging.close()
    sandbox.close()


def test_a_daemon_of_an_unconfined_program_is_ended_too(tmp_path):
    source = f"""
    import os, time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for fd in range(4): os.close(fd)
            while True:
                open({str(tmp_path / "beat")!r}, "a").write("x")
                time.sleep(0.01)
        os._exit(0)
    os.wait()
    """
    with Sandbox(SMALL, backend="bare") as sandbox:
        with sandbox.load(textwrap.dedent(source)):
            assert eventually((tmp_path / "beat").exists)
        assert descendants(server_of(sandbox)) == set()
    size = (tmp_path / "beat").stat().st_size
    time.sleep(0.1)
    assert (tmp_path / "beat").stat().st_size == size


def test_the_server_killed_in_mid_run_costs_that_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with started("process", Limits(seconds=30)) as sandbox:
        module = sandbox.load("def f():\n while True: open('a', 'w').close()")
        server = server_of(sandbox)
        (program,) = descendants(server)
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {server}"])
        with pytest.raises(Stopped, match="server was killed"):
            module.call("f")
        killer.wait()
        module.close()
        assert eventually(lambda: not alive(program))
        assert os.listdir(tmp_path) == []
        with sandbox.load("def f(): return 1") as again:
            assert again.call("f") == 1
        os.kill(server_of(sandbox), signal.SIGKILL)
        assert sandbox.run("print(1)").stdout == "1\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("backend", ["process", "bubblewrap"])
def test_everything_goes_when_we_are_killed(backend, tmp_path):
    started(backend).close()
    program = f"""
    import tempfile, time
    tempfile.tempdir = {str(tmp_path)!r}
    from rewards.sandbox import Limits, Sandbox
    sandbox = Sandbox(Limits(seconds=60), {backend!r})
    module = sandbox.load("def f():\\n while True: pass")
    print(sandbox._server.process.pid, flush=True)
    module.call("f")
    """
    ours = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, cwd=os.getcwd())
    server = int(ours.stdout.readline())
    pids = {server, *descendants(server)}
    assert len(pids) >= 2
    ours.kill()
    ours.wait()
    ours.stdout.close()
    assert eventually(lambda: not any(map(alive, pids)))
    assert os.listdir(tmp_path) == []


def test_a_fork_of_ours_has_a_server_of_its_own():
    with started("process") as sandbox:
        server = server_of(sandbox)
        child = os.fork()
        if child == 0:
            good = sandbox.run("print(1)").stdout == "1\n" and server_of(sandbox) != server
            sandbox.close()
            os._exit(0 if good else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert server_of(sandbox) == server
        assert sandbox.run("print(1)").stdout == "1\n"


def test_folders_are_removed_however_deep_and_locked(tmp_path):
    top = tmp_path / "top"
    top.mkdir()
    here = os.getcwd()
    try:
        os.chdir(top)
        for _ in range(50):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
        os.mkdir("locked", 0)
    finally:
        os.chdir(here)
    (top / "link").symlink_to("/")
    remove(str(top))
    assert not top.exists()


def test_an_interrupted_call_ends_the_program():
    with started("process") as sandbox, sandbox.load("import time\ndef f(): time.sleep(60)") as module:
        (program,) = descendants(server_of(sandbox))
        interrupt = threading.Timer(0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            module.call("f")
        interrupt.join()
        assert not alive(program)
        with pytest.raises(Stopped, match="interrupted"):
            module.call("f")
        assert sandbox.run("print(1)").stdout == "1\n"


# What is asked for and is not there


def test_it_refuses_rather_than_running_bare():
    with pytest.raises(Unavailable, match="does not keep files, network, processes"):
        Sandbox(SMALL, backend="bare", require=("network", "files", "processes"))


def test_auto_refuses_where_nothing_isolates(monkeypatch):
    bare = backends.command("bare", dataclasses.asdict(SMALL))
    monkeypatch.setattr(backends, "command", lambda backend, limits: bare)
    with pytest.raises(Unavailable, match="does not keep files, network, processes on this machine"):
        Sandbox(SMALL).describe()


def test_limits_that_leave_no_room_for_any_program_are_named():
    with pytest.raises(Unavailable, match="cannot run a program within Limits"):
        Sandbox(Limits(seconds=1e-6)).describe()


def test_bubblewrap_that_is_missing_or_broken_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="bwrap"):
        Sandbox(backend="bubblewrap").describe()
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'no namespaces for you' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    with pytest.raises(Unavailable, match="no namespaces for you"):
        Sandbox(backend="bubblewrap").describe()


def test_bare_says_what_it_is():
    with Sandbox(SMALL, backend="bare") as sandbox:
        assert "not a sandbox" in str(sandbox.describe())
        assert sandbox.describe().enforced == ("memory",) or sys.platform != "linux"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "docker"}, "backend must be"),
        ({"require": ("gpu",)}, "require takes"),
        ({"require": "files"}, "require takes"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sandbox(**arguments)


def test_bad_limits_are_refused():
    with pytest.raises(ValueError, match="seconds must be positive"):
        Limits(seconds=0)


def test_nothing_starts_before_it_is_needed():
    sandbox = Sandbox()
    assert sandbox._server is None
    sandbox.close()


# Many


@pytest.mark.slow
def test_a_thousand_hostile_programs_leave_the_next_one_unharmed():
    attacks = [
        *(source for source, outcome in ENDING.values() if outcome in ("exit", "killed", "protocol")),
        *(f"import ctypes, fcntl, multiprocessing, os, resource, signal, socket, subprocess, threading, time\n"
          f"libc = ctypes.CDLL(None)\ndef f(): {attack}" for name, attack in HELD.items() if name != "memory in threads"),
    ]  # fmt: skip
    with started("process") as sandbox:
        server = server_of(sandbox)
        for number in range(1000):
            with contextlib.suppress(Stopped, RemoteError), sandbox.load(attacks[number % len(attacks)]) as module:
                module.call("f")
            with sandbox.load("def f(x): return x + 1") as module:
                assert module.call("f", number) == number + 1
        assert server_of(sandbox) == server
        assert_nothing_is_left(sandbox)


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["loops", "ignores signals", "fills the disk", "makes many files"])
def test_slow_attacks_again_and_again(attack):
    with started("process", Limits(seconds=0.5, scratch_bytes=8 * MIB)) as sandbox:
        for _ in range(40):
            with pytest.raises(Stopped), sandbox.load(ENDING[attack][0]) as module:
                module.call("f")
            assert sandbox.run("print(1)").stdout == "1\n"
        assert_nothing_is_left(sandbox)


@pytest.mark.slow
def test_a_gigabyte_of_output_costs_us_no_memory(confined):
    for _ in range(20):
        ran = confined.run("import sys\nfor _ in range(1024): sys.stdout.write('x' * 2**20)")
        assert ran.outcome == "output"
        assert len(ran.stdout) == MIB


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to give it up")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_an_ordinary_user_is_as_safe():
    program = "from rewards.sandbox import Sandbox; print(*sorted(Sandbox().describe().enforced))"
    python = shutil.which("python3", path="/usr/bin")
    user = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    if (
        python is None
        or subprocess.run([*user, python, "-c", "import rewards"], env={"PYTHONPATH": os.getcwd()}).returncode
    ):
        pytest.skip("needs an interpreter and a checkout that every user may read")
    done = subprocess.run(
        [*user, python, "-c", program], env={"PYTHONPATH": os.getcwd()}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["files", "memory", "network", "processes"], done.stderr
