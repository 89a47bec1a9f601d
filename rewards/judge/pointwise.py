"""A judge that scores one answer at a time."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rewards.contract import Sample, Score, ungraded
from rewards.judge.chat import BaseChat, ChatReward, Reply, Request
from rewards.judge.local import as_chat
from rewards.judge.reading import Verdict, ask, read_score, tally
from rewards.judge.template import PROMPTS, Prompt, addresses_judge, as_text

SAMPLING: Mapping[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 1024}
"""What requests ask for where nothing else is said. All of it is sent: servers have defaults of their own."""


class Judge(ChatReward):
    """A model's score for each answer, from 0 (the low end of the scale) to 1 (the high end).

    The judge writes a critique before its score. With ``votes`` above 1 it is asked so often, with seeds 0, 1, … at
    temperature 1, and the mean of the votes that could be read counts (arXiv:2504.02495).

    ``parts`` are ``judge``, the mean on the scale itself; ``spread``, the votes' standard deviation (unbiased, in units of
    the value, 0.0 for one vote); ``votes``, how many could be read; and ``addresses_judge``, 1.0 if the answer seems to
    speak to its judge. ``info`` has the first reply that could be read and all votes. A sample is ungraded where none could:
    a refusal, an empty reply, one without a score, with several, with one off the scale, one cut off, an error of the
    server, a budget used up. A reply that holds no score is asked for once more before.

    Answers cannot close the markers around them nor write a chat template's control tokens. What a judge makes of an answer
    that flatters or instructs it is still the judge's: watch ``counts["addresses_judge"]``.

    It costs one call a vote and sample, and one more for each reply that is asked for again.

    Args:
        chat: the judge's model, or the arguments of a :class:`~rewards.judge.Chat`, or without ``base_url`` of a
            :class:`~rewards.judge.LocalChat`.
        scale: lowest and highest score.
        votes: how often each sample is judged.
        prompt: a file in the place of ``prompts/pointwise.txt``; it names ``$question``, ``$answer`` and ``$mark``, and may
            name ``$reference``, ``$low`` and ``$high``.
        sampling: fields of the request in the place of :data:`SAMPLING`, one by one; None for a value leaves a field out.

    Attributes:
        counts: how many replies ended in which way (:data:`~rewards.judge.reading.Outcome`); ``asked_again``, ``cached``,
            and samples that seem to address the judge.

    Raises:
        ValueError: a scale that does not rise, votes below 1, several votes at temperature 0, an unusable prompt.
        ImportError: a server without the extra ``textenv[judge]``.

    Example::

        judge = Judge({"model": "judge", "base_url": "http://127.0.0.1:8000/v1", "cache_dir": "judge-cache"})
        score, = judge([Sample(prompt="What is 6 * 7?", completion="42")])
    """

    name = "judge"

    def __init__(
        self,
        chat: BaseChat | Mapping[str, Any],
        *,
        scale: tuple[int, int] = (1, 10),
        votes: int = 1,
        prompt: str | Path = PROMPTS / "pointwise.txt",
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self.low, self.high = scale
        if self.low >= self.high:
            raise ValueError(f"a scale rises and votes are 1 or more, got {scale=} and {votes=}")
        self.sampling = sampling_of_votes(sampling, votes)
        self.votes = votes
        self.prompt = Prompt(prompt, ["question", "answer"], ["reference", "low", "high"])
        self.chat = as_chat(chat)
        self.waits = self.chat.waits
        self.counts: Counter[str] = Counter()
        self.schema = verdict_schema({"score": {"type": "integer", "minimum": self.low, "maximum": self.high}})

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        requests = [request for sample in samples for request in self._requests(sample)]
        results = ask(self.chat, requests, partial(read_score, low=self.low, high=self.high), self.counts)
        return [self._score(sample, results[i * self.votes : (i + 1) * self.votes]) for i, sample in enumerate(samples)]

    def _requests(self, sample: Sample) -> list[Request]:
        texts = {"question": sample.prompt, "answer": sample.completion, "reference": as_text(sample.reference)}
        content = self.prompt.fill(texts, {"low": self.low, "high": self.high})
        seeds: list[dict[str, int]] = [{}] if self.votes == 1 else [{"seed": vote} for vote in range(self.votes)]
        messages = [{"role": "user", "content": content}]
        return [Request(messages, {**self.sampling, **seed}, self.schema) for seed in seeds]

    def _score(self, sample: Sample, results: Sequence[tuple[Reply, Verdict]]) -> Score:
        addressed = addresses_judge(sample.completion)
        tally(self.counts, addresses_judge=addressed)
        values = [verdict.value for _, verdict in results if verdict.outcome == "graded"]
        if not values:
            return ungraded(results[0][1].why)
        width = self.high - self.low
        mean = statistics.fmean(values)
        parts = {
            "judge": mean,
            "spread": statistics.stdev(values) / width if len(values) > 1 else 0.0,
            "votes": len(values),
            "addresses_judge": float(addressed),
        }
        reply = next(reply.text for reply, verdict in results if verdict.outcome == "graded")
        votes = ", ".join("ungraded" if verdict.value is None else f"{verdict.value:g}" for _, verdict in results)
        return Score((mean - self.low) / width, parts, info={"reply": reply, "votes": votes})


def fill_in(sampling: Mapping[str, Any] | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``sampling`` over ``defaults`` over :data:`SAMPLING`, without what is None.

    Example:
        >>> fill_in({"max_tokens": None, "max_completion_tokens": 64}, {"temperature": 1.0})
        {'temperature': 1.0, 'top_p': 1.0, 'max_completion_tokens': 64}
    """
    merged = {**SAMPLING, **defaults, **(sampling or {})}
    return {name: value for name, value in merged.items() if value is not None}


def sampling_of_votes(sampling: Mapping[str, Any] | None, votes: int, **defaults: Any) -> dict[str, Any]:
    """``sampling`` filled in, at temperature 1 for several votes where it does not say.

    Raises:
        ValueError: votes below 1, several votes at temperature 0.
    """
    if votes < 1:
        raise ValueError(f"votes are 1 or more, got {votes}")
    filled = fill_in(sampling, {**defaults, **({} if votes == 1 else {"temperature": 1.0})})
    if votes > 1 and filled.get("temperature") == 0:
        raise ValueError(f"{votes} votes at temperature 0 are one vote; take a higher one, such as 1.0")
    return filled


def verdict_schema(verdict: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON schema of a reply: a reason, and then the verdict, a schema for each of its fields."""
    properties = {"reason": {"type": "string"}, **verdict}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
