"""What the suite `rewards` needs to train on a rule, a learned reward and a judge: ``python -m benchmarks.reward_kinds``.

The task is that of :mod:`benchmarks.overoptimisation`, whose rule is the gold reward. The reward model is fitted to
comparisons of answers that the rule judged; the judge is a :class:`rewards.judge.Judge` on a scripted chat, which goes by the
rule and is sometimes wrong.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tyro

import rewards
from benchmarks.overoptimisation import Scale, fit_proxy, gold, warm_start
from rewards.judge import BaseChat, Judge, Reply, Request

PAIRS = 4000
"""Comparisons that the reward model is fitted to."""
WRONG = 0.1
"""Share of the answers to which the scripted judge gives any score."""
LOW, HIGH = 1, 10
TEXT = r"<{0}-(\w+)>\n(.*?)\n</{0}-\1>"


class ScriptedChat(BaseChat):
    """Answers a judge's requests by the gold reward, as a whole number from 1 to 10."""

    def __init__(self) -> None:
        super().__init__("scripted", None, None, None)

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        return [self._answer(str(request.messages[-1]["content"])) for request in requests]

    def _answer(self, content: str) -> Reply:
        question, answer = (re.search(TEXT.format(name), content, re.DOTALL)[2] for name in ("question", "answer"))  # type: ignore[index]
        score = round(min(max(gold([question], [answer])[0], LOW), HIGH))
        rng = random.Random(f"{question} {answer}")  # the same answer always gets the same score
        if rng.random() < WRONG:
            score = rng.randint(LOW, HIGH)
        return Reply(json.dumps({"reason": "by the rule", "score": score}))


class LettersJudge(Judge):
    """A judge of the task, 0 to 1."""

    name = "letters_judge"

    def __init__(self) -> None:
        super().__init__(ScriptedChat(), scale=(LOW, HIGH))


rewards.register(LettersJudge.name, LettersJudge)


def main(out: Path = Path("runs/letters")) -> None:
    """Make the policy that all start from, and the reward model; what is there already stays.

    Args:
        out: the folder for both.
    """
    start, model = out / "start", out / "reward-model"
    if not start.exists():
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out) as folder:
            warm_start(Path(folder), Scale()).rename(start)
    if not model.exists():
        with tempfile.TemporaryDirectory(dir=out) as folder:
            made = Path(folder, "reward-model")
            print(f"right on {fit_proxy(start, made, PAIRS, 0, Scale())} of held-out pairs")
            made.rename(model)


if __name__ == "__main__":
    tyro.cli(main)
