"""A judge that writes principles for a question before it grades the answers to it."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

from rewards.contract import Sample, Score, ungraded
from rewards.judge.chat import BaseChat, ChatReward, Reply, Request
from rewards.judge.local import as_chat
from rewards.judge.pointwise import sampling_of_votes
from rewards.judge.reading import Verdict, ask, read_reply, tally
from rewards.judge.template import PROMPTS, Prompt, addresses_judge, as_text

LOW, HIGH = 1, 10
"""The scale."""
MAX_TOKENS = 2048
"""Of a reply, where ``sampling`` does not say: principles and a critique of several answers are longer than of one."""

_NUMBER = r"-?[0-9]{1,6}(?:\.[0-9]{1,6})?"
_LIST = rf"{_NUMBER}(?:\s{{0,3}},\s{{0,3}}{_NUMBER}){{0,999}}"
_SCORES = (
    re.compile(
        rf"""\bscores["'*_`]{{0,4}}\s{{0,3}}[:=]["'*_`\s]{{0,8}}(\[\s{{0,3}}{_LIST}\s{{0,3}}\])""", re.IGNORECASE
    ),
    re.compile(rf"\\boxed\{{({_LIST})\}}"),
)
_ANSWERS = re.compile(r"(?<!\$)\$(?:answers\b|\{answers\})")


_Asked = tuple[str, str]
"""A question and its reference."""


@dataclass(frozen=True, slots=True)
class _Sheet:
    """What one request shows: a question, and answers in an order of its own."""

    asked: _Asked
    answers: tuple[str, ...]
    vote: int


