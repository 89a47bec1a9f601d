"""What holds for every agent: its settings act, a run killed goes on as if it had not been, one word swaps it for another."""

import ast
import dataclasses
import gc
import gzip
import inspect
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import textwrap
from pathlib import Path
from unittest.mock import MagicMock

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import textenv
from agents import commands
from agents.core import run
from agents.core.agent import Agent
from agents.core.engines.native import NativeEngine
from agents.core.kl import adapt_kl_coef
from agents.core.learner import Learner
from agents.core.lora import merged_state
from agents.core.monitors import HeldOutMonitor, RewardMonitor, Together, TripwireTask
from agents.core.policy_gradient import PolicyGradientConfig
from agents.core.rollout import Rollout
from agents.dapo import DAPO
from agents.grpo import GRPO
from agents.ppo import PPO
from agents.raft import RAFT
from agents.sft import SFT
from rewards import Normalised, Reward, RewardError, Score, as_reward, register, ungraded
from textenv.cli import main

TESTS = Path(__file__).parents[1]
COPY = "textenv/ProbeDelayedCopy-v0"
SAMPLING = (GRPO, DAPO, RAFT, PPO)
EVERY = (*SAMPLING, SFT)


def over(agents):
    return pytest.mark.parametrize("agent_class", agents, ids=lambda agent_class: agent_class.name)


@pytest.fixture
def new(fresh_model, config):
    """Makes an agent for a few quick steps, of a fresh model."""

    def make(agent_class, env_id=COPY, **changes):
        options = {"env_options": {"delay": 0}} if env_id == COPY else {}
        return agent_class(env_id, config(fresh_model(env_id), agent_class, **options | changes))

    return make


def weights(agent):
    """A copy of the policy's weights, adapters merged, in one row."""
    return torch.cat([tensor.flatten() for tensor in merged_state(agent.policy.model).values()])


