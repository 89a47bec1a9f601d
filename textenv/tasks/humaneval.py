"""Functions to complete, in the format of HumanEval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textenv.datasets import DatasetTask
from textenv.task import Problem, Transcript


class HumanEval(DatasetTask):
    """Python functions to complete, judged by tests (Chen et al., 2021, arXiv:2107.03374).

    The prompt is the head of a function with its docstring; the answer goes on from there, or is the whole function.
    The reference is ``{"prompt", "test", "entry_point"}``; ``demonstrate`` shows the canonical solution. These are
    evaluation problems: ``holdout`` is 0, so that both splits are all of them, and a model that was trained on them must
    not be compared by them.

    Args:
        data: the official ``HumanEval.jsonl.gz``; default the hub's; ``"sample"`` for a few functions of our own.
        template: the text of a prompt, over the fields of a row, e.g. ``"Complete this function:\\n{prompt}"``.
        shots: worked examples before each problem; they are taken out of the problems.

    Raises:
        ValueError: on first use, when a row lacks a field; else as :class:`DatasetTask`.

    Example:
        >>> problem = HumanEval(data="sample").problem(seed=0, split="eval", index=0)
        >>> sorted(problem.reference)
        ['entry_point', 'prompt', 'test']
    """

    reward = "code"
    answer_types = (str,)
    licence = "MIT"
    max_new_tokens = 512
    max_tokens = 2048
    holdout = 0.0
    template = "{prompt}"
    sample = "humaneval.jsonl"

    def __init__(
        self, data: str | Path = "openai/openai_humaneval@test", template: str | None = None, shots: int = 0
    ) -> None:
        super().__init__(data, "prompt", "canonical_solution", template=template, shots=shots)

    def read_row(self, row: Mapping[str, Any]) -> Problem:
        for field in ("test", "entry_point"):
            if not isinstance(row.get(field), str):
                raise ValueError(
                    f"wanted text in the field {field!r}, the fields there are {', '.join(map(repr, row))}"
                )
        reference = {field: row[field] for field in ("prompt", "test", "entry_point")}
        return Problem(self.read_prompt(row), reference, {"solution": row["canonical_solution"]})

    def demonstrate(self, transcript: Transcript) -> str:
        return transcript.problem.info["solution"]
