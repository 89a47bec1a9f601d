"""The README's commands and code do what it says."""

import contextlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest

import rewards.registry
import textenv
from agents.core.models import build_tiny, load_model
from agents.core.policy import Policy
from tests.rewards.judge.server import Server
from textenv.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("#")[0].split() for line in re.findall(r"^    textenv (.+?)(?<!\\)$", README, flags=re.MULTILINE)
]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder as the README's reader would have it."""
    (tmp_path / "my_module.py").write_text(BLOCKS[0])
    rows = [{"question": f"How much is {n} and 1?", "answer": str(n + 1)} for n in range(40)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("rewards.registry._targets", dict(rewards.registry._targets))
    known = set(textenv.registry)
    yield tmp_path
    sys.modules.pop("my_module", None)
    for env_id in set(textenv.registry) - known:
        del textenv.registry[env_id]
        del gymnasium.registry[env_id]


def test_its_code_runs(workplace):
    namespace = {}
    for block in BLOCKS[1:]:  # the first is my_module.py, which the second imports
        if "agent.learn" not in block:
            exec(compile(block, "README.md", "exec"), namespace)
    for env_id in ("me/Reverse-v0", "me/Double-v0", "me/Questions-v0", "me/Polite-v0"):
        assert gymnasium.make(env_id, level="sequence").reset(seed=0)[1]["prompt"]


def test_the_custom_environment_takes_ten_lines_and_passes_every_check(workplace):
    assert len(BLOCKS[0].strip().splitlines()) <= 10
    main(["check", "me/Reverse-v0", "--import", "my_module"])


def shown_help(capsys, *arguments):
    with contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    return capsys.readouterr().out


def test_every_command_it_names_exists(capsys):
    names = {command[0] for command in COMMANDS}
    expected = "bench check conform evaluate fit generate judge list play profile replay report score train watch"
    assert names == set(expected.split())
    for name in names:
        assert name in shown_help(capsys, name)


def test_every_setting_it_names_exists(capsys):
    settings = {word for command in COMMANDS if command[0] == "train" for word in command if word.startswith("--")}
    shown = shown_help(capsys, "train", "grpo")
    for setting in settings - {"--import", "--resume"}:
        assert setting in shown, setting


def test_a_judge_takes_the_place_of_a_rule_by_a_word(workplace, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Server(lambda body, count: '{"reason": "so", "score": 10}')
    try:
        rows = [{"prompt": "6*7=", "completion": answer, "reference": "42"} for answer in ("42", "forty-two")]
        Path("samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        chat = ["chat.model", "NAME", "chat.base_url", server.url, "chat.cache_dir", "judge-cache"]
        main(["score", "--reward", "judge", "--file", "samples.jsonl", "--options", *chat])
        assert "1.000" in capsys.readouterr().out
        assert rewards.as_reward(f"judge {shlex.join(chat)}").chat.base_url == server.url
    finally:
        server.close()


def test_every_metric_is_explained(tmp_path, monkeypatch):
    from agents import warmup
    from agents.grpo import GRPO, GRPOConfig

    monkeypatch.setattr(warmup, "MAX_STEPS", 10)
    monkeypatch.setenv("TEXTENV_CACHE", str(tmp_path))
    config = GRPOConfig(
        total_episodes=64, prompts_per_step=8, kl_loss_coef=0.1, eval_episodes=4, run_dir=str(tmp_path / "run")
    )
    GRPO("textenv/ProbeLength-v0", config).learn()
    explained = (ROOT / "agents" / "METRICS.md").read_text()
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        for name in json.loads(line):
            assert name in ("step",) or name.startswith("reward/") or f"`{name}`" in explained, name


def demo_command():
    """The command that `make demo` runs."""
    recipe = re.search(r"^demo:.*\n\t\$\(VENV\)/bin/textenv (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    return shlex.split(recipe[1])


def test_the_command_without_make_is_that_of_make_demo():
    assert f".venv/bin/textenv {shlex.join(demo_command())}" in README


@pytest.mark.slow
def test_the_demo_takes_the_tiny_model_from_some_to_nearly_all_right(tmp_path):
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "textenv", *demo_command(), "--run-dir", str(run)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before, after = (json.loads((run / f"evaluation_{moment}.json").read_text()) for moment in ("before", "after"))
    assert 0.2 <= before["accuracy"] <= 0.5
    assert after["accuracy"] >= 0.95
    for promised in ("held-out problems, greedy, with 95 % intervals", "samples", "the run is in", "What to try next"):
        assert promised in done.stdout


@pytest.mark.slow
def test_the_agent_in_python_learns(workplace, monkeypatch, capsys):
    block = next(block for block in BLOCKS if "GRPOConfig" in block)
    exec(compile(block, "README.md", "exec"), {})
    assert (workplace / "mine" / "agent.json").exists()
    assert "%" in capsys.readouterr().out


@pytest.mark.slow
def test_stable_baselines3_trains_as_shown(workplace):
    block = next(block for block in BLOCKS if "CausalLMPolicy" in block)
    tokenizer = textenv.make_task("textenv/Countdown-v0").tokenizer()
    Policy(build_tiny(tokenizer, seed=0), tokenizer).save("small")
    for name, smaller in {"Qwen/Qwen3-0.6B": "small", "100_000": "64", "gamma=1.0": "gamma=1.0, n_steps=64"}.items():
        assert name in block
        block = block.replace(name, smaller)
    exec(compile(block, "README.md", "exec"), {})
    assert load_model("mine").tokenizer.vocab_size == tokenizer.vocab_size
