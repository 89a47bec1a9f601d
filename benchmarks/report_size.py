"""How long the report of a large suite takes to write and to open, and how much it weighs.

    python -m benchmarks.report_size

makes results of 50 runs with 20,000 rollouts, writes their report and, where there is a Chromium, opens it there.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.records import CELL_FILE, DONE_FILE, POINTS_FILE, SCHEMA, Cell, Point, problem_row
from benchmarks.harness.results import SUITE_FILE
from benchmarks.report.build import build
from textenv.episodes import Source
from textenv.tokenizer import CharTokenizer

AGENTS, SEEDS, STEPS = 10, 5, 40
GROUPS, GROUP = 2, 5
POINTS, PROBLEMS, SAMPLES = 5, 64, 8
BROWSER = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]
PARTS = (
    "environment",
    "task",
    "reward",
    "verifier",
    "tokenizer",
    "model",
    "budget",
    "evaluation",
    "libraries",
    "hardware",
)
HELD_OUT = ("reward", "accuracy", "length", "cut_share", "ungraded_share", "entropy", "kl", "unique_share")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        make_results(results, agents=AGENTS, seeds=SEEDS, steps=STEPS)
        started, worked = time.perf_counter(), time.process_time()
        page = build(results, results / "report.html")
        seconds, worked = time.perf_counter() - started, time.process_time() - worked
        print(f"{AGENTS * SEEDS} runs with {AGENTS * SEEDS * STEPS * GROUPS * GROUP:,} rollouts")
        print(f"written in {seconds:.1f} s ({worked:.1f} s of a processor), {page.stat().st_size / 1e6:.2f} MB")
        browser = shutil.which("chromium") or shutil.which("google-chrome")
        if browser and find_spec("playwright"):
            print(f"opened in {seconds_to_open(page, browser):.2f} s, its first rollouts shown")


def seconds_to_open(page: Path, browser: str) -> float:
    """From the beginning of loading until rollouts are shown."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=BROWSER)
        tab = chromium.new_page()
        started = time.perf_counter()
        tab.goto(page.resolve().as_uri())
        tab.wait_for_selector("#problem .card")
        seconds = time.perf_counter() - started
        chromium.close()
    return seconds


def make_results(folder: Path, *, agents: int, seeds: int, steps: int) -> None:
    """A results folder as `textenv bench run` leaves it, of figures and texts drawn at random."""
    names = [f"agent-{i}" for i in range(agents)]
    tables = "".join(f"[agents.{name}]\nkind = 'grpo'\n" for name in names)
    budget = steps * GROUPS * GROUP
    (folder / SUITE_FILE).write_text(
        f"title = 'made up'\nseeds = {list(range(seeds))}\n[budget]\nepisodes = {budget}\n"
        f"[environments.sums]\nid = 'textenv/Arithmetic-v0'\n{tables}"
    )
    for number, name in enumerate(names):
        for seed in range(seeds):
            rng = np.random.default_rng([number, seed])
            make_cell(folder, Cell("sums", name, seed), steps, rng)


def make_cell(folder: Path, cell: Cell, steps: int, rng: np.random.Generator) -> None:
    """A cell that is done."""
    path = folder / cell.path
    (path / "completions").mkdir(parents=True)
    provenance = {**dict.fromkeys(PARTS, "made up"), "settings": cell.agent}
    head = {
        "schema": SCHEMA,
        "environment": cell.environment,
        "agent": cell.agent,
        "seed": cell.seed,
        "provenance": provenance,
    }
    (path / CELL_FILE).write_text(json.dumps(head))
    skill = np.linspace(0.1, rng.uniform(0.4, 0.9), POINTS)
    points = [_point(i / (POINTS - 1), skill[i], steps, rng) for i in range(POINTS)]
    (path / POINTS_FILE).write_text("".join(point.to_json() + "\n" for point in points))
    for i, point in enumerate(points):
        rows = [_held_out(problem, point) for problem in range(PROBLEMS)]
        write_rows(path / "completions" / f"{i:03d}.jsonl.gz", rows)
    make_run(path / "run", steps=steps, rng=rng)
    (path / DONE_FILE).write_text(
        json.dumps({"seconds": 60.0, "measuring_seconds": 6.0, "peak_memory_mb": 500.0, "energy_j": None})
    )


