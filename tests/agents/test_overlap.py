"""What goes on beside a step, and where its time goes: writing, sampling one step late, the metrics of both."""

import copy
import dataclasses
import json
import math
import os
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agents.core import run
from agents.core.engines.native import NativeEngine
from agents.core.learner import Scored
from agents.core.losses import Denominators
from agents.core.policy import Policy
from agents.core.policy_gradient import TIS_CAP, policy_loss, tis_weights
from agents.core.rollout import Rollout
from agents.core.training import PARTS
from agents.core.usage import memory_peak_mb, peak_flops, training_flops
from agents.dapo import DAPO
from agents.grpo import GRPO, GRPOConfig
from agents.ppo import PPO
from agents.raft import RAFT
from agents.sft import SFT
from tests.agents.conftest import make_model

COPY = "textenv/ProbeDelayedCopy-v0"
SAMPLING = (GRPO, DAPO, RAFT, PPO)


def over(agents, slow=()):
    marked = [pytest.param(each, marks=pytest.mark.slow) if each in slow else each for each in agents]
    return pytest.mark.parametrize("agent_class", marked, ids=lambda agent_class: agent_class.name)


@pytest.fixture
def new(fresh_model, config):
    """Makes an agent for a few quick steps, of a fresh model."""

    def make(agent_class, **changes):
        return agent_class(COPY, config(fresh_model(COPY), agent_class, **{"env_options": {"delay": 0}} | changes))

    return make


