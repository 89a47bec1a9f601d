"""The comparison of samples to a goal, at toy scale, and its figures by hand."""

import math
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest

from agents.core.engines.base import Sampling
from agents.core.models import load_model
from benchmarks import sample_efficiency
from benchmarks.sample_efficiency import CountingEngine, Curve, Goal, Point, arithmetic, cost, fresh_policy, read_curves
from textenv.task import SPLITS

TOY = Goal(held_out=8, evaluate_every=128, samples_at_most=256)


@pytest.fixture
def policy():
    return fresh_policy(arithmetic())


@pytest.fixture
def model(policy, tmp_path):
    policy.save(tmp_path / "model")
    return tmp_path / "model"


def check_toy_run(label, model, results, capsys):
    sample_efficiency.main(rows=(label,), seeds=(3,), goal=TOY, model=model, results=results)
    assert [path.name for path in results.iterdir()] == [f"{label}-seed3.csv"]
    (curve,) = read_curves(results)[label]
    assert [point.samples for point in curve] == [0, 128, 256]
    assert 0 == curve[0].cpu_seconds < curve[1].cpu_seconds < curve[2].cpu_seconds
    assert f"│ {label} " in capsys.readouterr().out


@pytest.mark.slow
def test_an_agent_leaves_a_curve_and_a_line_of_the_table(model, tmp_path, capsys):
    check_toy_run("grpo", model, tmp_path / "results", capsys)


@pytest.mark.slow
def test_trl_leaves_a_curve_and_a_line_of_the_table(model, tmp_path, capsys):
    pytest.importorskip("trl")
    check_toy_run("trl-grpo", model, tmp_path / "results", capsys)


def test_the_warm_start_ends_with_the_first_evaluation_that_says_enough(tmp_path, capsys):
    sample_efficiency.warm_start(tmp_path / "model", enough=0.0)
    assert load_model(tmp_path / "model").vocab_size == arithmetic().tokenizer().vocab_size
    assert "training stopped after step 5" in capsys.readouterr().out


def test_the_model_has_the_size_of_the_common_task(policy):
    # 4·(4·128² + 3·128·352) in the layers, 2·97·128 in the embeddings, 9·128 in the norms
    assert sum(parameter.numel() for parameter in policy.parameters()) == 828_800


def test_trl_reads_a_prompt_as_the_environment_writes_it(model):
    tokenizer = load_model(model).tokenizer
    for split in SPLITS:
        prompt = arithmetic().problem(0, split, 0).prompt
        assert tokenizer.to_transformers()(text=[prompt])["input_ids"] == [tokenizer.encode_prompt(prompt)]


@pytest.mark.parametrize(
    "row",
    [row for row in sample_efficiency.ROWS if entry_points(group="textenv.agents", name=row.agent)],
    ids=lambda row: row.label,
)
def test_an_agents_settings_are_settings_that_it_has(row):
    (entry,) = entry_points(group="textenv.agents", name=row.agent)
    entry.load().config_class(**{**sample_efficiency.OURS, **row.settings})


def test_a_row_that_cannot_be_run_is_refused_before_anything_starts(monkeypatch):
    with pytest.raises(ValueError, match="no row 'nothing'; there are grpo, "):
        sample_efficiency.find_row("nothing")
    monkeypatch.setattr(sample_efficiency, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs TRL: pip install"):
        sample_efficiency.find_row("trl-grpo")
    monkeypatch.setattr(sample_efficiency, "entry_points", lambda **selected: ())
    with pytest.raises(ValueError, match="needs the agent 'grpo', which is not installed"):
        sample_efficiency.find_row("grpo")


def test_samples_are_counted_and_evaluations_are_not(policy):
    engine = CountingEngine(policy)
    engine.generate([[1, 2], [3, 4]], Sampling(max_new_tokens=2, temperature=1.0), n=3)
    engine.generate([[1, 2]], Sampling(max_new_tokens=2, temperature=0.0))
    assert engine.samples == 6


def test_the_clock_stands_still_during_evaluations_and_the_goal_ends_a_run(policy, monkeypatch):
    clock, accuracies = SimpleNamespace(now=1000.0), iter([0.3, 0.5, 0.9])

    def evaluate(rollout, episodes):
        clock.now += 50
        return SimpleNamespace(accuracy=next(accuracies))

    monkeypatch.setattr(sample_efficiency, "evaluate", evaluate)
    monkeypatch.setattr(sample_efficiency.time, "process_time", lambda: clock.now)
    curve = Curve(policy, 0, Goal(accuracy=0.9, evaluate_every=100))
    curve.start()
    over = []
    for samples in (40, 80, 120, 160, 200):  # evaluated when 100 and 200 are passed
        clock.now += 2
        over.append(curve.over(samples))
    assert curve.points == [Point(0, 0.0, 0.3), Point(120, 6.0, 0.5), Point(200, 10.0, 0.9)]
    assert over == [False, False, False, False, True]


def test_a_run_gives_up_when_its_samples_are_used(policy):
    curve = Curve(policy, 0, TOY)
    curve.start()
    assert [curve.over(samples) for samples in (128, 255, 256)] == [False, False, True]


def test_a_run_costs_what_it_used_when_the_goal_was_first_reached():
    run = [Point(0, 0.0, 0.3), Point(100, 2.0, 0.91), Point(200, 4.0, 0.85), Point(300, 6.0, 0.95)]
    assert cost(run, 0.9) == (100, 2.0)
    assert cost(run, 0.93) == (300, 6.0)
    assert cost(run, 0.99) == (math.inf, math.inf)


def test_the_table_holds_medians_against_the_peers(capsys):
    def runs(*costs):
        return [[Point(0, 0.0, 0.3), Point(samples, seconds, 0.9)] for samples, seconds in costs]

    curves = {
        "grpo": runs((100, 5.0), (300, 7.0), (200, 9.0)),
        "trl-grpo": runs((400, 10.0)),
        "ppo": [[Point(0, 0, 0)]],
    }
    sample_efficiency.Console(width=120).print(sample_efficiency.table(curves, 0.9))
    cells = {row[1]: row[2:] for row in (line.split("│") for line in capsys.readouterr().out.splitlines()) if row[1:]}
    lines = {label.strip(): [cell.strip() for cell in cells] for label, cells in cells.items()}
    assert lines["grpo"][:6] == ["100 / 300 / 200", "200", "0.50 ×", "5 / 7 / 9", "7", "0.70 ×"]
    assert lines["trl-grpo"][:6] == ["400", "400", "–", "10", "10", "–"]
    assert lines["ppo"][:6] == ["–"] * 6
