"""The vector environments against Gymnasium's own SyncVectorEnv, and what they add."""

import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from tests.textenv.conftest import EOS, IDS, LEVELS, PerToken, ids, options_of
from textenv import Problem, make_task

MODES = tuple(AutoresetMode)


def ours_and_theirs(id, level, mode, num=3, **options):
    """Our vector environment, and Gymnasium's over as many of our single ones."""
    ours = gym.make_vec(id, num_envs=num, level=level, autoreset_mode=mode, **options)
    theirs = SyncVectorEnv(
        [lambda: gym.make(id, level=level, **options).unwrapped for _ in range(num)], autoreset_mode=mode
    )
    return ours, theirs


def assert_same(want, got):
    """Equal infos or observations, by value; in an info what counts is where its mask says that there is something."""
    assert set(want) == set(got)
    for name in want:
        if isinstance(want[name], dict):
            assert_same(want[name], got[name])
        elif name == "final_obs":
            for one, other in zip(want[name], got[name], strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    assert_same(one, other)
        else:
            there = want.get(f"_{name}", slice(None))
            assert want[name][there].tolist() == got[name][there].tolist(), name


def random_actions(envs, rng):
    """Mostly short completions, so that many episodes end within a test."""
    space = envs.single_action_space
    width = space.n if envs.unwrapped.level == "token" else space.nvec[0]
    shape = (envs.num_envs,) if envs.unwrapped.level == "token" else (envs.num_envs, len(space.nvec))
    return np.where(rng.random(shape) < 0.3, EOS, rng.integers(1, width, shape))


# As Gymnasium has it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("id", IDS)
def test_stepping_is_gymnasiums_own(id, level, mode):
    ours, theirs = ours_and_theirs(id, level, mode, **options_of(id))
    rng = np.random.default_rng(0)
    for envs in (ours, theirs):
        assert envs.metadata["autoreset_mode"] is mode
    for want, got in zip(theirs.reset(seed=[3, 1, 4]), ours.reset(seed=[3, 1, 4]), strict=True):
        assert_same(want, got)
    for _ in range(12):
        actions = random_actions(ours, rng)
        want, got = theirs.step(actions), ours.step(actions)
        assert_same(want[0], got[0])
        for ours_N, theirs_N in zip(got[1:4], want[1:4], strict=True):
            np.testing.assert_array_equal(ours_N, theirs_N)
            assert ours_N.dtype == theirs_N.dtype
        assert_same(want[4], got[4])
        done = want[2] | want[3]
        if mode is AutoresetMode.DISABLED and done.any():
            both = [envs.reset(options={"reset_mask": done.copy()}) for envs in (theirs, ours)]
            for want, got in zip(*both, strict=True):
                assert_same(want, got)


def test_spaces_are_gymnasiums_own(letters):
    for level in LEVELS:
        ours, theirs = ours_and_theirs(letters, level, AutoresetMode.NEXT_STEP)
        assert ours.observation_space == theirs.observation_space
        assert ours.action_space == theirs.action_space
        assert ours.reset(seed=0)[0] in ours.observation_space


@pytest.mark.parametrize("level", LEVELS)
def test_masked_resets_seed_only_whom_they_reset(letters, level):
    ours, theirs = ours_and_theirs(letters, level, AutoresetMode.DISABLED)
    mask = np.array([True, False, True])
    for options in ({}, {"index": 4}, {"problems": [("ab", "c")]}):
        steps = [
            lambda envs: envs.reset(seed=[1, 2, 3]),
            lambda envs: envs.reset(seed=[7, 8, 9], options={"reset_mask": mask.copy(), **options}),  # noqa: B023
            lambda envs: envs.reset(seed=[None, None, 5]),
            lambda envs: envs.reset(),
        ]
        for step in steps:
            for want, got in zip(step(theirs), step(ours), strict=True):
                assert_same(want, got)


def test_gymnasium_can_vectorise_the_single_environment_itself(letters):
    envs = gym.make_vec(letters, num_envs=2, vectorization_mode="sync", level="token")
    assert isinstance(envs.unwrapped, SyncVectorEnv)
    assert envs.reset(seed=0)[0] in envs.observation_space


# Ours -------------------------------------------------------------------------------------------------------------


def test_one_seed_starts_on_the_first_problems_and_autoreset_goes_on(letters):
    task = make_task(letters)
    envs = gym.make_vec(letters, num_envs=3, level="sequence")
    info = envs.reset(seed=6)[1]
    assert list(info["prompt"]) == [task.problem(6, "train", i).prompt for i in range(3)]
    envs.step(np.array([ids("a...")] * 3))
    info = envs.step(np.array([ids("a...")] * 3))[4]
    assert list(info["prompt"]) == [task.problem(6, "train", i).prompt for i in range(3, 6)]


def test_groups_are_neighbours(letters):
    task = make_task(letters)
    envs = gym.make_vec(letters, num_envs=6)
    options = {"repeat": 3, "index": 5}
    info = envs.reset(seed=6, options=options)[1]
    want = [task.problem(6, "train", 5).prompt] * 3 + [task.problem(6, "train", 6).prompt] * 3
    assert list(info["prompt"]) == want
    assert options == {"repeat": 3, "index": 5}
    info = envs.reset(options={"repeat": 2, "problems": [("aa", "x"), ("bb", "y"), ("cc", "z")]})[1]
    assert list(info["prompt"]) == ["aa", "aa", "bb", "bb", "cc", "cc"]


def test_a_masked_reset_leaves_its_options_and_the_others_alone(letters):
    envs = gym.make_vec(letters, num_envs=3, autoreset_mode="Disabled").unwrapped
    envs.reset(seed=0)
    before = envs.state_key()
    options = {"reset_mask": np.array([False, True, False]), "problems": [("cc", "x")]}
    info = envs.reset(options=options)[1]
    assert set(options) == {"reset_mask", "problems"}
    assert info["_prompt"].tolist() == [False, True, False]
    assert info["prompt"].tolist() == [None, "cc", None]
    assert [envs.state_key()[n] == before[n] for n in range(3)] == [True, False, True]


@pytest.mark.parametrize(
    "mask",
    [[True, False], np.array([1, 0]), np.array([True]), np.array([False, False])],
    ids=["list", "int", "short", "none"],
)
def test_an_impossible_mask_is_refused(letters, mask):
    with pytest.raises(ValueError, match=r"must be a bool array of shape \(2,\) with a True in it"):
        gym.make_vec(letters, num_envs=2).reset(options={"reset_mask": mask})


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        ([1], "one for each of the 2 environments, got 1"),
        ([1, -1], "a seed is a whole number from 0 on, got -1"),
        (-1, "a seed is a whole number from 0 on, got -1"),
    ],
)
def test_impossible_seeds_are_refused(letters, seed, message):
    with pytest.raises(ValueError, match=message):
        gym.make_vec(letters, num_envs=2).reset(seed=seed)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