def metrics_of(folder):
    with open(f"{folder}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


# --- Settings: each acts, or a test is named that holds it ---

MANY = {"epochs_per_batch": 4, "updates_per_batch": 1, "clip_high": 0.2, "learning_rate": 3e-3}
"""Enough updates on a batch for ratios to leave the clip range."""

QUICK = {DAPO: {"total_episodes": 128, "max_sampling": 3}, PPO: {"updates_per_batch": 2, "epochs_per_batch": 1}}
"""For a few steps, though one of DAPO's takes many episodes, and few updates."""

CORE = {
    "model": "other",
    "env_options": {"delay": 1},
    "reward": "exact",
    "max_new_tokens": 1,
    "seed": 1,
    "total_episodes": 64,
    "prompts_per_step": 3,
    "lora_rank": 2,
    "learning_rate": 2e-2,
    "learning_rate_decay": "constant",
    "warmup_steps": 3,
    "weight_decay": 0.5,
    "max_grad_norm": 1e-3,
}
"""A change of each setting that every agent has, which must change the trained weights."""
SAMPLED = {
    "group_size": 3,
    "temperature": 0.7,
    "clip_low": 0.01,
    "clip_high": 0.01,
    "clip_ratio_max": 1.21,
    "updates_per_batch": 3,
    "epochs_per_batch": 2,
    "aggregation": "sequence_mean",
    "kl_reward_coef": 20.0,
    "kl_target": 1e-6,
    "staleness": 1,
}
GROUPED = {"min_group_std": 10.0, "kl_loss_coef": 0.5}
COMPARED = {"scale_rewards": "none", "part_weights": {"correct": 1.0}}
CHANGES = {
    GRPO: CORE | SAMPLED | GROUPED | COMPARED | {"aggregation": "token_mean"},
    DAPO: CORE | SAMPLED | GROUPED | COMPARED | {"max_sampling": 1, "overlong_buffer": 0.0, "overlong_filter": True},
    RAFT: CORE
    | SAMPLED
    | GROUPED
    | {
        "variant": "raft++",
        "accept": "correct",
        "accept_k": 2,
        "accept_above": -1.0,
        "denominator": "all",
        "wrong_advantage": -1.0,
    },
    PPO: CORE
    | SAMPLED
    | {
        "gae_lambda": 0.5,
        "critic": "separate",
        "critic_learning_rate": 1e-3,
        "critic_warmup_steps": 0,
        "value_loss_coef": 1.0,
        "value_clip": 1e-4,
        "kl_step_target": 1e-3,
        "ptx_coef": 2.0,
        "ptx_file": "other.jsonl",
    },
    SFT: {name: value for name, value in CORE.items() if name != "reward"},
}
WITHIN = {
    "clip_low": MANY,
    "clip_high": MANY,
    "clip_ratio_max": MANY,
    "kl_reward_coef": {"kl_reward_coef": 0.1},
    "kl_loss_coef": {"kl_loss_coef": 0.1},
    "kl_target": {"kl_reward_coef": 0.5},
    "ptx_coef": {"ptx_coef": 1.0, "ptx_file": "texts.jsonl"},
    "ptx_file": {"ptx_coef": 1.0, "ptx_file": "texts.jsonl"},
    "part_weights": {"reward": "exact"},
}
"""Settings that act only beside others, or whose size counts beside whether they are there at all; and what is beside them."""

PUSHED_DOWN = {"variant": "reinforce-rej", "wrong_advantage": -1.0}
WITHIN_RAFT = {
    "clip_low": MANY | PUSHED_DOWN,
    "clip_high": MANY | {"variant": "raft++"},
    "clip_ratio_max": MANY | PUSHED_DOWN | {"learning_rate": 3e-2},
    "aggregation": {"accept": "above", "accept_above": -1.0},
    "kl_target": {"kl_loss_coef": 0.5},
    "accept_above": {"accept": "above", "accept_above": 0.5},
    "wrong_advantage": {"variant": "reinforce-rej"},
}
WITHIN_DAPO = {"part_weights": {"reward": "exact", "overlong_buffer": 0.0, "max_sampling": 10}}
ELSEWHERE = {
    "max_tokens": "test_the_context_is_as_long_as_was_named",
    "reward": "test_the_reward_that_is_named_scores_the_evaluation_too",
    "device": "test_the_device_is_the_one_that_was_named",
    "engine": "test_the_engine_that_is_named_generates",
    "precision": "test_the_learner_has_the_precision_and_the_memory_that_were_named",
    "save_memory": "test_the_learner_has_the_precision_and_the_memory_that_were_named",
    "max_ungraded": "test_a_reward_that_grades_too_little_stops_the_run",
    "tokens_per_microbatch": "test_micro_batches_bound_what_goes_through_the_model_and_change_no_result",
    "eval_episodes": "test_a_run_keeps_what_it_did",
    "checkpoint_every": "test_a_run_keeps_what_it_did",
    "keep": "test_as_many_checkpoints_stay_as_are_to_be_kept",
    "run_dir": "test_a_run_keeps_what_it_did",
    "on_alarm": "test_on_alarm_stop_an_alarm_ends_the_training_with_its_step",
    "alarms": "test_a_threshold_is_a_setting",
    "max_logp_gap": "test_an_engine_that_samples_from_another_distribution_stops_the_agent",
    "max_barren_steps": "test_a_run_that_accepts_nothing_for_long_stops_with_what_was_seen",
}


@over(EVERY)
def test_every_setting_is_changed_here_or_held_by_the_test_that_is_named(agent_class):
    names = {field.name for field in dataclasses.fields(agent_class.config_class)}
    assert names - CHANGES[agent_class].keys() - ELSEWHERE.keys() == set()
    assert CHANGES[agent_class].keys() <= names
    written = "\n".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    assert [name for name in names & ELSEWHERE.keys() if f"def {ELSEWHERE[name]}(" not in written] == []


@pytest.fixture
def weights_with(fresh_model, config, tmp_path, monkeypatch):
    """The weights that an agent ends with, as a function of its settings; no run is kept, which is quicker."""
    monkeypatch.chdir(tmp_path)
    for name, family in (("usual", "llama"), ("other", "gpt2")):
        Path(fresh_model(COPY, family)).rename(name)
    Path("texts.jsonl").write_text('{"text": "abcd"}\n')
    Path("other.jsonl").write_text('{"text": "dcba"}\n')
    nothing_kept = MagicMock()
    nothing_kept.return_value.folder = tmp_path
    monkeypatch.setattr("agents.core.training.Run", nothing_kept)
    known = {}

    def train(agent_class, **changes):
        if repr(changes) not in known:
            settings = {"env_options": {"delay": 0}, "eval_episodes": 1, "run_dir": None} | QUICK.get(agent_class, {})
            agent = agent_class(COPY, config("usual", agent_class, **settings | changes))
            known[repr(changes)] = weights(agent.learn())
        return known[repr(changes)]

    return train


@pytest.mark.slow
@over(EVERY)
def test_no_setting_is_a_no_op(weights_with, agent_class):
    within = WITHIN | {RAFT: WITHIN_RAFT, DAPO: WITHIN_DAPO}.get(agent_class, {})
    idle = []
    for name, value in CHANGES[agent_class].items():
        beside = within.get(name, {})
        if torch.equal(weights_with(agent_class, **beside), weights_with(agent_class, **beside | {name: value})):
            idle.append(name)
    assert idle == []


@over(EVERY)
def test_the_device_is_the_one_that_was_named(new, agent_class):
    if torch.cuda.is_available():
        agent = new(agent_class, device="cuda").learn()
        assert {parameter.device.type for parameter in agent.policy.parameters()} == {"cuda"}
    else:
        with pytest.raises(ValueError, match='device "cuda" was asked for, but torch finds no GPU'):
            new(agent_class, device="cuda")


@over(EVERY)
def test_the_engine_that_is_named_generates(new, agent_class):
    agent = new(agent_class, engine="native max_rows 3", total_episodes=16)
    assert (type(agent.engine), agent.engine.max_rows) == (NativeEngine, 3)
    agent.learn()


@over(EVERY)
def test_the_learner_has_the_precision_and_the_memory_that_were_named(new, agent_class, monkeypatch):
    given = {}
    monkeypatch.setattr(Learner, "__init__", lambda self, policy, **options: given.update(options) or 1 / 0)
    monkeypatch.setattr("agents.core.agent.check_precision", lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        new(agent_class, precision="bfloat16", save_memory="recompute")
    assert (given["precision"], given["save_memory"]) == ("bfloat16", "recompute")


@over(EVERY)
def test_the_context_is_as_long_as_was_named(new, agent_class):
    agent = new(agent_class, "textenv/GuessNumber-v0", max_tokens=60, total_episodes=4).learn()
    rows = episodes_of(agent.config.run_dir, 1)
    assert max(len(row["tokens"]) for row in rows) <= 60
    assert "context" in {row["finish"] for row in rows}


@over(EVERY)
def test_the_reward_that_is_named_scores_the_evaluation_too(new, agent_class):
    agents = [new(agent_class, "textenv/ProbeOneHot-v0", reward=reward) for reward in (None, "exact")]
    own, exact = (agent.evaluate(64, temperature=1.0).reward for agent in agents)
    assert exact < own  # the probe's own pays for the first character, whatever follows


@over(EVERY)
def test_micro_batches_bound_what_goes_through_the_model_and_change_no_result(new, agent_class, monkeypatch):
    # What is tried before the first step is a row of the longest, however small micro-batches are.
    monkeypatch.setattr("agents.core.memory.microbatch_bytes", lambda *_: 0)
    monkeypatch.setattr(Learner, "rehearse", lambda *_: None)
    all_rows = {"kl_loss_coef": 0.1} if agent_class is RAFT else {}
    sizes, logged = {}, {}
    for limit in (8, 10**6):
        agent = new(agent_class, tokens_per_microbatch=limit, total_episodes=16, max_grad_norm=1e9, **all_rows)
        states, seen = agent.policy.states, sizes.setdefault(limit, [])
        agent.policy.states = lambda tokens_RT, *rest, states=states, seen=seen: (
            seen.append(tokens_RT.numel()) or states(tokens_RT, *rest)
        )
        agent.learn()
        logged[limit] = metrics_of(agent.config.run_dir)[0]
    assert max(sizes[8]) <= 8 < max(sizes[10**6])
    for name in ("loss", "grad_norm", "entropy"):
        assert logged[8][name] == pytest.approx(logged[10**6][name], rel=1e-4, abs=1e-6), name


@over(SAMPLING)
def test_an_engine_that_samples_from_another_distribution_stops_the_agent(new, agent_class, monkeypatch):
    collect = Rollout.collect

    def collect_with_a_gap(*arguments, **options):
        batch = collect(*arguments, **options)
        return dataclasses.replace(batch, logp_BT=batch.logp_BT + 0.25)

    monkeypatch.setattr(Rollout, "collect", collect_with_a_gap)
    with pytest.raises(RuntimeError, match=r"the limit max_logp_gap is 0\.1"):
        new(agent_class).learn()
    new(agent_class, max_logp_gap=0.5, total_episodes=16).learn()


@over(SAMPLING)
def test_with_a_learning_rate_of_next_to_nothing_engine_and_learner_stay_together(new, agent_class):
    settings = new(agent_class, learning_rate=1e-30, total_episodes=160).learn().config
    gaps = [line["logp_gap_max"] for line in metrics_of(settings.run_dir)]
    assert gaps
    assert max(gaps) < 1e-4


@over(SAMPLING)
def test_a_kl_target_moves_the_coefficient(new, agent_class):
    settings = new(agent_class, kl_reward_coef=0.1, kl_target=1e-6, total_episodes=96).learn().config
    factor, played = 1.0, 0
    for line in metrics_of(settings.run_dir):
        assert line["kl_factor"] == pytest.approx(factor)
        factor = adapt_kl_coef(factor, line["kl"], 1e-6, line["episodes"] - played)
        played = line["episodes"]
    assert line["kl"] > 0
    assert factor > 1


# --- Rewards that teach nothing ---


@pytest.mark.parametrize(
    ("agent_class", "changes"),
    [(GRPO, {}), (DAPO, {}), (RAFT, {"variant": "reinforce-rej"})],
    ids=["grpo", "dapo", "reinforce-rej"],
)
def test_a_constant_reward_moves_no_weight(new, agent_class, changes):
    agent = new(agent_class, "textenv/ProbeConstant-v0", **changes)
    before = weights(agent)
    assert torch.equal(weights(agent.learn()), before)


@over([GRPO, DAPO, RAFT])
def test_where_nothing_is_right_no_weight_moves(new, agent_class):
    agent = new(agent_class)
    agent.reward = as_reward(lambda prompt, completion, reference: 0.0)
    before = weights(agent)
    assert torch.equal(weights(agent.learn()), before)


@over(EVERY)
def test_a_reward_that_grades_too_little_stops_the_run(new, agent_class):
    def agent_with(max_ungraded):
        agent, calls = new(agent_class, max_ungraded=max_ungraded, eval_episodes=9), itertools.count(1)
        agent.reward = as_reward(
            lambda prompt, completion, reference: float("b" in completion) if next(calls) % 3 else 1 / 0
        )
        return agent

    agent_with(0.5).learn()
    with pytest.raises(RewardError, match=r"left 3 of 9 episodes ungraded, more than max_ungraded=0\.2"):
        agent_with(0.2).learn()


@over(SAMPLING)
def test_a_reward_that_breaks_while_training_stops_it_and_the_weights_stay(new, agent_class):
    agent = new(agent_class)
    before, calls = weights(agent), itertools.count()
    agent.reward = as_reward(lambda prompt, completion, reference: 1.0 if next(calls) < 8 else 1 / 0)  # 8 to evaluate
    with pytest.raises(RewardError, match=r"left 16 of 16 episodes ungraded[^$]*ZeroDivisionError"):
        agent.learn()
    assert torch.equal(weights(agent), before)


@pytest.mark.parametrize(
    ("agent_class", "changes"),
    [
        (GRPO, {"kl_loss_coef": 0.1}),
        (DAPO, {"kl_loss_coef": 0.1}),
        (RAFT, {"kl_loss_coef": 0.1}),
        (PPO, {"kl_reward_coef": 0.1}),
    ],
    ids=["grpo", "dapo", "raft", "ppo"],
)
def test_an_ungraded_episode_has_no_gradient_and_no_say_in_that_of_others(new, monkeypatch, agent_class, changes):
    collect, ends = Rollout.collect, []
    for junk in (0.0, 1e6):
        agent, learned = new(agent_class, **changes), []
        step = agent.learner.step

        def collect_with_one_ungraded(*arguments, junk=junk, **options):
            batch = collect(*arguments, **options)
            batch.scores[1] = ungraded("time-out")
            batch.reward_BT[1] = junk
            return batch

        def step_that_tells(batch, rows, *rest, step=step, learned=learned, **more):
            learned.append(batch.graded_B[rows].all())
            return step(batch, rows, *rest, **more)

        monkeypatch.setattr(Rollout, "collect", collect_with_one_ungraded)
        monkeypatch.setattr(agent.learner, "step", step_that_tells)
        ends.append(weights(agent.learn()))
        assert learned
        assert all(learned)
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("agent_class", "changes", "counted"),
    [
        (GRPO, {}, range(6)),
        (DAPO, {"max_sampling": 1, "updates_per_batch": 1}, range(3)),
        (RAFT, {}, [0, 3]),
        (RAFT, {"denominator": "all"}, range(6)),
        (PPO, {"updates_per_batch": 1, "epochs_per_batch": 1, "critic_warmup_steps": 0}, range(6)),
    ],
    ids=["grpo", "dapo", "raft", "raft, all", "ppo"],
)
def test_the_denominators_are_those_of_all_that_counts_and_of_all_turns(new, agent_class, changes, counted):
    """Of two groups of three, one has right and wrong answers; the other has right ones only."""
    sizes = {"prompts_per_step": 2, "group_size": 3, "max_tokens": 64, "eval_episodes": 6, "total_episodes": 6}
    agent = new(agent_class, "textenv/GuessNumber-v0", **sizes | changes)
    rewards = itertools.cycle([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    agent.reward = as_reward(lambda prompt, completion, reference: next(rewards))
    seen, step = [], agent.learner.step
    agent.learner.step = lambda batch, rows, loss, **more: (
        seen.append((batch, loss.keywords["denominators"])) or step(batch, rows, loss, **more)
    )
    agent.learn()
    ((batch, denominators),) = seen
    assert denominators.sequences == len(counted)
    assert denominators.tokens == batch.sampled_BT[list(counted)].sum() < batch.sampled_BT.sum() + (len(counted) == 6)
    assert denominators.max_new_tokens == agent.task.max_new_tokens * agent.task.turns


# --- A run: what it keeps, and that it can be broken off at any moment ---


def episodes_of(folder, step):
    with gzip.open(f"{folder}/rollouts/{step:06d}.jsonl.gz", "rt") as file:
        return [json.loads(row) for row in file]


@over(EVERY)
def test_a_run_keeps_what_it_did(new, agent_class):
    agent = new(agent_class, "textenv/ProbeLength-v0", checkpoint_every=2, eval_episodes=5)
    training = agent.learn(total_episodes=3 * 4 * getattr(agent.config, "group_size", 1)).last_training
    folder, steps = Path(agent.config.run_dir), training.step
    assert json.loads((folder / "config.json").read_text())["settings"]["checkpoint_every"] == 2
    lines = metrics_of(folder)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert lines[-1]["episodes"] == sum(len(episodes_of(folder, step + 1)) for step in range(steps))
    left = {f"{step:06d}" for step in range(1, steps + 1) if step % 2 == 0 or step == steps}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == left
    assert len(list((folder / "rollouts").iterdir())) == steps
    assert any((folder / "tensorboard").iterdir())
    saved = load_file(folder / "checkpoints" / f"{steps:06d}" / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, agent.policy.model.state_dict()[name])
    assert json.loads((folder / "evaluation_after.json").read_text())["episodes"] == 5


@over(EVERY)
@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_stay_as_are_to_be_kept(new, agent_class, keep):
    agent = new(agent_class, "textenv/ProbeLength-v0", checkpoint_every=1, keep=keep, eval_episodes=5)
    steps = agent.learn(total_episodes=5 * 4 * getattr(agent.config, "group_size", 1)).last_training.step
    kept = sorted(path.name for path in Path(agent.config.run_dir, "checkpoints").iterdir())
    assert kept == [f"{step:06d}" for step in range(1, steps + 1)][-keep:]


@over(SAMPLING)
def test_the_logged_reward_is_that_of_the_stored_episodes(new, agent_class):
    settings = new(agent_class, "textenv/ProbeLength-v0").learn().config
    for line in metrics_of(settings.run_dir):
        rows = episodes_of(settings.run_dir, line["step"])
        assert line["return"] == pytest.approx(np.mean([row["return"] for row in rows]))
        for row in rows:
            assert row["return"] == pytest.approx(sum(row["reward"]))


@over(SAMPLING)
def test_a_stored_episode_has_what_learning_saw_of_its_tokens(new, agent_class):
    changes = {"critic_warmup_steps": 0} if agent_class is PPO else {}
    sizes = {"learning_rate": 1e-2, "kl_reward_coef": 0.1, "updates_per_batch": 1, "epochs_per_batch": 1}
    agent = new(agent_class, "textenv/ProbeLength-v0", **sizes | changes).learn()
    lines = metrics_of(agent.config.run_dir)
    rows = [(line, row) for line in lines for row in episodes_of(agent.config.run_dir, line["step"])]
    learned = [(line, row) for line, row in rows if "ratio" in row]
    assert len(learned) == pytest.approx(sum(line["trained_share"] for line in lines) / len(lines) * len(rows))
    for line, row in rows:
        for name in {"advantage", "entropy", "ratio", "kl"} & row.keys():
            assert len(row[name]) == len(row["tokens"])
            assert not any(value for value, source in zip(row[name], row["source"], strict=True) if source != 2)
        if line["step"] == 1:
            assert not any(row["kl"])
    sampled = [(row, at) for _, row in learned for at, source in enumerate(row["source"]) if source == 2]
    # Learned from once, a token's ratio is 1 but for the engine's rounding, and the entropy is that of the step's metrics.
    assert [row["ratio"][at] for row, at in sampled] == pytest.approx([1.0] * len(sampled), abs=1e-3)
    first = [
        row["entropy"][at] for line, row in learned if line["step"] == 1 for at, s in enumerate(row["source"]) if s == 2
    ]
    assert np.mean(first) == pytest.approx(lines[0]["entropy"], abs=1e-3)
    assert any(row["kl"][at] for row, at in sampled)
    assert all(row["advantage"][at] for row, at in sampled if agent_class is GRPO)


register("normalised_exact", Normalised("exact", center=False))
BROKEN_OFF = {
    "grpo": (GRPO, {"kl_loss_coef": 0.1, "kl_target": 1e-3, "updates_per_batch": 2}),
    "grpo, lora": (GRPO, {"kl_loss_coef": 0.1, "lora_rank": 2}),
    "grpo, normalised": (GRPO, {"reward": "normalised_exact", "scale_rewards": "none"}),
    "grpo, late": (GRPO, {"reward": "normalised_exact", "scale_rewards": "none", "staleness": 1}),
    "grpo, late, lora": (GRPO, {"lora_rank": 2, "staleness": 1, "updates_per_batch": 2}),
    "dapo, late": (DAPO, {"total_episodes": 512, "staleness": 1}),
    "dapo": (DAPO, {"kl_reward_coef": 0.1, "kl_target": 1e-3, "total_episodes": 512}),
    "raft": (RAFT, {"variant": "raft++", "kl_loss_coef": 0.1, "kl_target": 1e-3}),
    "raft, barren": (RAFT, {"accept": "above", "accept_above": 2.0, "max_barren_steps": 5}),
    "ppo": (PPO, {"kl_reward_coef": 0.1, "kl_target": 1e-3, "kl_step_target": 1e-2}),
    "ppo, separate": (PPO, {"critic": "separate", "critic_learning_rate": 1e-3, "critic_warmup_steps": 3}),
    "ppo, lora": (PPO, {"critic": "lora", "lora_rank": 2, "kl_reward_coef": 0.1}),
    "sft": (SFT, {"prompts_per_step": 16, "lora_rank": 2}),
}
"""Runs with all kinds of state that a checkpoint must hold beside the weights."""


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have imported all there is to import already."""
    context = multiprocessing.get_context("forkserver")
    agents = [f"agents.{agent_class.name}" for agent_class in EVERY]
    context.set_forkserver_preload([*agents, "peft", "torch.utils.tensorboard", "transformers.models.llama"])
    return context


def train_and_die(agent_class, settings, moment):
    """Train, but die by SIGKILL just before file or folder number ``moment`` of the run is put in its place."""
    replace, number = os.replace, itertools.count(1)

    def replace_or_die(new, path):
        if next(number) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(new, path)

    run.os.replace = replace_or_die
    agent_class(COPY, settings).learn()


def kill(processes, agent_class, settings, moment):
    """Train in a process that dies at a moment; False if the training was over by then."""
    process = processes.Process(target=train_and_die, args=(agent_class, settings, moment))
    process.start()
    process.join(300)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def kept(folder):
    """All that a run keeps but for times and memory: of every file its bytes."""
    folder = Path(folder)
    files = [path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    held = {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "metrics.jsonl"}
    measured = re.compile("seconds|tokens_per_second|time_.*|memory_peak_mb|mfu")
    lines = [{name: line[name] for name in line if not measured.fullmatch(name)} for line in metrics_of(folder)]
    return held | {"metrics": lines}


@pytest.fixture
def whole(new, tmp_path, request):
    """A run of ``BROKEN_OFF`` that was never killed: its folder; and the same run to be done elsewhere."""
    agent_class, changes = BROKEN_OFF[request.param]
    agent = new(agent_class, **{"total_episodes": 96, "checkpoint_every": 2} | changes)
    agent.learn()
    return agent.config.run_dir, agent_class, dataclasses.replace(agent.config, run_dir=str(tmp_path / "killed"))


@pytest.mark.parametrize("whole", ["grpo, normalised", "ppo"], indirect=True)  # the others with all moments, below
def test_a_killed_run_ends_as_one_never_killed(whole, processes):
    folder, agent_class, settings = whole
    checkpoint_4 = 8  # after the config, an evaluation, four rollouts and a checkpoint
    assert kill(processes, agent_class, settings, checkpoint_4)
    killed = Path(settings.run_dir)
    assert {path.name for path in (killed / "checkpoints").iterdir()} == {"000002", "000004.new"}
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rewa')  # killed in the middle of a line
    agent_class(COPY, settings, resume=True).learn()
    assert kept(killed) == kept(folder)
    assert len(metrics_of(folder)) > 4


@pytest.mark.slow
@pytest.mark.parametrize("whole", BROKEN_OFF, indirect=True)
def test_there_is_no_moment_at_which_a_kill_changes_how_a_run_ends(whole, processes):
    folder, agent_class, settings = whole
    for moment in itertools.count(1):
        settings = dataclasses.replace(settings, run_dir=f"{folder}-{moment}")
        if not kill(processes, agent_class, settings, moment):
            break
        agent_class(COPY, settings, resume=Path(settings.run_dir, "config.json").exists()).learn()
        assert kept(settings.run_dir) == kept(folder), moment
    assert moment > 10


@over(SAMPLING)
def test_evaluations_before_and_after_are_in_one_unit_though_the_reward_adapts(new, agent_class):
    shifted = Normalised(lambda prompt, completion, reference: 5.0)
    agent = new(agent_class, **({} if agent_class is not RAFT else {"variant": "raft++"}))
    agent.reward = shifted
    agent._reward_at_start = Normalised(shifted.reward)
    training = agent.learn().last_training
    assert (training.before.reward, training.after.reward) == (5.0, 5.0)
    assert shifted.mean == 5.0


def test_a_reward_that_compares_answers_trains_and_its_evaluation_is_ungraded(new):
    class Longest(Reward):
        whole_groups = True

        def __call__(self, samples):
            if samples[0].split == "eval":
                return [ungraded("nothing to compare")] * len(samples)
            longest = {s.prompt: max(len(o.completion) for o in samples if o.prompt == s.prompt) for s in samples}
            return [Score(float(len(s.completion) == longest[s.prompt]), {"long": 1.0}) for s in samples]

    agent = new(GRPO)
    agent.reward = agent._reward_at_start = Longest()
    training = agent.learn().last_training
    assert training.before.reward_text() == "not graded"
    assert training.after.accuracy_text() == "not told by the reward"
    assert training.metrics["ungraded_share"] == 0
    assert np.isnan(training.metrics["accuracy"])
    assert training.metrics["groups_all_wrong"] == 0


def test_agents_that_share_a_reward_that_adapts_do_not_share_its_statistics(new):
    first, second = (new(GRPO, reward="normalised_exact", scale_rewards="none").learn() for _ in range(2))
    assert first.reward.state_dict()["count"] == first.config.total_episodes
    assert as_reward("normalised_exact").state_dict()["count"] == 0
    assert torch.equal(weights(first), weights(second))


@over(EVERY)
def test_more_steps_on_a_finished_run_are_evaluated_anew(new, agent_class):
    agent = new(agent_class, total_episodes=16, eval_episodes=32)
    before = agent.learn().last_training.after
    again = agent_class(COPY, agent.config, resume=True).learn(total_episodes=400)
    assert again.last_training.after == again.evaluate()
    assert again.last_training.after != before


@over(EVERY)
def test_a_run_folder_that_is_taken_is_refused_before_a_model_loads(config, tmp_path, agent_class):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds another run; choose another --run-dir, or go on with it by --resume"):
        agent_class(COPY, config("no/such-model", agent_class, run_dir=str(tmp_path / "taken")))
    with pytest.raises(ValueError, match="no run in"):
        agent_class(COPY, config("no/such-model", agent_class, run_dir=str(tmp_path / "empty")), resume=True)


@over(EVERY)
def test_a_run_is_not_resumed_with_other_settings_or_by_another_agent(new, config, agent_class):
    settings = new(agent_class, total_episodes=16).learn().config
    with pytest.raises(ValueError, match="resume it with the settings it was started with"):
        agent_class(COPY, dataclasses.replace(settings, seed=8), resume=True).learn()
    other = GRPO if agent_class is SFT else SFT
    with pytest.raises(ValueError, match=f"the run to resume has agent '{agent_class.name}', but '{other.name}' was"):
        other(COPY, config(settings.model, other, run_dir=settings.run_dir), resume=True).learn()


@over(EVERY)
def test_a_start_that_failed_neither_blocks_the_next_nor_leaves_it_a_figure(new, agent_class, fresh_model, monkeypatch):
    agent = new(agent_class, "textenv/ProbeLength-v0")
    with monkeypatch.context() as broken:
        # After the first evaluation, before a step is kept.
        broken.setattr(agent.learner, "set_learning_rate", lambda rate: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            agent.learn()
    settings = dataclasses.replace(agent.config, model=fresh_model("textenv/ProbeLength-v0", "gpt2"))
    again = agent_class("textenv/ProbeLength-v0", settings)
    expected = again.evaluate()
    assert expected != agent.evaluate()
    assert again.learn().last_training.before == expected


@over(EVERY)
def test_a_start_killed_before_it_had_written_anything_does_not_block_the_next(new, agent_class):
    agent = new(agent_class, total_episodes=16)
    Path(agent.config.run_dir, "rollouts").mkdir(parents=True)
    agent_class(COPY, agent.config).learn()


@over(SAMPLING)
def test_references_and_parts_of_numpys_types_are_kept(fresh_model, config, agent_class):
    class Next(textenv.Task):
        """The next letter's number."""

        holdout = 0
        max_new_tokens, max_tokens = 2, 16

        def draw(self, rng):
            number = rng.integers(4)
            return textenv.Problem("abcd"[number], number)

        def reward(self, prompt, completion, reference):
            return Score(np.float32(len(completion)), {"length": np.float32(len(completion))})

        def tokenizer(self):
            return textenv.make_task("textenv/ProbeOneHot-v0").tokenizer()

    textenv.register("test/Next-v0", Next)
    try:
        settings = config(fresh_model("textenv/ProbeOneHot-v0"), agent_class)
        agent_class("test/Next-v0", settings).learn()
    finally:
        del textenv.registry["test/Next-v0"], gymnasium.registry["test/Next-v0"]
    for row in episodes_of(settings.run_dir, 1):
        assert row["reference"] in range(4)
        assert row["parts"]["length"] in range(3)


def test_every_metric_that_is_logged_is_explained_and_every_explained_one_is_logged(new, tmp_path):
    with_kl = {"kl_loss_coef": 0.1, "kl_target": 1.0}
    (tmp_path / "texts.jsonl").write_text('{"text": "abcd"}\n')
    penalty = {"kl_step_target": 0.01, "ptx_coef": 1.0, "ptx_file": str(tmp_path / "texts.jsonl")}
    logged = set()
    for agent_class, changes in (
        (GRPO, with_kl | {"staleness": 1}),
        (DAPO, with_kl),
        (RAFT, with_kl),
        (PPO, {}),
        (PPO, penalty),
        (SFT, {}),
    ):
        monitors = Together(
            RewardMonitor("exact"),
            HeldOutMonitor(episodes=2, every=1),
            HeldOutMonitor("exact", episodes=2, every=1),
            TripwireTask("textenv/ProbeSubstring-v0", episodes=2, every=1),
        )
        settings = new(agent_class, "textenv/ProbeSubstring-v0", **changes).learn(callback=monitors).config
        logged |= {name for line in metrics_of(settings.run_dir) for name in line}
    table = re.findall(r"^\|(.*?)\|", (TESTS.parent / "agents" / "METRICS.md").read_text(), flags=re.MULTILINE)
    explained = {name for row in table for name in re.findall(r"`(.+?)`", row)}
    named = {re.sub("^(reward|monitor|tripwire|tripwire_moved|held_out)/.*", r"\1/NAME", name) for name in logged}
    only_of_long_contexts = {"logp_gap/from_N", "logp_gap_max/from_N"}
    assert named - {"step"} == explained - only_of_long_contexts


# --- Callbacks ---


@over(EVERY)
def test_a_callback_sees_every_step_and_may_evaluate_without_changing_the_training(new, agent_class):
    expected = weights(new(agent_class).learn())
    agent, seen = new(agent_class), []
    agent.learn(callback=lambda training: seen.append((training.step, training.metrics, agent.evaluate(4))))
    assert [(step, metrics["episodes"]) for step, metrics, _ in seen] == [
        (line["step"], line["episodes"]) for line in metrics_of(agent.config.run_dir)
    ]
    assert torch.equal(weights(agent), expected)


@over(EVERY)
@pytest.mark.parametrize("last", [False, True], ids=["midway", "at the last step"])
def test_a_callback_stops_the_training_which_keeps_its_last_step(new, agent_class, last):
    agent = new(agent_class, total_episodes=16 if last and agent_class is not SFT else 4 if last else 48)
    agent.learn(callback=lambda training: False)
    training, folder = agent.last_training, Path(agent.config.run_dir)
    assert training.step == 1
    assert training.stopped == "the callback asked for it"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["000001"]
    assert training.after == agent.evaluate()
    assert json.loads((folder / "evaluation_after.json").read_text()) == dataclasses.asdict(training.after)
    resumed = agent_class(COPY, agent.config, resume=True)
    assert torch.equal(weights(resumed), weights(agent))


@over(EVERY)
def test_learning_again_counts_its_steps_anew_from_the_weights_that_were_learned(
    new, agent_class, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    agent = new(agent_class, run_dir=None)
    first, learned = agent.learn().last_training, weights(agent)
    second = agent.learn().last_training
    assert second.run.folder != first.run.folder
    lines = metrics_of(second.run.folder)
    assert [line["step"] for line in lines] == list(range(1, second.step + 1))
    assert lines[-1]["episodes"] == second.episodes < 2 * agent.config.total_episodes
    assert second.before == first.after
    assert not torch.equal(weights(agent), learned)


# --- Saved agents ---


@over(EVERY)
def test_an_agent_saves_loads_and_predicts_the_same(new, agent_class, tmp_path):
    agent = new(agent_class, env_options={"delay": 3}).learn()
    agent.save(tmp_path / "saved")
    again = agent_class.load(tmp_path / "saved")
    assert dataclasses.replace(again.config, model=agent.config.model, run_dir=agent.config.run_dir) == agent.config
    envs = gymnasium.make_vec(COPY, num_envs=4, level="sequence")
    observation, _ = envs.reset(seed=0)
    actions, state = agent.predict(observation)
    assert state is None
    assert envs.action_space.contains(actions)
    np.testing.assert_array_equal(actions, again.predict(observation)[0])
    assert not np.array_equal(
        agent.predict(observation, deterministic=False, seed=1)[0],
        agent.predict(observation, deterministic=False, seed=2)[0],
    )
    single = {name: array[0] for name, array in observation.items()}
    np.testing.assert_array_equal(agent.predict(single)[0], actions[0])
    assert again.evaluate(16) == agent.evaluate(16)
    other = GRPO if agent_class is SFT else SFT
    with pytest.raises(ValueError, match=f"holds an agent '{agent_class.name}', not '{other.name}'"):
        other.load(tmp_path / "saved")


# --- LoRA ---

WITH_LORA = {
    GRPO: {"kl_loss_coef": 0.1},
    DAPO: {"kl_loss_coef": 0.1},
    RAFT: {"kl_loss_coef": 0.1},
    PPO: {"kl_reward_coef": 0.1, "critic": "lora"},
    SFT: {},
}
"""With a reference, and a critic, that need no weights of their own."""


def memory_of_parameters():
    gc.collect()
    return {held.data_ptr() for held in gc.get_objects() if type(held) is torch.nn.Parameter}


@pytest.mark.slow
@over(EVERY)
def test_lora_trains_adapters_beside_the_only_copy_of_the_weights(new, agent_class):
    others = memory_of_parameters()
    agent = new(agent_class, lora_rank=2, **WITH_LORA[agent_class])
    before = {name: parameter.detach().clone() for name, parameter in agent.policy.named_parameters()}
    held = []
    agent.learn(callback=lambda training: held.append(memory_of_parameters() - others) if not held else None)
    own = [*agent.policy.parameters(), *(agent.learner.critic.parameters() if agent.learner.critic else ())]
    assert held[0] == {parameter.data_ptr() for parameter in own} - others
    for name, parameter in agent.policy.named_parameters():
        assert torch.equal(parameter, before[name]) == (".lora_" not in name), name


@over(EVERY)
def test_a_checkpoint_with_lora_is_a_plain_model_that_answers_as_the_agent(new, agent_class, capsys):
    agent = new(agent_class, lora_rank=2, **WITH_LORA[agent_class]).learn()
    (checkpoint,) = Path(agent.config.run_dir, "checkpoints").iterdir()
    plain = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    assert type(plain) is type(agent.policy.model)
    tokens_BT = torch.arange(5)[None]
    torch.testing.assert_close(plain(tokens_BT).logits, agent.policy.model(tokens_BT).logits, atol=1e-5, rtol=0)
    capsys.readouterr()
    main(["evaluate", COPY, "--model", agent.config.run_dir, "--options", "delay", "0", "--episodes", "64"])
    assert agent.evaluate(64).accuracy_text() in capsys.readouterr().out


@over(EVERY)
def test_without_peft_one_line_names_the_extra_before_a_model_loads(config, agent_class, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("agents.core.agent.load_policy", lambda *arguments: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=r"^LoRA needs peft: pip install 'textenv\[lora\]'$"):
        agent_class(COPY, config("no/such-model", agent_class, lora_rank=2))


# --- One word swaps an algorithm for another ---


def declarations(config_class):
    """Each setting of a config: the class that declared it first, its type, and its sentence."""
    found = {}
    for owner in reversed(config_class.__mro__[:-1]):
        (body,) = (node.body for node in ast.parse(textwrap.dedent(inspect.getsource(owner))).body)
        for node, after in itertools.pairwise([*body, None]):
            if isinstance(node, ast.AnnAssign):
                sentence = after.value.value if isinstance(after, ast.Expr) else None
                first, kind, _ = found.get(node.target.id, (owner, ast.unparse(node.annotation), None))
                assert kind == ast.unparse(node.annotation), f"{owner.__name__} gives {node.target.id} another type"
                found[node.target.id] = first, kind, sentence
    return found


@over(EVERY)
def test_a_config_is_frozen_takes_keywords_only_and_says_a_sentence_of_each_of_few_settings(agent_class):
    fields = dataclasses.fields(agent_class.config_class)
    # Forty for what is learned and how; four for how the machine does it: engine, precision, memory, staleness; three for what
    # watches over a run: two for alarms, one for its checkpoints.
    assert len(fields) <= 47
    assert all(field.kw_only for field in fields)
    with pytest.raises(dataclasses.FrozenInstanceError):
        agent_class.config_class().seed = 1
    declared = declarations(agent_class.config_class)
    assert declared.keys() == {field.name for field in fields}
    assert [name for name, (_, _, sentence) in declared.items() if not sentence] == []


@pytest.mark.parametrize(
    ("one", "other"), list(itertools.combinations(EVERY, 2)), ids=lambda agent_class: agent_class.name
)
def test_a_setting_that_two_agents_have_is_one_setting(one, other):
    """Declared in a class that both build on; or, in each of them, with the same type and the same sentence."""
    ones, others = declarations(one.config_class), declarations(other.config_class)
    for name in ones.keys() & others.keys():
        assert ones[name][0] is others[name][0] or ones[name][1:] == others[name][1:], name


COMMON = (
    "--model no/such-model --env-options digits 2 --reward exact --max-new-tokens 8 --max-tokens 64 --seed 3 --device cpu "
    "--engine vllm --precision bfloat16 --save-memory recompute "
    "--max-ungraded 0.25 --total-episodes 320 --prompts-per-step 16 --lora-rank 2 --learning-rate 1e-4 "
    "--learning-rate-decay constant --warmup-steps 2 --weight-decay 0.1 --max-grad-norm 0.5 --tokens-per-microbatch 4096 "
    "--eval-episodes 32 --checkpoint-every 5 --keep 3 --run-dir somewhere --on-alarm stop --alarms length 2"
)
COMMON_SAMPLING = (
    "--group-size 4 --temperature 0.8 --clip-low 0.1 --clip-high 0.3 --clip-ratio-max 4 --updates-per-batch 3 "
    "--epochs-per-batch 2 --aggregation constant --kl-reward-coef 0.01 --kl-target 5 --max-logp-gap 0.2 --staleness 1"
)


@pytest.fixture
def config_of(monkeypatch):
    """The config that `textenv train AGENT` makes of a command line."""

    def read(agent_class, flags):
        given = []
        monkeypatch.setattr(Agent, "__init__", lambda self, env_id, config, **resume: given.append(config))
        monkeypatch.setattr(commands, "_show", lambda agent, monitors: None)
        main(["train", agent_class.name, "textenv/Arithmetic-v0", *flags.split()])
        return given.pop()

    return read


@over(EVERY)
def test_a_command_line_means_the_same_to_every_agent(config_of, agent_class):
    flags = COMMON if agent_class is SFT else f"{COMMON} {COMMON_SAMPLING}"
    read, expected = config_of(agent_class, flags), config_of(GRPO, flags)
    assert type(read) is agent_class.config_class
    names = [flag[2:].replace("-", "_") for flag in flags.split() if flag.startswith("--")]
    assert {name: getattr(read, name) for name in names} == {name: getattr(expected, name) for name in names}
    assert [name for name in names if getattr(read, name) == getattr(agent_class.config_class(), name)] == []


def test_that_command_line_has_every_setting_that_sampling_agents_share():
    named = {flag[2:].replace("-", "_") for flag in f"{COMMON} {COMMON_SAMPLING}".split() if flag.startswith("--")}
    shared = {field.name for field in dataclasses.fields(PolicyGradientConfig)}
    assert shared == named & shared
