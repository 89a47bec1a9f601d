"""Stepping the token-level environment gives the trajectories that a rollout does, and honours limits from outside."""

import math
from itertools import count

import gymnasium as gym
import numpy as np
import pytest
import torch

import textenv
from agents.core.engines.native import NativeEngine
from agents.core.engines.sampling import Uniforms
from agents.core.policy import Policy
from agents.core.rollout import SAMPLING, Rollout
from agents.core.stepping import sampling, step_episodes
from rewards import Reward, Score
from tests.agents.conftest import Undecodable, make_model
from textenv import Finish, Problem, Source, Task
from textenv.tokenizer import CharTokenizer

PROMPTS, GROUP, INDEX, SEED = 5, 3, 7, 4
BEGIN = {"seed": SEED, "options": {"index": INDEX, "repeat": GROUP}}


class Spread(Task):
    """Credits each token of an answer by itself, and cannot grade one with a c in it."""

    holdout = 0
    max_new_tokens, max_tokens = 5, 12

    def draw(self, rng):
        return Problem("b" * int(rng.integers(1, 4)), {"digit": "1", "tries": 2})

    def reward(self, prompt, completion, reference):
        if "c" in completion:
            raise ValueError("nothing to grade")
        size = len(completion) + (len(completion) < self.max_new_tokens)
        return Score(0.1 * size, {"length": len(completion)}, (0.1,) * size, info={"first": completion[:1]})

    def tokenizer(self):
        return CharTokenizer("abc")


class Halves(Task):
    """Stops at a space or an equals sign."""

    holdout = 0
    max_new_tokens, max_tokens = 8, 24
    stop = (" ", "=")

    def draw(self, rng):
        return Problem("12+34"[: rng.integers(2, 6)], "1")

    def tokenizer(self):
        return Undecodable()


class Chat(Task):
    """Three turns, every token of which is paid by its id."""

    holdout, turns = 0, 3
    max_new_tokens, max_tokens = 4, 24

    class Paid(Reward):
        def __call__(self, samples):
            credits = [tuple(0.1 * token - 0.2 for token in sample.tokens) for sample in samples]
            return [Score(math.fsum(credit), tokens=credit) for credit in credits]

    reward = Paid()

    def draw(self, rng):
        return Problem("a")

    def reply(self, transcript):
        return "bcd"

    def tokenizer(self):
        return CharTokenizer("abcd.")


@pytest.fixture(autouse=True, scope="module")
def tasks():
    tasks = {"test/Spread-v0": Spread, "test/Halves-v0": Halves, "test/Chat-v0": Chat}
    for env_id, task in tasks.items():
        textenv.register(env_id, task)
    yield
    for env_id in tasks:
        del textenv.registry[env_id], gym.registry[env_id]


def make_policy(env_id, family="llama"):
    tokenizer = textenv.make_task(env_id).tokenizer()
    # Logits wider than the vocabulary, as models have them.
    return Policy(make_model(family, vocab_size=tokenizer.vocab_size + 2, max_position_embeddings=512), tokenizer)


def make_envs(env_id, policy, num=PROMPTS * GROUP, **options):
    options = {
        "level": "token",
        "autoreset_mode": "Disabled",
        "tokenizer": policy.tokenizer,
        "vocab_size": policy.vocab_size,
    } | options
    return gym.make_vec(env_id, num_envs=num, **options)


def collect(env_id, policy, temperature=1.0, **options):
    rollout = Rollout(textenv.make_task(env_id, **options), NativeEngine(policy), policy, seed=SEED, max_ungraded=0.9)
    return rollout.collect(INDEX, PROMPTS, GROUP, temperature=temperature, seed=(8, 9))


def replaying(batch):
    """Plays what a batch holds, whoever wrote it."""
    rows = np.arange(len(batch))
    tokens_BT, logp_BT = batch.tokens_BT.numpy(), batch.logp_BT.numpy()

    def choose(_, length_N):
        at = rows, np.minimum(length_N, tokens_BT.shape[1] - 1)
        return tokens_BT[at], logp_BT[at]

    return choose


def assert_same(stepped, rolled):
    assert torch.equal(stepped.tokens_BT, rolled.tokens_BT)
    assert torch.equal(stepped.source_BT, rolled.source_BT)
    torch.testing.assert_close(stepped.logp_BT, rolled.logp_BT, rtol=0, atol=1e-5)
    assert torch.equal(stepped.reward_BT, rolled.reward_BT)
    assert torch.equal(stepped.penalty_B, rolled.penalty_B)
    assert torch.equal(stepped.group_B, rolled.group_B)
    assert stepped.finish_B.tolist() == rolled.finish_B.tolist()
    assert stepped.scores == rolled.scores
    assert stepped.prompts == rolled.prompts
    assert stepped.references == rolled.references
    assert stepped.completions == [texts[-1:] for texts in rolled.completions]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "env_id",
    [
        "textenv/ProbeDelayedCopy-v0",
        "textenv/ProbeSubstring-v0",
        "textenv/Arithmetic-v0",
        "test/Spread-v0",
        "test/Halves-v0",
    ],
)
def test_stepping_gives_the_trajectories_of_a_rollout_from_the_same_draws(env_id, family, temperature):
    policy = make_policy(env_id, family)
    uniforms, rows = Uniforms((SAMPLING, 8, 9, 0), PROMPTS * GROUP, 64, policy.device), torch.arange(PROMPTS * GROUP)
    draws = (uniforms.at(rows, torch.full_like(rows, token), token).numpy() for token in range(64))
    stepped = step_episodes(make_envs(env_id, policy), sampling(policy, temperature, draws), **BEGIN)
    assert_same(stepped, collect(env_id, policy, temperature))


