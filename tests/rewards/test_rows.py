"""Rows of data: the same ones whatever the file format, and a clear error for data that cannot be read."""

import gzip
import json
import sys
from types import SimpleNamespace

import pytest

from rewards.rows import read_rows
from tests.rewards.files import WRITERS, gzipped, write_bytes, write_jsonl

ROWS = [{"q": f"What is {n} + 1?", "a": str(n + 1), "extra": 'a "quoted", one\nin two lines'} for n in range(40)]


def rows_of(data):
    return [row for _, row in read_rows(data)]


# Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_format_gives_the_same_rows_with_their_numbers(tmp_path, suffix, zipped):
    path = WRITERS[suffix](tmp_path / f"data{suffix}", ROWS)
    assert list(read_rows(gzipped(path) if zipped else path)) == list(enumerate(ROWS, start=1))


def test_a_path_may_be_text_and_its_suffix_in_capitals(tmp_path):
    assert rows_of(str(write_jsonl(tmp_path / "DATA.JSONL", ROWS))) == ROWS


def test_a_json_file_holds_rows_or_is_one(tmp_path):
    path = tmp_path / "data.json"
    for content in (ROWS, ROWS[0]):
        path.write_text(json.dumps(content), encoding="utf-8")
        assert rows_of(path) == (content if isinstance(content, list) else [content])


def test_a_folder_is_all_its_json_files_in_the_order_of_their_paths(tmp_path):
    for place, row in zip(("b/1", "a/2", "a/10"), ROWS, strict=False):
        path = tmp_path / f"{place}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(row), encoding="utf-8")
    (tmp_path / "README.md").write_text("no data")
    read = list(read_rows(str(tmp_path)))
    assert read == [("a/10.json:1", ROWS[2]), ("a/2.json:1", ROWS[1]), ("b/1.json:1", ROWS[0])]


def test_only_newlines_part_the_rows_of_a_jsonl_file_and_rows_are_numbered_by_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"q": "one\u2028two"}\r\n\n{"q": "three"}', encoding="utf-8-sig")
    assert list(read_rows(path)) == [(1, {"q": "one\u2028two"}), (3, {"q": "three"})]


def test_blank_lines_of_a_csv_are_no_rows(tmp_path):
    assert list(read_rows(write_bytes(tmp_path / "data.csv", b"q\n1\n\n2\n\n"))) == [(1, {"q": "1"}), (2, {"q": "2"})]


# Errors -----------------------------------------------------------------------------------------------------------

GOOD = '{"q": "1+1", "a": "2"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("json.jsonl", GOOD + GOOD + '{"q": ', r"json.jsonl, row 3: not JSON"),
        ("blank.jsonl", GOOD + "\n[", r"blank.jsonl, row 3: not JSON"),
        ("comma.csv", "q,a\n1,2\n1,2,3\n", r"comma.csv, row 2: wanted 2 cells as in the header, got 3"),
        ("short.csv", "q,a\n1\n", r"short.csv, row 1: wanted 2 cells as in the header, got 1"),
        ("quote.csv", 'q,a\n1,2\n"1"x,2\n', r"quote.csv, row 2: not csv"),
        ("latin.csv", "q,a\né,2\n".encode("latin-1"), r"latin.csv must be UTF-8 text"),
        ("broken.parquet", b"PAR1 not really", r"broken.parquet is not a parquet file that can be read"),
        ("plain.jsonl.gz", GOOD, r"plain.jsonl.gz is not a whole gzip file"),
        ("cut.jsonl.gz", gzip.compress(GOOD.encode(), mtime=0)[:-9], r"cut.jsonl.gz is not a whole gzip file"),
        ("cut.json", '[{"q": ', r"cut.json is not JSON"),
        (
            "data.txt",
            GOOD,
            r"data files end with .jsonl, .csv, .parquet, .json, each with .gz or without, got .*data.txt",
        ),
    ],
)
def test_data_that_cannot_be_read_is_refused_with_file_and_row(tmp_path, name, content, message):
    path = write_bytes(tmp_path / name, content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        rows_of(path)


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the folder .* has no .json file in it; give one that has, or a data file"):
        rows_of(tmp_path)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.csv.gz", "folder/missing.parquet"])
def test_a_file_that_is_missing_is_never_looked_for_on_the_hub(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=pytest.fail))
    with pytest.raises(FileNotFoundError, match="no data file"):
        rows_of(name)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'data.parquet needs pyarrow: pip install "textenv\[parquet\]"'):
        rows_of(write_bytes(tmp_path / "data.parquet", b"PAR1"))


# The hub ----------------------------------------------------------------------------------------------------------


def test_the_hub_without_datasets_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "textenv\[hub\]"; without the hub give .* or "sample"'):
        rows_of("me/sums")


@pytest.mark.parametrize(
    ("data", "asked"),
    [
        ("me/sums", ("me/sums", None, "train")),
        ("me/sums:main", ("me/sums", "main", "train")),
        ("me/sums@test", ("me/sums", None, "test")),
        ("me/sums:main@train+test", ("me/sums", "main", "train+test")),
    ],
)
def test_a_hub_name_says_configuration_and_split(monkeypatch, data, asked):
    def load_dataset(name, config, split):
        assert (name, config, split) == asked
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(read_rows(data)) == list(enumerate(ROWS, start=1))


def test_a_hub_that_fails_says_which_dataset(monkeypatch):
    def load_dataset(name, config, split):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match="the hub's dataset 'me/sums' cannot be loaded: no network; without the hub"):
        rows_of("me/sums")
