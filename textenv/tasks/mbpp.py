"""Small programs to write, in the format of MBPP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textenv.datasets import EXAMPLES, DatasetTask
from textenv.task import Problem, Transcript

SHOWN, TEST, VALIDATION, TRAIN = range(1, 11), range(11, 511), range(511, 601), range(601, 975)
"""The official parts of the data, by task id."""


class MBPP(DatasetTask):
    """Small Python programs to write, judged by three asserts (Austin et al., 2021, arXiv:2108.07732).

    The prompt is the paper's: the task and its asserts. The reference is ``{"tests", "setup"}``; ``demonstrate`` shows
    the data's own program. Rows are parted by their ``task_id`` as in the paper: 601 to 974 to train on, 11 to 510 to
    test, 511 to 600 to validate, and 1 to 10 for worked examples (taken from the first training rows where the data lacks
    these). With ``holdout=0`` both splits are all rows.

    Args:
        data: the official ``mbpp.jsonl``; default all of the hub's; ``"sample"`` for a few programs of our own.
        evaluate_on: what the ``eval`` split is, ``"test"`` or ``"validation"``.
        template: the text of a prompt, over the fields of a row and ``tests``, the asserts on a line each.
        shots: worked examples before each problem; the paper has 3.

    Raises:
        ValueError: another ``evaluate_on``; on first use, when a row has no whole ``task_id`` or no asserts; else as
            :class:`DatasetTask`.

    Example:
        >>> print(MBPP(data="sample").problem(seed=0, split="train", index=0).reference["tests"][0])
        assert in_binary(10) == "1010"
    """

    reward = "code"
    answer_types = (str,)
    licence = "CC-BY-4.0"
    max_new_tokens = 512
    max_tokens = 2048
    template = (
        "You are an expert Python programmer, and here is your task: {text} "
        "Your code should pass these tests:\n\n{tests}\n"
    )
    sample = "mbpp.jsonl"

    def __init__(
        self,
        data: str | Path = "google-research-datasets/mbpp:full@train+validation+test+prompt",
        evaluate_on: str = "test",
        template: str | None = None,
        shots: int = 0,
    ) -> None:
        if evaluate_on not in ("test", "validation"):
            raise ValueError(f"evaluate_on must be 'test' or 'validation', got {evaluate_on!r}")
        super().__init__(data, "text", "code", template=template, shots=shots)
        self.evaluate_on = evaluate_on

    def fields(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**row, "tests": "\n".join(row["test_list"])}

    def read_row(self, row: Mapping[str, Any]) -> Problem:
        tests, number = row.get("test_list"), row.get("task_id")
        if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
            raise ValueError(f"the field 'test_list' must hold asserts, got {tests!r}")
        if not isinstance(number, int):
            raise ValueError(f"the field 'task_id' must hold a whole number, got {number!r}")
        reference = {"tests": tests, "setup": row.get("test_setup_code") or ""}
        solution = row["code"].replace("\r\n", "\n")
        return Problem(self.read_prompt(row), reference, {"task_id": number, "solution": solution})

    def split_of(self, problem: Problem) -> str:
        """The part of the data that a problem's task id belongs to; none for what is not evaluated on now."""
        evaluated = TEST if self.evaluate_on == "test" else VALIDATION
        parts = {"train": TRAIN, "eval": evaluated, EXAMPLES: SHOWN}
        return next((split for split, part in parts.items() if problem.info["task_id"] in part), "")

    def demonstrate(self, transcript: Transcript) -> str:
        return transcript.problem.info["solution"]
