"""A process gives up its rights: limits, Landlock and seccomp on Linux, a sandbox profile on macOS.

Runs inside, before a program is read, and needs only the standard library. No privilege is needed, and none is left
afterwards, not even root's. On Linux:

- Landlock (5.13+): reads only the interpreter's library and shared libraries, writes only the scratch folder.
- seccomp: a list of allowed system calls, all others fail with EPERM. No process but threads, no socket but a pair of
  its own, no signal to others, no change of modes, owners or limits.

https://docs.kernel.org/userspace-api/landlock.html, https://docs.kernel.org/userspace-api/seccomp_filter.html
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)


class Unconfined(Exception):  # noqa: N818 - says what happened
    """A layer that the machine has could not be put on."""


def limit(limits: Mapping[str, Any]) -> None:
    """Resource limits of this process. Memory is address space, which macOS does not enforce."""
    seconds = math.ceil(limits["seconds"]) + 1
    for kind, soft, hard in (
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_FSIZE, limits["file_bytes"], limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"], limits["open_files"]),
        (resource.RLIMIT_STACK, 64 * 2**20, 64 * 2**20),  # room for deep recursion in the main thread
        (resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"]),
    ):
        most = resource.getrlimit(kind)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        try:
            resource.setrlimit(kind, (soft, hard))
        except (ValueError, OSError):
            if sys.platform == "linux":
                raise


def confine(scratch: str, readable: Sequence[str]) -> None:
    """Put on every layer that this machine has. What then holds is for a probe to find out.

    Raises:
        Unconfined: a layer is there and failed.
    """
    if sys.platform == "darwin":
        _profile(scratch, readable)
    elif sys.platform == "linux":
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _drop_capabilities()
        if landlock_version():
            _landlock(scratch, readable)
        if platform.machine() in _MACHINES and sys.maxsize > 2**32 and _LIBC.prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) >= 0:
            _seccomp()


def die_with_parent(parent: int) -> None:
    """Linux: this process ends when ``parent``, which must have one thread, does."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def adopt_orphans() -> None:
    """Linux: what a child leaves behind becomes a child of this process, which can then end it."""
    if sys.platform == "linux":
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)


_PR_SET_PDEATHSIG, _PR_GET_SECCOMP, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 21, 22, 36, 38


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise Unconfined(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _syscall(number: int, *arguments: Any) -> int:
    return int(
        _LIBC.syscall(ctypes.c_long(number), *(ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments))
    )


def _prctl(option: int, value: Any) -> None:
    value = ctypes.c_ulong(value) if isinstance(value, int) else value
    _checked(_LIBC.prctl(option, value, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)), f"prctl {option}")


def _drop_capabilities() -> None:
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    _checked(_LIBC.capset(header, ctypes.create_string_buffer(24)), "capset")


# Landlock: the three calls have the same numbers on every machine.

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_SPECIAL = _EXECUTE | 1 << 6 | 1 << 9 | 1 << 11 | 1 << 15  # making devices and sockets, ioctl on devices
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many there are, by version; since 5 there are 16
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def landlock_version() -> int:
    """Of the kernel; 0 if it has none."""
    return max(0, _syscall(_CREATE_RULESET, None, 0, 1))


