"""Addresses of problems, and the stream that hands them out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.textenv.conftest import Letters
from textenv import Finish, Problem, ProblemStream, Task, Transcript, make_task


def stream(seed=0, task=None, split="train"):
    made = ProblemStream(task or Letters(), split)
    made.start(seed)
    return made


def prompts(drawn):
    return [problem.prompt for problem, _ in drawn]


@pytest.mark.parametrize(
    ("seed", "split", "index", "prompt"),
    [
        (0, "train", 0, "5+2="),
        (0, "train", 1, "8+4="),
        (0, "eval", 0, "5+8="),
        (7, "train", 0, "5+7="),
        (7, "eval", 3, "6+8="),
    ],
)
def test_addresses_are_pinned(seed, split, index, prompt):
    assert make_task("textenv/Arithmetic-v0", digits=1).problem(seed, split, index).prompt == prompt


@given(st.lists(st.integers(1, 5), max_size=6))
def test_however_many_are_taken_at_a_time_the_order_is_one(sizes):
    one, many = stream(), stream()
    alone = [taken for _ in range(sum(sizes)) for taken in one.take(1)]
    assert [taken for size in sizes for taken in many.take(size)] == alone


def test_an_episode_knows_its_address_and_its_place_in_the_group():
    drawn = stream(seed=9, split="eval").take(4, {"repeat": 2, "index": 5})
    assert [address for _, address in drawn] == [(9, 1, 5, 0), (9, 1, 5, 1), (9, 1, 6, 0), (9, 1, 6, 1)]
    assert drawn[0][0] is drawn[1][0]


def test_index_goes_on_from_there():
    one = stream()
    straight = prompts(one.take(6))
    assert prompts(one.take(2, {"index": 2})) == straight[2:4]
    assert prompts(one.take(2)) == straight[4:6]


def test_given_problems_are_used_and_counted():
    one = stream()
    drawn = one.take(4, {"problems": [("ab", "x"), Problem("cd", "y")], "repeat": 2})
    assert prompts(drawn) == ["ab", "ab", "cd", "cd"]
    assert [address for _, address in drawn] == [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 1, 1)]
    assert one.snapshot() == {"seed": 0, "index": 2}


def test_a_failed_take_moves_nothing():
    one = stream()
    one.take(2)
    for options in ({"problems": []}, {"repeat": 3}, {"index": 9, "problems": [("", "")] * 4}):
        with pytest.raises(ValueError, match=r"problem|repeat|prompt"):
            one.take(4, options)
    assert one.snapshot() == {"seed": 0, "index": 2}


def test_a_stream_goes_on_where_another_stood():
    one, other = stream(4), stream(0)
    one.take(3)
    other.restore(one.snapshot())
    assert one.take(3) == other.take(3)


def test_numpy_numbers_become_plain_ones():
    one = stream(np.int64(3))
    one.take(1, {"index": np.int64(2), "repeat": np.int64(1)})
    assert all(type(value) is int for value in one.snapshot().values())


@pytest.mark.parametrize("seed", [-1, 0.5, None, "1"])
def test_impossible_seeds_are_refused(seed):
    with pytest.raises(ValueError, match="a seed is a whole number from 0 on"):
        stream(seed)


def test_nothing_is_taken_before_a_seed():
    with pytest.raises(ValueError, match="there is no seed yet"):
        ProblemStream(Letters(), "train").take(1)


@pytest.mark.parametrize("address", [(-1, "train", 0), (0, "train", -1)])
def test_impossible_addresses_are_refused(address):
    with pytest.raises(ValueError, match="non-negative"):
        Letters().problem(*address)


def test_unknown_splits_are_refused():
    for refused in (lambda: Letters().problem(0, "test", 0), lambda: ProblemStream(Letters(), "test")):
        with pytest.raises(ValueError, match="split must be one of train, eval, got 'test'"):
            refused()


def test_neighbouring_addresses_share_no_randomness():
    class Drawn(Task):
        holdout = 0.0

        def draw(self, rng):
            return f"{rng.integers(2**62)}", None

    task = Drawn()
    addresses = [(seed, split, i) for seed in range(8) for split in ("train", "eval") for i in range(8)]
    assert len({task.problem(*address).prompt for address in addresses}) == len(addresses)


def test_a_task_with_too_few_problems_says_so():
    class One(Letters):
        holdout = 0.5

        def draw(self, rng):
            return "aa", None

    task = One()
    missing = "eval" if task.split_of(Problem("aa")) == "train" else "train"
    with pytest.raises(ValueError, match=f"One drew no problem of the '{missing}' split .* set holdout=0"):
        task.problem(0, missing, 0)


@pytest.mark.parametrize("drawn", ["ab", ("ab",), ("", "x"), (3, "x"), None])
def test_what_is_no_problem_is_refused(drawn):
    class Wrong(Letters):
        def draw(self, rng):
            return drawn

    with pytest.raises(ValueError, match=r"Wrong must draw \(prompt, reference\) with a prompt that is not empty"):
        Wrong().problem(0, "train", 0)


def test_the_chance_of_a_reply_depends_on_episode_and_turn_alone():
    def draw(seed, turns):
        return Transcript(Problem("a"), ("x",) * (turns + 1), ("y",) * turns, Finish.EOS, seed).rng.integers(2**62)

    assert draw((1, 0, 2, 0), 1) == draw((1, 0, 2, 0), 1)
    assert len({draw((1, 0, 2, copy), turns) for copy in range(3) for turns in range(3)}) == 9
