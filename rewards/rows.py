"""Rows of data, whatever holds them: jsonl, json, csv and parquet files, folders of json files, and the hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Rows = Iterator[tuple[int | str, Any]]
"""Rows with their numbers, in a folder with their files; what each holds is for the reader's caller to check."""


def read_rows(data: str | Path) -> Rows:
    """The rows of a file or of a dataset on the hub, numbered from 1; in a jsonl the numbers are those of the lines.

    A folder is read file by file, in the order of their paths, which then stand in the place of numbers.

    Args:
        data: a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file (``.gz`` too), a folder, of which all json files are
            read, or the name of a dataset on the hub: ``owner/name:config@split``, without ``:config`` if it has only
            one, and without ``@split`` for ``train``.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a package that reads the data is not installed.
        ValueError: the data cannot be read; the message names the file, and the row where one is to blame.
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


def row_error(data: str | Path, number: int | str, why: str) -> ValueError:
    """What to raise for a row that is not as wanted, wherever it was read from."""
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
                raise row_error(path, number, f"not JSON: {error}") from error


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
                raise row_error(path, number, f"wanted {len(fields)} cells as in the header, got {len(cells)}")
            yield number, dict(zip(fields, cells, strict=True))
    except csv.Error as error:
        raise row_error(path, number + 1, f"not csv: {error}") from error


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
