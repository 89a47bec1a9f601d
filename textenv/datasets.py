"""Tasks from datasets: jsonl, json, csv and parquet files, folders of json files, and the hub."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rewards.rows import read_rows, row_error
from textenv.task import SPLITS, Finish, Problem, Task, Transcript, as_problem

SAMPLE = "sample"
"""What ``data`` is for the few rows of its own that a task brings along."""
SAMPLES = Path(__file__).parent / "tasks" / "data"
EXAMPLES = "examples"
"""The third side of data that keeps rows apart for worked examples: what :meth:`Task.split_of` calls these."""


class Template:
    """The text of a prompt, with the names of fields in braces: ``"Q: {question}\\nA: "``.

    As in :meth:`str.format` a brace that is meant is doubled, but a field is a plain name. What a field holds is put in
    as it is, braces too.

    Raises:
        ValueError: on construction, when the text is malformed or names no field; on filling, when a field is missing or
            holds no text and no number.

    Example:
        >>> Template("{a}+{b}={{}}").fill({"a": 1, "b": "{a}"})
        '1+{a}={}'
    """

    def __init__(self, text: str) -> None:
        try:
            pieces = list(string.Formatter().parse(text))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"the template {text!r} is malformed ({error}); a brace that is meant is doubled"
            ) from None
        for _, field, spec, conversion in pieces:
            if field is not None and (not field.isidentifier() or spec or conversion):
                raise ValueError(
                    f"the template {text!r} must name its fields as {{name}}, got {{{field}}} or more than a name; "
                    "a brace that is meant is doubled"
                )
        self.pieces = [(literal, field) for literal, field, _, _ in pieces]
        if all(field is None for _, field in self.pieces):
            raise ValueError(f"the template {text!r} names no field, so that all prompts would be one")

    def fill(self, fields: Mapping[str, Any]) -> str:
        return "".join(literal + ("" if field is None else _written(fields, field)) for literal, field in self.pieces)


def _written(fields: Mapping[str, Any], field: str) -> str:
    if field not in fields:
        raise ValueError(f"the template names the field {field!r}, the fields there are {', '.join(map(repr, fields))}")
    if not isinstance(fields[field], str | int | float):
        raise ValueError(f"the template's field {field!r} must hold text or a number, got {str(fields[field])[:60]!r}")
    return str(fields[field])


class DatasetTask(Task):
    """The rows of a dataset as problems.

    Within an epoch every row comes once, in an order shuffled by the seed. Without ``eval_data`` the share ``holdout``
    of the rows is kept for evaluation; rows with the same prompt stay on one side. With ``eval_data`` these are the
    evaluation rows, and training rows that repeat one of their prompts are left out.

    With ``shots`` every prompt begins with the same worked examples: the first rows of the training side, in the order
    of the data, each as its prompt, its demonstration right behind it, and a blank line. They are no problems any more,
    on either side. Which side a row is on does not depend on template and shots.

    Nothing is read before the first problem is asked for; then all rows are, and each is checked.

    Args:
        data: a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file (``.gz`` too), a folder, of which all json files are
            read, or the name of a dataset on the hub: ``owner/name:config@split``, without ``:config`` if it has only
            one, and without ``@split`` for ``train``.
        prompt: name of the field with the prompt.
        answer: name of the field with the reference answer: text, or whatever else the reward wants, such as a number, or
            for ``code`` an object with tests. None in a subclass that reads the reference otherwise.
        eval_data: where the evaluation problems are, in the same form.
        template: the text of a prompt, a :class:`Template` over the fields of a row; default the prompt field alone.
        shots: how many worked examples come before each problem.

    Raises:
        FileNotFoundError: on first use, when there is no such file.
        ImportError: on first use, when a package that reads the data is not installed.
        ValueError: a malformed template, or shots below 0; on first use, when a row lacks a field or holds no text in it
            (the message names file and row), the data cannot be read, a split has no rows, or the training side has
            fewer worked examples than shots.

    Example:
        >>> import json, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "capitals.jsonl")
        >>> _ = path.write_text(json.dumps({"question": "Capital of Peru?", "city": "Lima"}))
        >>> task = DatasetTask(path, prompt="question", answer="city", template="{question} In a word: ")
        >>> task.holdout = 0
        >>> task.problem(seed=0, split="train", index=0)
        Problem(prompt='Capital of Peru? In a word: ', reference='Lima', info={})
    """

    licence = "the dataset's own"
    template: str | None = None
    answer_types: tuple[type, ...] = (str, int, float, list, dict)
    """What the answer field may hold; a subclass that reads text has ``(str,)``."""
    sample: str | None = None
    """The file in :data:`SAMPLES` that ``data="sample"`` stands for, in a task that has one."""

    def __init__(
        self,
        data: str | Path,
        prompt: str,
        answer: str | None,
        eval_data: str | Path | None = None,
        template: str | None = None,
        shots: int = 0,
    ) -> None:
        if not isinstance(shots, int) or shots < 0:
            raise ValueError(f"shots must be a whole number from 0 on, got {shots!r}")
        self.data = data
        if data == SAMPLE and self.sample is not None:
            self.data = SAMPLES / self.sample
            self.licence = "Apache-2.0"
        self.prompt = prompt
        self.answer = answer
        self.eval_data = eval_data
        self.shots = shots
        text = self.template if template is None else template
        self._template = None if text is None else Template(text)
        self._keys: dict[str, str] = {}
        if type(self) is DatasetTask:
            self.__doc__ = f"The rows of {Path(data).name}."

    def fields(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a template can name: the row's fields. A subclass may add some."""
        return row

    def read_prompt(self, row: Mapping[str, Any]) -> str:
        """The prompt that the template makes of a row."""
        return row[self.prompt] if self._template is None else self._template.fill(self.fields(row))

    def read_row(self, row: Mapping[str, Any]) -> Problem | tuple[str, Any]:
        """The problem in a row, whose prompt and answer fields are sure to hold text. A subclass may read more.

        A ``ValueError`` that it raises is reported with the file and the number of the row.
        """
        if self.answer is None:
            raise NotImplementedError(f"{self} names no answer field, so it must define read_row(row) -> Problem")
        return Problem(self.read_prompt(row), row[self.answer])

    def wanted(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is one of the task's; a subclass with options that choose may say no."""
        return True

    def key(self, problem: Problem) -> str:
        """The row's prompt by the task's own template, whatever template and examples are around it now."""
        return self._keys.get(problem.prompt, problem.prompt)

    def problem(self, seed: int, split: str, index: int) -> Problem:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        problems = self._problems[split]
        if not problems:
            raise ValueError(
                f"{self.data} leaves no row for the {split!r} split with holdout={self.holdout}, "
                f"eval_data={self.eval_data} and shots={self.shots}; "
                "give more rows, or holdout=0 to train and evaluate on the same ones"
            )
        epoch, place = divmod(index, len(problems))
        return problems[_order(seed, SPLITS.index(split), epoch, len(problems))[place]]

    def size(self, split: str) -> int:
        return len(self._problems[split])

    def preview(self, split: str) -> Sequence[Problem]:
        return self._problems[split]

    @cached_property
    def _problems(self) -> dict[str, list[Problem]]:
        """The problems of each split."""
        sides = self._sides()
        if self.shots == 0:
            return sides
        shown = (sides.get(EXAMPLES) or sides["train"])[: self.shots]
        if len(shown) < self.shots:
            raise ValueError(f"{self.data} has {len(shown)} rows to show as examples, but shots={self.shots}")
        examples, keys = "".join(map(self._worked, shown)), set(map(self.key, shown))
        return {
            split: [self._with(examples, problem) for problem in problems if self.key(problem) not in keys]
            for split, problems in sides.items()
            if split in SPLITS
        }

    def _sides(self) -> dict[str, list[Problem]]:
        problems = self._load(self.data)
        if self.eval_data is not None:
            held_out = self._load(self.eval_data)
            keys = set(map(self.key, held_out))
            return {"train": [problem for problem in problems if self.key(problem) not in keys], "eval": held_out}
        if self.holdout == 0:
            return dict.fromkeys(SPLITS, problems)
        splits = (*SPLITS, EXAMPLES)
        sides = {split: [problem for problem in problems if self.split_of(problem) == split] for split in splits}
        keys = set(map(self.key, sides["eval"]))  # a subclass may part rows by more than their prompt
        return {**sides, "train": [problem for problem in sides["train"] if self.key(problem) not in keys]}

    def _worked(self, problem: Problem) -> str:
        shown = self.demonstrate(Transcript(problem, (), (), Finish.NONE))
        if shown is None:
            raise ValueError(f"{self} has no worked answers, so it takes no shots")
        return f"{problem.prompt}{shown}\n\n"

    def _with(self, examples: str, problem: Problem) -> Problem:
        shown = replace(problem, prompt=examples + problem.prompt)
        self._keys[shown.prompt] = self.key(problem)
        return shown

    def _load(self, data: str | Path) -> list[Problem]:
        own = None if self.template is None else Template(self.template)
        problems = []
        for number, row in read_rows(data):
            try:
                self._check_row(row)
                if self.wanted(row):
                    problem = as_problem(self.read_row(row), self)
                    self._keys[problem.prompt] = row[self.prompt] if own is None else own.fill(self.fields(row))
                    problems.append(problem)
            except ValueError as error:
                raise row_error(data, number, str(error)) from error
        if not problems:
            raise ValueError(f"{data} has no rows for {self}; a task needs at least one")
        return problems

    def _check_row(self, row: Any) -> None:
        fields = [self.prompt] if self.answer is None else [self.prompt, self.answer]
        if not isinstance(row, Mapping):
            raise ValueError(
                f"wanted an object with the field{'s' * (len(fields) > 1)} {' and '.join(map(repr, fields))}, "
                f"got {str(row)[:60]!r}"
            )
        for field in fields:
            if field not in row:
                raise ValueError(f"wanted the field {field!r}, the fields there are {', '.join(map(repr, row))}")
            if not isinstance(row[field], self.answer_types if field == self.answer else str):
                raise ValueError(f"the field {field!r} must hold text, got {row[field]!r}; write it as text")
            if isinstance(row[field], str) and not row[field].strip():
                raise ValueError(f"the field {field!r} is empty; fill it or take the row out")


@lru_cache(maxsize=8)
def _order(seed: int, split_number: int, epoch: int, n: int) -> np.ndarray:
    """The order of ``n`` rows in an epoch. Neighbouring indices share it, so the last few are kept."""
    return np.random.default_rng([seed, split_number, epoch]).permutation(n)
