"""`textenv score`: any reward on a file of samples."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import rewards
from rewards import Reward, RewardError, Sample, Score, score_samples
from rewards.intervals import wilson
from rewards.options import parse_options
from rewards.rows import read_rows
from rewards.terminal import plain, visible
from textenv.episodes import Source

REASONS = 3
"""How many reasons for leaving samples ungraded are shown, the commonest first."""

RewardOptions = Annotated[
    dict[str, str],
    tyro.conf.arg(name="options", metavar="NAME VALUE ...", help="options of the reward, e.g. ignore_case true"),
]


def score(
    *,
    reward: str,
    file: Path,
    options: RewardOptions = {},  # noqa: B006
    out: Path | None = None,
) -> None:
    """Score a file of samples with any reward.

    Args:
        reward: a registered name, which its options may follow as in "exact ignore_case true".
        file: a jsonl, csv or parquet file (.gz too) with the fields prompt, completion and reference, and if there are any
            turns, tokens, finish and info; or what `textenv generate --out` wrote, or a run's rollouts.
        options: options of the reward.
        out: write each row here as a JSON line, with its score.
    """
    maker = make_reward(reward, parse_options(options))
    rows, samples = read_samples(file)
    if out is not None and (out.is_dir() or not out.parent.is_dir() or (out.exists() and out.samefile(file))):
        raise ValueError(f"--out must be another file than the one that is read, in a folder that exists, got {out}")
    started = time.perf_counter()
    scores = score_samples(maker, samples)
    seconds = time.perf_counter() - started
    if out is not None:
        with out.open("w") as lines:
            lines.writelines(
                json.dumps(scored_row(*pair), default=str) + "\n" for pair in zip(rows, scores, strict=True)
            )
    Console(highlight=False).print(figures_table(f"{reward} on {file.name}", scores, seconds))
    if all(score.value is None for score in scores):
        raise RewardError(f"the reward {reward!r} could grade none of {len(scores)} samples; the table says why")


def make_reward(name: str, options: Mapping[str, Any]) -> Reward:
    """The reward registered as ``name``.

    Raises:
        ValueError: no reward has this name or these options.
    """
    try:
        return rewards.make(name, **options) if options else rewards.as_reward(name)
    except (TypeError, AttributeError) as error:  # an option of another type: some rewards meet it by using it
        raise ValueError(f"reward {name!r} cannot be made with the options {list(options)}: {error}") from error


def read_samples(file: Path) -> tuple[list[dict[str, Any]], list[Sample]]:
    """The rows of a file, and the sample in each.

    Raises:
        ValueError: a row that holds no sample; the message names the file and the row. No rows at all.
        FileNotFoundError, ImportError: see :func:`rewards.rows.read_rows`.
    """
    rows, samples = [], []
    for number, row in read_rows(file):
        try:
            samples.append(sample_of(row))
        except ValueError as error:
            raise ValueError(f"{file}, row {number}: {error}") from error
        rows.append(dict(row))
    if not rows:
        raise ValueError(f"{file} has no rows; give one sample a row")
    return rows, samples


def sample_of(row: Any) -> Sample:
    """The sample in a row: of a file of samples, or of what `textenv generate` wrote.

    Raises:
        ValueError: a field is missing or of another type.

    Example:
        >>> sample_of({"prompt": "6*7=", "completions": ["41", "42"], "reference": "42"}).completion
        '42'
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"wanted an object with prompt, completion and reference, got {str(row)[:60]!r}")
    generated = "completions" in row
    turns = _field(row, "completions" if generated else "turns", list, [])
    if generated and not turns:
        raise ValueError("there is no completion in 'completions'")
    completion = turns[-1] if generated else _field(row, "completion", str)
    tokens = _field(row, "tokens", list, [])
    if "source" in row:  # the tokens are those of the whole context; the sample has those that the policy chose
        tokens = _chosen(tokens, _field(row, "source", list))
    if "reference" not in row:
        raise ValueError(f"wanted the field 'reference', null where there is none; there are {', '.join(row)}")
    if not all(isinstance(turn, str) for turn in turns):
        raise ValueError(f"the turns must be texts, got {str(turns)[:60]}")
    if not all(isinstance(token, int) for token in tokens):
        raise ValueError(f"the tokens must be whole numbers, got {str(tokens)[:60]}")
    return Sample(
        prompt=_field(row, "prompt", str),
        completion=completion,
        reference=row["reference"],
        turns=tuple(turns) or (completion,),
        tokens=tuple(tokens),
        finish=_field(row, "finish", str, "eos"),
        info=_field(row, "info", dict, {}),
    )


def _chosen(tokens: Sequence[int], source: Sequence[int]) -> list[int]:
    if len(tokens) != len(source):
        raise ValueError(f"wanted as many tokens as sources, got {len(tokens)} and {len(source)}")
    return [token for token, origin in zip(tokens, source, strict=True) if origin == Source.SAMPLED]


_NAMES: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
_REQUIRED: Any = object()


def _field(row: Mapping[str, Any], name: str, kind: type, default: Any = _REQUIRED) -> Any:
    value = row.get(name, default)
    if value is _REQUIRED:
        raise ValueError(f"wanted the field {name!r}, there are {', '.join(map(str, row)) or 'none'}")
    if value is not default and not isinstance(value, kind):
        raise ValueError(f"the field {name!r} must hold {_NAMES[kind]}, got {str(value)[:60]!r}")
    return value


def scored_row(row: Mapping[str, Any], score: Score) -> dict[str, Any]:
    """A row with its score, as plain data."""
    kept = {"value": score.value, "parts": dict(score.parts), "info": dict(score.info), "error": score.error}
    return {**row, "score": kept}


def figures_table(title: str, scores: Sequence[Score], seconds: float) -> Table:
    """What the scores of a file come to, for people: means with 95 % intervals, parts, what was ungraded and why."""
    graded = [score for score in scores if score.value is not None]
    table = Table(
        show_header=False, title=escape(visible(title)), caption="means of the graded samples, with 95 % intervals"
    )
    table.add_row("samples", str(len(scores)))
    table.add_row("value", _mean_text([score.value for score in graded if score.value is not None]))
    if verdicts := [bool(score.correct) for score in graded if score.tells]:
        table.add_row("accuracy", _share_text(sum(verdicts), len(verdicts)))
    for name in sorted({name for score in graded for name in score.parts}):
        table.add_row(plain(f"part {name}"), f"{fmean(s.parts[name] for s in graded if name in s.parts):.3f}")
    table.add_row("ungraded", f"{len(scores) - len(graded)} of {len(scores)}")
    # The last line of a traceback is what went wrong.
    reasons = Counter(
        (score.error.strip() or "no reason").splitlines()[-1] for score in scores if score.error is not None
    )
    for reason, times in reasons.most_common(REASONS):
        table.add_row(f"  {times} ×", plain(reason))
    table.add_row("time a sample", f"{seconds / len(scores) * 1e3:.3g} ms")
    return table


def _mean_text(values: Sequence[float]) -> str:
    """A mean with its bootstrap interval over samples (percentiles)."""
    from scipy import stats

    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "none could be graded"
    # In batches, so that a long file does not need memory for all resamples at once.
    found = stats.bootstrap((values,), np.mean, n_resamples=5000, method="percentile", batch=16, rng=0)
    return f"{fmean(values):.3f} [{found.confidence_interval.low:.3f}, {found.confidence_interval.high:.3f}]"


def _share_text(right: int, total: int) -> str:
    """A share with its Wilson interval, in per cent."""
    low, high = wilson(right, total)
    return f"{right / total:.1%} [{100 * low:.1f}, {100 * high:.1f}]"
