"""Text for people, and the KL penalty."""

import gymnasium as gym
import numpy as np
import pytest

from tests.textenv.conftest import EOS, ids
from textenv import KLPenalty, TextView, kl_penalty

V = 14


def logp(context, completion):
    """A policy that prefers ids near the last one: what it thinks depends on the whole past."""
    past = np.concatenate([context, completion])
    places = np.arange(len(context), len(past))
    return -np.abs(past[places] - past[places - 1]) / 7 - places / 100


def reference_logp(context, completion):
    return np.full(len(completion), -np.log(V))


def penalised(id, level, completions, **options):
    """The rewards and log ratios of each step of an episode."""
    env = KLPenalty(gym.make(id, level=level), logp, reference_logp, beta=0.5)
    env.reset(seed=0, options={"problems": [("ab", "ref")]})
    steps = []
    for completion in completions:
        actions = [ids(completion)] if level == "sequence" else ids(completion)
        for action in actions:
            _, reward, _, _, info = env.step(action)
            steps.append((reward, info["kl"]))
    return np.array(steps)


def test_the_penalty_by_hand():
    assert kl_penalty(-1.0, -3.0, 0.1) == pytest.approx(-0.2)
    sure, torn = (lambda context, completion, p=p: np.full(len(completion), np.log(p)) for p in (1.0, 0.5))
    env = KLPenalty(gym.make("textenv/ProbeConstant-v0", level="sequence"), sure, torn, beta=0.1)
    env.reset(seed=0)
    _, reward, _, _, info = env.step([1, 2, EOS])
    assert info["kl"] == pytest.approx(3 * np.log(2))
    assert reward == pytest.approx(1 - 0.3 * np.log(2))


@pytest.mark.parametrize("completions", [["c."], ["cdef"], ["c.", "de.", "b."], ["cd;", "cdef", "."]])
def test_both_levels_take_off_the_same(dialogue, completions):
    by_token, whole = (penalised(dialogue, level, completions) for level in ("token", "sequence"))
    np.testing.assert_allclose(by_token.sum(axis=0), whole.sum(axis=0), rtol=1e-12)
    assert len(by_token) == sum(map(len, completions))
    assert len(whole) == len(completions)


def test_replies_and_what_follows_the_end_cost_nothing(dialogue):
    lengths = []

    def counting(context, completion):
        lengths.append(len(completion))
        return np.zeros(len(completion))

    env = KLPenalty(gym.make(dialogue), counting, reference_logp, beta=1.0)
    env.reset(seed=0)
    env.step(ids("c.dd"))
    env.step(ids("cd;d"))
    assert lengths == [2, 3]


def test_the_penalty_leaves_the_environments_info_and_options(letters):
    env = KLPenalty(gym.make(letters), logp, reference_logp, beta=0.0)
    assert env.reset(seed=0, options={"problems": [("ab", "x")]})[1]["reference"] == "x"
    _, reward, _, _, info = env.step(ids("cd."))
    assert reward == 2.0
    assert info["finish"] == "eos"


# Text -------------------------------------------------------------------------------------------------------------


def test_text_in_and_text_out(letters):
    env = TextView(gym.make(letters))
    text, info = env.reset(seed=0, options={"problems": [("ab", "x")]})
    assert (text, info["prompt"]) == ("ab", "ab")
    assert text in env.observation_space
    text, reward, terminated, truncated, info = env.step("cd")
    assert (text, reward, terminated, truncated) == ("abcd<eos>", 2.0, True, False)
    assert info["view"] == "2 characters encoded to 2 tokens, ended with an end-of-sequence token"


def test_an_answer_is_cut_where_the_budget_ends(letters):
    env = TextView(gym.make(letters))
    env.reset(seed=0)
    text, _, _, _, info = env.step("cdefgh")
    assert text.endswith("cdef")
    assert (info["finish"], info["view"]) == (
        "length",
        "6 characters encoded to 6 tokens, cut at the 4 there is room for",
    )


def test_an_answer_is_cut_where_the_context_ends(dialogue):
    env = TextView(gym.make(dialogue, max_tokens=9))
    env.reset(seed=0, options={"problems": [("abc", "x")]})
    env.step("de")
    text, *_, info = env.step("fghi")
    assert text == "abcde<eos>?fg"
    assert (info["finish"], info["view"]) == (
        "context",
        "4 characters encoded to 4 tokens, cut at the 2 there is room for",
    )


def test_several_turns_show_the_whole_conversation(dialogue):
    env = TextView(gym.make(dialogue))
    env.reset(seed=0, options={"problems": [("a", "x")]})
    text, _, terminated, _, _ = env.step("c")
    assert (text, terminated) == ("ac<eos>?", False)
    assert env.step("b")[2]


def test_text_that_has_no_token_is_refused_and_can_be_said_again(letters):
    env = TextView(gym.make(letters))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="the character 'z'"):
        env.step("z")
    assert env.step("c")[2]


def test_wrappers_say_what_they_wrap():
    with pytest.raises(ValueError, match='level="sequence"'):
        TextView(gym.make("textenv/Copy-v0", level="token"))
    for wrap in (TextView, lambda env: KLPenalty(env, logp, reference_logp, 1.0)):
        with pytest.raises(TypeError, match="wraps a textenv environment, got"):
            wrap(gym.make("CartPole-v1"))


def test_wrappers_stack_and_pass_attributes_on(letters):
    env = TextView(KLPenalty(gym.make(letters), logp, reference_logp, beta=0.5))
    env.reset(seed=0)
    assert "kl" in env.step("cd")[4]
    assert env.get_wrapper_attr("snapshot")()["episode"]["done"] is True
