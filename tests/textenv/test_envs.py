"""The single environments: Gymnasium's contract, options, endings and branching."""

import contextlib
import copy
import itertools
import json
import pickle

import gymnasium as gym
import numpy as np
import pytest

from rewards import Score
from tests.textenv.conftest import EOS, IDS, LEVELS, STOP, Letters, PerToken, ids, options_of
from textenv import Problem, make_task
from textenv.checks import check_equivalence, check_gymnasium, check_stable_baselines3


def act(env, completion):
    """Take a whole completion at either level: the last step's answer."""
    if env.unwrapped.level == "sequence":
        return env.step(ids(completion))
    for token in ids(completion):
        answer = env.step(token)
        if answer[2]:
            break
    return answer


@pytest.mark.parametrize("id", IDS)
@pytest.mark.parametrize("check", [check_gymnasium, check_stable_baselines3])
def test_both_public_checkers_pass_without_a_warning(id, check):
    check(id, **options_of(id))


@pytest.mark.parametrize("id", IDS)
def test_all_views_of_a_task_are_one_mdp(id):
    check_equivalence(id, episodes=16, **options_of(id))


def test_the_public_checkers_do_find_faults(monkeypatch):
    from textenv import CheckError, envs

    clock = itertools.count()
    monkeypatch.setattr(envs, "final_info", lambda episodes, n: {"time": float(next(clock))})
    with pytest.raises(CheckError, match="at sequence level"):
        check_gymnasium("textenv/Copy-v0")


def test_observations_are_the_context_its_length_and_what_is_left(letters):
    env = gym.make(letters, level="token")
    observation, _ = env.reset(options={"problems": [("ab", "ref")]}, seed=0)
    assert {name: array.tolist() for name, array in observation.items()} == {
        "tokens": [*ids("ab"), *[0] * 8],
        "length": [2],
        "left": [4],
    }
    observation = env.step(ids("c")[0])[0]
    assert (observation["length"][0], observation["left"][0]) == (3, 3)
    observation = env.step(EOS)[0]
    assert (observation["length"][0], observation["left"][0]) == (4, 0)
    assert observation in env.observation_space


@pytest.mark.parametrize("level", LEVELS)
def test_the_budget_terminates_and_never_truncates(letters, level):
    env = gym.make(letters, level=level)
    env.reset(seed=0)
    _, reward, terminated, truncated, info = act(env, "defg")
    assert (reward, terminated, truncated, info["finish"]) == (4.0, True, False, "length")
    assert type(reward) is float
    assert type(terminated) is type(truncated) is bool


def test_a_limit_from_outside_truncates(letters):
    env = gym.make(letters, level="token", max_episode_steps=2)
    env.reset(seed=0)
    assert env.step(4)[2:4] == (False, False)
    assert env.step(4)[2:4] == (False, True)


@pytest.mark.parametrize("level", LEVELS)
def test_info_is_told_in_floats_and_plain_data(letters, level):
    env = gym.make(letters, level=level, reward=PerToken())
    reset_info = env.reset(seed=0, options={"problems": [Problem("ab", ["x"], {"level": 3})]})[1]
    assert reset_info == {"prompt": "ab", "reference": ["x"], "level": 3}
    info = act(env, "cd.")[4]
    assert info == {
        "finish": "eos",
        "completion": "cd",
        "reference": ["x"],
        "parts": {"length": 3.0},
        "ungraded": 0.0,
        "new_tokens": 3.0,
        "turns": 1.0,
        "credit": (0.0, 1.0, 2.0),
    }
    assert all(type(info[name]) is float for name in ("ungraded", "new_tokens", "turns"))


@pytest.mark.parametrize("level", LEVELS)
def test_an_ungraded_answer_is_told_apart_from_a_zero(letters, level):
    env = gym.make(letters, level=level, reward=PerToken())
    env.reset(seed=0)
    _, reward, *_, info = act(env, "a.")
    assert (reward, info["ungraded"], info["error"], info["parts"]) == (0.0, 1.0, "starts with a", {})


