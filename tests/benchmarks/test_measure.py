"""Measuring in turns, medians and spread by hand, and processes that measure when they are asked. No test looks at a clock."""

import os
import re
from multiprocessing import active_children

import pytest

from benchmarks import measure
from benchmarks.measure import Peer, Spread, in_turns, machine, medians, ratios, spread


def adder(turn, start):
    """A peer's program: adds up what it is asked."""
    total = start
    request = turn(None)
    while True:
        print("nothing of this is shown")
        total += request
        request = turn((total, os.environ.get("TEXTENV_TEST_PEER")))


def failing(turn):
    turn(None)
    raise ValueError("the reason why")


def ending(turn):
    turn(None)


def test_measures_are_taken_in_turns():
    order = []
    results = in_turns({"a": lambda: order.append("a") or len(order), "b": lambda: order.append("b")}, rounds=3)
    assert order == ["a", "b"] * 3
    assert results["a"] == [1, 3, 5]


def test_measures_taken_in_turns_give_their_medians():
    figures = iter([1, 5, 9, 6, 2, 7])
    assert medians({"a": lambda: next(figures), "b": lambda: next(figures)}, rounds=3) == {"a": 2, "b": 6}


def test_quartiles_lie_between_the_figures():
    assert spread([4.0, 1.0, 3.0, 2.0]) == Spread(1.75, 2.5, 3.25)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)


def test_a_ratio_is_that_of_one_round():
    # The second round was ten times slower for both, which would move a ratio of medians but none of these.
    assert ratios([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == Spread(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0, 2.0], [1.0])


def test_a_spread_is_written_as_median_and_quartiles():
    assert Spread(1234.4, 2345.6, 3000.0).text() == "2,346 [1,234–3,000]"
    assert Spread(0.5, 1.0, 1.25).text("{:.2f}") == "1.00 [0.50–1.25]"


def test_a_peer_measures_when_asked_and_ends_when_closed(capfd):
    with Peer(adder, 100, environment={"TEXTENV_TEST_PEER": "set"}) as peer:
        assert [peer(1), peer(20)] == [(101, "set"), (121, "set")]
    assert "TEXTENV_TEST_PEER" not in os.environ
    assert not active_children()
    assert "nothing of this" not in capfd.readouterr().out


@pytest.mark.parametrize("program", [failing, ending])
def test_a_peer_that_fails_or_ends_is_an_error_and_leaves_no_process(program):
    peer = Peer(program)
    with pytest.raises(RuntimeError, match=rf"measures {program.__name__} ended \(exit status [01]\)"):
        peer()
    assert not active_children()


def test_the_machine_names_the_packages_that_are_there(monkeypatch):
    monkeypatch.setattr(measure, "PEERS", ("numpy", "no-such-package"))
    described = machine()
    assert re.match(r"\d{4}-\d\d-\d\d, .+, \d+ cores, load ", described)
    assert described.count("numpy") == 2
    assert "no-such-package" not in described
