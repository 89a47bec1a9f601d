"""Where a run's metrics become curves while it goes on: TensorBoard, and Weights & Biases if it is asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

WANDB = "WANDB_PROJECT"
"""The environment variable that names a project of Weights & Biases. A key alone uploads nothing."""
ID_FILE = "wandb.id"


class Boards:
    """Shows a run's metrics.

    Args:
        folder: of the run; all that is written goes there.
        config: of the run, without any keys.
        first_step: the first that is to come; what TensorBoard knows of it and of later ones is dropped.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard reads files in the order of the clock. Had that gone back, a first file's purge would hide the later ones.
        purge = first_step if first_step > 1 else None
        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        self._tensorboard: Any = writer.file_writer  # takes all scalars of a step at once
        self._wandb: Any = None
        if os.environ.get(WANDB):
            import wandb

            path = folder / ID_FILE
            if not path.exists():
                path.write_text(uuid4().hex)
            self._wandb = wandb.init(
                id=path.read_text(), name=folder.name, dir=folder, config=dict(config), resume="allow"
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._tensorboard.add_summary(scalars(metrics), step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def close(self) -> None:
        """Write what is still to be written."""
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_boards() -> None:
    """Refuse, before a model loads, a board that cannot be written to.

    Raises:
        ImportError: Weights & Biases is asked for and not installed.
    """
    if os.environ.get(WANDB) and find_spec("wandb") is None:
        raise ImportError(f"{WANDB} is set, but wandb is not installed: pip install 'textenv[wandb]', or unset {WANDB}")


def scalars(metrics: Mapping[str, float]) -> Any:
    """The metrics of a step as one event for TensorBoard."""
    from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()])
