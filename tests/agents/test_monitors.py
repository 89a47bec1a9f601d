"""Monitors: they see what is not trained on, say when it moves, and change nothing."""

import dataclasses
import json
import math
import re

import gymnasium
import numpy as np
import pytest
import torch
from scipy import stats

import textenv
from agents.core import monitors
from agents.core.lora import merged_state
from agents.core.models import load_model
from agents.core.monitors import FallTest, HeldOutMonitor, RewardMonitor, StopWhenFalls, Together, TripwireTask, watch
from agents.dapo import DAPO
from agents.grpo import GRPO
from agents.ppo import PPO
from agents.raft import RAFT
from agents.sft import SFT
from rewards import Reward, Score, ungraded
from textenv.cli import main

COPY = "textenv/ProbeDelayedCopy-v0"
ONE_HOT = "textenv/ProbeOneHot-v0"
EVERY = (GRPO, DAPO, RAFT, PPO, SFT)


@pytest.fixture
def new(fresh_model, config):
    """Makes an agent for a few quick steps, of a fresh model."""

    def make(agent_class=GRPO, **changes):
        return agent_class(COPY, config(fresh_model(COPY), agent_class, **{"env_options": {"delay": 0}} | changes))

    return make


def metrics_of(agent):
    with open(f"{agent.config.run_dir}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def weights(agent):
    return torch.cat([tensor.flatten() for tensor in merged_state(agent.policy.model).values()])


def without_times(lines):
    measured = re.compile("seconds|tokens_per_second|time_.*|memory_peak_mb|mfu")
    return [{name: value for name, value in line.items() if not measured.fullmatch(name)} for line in lines]


@pytest.mark.parametrize("agent_class", EVERY, ids=lambda agent_class: agent_class.name)
def test_monitors_change_no_number_of_the_training(new, agent_class):
    plain, watched = new(agent_class).learn(), new(agent_class)
    watched.learn(callback=Together(RewardMonitor("exact"), TripwireTask(COPY, episodes=8, every=1)))
    assert torch.equal(weights(plain), weights(watched))
    own = [{name: line[name] for name in line if "/" not in name} for line in metrics_of(watched)]
    assert without_times(own) == without_times(metrics_of(plain))


def test_a_monitor_logs_the_mean_of_its_reward_over_what_each_step_sampled(new):
    seen = []

    class Watching(Reward):
        name = "watching"

        def __call__(self, samples):
            seen.append(samples)
            return [Score(3.0) if number else ungraded("no idea") for number in range(len(samples))]

    agent = new().learn(callback=RewardMonitor(Watching()))
    lines = metrics_of(agent)
    assert [line["monitor/watching"] for line in lines] == [3.0] * len(lines)
    assert [len(samples) for samples in seen] == [16] * len(lines)
    assert all(sample.turns == (sample.completion,) and sample.reference == sample.prompt for sample in seen[0])


def test_a_monitor_sees_the_very_samples_that_the_trained_reward_saw(new):
    trained, seen = [], []

    class Remember(Reward):
        name = "remember"

        def __init__(self, into):
            self.into = into

        def __call__(self, samples):
            self.into += samples
            return [Score(float("b" in sample.completion)) for sample in samples]

    agent = new(DAPO)
    agent.reward = Remember(trained)
    agent.learn(callback=RewardMonitor(Remember(seen)))
    assert seen
    assert all(sample in trained for sample in seen)


def test_what_a_problem_carries_reaches_the_monitor(new):
    agent, seen = new(), []
    draw = agent.task.draw
    agent.task.draw = lambda rng: dataclasses.replace(draw(rng), info={"level": "easy"})

    class Remembers(Reward):
        def __call__(self, samples):
            seen.extend(samples)
            return [Score(0.0)] * len(samples)

    agent.learn(callback=RewardMonitor(Remembers()))
    assert {sample.info["level"] for sample in seen} == {"easy"}


def test_where_nothing_can_be_graded_the_monitor_is_null_and_says_so_once(new, capsys):
    lines = metrics_of(new().learn(callback=RewardMonitor(lambda prompt, completion, reference: 1 / 0)))
    assert {line["monitor/<lambda>"] for line in lines} == {None}
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("monitor <lambda>")]
    assert told == ["monitor <lambda>: it could grade no episode of step 1: ZeroDivisionError: division by zero"]


