"""How long `textenv` takes to start: ``python -m benchmarks.speed.imports``."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.measure import machine, medians, seconds

TARGET_SECONDS = 0.5
PROGRAMS = {
    "python": "pass",
    "import textenv": "import textenv",
    "textenv --help": "from textenv.cli import main; main(['--help'])",
}
HEAVY = ("torch", "transformers")


def main(rounds: int = 11) -> None:
    """Print the start-up time of a fresh process, and whether it imports what is heavy.

    Args:
        rounds: processes started for each, in turns; the median is shown.
    """
    console = Console(width=110)
    print(machine())
    times = medians({name: partial(seconds, partial(run, code)) for name, code in PROGRAMS.items()}, rounds)
    table = Table("", "seconds", "target", "× bare python", "imports of " + ", ".join(HEAVY))
    for name, code in PROGRAMS.items():
        target = "" if name == "python" else f"{TARGET_SECONDS:g}"
        ratio = f"{times[name] / times['python']:.1f}"
        table.add_row(name, f"{times[name]:.3f}", target, ratio, ", ".join(heavy_imports(code)) or "none")
    console.print(table)


def run(code: str) -> str:
    """What a fresh Python process prints that runs ``code``."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def heavy_imports(code: str) -> list[str]:
    """Those of ``HEAVY`` that a process has imported after ``code``."""
    last_line = run(f"{code}\nimport sys; print(*[name for name in {HEAVY} if name in sys.modules])").splitlines()[-1]
    return last_line.split()


if __name__ == "__main__":
    tyro.cli(main)
