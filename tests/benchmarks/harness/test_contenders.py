"""Contenders: found by name, held to the same problems and budget, and refused what is not theirs to set."""

import sys
from importlib.metadata import EntryPoint
from itertools import count

import gymnasium as gym
import pytest

from agents.grpo import GRPO
from agents.sft import SFT
from benchmarks.harness import contenders
from benchmarks.harness.contenders import contender_names, find_contender, make_contender
from benchmarks.harness.contenders.agents import Ours
from benchmarks.harness.contenders.evaluated import BestOfN, BestOfPlayer, ChatPlayer, best
from benchmarks.harness.contenders.sb3 import InOrder
from benchmarks.harness.measuring import HELD_OUT_SEED, PolicyPlayer
from benchmarks.harness.suite import Budget, EvaluationPlan
from rewards.judge.chat import BaseChat, Reply
from tests.benchmarks.harness.playground import STEPS, arena, read_json, run
from textenv import Finish, make_task

PLAN = EvaluationPlan(points=2, problems=3, samples=2)
SMALL = {"prompts_per_step": 4, "group_size": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTENV_CACHE", str(tmp_path / "cache"))


# Names and settings


def test_every_name_is_found_without_being_run():
    shipped = {"api", "best-of-n", "dapo", "grpo", "model", "ppo", "raft", "sb3-ppo", "sft", "start"}
    assert shipped | {"trl-grpo", "trl-rloo"} <= set(contender_names())
    assert all(callable(find_contender(name)) for name in shipped)


def test_a_class_is_named_by_its_module_and_gets_the_settings_as_arguments():
    assert make_contender(STEPS, {"each": 7}).each == 7
    with pytest.raises(ValueError, match="has no 'Stepps'"):
        find_contender("tests.benchmarks.harness.playground:Stepps")


def test_a_package_adds_a_contender_by_an_entry_point(monkeypatch):
    entry = EntryPoint("mine", STEPS, contenders.GROUP)
    monkeypatch.setattr(contenders, "entry_points", lambda group: [entry] if group == contenders.GROUP else [])
    assert "mine" in contender_names()
    assert make_contender("mine", {"each": 3}).each == 3


@pytest.mark.parametrize(
    ("kind", "setting", "told"),
    [
        (STEPS, "eech", "did you mean each"),
        ("grpo", "group_sise", "did you mean group_size"),
        ("sb3-ppo", "n_step", "did you mean n_steps"),
        ("best-of-n", "temprature", "did you mean temperature"),
        ("start", "x", "there are none"),
        ("grpo", "seed", "seed is not for grpo to set"),
        ("grpo", "max_new_tokens", "the same for all"),
        ("sb3-ppo", "env", "the same for all"),
    ],
)
def test_a_setting_that_is_not_the_contenders_is_refused_with_the_nearest(kind, setting, told):
    with pytest.raises(ValueError, match=told):
        make_contender(kind, {setting: 1})


def test_the_settings_of_a_server_are_refused_likewise():
    with pytest.raises(ValueError, match="did you mean timeout"):
        make_contender("api", {"model": "m", "base_url": "http://127.0.0.1:1/v1", "timeot": 3})


def test_a_setting_that_is_missing_is_named():
    with pytest.raises(ValueError, match="api wants other settings: missing a required argument: 'base_url'"):
        make_contender("api", {"model": "m"})


def test_a_value_out_of_range_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match="group_size must be 2 or more"):
        make_contender("grpo", {"group_size": 1})
    with pytest.raises(ValueError, match="n_envs must be at least 1"):
        make_contender("sb3-ppo", {"n_envs": 0})


def test_without_trl_its_contenders_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "benchmarks.harness.contenders.trl", raising=False)
    with pytest.raises(ImportError, match=r'pip install "textenv\[trl\]"'):
        find_contender("trl-grpo")


# Our agents


def test_the_learning_rate_falls_only_where_the_last_episode_is_known():
    assert Ours(GRPO).chosen(Budget(episodes=10)) == {}
    assert Ours(GRPO).chosen(Budget(tokens=10)) == {"learning_rate_decay": "constant"}
    with pytest.raises(ValueError, match="'linear', but a budget in seconds"):
        Ours(GRPO, learning_rate_decay="linear").chosen(Budget(seconds=10))


def test_settings_are_told_with_a_hash_of_the_defaults():
    budget = Budget(updates=10)
    small, large = (Ours(GRPO, group_size=size).described(budget) for size in (4, 8))
    assert small.startswith('{"group_size": 4, "learning_rate_decay": "constant"} #')
    assert small.rpartition("#")[2] != large.rpartition("#")[2]


