"""Tasks from datasets: jsonl, json, csv and parquet files, folders of json files, and the hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
import string
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from textenv.task import SPLITS, Finish, Problem, Task, Transcript, as_problem

Rows = Iterator[tuple[int | str, Any]]
"""Rows with their numbers, in a folder with their files; what each holds is checked later, in one place."""

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
        answer: name of the field with the reference answer; None in a subclass that reads the reference otherwise.
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
        return {split: [problem for problem in problems if self.split_of(problem) == split] for split in splits}

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
                raise _row_error(data, number, str(error)) from error
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
            if not isinstance(row[field], str):
                raise ValueError(f"the field {field!r} must hold text, got {row[field]!r}; write it as text")
            if not row[field].strip():
                raise ValueError(f"the field {field!r} is empty; fill it or take the row out")


@lru_cache(maxsize=8)
def _order(seed: int, split_number: int, epoch: int, n: int) -> np.ndarray:
    """The order of ``n`` rows in an epoch. Neighbouring indices share it, so the last few are kept."""
    return np.random.default_rng([seed, split_number, epoch]).permutation(n)


def read_rows(data: str | Path) -> Rows:
    """The rows of a file or of a dataset on the hub, numbered from 1; in a jsonl the numbers are those of the lines.

    A folder is read file by file, in the order of their paths, which then stand in the place of numbers.

    Raises:
        FileNotFoundError, ImportError, ValueError: see :class:`DatasetTask`.
    """
    path = Path(data)
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix in _READERS:
        if not path.is_file():
            raise FileNotFoundError(f"no data file {path} (from {Path.cwd()}); give the path of one that exists")
        return _READERS[suffix](path, _unzip(path) if name.endswith(".gz") else path.read_bytes())
    if path.is_dir():
        return _read_folder(path)
    if isinstance(data, Path) or path.exists():
        raise ValueError(f"data files end with {', '.join(_READERS)}, each with .gz or without, got {path}")
    return _read_hub(data)


def _row_error(data: str | Path, number: int | str, why: str) -> ValueError:
    return ValueError(f"{data}, row {number}: {why}")


def _unzip(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from error


def _read_jsonl(path: Path, content: bytes) -> Rows:
    # Only newlines part rows: str.splitlines would also cut at separators that JSON allows inside a text.
    for number, line in enumerate(_text(path, content).split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise _row_error(path, number, f"not JSON: {error}") from error


def _read_json(path: Path, content: bytes) -> Rows:
    try:
        rows = json.loads(_text(path, content))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    yield from enumerate(rows if isinstance(rows, list) else [rows], start=1)


def _read_folder(folder: Path) -> Rows:
    paths = sorted(folder.rglob("*.json"))
    if not paths:
        raise ValueError(f"the folder {folder} has no .json file in it; give one that has, or a data file")
    for path in paths:
        for number, row in _read_json(path, path.read_bytes()):
            yield f"{path.relative_to(folder)}:{number}", row


def _read_csv(path: Path, content: bytes) -> Rows:
    reader = csv.reader(io.StringIO(_text(path, content), newline=""), strict=True)
    number = 0
    try:
        fields = next(reader, [])
        for number, cells in enumerate((cells for cells in reader if cells), start=1):
            if len(cells) != len(fields):
                raise _row_error(path, number, f"wanted {len(fields)} cells as in the header, got {len(cells)}")
            yield number, dict(zip(fields, cells, strict=True))
    except csv.Error as error:
        raise _row_error(path, number + 1, f"not csv: {error}") from error


def _read_parquet(path: Path, content: bytes) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f'{path} needs pyarrow: pip install "textenv[parquet]"') from error
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet file that can be read: {error}") from error
    yield from enumerate(table.to_pylist(), start=1)


_READERS: dict[str, Callable[[Path, bytes], Rows]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".json": _read_json,
}


_OFFLINE = '; without the hub give a file as data, or "sample" for a task that brings rows of its own along'


def _read_hub(data: str) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f'{data!r} is no data file; to look for it on the hub install datasets: pip install "textenv[hub]"{_OFFLINE}'
        ) from error
    where, _, split = data.partition("@")
    name, _, config = where.partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError) as error:
        raise ValueError(f"the hub's dataset {data!r} cannot be loaded: {error}{_OFFLINE}") from error
    yield from enumerate(dataset, start=1)