def test_a_step_before_reset_is_refused(letters, level, mode):
    envs = gym.make_vec(letters, num_envs=2, level=level, autoreset_mode=mode)
    with pytest.raises(ValueError, match=r"call reset\(\) before the first step"):
        envs.step(envs.action_space.sample())


@pytest.mark.parametrize("level", LEVELS)
def test_there_must_be_an_action_for_each_episode(letters, level):
    envs = gym.make_vec(letters, num_envs=2, level=level)
    envs.reset(seed=0)
    for num in (1, 3):
        with pytest.raises(ValueError, match=f"for each of the 2 episodes, got {num}"):
            envs.step(np.zeros((num, *envs.single_action_space.shape), dtype=np.int64))


@pytest.mark.parametrize("level", LEVELS)
def test_disabled_ignores_the_actions_of_finished_episodes(letters, level):
    envs = gym.make_vec(letters, num_envs=2, level=level, autoreset_mode="Disabled").unwrapped
    envs.reset(seed=0)
    end, on = (EOS, 5) if level == "token" else (ids("a..."), ids("cd..")[:4])
    terminated = envs.step(np.array([end, on]))[2]
    assert terminated[0]
    key = envs.state_key()[0]
    for refused in (-5, 10_000):
        envs.reset(options={"reset_mask": np.array([False, True])})
        action = np.array([np.full_like(end, refused), on])
        _, reward, terminated, truncated, info = envs.step(action)
        assert (reward[0], terminated[0], truncated[0]) == (0.0, True, False)
        assert not info.get("_finish", np.zeros(2))[0]
        assert envs.state_key()[0] == key
    while not envs.episodes.done_N.all():
        envs.step(np.array([end, end]))
    assert envs.step(np.array([end, end]))[2].tolist() == [True, True]


@pytest.mark.parametrize("level", LEVELS)
def test_observations_are_fresh_arrays(letters, level):
    envs = gym.make_vec(letters, num_envs=2, level=level)
    first = envs.reset(seed=0)[0]
    kept = {name: array.copy() for name, array in first.items()}
    second = envs.step(envs.action_space.sample())[0]
    for name in kept:
        np.testing.assert_array_equal(first[name], kept[name])
        assert not np.shares_memory(first[name], second[name])
        second[name][:] = 3
    assert (envs.unwrapped.episodes.tokens_NT != 3).any()