def _point(share: float, skill: float, steps: int, rng: np.random.Generator) -> Point:
    right = (rng.random((PROBLEMS, 1 + SAMPLES)) < skill).astype(float)
    greedy, sampled = right[:, 0], right[:, 1:]
    metrics = {
        "greedy/accuracy": float(greedy.mean()),
        "greedy/reward": float(greedy.mean()),
        "sampled/accuracy": float(sampled.mean()),
        "sampled/reward": float(sampled.mean()),
        "sampled/entropy": 1 - 0.5 * share,
        "sampled/length": 40 + 10 * share,
        "sampled/cut_share": 0.1 * share,
        "sampled/kl": 4 * share * rng.uniform(0.8, 1.2),
        "sampled/unique_share": 0.6 - 0.2 * share,
        **{f"sampled/pass@{2**i}": float(1 - (1 - skill) ** 2**i) for i in range(4)},
    }
    episodes = int(share * steps * GROUPS * GROUP)
    both = {"greedy": {"reward": greedy.tolist(), "correct": greedy.tolist()}}
    both["sampled"] = {"reward": sampled.tolist(), "correct": sampled.tolist()}
    return Point(share, episodes, 60 * episodes, int(share * steps), 60 * share, metrics, **both)


def _held_out(problem: int, point: Point) -> dict[str, Any]:
    def answer(reward: float | None) -> dict[str, Any]:
        text = f"step {point.updates}: let me add them up. {problem} and 17 make {problem + 17 if reward else problem + 16}"
        return {
            "text": text,
            "reward": reward,
            "correct": reward,
            "parts": {},
            "error": None,
            "finish": "eos",
            "tokens": len(text),
        }

    greedy, *sampled = (
        answer(reward) for reward in [point.greedy["reward"][problem], *point.sampled["reward"][problem]]
    )
    return problem_row(f"{problem}+17=", str(problem + 17), greedy, sampled)


def make_run(folder: Path, *, steps: int, rng: np.random.Generator, groups: int = GROUPS, group: int = GROUP) -> None:
    """A run as `textenv train` leaves it, half of its problems coming again and again."""
    checkpoint = folder / "checkpoints" / f"{steps:06d}"
    (folder / "rollouts").mkdir(parents=True)
    checkpoint.mkdir(parents=True)
    CharTokenizer().to_transformers().save_pretrained(checkpoint)
    settings = {"model": "tiny", "total_episodes": steps * groups * group, "seed": 0}
    config = {"schema": 1, "agent": "grpo", "env": "textenv/Arithmetic-v0", "settings": settings, "versions": {}}
    (folder / "config.json").write_text(json.dumps({**config, "device": "cpu", "parameters": 945_920, "monitors": []}))
    with open(folder / "metrics.jsonl", "w") as metrics:
        for step in range(1, steps + 1):
            skill = 0.1 + 0.7 * step / steps
            rows = list(_episodes(step, groups, group, skill, rng))
            write_rows(folder / "rollouts" / f"{step:06d}.jsonl.gz", rows)
            logged = {
                "reward": float(np.mean([row["return"] for row in rows])),
                "entropy": 1 - 0.6 * skill + 0.05 * rng.normal(),
                "new_tokens_mean": 40 + 10 * skill + rng.normal(),
                "kl": 3 * skill + 0.1 * rng.normal(),
                "grad_norm": float(rng.gamma(2.0)),
                "episodes": step * groups * group,
                "seconds": 0.5,
            }
            metrics.write(json.dumps({"step": step, **logged}) + "\n")


def _episodes(step: int, groups: int, group: int, skill: float, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    tokenizer = CharTokenizer()
    for number in range(groups):
        problem = number if number % 2 else 1000 + step
        prompt = tokenizer.encode(f"{problem}+17=")
        right = rng.random(group) < skill
        advantages = right - right.mean()
        for i in range(group):
            text = f"let me add them up: {problem} and 17 make {problem + 16 + right[i]}"
            tokens = [*tokenizer.encode(text), 0]
            before = [0.0] * len(prompt)
            logp = -rng.exponential(0.3, len(tokens))
            yield {
                "group": number,
                "prompt": f"{problem}+17=",
                "completions": [text],
                "reference": str(problem + 17),
                "return": float(right[i]),
                "parts": {"correct": float(right[i])},
                "error": None,
                "verdict": {},
                "finish": "eos",
                "tokens": prompt + tokens,
                "source": [int(Source.PROMPT)] * len(prompt) + [int(Source.SAMPLED)] * len(tokens),
                "logp": before + logp.tolist(),
                "reward": before + [0.0] * (len(tokens) - 1) + [float(right[i])],
                "advantage": before + [float(advantages[i])] * len(tokens),
                "entropy": before + rng.exponential(0.4, len(tokens)).tolist(),
                "ratio": before + np.exp(0.1 * rng.normal(size=len(tokens))).tolist(),
                "kl": before + (0.2 * rng.normal(size=len(tokens))).tolist(),
            }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A JSON line each, gzipped."""
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), 1))


if __name__ == "__main__":
    main()
