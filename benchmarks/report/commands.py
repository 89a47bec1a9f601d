"""The commands `textenv report` and `textenv watch`."""

from __future__ import annotations

from pathlib import Path


def report(source: Path, /, *, out: Path | None = None, seed: int = 0) -> None:
    """Write one self-contained page about a run, or the results of a suite.

    Beside it go the same tables as markdown and the curves as CSV.

    Args:
        source: a run's folder, or one that textenv bench run filled.
        out: the page; default report.html in that folder.
        seed: of the choice of rollouts that the page shows.
    """
    from benchmarks.report.build import build

    path = build(source, out or source / "report.html", seed)
    print(f"the report is in {path} ({path.stat().st_size / 1e6:.1f} MB); beside it {path.stem}.md and {path.stem}.csv")


def watch(run: Path, /, *, every: float = 2.0) -> None:
    """Show a training that is running, from another window, until it ends. Without a terminal: once.

    Args:
        run: its folder.
        every: seconds between looks.
    """
    from benchmarks.report.live import watch_run

    watch_run(run, every)
