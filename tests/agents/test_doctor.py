"""Alarms: each rule fires on what it is for and on nothing else, once, and a run that is well has none."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agents.core import doctor
from agents.core.doctor import ALARMS_FILE, FIRST_STEPS, RULES, Doctor, one_line
from agents.core.learner import Learner
from agents.core.monitors import HeldOutMonitor
from agents.core.policy import Policy
from agents.core.rollout import Rollout
from agents.core.run import Run
from agents.core.trajectories import Trajectories, summary
from agents.dapo import DAPO
from agents.grpo import GRPO, GRPOConfig
from agents.ppo import PPO
from agents.raft import RAFT
from agents.sft import SFT, SFTConfig
from rewards import Reward, Score, ungraded
from rewards.judge import BaseChat, GroupJudge
from tests.agents.conftest import make_model
from textenv import Finish, Source, make_task
from textenv.cli import main

COPY, SUBSTRING = "textenv/ProbeDelayedCopy-v0", "textenv/ProbeSubstring-v0"
SAMPLING = (GRPO, DAPO, RAFT, PPO)
STEPS = 5
"""More than any rule needs in a row."""


class Judge(Reward):
    """Has a budget."""

    def __init__(self):
        chat = type("Scripted", (BaseChat,), {"ask": lambda self, requests: []})
        self.chat = chat("judge", max_calls=100, max_tokens=None, cache_dir=None)

    def __call__(self, samples):
        return [Score(0.0)] * len(samples)


@pytest.fixture
def training(tokenizer, tmp_path):
    """What the doctor sees of a training, without one."""
    policy = Policy(make_model("llama"), tokenizer)
    state = {"episodes": 0}
    config = GRPOConfig(on_alarm="stop")
    agent = SimpleNamespace(
        config=config, policy=policy, learner=Learner(policy), state=state, reward=Judge(), stopped=[]
    )
    run = Run(tmp_path, {"agent": "grpo"})
    yield SimpleNamespace(
        agent=agent, step=0, episodes=0, total_episodes=1, metrics={}, run=run, stop=agent.stopped.append
    )
    run.close()


def healthy(step):
    """Four groups of four different answers, half of them right, and what was logged of them."""
    rows, rng = 16, np.random.default_rng(step)
    source_BT = torch.full((rows, 8), int(Source.SAMPLED), dtype=torch.uint8)
    source_BT[:, :2] = int(Source.PROMPT)
    batch = Trajectories(
        tokens_BT=torch.zeros(rows, 8, dtype=torch.int64),
        source_BT=source_BT,
        logp_BT=torch.zeros(rows, 8),
        reward_BT=torch.zeros(rows, 8, dtype=torch.float64),
        penalty_B=torch.zeros(rows, dtype=torch.float64),
        group_B=torch.arange(rows) // 4,
        scores=[Score(float(right), {"correct": float(right)}) for right in np.arange(rows) % 2],
        finish_B=np.full(rows, Finish.EOS),
        prompts=[f"prompt {row // 4}" for row in range(rows)],
        completions=[[f"answer {row}"] for row in range(rows)],
        references=[f"answer {row // 4}" for row in range(rows)],
        kl_B=torch.full((rows,), 0.1, dtype=torch.float64),
    )
    batch.note("ratio", torch.ones(rows, 8))
    learned = {"logp_gap": 1e-7, "loss": 0.0, "entropy": 1.0, "grad_norm": rng.uniform(0.5, 2)}
    held_out = {"held_out": 0.5 + rng.uniform(-0.05, 0.05)}
    return batch, summary(batch) | learned | held_out


def changed(batch, **changes):
    """The episodes with something else, and their metrics."""
    batch = dataclasses.replace(batch, **changes)
    return batch, summary(batch)


def longer(batch):
    width = 40
    source_BT = torch.full((len(batch), width), int(Source.SAMPLED), dtype=torch.uint8)
    wide = {name: torch.zeros(len(batch), width) for name in ("logp_BT", "reward_BT")}
    return changed(
        batch, tokens_BT=torch.zeros(len(batch), width, dtype=torch.int64), source_BT=source_BT, noted={}, **wide
    )


def cut(batch, right):
    finish_B = np.where(np.array([score.correct for score in batch.scores]) == right, Finish.LENGTH, Finish.EOS)
    return changed(batch, finish_B=finish_B)


def flat(batch):
    return changed(batch, scores=[Score(0.0, {"correct": 0.0})] * len(batch))


def barely_graded(batch):
    return changed(batch, scores=[ungraded("time-out"), ungraded("time-out"), *batch.scores[2:]])


def ends_lost(batch):
    """By a reward that reads the answer out of whatever follows it."""
    scores = [Score(1.5 + row % 2, {"correct": 1.0}) for row in range(len(batch))]
    return changed(batch, finish_B=np.full(len(batch), Finish.LENGTH), scores=scores)


def moved(batch):
    batch.note("ratio", torch.full((len(batch), 8), 2.0))
    return batch, {}


def spend(training):
    training.agent.reward.chat.calls = 95


def break_weight(training):
    with torch.no_grad():
        training.agent.policy.model.lm_head.weight[0, 0] = math.nan


BROKEN = {
    "not_finite": lambda batch: (batch, {"loss": math.nan}),
    "cut_answers": lambda batch: cut(batch, right=False),
    "no_spread": flat,
    "repeated": lambda batch: changed(batch, completions=[["42"]] * len(batch)),
    "length": longer,
    "no_end": ends_lost,
    "ungraded": barely_graded,
    "judge_budget": lambda batch: (batch, {}),
    "entropy": lambda batch: (batch, {"entropy": 0.05}),
    "ratio": moved,
    "kl": lambda batch: changed(batch, kl_B=torch.full((len(batch),), 6.0, dtype=torch.float64)),
    "grad_norm": lambda batch: (batch, {"grad_norm": 100.0}),
    "held_out": lambda batch: (batch, {"held_out": 0.1, "reward": 0.8}),
}
"""A change of each healthy step that its rule, and no other, is to tell."""


def go_on(training, steps, change=lambda batch: (batch, {})):
    """Let the doctor look at so many more steps, changed; all alarms so far."""
    for _ in range(steps):
        training.step += 1
        batch, metrics = healthy(training.step)
        batch, other = change(batch)
        training.metrics = metrics | other
        Doctor(training).look(batch)
    path = training.run.folder / ALARMS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_healthy_run_has_no_alarm(training):
    assert go_on(training, 50) == []
    assert training.agent.stopped == []


@pytest.mark.parametrize("name", RULES)
def test_a_rule_fires_once_on_what_it_is_for_and_no_other_does_and_it_is_over_once(training, name, capsys):
    assert go_on(training, FIRST_STEPS + 2) == []
    if name == "judge_budget":
        spend(training)
    (alarm,) = go_on(training, STEPS, BROKEN[name])
    rule = RULES[name]
    first = training.step - STEPS + (2 if name == "held_out" else rule.steps)  # a figure that is smoothed takes longer
    assert (alarm["step"], alarm["rule"], alarm["over"], alarm["threshold"]) == (first, name, False, rule.threshold)
    assert alarm["value"] < rule.threshold if rule.below else alarm["value"] > rule.threshold
    assert len(alarm["samples"]) == 2
    assert training.agent.stopped == [f"{alarm['sentence']} (alarm {name!r})"]
    assert capsys.readouterr().out.startswith(f"ALARM in step {first}: {alarm['sentence']} ({name} ")

    training.agent.reward.chat.calls = 0
    _, over = go_on(training, 30)
    assert (over["rule"], over["over"], over["threshold"]) == (name, True, rule.threshold)
    assert over["step"] >= training.step - 30 + rule.steps
    assert len(training.agent.stopped) == 1
    assert f"all clear in step {over['step']}: {name} is no longer alarming" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.steps > 1])
def test_two_bad_steps_are_no_alarm(training, name):
    go_on(training, FIRST_STEPS + 2)
    for _ in range(4):
        assert go_on(training, 2, BROKEN[name]) == []
        assert go_on(training, 1) == []


def test_what_an_alarm_shows_is_what_it_is_about(training):
    go_on(training, FIRST_STEPS)
    assert go_on(training, 3, BROKEN["cut_answers"])[-1]["samples"] == ["answer 0", "answer 2"]
    assert go_on(training, 3, BROKEN["repeated"])[-1]["samples"] == ["42", "42"]


def test_answers_that_are_cut_but_right_are_well(training):
    assert go_on(training, STEPS, lambda batch: cut(batch, right=True)) == []


def test_an_end_that_was_rare_from_the_start_is_not_lost(training):
    def one_ends(batch):
        batch, _ = ends_lost(batch)
        batch.finish_B[0] = Finish.EOS
        return changed(batch)

    assert go_on(training, FIRST_STEPS, one_ends) == []
    assert go_on(training, STEPS, ends_lost) == []


def test_groups_that_are_all_right_need_no_spread(training):
    assert go_on(training, STEPS, lambda batch: changed(batch, scores=[Score(1.0)] * len(batch))) == []


def test_a_solved_task_needs_no_entropy(training):
    go_on(training, FIRST_STEPS)
    assert go_on(training, STEPS, lambda batch: (batch, {"entropy": 0.01, "accuracy": 0.95})) == []


def test_what_the_references_repeat_may_be_repeated(training):
    same = {"completions": [["yes"]] * 16, "references": ["yes"] * 12 + ["no"] * 4}
    assert go_on(training, STEPS, lambda batch: changed(batch, **same)) == []


def test_without_references_different_prompts_want_different_completions(training):
    same = {"completions": [["yes"]] * 16, "references": [None] * 16}
    assert [alarm["rule"] for alarm in go_on(training, 3, lambda batch: changed(batch, **same))] == ["repeated"]


def test_a_judge_that_compares_has_a_budget_too(training):
    training.agent.reward = GroupJudge(Judge().chat)
    training.agent.reward.judge.chat.calls = 90
    assert go_on(training, 1) == []
    training.agent.reward.judge.chat.calls = 91
    assert go_on(training, 1)[0]["rule"] == "judge_budget"


def test_a_gradient_that_is_long_as_usual_is_no_alarm(training):
    assert go_on(training, FIRST_STEPS + STEPS, lambda batch: (batch, {"grad_norm": 50.0})) == []
    assert go_on(training, 1, lambda batch: (batch, {"grad_norm": 600.0}))[0]["value"] == pytest.approx(12, rel=0.06)


def test_a_held_out_figure_that_falls_with_the_reward_or_by_its_noise_is_no_alarm(training):
    go_on(training, FIRST_STEPS)
    assert go_on(training, STEPS, lambda batch: (batch, {"held_out": 0.1, "reward": 0.2})) == []
    go_on(training, FIRST_STEPS)
    assert go_on(training, STEPS, lambda batch: (batch, {"held_out": 0.45, "reward": 0.9})) == []


def test_the_fall_of_a_held_out_figure_is_told_in_deviations_of_its_noise():
    state = {}
    for step in range(1, 5):
        doctor.fall_from_best(
            state,
            "held_out",
            0.5 + 0.02 * (step % 2),
            0.1,
        )
    found = doctor.fall_from_best(state, "held_out", 0.2, 0.4)
    # Smoothed: 0.52, 0.51333, 0.51556, 0.51037, 0.40691; differences 0.02 three times and 0.3, in the mean 0.09.
    assert found.value == pytest.approx((0.52 - 0.406914) / (0.886227 * 0.09), abs=1e-4)
    assert (found.words["best_paid"], found.words["paid"]) == pytest.approx((0.1, 0.2))


def test_a_weight_that_is_nan_is_named_with_the_step_in_which_it_is_seen(training):
    break_weight(training)
    training.total_episodes = 10**6
    assert go_on(training, 9) == []
    (alarm,) = go_on(training, 1)
    assert alarm["step"] == 10
    assert alarm["sentence"].startswith("the weight model.lm_head.weight is NaN or infinite")


def test_a_broken_weight_is_named_before_the_metrics_that_it_broke(training):
    break_weight(training)
    training.total_episodes = 10**6
    (alarm,) = go_on(training, 1, BROKEN["not_finite"])
    assert alarm["sentence"].startswith("the weight model.lm_head.weight")
    assert alarm["value"] == 2


def test_a_mean_over_nothing_is_not_an_alarm_but_an_infinite_one_is(training):
    nothing = dict.fromkeys(("reward/format", "accuracy", "explained_variance", "monitor/exact"), math.nan)
    assert go_on(training, 3, lambda batch: (batch, nothing)) == []
    (alarm,) = go_on(training, 1, lambda batch: (batch, {"reward/format": math.inf}))
    assert alarm["sentence"].startswith("the metric reward/format is NaN or infinite")


def test_of_demonstrations_nothing_is_told_that_only_a_policy_could_do(training):
    def shown(batch):
        batch, _ = BROKEN["cut_answers"](batch)
        training.metrics = {}
        return batch, {}

    for _ in range(STEPS):
        training.step += 1
        batch, _ = shown(healthy(training.step)[0])
        training.metrics = {"loss": 1.0, "entropy": 0.1, "grad_norm": 1.0}
        Doctor(training).look(batch)
    assert go_on(training, 0) == []


@pytest.mark.parametrize("threshold", [0.55, math.inf])
def test_a_threshold_is_a_setting(training, threshold):
    training.agent.config = GRPOConfig(alarms={"cut_answers": threshold})
    assert go_on(training, STEPS, BROKEN["cut_answers"]) == []
    training.agent.config = GRPOConfig(alarms={"cut_answers": 0.45})
    assert go_on(training, 3, BROKEN["cut_answers"])[0]["threshold"] == 0.45
    assert training.agent.stopped == []  # it warns, by default


def test_a_threshold_that_no_rule_has_is_refused_with_the_nearest_name(capsys):
    with pytest.raises(
        ValueError, match=r"alarms names 'lenght', which is no rule; did you mean 'length'\? there are "
    ):
        GRPOConfig(alarms={"lenght": 3.0})
    with pytest.raises(ValueError, match="the threshold of the alarm 'length' must be a number, got nan"):
        GRPOConfig(alarms={"length": math.nan})
    with pytest.raises(SystemExit):
        main(["train", "grpo", COPY, "--alarms", "cut_answer", "0.5"])
    assert "did you mean 'cut_answers'?" in capsys.readouterr().err


def test_the_table_of_rules_is_that_of_the_code():
    rows = re.findall(r"^(\w+) +([<>]) (\S+) ", doctor.__doc__, flags=re.MULTILINE)
    assert [(name, sign == "<", float(number)) for name, sign, number in rows] == [
        (name, rule.below, rule.threshold) for name, rule in RULES.items()
    ]
    at_once = re.findall(r"^(\w+) .*, in any step$", doctor.__doc__, flags=re.MULTILINE)
    assert at_once == [name for name, rule in RULES.items() if rule.steps == 1]


def test_a_sample_is_one_line_that_does_nothing_to_a_terminal():
    hostile = "\x1b]0;title\x07<script>\r\n\t‮evil⁦\x00 {value} %s 漢字"
    assert one_line(hostile) == "␛]0;title␇<script>␍ �evil�␀ {value} %s 漢字"
    assert one_line("a" * 150 + "b" * 150) == "a" * 100 + " … " + "b" * 100


def test_a_completion_full_of_formats_and_escapes_breaks_no_alarm(training, capsys):
    hostile = {"completions": [["\x1b[2J{nope} [bold]%d\ud800"]] * 16}
    (alarm,) = go_on(training, 3, lambda batch: changed(batch, **hostile))
    assert alarm["samples"] == ["␛[2J{nope} [bold]%d�"] * 2
    assert "\x1b" not in capsys.readouterr().out


# --- In a training ---


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The folder of a model that now and then answers a letter by that letter and nothing else."""
    folder = tmp_path_factory.mktemp("taught")
    tokenizer = make_task(SUBSTRING).tokenizer()
    Policy(make_model("gpt2", vocab_size=tokenizer.vocab_size), tokenizer).save(folder / "fresh")
    sizes = {"prompts_per_step": 32, "total_episodes": 32 * 30, "eval_episodes": 1, "learning_rate": 1e-3}
    config = SFTConfig(model=str(folder / "fresh"), run_dir=str(folder / "run"), warmup_steps=0, **sizes)
    agent = SFT(SUBSTRING, config).learn()
    assert not (folder / "run" / ALARMS_FILE).exists()
    agent.policy.save(folder / "taught")
    return str(folder / "taught")


