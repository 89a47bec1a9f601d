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
renamed into it once it is on disk. A thread writes rollouts and checkpoints, in the order in which they were kept. While the
disk is full, training waits.
"""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from agents.core.boards import ID_FILE, Boards
from agents.core.doctor import ALARMS_FILE
from agents.core.learner import Learner
from agents.core.policy import Policy, copied
from agents.core.records import LOCK_FILE, METRICS_FILE, SCHEMA, read_config, read_lines
from agents.core.sources import SUMS_FILE, checkpoints, checksums
from agents.core.trajectories import Trajectories
from textenv.task import Finish

LABELS = {int(finish): finish.label for finish in Finish}
BOARDS = ("tensorboard", "wandb", ID_FILE)
STATE_FILE = "state.json"
BEHAVIOUR_FILE = "behaviour.safetensors"
"""In a checkpoint, the weights that the batch of the next step is sampled with, where they are not the policy's."""
GOING = ".old"
"""Ends the name of a checkpoint that is being deleted."""
MIN_FREE_BYTES = 64 * 2**20
"""That a disk must have to be no full one, beside what a checkpoint takes."""
FULL = (errno.ENOSPC, errno.EDQUOT)
LOOKS_EVERY = 5.0
"""Seconds between two looks at a full disk."""
MOST_PENDING = 8
"""Files that may wait for the disk; then training waits for it too."""


class Run:
    """The directory of one run.

    Args:
        folder: where it lies; made if need be.
        config: what is run, as plain data.
        resume: go on with the run that is there.
        keep: how many checkpoints stay, the newest ones.

    Raises:
        ValueError: the folder holds another run, or no run to resume; a config that differs from the one to resume.
        OSError: the disk is full or the folder cannot be written.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any], *, resume: bool = False, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep
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
        """writes, while training goes on"""
        self._under_way: list[Future[None]] = []
        self._checkpoint: Future[None] | None = None
        self._checkpoint_bytes = 0
        """that the newest takes"""
        self._impatient = threading.Event()
        """set, nobody waits for room on a full disk"""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a step's metrics. A value that is not a number is kept as null."""
        line = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.append(METRICS_FILE, {"step": step, **line})
        if self._boards is None:
            self._boards = Boards(self.folder, self.config, self._first_step)
        self._boards.log(step, metrics)

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a JSON line to one of the run's files."""
        self._patiently(_append, self.folder / name, f"{json.dumps(row)}\n".encode())

    def log_rollout(self, step: int, trajectories: Trajectories) -> None:
        """Keep the episodes of a step, a JSON line each.

        A thread packs and writes them. It makes no lines, for which it would hold up whatever else computes in Python.

        Raises:
            OSError: what was kept before could not be written.
        """
        lines = b"".join(map(to_line, episode_rows(trajectories)))
        self._later(_write_rollout, self.folder / "rollouts" / f"{step:06d}.jsonl.gz", lines)

    def save_checkpoint(
        self,
        step: int,
        policy: Policy,
        learner: Learner,
        state: Mapping[str, Any],
        behaviour: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Save all that the run needs to go on as if it had never stopped. Only the newest ``keep`` stay.

        ``state`` are the numbers that grow from step to step, and those of the reward; ``behaviour`` the weights that the next
        batch is sampled with, where they are not the policy's. All else that a step depends on (problems, sampling, learning
        rate) is a function of these, the settings and the step's number.

        It returns with everything copied to the CPU's memory, and a thread writes it. There is one checkpoint under way at
        most.

        Raises:
            OSError: what was kept before could not be written.
        """
        if self._checkpoint is not None:
            self._checkpoint.result()
        folder = self.folder / "checkpoints" / f"{step:06d}"
        files = {**learner.files(), BEHAVIOUR_FILE: behaviour or {}}
        copies = {name: copied(tensors) for name, tensors in files.items() if tensors}
        tensors = [*policy.parameters(), *(tensor for file in copies.values() for tensor in file.values())]
        self._checkpoint_bytes = sum(tensor.nbytes for tensor in tensors)
        text = json.dumps(dict(state))
        self._checkpoint = self._later(self._write_checkpoint, folder, policy.snapshot(), copies, text)
        return folder

    def _write_checkpoint(
        self, folder: Path, policy: Callable[[Path], None], files: Mapping[str, dict[str, Tensor]], state: str
    ) -> None:
        new = _beside(folder)
        new.mkdir()
        try:
            policy(new)
            for name, tensors in files.items():
                save_file(tensors, new / name)
        except SafetensorError as error:
            raise _system_error(error) from error
        (new / STATE_FILE).write_text(state)
        (new / SUMS_FILE).write_text(json.dumps(checksums(new), indent=1))
        for path in self._grown():  # no checkpoint outlives a power cut without the lines from before it
            _to_disk(path)
        _put_in_place(new, folder)
        self._rotate()

    def _rotate(self) -> None:
        for old in checkpoints(self.folder)[: -self.keep]:
            _remove(old)

    def _later(self, write: Callable[..., None], *arguments: Any) -> Future[None]:
        """Have the thread do this after all it was given before; raise what went wrong with that."""
        while self._under_way and (self._under_way[0].done() or len(self._under_way) >= MOST_PENDING):
            self._under_way.pop(0).result()
        self._under_way.append(self._disk.submit(self._patiently, write, *arguments))
        return self._under_way[-1]

    def _patiently(self, write: Callable[..., None], *arguments: Any) -> None:
        """Do this; on a full disk once there is room, from its beginning.

        Raises:
            OSError: it cannot be done; or the disk is full, and the run is to end.
        """
        told = False
        while True:
            try:
                self._check_room()
                write(*arguments)
            except OSError as error:
                if error.errno not in FULL or self._impatient.is_set():
                    raise
                if not told:
                    told = True
                    print(
                        f"\nthe disk of {self.folder} is full: {error.strerror}. Training waits until there is room, and looks "
                        f"every {LOOKS_EVERY:g} s; all that was kept is whole",
                        flush=True,
                    )
                self._impatient.wait(LOOKS_EVERY)
            else:
                break
        if told:
            print(f"\nthere is room again on the disk of {self.folder}: training goes on", flush=True)

    def _check_room(self) -> None:
        wanted, free = MIN_FREE_BYTES + self._checkpoint_bytes, shutil.disk_usage(self.folder).free
        if free < wanted:
            raise OSError(errno.ENOSPC, f"{free // 2**20} MiB are free, and a run wants {math.ceil(wanted / 2**20)}")

    def forget_after(self, step: int) -> None:
        """Drop what was logged after ``step``, to be done again from its checkpoint."""
        for path in self._grown():
            rows = [row for row in read_lines(path) if row["step"] <= step]
            if path.name == METRICS_FILE and (lost := set(range(1, step + 1)) - {row["step"] for row in rows}):
                print(
                    f"{path} lacks steps from before the checkpoint, {_ranges(lost)}: it was damaged since", flush=True
                )
            _write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        for rollout in (self.folder / "rollouts").glob("*.jsonl.gz"):
            if int(rollout.name.split(".")[0]) > step:
                rollout.unlink()
        for damaged in checkpoints(self.folder):
            if int(damaged.name) > step:
                _remove(damaged)
        self._rotate()
        for left in [*self.folder.glob("*/*.new"), *self.folder.glob(f"*/*{GOING}")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        self._first_step = step + 1

    def _grown(self) -> list[Path]:
        """The files that grow by lines."""
        return [path for name in (METRICS_FILE, ALARMS_FILE) if (path := self.folder / name).exists()]

    def save_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep ``content`` as a file of the run."""
        self._patiently(_write_text, self.folder / name, to_json(content, indent=2))

    def close(self, *, patient: bool = True) -> None:
        """Wait until all is on disk; not ``patient``, for no room on it.

        Raises:
            OSError: some of it could not be written.
        """
        if not patient:
            self._impatient.set()
        if self._boards is not None:
            self._boards.close()
        self._disk.shutdown()
        self._lock.close()
        for done in self._under_way:
            done.result()


