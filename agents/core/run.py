"""A run: the directory with everything one training left behind.

::

    config.json            what was run: agent, environment, settings, versions
    metrics.jsonl          a line a step
    alarms.jsonl           what looked wrong, if anything did
    rollouts/000042.jsonl.gz   the episodes of that step
    checkpoints/000100/    a transformers model folder, and the optimiser's state
    tensorboard/           the metrics, for TensorBoard; and wandb/, for Weights & Biases, where WANDB_PROJECT is set
    evaluation_before.json, evaluation_after.json   on held-out problems

``metrics.jsonl`` and ``alarms.jsonl`` grow by lines. All else appears whole or not at all: it is written beside its place and
renamed into it once it is on disk. Rollouts and checkpoints wait for that in a thread, in the order in which they were kept.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from agents.core.boards import ID_FILE, Boards
from agents.core.doctor import ALARMS_FILE
from agents.core.learner import Learner
from agents.core.policy import Policy
from agents.core.records import LOCK_FILE, SCHEMA
from agents.core.sources import SUMS_FILE, checkpoints, checksums
from agents.core.trajectories import Trajectories
from textenv.task import Finish

BOARDS = ("tensorboard", "wandb", ID_FILE)
STATE_FILE = "state.json"
BEHAVIOUR_FILE = "behaviour.safetensors"
"""In a checkpoint, the weights that the batch of the next step is sampled with, where they are not the policy's."""
MIN_FREE_BYTES = 64 * 2**20


