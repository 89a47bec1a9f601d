"""The `textenv` command: finds its sub-commands by entry point and turns their signatures into command lines."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, NoReturn

GROUP = "textenv.commands"

USAGE = """\
usage: textenv COMMAND [ARGUMENTS] [--import MODULE ...]

Reinforcement learning on language models: environments, rewards, agents, benchmarks.
"""

HINTS = """
`textenv COMMAND --help` shows a command's own arguments.
`--import MODULE` imports a module of yours first, so that the environments it registers are known.
`--traceback` shows where an error came from.

    textenv train grpo textenv/Arithmetic-v0        train the embedded model in minutes, on a laptop
    textenv play textenv/GuessNumber-v0             answer in the terminal yourself
    textenv check me/Mine-v0 --import my_module     what to mend in an environment of yours
"""


imported: list[str] = []
"""Modules that this command's `--import` brought in, for a run to remember and for commands that it suggests."""


def main(argv: list[str] | None = None) -> None:
    """Run `textenv` with ``argv``. Errors that a user can mend are one line on stderr and exit status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    commands = {entry.name: entry for entry in entry_points(group=GROUP)}
    imported.clear()
    try:
        _import_modules(arguments)
        if not arguments or arguments[0] in ("-h", "--help"):
            _print_map(commands)
        elif arguments[0] not in commands:
            _fail(f"no command {arguments[0]!r}; there are {', '.join(sorted(commands))}")
        else:
            _run(commands[arguments[0]], arguments[1:])
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if show_traceback:
            raise
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted")


def _run(command: EntryPoint, arguments: list[str]) -> None:
    import tyro

    function: Callable[..., Any] = command.load()
    if getattr(function, "takes_arguments", False):
        function(arguments)
    else:
        tyro.cli(function, prog=f"textenv {command.name}", args=arguments)


def _import_modules(arguments: list[str]) -> None:
    """Take `--import MODULE` out of the arguments, wherever it stands, and import it from the working folder or the path."""
    while "--import" in arguments:
        at = arguments.index("--import")
        if at + 1 == len(arguments):
            _fail("--import needs the name of a module")
        import_module(arguments[at + 1].removesuffix(".py"))
        del arguments[at : at + 2]


def import_module(module: str) -> None:
    """Import a user's module, for runs to remember; see :func:`load_module`."""
    load_module(module)
    if module not in imported:
        imported.append(module)


def load_module(module: str) -> ModuleType:
    """A user's module, from the working folder or the path.

    Raises:
        ValueError: there is none.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ValueError(f"no module {module!r} in this folder or on the Python path") from error


def _print_map(commands: dict[str, EntryPoint]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2))
    for name in sorted(commands, key=_order):
        table.add_row(f"  [bold]{name}[/bold]", _summary(commands[name]))
    console = Console()
    console.print(USAGE, highlight=False, soft_wrap=True)
    console.print(table)
    console.print(HINTS, highlight=False, soft_wrap=True)


def _order(name: str) -> tuple[int, str]:
    usual = ["list", "play", "check", "profile", "train", "evaluate", "generate", "replay", "score", "fit", "judge"]
    return (usual.index(name) if name in usual else len(usual), name)


def _summary(command: EntryPoint) -> str:
    return (command.load().__doc__ or "").strip().splitlines()[0]


def _fail(message: str) -> NoReturn:
    from rewards.terminal import visible

    print(f"textenv: {visible(message)}", file=sys.stderr)
    raise SystemExit(2)
