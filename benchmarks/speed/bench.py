"""`textenv bench speed`: runs the parts, shows their tables and keeps them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.speed.report import Settings, show_and_keep

PARTS = ("generation", "step", "arithmetic", "logprobs", "packing", "sync")
"""Modules of this package, each with ``run(settings)``, which yields :class:`~benchmarks.speed.report.Table` after table."""


def bench_speed(only: Sequence[str], settings: Settings, out: Path | None) -> None:
    """Run the parts named, or all; print each table when it is there, and write all of them to ``out``.

    Raises:
        ValueError: there is no such part, or no folder for ``out``.
    """
    names = [find_part(name, PARTS) for name in only] or PARTS
    if out is not None and out.is_dir():
        raise ValueError(f"{out} is a folder; name a file in it")
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"no folder {out.parent} to write {out.name} to; make it first")
    tables = (table for name in names for table in import_module(f"benchmarks.speed.{name}").run(settings))
    show_and_keep(settings.heading("textenv"), tables, out)


def find_part(name: str, parts: Sequence[str]) -> str:
    """The name, once it is sure that there is such a part.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name not in parts:
        nearest = difflib.get_close_matches(name, parts, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise ValueError(f"no part {name!r}; {hint}there are {', '.join(parts)}")
    return name