def metrics_of(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def parameters(agent):
    return [parameter.detach().clone() for parameter in agent.policy.parameters()]


def same(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


# --- Where the time of a step goes ---


@over([GRPO, PPO, SFT])
def test_the_parts_of_a_step_sum_to_its_seconds(new, agent_class):
    agent = new(agent_class)
    agent.learn(callback=lambda training: agent.evaluate(4) and None)  # which is no part of any step
    lines = metrics_of(agent.config.run_dir)
    for line in lines:
        parts = {part: line[f"time_{part}"] for part in PARTS}
        assert sum(parts.values()) == pytest.approx(line["seconds"])
        assert all(seconds >= 0 for seconds in parts.values())
        assert {"forward", "backward", "optimise"} <= {part for part, seconds in parts.items() if seconds}
        assert line["tokens_per_second"] > 0
    assert [line["time_log"] > 0 for line in lines] == [False] + [True] * (len(lines) - 1)
    assert (lines[-1]["time_generate"] > 0) == (agent_class is not SFT)


def test_the_time_between_steps_belongs_to_none(new, monkeypatch):
    now, real = [0.0], time.perf_counter
    monkeypatch.setattr("agents.core.training.time.perf_counter", lambda: real() + now[0])
    agent = new(GRPO)

    def long_evaluation(training):
        now[0] += 1000.0

    agent.learn(callback=long_evaluation)
    assert all(line["seconds"] < 100 for line in metrics_of(agent.config.run_dir))


def test_the_arithmetic_of_training_worked_by_hand(tokenizer):
    """Llama: 14 ids, width 32, 2 layers of queries, keys (half), values (half), output, and an MLP of 64."""
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    head = 14 * 32
    matrices = 2 * layer + head
    policy = Policy(make_model("llama"), tokenizer)
    attention = 12 * 2 * 32 * (6 + 15)  # tokens at places 1 to 3 and 1 to 5 look at so many
    assert training_flops(policy, torch.tensor([3, 5])) == 6 * matrices * 8 + attention
    policy.model.get_decoder().requires_grad_(False)
    assert training_flops(policy, torch.tensor([3, 5])) == (4 * matrices + 2 * head) * 8 + attention


def test_a_table_that_is_also_the_head_counts_once(tokenizer):
    tied, apart = (Policy(make_model("llama", tie_word_embeddings=tied), tokenizer) for tied in (True, False))
    assert sum(p.numel() for p in tied.parameters()) < sum(p.numel() for p in apart.parameters())
    assert training_flops(tied, torch.tensor([7])) == training_flops(apart, torch.tensor([7]))


def test_the_use_of_the_machine_is_a_share_of_what_it_can_do(new):
    agent = new(GRPO, epochs_per_batch=2, kl_loss_coef=0.1).learn()
    cpu = torch.device("cpu")
    for line in metrics_of(agent.config.run_dir):
        learned = line["time_forward"] + line["time_backward"]
        flops = line["mfu"] * learned * peak_flops(cpu, torch.float32)
        # Two epochs of sixteen episodes of two to four tokens.
        shortest, longest = (training_flops(agent.policy, torch.full((16,), n)) for n in (2, 4))
        assert 2 * shortest <= flops <= 2 * longest
    assert 0 < line["mfu"] < 1
    assert 10 < line["memory_peak_mb"] <= memory_peak_mb(cpu)


# --- Writing beside training ---


@pytest.fixture
def gate(monkeypatch):
    """Holds up whatever writes a checkpoint."""
    opened, write = threading.Event(), run.save_file

    def write_when_open(tensors, path):
        assert opened.wait(60)
        write(tensors, path)

    monkeypatch.setattr(run, "save_file", write_when_open)
    return opened


def test_training_goes_on_while_a_checkpoint_is_written_and_it_holds_its_own_step(new, gate):
    agent, seen = new(GRPO, checkpoint_every=2), {}

    def look(training):
        seen[training.step] = parameters(agent)
        checkpoints = Path(agent.config.run_dir, "checkpoints")
        assert training.step == 1 or not (checkpoints / "000002").exists()
        if training.step == 3:
            gate.set()

    agent.learn(callback=look)
    assert max(seen) == 3
    assert not same(seen[2], seen[3])
    resumed = GRPO(COPY, agent.config, resume=True)
    assert same(parameters(resumed), seen[3])
    saved = load_file(Path(agent.config.run_dir, "checkpoints", "000002", "model.safetensors"))
    names = [name for name, _ in agent.policy.model.named_parameters()]
    assert same([saved[name] for name in names], seen[2])


def test_one_checkpoint_at_most_is_under_way(new, gate):
    agent = new(GRPO, checkpoint_every=1)
    threading.Timer(0.5, gate.set).start()

    def look(training):
        new_ones = [path.name for path in Path(agent.config.run_dir, "checkpoints").glob("*.new")]
        assert len(new_ones) <= 1

    agent.learn(callback=look)


@pytest.mark.parametrize("what", ["rollouts", "checkpoints"])
def test_a_broken_disk_stops_the_training_with_the_error_it_gave(new, monkeypatch, what):
    replace = os.replace

    def replace_or_fail(new, path):
        if what in str(path) and "000002" in str(path):
            raise OSError(5, "Input/output error")
        replace(new, path)

    agent, steps = new(GRPO, checkpoint_every=1, total_episodes=160), []
    monkeypatch.setattr(run.os, "replace", replace_or_fail)
    with pytest.raises(OSError, match="Input/output error"):
        agent.learn(callback=lambda training: steps.append(training.step))
    assert steps[-1] <= 3
    monkeypatch.undo()
    GRPO(COPY, agent.config, resume=True).learn()
    assert [line["step"] for line in metrics_of(agent.config.run_dir)] == list(range(1, 11))


def test_when_training_has_ended_all_is_on_disk(new, gate):

    def open_later(training):
        if training.step == 3:
            threading.Timer(0.5, gate.set).start()

    agent = new(GRPO).learn(callback=open_later)
    folder = Path(agent.config.run_dir)
    assert not list(folder.rglob("*.new"))
    assert len(list((folder / "rollouts").iterdir())) == 3
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["000003"]


# --- One step late ---


class Copying(NativeEngine):
    """Has weights of its own, renewed by a sync alone, as vLLM has."""

    def __init__(self, policy):
        super().__init__(policy)
        self.held = copy.deepcopy(policy)

    def sync(self, policy):
        super().sync(policy)
        self.held = copy.deepcopy(policy)

    def generate(self, *arguments):
        policy, self.policy = self.policy, self.held
        try:
            return super().generate(*arguments)
        finally:
            self.policy = policy


def copying(agent):
    agent.engine = Copying(agent.policy)
    return agent


def batches_of(agent, monkeypatch, **learn):
    """The batches that an agent samples, and for each the weights that it was sampled with and those it trained."""
    collect, seen = Rollout.collect, []

    def noted(self, *arguments, **options):
        batch = collect(self, *arguments, **options)
        if self.split == "train":
            seen.append((batch, [p.detach().clone() for p in self.policy.parameters()], threading.current_thread()))
        return batch

    monkeypatch.setattr(Rollout, "collect", noted)
    agent.learn(**learn)
    return seen


@over(SAMPLING, slow=(RAFT, PPO))
def test_each_batch_is_sampled_with_the_weights_of_the_step_before(new, monkeypatch, agent_class):
    changes = {"max_sampling": 1} if agent_class is DAPO else {}
    agent, after = new(agent_class, staleness=1, **changes), []
    start = parameters(agent)
    seen = batches_of(agent, monkeypatch, callback=lambda training: after.append(parameters(agent)))
    assert len(seen) == len(after) == 3
    expected = [start, start, after[0]]
    assert all(same(used, wanted) for (_, used, _), wanted in zip(seen, expected, strict=True))
    assert not same(after[0], after[-1])
    assert [line["staleness"] for line in metrics_of(agent.config.run_dir)] == [0, 1, 1]


def test_the_next_batch_is_sampled_while_this_one_is_learned_from(new, monkeypatch):
    agent, learning = new(GRPO, staleness=1), threading.Event()
    step, collect, together = agent.learner.step, Rollout.collect, []

    def step_noted(*arguments, **options):
        learning.set()
        return step(*arguments, **options)

    def collect_while_learning(self, index, *arguments, **options):
        if self.split == "train" and index:  # not the first one
            together.append(learning.wait(60))
            learning.clear()
        return collect(self, index, *arguments, **options)

    monkeypatch.setattr(agent.learner, "step", step_noted)
    monkeypatch.setattr(Rollout, "collect", collect_while_learning)
    agent.learn()
    assert together == [True, True]


@over(SAMPLING, slow=(DAPO, RAFT, PPO))
def test_one_step_late_changes_nothing_while_the_weights_stay(new, monkeypatch, agent_class):
    changes = {"learning_rate": 1e-30} | ({"max_sampling": 2} if agent_class is DAPO else {})
    runs = []
    for staleness in (0, 1):
        with monkeypatch.context() as patch:
            agent = new(agent_class, staleness=staleness, **changes)
            seen = batches_of(agent, patch)
            runs.append((seen, metrics_of(agent.config.run_dir)))
    (one, lines), (late, late_lines) = runs
    assert all(torch.equal(x.tokens_BT, y.tokens_BT) for (x, *_), (y, *_) in zip(one, late, strict=True))
    for line, late_line in zip(lines, late_lines, strict=True):
        assert late_line["loss"] == pytest.approx(line["loss"], rel=1e-3, abs=1e-6)
        assert late_line.get("tis_mean", 1.0) == pytest.approx(1.0, abs=1e-4)


@over(SAMPLING, slow=(DAPO, RAFT, PPO))
def test_a_late_run_can_be_repeated_bit_by_bit(new, agent_class):
    ends = [parameters(new(agent_class, staleness=1, updates_per_batch=2).learn()) for _ in range(2)]
    assert same(*ends)


@over(SAMPLING, slow=(DAPO, RAFT, PPO))
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_late_run_that_is_resumed_ends_as_if_it_had_not_been_broken_off(new, agent_class, step, tmp_path):
    whole = new(agent_class, staleness=1, total_episodes=80, checkpoint_every=1).learn()
    settings = dataclasses.replace(whole.config, run_dir=str(tmp_path / "broken-off"))

    class Killed(Exception):  # noqa: N818
        pass

    def die(training):
        if training.step == step:
            raise Killed

    with pytest.raises(Killed):
        copying(agent_class(COPY, settings)).learn(callback=die)
    resumed = copying(agent_class(COPY, settings, resume=True)).learn()
    assert same(parameters(resumed), parameters(whole))
    for line, expected in zip(metrics_of(settings.run_dir), metrics_of(whole.config.run_dir), strict=True):
        assert [line.get(name) for name in ("reward", "logp_gap", "loss", "tis_mean", "staleness")] == [
            expected.get(name) for name in ("reward", "logp_gap", "loss", "tis_mean", "staleness")
        ]


def test_the_gap_to_the_engine_is_measured_at_the_weights_that_sampled(new):
    settings = copying(new(GRPO, staleness=1, learning_rate=3e-2, max_grad_norm=1e9)).learn().config
    lines = metrics_of(settings.run_dir)
    assert max(abs(math.log(line.get("tis_mean", 1.0))) for line in lines) > 1e-2, "weights that move were wanted"
    assert max(line["logp_gap_max"] for line in lines) < 1e-4


def test_an_evaluation_between_late_steps_is_of_the_newest_weights_and_changes_nothing(new):
    plain = new(GRPO, staleness=1).learn()
    agent, found = new(GRPO, staleness=1), []
    agent.learn(callback=lambda training: found.append((agent.evaluate(8), parameters(agent))) and None)
    assert same(parameters(agent), parameters(plain))
    fresh = new(GRPO)
    for evaluation, weights in found:
        with torch.no_grad():
            for parameter, tensor in zip(fresh.policy.parameters(), weights, strict=True):
                parameter.copy_(tensor)
        assert fresh.evaluate(8) == evaluation


def test_an_error_while_sampling_ahead_stops_the_training_after_the_step_that_is_whole(new, monkeypatch):
    collect = Rollout.collect

    def broken(self, index, *arguments, **options):
        if self.split == "train" and index == 8:
            raise ZeroDivisionError
        return collect(self, index, *arguments, **options)

    monkeypatch.setattr(Rollout, "collect", broken)
    agent = new(GRPO, staleness=1)
    with pytest.raises(ZeroDivisionError):
        agent.learn()
    assert [line["step"] for line in metrics_of(agent.config.run_dir)] == [1, 2]


SAMPLED_BT = torch.tensor([[False, True, True, True], [False, True, True, False]])
BEHAVIOUR_BT = torch.tensor([[0.0, -2.0, -1.0, -1.0], [0.0, -1.0, -3.0, 0.0]])
OLD_BT = BEHAVIOUR_BT + torch.tensor([[0.0, 1.0, 0.0, -0.1], [0.0, 0.3, 5.0, 0.0]])


def scored(logp_BT):
    return Scored(torch.arange(2), SAMPLED_BT, logp_BT, torch.zeros(2, 4))


def test_tokens_are_weighed_by_themselves_and_no_weight_is_above_the_cap():
    weight_BT, metrics = tis_weights(scored(OLD_BT), OLD_BT, behaviour_BT=BEHAVIOUR_BT, tokens=5)
    expected = [TIS_CAP, 1.0, math.exp(-0.1), math.exp(0.3), TIS_CAP]
    assert weight_BT[SAMPLED_BT].tolist() == pytest.approx(expected)
    assert float(metrics["tis_mean"]) == pytest.approx(sum(expected) / 5)
    assert float(metrics["tis_capped_share"]) == pytest.approx(2 / 5)


def test_the_weights_scale_the_gradient_of_each_token_and_have_none_themselves():
    config, gradients = GRPOConfig(aggregation="token_mean"), []
    for weigh in (None, partial(tis_weights, behaviour_BT=BEHAVIOUR_BT, tokens=5)):
        logp_BT = OLD_BT.clone().requires_grad_()
        loss, _ = policy_loss(
            scored(logp_BT),
            config=config,
            advantage=torch.tensor([1.0, -1.0]),
            old_BT=None,
            denominators=Denominators(tokens=5, sequences=2, max_new_tokens=3),
            weigh=weigh,
        )
        loss.backward()
        gradients.append(logp_BT.grad[SAMPLED_BT])
    expected = torch.tensor([TIS_CAP, 1.0, math.exp(-0.1), math.exp(0.3), TIS_CAP])
    torch.testing.assert_close(gradients[1], gradients[0] * expected)


def test_with_the_weights_a_late_gradient_is_that_of_the_policy_now():
    """Over all answers of one token: the mean of w A grad log pi under the older policy is that of A grad log pi under pi."""
    torch.manual_seed(0)
    logits_V = torch.randn(6, dtype=torch.float64, requires_grad=True)
    behaviour_V = torch.log_softmax(logits_V.detach() + 0.2 * torch.randn(6, dtype=torch.float64), dim=0)
    logp_V, advantage_V = torch.log_softmax(logits_V, dim=0), torch.randn(6, dtype=torch.float64)
    exact = torch.autograd.grad((logp_V.exp() * advantage_V).sum(), logits_V, retain_graph=True)[0]
    each = Scored(torch.arange(6), torch.ones(6, 1, dtype=torch.bool), logp_V.unsqueeze(1), torch.zeros(6, 1))
    weight_V1, _ = tis_weights(each, logp_V.detach().unsqueeze(1), behaviour_BT=behaviour_V.unsqueeze(1), tokens=6)
    assert weight_V1.max() < TIS_CAP
    loss = -(behaviour_V.exp() * weight_V1.squeeze(1) * advantage_V * logp_V).sum()
    torch.testing.assert_close(-torch.autograd.grad(loss, logits_V)[0], exact)
