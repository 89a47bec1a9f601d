"""The code verifier: what it takes, and the scores it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rewards.contract import Sample, Score, ungraded
from rewards.verifiers.base import Verifier, unreadable
from rewards.verifiers.code.judge import open_sandbox
from rewards.verifiers.code.task import FORMATS, read_task
from rewards.workers import Failure, Workers, usable_cores

GRACE = 2.0
"""Seconds that our side may take beyond twice what the program may: it starts sandboxes, and runs the tests."""


class Code(Verifier):
    """``1.0 if the program passes all its tests else 0.0``, or the share of the tests that it passes.

    The program is the last fenced block of the completion that defines what the tests ask for, else the last, or the whole
    text; with a HumanEval prompt also its continuation. It runs by itself in a :class:`rewards.sandbox.Sandbox` without
    files, network or processes. The tests run on our side, in another process, and reach the program's functions over a
    pipe on which only values of builtin types come back. So a program can return a wrong value; it cannot touch the
    comparison, see what is expected or end the tests early. (So a test must not evaluate, or execute, what a program
    returned.)

    The reference is a mapping, further keys are ignored:

    - ``{"prompt", "test", "entry_point"}``: HumanEval. ``test`` defines ``check(candidate)``, which is one test. Helpers
      that the prompt defines are ours when the test calls them.
    - ``{"tests": [...], "setup": "..."}`` or with MBPP's names ``test_list`` and ``test_setup_code``: every text is a
      test. A name that they use and do not define is the program's, if it is not a builtin; a standard module that they
      take an attribute of is ours. If builtins are all they use, and only one, the program is asked for that.
      A star import of ``setup`` does not hide the program's name where they use only one; of more, those it gives are ours.
    - ``{"inputs": [...], "outputs": [...]}``: the program reads an input and prints the output of the same place. White
      space at the ends of lines and blank lines at the end do not count; the program must not end with an error.

    A sample is ungraded if its reference is none of these, if a test does not compile, if a test raises before it asks
    the program anything, or if no test asks it anything: then the fault is not the program's. From the first call on it may
    be (a lie can break any test), so the test counts as failed; so does one that takes too long. A test that hands over what
    cannot cross the pipe, such as a function of its own, leaves the sample ungraded.

    What a program returns crosses as its value: ``None``, numbers, texts, lists, tuples, dicts and sets, and a ``Counter``,
    ``OrderedDict`` or ``defaultdict`` as a dict. Any other object stays where it is and can be called, asked for
    attributes, items, length, truth and text, and iterated. It equals itself. An instance of a subclass of a builtin type (a
    named tuple, an ``IntEnum``), a ``Decimal``, ``Fraction``, ``date`` or ``datetime`` also equals what its value equals:
    the program is asked for the value, and does not learn with what we compare it. No arithmetic is done with an object, it
    is not ordered, and it is asked for no name with double underscores and for no method by which a builtin type says yes or
    no (``startswith``, ``issubset``). What remains is a test that hands what it expects to another method and wants a yes
    (``assert f().matches(5)``): the answer is the program's. Lists, dicts and sets that the program changes in place are
    changed for the test. Exceptions arrive as the builtin kind that they are or derive from.

    Args:
        score: ``"all"`` or ``"share"``.
        seconds: wall-clock limit for all tests of a sample.
        memory_bytes: address space of a program.
        workers: how many programs run at once; by default one for each core that may be used.
        backend: of :class:`rewards.sandbox.Sandbox`.

    ``parts`` are ``correct``, ``passed`` (the share) and ``readable`` (there is a program that compiles). ``info`` has the
    ``stage`` that decided (``program``, ``load`` or ``tests``), the ``outcome``, and ``why`` of the first test that did not
    pass. Outcomes are ``passed``, ``failed``, ``error`` (it raised where nothing was asked of it), ``no program``, or how
    the sandbox ended it: ``time-out``, ``memory``, ``scratch``, ``output``, ``exit``, ``killed``, ``protocol``.

    Raises:
        ValueError: a score or a limit that is none.
        Unavailable: this machine cannot isolate programs; they never run without.

    Example:
        >>> code = Code()
        >>> task = {"tests": ["assert double(4) == 8", "assert double('a') == 'aa'"]}
        >>> programs = ["def double(x):\\n    return 2 * x", "def double(x):\\n    return x ** 1.5", "exit(0)"]
        >>> [score.value for score in code([Sample(prompt="", completion=text, reference=task) for text in programs])]
        [1.0, 0.0, 0.0]
    """

    name = "code"

    def __init__(
        self,
        *,
        score: Literal["all", "share"] = "all",
        seconds: float = 10.0,
        memory_bytes: int = 2**30,
        workers: int | None = None,
        backend: str = "auto",
    ) -> None:
        if score not in ("all", "share"):
            raise ValueError(f"score must be 'all' (1.0 if every test passes) or 'share' (of the tests), got {score!r}")
        self.score = score
        self.sandbox: dict[str, Any] = {"seconds": seconds, "memory_bytes": memory_bytes, "backend": backend}
        open_sandbox(**self.sandbox).close()
        self.judges = Workers(
            "rewards.verifiers.code.judge:judge", seconds=2 * seconds + GRACE, workers=workers or usable_cores()
        )

    def grade(self, completion: str, reference: Any) -> Score:
        return self([Sample(prompt="", completion=completion, reference=reference)])[0]

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        tasks = [read_task(sample.reference) for sample in samples]
        items = [
            {"completion": sample.completion, "task": task, "sandbox": self.sandbox}
            for sample, task in zip(samples, tasks, strict=True)
            if task is not None
        ]
        results = iter(self.judges.map(items))
        return [
            unreadable(sample.reference, wanted=FORMATS) if task is None else self._score(next(results))
            for sample, task in zip(samples, tasks, strict=True)
        ]

    def _score(self, result: Mapping[str, Any] | Failure) -> Score:
        if isinstance(result, Failure) and not result.timed_out:
            return ungraded(result.why)
        if isinstance(result, Failure):
            result = {"passed": 0.0, "outcome": "time-out", "stage": "tests", "why": result.why}
        if result["outcome"] == "broken test":
            return ungraded(f"broken test: {result['why']}")
        passed = result["passed"]
        correct = float(passed == 1.0)
        return Score(
            passed if self.score == "share" else correct,
            {"correct": correct, "passed": passed, "readable": float(result["stage"] != "program")},
            info={key: result[key] for key in ("outcome", "stage", "why")},
        )