class Run:
    """The directory of one run.

    Args:
        folder: where it lies; made if need be.
        config: what is run, as plain data.
        resume: go on with the run that is there.

    Raises:
        ValueError: the folder holds another run, or no run to resume; a config that differs from the one to resume.
        OSError: the disk is full or the folder cannot be written.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any], *, resume: bool = False) -> None:
        self.folder = Path(folder)
        self.config = {"schema": SCHEMA, **json.loads(to_json(config))}
        check_run_folder(self.folder, resume=resume)
        self._lock = lock(self.folder)
        if resume:
            _check_same(read_config(self.folder), self.config)
        else:
            (self.folder / "rollouts").mkdir(parents=True, exist_ok=True)
            (self.folder / "checkpoints").mkdir(exist_ok=True)
            # A start that failed may have left one, of other settings.
            (self.folder / "evaluation_before.json").unlink(missing_ok=True)
            _write_text(self.folder / "config.json", json.dumps(self.config, indent=2))
        self._boards: Boards | None = None
        self._first_step = 1
        self._disk = ThreadPoolExecutor(1)
        """waits for the disk, while training goes on"""
        self._under_way: list[Future[None]] = []
        self._checkpoint: Future[None] | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a step's metrics. A value that is not a number is kept as null."""
        line = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **line}) + "\n")
        if self._boards is None:
            self._boards = Boards(self.folder, self.config, self._first_step)
        self._boards.log(step, metrics)

    def log_rollout(self, step: int, trajectories: Trajectories) -> None:
        """Keep the episodes of a step, a JSON line each; a thread waits for the disk.

        Raises:
            OSError: the disk is full, or was when what was kept before was written to it.
        """
        encode = json.JSONEncoder(default=_plain).encode
        lines = "".join(encode(row) + "\n" for row in episode_rows(trajectories))
        path = self.folder / "rollouts" / f"{step:06d}.jsonl.gz"
        new = _beside(path)
        new.write_bytes(gzip.compress(lines.encode(), compresslevel=1, mtime=0))
        self._later(_put_in_place, new, path)

    def save_checkpoint(
        self,
        step: int,
        policy: Policy,
        learner: Learner,
        state: Mapping[str, Any],
        behaviour: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Save all that the run needs to go on as if it had never stopped. Only the newest two are kept.

        ``state`` are the numbers that grow from step to step, and those of the reward; ``behaviour`` the weights that the next
        batch is sampled with, where they are not the policy's. All else that a step depends on (problems, sampling, learning
        rate) is a function of these, the settings and the step's number.

        It returns with everything copied to the system's file cache, and a thread waits for the disk. There is one checkpoint
        under way at most.

        Raises:
            OSError: the disk is full, or was when what was kept before was written to it.
        """
        if self._checkpoint is not None:
            self._checkpoint.result()
        folder = self.folder / "checkpoints" / f"{step:06d}"
        new = _beside(folder)
        new.mkdir()
        policy.save(new)
        learner.save(new)
        if behaviour:
            save_file({name: tensor.contiguous() for name, tensor in behaviour.items()}, new / BEHAVIOUR_FILE)
        (new / STATE_FILE).write_text(json.dumps(dict(state)))
        self._checkpoint = self._later(self._finish_checkpoint, new, folder)
        return folder

    def _finish_checkpoint(self, new: Path, folder: Path) -> None:
        (new / SUMS_FILE).write_text(json.dumps(checksums(new), indent=1))
        _put_in_place(new, folder)
        for old in checkpoints(self.folder)[:-2]:
            shutil.rmtree(old)

    def _later(self, write: Callable[..., None], *arguments: Path) -> Future[None]:
        """Have the thread do this after all it was given before; raise what went wrong with that."""
        for done in [future for future in self._under_way if future.done()]:
            self._under_way.remove(done)
            done.result()
        self._under_way.append(self._disk.submit(write, *arguments))
        return self._under_way[-1]

    def forget_after(self, step: int) -> None:
        """Drop what was logged after ``step``, to be done again from its checkpoint."""
        for path in (self.folder / "metrics.jsonl", self.folder / ALARMS_FILE):
            if path.exists():
                # A line without its newline was being written when the run was killed.
                lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
                _write_text(path, "".join(line for line in lines if json.loads(line)["step"] <= step))
        for rollout in (self.folder / "rollouts").glob("*.jsonl.gz"):
            if int(rollout.name.split(".")[0]) > step:
                rollout.unlink()
        for damaged in checkpoints(self.folder):
            if int(damaged.name) > step:
                shutil.rmtree(damaged)
        self._first_step = step + 1

    def save_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep ``content`` as a file of the run."""
        _write_text(self.folder / name, to_json(content, indent=2))

    def close(self) -> None:
        """Wait until all is on disk.

        Raises:
            OSError: some of it could not be written.
        """
        if self._boards is not None:
            self._boards.close()
        self._disk.shutdown()
        self._lock.close()
        for done in self._under_way:
            done.result()


def check_run_folder(folder: str | Path, *, resume: bool = False) -> None:
    """Refuse, before anything slow starts, a folder that a run cannot live in.

    Raises:
        ValueError: it holds another run (or, to resume, none).
        OSError: it cannot be written, or the disk is full.
    """
    folder = Path(folder)
    held = folder / "config.json"
    if resume and not (held.exists() and "agent" in read_config(folder)):
        raise ValueError(f"no run to resume in {folder}; give the folder that a run printed as its own")
    there = {path.name for path in folder.iterdir()} - {LOCK_FILE} if folder.exists() else set()
    if not resume and there and not _never_started(folder):
        what = "another run" if held.exists() else "other files"
        raise ValueError(f"{folder} holds {what}; choose another --run-dir, or go on with it by --resume")
    lock(folder).close()
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        raise OSError(
            f"only {free // 2**20} MiB free on the disk of {folder}; a run needs at least 64, so free some first"
        )


def lock(folder: Path) -> IO[str]:
    """Hold a run's folder, which is made if need be, until what is returned is closed, or this process ends, however it does.

    Raises:
        OSError: another process holds it; or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK_FILE).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise OSError(f"another training is at work in {folder}; wait for it, or choose another --run-dir") from None
    return file


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config of the run in ``folder``."""
    return json.loads((Path(folder) / "config.json").read_text())


