"""Programs that want a pass without earning it, or want to do harm: none passes, and nothing is left of them."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.code_cases import HOSTILE, TARGET, TARGET_ASSERTS, TARGET_PAIRS, hostile_samples
from rewards import Sample
from rewards.verifiers.code import Code

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

WORKERS = 4
"""No other test uses as many, so that these processes start here, in the temporary folder of these tests."""
RUNS = 1_000
OUTCOMES = {"failed", "error", "no program", "time-out", "memory", "scratch", "output", "killed", "exit", "protocol"}
GOOD = [
    Sample(prompt="", completion=TARGET.right, reference=TARGET.reference),
    Sample(prompt="", completion=TARGET.right, reference=TARGET_ASSERTS),
    Sample(prompt="", completion="v = [*map(int, input().split())]\nprint(max(v) - min(v))", reference=TARGET_PAIRS),
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("scratch")
        patch.setenv("TMPDIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def code(scratch: Path) -> Code:
    code = Code(seconds=0.5, workers=WORKERS)
    assert [score.value for score in code(GOOD * WORKERS)] == [1.0] * len(GOOD) * WORKERS
    return code


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    canary = tmp_path / "canary" / "file"
    canary.parent.mkdir()
    canary.write_text("alive")
    mode = canary.stat().st_mode
    yield canary
    assert (canary.read_text(), canary.stat().st_mode) == ("alive", mode)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["canary", "file"]


def run(code: Code, samples: list[tuple[str, dict]]) -> list[str]:
    """What came of each sample; each is followed by a good one, which must pass."""
    hostile = [Sample(prompt="", completion=text, reference=reference) for text, reference in samples]
    pairs = zip(hostile, itertools.cycle(GOOD), strict=False)
    scores = code([sample for pair in pairs for sample in pair])
    assert [score for score in scores[1::2] if score.value != 1.0] == []
    return ["passed" if score.correct else score.error or score.info["outcome"] for score in scores[::2]]


def assert_nothing_is_left(scratch: Path) -> None:
    """No process below the judges but the sandboxes' servers, and no file but the servers' folders."""
    for _ in range(100):
        judges = [pid for pid in children(os.getpid()) if b"rewards.verifiers.code.judge" in _command(pid)]
        servers = [server for judge in judges for server in children(judge)]
        programs = [program for server in servers for program in children(server)]
        files = [path for path in scratch.rglob("*") if path.parent != scratch or not path.is_dir()]
        roots = len(list(scratch.iterdir()))
        strangers = [pid for pid in servers if b"sandbox" not in _command(pid)]
        if not (programs or strangers or files or roots > WORKERS):
            return
        time.sleep(0.05)
    raise AssertionError(f"left behind: {programs=}, {strangers=}, {files=}, {roots=}")


def children(pid: int) -> list[int]:
    """The processes that ``pid`` has started or adopted, from any of its threads."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += [int(child) for child in task.read_text().split()]
    return found


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@pytest.mark.parametrize("kind", [kind for kind in (*HOSTILE, "scripts") if kind != "eats"])
def test_no_hostile_program_passes_and_the_next_good_one_does(kind, code, canary, scratch):
    samples = [sample for (its, _), sample in hostile_samples(str(canary)).items() if its == kind]
    assert set(run(code, samples)) <= OUTCOMES
    assert_nothing_is_left(scratch)


@pytest.mark.slow
def test_of_a_thousand_hostile_runs_none_passes_and_nothing_is_left(code, canary, scratch):
    samples = list(itertools.islice(itertools.cycle(hostile_samples(str(canary)).values()), RUNS))
    for start in range(0, RUNS, 100):
        assert set(run(code, samples[start : start + 100])) <= OUTCOMES
        assert_nothing_is_left(scratch)