@pytest.fixture
def new(taught, config):
    def make(agent_class, env_id=SUBSTRING, **changes):
        sizes = {"prompts_per_step": 8, "learning_rate": 1e-3, "total_episodes": 32 * 14}
        own = {PPO: {"group_size": 1, "prompts_per_step": 32}, DAPO: {"max_sampling": 2, "total_episodes": 64 * 14}}
        sizes |= own.get(agent_class, {})
        return agent_class(env_id, config(taught, agent_class, **sizes | changes))

    return make


def alarms_of(agent):
    path = agent.last_training.run.folder / ALARMS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("agent_class", SAMPLING, ids=lambda agent_class: agent_class.name)
def test_an_agent_that_learns_what_it_should_has_no_alarm(new, agent_class):
    agent = new(agent_class).learn(callback=HeldOutMonitor(episodes=16, every=2))
    assert agent.last_training.step > FIRST_STEPS
    assert alarms_of(agent) == []


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["textenv/Arithmetic-v0", "textenv/Sort-v0"])
@pytest.mark.parametrize("agent_class", SAMPLING, ids=lambda agent_class: agent_class.name)
def test_an_agent_on_the_tiny_model_has_no_alarm(agent_class, env_id, config):
    sizes = (
        {"prompts_per_step": 128, "group_size": 1} if agent_class is PPO else {"prompts_per_step": 16, "group_size": 8}
    )
    agent = agent_class(env_id, config("tiny", agent_class, learning_rate=None, total_episodes=128 * 60, **sizes))
    assert alarms_of(agent.learn(callback=HeldOutMonitor(episodes=64, every=5))) == []


