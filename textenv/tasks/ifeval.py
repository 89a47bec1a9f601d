"""Instructions whose keeping can be checked, in the format of IFEval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textenv.datasets import DatasetTask
from textenv.task import Problem, Transcript


class IFEval(DatasetTask):
    """Requests with instructions that a program can check, such as a number of words (Zhou et al., 2023, arXiv:2311.07911).

    The reference is ``{"instruction_id_list", "kwargs"}``, without the arguments that are null. These are evaluation
    problems: ``holdout`` is 0, so that both splits are all of them, and a model that was trained on them must not be
    compared by them. There are no worked answers to show, so no shots either.

    Args:
        data: the official ``input_data.jsonl``; default the hub's; ``"sample"`` for a few requests of our own.
        eval_data: data to evaluate on, for training on other data.
        template: the text of a prompt, over the fields of a row.

    Raises:
        ValueError: on first use, when a row does not have one set of arguments for each of its instructions; else as
            :class:`DatasetTask`.

    Example:
        >>> row = {"prompt": "Say hello without commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        >>> IFEval().read_row(row).reference
        {'instruction_id_list': ['punctuation:no_comma'], 'kwargs': [{}]}
    """

    reward = "ifeval"
    licence = "Apache-2.0"
    max_new_tokens = 1024
    max_tokens = 2048
    holdout = 0.0
    template = "{prompt}"
    sample = "ifeval.jsonl"

    def __init__(
        self, data: str | Path = "google/IFEval", eval_data: str | Path | None = None, template: str | None = None
    ) -> None:
        super().__init__(data, "prompt", None, eval_data, template)

    def read_row(self, row: Mapping[str, Any]) -> Problem:
        ids, arguments = row.get("instruction_id_list"), row.get("kwargs")
        if not (isinstance(ids, list) and isinstance(arguments, list) and 0 < len(ids) == len(arguments)):
            raise ValueError(
                "the fields 'instruction_id_list' and 'kwargs' must hold lists of one length, "
                f"got {str(ids)[:60]} and {str(arguments)[:60]}"
            )
        if not all(isinstance(each, Mapping | None) for each in arguments):
            raise ValueError(f"the field 'kwargs' must hold an object for each instruction, got {str(arguments)[:60]}")
        # In a table every row has all arguments of all instructions, null where they are not its own.
        given = [{name: value for name, value in (each or {}).items() if value is not None} for each in arguments]
        return Problem(self.read_prompt(row), {"instruction_id_list": ids, "kwargs": given})

    def demonstrate(self, transcript: Transcript) -> None:
        return None
