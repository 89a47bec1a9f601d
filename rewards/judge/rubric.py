"""A judge that checks statements."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from rewards.contract import Sample, Score, ungraded
from rewards.judge.chat import BaseChat, ChatReward, Reply, Request
from rewards.judge.local import as_chat
from rewards.judge.pointwise import sampling_of_votes, verdict_schema
from rewards.judge.reading import Verdict, ask, read_reply, tally
from rewards.judge.template import PROMPTS, Prompt, addresses_judge, as_text

Items = Mapping[str, tuple[float, str]]
"""name -> (weight, statement); in a JSON file ``{"units": [2, "The answer names its units."], …}``."""

_RESERVED = {"reason", "correct", "votes", "addresses_judge"}
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_HOLDS = {"true": True, "yes": True, "false": False, "no": False}


class Rubric(ChatReward):
    """Which of several statements hold for an answer, weighed: 1 if all is as wished, 0 if nothing is.

    ``value = sum_i |w_i| g_i / sum_i |w_i|`` with ``g_i = phi_i`` for a positive weight, and ``1 - phi_i`` for a negative
    one, whose statement names a fault. Where all weights are positive this is the weighted mean of what holds. A weight of
    0 is for a statement that is only reported.

    ``phi_i`` is 1 or 0; with ``votes`` above 1 the judge is asked so often, with seeds 0, 1, … at temperature 1, and it is
    the share of yes among the replies that could be read.

    ``parts`` are each ``phi_i`` by its name; ``votes``, how many replies could be read; and ``addresses_judge``, 1.0 if the
    answer seems to speak to its judge. ``info`` has the first reply that could be read. A reply that leaves out a statement,
    or says neither yes nor no to one, is not read, and asked for once more; a sample without a reply that could be read is
    ungraded, with the names of what was missing.

    It costs one call a vote and sample, whatever the number of statements, and one more for each that is asked for again.

    Args:
        chat: the judge's model, or the arguments of a :class:`~rewards.judge.Chat`, or without ``base_url`` of a
            :class:`~rewards.judge.LocalChat`.
        items: the statements, or a JSON file with them.
        votes: how often each sample is judged.
        prompt: a file in the place of ``prompts/rubric.txt``; it names ``$question``, ``$answer``, ``$items``, ``$form`` and
            ``$mark``, and may name ``$reference``.
        sampling: fields of the request in the place of :data:`~rewards.judge.pointwise.SAMPLING`, one by one; None for a
            value leaves a field out.

    Attributes:
        items: name -> (weight, statement).
        total: the sum of all ``|w_i|``.
        counts: how many replies ended in which way (:data:`~rewards.judge.reading.Outcome`); ``asked_again``, ``cached``,
            and samples that seem to address the judge.

    Raises:
        ValueError: no items, or unusable ones; votes below 1, several votes at temperature 0, an unusable prompt.
        OSError: a file that cannot be read.
        ImportError: a server without the extra ``textenv[judge]``.

    Example::

        rubric = Rubric(chat, {"units": (2, "The answer names its units."), "padding": (-1, "The answer repeats itself.")})
        score, = rubric([Sample(prompt="How tall is it?", completion="8849 m")])
    """

    name = "rubric"

    def __init__(
        self,
        chat: BaseChat | Mapping[str, Any],
        items: Items | str | Path,
        *,
        votes: int = 1,
        prompt: str | Path = PROMPTS / "rubric.txt",
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self.items = load_items(items) if isinstance(items, str | Path) else _check_items(items)
        self.total = math.fsum(abs(weight) for weight, _ in self.items.values())
        self.sampling = sampling_of_votes(sampling, votes)
        self.votes = votes
        self.prompt = Prompt(prompt, ["question", "answer", "items", "form"], ["reference"])
        self.chat = as_chat(chat)
        self.waits = self.chat.waits
        self.counts: Counter[str] = Counter()
        self.schema = verdict_schema({name: {"type": "boolean"} for name in self.items})

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        requests = [request for sample in samples for request in self._requests(sample)]
        results = ask(self.chat, requests, partial(read_items, names=tuple(self.items)), self.counts)
        return [self._score(sample, results[i * self.votes : (i + 1) * self.votes]) for i, sample in enumerate(samples)]

    def _requests(self, sample: Sample) -> list[Request]:
        texts = {"question": sample.prompt, "answer": sample.completion, "reference": as_text(sample.reference)}
        ours = {
            "items": "\n".join(f"- {name}: {statement}" for name, (_, statement) in self.items.items()),
            "form": ", ".join(f'"{name}": true or false' for name in self.items),
        }
        messages = [{"role": "user", "content": self.prompt.fill(texts, ours)}]
        seeds: list[dict[str, int]] = [{}] if self.votes == 1 else [{"seed": vote} for vote in range(self.votes)]
        return [Request(messages, {**self.sampling, **seed}, self.schema) for seed in seeds]

    def _score(self, sample: Sample, results: Sequence[tuple[Reply, Verdict]]) -> Score:
        addressed = addresses_judge(sample.completion)
        tally(self.counts, addresses_judge=addressed)
        read = [(reply, verdict.value) for reply, verdict in results if verdict.outcome == "graded"]
        if not read:
            return ungraded(results[0][1].why)
        phi = {name: statistics.fmean(holds[name] for _, holds in read) for name in self.items}
        good = [abs(w) * (phi[name] if w > 0 else 1 - phi[name]) for name, (w, _) in self.items.items()]
        parts = {**phi, "votes": len(read), "addresses_judge": float(addressed)}
        return Score(math.fsum(good) / self.total, parts, info={"reply": read[0][0].text})


def read_items(reply: Reply, names: Sequence[str]) -> Verdict:
    """True or false for each of ``names``, from a JSON object, or from lines such as "units: yes" where there is none.

    All or nothing: a reply that leaves one out has no value.

    Example:
        >>> read_items(Reply('{"reason": "so", "units": true, "padding": "no"}'), ["units", "padding"]).value
        {'units': True, 'padding': False}
    """
    verdicts = {name: read_reply(reply, name, _forms(name, reply.text), _accept) for name in names}
    missing = [name for name, verdict in verdicts.items() if verdict.outcome != "graded"]
    if not missing:
        return Verdict({name: verdict.value for name, verdict in verdicts.items()})
    first = verdicts[missing[0]]
    if len(missing) == len(names):
        return first
    # It judged the others, so words such as "I cannot" in its reason are no refusal.
    outcome = "unreadable" if first.outcome == "refused" else first.outcome
    return Verdict(None, outcome, f"{', '.join(missing)}: {first.why}")


def _forms(name: str, text: str) -> list[re.Pattern[str]]:
    if "{" in text.rpartition("</think>")[2]:
        # JSON that does not parse still has plain pairs: a quotation within its strings has its quotes escaped.
        return [re.compile(rf'"{name}"\s{{0,3}}:\s{{0,3}}"?((?i:true|false|yes|no))\b')]
    line = rf"^[ \t>*`#.0-9-]{{0,12}}{name}[ \t*`]{{0,8}}[:=][ \t*`]{{0,8}}(true|false|yes|no)(?=[ \t*`.]{{0,8}}$)"
    return [re.compile(line, re.IGNORECASE | re.MULTILINE)]


def _accept(text: str) -> Verdict:
    holds = _HOLDS.get(text.strip().lower())
    return Verdict(None, "out_of_range", f"{text[:40]!r} is not true or false") if holds is None else Verdict(holds)


def load_items(path: str | Path) -> dict[str, tuple[float, str]]:
    """The items in a JSON file.

    Raises:
        ValueError: it is no JSON, or holds no usable items; the message names the file.
        OSError: it cannot be read.
    """
    try:
        return _check_items(json.loads(Path(path).read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_items(items: Items, path: str | Path) -> None:
    """Write items, such as those with fitted weights, for :func:`load_items`.

    Raises:
        ValueError: unusable items.
        OSError: the file cannot be written.
    """
    Path(path).write_text(json.dumps(_check_items(items), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_items(items: Any) -> dict[str, tuple[float, str]]:
    if not isinstance(items, Mapping) or not items:
        raise ValueError(f'a rubric looks like {{"units": [2, "The answer names its units."]}}, got {items!r}')
    for name, item in items.items():
        match item:
            case [Real() as weight, str(statement)] if math.isfinite(weight) and statement.strip():
                pass
            case _:
                raise ValueError(f"{name!r} needs a finite weight and a statement, got {item!r}")
        if not _NAME.fullmatch(str(name)) or name in _RESERVED:
            raise ValueError(f"names are of a-z, 0-9 and _, and not {', '.join(sorted(_RESERVED))}; got {name!r}")
    if not any(weight for weight, _ in items.values()):
        raise ValueError("a rubric needs a weight other than 0")
    return {name: (float(weight), statement) for name, (weight, statement) in items.items()}