def test_a_tripwire_tells_when_the_reward_leaves_the_interval_of_the_start(new, monkeypatch, capsys):
    agent = new(total_episodes=96)
    steps = -(-96 // 16)
    measured = iter([0.5, 0.5, 0.9, 0.95, 0.5, 0.1, 0.5])
    evaluate = monitors.evaluate

    def scripted(rollout, episodes):
        mean = next(measured)
        return dataclasses.replace(evaluate(rollout, 4), reward=mean, reward_low=mean - 0.2, reward_high=mean + 0.2)

    monkeypatch.setattr(monitors, "evaluate", scripted)
    agent.learn(callback=TripwireTask(COPY, episodes=4, every=1))
    lines = metrics_of(agent)
    assert len(lines) == steps == 6
    assert [line[f"tripwire/{COPY}"] for line in lines] == [0.5, 0.9, 0.95, 0.5, 0.1, 0.5]
    assert [line[f"tripwire_moved/{COPY}"] for line in lines] == [0, 1, 1, 0, 1, 0]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tripwire")]
    assert said == [
        f"tripwire {COPY}: reward 0.500 [0.300, 0.700] at the start",
        f"tripwire {COPY}: the reward moved to 0.900 in step 2, out of the 95 % interval [0.300, 0.700] of the start, "
        "though nothing here is trained on it",
        f"tripwire {COPY}: the reward moved to 0.100 in step 5, out of the 95 % interval [0.300, 0.700] of the start, "
        "though nothing here is trained on it",
    ]


def test_a_tripwire_on_the_trained_task_itself_trips(new):
    agent = new(total_episodes=480).learn(callback=TripwireTask(COPY, every=10, delay=0))
    last = [line for line in metrics_of(agent) if f"tripwire/{COPY}" in line]
    assert [line["step"] for line in last] == [10, 20, 30]
    assert last[-1][f"tripwire_moved/{COPY}"] == 1


def test_a_tripwire_is_played_every_so_many_steps_and_in_the_last(new):
    agent = new(total_episodes=96).learn(callback=TripwireTask(COPY, episodes=4, every=4))
    assert [line["step"] for line in metrics_of(agent) if f"tripwire/{COPY}" in line] == [4, 6]


def test_a_resumed_run_goes_on_from_the_tripwires_own_start(new):
    def watched():
        return Together(RewardMonitor("exact"), TripwireTask(COPY, episodes=16, every=1, delay=0))

    whole = new(total_episodes=96, checkpoint_every=2).learn(callback=watched())
    broken = new(total_episodes=96, checkpoint_every=2, model=whole.config.model)
    broken.learn(callback=Together(watched(), lambda training: training.step < 3))
    resumed = GRPO(COPY, broken.config, resume=True)
    resumed.learn(callback=watched())
    assert without_times(metrics_of(resumed)) == without_times(metrics_of(whole))
    assert torch.equal(weights(resumed), weights(whole))


def test_together_calls_all_and_stops_when_one_asks_for_it(new):
    seen = []
    agent = new().learn(callback=Together(lambda training: False, lambda training: seen.append(training.step)))
    assert seen == [1]
    assert agent.last_training.stopped == "the callback asked for it"


def test_two_monitors_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two monitors have the same name: RewardMonitor 'exact'"):
        Together(RewardMonitor("exact"), RewardMonitor("exact"))


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"env_id": "textenv/Kopy-v0"}, "did you mean textenv/Copy-v0"),
        ({"env_id": COPY, "episodes": 1}, "at least 2 episodes"),
        ({"env_id": COPY, "every": 0}, "every 1 step"),
    ],
)
def test_a_tripwire_that_makes_no_sense_is_refused(arguments, wanted):
    with pytest.raises(ValueError, match=wanted):
        TripwireTask(**arguments)


