"""The embedded model: taught by demonstrations until there is something to reinforce, then kept."""

import numpy as np
import pytest
import torch

import textenv
from agents import warmup
from agents.core.agent import load_policy
from agents.core.config import AgentConfig
from agents.core.models import build_tiny
from agents.core.policy import Policy
from agents.sft import SFT, SFTConfig
from rewards import Reward, Score
from textenv import Problem, Task


@pytest.fixture(autouse=True)
def own_short_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTENV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(warmup, "MAX_STEPS", 20)
    monkeypatch.setattr(warmup, "PROBES", 16)


def weights(policy):
    return torch.cat([p.flatten() for p in policy.parameters()])


def warmed(env_id="textenv/ProbeDelayedCopy-v0", seed=0):
    return load_policy(env_id, textenv.make_task(env_id), AgentConfig(seed=seed))


def test_it_ends_with_something_right_and_is_kept(monkeypatch):
    first = warmed()
    monkeypatch.setattr(warmup, "warm_up", lambda *a, **k: pytest.fail("warmed up again, though cached"))
    assert torch.equal(weights(first), weights(warmed()))


def test_two_that_make_the_same_model_at_once_leave_one(tmp_path, monkeypatch):
    teach = warmup.warm_up

    def teach_beside_another(*arguments, **options):
        monkeypatch.setattr(warmup, "warm_up", teach)
        monkeypatch.setattr(warmup.os, "getpid", lambda: 2)
        warmed()
        teach(*arguments, **options)

    monkeypatch.setattr(warmup, "warm_up", teach_beside_another)
    first = warmed()
    (kept,) = (tmp_path / "cache").iterdir()
    assert torch.equal(weights(first), weights(warmed()))
    assert (kept / "config.json").exists()


def test_another_seed_or_task_is_another_model():
    first = weights(warmed())
    assert not torch.equal(first, weights(warmed(seed=1)))
    assert not torch.equal(first, weights(warmed("textenv/ProbeSubstring-v0")))


def test_a_task_that_was_edited_is_warmed_up_again():
    class Edited(Task):
        """Says what it is told."""

        max_new_tokens, max_tokens = 3, 16

        def __init__(self, word):
            self.word = word

        def draw(self, rng):
            return Problem(f"{rng.integers(1000)}", self.word)

    names = set()
    for word in ("a", "b"):
        task = Edited(word)
        names.add(warmup._fingerprint("test/Edited-v0", task, task.tokenizer(), 0))
    assert len(names) == 2


def test_another_reward_is_another_warm_up():
    names = set()
    for reward in ("exact", "format_tags"):
        task = textenv.make_task("textenv/Copy-v0", reward=reward)
        names.add(warmup._fingerprint("textenv/Copy-v0", task, task.tokenizer(), 0))
    assert len(names) == 2


def test_a_task_without_demonstrations_starts_from_fresh_weights(capsys):
    policy = warmed("textenv/ProbeConstant-v0")
    assert "starts from fresh weights" in capsys.readouterr().out
    tokenizer = textenv.make_task("textenv/ProbeConstant-v0").tokenizer()
    assert torch.equal(weights(policy), weights(Policy(build_tiny(tokenizer, 0), tokenizer)))


@pytest.mark.slow
def test_a_task_of_several_turns_is_shown_turn_by_turn():
    assert warmed("textenv/GuessNumber-v0") is not None


def test_fine_tuning_learns_what_is_shown(fresh_model, tmp_path):
    config = SFTConfig(
        model=fresh_model("textenv/ProbeDelayedCopy-v0"),
        learning_rate=1e-2,
        total_episodes=3000,
        eval_episodes=32,
        run_dir=str(tmp_path / "run"),
    )
    agent = SFT("textenv/ProbeDelayedCopy-v0", config).learn()
    assert agent.evaluate().reward == 1.0


def test_an_evaluation_of_a_dataset_plays_each_problem_once(fresh_model):
    from agents.core.engines.native import NativeEngine
    from agents.core.evaluate import evaluate
    from agents.core.rollout import Rollout

    task = textenv.make_task("textenv/WordProblems-v0")
    tokenizer = task.tokenizer()
    policy = Policy(build_tiny(tokenizer, 0), tokenizer)
    task.max_new_tokens = 2
    held_out = task.size("eval")
    assert 0 < held_out < 24
    assert evaluate(Rollout(task, NativeEngine(policy), policy, split="eval"), 500).episodes == held_out


def test_intervals_by_hand():
    from agents.core.evaluate import mean_interval, proportion

    # Wilson, 3 of 4: centre (.75 + 1.96²/8)/(1 + 1.96²/4), half width by the formula
    assert np.allclose(proportion(3, 4), (0.75, 0.30064, 0.95441), atol=1e-4)
    assert proportion(0, 0)[1:] == (0.0, 1.0)
    # 400 fair coins: the mean is .5, its standard error sqrt(.25/400) = .025, 1.96 of them .049
    mean, low, high = mean_interval([0.0, 1.0] * 200)
    assert mean == 0.5
    assert abs(low - 0.451) < 0.004
    assert abs(high - 0.549) < 0.004
    assert 0 <= mean_interval([0.0, *[1.0] * 20])[1] <= mean_interval([0.0, *[1.0] * 20])[2] <= 1


@pytest.mark.parametrize("kind", ["waits", "says nothing of right and wrong"])
def test_the_warm_up_does_not_ask_a_judge(kind):
    class Judge(Reward):
        waits = kind == "waits"
        asked = 0

        def __call__(self, samples):
            self.asked += len(samples)
            return [Score(0.9, {"grade": 9.0}) for _ in samples]

    task, judge = textenv.make_task("textenv/ProbeDelayedCopy-v0"), Judge()
    task.reward = judge
    learned = load_policy("textenv/ProbeDelayedCopy-v0", task, AgentConfig())
    assert judge.asked == (0 if judge.waits else warmup.BATCH)
    assert torch.equal(weights(learned), weights(warmed())), "the rule and the demonstrations agree on what is right"
