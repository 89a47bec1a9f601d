"""The trusted side: runs tests in this process against a program that runs in a sandbox.

It is called in a worker process of its own, since a lying program can make a test run for ever.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import time
from collections.abc import Collection
from functools import cache
from itertools import zip_longest
from types import CodeType
from typing import Any

from rewards.sandbox import Limits, RemoteError, Sandbox, Stopped
from rewards.verifiers.code.program import compiled, find_program, stub
from rewards.verifiers.code.solution import Ended, Solution, Uncrossable
from rewards.verifiers.code.task import undefined_names


class BrokenTestError(Exception):
    """The reference is at fault, not the program."""


class NoProgramError(Exception):
    """The completion holds none that compiles."""


def judge(item: dict[str, Any]) -> dict[str, Any]:
    """What came of one completion.

    Args:
        item: ``completion``; ``task`` of :func:`read_task`; ``sandbox``, the limits and the backend.

    Returns:
        ``passed``, the share of the tests; ``outcome``, ``stage`` and ``why`` as :class:`Code` tells them. The outcome
        ``"broken test"`` says that the reference is at fault.
    """
    completion, task = item["completion"], item["task"]
    sandbox = _warm_sandbox(**item["sandbox"])
    try:
        if "inputs" in task:
            return _run_pairs(sandbox, completion, task["inputs"], task["outputs"])
        if "prompt" in task:
            return _run_check(sandbox, completion, task["prompt"], task["test"], task["entry_point"])
        return _run_asserts(sandbox, completion, task["setup"], task["tests"])
    except NoProgramError:
        return _result([], "no program", "program", "no program that compiles")
    except BrokenTestError as broken:
        return _result([], "broken test", "tests", str(broken))


def open_sandbox(seconds: float, memory_bytes: int, backend: str) -> Sandbox:
    """A sandbox that keeps what a program must not have.

    Raises:
        Unavailable: there is none on this machine.
    """
    limits = Limits(seconds=seconds, memory_bytes=memory_bytes)
    return Sandbox(limits, backend=backend, require=("network", "files", "processes"))


_warm_sandbox = cache(open_sandbox)


def _program(completion: str, prompt: str = "", names: Collection[str] = ()) -> str:
    program = find_program(completion, prompt, names)
    if program is None:
        raise NoProgramError
    return program


def _run_pairs(sandbox: Sandbox, completion: str, inputs: list[str], outputs: list[str]) -> dict[str, Any]:
    """One run for each pair, until their time is over."""
    program = _program(completion)
    deadline = time.monotonic() + sandbox.limits.seconds
    ran = []
    for given, wanted in zip(inputs, outputs, strict=True):
        late = time.monotonic() > deadline
        ran.append(("time-out", "no time was left") if late else _run_pair(sandbox, program, given, wanted))
    failures = ((outcome, f"input {number}: {why}") for number, (outcome, why) in enumerate(ran, 1) if why)
    outcome, why = next(failures, ("passed", ""))
    return _result([not why for _, why in ran], outcome, "tests", why)


def _run_pair(sandbox: Sandbox, program: str, given: str, wanted: str) -> tuple[str, str]:
    """The outcome, and why the pair failed; empty if it passed."""
    room = 2 * len(wanted.encode(errors="surrogatepass"))  # and as much as is always kept, for white space
    ran = sandbox.run(program, given, room + sandbox.limits.output_bytes)
    if ran.outcome != "ok":
        return ran.outcome, ran.stderr.rstrip().rpartition("\n")[2] or ran.why
    lines = enumerate(zip_longest(_lines(ran.stdout), _lines(wanted), fillvalue=""), 1)
    # Shortened, and the first line that differs says more than the whole.
    wrong = (
        f"line {n}: printed {ours[:60]!r}, wanted {theirs[:60]!r}" for n, (ours, theirs) in lines if ours != theirs
    )
    return "failed", next(wrong, "")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _run_check(sandbox: Sandbox, completion: str, prompt: str, test: str, entry_point: str) -> dict[str, Any]:
    """HumanEval: what the prompt defines is ours, so that a test may lean on it, but for the function to write."""
    prelude, setup, check = _compile(stub(prompt)), _compile(test), _compile(f"check({entry_point})")
    namespace: dict[str, Any] = {}
    try:
        exec(prelude, namespace)
    except Exception as error:  # noqa: BLE001 - a prompt may raise anything
        raise BrokenTestError(f"the prompt raised {type(error).__name__}") from None
    namespace.pop(entry_point, None)
    program = _program(completion, prompt, {entry_point})
    return _run_tests(sandbox, program, {entry_point}, namespace, setup, [check])


def _run_asserts(sandbox: Sandbox, completion: str, setup: str, tests: list[str]) -> dict[str, Any]:
    """MBPP: setup and tests ask the program for the names that they do not define."""
    compiled_setup, compiled_tests = _compile(setup), [_compile(test) for test in tests]
    names, modules = undefined_names("\n".join([setup, *tests]))
    program = _program(completion, names=names)
    namespace = {module: importlib.import_module(module) for module in modules}
    return _run_tests(sandbox, program, names, namespace, compiled_setup, compiled_tests)


def _run_tests(
    sandbox: Sandbox, program: str, names: set[str], namespace: dict[str, Any], setup: CodeType, tests: list[CodeType]
) -> dict[str, Any]:
    """Run ``tests`` in ``namespace``, into which the program's ``names`` come before ``setup``.

    A star import of the setup may have hidden them. One name can only be the program's. Of more, any may be what the test
    compares with (such as ``isclose``), which the program must not give: so they stay hidden.
    """
    try:
        with sandbox.load(program) as module:
            solution = Solution(module)
            bound = solution.bind(names)
            namespace |= bound
            if why := _failure(setup, namespace, solution):
                return _result([False], solution.stopped or "failed", "tests", f"setup: {why}")
            if len(names) == 1:
                namespace |= bound
            whys = [_failure(test, namespace, solution) for test in tests]
    except Stopped as stopped:
        return _result([False], stopped.outcome, "load", str(stopped))
    except (RemoteError, RecursionError) as error:
        return _result([False], "error", "load", str(error))
    if not (any(whys) or solution.asked or solution.missing):
        raise BrokenTestError("it asks nothing of the program")
    outcome = solution.stopped or ("failed" if any(whys) else "passed")
    first = next((f"test {number}: {why}" for number, why in enumerate(whys, 1) if why), "")
    return _result([not why for why in whys], outcome, "tests", first)


def _failure(test: CodeType, namespace: dict[str, Any], solution: Solution) -> str:
    """Why a test failed; empty if it passed.

    Raises:
        BrokenTestError: it raised although nothing has yet been asked of the program, which was all there.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(test, namespace)
    except Ended as ended:
        return str(ended)
    except Uncrossable as error:
        raise BrokenTestError(str(error)) from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a test may raise anything
        why = ": ".join([type(error).__name__, *(text for text in error.args[:1] if type(text) is str)])
        if not solution.asked and getattr(error, "name", None) not in solution.missing:
            raise BrokenTestError(why) from None
        return why
    return solution.stopped  # a test that catches everything does not bring the program back


def _compile(test: str) -> CodeType:
    code = compiled(test, "<test>")
    if code is None:
        raise BrokenTestError(f"does not compile: {test[:100]!r}")
    return code


def _result(passed: list[bool], outcome: str, stage: str, why: str = "") -> dict[str, Any]:
    share = sum(passed) / len(passed) if passed else 0.0
    return {"passed": share, "outcome": outcome, "stage": stage, "why": why[:200]}