def test_a_tripwire_that_the_model_cannot_play_is_refused_before_training(new):
    with pytest.raises(ValueError, match="the tripwire textenv/Arithmetic-v0 cannot be played: "):
        new().learn(callback=TripwireTask("textenv/Arithmetic-v0"))
    with pytest.raises(ValueError, match="has max_tokens=65, the model only a context of 64"):
        new().learn(callback=TripwireTask(COPY, max_tokens=65))


def test_a_tripwire_that_cannot_be_graded_is_refused_before_training(new):
    @textenv.register(
        "test/Ungraded-v0", reward=lambda prompt, completion, reference: 1 / 0, max_new_tokens=2, max_tokens=16
    )
    def ungraded_task(rng):
        return "abcd"[rng.integers(4)], "a"

    try:
        with pytest.raises(ValueError, match="cannot tell: 4 of its episodes were ungraded"):
            new().learn(callback=TripwireTask("test/Ungraded-v0", episodes=4, holdout=0))
    finally:
        del textenv.registry["test/Ungraded-v0"], gymnasium.registry["test/Ungraded-v0"]


# --- Stopping ---


def first_fall(values, window=10, **settings):
    """The step, counted from 1, at which a series is said to have fallen; None if never."""
    test = FallTest(window, **settings)
    return next((step for step, value in enumerate(values, start=1) if test.add(step, value)), None)


def test_the_fall_test_is_welchs_against_the_best_window_with_a_stricter_level_each_time():
    # Windows of 3 with means 2, 5 and 3. Neighbours of the last two differ by 1 and -2, and by 0 and 3: variances 5/4 and 9/4,
    # each with 8/5 degrees of freedom. t = 2 / sqrt(3.5 / 3) = 1.8516 on 3.5² / (1.25² + 2.25²) 8/5 = 2.9585 of them: one-sided
    # p = 0.0812. The level of the third window is alpha / (3 * 2 * 2).
    values = [1, 2, 3, 5, 6, 4, 2, 2, 5]
    assert stats.t.sf(1.85164, 2.95849) == pytest.approx(0.0812, abs=5e-5)
    assert first_fall(values, 3, alpha=0.0813 * 12) == 9
    assert first_fall(values, 3, alpha=0.0811 * 12) is None
    test = FallTest(3)
    for step, value in enumerate(values, start=1):
        test.add(step, value)
    assert (test.best, test.best_variance, test.best_step, test.last, test.windows) == (5, 1.25, 6, 3, 3)


def test_a_series_that_only_scatters_hardly_ever_falls():
    noise = np.random.default_rng(0).normal(size=(200, 200))
    for trend in (0.0, 4.0):
        fell = sum(first_fall(row + np.linspace(0, trend, 200), alpha=0.2) is not None for row in noise)
        assert fell <= 0.2 * 200


def test_a_fall_of_four_deviations_is_seen_within_a_few_windows_and_a_dip_is_not():
    rng = np.random.default_rng(0)
    seen = [first_fall([*rng.normal(size=100), *rng.normal(-4, size=100)]) for _ in range(50)]
    assert sum(step in (110, 120) for step in seen) >= 45
    dips = [first_fall([*rng.normal(size=100), *rng.normal(-4, size=2), *rng.normal(size=98)]) for _ in range(50)]
    assert not any(dips)


def test_a_fall_that_begins_within_the_best_window_is_seen():
    noise = np.random.default_rng(0).normal(size=40)
    assert first_fall(noise + np.maximum(20 - 2 * np.arange(40), 0)) == 20


def test_without_noise_a_collapse_is_seen_and_one_problem_less_is_none():
    assert first_fall([1.0] * 40) is None
    assert first_fall([1.0] * 20 + [255 / 256] * 20) is None
    assert first_fall([1.0] * 20 + [0.8] * 20) == 30


