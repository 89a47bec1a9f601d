"""Which report a folder gets."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.results import SUITE_FILE
from benchmarks.report.page import Page
from benchmarks.report.rollouts import Allowance
from benchmarks.report.runs import is_run


def build(source: Path, out: Path, seed: int = 0) -> Path:
    """Write the report of a run or of results.

    Args:
        source: its folder.
        out: the page; ``.md`` and ``.csv`` go beside it.
        seed: of the choice of rollouts.

    Returns:
        ``out``.

    Raises:
        ValueError: the folder is neither, or holds nothing yet.
    """
    if out.suffix != ".html":
        raise ValueError(f"a report is a page, so --out must end in .html, got {str(out)!r}")
    if not out.parent.is_dir():
        raise ValueError(f"no folder {out.parent} to write the report to; make it first")
    _page(source, Allowance(seed=seed)).write(out)
    return out


def _page(source: Path, allowance: Allowance) -> Page:
    if not source.is_dir():
        raise ValueError(
            f"{source} is no folder; a report is made of a run's folder, or of one that `textenv bench run` filled"
        )
    if is_run(source):
        from benchmarks.report.run_page import run_page

        return run_page(source, allowance)
    if (source / SUITE_FILE).is_file():
        from benchmarks.report.results_page import results_page

        return results_page(source, allowance)
    runs = [path for path in sorted(source.iterdir()) if (path / "metrics.jsonl").is_file()]
    hint = f"; there are runs in it, such as {runs[0]}" if runs else ""
    raise ValueError(
        f"{source} is neither a run (no config.json that names an agent) nor results (no {SUITE_FILE}){hint}"
    )
