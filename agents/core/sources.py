"""Where a model comes from: checks that cost nothing, to be made before anything heavy loads."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

SUMS_FILE = "checksums.json"
"""In a checkpoint, what each of its other files hashes to."""

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
    """The model folder that ``source`` means: the newest whole checkpoint if it is a run's folder, else ``source`` itself.

    Raises:
        ValueError: none of the run's checkpoints is whole.
    """
    return newest_checkpoint(source) or source


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of a run whose files are what they were when it was kept; None if there is none at all.

    Each newer one that is damaged is named on stdout.

    Raises:
        ValueError: all of them are damaged.
    """
    kept = checkpoints(folder)
    for checkpoint in reversed(kept):
        damage = damage_of(checkpoint)
        if damage is None:
            return checkpoint
        print(f"the checkpoint {checkpoint} is damaged and left aside: {damage}", flush=True)
    if kept:
        raise ValueError(
            f"no checkpoint of {folder} is whole ({', '.join(path.name for path in kept)} are damaged); bring one back from a "
            "copy, or train anew with another --run-dir"
        )
    return None


def checksums(folder: Path) -> dict[str, str]:
    """Of every file in a folder, by name: SHA-256."""
    return {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.name != SUMS_FILE}


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Of one that was kept without checksums nothing is known."""
    path = checkpoint / SUMS_FILE
    if not path.exists():
        return None
    try:
        wanted = json.loads(path.read_text())
    except ValueError:
        return f"{SUMS_FILE} cannot be read"
    found = checksums(checkpoint)
    wrong = [name for name in wanted if found.get(name) != wanted[name]]
    return f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not as it was kept" if wrong else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in Path(folder, "checkpoints").glob("[0-9]*") if path.suffix == "")
