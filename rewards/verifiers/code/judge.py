"""The trusted side: runs tests in this process against a program that runs in a sandbox.

It is called in a worker process of its own, since a lying program can make a test run for ever.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import time
from functools import cache
from types import CodeType
from typing import Any

from rewards.sandbox import Limits, RemoteError, Sandbox, Stopped
from rewards.verifiers.code.program import compiled, find_program, stub
from rewards.verifiers.code.solution import Ended, Solution, Uncrossable
from rewards.verifiers.code.task import undefined_names


class BrokenTestError(Exception):
    """The reference is at fault, not the program."""


def judge(item: dict[str, Any]) -> dict[str, Any]:
    """What came of one completion.

    Args:
        item: ``completion``; ``task`` of :func:`read_task`; ``sandbox``, the limits and the backend.

    Returns:
        ``passed``, the share of the tests; ``outcome``, ``stage`` and ``why`` as :class:`Code` tells them. The outcome
        ``"broken test"`` says that the reference is at fault.
    """
    task = item["task"]
    program = find_program(item["completion"], task.get("prompt", ""), task.get("entry_point", ""))
    if program is None:
        return _result([], "no program", "program", "no program that compiles")
    sandbox = _warm_sandbox(**item["sandbox"])
    try:
        if "inputs" in task:
            return _run_pairs(sandbox, program, task["inputs"], task["outputs"])
        if "prompt" in task:
            return _run_check(sandbox, program, task["prompt"], task["test"], task["entry_point"])
        return _run_asserts(sandbox, program, task["setup"], task["tests"])
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


def _run_pairs(sandbox: Sandbox, program: str, inputs: list[str], outputs: list[str]) -> dict[str, Any]:
    """One run for each pair, until their time is over."""
    deadline = time.monotonic() + sandbox.limits.seconds
    passed = [False] * len(inputs)
    outcome, why = "passed", ""
    for number, (given, wanted) in enumerate(zip(inputs, outputs, strict=True)):
        ran = sandbox.run(program, given)
        passed[number] = ran.outcome == "ok" and _lines(ran.stdout) == _lines(wanted)
        if not passed[number] and outcome == "passed":
            outcome = "failed" if ran.outcome == "ok" else ran.outcome
            why = f"input {number + 1}: " + (ran.stderr.rstrip().rpartition("\n")[2] or ran.why)
        if time.monotonic() > deadline:
            break
    return _result(passed, outcome, "tests", why)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _run_check(sandbox: Sandbox, program: str, prompt: str, test: str, entry_point: str) -> dict[str, Any]:
    """HumanEval: what the prompt defines is ours, so that a test may lean on it, but for the function to write."""
    prelude, setup, check = _compile(stub(prompt)), _compile(test), _compile(f"check({entry_point})")
    namespace: dict[str, Any] = {}
    try:
        exec(prelude, namespace)
    except Exception as error:  # noqa: BLE001 - a prompt may raise anything
        raise BrokenTestError(f"the prompt raised {type(error).__name__}") from None
    namespace.pop(entry_point, None)
    return _run_tests(sandbox, program, {entry_point}, namespace, setup, [check])


def _run_asserts(sandbox: Sandbox, program: str, setup: str, tests: list[str]) -> dict[str, Any]:
    """MBPP: setup and tests ask the program for the names that they do not define."""
    compiled_setup, compiled_tests = _compile(setup), [_compile(test) for test in tests]
    names, modules = undefined_names("\n".join([setup, *tests]))
    namespace = {module: importlib.import_module(module) for module in modules}
    return _run_tests(sandbox, program, names, namespace, compiled_setup, compiled_tests)


def _run_tests(
    sandbox: Sandbox, program: str, names: set[str], namespace: dict[str, Any], setup: CodeType, tests: list[CodeType]
) -> dict[str, Any]:
    """Run ``tests`` in ``namespace``, into which the program's ``names`` come before ``setup``."""
    try:
        with sandbox.load(program) as module:
            solution = Solution(module)
            namespace |= solution.bind(names)
            if why := _failure(setup, namespace, solution):
                return _result([False], solution.stopped or "failed", "tests", f"setup: {why}")
            whys = [_failure(test, namespace, solution) for test in tests]
    except Stopped as stopped:
        return _result([False], stopped.outcome, "load", str(stopped))
    except (RemoteError, RecursionError) as error:
        return _result([False], "error", "load", str(error))
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
