"""Rollouts for the browser of a report: which of them are shown, and what of them.

A page holds a sample, since a training leaves more than anybody reads. Which problems are in it is decided by a hash of their
prompts and the seed: a problem that comes again at another step, in another run or at another point is there again, to be
compared with itself.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.core.sources import checkpoints
from benchmarks.harness.results import CellResult
from benchmarks.report.text import shortened
from rewards.terminal import visible
from textenv.episodes import Source

if TYPE_CHECKING:
    from agents.core.evaluate import Evaluation
    from textenv.tokenizer import Tokenizer

MODES = {
    "advantage": "advantage",
    "logp": "logp",
    "entropy": "entropy",
    "kl": "kl",
    "ratio": "ratio",
    "credit": "reward",
}
"""Names in the page of what a rollout keeps for each token, and in the row of an episode."""
UNREADABLE = (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error)
"""What a file may raise that is broken, or no rollout at all."""
CUT = ("length", "context")
STEPS = 12
GROUP = 16
BYTES = 4
"""that a character has at most"""


@dataclass(frozen=True)
class Allowance:
    """How much a page holds, of all its sources together.

    Attributes:
        episodes, tokens: of rollouts.
        completions, characters: of what was written for held-out problems.
        seed: of the choice.
    """

    episodes: int = 8_000
    tokens: int = 400_000
    completions: int = 12_000
    characters: int = 4_000_000
    seed: int = 0

    def order(self, prompt: str) -> bytes:
        """What problems are chosen by, smallest first."""
        return hashlib.sha256(f"{self.seed}\n{prompt}".encode(errors="surrogatepass")).digest()


@dataclass(frozen=True)
class Series:
    """What one source shows at each of its points (steps of a training, evaluation points).

    Attributes:
        name: for people.
        group: of sources that show the same problems, so that they can be compared.
        labels: of the points.
        points: for each point its problems, as :func:`_problem` makes them.
        rule: how they were chosen.
        notes: what is missing, and why.
    """

    name: str
    group: str
    labels: Sequence[str]
    points: Sequence[Sequence[Mapping[str, Any]]]
    rule: str
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def modes(self) -> list[str]:
        """What tokens can be coloured by."""
        kept = {
            name
            for point in self.points
            for problem in point
            for one in problem["completions"]
            for name in one["values"]
        }
        return [name for name in MODES if name in kept]

    def head(self) -> dict[str, Any]:
        """What the page has to know before it unpacks the rest."""
        counts = [len(point) for point in self.points]
        return {
            "name": visible(self.name),
            "group": visible(self.group),
            "labels": [visible(label) for label in self.labels],
            "counts": counts,
            "modes": self.modes,
            "rule": visible(self.rule),
            "notes": [visible(note) for note in self.notes],
        }

    def packed(self) -> str:
        """The points, as base64 of gzipped JSON."""
        content = json.dumps(self.points, separators=(",", ":"), allow_nan=False)
        return base64.b64encode(gzip.compress(content.encode(), 9, mtime=0)).decode()


def training_series(
    name: str, group: str, folder: Path, allowance: Allowance, sources: int, tokenizers: Tokenizers
) -> Series | None:
    """The rollouts of a run; None where it kept none. ``sources`` share the allowance."""
    files = sorted(folder.glob("rollouts/[0-9]*.jsonl.gz"))
    if not files:
        return None
    files = spread(files, max(3, min(STEPS, 300 // sources)))
    episodes = max(4, allowance.episodes // (sources * len(files)))
    tokens = max(200, allowance.tokens // (sources * len(files)))
    tokenizer, notes = tokenizers.of_run(folder)
    labels, points = [], []
    for path in files:
        try:
            points.append(list(_chosen(list(read_rows(path)), episodes, tokens, allowance, tokenizer)))
        except UNREADABLE as error:
            notes.append(f"{path.name} is left out, it cannot be read: {error!r}.")
            continue
        labels.append(f"step {int(path.name.split('.')[0])}")
    if not points:
        return None
    rule = (
        f"{len(labels)} of the run's steps, evenly spaced; of each those problems whose hash with seed {allowance.seed} is "
        f"smallest, up to {episodes} episodes and {tokens:,} tokens a step and {GROUP} completions a problem; longer "
        "completions lack their middle"
    )
    return Series(name, group, labels, points, rule, notes)


def spread(items: Sequence[Any], number: int) -> list[Any]:
    """At most ``number`` of the items, evenly spaced, the first and the last among them.

    Example:
        >>> spread(range(10), 4)
        [0, 3, 6, 9]
    """
    if len(items) <= number:
        return list(items)
    return [items[round(i * (len(items) - 1) / (number - 1))] for i in range(number)]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The episodes of a step."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _chosen(
    rows: Sequence[dict[str, Any]], episodes: int, tokens: int, allowance: Allowance, tokenizer: TokenTexts | None
) -> Iterator[dict[str, Any]]:
    """The problems of a step that the page shows, at least one."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    ordered = sorted(groups.values(), key=lambda group: allowance.order(group[0]["prompt"]))
    for number, group in enumerate(ordered):
        group = group[:GROUP]
        longest = max(32, tokens // len(group)) if number == 0 else tokens
        wanted = sum(min(longest, _new_tokens(row)) for row in group)
        if number and (len(group) > episodes or wanted > tokens):
            return
        episodes, tokens = episodes - len(group), tokens - wanted
        completions = [_episode(row, tokenizer, longest) for row in group]
        yield _problem(group[0]["prompt"], group[0]["reference"], completions)


def _new_tokens(row: Mapping[str, Any]) -> int:
    return len(row["tokens"]) - _first_new(row)


def _first_new(row: Mapping[str, Any]) -> int:
    source = row["source"]
    return source.index(Source.SAMPLED) if Source.SAMPLED in source else len(source)


def _problem(prompt: Any, reference: Any, completions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    told = reference if isinstance(reference, str) else json.dumps(reference)
    return {
        "prompt": visible(shortened(str(prompt), 6_000)),
        "reference": visible(shortened(told, 2_000)),
        "completions": list(completions),
    }


def _episode(row: Mapping[str, Any], tokenizer: TokenTexts | None, longest: int) -> dict[str, Any]:
    """A completion of a rollout as the page shows it, its middle left out where it has more than ``longest`` tokens."""
    shown = _completion(row, row["return"], _correct(row))
    first, last = _first_new(row), len(row["tokens"])
    shown["length"] = row["source"].count(Source.SAMPLED)
    if tokenizer is None:
        return {**shown, "text": visible(shortened("\n".join(row["completions"]), 8 * longest))}
    ids, head, tail = row["tokens"], last - first, 0
    if head > longest:
        head, tail = (longest + 1) // 2, longest // 2
        shown["left_out"], shown["left_out_at"] = last - first - head - tail, head
    kept = [*range(first, first + head), *range(last - tail, last)]
    texts = tokenizer.texts(ids, first, first + head) + tokenizer.texts(ids, last - tail, last)
    shown["tokens"] = [visible(text) for text in texts]
    shown["ids"] = [ids[t] for t in kept]
    if any(row["source"][t] != Source.SAMPLED for t in kept):
        shown["sampled"] = [int(row["source"][t] == Source.SAMPLED) for t in kept]
    for mode, name in MODES.items():
        if name in row:
            shown["values"][mode] = [_rounded(row[name][t]) for t in kept]
    return shown


def _completion(row: Mapping[str, Any], reward: float | None, correct: bool | None) -> dict[str, Any]:
    error = row["error"]
    return {
        "reward": _rounded(reward),
        "correct": correct,
        "parts": {visible(name): _rounded(value) for name, value in row["parts"].items()},
        "error": None if error is None else visible(shortened(str(error), 500)),
        "finish": row["finish"],
        "cut": row["finish"] in CUT,
        "values": {},
    }


def _correct(row: Mapping[str, Any]) -> bool | None:
    """Whether the answer is right, as :attr:`rewards.Score.correct` has it; None where nothing tells."""
    if row["return"] is None or (row["parts"] and "correct" not in row["parts"]):
        return None
    return row["parts"].get("correct", row["return"]) >= 1.0


def _rounded(value: float | None) -> float | None:
    """Three digits of it; None for what is no number."""
    if value is None or not math.isfinite(value):
        return None
    return 0 if abs(value) < 5e-5 else float(f"{value:.3g}")


class TokenTexts:
    """What each token of a sequence stands for.

    Args:
        tokenizer: that made the tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = cache(tokenizer.decode)

    def texts(self, ids_T: Sequence[int], first: int, end: int) -> list[str]:
        """The text that each token from ``first`` on, and before ``end``, adds to that of the token before it.

        A character that is made of several tokens is the text of the last of them; the others have none.
        """
        texts = []
        context, new = max(0, first - 1), first
        for t in range(first, end):
            text = self._decode(tuple(ids_T[context : t + 1]))
            if text.endswith("\ufffd") and t - new < BYTES - 1 and t + 1 < end:
                texts.append("")
                continue
            texts.append(text[len(self._decode(tuple(ids_T[context:new]))) :])
            context, new = t, t + 1
        return texts


class Tokenizers:
    """The tokenizers of runs, each loaded once."""

    def __init__(self) -> None:
        self._loaded: dict[bytes, TokenTexts] = {}

    def of_run(self, folder: Path) -> tuple[TokenTexts | None, list[str]]:
        """The one that is saved with the run's newest checkpoint; None, and why, where there is none."""
        saved = checkpoints(folder)
        if not saved:
            return None, [
                "The run has no checkpoint yet, and with it no tokenizer: completions are shown without tokens."
            ]
        file = saved[-1] / "tokenizer.json"
        content = file.read_bytes() if file.exists() else str(saved[-1]).encode()
        if content not in self._loaded:
            from textenv.tokenizer import load_tokenizer

            try:
                self._loaded[content] = TokenTexts(load_tokenizer(saved[-1]))
            except ValueError as error:
                return None, [f"Completions are shown without tokens: {error}"]
        return self._loaded[content], []


def right_by_group(path: Path) -> list[list[bool]]:
    """For each problem of a step, which of its completions are right; those of which nothing tells are left out."""
    groups: dict[Any, list[bool]] = {}
    for row in read_rows(path):
        right = _correct(row)
        if right is not None:
            groups.setdefault(row["group"], []).append(right)
    return list(groups.values())


def evaluation_series(evaluations: Mapping[str, Evaluation]) -> Series | None:
    """The few answers that the evaluations before and after a training kept; None without any."""
    points = [[_sample(sample) for sample in evaluation.samples] for evaluation in evaluations.values()]
    rule = "those answers that the evaluations kept: the first few problems, wrong answers before right ones"
    return (
        Series("held-out problems, greedy", "held-out", [f"{m} training" for m in evaluations], points, rule)
        if points
        else None
    )


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    row = {**sample, "parts": {}, "error": None if sample["reward"] is not None else "ungraded"}
    text = "\n".join(sample["completions"])
    shown = {**_completion(row, sample["reward"], None), "text": visible(shortened(text, 4_000))}
    return _problem(sample["prompt"], sample["reference"], [shown])


def held_out_series(cells: Sequence[CellResult], allowance: Allowance) -> Iterator[Series]:
    """What the cells wrote for held-out problems, the same ones for all cells of an environment and at each of its points."""
    files = {cell.folder: sorted(cell.folder.glob("completions/[0-9]*.jsonl.gz")) for cell in cells}
    number = sum(map(len, files.values()))
    choices: dict[str, tuple[list[int], int]] = {}
    for cell in cells:
        environment = cell.cell.environment
        labels, points, notes = [], [], []
        for path in files[cell.folder]:
            try:
                lines = gzip.decompress(path.read_bytes()).splitlines()
                if environment not in choices:
                    choices[environment] = _choice([json.loads(line) for line in lines], allowance, number)
                indices, longest = choices[environment]
                points.append([_held_out(json.loads(lines[i]), longest) for i in indices if i < len(lines)])
            except UNREADABLE as error:
                notes.append(f"{path.name} is left out, it cannot be read: {error!r}.")
                continue
            at = int(path.name.split(".")[0])
            labels.append(f"{cell.points[at].share:.0%} of the budget" if at < len(cell.points) else f"point {at}")
        if points:
            rule = (
                f"{len(choices[environment][0])} held-out problems, the same at each point and for each agent: those whose "
                f"hash with seed {allowance.seed} is smallest"
            )
            yield Series(cell.cell.name, f"held-out {environment}", labels, points, rule, notes)


def _choice(rows: Sequence[Mapping[str, Any]], allowance: Allowance, files: int) -> tuple[list[int], int]:
    """Which problems are shown of each of so many files of completions, and how many characters of a completion."""
    each = 1 + max((min(GROUP, len(row["sampled"])) for row in rows), default=0)
    problems = min(len(rows), max(4, allowance.completions // (files * each)))
    longest = allowance.characters // max(1, files * each * problems)
    order = sorted(range(len(rows)), key=lambda i: allowance.order(rows[i]["prompt"]))
    return sorted(order[:problems]), max(200, min(4_000, longest))


def _held_out(row: Mapping[str, Any], longest: int) -> dict[str, Any]:
    completions = [
        {
            **_completion(one, one["reward"], None if one["correct"] is None else one["correct"] >= 1),
            "text": visible(shortened(str(one["text"]), longest)),
            "length": one["tokens"],
            "label": label,
        }
        for label, one in [("greedy", row["greedy"]), *(("sampled", one) for one in row["sampled"][:GROUP])]
    ]
    return _problem(row["prompt"], row["reference"], completions)
