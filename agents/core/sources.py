"""Where a model comes from: checks that cost nothing, to be made before anything heavy loads."""

from __future__ import annotations

import re
from pathlib import Path

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def validate_model_source(source: str | Path) -> str:
    """Refuse a source that can be neither a model's folder nor a name on the hub. Nothing is downloaded.

    Returns:
        The folder's path, ``~`` expanded, or the name.

    Raises:
        ValueError: the folder holds no ``config.json``, or the name could not be one.
    """
    path = Path(source).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"{str(source)!r} is not a model folder: no config.json in it; give a folder that save_pretrained "
                "wrote, or a name on the hub"
            )
        return str(path)
    looks_local = path.parent.is_dir() and path.parent != Path()
    if looks_local or not _HUB_NAME.fullmatch(str(source)):
        raise ValueError(
            f"{str(source)!r} is neither a model folder (it does not exist) nor a hub name such as Qwen/Qwen3-0.6B"
        )
    return str(source)


def find_model(source: str | Path) -> str | Path:
    """The model folder that ``source`` means: the newest checkpoint if it is a run's folder, else ``source`` itself."""
    saved = checkpoints(source)
    return saved[-1] if saved else source


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in Path(folder, "checkpoints").glob("[0-9]*") if path.suffix == "")
