"""Several attempts at a problem, with no other feedback than that an answer was wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

import rewards
from rewards import Reward, Sample, Score, ungraded
from textenv.registry import make_task
from textenv.task import Problem, Task, Transcript
from textenv.tasks.options import TURN_ROOM, check_whole
from textenv.tokenizer import Tokenizer

FEEDBACK = "\nWrong. Try again.\n"


class TryAgainReward(Reward):
    """``decay**t`` when the answer of turn t is right, t from 0; minus ``repetition * (1 - E/T)``, solved or not.

    T are the turns taken, E the different answers among them, case and spaces aside. Every completion counts as an
    answer, an empty one too. ``inner`` judges each completion as if it were alone, without tokens and with the finish
    of the last. When it cannot grade one of them, the whole sample is ungraded. Parts: ``correct``, ``turns`` and
    ``repeated``, which is 1 - E/T.

    Example:
        >>> reward = TryAgainReward(rewards.make("exact"), decay=0.5, repetition=0.5)
        >>> score = reward([Sample(prompt="2+3=", completion="5", reference="5", turns=("3", "3", "5"))])[0]
        >>> round(score.value, 6)  # 0.25 - 0.5 * (1 - 2/3)
        0.083333
    """

    name = "try_again"

    def __init__(self, inner: Reward, decay: float, repetition: float) -> None:
        self.inner = inner
        self.decay = decay
        self.repetition = repetition

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        # One call for all turns of all samples: the inner reward may be a model or a judge that works in batches.
        answers = [
            replace(sample, completion=turn, turns=(turn,), tokens=()) for sample in samples for turn in sample.turns
        ]
        judged = iter(rewards.score_samples(self.inner, answers))
        return [self._score(sample.turns, [next(judged) for _ in sample.turns]) for sample in samples]

    def _score(self, turns: Sequence[str], judged: Sequence[Score]) -> Score:
        if not turns:
            return ungraded("the sample has no turns; sample.turns must hold every completion of the episode")
        for t, score in enumerate(judged):
            if score.error is not None:
                return ungraded(f"turn {t}: {score.error}")
        solved_at = next((t for t, score in enumerate(judged) if score.correct), None)
        repeated = 1 - len({" ".join(turn.casefold().split()) for turn in turns}) / len(turns)
        return Score(
            (0.0 if solved_at is None else self.decay**solved_at) - self.repetition * repeated,
            parts={"correct": float(solved_at is not None), "turns": float(len(turns)), "repeated": repeated},
        )


class TryAgain(Task):
    """Several attempts at the problems of a single-turn task: a wrong answer gets one fixed line and another turn.

    Unary feedback as an observation (UFO; Liu et al., 2025, arXiv:2507.14295). The line says nothing about what was
    wrong; a right answer ends the episode. The inner task's reward decides what is right; the episode is worth what
    :class:`TryAgainReward` says. Where the inner reward cannot grade an answer, the episode ends, ungraded: calling the
    answer wrong might be false.

    Args:
        inner: the id of a registered task with one turn, or such a task.
        turns: attempts at most, 2 or more.
        decay: a solution is worth ``decay**t`` at turn t, t from 0; between 0 and 1.
        repetition: weight of the penalty on repeated answers, 0 or more.

    Raises:
        ValueError: an inner task with turns of its own, or an option out of its range.

    Example:
        >>> task = TryAgain(turns=3)
        >>> problem = task.problem(seed=0, split="train", index=0)
        >>> problem.prompt, problem.reference
        ('86+67=', '153')
        >>> from textenv.task import Finish
        >>> task.reply(Transcript(problem, ("152",), (), Finish.EOS))
        '\\nWrong. Try again.\\n'
        >>> task.reply(Transcript(problem, ("152", "153"), ("\\nWrong. Try again.\\n",), Finish.EOS)) is None
        True
    """

    def __init__(
        self, inner: str | Task = "textenv/Arithmetic-v0", turns: int = 5, decay: float = 0.5, repetition: float = 0.5
    ) -> None:
        self.inner = make_task(inner) if isinstance(inner, str) else inner
        if self.inner.turns != 1:
            raise ValueError(f"inner must be a task with one turn, got {self.inner} with {self.inner.turns}")
        check_whole("turns", turns, 2, 100)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be from 0 to 1, got {decay}")
        if not repetition >= 0:
            raise ValueError(f"repetition must be 0 or more, got {repetition}")
        self.turns = turns
        self.inner_reward = rewards.as_reward(self.inner.reward)
        self.reward = TryAgainReward(self.inner_reward, decay, repetition)
        self.max_new_tokens = self.inner.max_new_tokens
        self.max_tokens = self.inner.max_tokens + (turns - 1) * (TURN_ROOM + self.max_new_tokens + len(FEEDBACK))
        self.stop = self.inner.stop
        self.system = self.inner.system
        self.licence = self.inner.licence

    @property
    def holdout(self) -> float:  # the inner task draws, so it keeps the share
        return self.inner.holdout

    @holdout.setter
    def holdout(self, share: float) -> None:
        self.inner.holdout = share

    def draw(self, rng: np.random.Generator) -> Problem | tuple[str, object]:
        return self.inner.draw(rng)

    def problem(self, seed: int, split: str, index: int) -> Problem:
        return self.inner.problem(seed, split, index)

    def size(self, split: str) -> int | None:
        return self.inner.size(split)

    def preview(self, split: str) -> Sequence[Problem]:
        return self.inner.preview(split)

    def key(self, problem: Problem) -> str:
        return self.inner.key(problem)

    def tokenizer(self) -> Tokenizer:
        return self.inner.tokenizer()

    def reply(self, transcript: Transcript) -> str | None:
        if len(transcript.completions) == self.turns:
            return None
        problem, answer = transcript.problem, transcript.completions[-1]
        sample = Sample(
            prompt=problem.prompt,
            completion=answer,
            reference=problem.reference,
            turns=(answer,),
            finish=transcript.finish.label,
            info=problem.info,
        )
        right = rewards.score_samples(self.inner_reward, [sample])[0].correct
        return FEEDBACK if right is False else None

    def demonstrate(self, transcript: Transcript) -> str | None:
        return self.inner.demonstrate(transcript)
