import gzip
import json
from base64 import b64decode
from types import SimpleNamespace

import pytest

from benchmarks.harness.results import load_results
from benchmarks.report.rollouts import (
    GROUP,
    STEPS,
    Allowance,
    Tokenizers,
    TokenTexts,
    evaluation_series,
    held_out_series,
    right_by_group,
    spread,
    training_series,
)
from benchmarks.report_size import write_rows
from tests.benchmarks.report import made_up
from textenv.tokenizer import CharTokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_up.run(tmp_path_factory.mktemp("run"), steps=30)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return load_results(made_up.results(tmp_path_factory.mktemp("results")))


def row(**changes):
    """An episode: a prompt of 2 tokens, a completion of 4, its third from the environment."""
    return {
        **{"group": 0, "prompt": "p", "completions": ["abc"], "reference": "abc", "return": 1.0, "parts": {}},
        **{"error": None, "verdict": {}, "finish": "eos", "tokens": [1, 2, 3, 4, 5, 0], "source": [1, 1, 2, 2, 3, 2]},
        **{"logp": [0.0, 0.0, -0.5, -1.23456, 0.0, -1e-6], "reward": [0.0] * 5 + [1.0]},
        **changes,
    }


def one_step(folder, rows, allowance=None, tokenizers=None):
    """The problems that a run with a single step shows."""
    path = folder / "rollouts" / "000001.jsonl.gz"
    path.parent.mkdir(exist_ok=True)
    write_rows(path, rows)
    letters = TokenTexts(CharTokenizer("abcdef"))
    tokenizers = tokenizers or SimpleNamespace(of_run=lambda _: (letters, []))
    return training_series("a", "", folder, allowance or Allowance(), 1, tokenizers).points[0]


def test_steps_are_evenly_spaced_with_the_first_and_the_last(run):
    series = training_series("a", "", run, Allowance(), 1, Tokenizers())
    assert len(series.labels) == STEPS
    assert (series.labels[0], series.labels[-1]) == ("step 1", "step 30")
    assert spread(list(range(5)), 9) == [0, 1, 2, 3, 4]


def test_the_same_seed_shows_the_same_rollouts_and_another_one_others(run):
    def shown(seed):
        return training_series("a", "", run, Allowance(episodes=100, seed=seed), 1, Tokenizers()).packed()

    assert shown(0) == shown(0) != shown(1)


def test_a_problem_that_comes_again_is_shown_again(tmp_path):
    rows = [row(group=i, prompt=f"problem {i}") for i in range(20)]
    few = Allowance(episodes=8)
    first = [problem["prompt"] for problem in one_step(tmp_path, rows, few)]
    others = [row(group=i, prompt=f"other {i}") for i in range(20, 40)]
    second = [problem["prompt"] for problem in one_step(tmp_path, others + rows[::-1], Allowance(episodes=16))]
    assert len(first) == 8
    kept = [prompt for prompt in second if prompt.startswith("problem")]
    assert kept == first[: len(kept)]
    assert kept