def to_json(content: Any, indent: int | None = None) -> str:
    """``content`` as JSON; numbers and arrays of numpy as plain ones, and a reference of any other type as its repr."""
    return json.dumps(content, indent=indent, default=_plain)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else repr(value)


def episode_rows(trajectories: Trajectories) -> Iterator[dict[str, Any]]:
    """The episodes of a rollout as plain data, tokens and their credit included.

    What learning noted of the tokens stands beside them, to four decimals, 0 where a token was not sampled; a row that it did
    not look at is without.
    """
    per_token = {
        "tokens": trajectories.tokens_BT,
        "source": trajectories.source_BT,
        "logp": trajectories.logp_BT,
        "reward": trajectories.reward_BT,
    }
    listed = {name: x_BT.tolist() for name, x_BT in per_token.items()}
    sampled_BT = trajectories.sampled_BT
    noted = {name: _rounded(x_BT, sampled_BT) for name, x_BT in trajectories.noted.items()}
    seen = {name: (~x_BT.isnan() & sampled_BT).any(dim=1).tolist() for name, x_BT in trajectories.noted.items()}
    returns, groups, lengths = (
        x.tolist() for x in (trajectories.return_B, trajectories.group_B, trajectories.length_B)
    )
    for i, score in enumerate(trajectories.scores):
        yield {
            "group": groups[i],
            "prompt": trajectories.prompts[i],
            "completions": trajectories.completions[i],
            "reference": trajectories.references[i],
            "value": score.value,
            "return": None if score.value is None else returns[i],
            "parts": dict(score.parts),
            "error": score.error,
            "verdict": dict(score.info),
            "finish": Finish(trajectories.finish_B[i]).label,
            **({} if score.tokens is None else {"credit": list(score.tokens)}),
            **{name: rows[i][: lengths[i]] for name, rows in listed.items()},
            **{name: rows[i][: lengths[i]] for name, rows in noted.items() if seen[name][i]},
        }


def _rounded(x_BT: Tensor, sampled_BT: Tensor) -> list[list[float]]:
    """Short decimals, as the figures are to be looked at, and finite ones, as JSON knows no others."""
    finite_BT = torch.nan_to_num(torch.where(sampled_BT, x_BT, 0.0).double(), posinf=1e6, neginf=-1e6)
    return finite_BT.round(decimals=4).tolist()


def _never_started(folder: Path) -> bool:
    """Whether a run there ended before its first step was kept, so that nothing is lost by starting anew."""
    early = {"config.json", "config.json.new", "rollouts", "checkpoints", "evaluation_before.json", LOCK_FILE, *BOARDS}
    kept = [*folder.glob("rollouts/*"), *folder.glob("checkpoints/*")]
    return (folder / "rollouts").is_dir() and {path.name for path in folder.iterdir()} <= early and not kept


def _check_same(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if there["schema"] != SCHEMA:
        raise ValueError(f"the run was written with schema {there['schema']}, this version reads {SCHEMA}")
    # A setting that the run does not know of is younger than it.
    known = {name: value for name, value in wanted["settings"].items() if name in there["settings"]}
    for part, asked in (("agent", wanted["agent"]), ("env", wanted["env"]), ("settings", known)):
        if there[part] != asked:
            raise ValueError(
                f"the run to resume has {part} {there[part]!r}, but {asked!r} was asked for; "
                "resume it with the settings it was started with"
            )


def _write_text(path: Path, text: str) -> None:
    with _replacing(path) as new:
        new.write_text(text)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to beside ``path``, put in its place once it is whole and on disk."""
    new = _beside(path)
    yield new
    _put_in_place(new, path)


def _beside(path: Path) -> Path:
    """Where to write what is to be ``path``; nothing is there."""
    new = path.with_name(path.name + ".new")
    if new.is_dir():
        shutil.rmtree(new)
    return new


def _put_in_place(new: Path, path: Path) -> None:
    """Rename a file or folder once it is on disk."""
    for written in [new] if new.is_file() else new.iterdir():
        descriptor = os.open(written, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    os.replace(new, path)
