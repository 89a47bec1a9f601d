"""`textenv train`, `evaluate` and `generate`, as a person types them."""

import json
import sys
from pathlib import Path

import gymnasium
import pytest

from agents import warmup
from agents.core.engines.native import NativeEngine
from agents.grpo import GRPO, GRPOConfig
from textenv import registry
from textenv.cli import main


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTENV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)


QUICK = "--total-episodes 32 --prompts-per-step 4 --group-size 4 --eval-episodes 8 --learning-rate 1e-2 --run-dir run"


def train(model, env_id="textenv/ProbeOneHot-v0", settings=QUICK):
    main(["train", "grpo", env_id, "--model", model, *settings.split()])


def test_train_ends_with_a_table_samples_the_run_and_what_to_try_next(fresh_model, capsys, tmp_path):
    train(fresh_model("textenv/ProbeOneHot-v0"))
    shown = capsys.readouterr().out
    for promised in (
        "accuracy",
        "before",
        "after",
        "%",
        "samples, wrong ones first",
        "the run is in run",
        "textenv generate",
    ):
        assert promised in shown
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_train_suggests_next_works(fresh_model, capsys):
    train(fresh_model("textenv/ProbeOneHot-v0"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  textenv ")]
    assert {line[1] for line in lines} == {"generate", "evaluate", "list"}
    for line in lines:
        main(line[1:])
    assert "accuracy" in capsys.readouterr().out


def test_a_run_is_resumed_by_its_folder_alone(fresh_model, capsys):
    train(fresh_model("textenv/ProbeOneHot-v0"))
    main(["train", "--resume", "run"])
    assert "the run is in run" in capsys.readouterr().out


def test_generate_keeps_episodes_with_tokens_and_logprobs(fresh_model, tmp_path):
    model = fresh_model("textenv/ProbeDelayedCopy-v0")
    main(f"generate textenv/ProbeDelayedCopy-v0 --model {model} --prompts 2 --group-size 3 --out out.jsonl".split())
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["group"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert all(len(row["tokens"]) == len(row["logp"]) == len(row["source"]) for row in rows)


def test_a_run_that_was_asked_for_other_episodes_than_its_settings_is_resumed_to_these(fresh_model, tmp_path):
    config = GRPOConfig(model=fresh_model("textenv/ProbeOneHot-v0"), prompts_per_step=2, eval_episodes=2, run_dir="run")
    GRPO("textenv/ProbeOneHot-v0", config).learn(total_episodes=48, callback=lambda training: False)
    main(["train", "--resume", "run"])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["episodes"] == 48


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_the_engine_that_is_named_is_the_one_that_answers_and_it_is_closed(command, fresh_model, monkeypatch):
    seen = []
    monkeypatch.setattr(NativeEngine, "close", lambda self: seen.append(self.max_rows))
    model = fresh_model("textenv/ProbeOneHot-v0")
    main([command, "textenv/ProbeOneHot-v0", "--model", model, "--engine", "native max_rows 3"])
    assert seen == [3]


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_an_engine_that_there_is_not_is_refused_before_a_model_is_looked_for(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "textenv/ProbeOneHot-v0", "--model", "no/such-model", "--engine", "nativ"])
    assert "no engine 'nativ'; did you mean 'native'?" in capsys.readouterr().err


def test_evaluate_writes_its_figures(fresh_model, tmp_path):
    model = fresh_model("textenv/ProbeDelayedCopy-v0")
    main(f"evaluate textenv/ProbeDelayedCopy-v0 --model {model} --episodes 10 --json-file figures.json".split())
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["episodes"] == 10
    assert figures["accuracy_low"] <= figures["accuracy"] <= figures["accuracy_high"]


def test_evaluate_shows_and_writes_what_the_best_of_n_earns(fresh_model, capsys, tmp_path):
    model = fresh_model("textenv/ProbeOneHot-v0")
    main(f"evaluate textenv/ProbeOneHot-v0 --model {model} --episodes 40 --best-of 6 --json-file best.json".split())
    shown = capsys.readouterr().out
    assert "40 problems of eval, temperature 1, with 95 % intervals over problems" in " ".join(shown.split())
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["1", "2", "4", "6"]
    assert [row[4] for row in rows] == ["0.000 nats", "0.193 nats", "0.636 nats", "0.958 nats"]
    figures = json.loads((tmp_path / "best.json").read_text())
    assert (figures["problems"], figures["completions"], figures["temperature"]) == (40, 6, 1.0)
    table = figures["table"]
    assert [row["n"] for row in table] == [1, 2, 4, 6]
    assert table[0]["reward"] < table[1]["reward"] < table[2]["reward"] < table[3]["reward"]
    assert all(row["reward_low"] <= row["reward"] <= row["reward_high"] for row in table)
    assert [row[2].split()[0] for row in rows] == [f"{row['reward']:.3f}" for row in table]


def test_the_best_is_picked_by_the_reward_that_is_named(fresh_model, tmp_path):
    command = (
        f"evaluate textenv/ProbeOneHot-v0 --model {fresh_model('textenv/ProbeOneHot-v0')} --episodes 40 --best-of 4"
    )
    main(f"{command} --json-file own.json".split())
    main(f"{command} --json-file exact.json --options reward exact".split())
    own, exact = (json.loads((tmp_path / name).read_text())["table"][-1] for name in ("own.json", "exact.json"))
    assert exact["reward"] < own["reward"]  # its own pays for the first character, whatever follows


def test_evaluate_says_how_many_completions_were_left_out(my_module, fresh_model, capsys):
    limits = "--options max_new_tokens 4 max_tokens 32"
    main(
        f"evaluate me/Moody-v0 --import my_module --model {fresh_model('textenv/Arithmetic-v0')} --episodes 20 --best-of 2 "
        f"{limits}".split()
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "of 40 completions could not be graded and are left out; a problem counts as far as its graded ones go" in shown
    )


MODULE = """
import textenv

@textenv.register("me/Last-v0", max_new_tokens=3, max_tokens=32)
def last(rng):
    word = "".join(rng.choice(list("abcdef"), size=4))
    return f"Last of {word}:", word[-1]

@textenv.register("me/Long-v0", max_tokens=40)
def long(rng):
    return "x" * int(rng.integers(5, 60)), "x"

@textenv.register("me/Moody-v0", reward=lambda prompt, completion, reference: 1 / int(reference))
def moody(rng):
    return f"{rng.integers(10**6)}?", str(int(rng.random() < 0.8))

@textenv.register("me/Broken-v0", reward=lambda prompt, completion, reference: 1 / 0)
def broken(rng):
    return f"{rng.integers(10**6)}?", "1"
"""


@pytest.fixture
def my_module(tmp_path):
    (tmp_path / "my_module.py").write_text(MODULE)
    yield
    sys.modules.pop("my_module", None)
    for env_id in ("me/Last-v0", "me/Long-v0", "me/Moody-v0", "me/Broken-v0"):
        registry.pop(env_id, None)
        gymnasium.registry.pop(env_id, None)


def test_a_module_of_ones_own_trains_the_same_way(my_module, monkeypatch, capsys):
    monkeypatch.setattr(warmup, "MAX_STEPS", 20)
    main(["train", "grpo", "me/Last-v0", "--import", "my_module", *QUICK.split()])
    assert "held-out problems" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            "train grpo textenv/Arithmetik-v0",
            "no environment 'textenv/Arithmetik-v0'; did you mean textenv/Arithmetic-v0",
        ),
        (
            "train gpro textenv/Arithmetic-v0",
            "no agent 'gpro'; did you mean grpo? there are dapo, grpo, ppo, raft, sft",
        ),
        ("train grpo textenv/Arithmetic-v0 --group-size 1", "group_size must be 2 or more"),
        (
            "train grpo textenv/Arithmetic-v0 --env-options digit 3",
            "textenv/Arithmetic-v0 has no option 'digit'; it has",
        ),
        ("train grpo textenv/Arithmetic-v0 --reward exakt", "exact"),
        ("train grpo textenv/Arithmetic-v0 --model empty", "'empty' is not a model folder: no config.json in it"),
        ("train grpo textenv/Arithmetic-v0 --model ./nowhere", "it does not exist"),
        ("train grpo textenv/Arithmetic-v0 --run-dir taken", "taken holds another run"),
        ("train grpo textenv/GSM8K-v0 --env-options data no.jsonl", "no data file no.jsonl"),
        ("train grpo textenv/GSM8K-v0 --env-options data bad.jsonl", "bad.jsonl, row 2: "),
        ("train --resume nowhere", "no run in nowhere"),
        ("train grpo me/Long-v0 --import my_module", "tokens long, but the context of max_tokens=40 has room for 8"),
        ("evaluate textenv/Arithmetic-v0 --model empty", "not a model folder"),
        (
            "evaluate textenv/Arithmetic-v0 --model empty --best-of 4 --temperature 0",
            "temperature must be above 0 for the best of 4, since greedily all completions of a problem are the same, got 0",
        ),
        ("evaluate textenv/Arithmetic-v0 --model empty --best-of 0", "best_of must be at least 1, got 0"),
    ],
)
def test_bad_input_gets_one_clear_line_before_a_model_loads(my_module, tmp_path, capsys, arguments, wanted):
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    (tmp_path / "bad.jsonl").write_text(
        '{"question": "How many?", "answer": "#### 1"}\n{"question": "How many more?"}\n'
    )
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert wanted in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert "warm-up" not in shown.out