@pytest.mark.parametrize("level", LEVELS)
def test_what_the_rule_saw_is_told_where_it_says_so(letters, level):
    env = gym.make(letters, level=level, reward=lambda p, c, r: Score(1.0, info={"extracted": c[-1]}))
    env.reset(seed=0)
    assert act(env, "cd.")[4]["verdict"] == {"extracted": "d"}


@pytest.mark.parametrize("level", LEVELS)
def test_what_a_caller_changes_stays_with_the_caller(letters, level):
    problem = Problem("ab", ["x"], {"nested": ["y"]})
    env = gym.make(letters, level=level)
    observation, info = env.reset(seed=0, options={"problems": [problem]})
    for array in observation.values():
        array[:] = 7
    info["reference"].append("spoilt")
    info["nested"].append("spoilt")
    observation, _, _, _, info = act(env, "c.")
    assert observation["length"].tolist() == [4]
    assert info["reference"] == ["x"]
    assert problem == Problem("ab", ["x"], {"nested": ["y"]})


def test_a_finished_episode_and_one_not_begun_take_no_step(letters):
    env = gym.make(letters, level="sequence").unwrapped
    with pytest.raises(ValueError, match="call reset"):
        env.step(ids("a."))
    env.reset(seed=0)
    env.step(ids("a."))
    with pytest.raises(ValueError, match="the episode is done; call reset"):
        env.step(ids("a."))


def test_a_constructor_draws_no_problem(register):
    class Lazy(Letters):
        def draw(self, rng):
            raise AssertionError("too early")

    register("test/Lazy-v0", Lazy)
    for level in LEVELS:
        gym.make("test/Lazy-v0", level=level)
        gym.make_vec("test/Lazy-v0", num_envs=2, level=level)


# Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"digit": 3}, "has no option 'digit'; it has digits, operators, reward"),
        ({"level": "word"}, "level must be one of 'token' or 'sequence', got 'word'"),
        ({"split": "test"}, "split must be one of train, eval, got 'test'"),
        ({"vocab_size": 5}, "a vocabulary of 5 is smaller than the ids"),
        ({"render_mode": "rgb_array"}, "render_mode must be one of ansi.*, got 'rgb_array'"),
        ({"max_new_tokens": 99}, "must be a whole number larger than max_new_tokens=99"),
        ({"reward": "exactly"}, "no reward is named 'exactly'; did you mean 'exact'"),
    ],
)
def test_an_unknown_option_is_refused_in_one_clear_line(make, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        make("textenv/Arithmetic-v0", **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"problem": []}, "reset has no option 'problem'; it has problems, index, repeat"),
        ({"index": -1}, "index is a whole number from 0 on, got -1"),
        ({"index": 1.5}, "index is a whole number from 0 on, got 1.5"),
        ({"repeat": 0}, "repeat is a whole number from 1 on, got 0"),
        ({"repeat": 2}, "repeat=2 must divide the 1 episodes"),
        ({"problems": []}, "must hold 1 problem"),
        ({"problems": ["ab"]}, "must draw .prompt, reference."),
        ({"problems": [("", "ref")]}, "a prompt that is not empty"),
    ],
)
def test_an_impossible_reset_is_refused_and_skips_no_problem(letters, options, message):
    env = gym.make(letters)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.reset(options=options)
    assert env.unwrapped.problems.snapshot() == {"seed": 0, "index": 1}


@pytest.mark.parametrize("seed", [-1, 1.5, "0"])
def test_a_seed_is_a_whole_number_from_0_on(letters, seed):
    with pytest.raises(ValueError, match="a seed is a whole number from 0 on"):
        gym.make(letters).reset(seed=seed)


def test_options_are_forwarded_and_not_changed(letters):
    env = gym.make(letters)
    options = {"index": 3}
    prompt = env.reset(seed=9, options=options)[1]["prompt"]
    assert options == {"index": 3}
    assert prompt == make_task(letters).problem(9, "train", 3).prompt
    assert env.reset()[1]["prompt"] == make_task(letters).problem(9, "train", 4).prompt