class PrinciplesJudge(ChatReward):
    """A model's score for each answer, given to all answers to a prompt at once, by principles that it writes for them.

    Inference as in self-principled critique tuning (DeepSeek-GRM, arXiv:2504.02495): for each vote the judge
    writes principles for this question, a critique of each answer by them, and a score from 1 to 10 for each. The answers
    stand in another order for each vote. ``value`` is the mean over the votes that could be read, as 0 (always 1) to 1
    (always 10); it ranks as the paper's sums do where all votes could be read.

    ``parts`` are ``judge``, the mean on the scale itself; ``spread``, the votes' standard deviation (unbiased, in units of
    the value, 0.0 for one vote); ``votes``, how many could be read; and ``addresses_judge``, 1.0 if the answer seems to
    speak to its judge. ``info`` has the first reply that could be read, the number that the answer has in it, and all votes.
    A vote without one readable score for each answer counts for none of them, and is asked for once more before. An answer
    without any is ungraded.

    A value depends on the other answers in the batch to the same prompt (with the same reference). It does not depend on
    their order. Equal answers are shown once and get the same score; an answer alone with its prompt is graded too.

    Groups with more answers than ``at_once`` are cut for each vote into parts of nearly equal size, at random: each answer
    meets others in each vote. It costs ``votes`` calls for each such part, and one more for each reply that is asked for
    again.

    Args:
        chat: the judge's model, or the arguments of a :class:`~rewards.judge.Chat`, or without ``base_url`` of a
            :class:`~rewards.judge.LocalChat`.
        votes: how often each answer is judged.
        at_once: most answers in one request.
        prompt: a file in the place of ``prompts/principles.txt``; it names ``$question``, ``$answers`` and ``$mark``, and may
            name ``$reference`` and ``$number`` (of answers).
        sampling: fields of the request in the place of :data:`~rewards.judge.pointwise.SAMPLING` and :data:`MAX_TOKENS`,
            one by one; None for a value leaves a field out.

    Attributes:
        counts: how many replies ended in which way (:data:`~rewards.judge.reading.Outcome`); ``asked_again``, ``cached``,
            and samples that seem to address the judge.

    Raises:
        ValueError: votes or ``at_once`` below 1, several votes at temperature 0, an unusable prompt.
        ImportError: a server without the extra ``textenv[judge]``.

    Example::

        judge = PrinciplesJudge(chat, votes=4)
        scores = judge([Sample(prompt="Why is the sky blue?", completion=answer) for answer in answers])
    """

    name = "principles_judge"
    whole_groups = True

    def __init__(
        self,
        chat: BaseChat | Mapping[str, Any],
        *,
        votes: int = 1,
        at_once: int = 8,
        prompt: str | Path = PROMPTS / "principles.txt",
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        if at_once < 1:
            raise ValueError(f"votes and at_once are 1 or more, got {votes=} and {at_once=}")
        self.sampling = sampling_of_votes(sampling, votes, max_tokens=MAX_TOKENS)
        self.votes = votes
        self.at_once = at_once
        self.prompt = Prompt(prompt, ["question", "answers"], ["reference", "number"])
        self.chat = as_chat(chat)
        self.waits = self.chat.waits
        self.counts: Counter[str] = Counter()

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        groups: defaultdict[_Asked, set[str]] = defaultdict(set)
        for sample in samples:
            groups[_asked(sample)].add(sample.completion)
        sheets = [sheet for asked, group in groups.items() for sheet in self._sheets(asked, group)]
        votes: defaultdict[tuple[_Asked, str], list[tuple[int, Reply, Verdict]]] = defaultdict(list)
        for sheet, reply, verdict in self._ask(sheets):
            for place, answer in enumerate(sheet.answers):
                votes[sheet.asked, answer].append((place, reply, verdict))
        return [self._score(sample, votes[_asked(sample), sample.completion]) for sample in samples]

    def _sheets(self, asked: _Asked, group: set[str]) -> list[_Sheet]:
        """The requests' contents for a group. They depend on the texts alone, so that the cache has them the next time."""
        answers = sorted(group)
        rng = random.Random(hashlib.sha256(json.dumps([asked, answers]).encode()).digest())
        cuts = -(-len(answers) // self.at_once)
        sheets = []
        for vote in range(self.votes):
            rng.shuffle(answers)
            sheets += [_Sheet(asked, tuple(answers[cut::cuts]), vote) for cut in range(cuts)]
        return sheets

    def _ask(self, sheets: Sequence[_Sheet]) -> list[tuple[_Sheet, Reply, Verdict]]:
        """Each sheet with what came of it, by vote. Sheets with as many answers are asked together."""
        sizes: defaultdict[int, list[_Sheet]] = defaultdict(list)
        for sheet in sheets:
            sizes[len(sheet.answers)].append(sheet)
        voted = []
        for size, alike in sizes.items():
            results = ask(
                self.chat, [self._request(sheet) for sheet in alike], partial(read_scores, number=size), self.counts
            )
            voted += [(sheet, *result) for sheet, result in zip(alike, results, strict=True)]
        return sorted(voted, key=lambda vote: vote[0].vote)

    def _request(self, sheet: _Sheet) -> Request:
        number = len(sheet.answers)
        question, reference = sheet.asked
        texts = {"question": question, "reference": reference}
        texts |= {f"answer_{place}": answer for place, answer in enumerate(sheet.answers, start=1)}
        content = _with_answers(self.prompt, number).fill(texts, {"number": number})
        seed = {} if self.votes == 1 else {"seed": sheet.vote}
        return Request([{"role": "user", "content": content}], {**self.sampling, **seed}, _schema(number))

    def _score(self, sample: Sample, votes: Sequence[tuple[int, Reply, Verdict]]) -> Score:
        addressed = addresses_judge(sample.completion)
        tally(self.counts, addresses_judge=addressed)
        read = [(place, reply, verdict.value[place]) for place, reply, verdict in votes if verdict.outcome == "graded"]
        if not read:
            return ungraded(votes[0][2].why)
        values = [value for _, _, value in read]
        mean = statistics.fmean(values)
        parts = {
            "judge": mean,
            "spread": statistics.stdev(values) / (HIGH - LOW) if len(values) > 1 else 0.0,
            "votes": len(values),
            "addresses_judge": float(addressed),
        }
        place, reply, _ = read[0]
        told = ["ungraded" if verdict.value is None else f"{verdict.value[place]:g}" for place, _, verdict in votes]
        info = {"reply": reply.text, "number": str(place + 1), "votes": ", ".join(told)}
        return Score((mean - LOW) / (HIGH - LOW), parts, info=info)


def _asked(sample: Sample) -> _Asked:
    return sample.prompt, as_text(sample.reference)


def _with_answers(prompt: Prompt, number: int) -> Prompt:
    """``prompt`` with a marked place for each answer, in the place of ``$answers``."""
    places = [f"<answer-{place}-$mark>\n$answer_{place}\n</answer-{place}-$mark>" for place in range(1, number + 1)]
    marked = copy.copy(prompt)
    marked.template = Template(_ANSWERS.sub("\n\n".join(places), prompt.template.template))
    return marked


def _schema(number: int) -> dict[str, Any]:
    score = {"type": "integer", "minimum": LOW, "maximum": HIGH}
    properties = {
        "principles": {"type": "array", "items": {"type": "string"}},
        "critique": {"type": "string"},
        "scores": {"type": "array", "items": score, "minItems": number, "maxItems": number},
    }
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def read_scores(reply: Reply, number: int) -> Verdict:
    """``number`` scores from 1 to 10: ``"scores"`` of a JSON object, else as in "Scores: [7, 5]" or a boxed list in LaTeX.

    Example:
        >>> read_scores(Reply('{"principles": ["be right (100 %)"], "critique": "so", "scores": [7, 5]}'), 2).value
        (7.0, 5.0)
        >>> read_scores(Reply("Scores: [7]"), 2).outcome
        'out_of_range'
    """

    def accept(text: str) -> Verdict:
        found = [one.strip(" '\n\t") for one in text.strip("[] \n\t").split(",")]
        if not all(re.fullmatch(_NUMBER, one) for one in found):
            return Verdict(None, "unreadable", f"{text[:40]!r} is no list of scores")
        values = tuple(map(float, found))
        if len(values) != number:
            return Verdict(None, "out_of_range", f"the judge gave {len(values)} scores to {number} answers")
        if not all(LOW <= value <= HIGH for value in values):
            return Verdict(None, "out_of_range", f"the scores {text[:40]} are not all from {LOW} to {HIGH}")
        return Verdict(values)

    return read_reply(reply, "scores", _SCORES, accept)
