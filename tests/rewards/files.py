"""Files of rows for tests, in every format that is read."""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet


def write_bytes(path, content):
    path.write_bytes(content)
    return path


def write_jsonl(path, rows):
    return write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_json(path, rows):
    return write_bytes(path, json.dumps(rows).encode())


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


WRITERS = {".jsonl": write_jsonl, ".json": write_json, ".csv": write_csv, ".parquet": write_parquet}


def gzipped(path):
    return write_bytes(path.with_name(path.name + ".gz"), gzip.compress(path.read_bytes()))