def check_run_folder(folder: str | Path, *, resume: bool = False) -> None:
    """Refuse, before anything slow starts, a folder that a run cannot live in.

    Raises:
        ValueError: it holds another run (or, to resume, none that this version reads).
        OSError: it cannot be written, or the disk is full.
    """
    folder = Path(folder)
    if resume:
        read_config(folder)
    there = {path.name for path in folder.iterdir()} - {LOCK_FILE} if folder.exists() else set()
    if not resume and there and not _never_started(folder):
        what = "another run" if (folder / "config.json").exists() else "other files"
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


def to_json(content: Any, indent: int | None = None) -> str:
    """``content`` as JSON; numbers and arrays of numpy as plain ones, and a reference of any other type as its repr."""
    return json.dumps(content, indent=indent, default=_plain)


def to_line(row: Mapping[str, Any]) -> bytes:
    """``row`` as a line of JSON, as :func:`to_json`; float32 numbers are as short as tells them apart."""
    try:
        return orjson.dumps(row, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:  # an integer of over 64 bits, half of a character, a key that is no text
        return f"{to_json(row)}\n".encode()


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else repr(value)


def episode_rows(trajectories: Trajectories) -> Iterator[dict[str, Any]]:
    """The episodes of a rollout as plain data, but for arrays of log-probabilities; tokens and their credit included.

    What learning noted of the tokens stands beside them, to four decimals, 0 where a token was not sampled; a row that it did
    not look at is without.
    """
    tokens, source, reward = (
        x_BT.tolist() for x_BT in (trajectories.tokens_BT, trajectories.source_BT, trajectories.reward_BT)
    )
    logp = list(trajectories.logp_BT.cpu().numpy())  # in float32, which takes fewer digits
    sampled_BT = trajectories.sampled_BT.cpu().numpy()
    noted: list[tuple[str, list[list[float]], list[bool]]] = []
    if trajectories.noted:
        x_KBT = torch.stack(list(trajectories.noted.values())).cpu().numpy()
        seen_KB = (~np.isnan(x_KBT) & sampled_BT).any(axis=2).tolist()
        noted = list(zip(trajectories.noted, _rounded(x_KBT, sampled_BT).tolist(), seen_KB, strict=True))
    returns, groups, lengths = (
        x.tolist() for x in (trajectories.return_B, trajectories.group_B, trajectories.length_B)
    )
    for i, (score, length, finish) in enumerate(
        zip(trajectories.scores, lengths, trajectories.finish_B.tolist(), strict=True)
    ):
        row = {
            "group": groups[i],
            "prompt": trajectories.prompts[i],
            "completions": trajectories.completions[i],
            "reference": trajectories.references[i],
            "value": score.value,
            "return": None if score.value is None else returns[i],
            "parts": dict(score.parts),
            "error": score.error,
            "verdict": dict(score.info),
            "finish": LABELS[finish],
        }
        if score.tokens is not None:
            row["credit"] = list(score.tokens)
        row["tokens"], row["source"] = tokens[i][:length], source[i][:length]
        row["logp"], row["reward"] = logp[i][:length], reward[i][:length]
        for name, x_B, seen_B in noted:
            if seen_B[i]:
                row[name] = x_B[i][:length]
        yield row


def _rounded(x_KBT: np.ndarray, sampled_BT: np.ndarray) -> np.ndarray:
    """Short decimals, as the figures are to be looked at, and finite ones, as JSON knows no others."""
    finite_KBT = np.nan_to_num(np.where(sampled_BT, x_KBT, 0.0), nan=0.0, posinf=1e6, neginf=-1e6)
    return finite_KBT.astype(np.float64).round(4)


def _never_started(folder: Path) -> bool:
    """Whether a run there ended before its first step was kept, so that nothing is lost by starting anew."""
    early = {"config.json", "config.json.new", "rollouts", "checkpoints", "evaluation_before.json", LOCK_FILE, *BOARDS}
    kept = [*folder.glob("rollouts/*"), *folder.glob("checkpoints/*")]
    return (folder / "rollouts").is_dir() and {path.name for path in folder.iterdir()} <= early and not kept


def _check_same(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    # A setting that the run does not know of is younger than it.
    known = {name: value for name, value in wanted["settings"].items() if name in there["settings"]}
    for part, asked in (("agent", wanted["agent"]), ("env", wanted["env"]), ("settings", known)):
        if there[part] != asked:
            raise ValueError(
                f"the run to resume has {part} {there[part]!r}, but {asked!r} was asked for; "
                "resume it with the settings it was started with"
            )


def _append(path: Path, line: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            while line:  # on a disk that fills up, what fits is written first
                line = line[file.write(line) :]
        except OSError:
            file.truncate(before)
            raise


def _system_error(error: SafetensorError) -> OSError:
    """What the system said, which safetensors tells in words alone: ``… (os error 28)``."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(str(error)) if told is None else OSError(int(told[1]), os.strerror(int(told[1])))


def _write_rollout(path: Path, lines: bytes) -> None:
    new = _beside(path)
    new.write_bytes(gzip.compress(lines, compresslevel=1, mtime=0))
    _put_in_place(new, path)


def _write_text(path: Path, text: str) -> None:
    new = _beside(path)
    new.write_text(text)
    _put_in_place(new, path)


def _beside(path: Path) -> Path:
    """Where to write what is to be ``path``; nothing is there."""
    new = path.with_name(path.name + ".new")
    if new.is_dir():
        shutil.rmtree(new)
    return new


def _remove(checkpoint: Path) -> None:
    """Delete it at once: half of one would pass for a whole one from before there were checksums."""
    going = checkpoint.with_name(checkpoint.name + GOING)
    os.replace(checkpoint, going)
    shutil.rmtree(going)


def _put_in_place(new: Path, path: Path) -> None:
    """Rename a file or folder once it is on disk."""
    for written in [new] if new.is_file() else new.iterdir():
        _to_disk(written)
    os.replace(new, path)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _ranges(steps: set[int]) -> str:
    """Steps as the runs of neighbours that they are.

    Example:
        >>> _ranges({1, 5, 6, 7})
        '1, 5 to 7'
    """
    firsts = sorted(step for step in steps if step - 1 not in steps)
    lasts = sorted(step for step in steps if step + 1 not in steps)
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in zip(firsts, lasts, strict=True))