def test_a_reward_that_always_raises_stops_the_run_with_its_traceback(my_module, fresh_model, capsys):
    model = fresh_model("textenv/Arithmetic-v0")
    limits = "--max-new-tokens 4 --max-tokens 32"
    with pytest.raises(SystemExit):
        main(f"train grpo me/Broken-v0 --import my_module --model {model} {limits} {QUICK}".split())
    shown = capsys.readouterr().err
    assert "ungraded, more than max_ungraded=0.5" in shown
    assert "ZeroDivisionError" in shown


def test_a_model_too_narrow_for_its_tokenizer_or_the_context_is_refused_before_it_loads(fresh_model, capsys, tmp_path):
    model = Path(fresh_model("textenv/ProbeOneHot-v0"))
    (model / "model.safetensors").unlink()  # so that loading it could only fail
    described = json.loads((model / "config.json").read_text())
    for changes, wanted in (
        ({"vocab_size": 3}, "vocabulary of 3 is smaller than the 6 ids of the tokenizer"),
        ({"max_position_embeddings": 8}, "context of 8 tokens is smaller than the environment's max_tokens=16"),
    ):
        (model / "config.json").write_text(json.dumps(described | changes))
        with pytest.raises(SystemExit):
            train(str(model))
        assert wanted in capsys.readouterr().err


def test_a_run_in_which_nothing_could_be_learned_says_so(fresh_model, capsys):
    train(fresh_model("textenv/ProbeConstant-v0"), "textenv/ProbeConstant-v0")
    assert "Nothing was learned: in no step was there anything to tell better answers by" in capsys.readouterr().out