def test_no_more_is_shown_than_allowed(tmp_path):
    rows = [row(group=i // 4, prompt=f"problem {i // 4}") for i in range(400)]
    assert sum(len(problem["completions"]) for problem in one_step(tmp_path, rows, Allowance(episodes=50))) == 48
    shown = one_step(tmp_path, rows, Allowance(tokens=300))
    assert sum(len(one["tokens"]) for problem in shown for one in problem["completions"]) <= 300
    (problem,) = one_step(tmp_path, [row() for _ in range(40)])
    assert len(problem["completions"]) == GROUP


def test_of_a_long_completion_the_middle_is_left_out(tmp_path):
    long = row(tokens=[1] * 2 + [2] * 1000, source=[1] * 2 + [2] * 1000, logp=[0.0] * 1002, reward=[0.0] * 1002)
    ((problem,)) = one_step(tmp_path, [long], Allowance(tokens=100))
    one = problem["completions"][0]
    assert len(one["tokens"]) == len(one["ids"]) == len(one["values"]["logp"]) == 200
    assert (one["left_out"], one["left_out_at"], one["length"]) == (800, 100, 1000)


def test_a_completion_shows_its_tokens_and_what_was_kept_for_each(tmp_path):
    (problem,) = one_step(tmp_path, [row(advantage=[0, 0, 0.5, 0.5, 0, 0.5], kl=[0, 0, float("nan"), 1, 0, 1])])
    (one,) = problem["completions"]
    assert one["tokens"] == ["c", "d", "e", "<eos>"]
    assert one["sampled"] == [1, 1, 0, 1]
    assert one["values"] == {
        "advantage": [0.5, 0.5, 0, 0.5],
        "logp": [-0.5, -1.23, 0, 0],
        "kl": [None, 1, 0, 1],
        "credit": [0, 0, 0, 1],
    }


def test_only_what_was_kept_is_offered(run, tmp_path):
    assert training_series("a", "", run, Allowance(), 1, Tokenizers()).modes == [
        *("advantage", "logp", "entropy", "kl", "ratio", "credit")
    ]
    one_step(tmp_path, [row()])
    letters = TokenTexts(CharTokenizer("abcdef"))
    series = training_series("a", "", tmp_path, Allowance(), 1, SimpleNamespace(of_run=lambda _: (letters, [])))
    assert series.modes == ["logp", "credit"]


@pytest.mark.parametrize(
    ("changes", "correct"),
    [
        ({"return": 1.0}, True),
        ({"return": 0.5}, False),
        ({"return": 0.2, "parts": {"correct": 1.0, "style": 0.0}}, True),
        ({"return": 1.0, "parts": {"style": 1.0}}, None),
        ({"return": None}, None),
    ],
)
def test_right_and_wrong_are_told_as_scores_tell_them(tmp_path, changes, correct):
    (problem,) = one_step(tmp_path, [row(**changes)])
    assert problem["completions"][0]["correct"] is correct
    told = right_by_group(tmp_path / "rollouts" / "000001.jsonl.gz")
    assert told == ([] if correct is None else [[correct]])


def test_without_a_checkpoint_completions_are_texts_and_the_page_says_why(tmp_path):
    made_up.without_tokenizer(made_up.run(tmp_path))
    series = training_series("a", "", tmp_path, Allowance(), 1, Tokenizers())
    assert "no checkpoint" in series.notes[0]
    assert series.modes == []
    assert series.points[0][0]["completions"][0]["text"].startswith("let me add")


def test_a_character_of_several_tokens_is_the_text_of_the_last():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    ids = list("aé€😀b".encode())
    texts = TokenTexts(Bytes()).texts(ids, 1, len(ids))
    assert texts == ["", "é", "", "", "€", "", "", "", "😀", "b"]


def test_bytes_that_are_no_character_are_shown_as_such():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    texts = TokenTexts(Bytes()).texts([97, 0xFF, 0xFF, 98, 0xFF], 0, 5)
    assert "".join(texts) == "a\ufffd\ufffdb\ufffd"
    # No character has more than four bytes, so that nothing is waited for any longer.
    assert TokenTexts(Bytes()).texts([0xFF] * 6, 0, 6) == ["", "", "", "\ufffd" * 4, "", "\ufffd" * 2]


def test_a_token_that_decodes_otherwise_behind_another_keeps_its_space():
    class Words:
        def decode(self, ids):
            return " ".join("ab"[i] for i in ids)

    assert TokenTexts(Words()).texts([0, 1, 0], 0, 3) == ["a", " b", " a"]


def test_a_broken_rollout_is_named_and_left_out(tmp_path):
    made_up.run(tmp_path)
    broken = tmp_path / "rollouts" / "000002.jsonl.gz"
    broken.write_bytes(broken.read_bytes()[:-40])
    (tmp_path / "rollouts" / "000003.jsonl.gz").write_bytes(gzip.compress(b"[1]\n"))
    series = training_series("a", "", tmp_path, Allowance(), 1, Tokenizers())
    assert series.labels == ["step 1", "step 4"]
    assert [note.split()[0] for note in series.notes] == ["000002.jsonl.gz", "000003.jsonl.gz"]


def test_what_is_packed_comes_back_whole(run):
    series = training_series("a", "", run, Allowance(), 1, Tokenizers())
    assert json.loads(gzip.decompress(b64decode(series.packed()))) == series.points


def test_held_out_problems_are_the_same_for_all_cells_and_points(results):
    all_series = list(held_out_series(results.cells, Allowance(completions=1000)))
    shown = {tuple(problem["prompt"] for problem in point) for series in all_series for point in series.points}
    assert len(all_series) == 6
    assert len(shown) == 1
    assert len({series.group for series in all_series}) == 1
    (prompts,) = shown
    assert len(prompts) == 4
    one = all_series[0].points[0][0]["completions"]
    assert [answer["label"] for answer in one] == ["greedy"] + ["sampled"] * 8
    assert {answer["correct"] for answer in one} <= {True, False}


def test_a_broken_file_of_completions_is_named_and_left_out(tmp_path):
    folder = made_up.results(tmp_path / "results")
    cell = folder / "cells" / "sums" / "agent-0" / "0"
    (cell / "completions" / "001.jsonl.gz").write_bytes(b"\x1f\x8b broken")
    series = next(held_out_series(load_results(folder).cells, Allowance()))
    assert series.labels == ["0% of the budget", "50% of the budget", "75% of the budget", "100% of the budget"]
    assert "001.jsonl.gz" in series.notes[0]


def test_an_evaluation_shows_the_answers_that_it_kept():
    sample = {"prompt": "1+1=", "completions": ["2", "3"], "reference": "2", "reward": None, "finish": "eos"}
    series = evaluation_series({"before": SimpleNamespace(samples=[sample])})
    (one,) = series.points[0][0]["completions"]
    assert (one["text"], one["error"], one["reward"]) == ("2\n3", "ungraded", None)
    assert evaluation_series({}) is None