def test_infos_keep_floats_and_tell_who_has_what(letters):
    envs = gym.make_vec(letters, num_envs=3, autoreset_mode="Disabled", reward=PerToken())
    problems = [Problem("aa", 1.5, {"x": 1.0}), Problem("bb", "text", {"x": None, "y": [1]}), Problem("cc", {"k": 1})]
    info = envs.reset(seed=0, options={"problems": problems})[1]
    assert info["reference"].tolist() == [1.5, "text", {"k": 1}]
    assert info["x"].tolist() == [1.0, None, None]
    assert info["_x"].tolist() == [True, True, False]
    assert info["y"].tolist() == [None, [1], None]
    info = envs.step(np.array([ids("a..."), ids("bc.."), ids("bcd.")]))[4]
    assert info["ungraded"].dtype == np.float64
    assert info["ungraded"].tolist() == [1.0, 0.0, 0.0]
    assert info["parts"]["length"].tolist() == [0.0, 3.0, 4.0]
    assert info["parts"]["_length"].tolist() == [False, True, True]
    assert info["_parts"].tolist() == [True] * 3
    assert info["credit"].tolist() == [None, (0.0, 1.0, 2.0), (0.0, 1.0, 2.0, 3.0)]
    assert info["error"].tolist() == ["starts with a", None, None]


def test_ansi_renders_every_context(letters):
    envs = gym.make_vec(letters, num_envs=2, render_mode="ansi")
    envs.reset(seed=0, options={"problems": [("ab", ""), ("c", "")]})
    assert envs.render() == ("ab", "c")


# Branching --------------------------------------------------------------------------------------------------------


def future(envs, seed, steps=8):
    rng = np.random.default_rng(seed)
    seen = []
    for _ in range(steps):
        observation, reward, terminated, _, info = envs.step(random_actions(envs, rng))
        prompts = info["prompt"].tolist() if "prompt" in info else None
        seen.append((observation["tokens"].tolist(), reward.tolist(), terminated.tolist(), prompts))
    return seen


@pytest.mark.parametrize("seed", [5, [5, 5, 7]], ids=["shared", "own"])
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("level", LEVELS)
def test_a_snapshot_has_one_future_across_autoresets(dice, level, mode, seed):
    envs, other = (gym.make_vec(dice, num_envs=3, level=level, autoreset_mode=mode).unwrapped for _ in range(2))
    envs.reset(seed=seed)
    future(envs, 0, 3)
    states = json.loads(json.dumps(envs.snapshot()))
    keys = envs.state_key()
    want = future(envs, 1)
    other.reset(seed=[1, 2, 3])
    for restored in (envs, other):
        restored.restore(states)
        assert restored.state_key() == keys
        assert future(restored, 1) == want


def test_states_pass_between_single_and_vector_environments(dice):
    single = gym.make(dice).unwrapped
    envs = gym.make_vec(dice, num_envs=2).unwrapped
    single.reset(seed=4)
    envs.reset(seed=0)
    envs.restore([single.snapshot()] * 2)
    assert envs.state_key() == [single.state_key()] * 2
    envs.reset(seed=9)
    single.restore(envs.snapshot()[1])
    assert single.state_key() == envs.state_key()[1]
    with pytest.raises(ValueError, match="a state for each of the 2 episodes, got 1"):
        envs.restore([single.snapshot()])


def test_forks_go_on_from_one_state_each_with_its_own_chance(dice):
    envs = gym.make_vec(dice, num_envs=2, autoreset_mode="Disabled").unwrapped
    envs.reset(seed=4)
    state = envs.snapshot()[1]

    def replies(seed):
        child = envs.fork(state, 5, seed=seed)
        assert child.state_key() == [envs.state_key()[1]] * 5
        child.step(np.array([ids("a...")] * 5))
        return [heard[0] for heard in child.episodes.replies]

    assert replies(0) == replies(0)
    assert replies(0) != replies(1)
    assert len(set(replies(0))) > 1
    assert envs.fork(state, 1, seed=0).spec == envs.spec


def test_a_single_fork_and_a_vector_fork_hear_the_same(dice):
    single = gym.make(dice).unwrapped
    single.reset(seed=4)
    envs = gym.make_vec(dice, num_envs=1).unwrapped.fork(single.snapshot(), 3, seed=8)
    envs.step(np.array([ids("a...")] * 3))
    alone = single.fork(single.snapshot(), 3, seed=8)
    for env in alone:
        env.step(ids("a..."))
    assert envs.episodes.replies == [env.episodes.replies[0] for env in alone]