class Scripted(RewardMonitor):
    """Measures what it is told."""

    def __init__(self, values):
        super().__init__("exact")
        self.values = values

    def measure(self, training, batch):
        return {self.metric: self.values[training.step - 1]}


UP_AND_DOWN = [0.1, 0.2, 0.5, 0.6, 0.5, 0.6, 0.1, 0.2, 0.1, 0.1]


def test_a_training_stops_when_what_is_watched_falls_and_keeps_its_best_model(new, tmp_path):
    kept = []
    agent = new(total_episodes=160)
    watching = StopWhenFalls(Scripted(UP_AND_DOWN), window=2, alpha=0.9)
    agent.learn(callback=Together(lambda training: kept.append(weights(agent)), watching))
    best = f"{agent.config.run_dir}/best-monitor-exact"
    # Windows: 0.15, 0.55, 0.55, 0.15.
    assert agent.last_training.step == 8
    assert agent.last_training.stopped == (
        f"monitor/exact fell to 0.15 from 0.55, its mean over the 2 values that ended with step 4; the model of that step is "
        f"in {best}"
    )
    saved = load_model(best)
    assert torch.equal(torch.cat([tensor.flatten() for tensor in merged_state(saved.model).values()]), kept[3])
    assert not list(agent.last_training.run.folder.glob("*.new"))


def test_a_resumed_run_stops_where_the_whole_one_did_and_takes_no_step_after(new):
    def watched():
        return StopWhenFalls(Scripted(UP_AND_DOWN), window=2, alpha=0.9)

    whole = new(total_episodes=160, checkpoint_every=3).learn(callback=watched())
    broken = new(total_episodes=160, checkpoint_every=3, model=whole.config.model)
    broken.learn(callback=Together(watched(), lambda training: training.step < 5))  # amid a window
    resumed = GRPO(COPY, broken.config, resume=True)
    resumed.learn(callback=watched())
    assert resumed.last_training.step == 8
    assert without_times(metrics_of(resumed)) == without_times(metrics_of(whole))
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.state == whole.state
    again = GRPO(COPY, broken.config, resume=True)
    again.learn(callback=watched())
    assert again.last_training.step == again.start == 8


def test_a_step_that_could_not_be_measured_is_no_value(new):
    values = [0.5, math.nan, 0.6, 0.5, math.nan, 0.6, 0.1, 0.2, 0.1, 0.1]
    agent = new(total_episodes=160).learn(callback=StopWhenFalls(Scripted(values), window=2, alpha=0.9))
    assert agent.last_training.step == 8
    assert agent.state["fall/monitor/exact/windows"] == 3


def test_held_out_problems_are_played_greedily_by_either_reward(new):
    rewarded = []

    class Remember(Reward):
        name = "remember"

        def __call__(self, samples):
            rewarded.append([sample.prompt for sample in samples])
            return [Score(float(len(sample.completion)), {"correct": 0.0}) for sample in samples]

    agent = new(total_episodes=80)
    agent.learn(callback=Together(HeldOutMonitor(every=2), HeldOutMonitor(Remember(), episodes=4, every=2)))
    measured = [line for line in metrics_of(agent) if "held_out" in line]
    assert [line["step"] for line in measured] == [2, 4, 5]
    assert measured[-1]["held_out"] == agent.evaluate(256).reward
    assert all(0 <= line["held_out/remember"] <= 8 for line in measured)
    assert rewarded == [[agent.task.problem(0, "eval", index).prompt for index in range(4)]] * 3


def test_two_stops_keep_their_own_counts_and_models(new):
    own, other = (
        StopWhenFalls(HeldOutMonitor(every=1, episodes=4), window=2),
        StopWhenFalls(HeldOutMonitor("exact", every=1, episodes=4), window=3),
    )
    agent = new(total_episodes=64).learn(callback=Together(own, other))
    assert (agent.state["fall/held_out/windows"], agent.state["fall/held_out/exact/windows"]) == (2, 1)
    kept = {path.name for path in agent.last_training.run.folder.glob("best*")}
    assert kept == {"best-held_out", "best-held_out-exact"}