def test_our_agents_train_until_the_budget_is_spent_and_keep_a_run(tmp_path):
    found = run(tmp_path, "grpo", SMALL, budget=Budget(episodes=24))
    assert [(point.episodes, point.share) for point in found] == [(0, 0), (16, 16 / 24), (24, 1)]
    assert found[-1].tokens > 24
    assert found[-1].updates == 3
    assert found[-1].metrics["sampled/kl"] > 0
    config = read_json(tmp_path / "run" / "config.json")
    assert config["settings"]["learning_rate"] == 3e-4  # of the tiny model, though it is loaded from a folder


@pytest.mark.parametrize("budget", [Budget(updates=4), Budget(tokens=20)], ids=["updates", "tokens"])
def test_our_agents_stop_at_other_budgets_too(tmp_path, budget):
    last = run(tmp_path, "grpo", SMALL | {"updates_per_batch": 2}, budget=budget)[-1]
    assert last.share == 1
    assert last.episodes <= 16


def test_another_reward_is_trained_on_and_the_environments_is_measured(tmp_path):
    found = run(tmp_path, "grpo", SMALL | {"reward": "repetition"}, budget=Budget(episodes=8), points=2)
    assert "greedy/reward/repetition" not in found[-1].metrics
    assert read_json(tmp_path / "run" / "config.json")["settings"]["reward"] == "repetition"


def trained_on(folder, kind, settings, monkeypatch):
    """The problems that a cell trains on, in order."""
    asked = []
    task_class = type(make_task("playground/Dialogue-v0"))
    draw = task_class.problem

    def problem(task, seed, split, index):
        if split == "train":
            asked.append((seed, index))
        return draw(task, seed, split, index)

    monkeypatch.setattr(task_class, "problem", problem)
    run(folder, kind, settings, env="playground/Dialogue-v0", seed=1, budget=Budget(episodes=8), points=2)
    return [index for seed, index in asked if seed == 1]


def test_contenders_get_the_same_problems_in_the_same_order(tmp_path, monkeypatch):
    ours = trained_on(tmp_path / "ours", "ppo", {"prompts_per_step": 4}, monkeypatch)
    theirs = trained_on(
        tmp_path / "theirs", "sb3-ppo", {"n_envs": 2, "n_steps": 8, "n_epochs": 1, "batch_size": 16}, monkeypatch
    )
    assert ours == list(range(8))
    assert theirs[:8] == ours


# Stable-Baselines3


def test_environments_side_by_side_share_one_order_of_problems():
    order = count()
    first, second = (InOrder(gym.make("playground/Digits-v0", level="token"), 3, order) for _ in range(2))
    prompts = [env.reset()[1]["prompt"] for env in (first, second, first)]
    task = make_task("playground/Digits-v0")
    assert prompts == [task.problem(3, "train", index).prompt for index in range(3)]


def test_stable_baselines3_spends_a_token_a_step(tmp_path):
    settings = {"n_envs": 4, "n_steps": 8, "batch_size": 16, "n_epochs": 2}
    found = run(tmp_path, "sb3-ppo", settings, budget=Budget(tokens=64))
    assert [(point.tokens, point.updates) for point in found] == [(0, 0), (32, 4), (64, 8)]
    assert 0 < found[1].episodes < 32
    assert found[-1].metrics["sampled/kl"] > 0


# TRL


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trl-grpo", "trl-rloo"])
def test_trl_trains_on_the_same_problems_until_the_budget_is_spent(tmp_path, kind):
    pytest.importorskip("trl")
    settings = {"per_device_train_batch_size": 8, "num_generations": 2, "num_iterations": 2}
    found = run(tmp_path, kind, settings, budget=Budget(episodes=24))
    assert [(point.episodes, point.updates) for point in found] == [(0, 0), (16, 4), (24, 6)]
    assert found[-1].tokens > 24
    assert found[-1].metrics["sampled/kl"] > 0


@pytest.mark.slow
def test_trl_is_given_the_tokens_and_rewards_that_our_agents_get(tmp_path):
    pytest.importorskip("trl")
    from benchmarks.harness.contenders.trl import Asked

    playground = arena(tmp_path)
    asked = Asked(playground.task, playground.policy(), seed=5)
    rows = [row for row, _ in zip(asked.problems(), range(3), strict=False)]
    assert rows == [{"prompt": playground.task.problem(5, "train", index).prompt, "index": index} for index in range(3)]
    encode = playground.start.tokenizer.encode
    assert asked.score([[*encode("4"), 0], encode("412"), encode("7")], [0, 0, 1]) == [1.0, 1.0, 0.0]
    assert (asked.episodes, asked.tokens) == (3, 6)
    assert [asked.sample(ids, 0).finish for ids in ([0], encode("412"))] == ["eos", "length"]


@pytest.mark.slow
def test_trl_refuses_dialogues():
    pytest.importorskip("trl")
    from types import SimpleNamespace

    playground = SimpleNamespace(task=make_task("playground/Dialogue-v0"))
    with pytest.raises(ValueError, match="one turn"):
        make_contender("trl-grpo", {}).train(playground)


