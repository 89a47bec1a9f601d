"""Where results come from: what is the same reads the same, and what differs does not."""

import threading
from dataclasses import replace

import pytest
import torch

import rewards
from benchmarks.harness.provenance import as_json, digest, provenance
from benchmarks.harness.records import Cell
from benchmarks.harness.suite import Budget
from rewards import Reward, Score
from rewards.judge.client import Chat
from rewards.judge.pointwise import Judge
from tests.benchmarks.harness.playground import arena, suite
from textenv import Problem, make_task

CELL = Cell("toy", "agent", 0)
PARTS = ["environment", "task", "reward", "verifier", "tokenizer", "model"]
PARTS += ["budget", "evaluation", "settings", "libraries", "hardware"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTENV_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def start(tmp_path):
    return arena(tmp_path / "cell").start


def task_of(given):
    spec = given.environments["toy"]
    return make_task(spec.id, **spec.options)


def told(policy, task=None, **given):
    made = suite(**given)
    return provenance(made, CELL, task or task_of(made), policy)


def differ(one, other):
    assert list(one) == list(other) == PARTS
    return [part for part in PARTS if one[part] != other[part]]


def test_the_same_is_the_same(start):
    assert differ(told(start), told(start)) == []


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"options": {"max_new_tokens": 4}}, ["environment", "task"]),
        ({"options": {"reward": "exact"}}, ["environment", "reward", "verifier"]),
        ({"env": "playground/Dialogue-v0"}, ["environment", "task"]),
        ({"budget": Budget(tokens=100)}, ["budget"]),
        ({"samples": 4}, ["evaluation"]),
        ({"kind": "grpo"}, ["settings"]),
        ({"settings": {"x": 1}}, ["settings"]),
    ],
    ids=["limit", "reward", "task", "budget", "evaluation", "kind", "settings"],
)
def test_what_differs_is_told_in_its_own_part(start, given, parts):
    assert differ(told(start), told(start, **given)) == parts


def test_other_problems_are_another_task(start):
    task = make_task("playground/Digits-v0")
    task.draw = lambda rng: Problem(f"{int(rng.integers(1000))}!", None)
    assert differ(told(start), told(start, task)) == ["task"]


def test_other_weights_are_another_model(start, tmp_path):
    before = told(start)
    with torch.no_grad():
        start.model.model.norm.weight[0] += 1e-3
    assert differ(before, told(start)) == ["model"]


class Weighed(Reward):
    name = "weighed"

    def __init__(self, weight, itself=False):
        self._weight = weight
        self.lock, self.itself = threading.Lock(), self if itself else None

    def __call__(self, samples):
        return [Score(self._weight) for _ in samples]


def with_reward(reward):
    task = make_task("playground/Digits-v0")
    task.reward = reward
    return task


def rewards_differ(start, one, other):
    return differ(told(start, with_reward(one)), told(start, with_reward(other)))


def test_the_settings_of_a_reward_belong_to_it_wherever_it_keeps_them(start):
    assert rewards_differ(start, Weighed(1.0), Weighed(1.0)) == []
    assert rewards_differ(start, Weighed(1.0), Weighed(2.0)) == ["reward"]
    assert rewards_differ(start, Weighed(1.0, itself=True), Weighed(2.0, itself=True)) == ["reward"]
    sums = [rewards.WeightedSum({"exact": weight}) for weight in (1.0, 2.0)]
    assert rewards_differ(start, *sums) == ["reward"]


def test_the_model_of_a_judge_belongs_to_its_reward(start):
    judges = [Judge(Chat(name, "http://127.0.0.1:1/v1")) for name in ("one", "one", "two")]
    assert rewards_differ(start, *judges[:2]) == []
    assert rewards_differ(start, *judges[1:]) == ["reward"]


def test_a_file_is_known_by_what_it_holds_and_not_by_where_it_lies(start, tmp_path):
    for folder, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "weights.bin").write_text(text)
        (tmp_path / folder / "config.json").write_text("{}")
    files, folders = ([digest(f"{tmp_path}/{folder}{file}") for folder in "abc"] for file in ("/weights.bin", ""))
    assert files[0] == files[1] != files[2]
    assert folders[0] != folders[2]


def test_a_reward_of_several_parts_has_all_their_verifiers(start):
    task = make_task("playground/Digits-v0")
    task.reward = rewards.as_reward("exact")
    alone = told(start, task)["verifier"]
    assert alone.startswith("exact #")
    task.reward = rewards.WeightedSum({"exact": 1.0, "repetition": 0.5})
    assert "exact, repetition #" in told(start, task)["verifier"]


def test_nothing_depends_on_the_order_of_names_or_on_addresses_in_memory():
    assert as_json({"b": 1, "a": object()}) == as_json({"a": object(), "b": 1})
    assert as_json({"a": {3, 1, 2}}) == as_json({"a": {2, 3, 1}})


def test_the_hardware_and_the_libraries_are_named(start):
    found = told(start)
    assert "torch 2." in found["libraries"]
    assert "cores" in found["hardware"]
    assert replace(suite(), title="another").title not in str(found)
