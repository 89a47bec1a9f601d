"""Runs and results whose texts try to break out of wherever they are shown."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report_size import make_results, make_run, write_rows

HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1><!--<script>"
    "{0} %s ${title} $title \x1b[31m\x1b]0;owned\x07\x9b5m\x00 \u2028\u2029\u202e\ud800 "
    "[link](javascript:window.hacked=1) | `code` **bold** [red]markup[/red] http://evil.example \" ' &lt;"
)


def run(folder: Path, *, steps: int = 4) -> Path:
    """A small run that is running."""
    make_run(folder, steps=steps, rng=np.random.default_rng(0), groups=4, group=4)
    return folder


def results(folder: Path) -> Path:
    """Two agents, three seeds."""
    folder.mkdir(exist_ok=True)
    make_results(folder, agents=2, seeds=3, steps=3)
    return folder


def edit_rows(path: Path, **changes: Any) -> None:
    """Put these values, or what these functions make of the old ones, into every row of a file."""
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    for row in rows:
        row |= {name: new(row[name]) if callable(new) else new for name, new in changes.items()}
    write_rows(path, rows)


def edit_json(path: Path, **changes: Any) -> None:
    """Put these values into a file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def hostile_run(folder: Path) -> Path:
    """A run all of whose texts are hostile, one group cut, one ungraded."""
    run(folder)
    hostile = {
        "prompt": HOSTILE,
        "completions": [HOSTILE],
        "reference": HOSTILE,
        "parts": {HOSTILE: 1.0, "correct": 0.0},
        "finish": HOSTILE,
    }
    for path in folder.glob("rollouts/*"):
        edit_rows(path, **hostile)
    edit_rows(folder / "rollouts" / "000002.jsonl.gz", error=HOSTILE, **{"return": None})
    edit_json(folder / "config.json", agent=HOSTILE, env=HOSTILE, settings={"model": HOSTILE, HOSTILE: HOSTILE})
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "reward": 1.0, f"reward/{HOSTILE}": 0.5, "episodes": 80}) + "\n")
    alarm(folder, step=3, text=HOSTILE)
    sample = {"prompt": HOSTILE, "completions": [HOSTILE], "reference": HOSTILE, "reward": 0.0, "finish": "eos"}
    evaluation = {
        **{"episodes": 2, "ungraded": 0, "accuracy": 0.5, "accuracy_low": 0.1, "accuracy_high": 0.9, "reward": 0.5},
        **{"reward_low": 0.1, "reward_high": 0.9, "new_tokens": 3.0, "cut_share": 0.0, "samples": [sample]},
    }
    for moment in ("before", "after"):
        (folder / f"evaluation_{moment}.json").write_text(json.dumps(evaluation))
    return folder


def alarm(folder: Path, *, step: int, over: bool = False, text: str = "") -> None:
    """Add a line to the run's alarms."""
    told = {"step": step, "rule": "entropy", "over": over, "value": 0.01, "threshold": 0.1}
    with open(folder / "alarms.jsonl", "a") as file:
        file.write(json.dumps({**told, "sentence": f"entropy collapsed{text}", "samples": [text, text]}) + "\n")


def without_tokenizer(folder: Path) -> Path:
    """The run with its checkpoints taken away."""
    for path in sorted(folder.glob("checkpoints/**/*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return folder


def hostile_results(folder: Path) -> Path:
    """Results with hostile texts wherever a model, a program or a person may have put one."""
    results(folder)
    for path in folder.glob("cells/*/*/*/completions/*"):
        answer = {"text": HOSTILE, "reward": 0.0, "correct": 0.0, "parts": {HOSTILE: 1.0}, "error": HOSTILE}
        answer |= {"finish": "length", "tokens": 3}
        edit_rows(path, prompt=HOSTILE, reference=HOSTILE, greedy=answer, sampled=[answer])
    failed = next(iter(sorted(folder.glob("cells/*/*/*"))))
    (failed / "done.json").unlink()
    (failed / "failed.json").write_text(json.dumps({"error": HOSTILE, "traceback": HOSTILE}))
    edit_json(failed / "cell.json", provenance={"budget": HOSTILE, "hardware": HOSTILE})
    suite = folder / "suite.toml"
    suite.write_text(suite.read_text().replace("'made up'", json.dumps(HOSTILE.replace("\ud800", ""))))
    verdict = dict.fromkeys(("name", "statement", "source", "protocol", "refuted_by", "verdict", "sentence"), HOSTILE)
    (folder / "verdicts.json").write_text(json.dumps([{**verdict, "interval": [0.2, 0.1, 0.3]}]))
    finding = {"trap": 1, "promise": HOSTILE, "verdict": "FAIL", "why": HOSTILE}
    (folder / "cards").mkdir()
    (folder / "cards" / "a.json").write_text(json.dumps({"trainer": HOSTILE, "machine": "", "findings": [finding]}))
    return folder