def test_the_tasks_above_end_in_every_way_and_credit_and_leave_ungraded():
    batches = [collect(env_id, make_policy(env_id)) for env_id in ("test/Spread-v0", "test/Halves-v0")]
    finishes = {Finish(finish) for batch in batches for finish in batch.finish_B}
    assert finishes == {Finish.EOS, Finish.STOP, Finish.LENGTH}
    assert 0 < batches[0].graded_B.sum() < len(batches[0])
    assert any(score.tokens is not None and len(score.tokens) > 1 for score in batches[0].scores)
    assert all(len(set(batch.length_B.tolist())) > 2 for batch in batches)


@pytest.mark.parametrize(
    ("env_id", "options", "finish"),
    [
        ("textenv/GuessNumber-v0", {}, Finish.LENGTH),
        ("textenv/GuessNumber-v0", {"max_tokens": 90}, Finish.CONTEXT),
        ("test/Chat-v0", {}, Finish.EOS),
        ("textenv/TryAgain-v0", {"inner": "textenv/ProbeSubstring-v0"}, Finish.EOS),
    ],
)
def test_an_engines_completions_of_several_turns_step_to_the_same_trajectories(env_id, options, finish):
    policy = make_policy(env_id)
    rolled = collect(env_id, policy, **options)
    assert (rolled.source_BT == Source.REPLY).any(), "several turns were wanted"
    assert finish in rolled.finish_B
    assert_same(step_episodes(make_envs(env_id, policy, **options), replaying(rolled), **BEGIN), rolled)


def test_stepping_through_several_turns_samples_from_the_policys_own_distribution():
    env_id = "textenv/GuessNumber-v0"
    policy = make_policy(env_id)
    rng = np.random.default_rng(0)
    draws = (rng.random(PROMPTS * GROUP) for _ in count())
    batch = step_episodes(make_envs(env_id, policy), sampling(policy, 0.7, draws), **BEGIN)
    assert (batch.source_BT == Source.REPLY).any(), "several turns were wanted"
    logp_BT, _ = policy.logprobs(batch.tokens_BT, batch.sampled_BT, 0.7)
    torch.testing.assert_close(batch.logp_BT, logp_BT.detach(), rtol=0, atol=1e-5)


class TimeLimit(gym.vector.VectorWrapper):
    """Truncates every episode after some steps, a number or one for each."""

    def __init__(self, envs, steps):
        super().__init__(envs)
        self.steps, self.taken = steps, 0

    def reset(self, **options):
        self.taken = 0
        return super().reset(**options)

    def step(self, actions):
        observation, reward_N, terminated_N, truncated_N, infos = super().step(actions)
        self.taken += 1
        return observation, reward_N, terminated_N, truncated_N | (self.taken >= self.steps), infos


@pytest.mark.parametrize("env_id", ["textenv/ProbeSubstring-v0", "test/Chat-v0"])
def test_a_time_limit_cuts_episodes_that_go_on_and_leaves_the_others_as_they_are(env_id):
    policy, limit_B = make_policy(env_id), torch.tensor([1, 3, 12] * PROMPTS)
    whole = collect(env_id, policy)
    cut = step_episodes(TimeLimit(make_envs(env_id, policy), limit_B.numpy()), replaying(whole), **BEGIN)
    new_B = whole.sampled_BT.sum(dim=1)
    assert 0 < (new_B > limit_B).sum() < len(whole)
    assert cut.sampled_BT.sum(dim=1).tolist() == new_B.minimum(limit_B).tolist()
    for n, over in enumerate((new_B > limit_B).tolist()):
        length = cut.length_B[n]
        assert torch.equal(cut.tokens_BT[n, :length], whole.tokens_BT[n, :length])
        assert cut.finish_B[n] == (Finish.NONE if over else whole.finish_B[n])
        assert cut.scores[n] == (Score(0.0) if over else whole.scores[n])
    assert cut.graded_B.all()
    assert not cut.tokens_BT[cut.source_BT == Source.PAD].any()


def test_an_episode_that_ends_at_the_limit_has_ended():
    env_id = "textenv/ProbeLength-v0"
    policy = make_policy(env_id)
    whole = collect(env_id, policy)
    longest = int(whole.sampled_BT.sum(dim=1).max())
    assert_same(step_episodes(TimeLimit(make_envs(env_id, policy), longest), replaying(whole), **BEGIN), whole)


def test_what_a_wrapper_takes_off_each_step_is_in_the_rewards():
    class Toll(gym.vector.VectorRewardWrapper):
        def rewards(self, reward_N):
            return reward_N - 0.25

    env_id = "textenv/ProbeLength-v0"
    policy = make_policy(env_id)
    whole = collect(env_id, policy)
    batch = step_episodes(Toll(make_envs(env_id, policy)), replaying(whole), **BEGIN)
    torch.testing.assert_close(batch.reward_BT, whole.reward_BT - 0.25 * whole.sampled_BT)
    torch.testing.assert_close(batch.return_B, batch.reward_BT.sum(dim=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "sequence"}, "stepping takes a token-level vector environment of textenv, got .*Sequence"),
        ({"autoreset_mode": "NextStep"}, "got autoreset_mode='NextStep', make them with autoreset_mode=\"Disabled\""),
    ],
)
def test_environments_that_cannot_be_stepped_are_refused(options, message):
    policy = make_policy("textenv/ProbeLength-v0")
    envs = make_envs("textenv/ProbeLength-v0", policy, **options)
    with pytest.raises(ValueError, match=message):
        step_episodes(envs, lambda tokens, length: 1 / 0, seed=0)