def never_ends(monkeypatch, agent, from_step):
    """Every completion counts as cut and wrong from a step on."""
    collect = Rollout.collect

    def collect_cut(rollout, *arguments, **options):
        batch = collect(rollout, *arguments, **options)
        if rollout.split == "eval" or agent.last_training.step + 1 < from_step:
            return batch
        scores = [Score(float(row % 2) / 2) for row in range(len(batch))]
        return dataclasses.replace(batch, finish_B=np.full(len(batch), Finish.LENGTH), scores=scores)

    monkeypatch.setattr(Rollout, "collect", collect_cut)


def test_on_alarm_stop_an_alarm_ends_the_training_with_its_step(new, monkeypatch, capsys):
    agent = new(GRPO, on_alarm="stop")
    never_ends(monkeypatch, agent, from_step=4)
    agent.learn()
    training = agent.last_training
    assert training.step == 6
    assert "alarm 'cut_answers'" in training.stopped
    assert f"training stopped after step 6: {training.stopped}" in capsys.readouterr().out
    assert [path.name for path in (training.run.folder / "checkpoints").iterdir()] == ["000006"]
    assert GRPO(SUBSTRING, agent.config, resume=True).learn().last_training.step == 6


def test_a_run_that_goes_on_from_a_checkpoint_has_the_alarms_of_one_that_never_stopped(new, monkeypatch):
    def train(agent, stop=None):
        with monkeypatch.context() as patched:
            never_ends(patched, agent, from_step=3)
            return agent.learn(callback=lambda training: training.step != stop)

    sizes = {"checkpoint_every": 2, "total_episodes": 32 * 8}
    whole, stopped = train(new(GRPO, **sizes)), train(new(GRPO, **sizes), stop=6)
    # As if it had been killed: the newest checkpoint is older than what was logged, and than the alarm.
    folder = stopped.last_training.run.folder
    (folder / "checkpoints" / "000006").rename(folder / "aside")
    assert [(alarm["rule"], alarm["step"]) for alarm in alarms_of(stopped)] == [("cut_answers", 5)]
    resumed = train(GRPO(SUBSTRING, stopped.config, resume=True))
    assert resumed.start == 4
    assert [(alarm["rule"], alarm["step"]) for alarm in alarms_of(resumed)] == [("cut_answers", 5)]
    assert alarms_of(resumed) == alarms_of(whole)
    assert resumed.state == whole.state


def test_a_gradient_that_is_not_finite_is_named_before_the_run_ends(new, capsys):
    agent = new(GRPO)
    name, weight = list(agent.policy.named_parameters())[3]
    weight.register_hook(lambda grad: grad / 0 if agent.last_training.step == 2 else grad)
    with pytest.raises(FloatingPointError):
        agent.learn()
    (alarm,) = alarms_of(agent)
    assert (alarm["step"], alarm["rule"], len(alarm["samples"])) == (3, "not_finite", 2)
    assert alarm["sentence"].startswith(f"the gradient of {name} is NaN or infinite")
    assert "ALARM in step 3: the gradient of" in capsys.readouterr().out