# Evaluated only


def test_the_best_is_the_first_of_the_highest_and_never_what_is_ungraded():
    assert best([None, -1.0, 2.0, 2.0]) == 2
    assert best([None, None]) == 0


def test_best_of_n_picks_by_its_reward_among_n(tmp_path):
    playground = arena(tmp_path)
    player = PolicyPlayer(playground.task, playground.start, 0)
    played = BestOfPlayer(player, BestOfN(n=4)).play(PLAN, 2, 1.0)
    (batch,) = player.batches(PLAN, 8, 1.0)
    values = [score.value for score in batch.scores]
    picked = [max(values[first : first + 4]) for first in range(0, 24, 4)]
    assert [answer.score.value for group in played.answers_PG for answer in group] == picked
    assert [len(group) for group in played.answers_PG] == [2, 2, 2]
    assert played.metrics["kl_bound"] == pytest.approx(0.636294, abs=1e-6)


def test_best_of_n_is_measured_by_the_environments_reward_whatever_picks(tmp_path):
    playground = arena(tmp_path)
    player = PolicyPlayer(playground.task, playground.start, 0)
    mean = {
        reward: sum(
            answer.score.value
            for group in BestOfPlayer(player, BestOfN(n=16, reward=reward)).play(PLAN, 2, 1.0).answers_PG
            for answer in group
        )
        for reward in (None, "repetition")
    }
    assert mean[None] > mean["repetition"]


def test_what_is_only_evaluated_has_one_point(tmp_path):
    (point,) = run(tmp_path, "best-of-n", {"n": 2})
    assert (point.share, point.episodes) == (0, 0)
    assert "sampled/kl" not in point.metrics


def test_another_model_is_measured_without_a_kl_to_the_start(tmp_path):
    playground = arena(tmp_path / "other")
    (point,) = run(tmp_path / "cell", "model", {"model": playground.start_folder()})
    assert "sampled/kl" not in point.metrics
    assert point.metrics["sampled/entropy"] > 0


class Scripted(BaseChat):
    """A server that answers by the number of turns so far."""

    def __init__(self, *texts, error=None):
        super().__init__("scripted", None, None, None)
        self.texts, self.error, self.requests = texts, error, []

    def ask(self, requests):
        self.requests += requests
        turn = sum(message["role"] == "assistant" for message in requests[0].messages)
        if self.error is not None:
            return [Reply(error=self.error(i)) if self.error(i) else Reply(self.texts[0]) for i in range(len(requests))]
        return [Reply(self.texts[turn], "length" if turn else "stop", completion_tokens=3) for _ in requests]


def test_a_server_plays_the_held_out_problems_turn_by_turn():
    task = make_task("playground/Dialogue-v0", system="Be brief.")
    chat = Scripted("1", "2", "4")
    played = ChatPlayer(task, chat, {"top_p": 0.5}, seed=1).play(PLAN, 2, 0.7)
    assert [problem.prompt for problem in played.problems] == [
        task.problem(HELD_OUT_SEED, "eval", index).prompt for index in range(3)
    ]
    answer = played.answers_PG[0][0]
    assert (answer.turns, answer.score.value, answer.finish, answer.tokens) == (("1", "2", "4"), 1.0, Finish.LENGTH, 9)
    assert [message["content"] for message in chat.requests[-1].messages] == [
        *("Be brief.", played.problems[-1].prompt, "1", "no.", "2", "no.")
    ]
    assert [request.sampling["seed"] for request in chat.requests[:4]] == [2, 3, 2, 3]
    assert chat.requests[0].sampling | {"seed": 0} == {"temperature": 0.7, "max_tokens": 2, "seed": 0, "top_p": 0.5}


def test_what_a_server_does_not_answer_is_ungraded_and_the_rest_counts():
    chat = Scripted("4", error=lambda i: "time-out" if i == 1 else None)
    played = ChatPlayer(make_task("playground/Digits-v0"), chat, {}, 0).play(PLAN, 1, 0.0)
    scores = [group[0].score for group in played.answers_PG]
    assert [score.value for score in scores] == [1.0, None, 1.0]
    assert scores[1].error == "time-out"


def test_a_server_that_answers_nothing_fails_the_cell():
    chat = Scripted("4", error=lambda i: "no route to host")
    with pytest.raises(RuntimeError, match="no route to host"):
        ChatPlayer(make_task("playground/Digits-v0"), chat, {}, 0).play(PLAN, 1, 0.0)


def test_fine_tuning_counts_what_was_demonstrated(tmp_path):
    assert SFT.name in contender_names()
    found = run(
        tmp_path, "sft", {"prompts_per_step": 4}, env="textenv/ProbeDelayedCopy-v0", budget=Budget(updates=2), points=2
    )
    assert (found[-1].episodes, found[-1].updates) == (8, 2)