def test_a_name_makes_the_monitor_that_is_watched():
    assert isinstance(StopWhenFalls("monitor/exact").source, RewardMonitor)
    assert StopWhenFalls("held_out").source.metric == "held_out"
    assert StopWhenFalls("held_out/exact").source.metric == "held_out/exact"


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: StopWhenFalls("exact"), "what may fall is monitor/REWARD, held_out or held_out/REWARD, got 'exact'"),
        (lambda: StopWhenFalls("monitor/"), "what may fall is monitor/REWARD"),
        (lambda: StopWhenFalls("held_out/exakt"), "did you mean 'exact'"),
        (lambda: StopWhenFalls("held_out", window=1), "windows of 2 values or more"),
        (lambda: StopWhenFalls("held_out", alpha=0.0), r"alpha in \(0, 1\)"),
        (lambda: HeldOutMonitor(every=0), "every 1 step"),
        (lambda: HeldOutMonitor(episodes=0), "at least 1 held-out problem"),
        (
            lambda: Together(RewardMonitor("exact"), StopWhenFalls("monitor/exact")),
            "two monitors have the same name: RewardMonitor 'exact'",
        ),
    ],
)
def test_a_stop_that_makes_no_sense_is_refused(make, wanted):
    with pytest.raises(ValueError, match=wanted):
        make()


# --- On the command line ---

QUICK = "--total-episodes 32 --prompts-per-step 4 --group-size 4 --eval-episodes 8 --learning-rate 1e-2 --run-dir run"
WATCHED = f"--monitor exact --monitor format_tags --tripwire {COPY} --stop-when-falls held_out/exact"


def test_flags_set_monitors_that_a_resumed_run_remembers(fresh_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["train", "grpo", ONE_HOT, "--model", fresh_model(ONE_HOT), *QUICK.split(), *WATCHED.split()])
    assert f"tripwire {COPY}: reward " in capsys.readouterr().out
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    flags = [
        ["monitor", "exact"],
        ["monitor", "format_tags"],
        ["tripwire", COPY],
        ["stop_when_falls", "held_out/exact"],
    ]
    assert described["monitors"] == flags
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all({"monitor/exact", "monitor/format_tags"} <= line.keys() for line in lines)
    started = []
    monkeypatch.setattr(Together, "start", lambda self, training: started.append([m.name for m in self.monitors]))
    main(["train", "--resume", "run"])
    assert started == [["exact", "format_tags", COPY, "exact"]]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("--monitor exakt", "no reward is named 'exakt'; did you mean 'exact'"),
        ("--monitor soft_overlong", "reward 'soft_overlong': missing a required argument: 'max_tokens'"),
        ("--stop-when-falls gold", "what may fall is monitor/REWARD, held_out or held_out/REWARD, got 'gold'"),
        ("--tripwire textenv/Kopy-v0", "did you mean textenv/Copy-v0"),
        ("--tripwire textenv/Arithmetic-v0", "the tripwire textenv/Arithmetic-v0 cannot be played: "),
    ],
)
def test_a_bad_flag_gets_one_line_before_a_model_loads(fresh_model, monkeypatch, capsys, flags, wanted):
    monkeypatch.setattr("agents.core.agent.load_policy", lambda *arguments: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit):
        main(["train", "grpo", ONE_HOT, "--model", fresh_model(ONE_HOT), *flags.split()])
    shown = capsys.readouterr().err
    assert wanted in shown
    assert len(shown.strip().splitlines()) == 1


def test_what_stops_a_training_when_it_falls_may_be_asked_for_as_a_monitor_too():
    both = watch([("monitor", "exact"), ("stop_when_falls", "monitor/exact"), ("monitor", "numeric")])
    assert [type(monitor) for monitor in both.monitors] == [StopWhenFalls, RewardMonitor]


def test_a_monitor_may_have_options():
    assert watch([("monitor", "exact ignore_case true")]).monitors[0].reward.ignore_case
