"""The learning benchmark runs at its smallest size."""

from agents.core.models import build_tiny
from agents.core.policy import Policy
from benchmarks import learning
from textenv import make_task


def test_it_prints_a_line_a_seed_and_the_medians(capsys, tmp_path):
    tokenizer = make_task("textenv/ProbeOneHot-v0").tokenizer()
    Policy(build_tiny(tokenizer, 0), tokenizer).save(tmp_path)
    settings = {"model": str(tmp_path), "total_episodes": "8", "prompts_per_step": "2", "eval_episodes": "4"}
    learning.main(env="textenv/ProbeOneHot-v0", seeds=(0, 3), settings={**settings, "group_size": "4"})
    printed = capsys.readouterr().out
    assert "grpo on textenv/ProbeOneHot-v0, 4 held-out problems, greedy" in printed
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("│")] == ["0", "3", "median"]
