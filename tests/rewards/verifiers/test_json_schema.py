"""JSON and its schemas."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from rewards import Sample, score_samples
from rewards.verifiers import json_schema
from rewards.verifiers.json_schema import JSON, MAX_DEPTH

PERSON = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string", "minLength": 1}, "age": {"type": "integer", "minimum": 0}},
    "additionalProperties": False,
}


def nested(depth: int) -> str:
    return "[" * depth + "1" + "]" * depth


ANY_JSON = [
    "{}",
    "[]",
    "1",
    "-0.5e3",
    '"a"',
    "true",
    "null",
    "1e308",
    "12" * 100,
    '"\\ud800"',
    '"é\ud800"',
    ' {"a": [{}]}\n',
]


@pytest.mark.parametrize("completion", [*ANY_JSON, nested(MAX_DEPTH)])
def test_any_json_is_right_where_there_is_no_schema(completion, grade):
    score = grade(JSON(), completion)
    assert (score.value, score.parts, score.info) == (1.0, {"correct": 1.0, "readable": 1.0}, {})


@pytest.mark.parametrize(
    ("completion", "why"),
    [
        ("", "Expecting value"),
        ("\0", "Expecting value"),
        ("{a: 1}", "Expecting property name"),
        ("{'a': 1}", "Expecting property name"),
        ('{"a": 1,}', "double quotes"),
        ("[1,]", "Expecting value"),
        ("01", "Extra data"),
        ("{} {}", "Extra data"),
        ("{} So.", "Extra data"),
        ("So: {}", "Expecting value"),
        ("```json\n{}\n```", "Expecting value"),
        ('"a\nb"', "Invalid control character"),
        ("// a\n1", "Expecting value"),
        ("NaN", "NaN is no JSON value"),
        ('{"a": [Infinity]}', "Infinity is no JSON value"),
        ("-Infinity", "-Infinity is no JSON value"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "a key stands twice"),
        ("1e309", "beyond the range of a double"),
        ("9" * 5000, "beyond the range of a double"),
        (nested(MAX_DEPTH + 1), "nested deeper than 64"),
        ("[" * 100_000, "nested deeper than 64"),
        ('{"a":' * 100_000, "nested deeper than 64"),
        ('"' + "\\" * 100_000, "Unterminated string"),
    ],
)
def test_what_is_no_json_is_wrong_and_says_why(completion, why, grade):
    score = grade(JSON(), completion)
    assert (score.value, score.parts) == (0.0, {"correct": 0.0, "readable": 0.0})
    assert score.info["wrong"].startswith("no JSON: ")
    assert why in score.info["wrong"]


def test_a_key_may_stand_twice_on_request_and_the_last_counts(grade):
    lenient = JSON({"properties": {"a": {"const": 2}}}, duplicate_keys=True)
    assert [grade(lenient, text).value for text in ('{"a": 1, "a": 2}', '{"a": 2, "a": 1}')] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("{}", 1.0),
        ("```json\n{}\n```", 1.0),
        ("\n```\n{\n}\n```\n", 1.0),
        ("```JSON \n{}\n  ```", 1.0),
        ("So:\n```json\n{}\n```", 0.0),
        ("```json\n{}\n```\nDone.", 0.0),
        ("```json\n{}\n```\n```json\n{}\n```", 0.0),
        ("```python\n{}\n```", 0.0),
        ("```json\n{}", 0.0),
        ("```{}```", 0.0),
        ("```json\n```", 0.0),
    ],
)
def test_a_fence_around_everything_is_accepted_on_request(completion, value, grade):
    assert grade(JSON(fenced=True), completion).value == value


@pytest.mark.parametrize(
    ("completion", "value", "wrong"),
    [
        ('{"name": "Ann", "age": 5}', 1.0, None),
        ('{"name": "Ann", "age": 5.0}', 1.0, None),
        ('{"age": 5}', 0.0, "$: 'name' is a required property"),
        ('{"name": ""}', 0.0, "$.name: '' should be non-empty"),
        ('{"name": "Ann", "age": -1}', 0.0, "$.age: -1 is less than the minimum of 0"),
        ('{"name": "Ann", "age": true}', 0.0, "$.age: True is not of type 'integer'"),
        ('{"name": "Ann", "x": 1}', 0.0, "$: Additional properties are not allowed ('x' was unexpected)"),
        ("[]", 0.0, "$: [] is not of type 'object'"),
    ],
)
@pytest.mark.parametrize("form", ["option", "option as text", "reference", "reference as text"])
def test_the_schema_decides_and_says_what_it_did_not_like(completion, value, wrong, form, grade):
    schema = json.dumps(PERSON) if form.endswith("text") else PERSON
    verifier, reference = (JSON(schema), "ignored") if form.startswith("option") else (JSON(), schema)
    score = grade(verifier, completion, reference)
    assert (score.value, score.parts) == (value, {"correct": value, "readable": 1.0})
    assert score.info == ({"wrong": wrong} if wrong else {})


NO_SCHEMAS = [
    {"type": "text"},
    {"required": "a"},
    {"pattern": "("},
    {"properties": {"a": 5}},
    {"minimum": float("nan")},
]
NO_SCHEMAS += [{"a": {1}}, {"not": json.loads(nested(900))}, [], 5, "", "{", "{'type': 'object'}"]


@pytest.mark.parametrize("schema", NO_SCHEMAS, ids=lambda schema: repr(schema)[:30])
def test_a_schema_that_is_none_is_refused_or_leaves_the_sample_ungraded(schema, grade):
    with pytest.raises(ValueError, match=r"^wanted a JSON schema of draft 2020-12, got "):
        JSON(schema)
    for completion in ("{}", "no JSON"):
        assert grade(JSON(), completion, schema).error.startswith("unreadable reference: wanted a JSON schema")


def test_a_schema_too_deep_to_write_is_ungraded(grade):
    schema = {}
    for _ in range(5000):
        schema = {"not": schema}
    assert grade(JSON(), "{}", schema).error.startswith("unreadable reference: wanted a JSON schema")


def test_references_lead_within_the_schema(grade):
    tree = JSON({"$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, "$ref": "#/$defs/tree"})
    assert [grade(tree, text).value for text in ("[[], [[]]]", "[[], [1]]")] == [1.0, 0.0]
    assert grade(tree, "[" * MAX_DEPTH + "]" * MAX_DEPTH).value == 1.0


def test_nothing_is_fetched(grade):
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        score = grade(JSON({"$ref": f"http://127.0.0.1:{server.server_port}/schema.json"}), "{}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert (score.value, asked) == (None, [])
    assert "a $ref leads nowhere or in a circle" in score.error


@pytest.mark.parametrize("schema", [{"$ref": "#/nowhere"}, {"$ref": "#"}, {"allOf": [{"$ref": "#"}]}], ids=repr)
def test_a_reference_that_leads_nowhere_or_in_a_circle_leaves_the_sample_ungraded(schema, grade):
    error = grade(JSON(schema), "{}").error
    assert error.startswith("validating by the schema failed: ")
    assert "a $ref leads nowhere or in a circle" in error


def test_a_pattern_that_backtracks_is_stopped_on_any_thread_and_the_others_are_scored(monkeypatch):
    monkeypatch.setattr(json_schema, "SECONDS", 0.5)
    verifier = JSON({"pattern": "^(a|aa)+$"})
    samples = [Sample(prompt="", completion=f'"{text}"') for text in ("aaa", "a" * 300 + "!", "b")]
    scores = []
    thread = threading.Thread(target=lambda: scores.extend(score_samples(verifier, samples)))
    thread.start()
    thread.join(timeout=60)
    assert [score.value for score in scores] == [1.0, None, 0.0]
    assert scores[1].error == "validating by the schema failed: took longer than 0.5 s"


def test_a_schema_that_grows_without_bound_is_stopped(monkeypatch, grade):
    monkeypatch.setattr(json_schema, "SECONDS", 0.5)
    doubling = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)} | {"d40": {}}
    assert "took longer" in grade(JSON({"$defs": doubling, "$ref": "#/$defs/d0"}), "1").error


@pytest.mark.parametrize(
    ("factor", "right", "wrong"), [(0.01, "19.99", "19.995"), (0.1, "0.3", "0.35"), (3, "9", "10")]
)
def test_multiples_are_those_of_the_numbers_as_written(factor, right, wrong, grade):
    verifier = JSON({"multipleOf": factor})
    assert [grade(verifier, text).value for text in (right, wrong, '"text"')] == [1.0, 0.0, 1.0]


def test_a_dollar_is_the_end_of_the_text(grade):
    verifier = JSON({"pattern": "^[a-z]+$"})
    assert [grade(verifier, text).value for text in ('"abc"', r'"abc\n"', '"abc1"', "5")] == [1.0, 0.0, 0.0, 1.0]
    assert grade(JSON({"pattern": r"^5\$"}), '"5$ more"').value == 1.0
