"""Finding and making rewards by name."""

from __future__ import annotations

import re

import pytest

import rewards
from rewards import FunctionReward, Sample, Score
from rewards.verifiers.exact import Exact

BUILT_IN = ["choice", "exact", "format_tags", "last_number", "numeric", "regex"]


def value_of(reward, completion="", reference=None):
    (score,) = reward([Sample(prompt="", completion=completion, reference=reference)])
    return score.value


def full_marks(prompt, completion, reference):
    return 1.0


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_reward_is_made_by_its_name(name):
    assert rewards.make(name).name == name


def test_names_are_sorted():
    rewards.register("aaa", full_marks)
    assert rewards.names() == sorted(rewards.names())
    assert {"aaa", *BUILT_IN} <= set(rewards.names())


def test_options_reach_the_reward():
    assert value_of(rewards.make("exact", ignore_case=True), "YES", "yes") == 1.0


@pytest.mark.parametrize(
    "target", [full_marks, FunctionReward(full_marks), "rewards.verifiers.format_tags:FormatTags", Exact]
)
def test_functions_rewards_classes_and_import_strings_can_be_registered(target):
    rewards.register("mine", target)
    assert isinstance(rewards.make("mine"), rewards.Reward)


def test_a_registered_function_is_called_by_its_registered_name():
    rewards.register("mine", full_marks)
    assert rewards.make("mine").name == "mine"
    assert value_of(rewards.make("mine")) == 1.0


def test_an_import_string_is_imported_only_when_made():
    rewards.register("later", "no_such_package.module:Thing")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        rewards.make("later")


def test_a_name_clash_is_refused_and_the_first_one_stays():
    with pytest.raises(ValueError, match="'exact' is registered already"):
        rewards.register("exact", full_marks)
    assert isinstance(rewards.make("exact"), Exact)


@pytest.mark.parametrize("target", ["rewards.verifiers.exact.Exact", "a:b:c"])
def test_a_malformed_import_string_is_refused(target):
    with pytest.raises(ValueError, match=r"package\.module:Attribute"):
        rewards.register("mine", target)


def test_a_target_that_is_no_reward_is_refused():
    with pytest.raises(TypeError, match="got 3"):
        rewards.register("mine", 3)


def test_an_unknown_name_names_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"no reward is named 'exat'; did you mean 'exact'\? known: choice, code, "):
        rewards.make("exat")
    with pytest.raises(ValueError, match="no reward is named 'zzz'; known: choice"):
        rewards.make("zzz")


def test_an_unknown_option_names_the_ones_there_are():
    with pytest.raises(TypeError, match=r"reward 'numeric': .*'tolerence'; its options are: tolerance=0$"):
        rewards.make("numeric", tolerence=1)
    with pytest.raises(TypeError, match="its options are: none"):
        rewards.make("last_number", strict=True)


def test_a_function_takes_no_options():
    rewards.register("mine", full_marks)
    with pytest.raises(TypeError, match="'mine' takes no options, got scale"):
        rewards.make("mine", scale=2)


def test_the_decorator_registers_under_the_functions_name():
    @rewards.reward
    def half(prompt, completion, reference):
        return 0.5

    assert rewards.make("half") is half
    assert value_of(half) == 0.5


def test_the_decorator_registers_under_a_given_name():
    @rewards.reward(name="quarter")
    def anything(prompt, completion, reference):
        return Score(0.25, {"style": 1.0})

    assert rewards.make("quarter") is anything
    assert anything.name == "quarter"
    assert "anything" not in rewards.names()


def test_as_reward_takes_a_reward_a_name_or_a_function():
    exact = Exact()
    assert rewards.as_reward(exact) is exact
    assert isinstance(rewards.as_reward("exact"), Exact)
    assert value_of(rewards.as_reward(full_marks)) == 1.0


@pytest.mark.parametrize("spec", [None, 1.0, {"exact": 1.0}, Exact])
def test_as_reward_refuses_anything_else(spec):
    with pytest.raises(TypeError, match=r"a registered name, a rewards\.Reward instance or a function"):
        rewards.as_reward(spec)


def test_options_may_follow_a_name_also_those_of_a_mapping():
    assert rewards.as_reward("exact ignore_case true").ignore_case is True
    assert rewards.as_reward(r"regex pattern '\d +x'")([Sample(prompt="", completion="7  x")])[0].value == 1.0
    assert rewards.options.parse_options({"chat.model": "m", "chat.max_calls": "3", "votes": "2"}) == {
        "chat": {"model": "m", "max_calls": 3},
        "votes": 2,
    }


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exact ignore_case", "names and values in turn, got 'ignore_case'"),
        ("exact colour red", "cannot be made with the options ['colour']"),
        ("exactt ignore_case true", "did you mean 'exact'"),
        ("judge", "reward 'judge' cannot be made with the options []"),
        ("", "no reward is named ''"),
    ],
)
def test_a_name_with_options_that_make_no_sense_is_refused_in_words(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rewards.as_reward(spec)


@pytest.mark.parametrize("names", [("chat", "chat.model"), ("chat.model", "chat")])
def test_an_option_is_a_value_or_a_mapping(names):
    with pytest.raises(ValueError, match="the option 'chat' has"):
        rewards.options.parse_options(dict.fromkeys(names, "m"))