def _landlock(scratch: str, readable: Sequence[str]) -> None:
    version = landlock_version()
    every_file_right = 2 ** _FILE_RIGHTS.get(version, 16) - 1
    # file rights; since 4 binding and connecting by TCP; since 6 abstract sockets and signals
    attributes = struct.pack("QQQ", every_file_right, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _checked(_syscall(_CREATE_RULESET, ctypes.c_char_p(attributes), len(attributes), 0), "Landlock")
    rules = [(scratch, every_file_right & ~_SPECIAL)]
    rules += [(path, _READ_FILE | _READ_DIR) for path in readable]
    rules += [(path, _READ_FILE | _WRITE_FILE | _TRUNCATE) for path in _DEVICES]
    for path, rights in rules:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not every machine has every library folder
            continue
        if not os.path.isdir(path):
            rights &= _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
        rule = ctypes.c_char_p(struct.pack("=Qi", rights & every_file_right, place))
        _checked(_syscall(_ADD_RULE, ruleset, 1, rule, 0), f"Landlock for {path}")
        os.close(place)
    _checked(_syscall(_RESTRICT_SELF, ruleset, 0), "Landlock")
    os.close(ruleset)


# seccomp: name, number on x86-64, number on arm64 (- where it has none).

_CALLS = """
read 0 63, write 1 64, close 3 57, fstat 5 80, lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216,
madvise 28 233, msync 26 227, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
rt_sigpending 127 136, rt_sigsuspend 130 133, rt_sigtimedwait 128 137, sigaltstack 131 132, restart_syscall 219 128,
pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, preadv 295 69, pwritev 296 70, sendfile 40 71,
copy_file_range 326 285, ftruncate 77 46, fallocate 285 47, fadvise64 221 223, fsync 74 82, fdatasync 75 83, flock 73 32,
dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, eventfd2 290 19, select 23 -, pselect6 270 72, poll 7 -,
ppoll 271 73, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22,
sched_yield 24 124, sched_getaffinity 204 123, nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113,
clock_getres 229 114, gettimeofday 96 169, time 201 -, alarm 37 -, pause 34 -, getitimer 36 102, setitimer 38 103,
times 100 153, getrusage 98 165, getrlimit 97 163, sysinfo 99 179, uname 63 160, umask 95 166, getpid 39 172,
gettid 186 178, getppid 110 173, getpgid 121 155, getpgrp 111 -, getsid 124 156, getuid 102 174, geteuid 107 175,
getgid 104 176, getegid 108 177, getresuid 118 148, getresgid 120 150, getgroups 115 158, getcpu 309 168, getcwd 79 17,
chdir 80 49, fchdir 81 50, getdents64 217 61, open 2 -, creat 85 -, openat 257 56, stat 4 -, lstat 6 -,
newfstatat 262 79, statx 332 291, statfs 137 43, fstatfs 138 44, access 21 -, faccessat 269 48, faccessat2 439 439,
readlink 89 -, readlinkat 267 78, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -,
renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, futex 202 98,
futex_waitv 449 449, set_robust_list 273 99, get_robust_list 274 100, set_tid_address 218 96, rseq 334 293,
membarrier 324 283, getrandom 318 278, close_range 436 436, recvfrom 45 207, exit 60 93, exit_group 231 94,
kill 62 129, tgkill 234 131, clone 56 220, clone3 435 435, fcntl 72 25, ioctl 16 29, prlimit64 302 261,
socketpair 53 199, sendto 44 206
"""
_MACHINES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7), "arm64": (2, 0xC00000B7)}  # column, AUDIT_ARCH
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_CLONE_THREAD = 0x10000
# Duplicates, flags, locks and pipe sizes; not the commands that send signals (F_SETOWN, F_SETSIG, leases).
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1031, 1032)
_IOCTL = (
    0x5401,
    0x5413,
    0x541B,
    0x5421,
    0x5450,
    0x5451,
)  # is it a terminal, its size, bytes waiting, blocking, on exec


def _word(argument: int, high: bool = False) -> tuple[int, int, int, int]:
    """Load half of an argument of the call (the machines are little-endian)."""
    return (_LOAD, 0, 0, 16 + 8 * argument + 4 * high)


def _one_of(argument: int, values: Sequence[int]) -> list[tuple[int, int, int, int]]:
    left = len(values)
    tests = [(_EQUAL, left - place, 0, value) for place, value in enumerate(values)]
    return [_word(argument), *tests, (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]


def _null(argument: int) -> list[tuple[int, int, int, int]]:
    refuse, allow = (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)
    return [_word(argument), (_EQUAL, 1, 0, 0), refuse, _word(argument, high=True), (_EQUAL, 1, 0, 0), refuse, allow]


def _seccomp() -> None:
    me = os.getpid()
    refuse, allow = (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)
    conditions = {
        "kill": _one_of(0, [me]),
        "tgkill": _one_of(0, [me]),
        "clone": [_word(0), (_ANY_BIT, 1, 0, _CLONE_THREAD), refuse, allow],
        "clone3": [
            (_RETURN, 0, 0, _ENOSYS)
        ],  # its flags are in memory, out of a filter's sight; glibc then takes clone
        "fcntl": _one_of(1, _FCNTL),
        "ioctl": _one_of(1, _IOCTL),
        "prlimit64": _null(2),  # asking is fine, setting is not
        # a stream between itself and itself (asyncio needs one), also non-blocking and closed on exec
        "socketpair": [
            _word(0),
            (_EQUAL, 1, 0, 1),
            refuse,
            *_one_of(1, [kind | 1 for kind in (0, 0x800, 0x80000, 0x80800)]),
        ],
    }
    column, architecture = _MACHINES[platform.machine()]
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for call in _CALLS.split(","):
        words = call.split()
        if words[column] != "-":
            then = conditions.get(words[0], [allow])
            program += [(_EQUAL, 0, len(then), int(words[column])), *then]
    program.append(refuse)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    filtered = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    _checked(_LIBC.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), filtered, ctypes.c_ulong(0), ctypes.c_ulong(0)), "seccomp")


# macOS: the profile that sandbox-exec would take, put on by the process itself.


def _profile(scratch: str, readable: Sequence[str]) -> None:
    def folders(paths: Sequence[str]) -> str:
        return " ".join(f'(subpath "{os.path.realpath(path)}")' for path in paths)

    profile = f"""
        (version 1)
        (deny default)
        (allow sysctl-read)
        (allow file-read-metadata)
        (allow signal (target self))
        (allow file-read* {folders([*readable, scratch, "/usr/lib", "/System/Library"])})
        (allow file-read* file-write-data {" ".join(f'(literal "{path}")' for path in _DEVICES)})
        (allow file-write* {folders([scratch])})
    """
    error = ctypes.c_char_p()
    if _LIBC.sandbox_init(profile.encode(), ctypes.c_uint64(0), ctypes.byref(error)) != 0:
        raise Unconfined(f"sandbox_init: {(error.value or b'').decode(errors='replace')}")