def test_seeds_are_kept_and_without_one_a_stream_starts_somewhere(letters):
    env = gym.make(letters)
    first = [env.reset(seed=4 if i == 0 else None)[1]["prompt"] for i in range(5)]
    assert first == [env.reset(seed=4 if i == 0 else None)[1]["prompt"] for i in range(5)]
    unseeded = gym.make(letters).unwrapped, gym.make(letters).unwrapped
    for env in unseeded:
        env.reset()
    assert unseeded[0].problems.seed != unseeded[1].problems.seed


def test_splits_hold_their_own_problems():
    env = gym.make("textenv/Copy-v0", split="eval")
    task = make_task("textenv/Copy-v0")
    assert {task.split_of(Problem(env.reset(seed=0)[1]["prompt"])) for _ in range(10)} == {"eval"}


@pytest.mark.parametrize("level", LEVELS)
def test_ids_without_text_are_refused(letters, level):
    tokenizer = Letters().tokenizer()
    tokenizer.decodable_V = np.arange(tokenizer.vocab_size) != 5
    env = gym.make(letters, level=level, tokenizer=tokenizer, vocab_size=16)
    assert env.action_space.contains(15 if level == "token" else np.full(4, 15))
    for token in (5, 14):
        env.reset(seed=0)
        with pytest.raises(ValueError, match=f"the token id {token} stands for no text"):
            env.step(token if level == "token" else np.full(4, token))


def test_action_masks_are_the_tokens_that_step_takes(letters):
    tokenizer = Letters().tokenizer()
    tokenizer.decodable_V = np.isin(
        np.arange(tokenizer.vocab_size), (EOS, 5, STOP), invert=True
    )  # what ends is taken too
    env = gym.make(letters, level="token", tokenizer=tokenizer, vocab_size=16)
    mask_V = env.get_wrapper_attr("action_masks")()
    taken = []
    for token in range(16):
        env.reset(seed=0)
        with contextlib.suppress(ValueError):
            env.step(token)
            taken.append(token)
    assert np.flatnonzero(mask_V).tolist() == taken
    assert (mask_V.shape, mask_V.dtype) == ((16,), bool)
    assert not gym.make(letters, level="sequence").has_wrapper_attr("action_masks")


# Rendering --------------------------------------------------------------------------------------------------------


def test_ansi_renders_the_context(letters):
    env = gym.make(letters, level="token", render_mode="ansi")
    env.reset(seed=0, options={"problems": [("ab", "ref")]})
    env.step(ids("c")[0])
    assert env.render() == "abc"


def test_human_prints_every_step(letters, capsys):
    env = gym.make(letters, level="token", render_mode="human")
    env.reset(seed=0, options={"problems": [("ab", "ref")]})
    env.step(ids("c")[0])
    assert env.render() is None
    assert capsys.readouterr().out == "ab\nabc\n"


# Branching --------------------------------------------------------------------------------------------------------


def play_on(env, rng, steps=100):
    """Random steps to the end of the episode: what happened."""
    seen = []
    for _ in range(steps):
        action = rng.integers(1, 11) if env.level == "token" else [*rng.integers(1, 11, 2), EOS]
        observation, reward, terminated, _, info = env.step(action)
        seen.append((observation["tokens"].tolist(), reward, terminated, info))
        if terminated:
            return seen
    raise AssertionError("no end")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_snapshot_goes_through_json_and_has_the_same_future(dice, level, steps):
    env = gym.make(dice, level=level).unwrapped
    env.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(steps if level == "sequence" else 3 * steps):  # at token level in the middle of a completion too
        env.step(1 if level == "token" else ids("b."))
    state = json.loads(json.dumps(env.snapshot()))
    key = env.state_key()
    future = play_on(env, np.random.default_rng(1))
    problem_after = env.reset()[1]
    env.reset(seed=8)
    play_on(env, rng)
    elsewhere = gym.make(dice, level=level).unwrapped
    for restored in (env, elsewhere):
        restored.restore(copy.deepcopy(state))
        assert restored.state_key() == key
        assert play_on(restored, np.random.default_rng(1)) == future
        assert restored.reset()[1] == problem_after


