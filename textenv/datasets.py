"""Tasks from datasets: jsonl, csv and parquet files, and the hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from textenv.task import SPLITS, Problem, Task, as_problem

Rows = Iterator[tuple[int, Any]]
"""Numbered rows; what each holds is checked later, in one place."""


class DatasetTask(Task):
    """The rows of a dataset as problems.

    Within an epoch every row comes once, in an order shuffled by the seed. Without ``eval_data`` the share ``holdout``
    of the rows is kept for evaluation; rows with the same prompt stay on one side. With ``eval_data`` these are the
    evaluation rows, and training rows that repeat one of their prompts are left out.

    Nothing is read before the first problem is asked for; then all rows are, and each is checked.

    Args:
        data: a ``.jsonl``, ``.csv`` or ``.parquet`` file (``.gz`` too), or the name of a dataset on the hub, of which
            the ``train`` split is loaded: ``owner/name``, or ``owner/name:config`` for one that has several
            configurations.
        prompt: name of the field with the prompt.
        answer: name of the field with the reference answer.
        eval_data: where the evaluation problems are, in the same form.

    Raises:
        FileNotFoundError: on first use, when there is no such file.
        ImportError: on first use, when a package that reads the data is not installed.
        ValueError: on first use, when a row lacks a field or holds no text in it (the message names file and row), the
            data cannot be read, or a split has no rows.

    Example:
        >>> import json, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "capitals.jsonl")
        >>> _ = path.write_text(json.dumps({"question": "Capital of Peru?", "city": "Lima"}))
        >>> task = DatasetTask(path, prompt="question", answer="city")
        >>> task.holdout = 0
        >>> task.problem(seed=0, split="train", index=0)
        Problem(prompt='Capital of Peru?', reference='Lima', info={})
    """

    licence = "the dataset's own"

    def __init__(self, data: str | Path, prompt: str, answer: str, eval_data: str | Path | None = None) -> None:
        self.data = data
        self.prompt = prompt
        self.answer = answer
        self.eval_data = eval_data
        if type(self) is DatasetTask:
            self.__doc__ = f"The rows of {Path(data).name}."

    def read_row(self, row: Mapping[str, Any]) -> Problem | tuple[str, Any]:
        """The problem in a row, whose prompt and answer fields are sure to hold text. A subclass may read more.

        A ``ValueError`` that it raises is reported with the file and the number of the row.
        """
        return Problem(row[self.prompt], row[self.answer])

    def problem(self, seed: int, split: str, index: int) -> Problem:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        problems = self._problems[split]
        if not problems:
            raise ValueError(
                f"{self.data} leaves no row for the {split!r} split with holdout={self.holdout} and "
                f"eval_data={self.eval_data}; give more rows, or holdout=0 to train and evaluate on the same ones"
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
        problems = self._load(self.data)
        if self.eval_data is not None:
            held_out = self._load(self.eval_data)
            keys = {self.key(problem) for problem in held_out}
            return {"train": [problem for problem in problems if self.key(problem) not in keys], "eval": held_out}
        if self.holdout == 0:
            return dict.fromkeys(SPLITS, problems)
        return {split: [problem for problem in problems if self.split_of(problem) == split] for split in SPLITS}

    def _load(self, data: str | Path) -> list[Problem]:
        problems = []
        for number, row in read_rows(data):
            try:
                self._check_row(row)
                problems.append(as_problem(self.read_row(row), self))
            except ValueError as error:
                raise _row_error(data, number, str(error)) from error
        if not problems:
            raise ValueError(f"{data} has no rows; a task needs at least one")
        return problems

    def _check_row(self, row: Any) -> None:
        if not isinstance(row, Mapping):
            raise ValueError(
                f"wanted an object with the fields {self.prompt!r} and {self.answer!r}, got {str(row)[:60]!r}"
            )
        for field in (self.prompt, self.answer):
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
    if isinstance(data, Path) or path.exists():
        raise ValueError(f"data files end with {', '.join(_READERS)}, each with .gz or without, got {path}")
    return _read_hub(data)


def _row_error(data: str | Path, number: int, why: str) -> ValueError:
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
}


def _read_hub(data: str) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f'{data!r} is no data file; to look for it on the hub install datasets: pip install "textenv[hub]"'
        ) from error
    name, _, config = data.partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split="train")
    except (OSError, ValueError) as error:
        raise ValueError(f"the hub's dataset {data!r} cannot be loaded: {error}") from error
    yield from enumerate(dataset, start=1)
