"""What a judge has spent: kept, gone on from, and shared by copies."""

from __future__ import annotations

import copy
import json

import pytest

from rewards import Sample
from rewards.compose import WeightedSum
from rewards.judge import GroupJudge, Judge, PrinciplesJudge, Rubric
from rewards.normalised import Normalised

SAMPLES = [Sample(prompt="What is 6 * 7?", completion=str(answer)) for answer in (41, 42)]
JUDGES = {
    "judge": Judge,
    "group_judge": GroupJudge,
    "principles_judge": PrinciplesJudge,
    "rubric": lambda chat: Rubric(chat, items={"right": (1, "Is it right?")}),
}


@pytest.fixture
def judge(serve, chat):
    """A judge of a server that says 7 to everything, at 15 tokens a call."""
    server = serve(lambda *_: "Score: 7")

    def build(kind="judge", **limits):
        return JUDGES[kind](chat(server, **limits))

    build.server = server
    return build


@pytest.mark.parametrize("kind", JUDGES)
def test_what_was_spent_is_the_state_and_another_goes_on_from_it(judge, kind):
    first = judge(kind)
    assert first.state_dict() == {}
    first(SAMPLES)
    state = json.loads(json.dumps(first.state_dict()))
    assert state == {"calls": len(judge.server.bodies), "tokens": 15 * len(judge.server.bodies)}
    assert state["calls"] >= 2
    second = judge(kind)
    second.load_state_dict(state)
    assert second.state_dict() == state


def test_a_budget_is_one_over_both_lives(judge):
    first = judge(max_calls=3)
    assert [score.value is None for score in first(SAMPLES)] == [False, False]
    second = judge(max_calls=3)
    second.load_state_dict(first.state_dict())
    again = [Sample(prompt="What is 7 * 7?", completion=str(answer)) for answer in (48, 49)]
    assert sorted(score.error or "" for score in second(again)) == ["", "the budget of 3 calls is used up"]
    assert len(judge.server.bodies) == 3


def test_what_parts_have_spent_is_in_the_state_of_the_whole(judge):
    whole = WeightedSum({"first": (1.0, judge()), "exact": 1.0, "second": (1.0, judge())})
    whole(SAMPLES)
    state = whole.state_dict()
    assert state == {name: {"calls": 2, "tokens": 30} for name in ("first", "second")}
    other = WeightedSum({"first": (1.0, judge()), "exact": 1.0, "second": (1.0, judge())})
    other.load_state_dict(state)
    assert other.state_dict() == state


def test_a_copy_spends_of_the_same_budget(judge):
    original = Normalised(judge(max_calls=3))
    twin = copy.deepcopy(original)
    original(SAMPLES)
    assert twin.reward.state_dict() == {"calls": 2, "tokens": 30}
    twin.adapt()
    assert twin.count == 0  # its statistics are its own


def test_what_spends_does_not_adapt(judge):
    spent = judge()
    spent(SAMPLES)
    assert not spent.adapts
    assert not WeightedSum({"judge": (1.0, spent)}).adapts
    assert WeightedSum({"judge": (1.0, Normalised(spent))}).adapts