def test_a_snapshot_of_one_level_restores_at_the_other(dice):
    token, sequence = (gym.make(dice, level=level).unwrapped for level in LEVELS)
    token.reset(seed=3)
    token.step(1)
    sequence.restore(token.snapshot())
    assert sequence.state_key() == token.state_key()
    sequence.step(ids("a."))
    token.step(1)
    token.step(EOS)
    assert sequence.state_key() == token.state_key()


def test_a_finished_episode_is_restored_with_its_score(letters):
    env = gym.make(letters, reward=PerToken()).unwrapped
    env.reset(seed=0)
    info = env.step(ids("cd."))[4]
    other = gym.make(letters, reward=PerToken()).unwrapped
    other.restore(json.loads(json.dumps(env.snapshot())))
    assert other.episodes.scores == env.episodes.scores
    assert other.episodes.credit(0).tolist() == list(info["credit"])
    with pytest.raises(ValueError, match="the episode is done"):
        other.step(ids("a."))


def replies_of(env):
    while not env.episodes.done_N[0]:
        env.step(ids("b."))
    return env.episodes.replies[0]


def test_forks_share_the_past_and_differ_in_what_chance_brings(dice):
    env = gym.make(dice).unwrapped
    env.reset(seed=3)
    env.step(ids("b."))
    state = env.snapshot()
    forks = env.fork(state, 6, seed=5)
    assert {fork.state_key() for fork in forks} == {env.state_key()}
    futures = [replies_of(fork) for fork in forks]
    assert len({tuple(replies) for replies in futures}) > 1
    assert all(replies[0] == env.episodes.replies[0][0] for replies in futures)
    assert futures == [replies_of(fork) for fork in env.fork(state, 6, seed=5)]
    assert futures != [replies_of(fork) for fork in env.fork(state, 6, seed=6)]
    assert len({fork.reset()[1]["prompt"] for fork in forks}) > 1  # and each goes on to problems of its own
    assert env.episodes.snapshot(0) == state["episode"]


def test_replies_are_random_between_problems_and_group_members(dice):
    envs = gym.make_vec(dice, num_envs=8, autoreset_mode="Disabled").unwrapped
    envs.reset(seed=0, options={"repeat": 4})
    envs.step(np.array([[*ids("b."), 0, 0]] * 8))
    heard = [replies[0] for replies in envs.episodes.replies]
    assert len(set(heard[:4])) > 1
    assert heard[:4] != heard[4:]


# Pickling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_a_spec_can_be_pickled(level):
    spec = gym.make("textenv/Copy-v0", level=level, max_length=4).spec
    env = gym.make(pickle.loads(pickle.dumps(spec)))  # noqa: S301 - our own bytes
    assert env.unwrapped.level == level
    assert env.unwrapped.episodes.task.max_length == 4
    assert env.spec == spec


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_environments_run_in_other_processes(context):
    options = {"num_envs": 2, "level": "token"}
    together = gym.make_vec("textenv/Copy-v0", **options)
    apart = gym.make_vec(
        "textenv/Copy-v0",
        vectorization_mode="async",
        vector_kwargs={"context": context, "shared_memory": True},
        **options,
    )
    try:
        for envs in (together, apart):
            envs.reset(seed=[5, 6])
        for action in ([3, 4], [EOS, 4]):
            want, got = together.step(np.array(action)), apart.step(np.array(action))
            for name, array in want[0].items():
                np.testing.assert_array_equal(got[0][name], array)
            np.testing.assert_array_equal(got[2], want[2])
    finally:
        apart.close()
        apart.close()
