"""The frame around an agent's loop: steps, metrics, checkpoints, evaluation before and after."""

from __future__ import annotations

import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from itertools import count
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch

from agents.core.doctor import Doctor
from agents.core.evaluate import Evaluation
from agents.core.memory import foresee
from agents.core.monitors import Monitor, flags_of
from agents.core.progress import LiveLine
from agents.core.records import read_json
from agents.core.run import Run
from agents.core.trajectories import Trajectories
from agents.core.usage import memory_peak_mb, peak_flops
from textenv.cli import imported

if TYPE_CHECKING:
    from agents.core.agent import Agent


Callback = Callable[["Training"], bool | None]
"""Called after every step; training stops when it returns False. What a :class:`~agents.core.monitors.Monitor` measures is
logged with the step."""


PARTS = ("generate", "score", "prepare", "forward", "backward", "optimise", "sync", "log")
"""Where the time of a step goes."""


class Training:
    """Counts the steps of one run, and keeps what they leave.

    Used by an agent's loop::

        with self.training(total_episodes, episodes_per_step, callback) as training:
            for step in training:
                ...
                training.log(batch, metrics)

    Each step has its learning rate set; each logged step is kept, and on disk by the end. ``step`` counts the logged steps,
    ``episodes`` the episodes that they played; ``before`` and ``after`` hold the evaluations.

    Ctrl-C and SIGTERM let the step under way finish, and leave a checkpoint. Then the one is raised as KeyboardInterrupt, the
    other as SystemExit.
    """

    def __init__(self, agent: Agent, total_episodes: int, callback: Callback | None) -> None:
        self.agent, self.total_episodes, self.callback = agent, total_episodes, callback
        self.step = self._saved = agent.start
        self.metrics: dict[str, float] = {}
        """of the last step"""
        self.stopped: str | None = None
        """why training ended before its time"""
        self.before: Evaluation | None = None
        self.after: Evaluation | None = None
        self.seconds = 0.0
        self.taught = False
        """whether any step changed the weights"""
        config = agent.config
        folder = config.run_dir or default_run_dir(agent.name, agent.env_id)
        described = {**describe(agent), "total_episodes": total_episodes, "monitors": flags_of(callback)}
        self.run = Run(folder, described, resume=agent.resumed, keep=config.keep)
        self.doctor = Doctor(self)
        self._line = LiveLine(agent.name, total_episodes)
        self._signal: signal.Signals | None = None
        """that asked for the end"""
        self._handlers: dict[int, Any] = {}
        """of signals, from before"""
        self._log_seconds = 0.0
        """that the step before took to be written"""
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        self._peak_flops = peak_flops(agent.policy.device, dtype)

    def __enter__(self) -> Training:
        try:
            self._begin()
        except BaseException:
            self.run.close(patient=False)
            raise
        self._started = time.monotonic()
        self._listen()
        self._line.__enter__()
        return self

    def _begin(self) -> None:
        self.run.forget_after(self.agent.start)
        print(f"the run is in {self.run.folder}", flush=True)
        rows = self.agent.config.prompts_per_step * getattr(self.agent.config, "group_size", 1)
        if (plan := self.agent.engine.plan(rows, self.agent.task.max_tokens)) is not None:
            print(plan, flush=True)
        self.forecast = foresee(self.agent)
        if isinstance(self.callback, Monitor):
            self.callback.start(self)
        self.before = self._evaluate_once("before")

    def _listen(self) -> None:
        """Let Ctrl-C and SIGTERM end the training after the step under way; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            return  # where Python takes no signals

        def finish_step(number: int, frame: FrameType | None) -> None:
            if self._signal is not None:
                raise KeyboardInterrupt
            self._signal = signal.Signals(number)
            print(f"\n{self._signal.name}: finishing the step under way; once more stops at once", flush=True)

        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, finish_step)

    def __iter__(self) -> Iterator[int]:
        config = self.agent.config
        while self.episodes < self.total_episodes and self.stopped is None and not self.agent.state.get("stopped"):
            rate = config.learning_rate_at(self.step, self.episodes / self.total_episodes)
            self.agent.learner.set_learning_rate(rate)
            self.agent.clock.take()  # of evaluations since the last step
            self._step_started = time.perf_counter()
            yield self.step
            if self._signal is not None:
                break
        if self.step > self._saved:
            self._save_checkpoint()
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is not None:
            raise SystemExit(128 + self._signal)

    @property
    def episodes(self) -> int:
        return int(self.agent.state["episodes"])

    def stop(self, why: str) -> None:
        """End the training with this step, for good: to resume it takes no further one. To be called before :meth:`log`."""
        self.stopped = why
        self.agent.state["stopped"] = 1

    def log(self, batch: Trajectories, metrics: Mapping[str, float]) -> None:
        """Close a step: show it, keep its metrics and episodes, and leave a checkpoint if one is due."""
        used = self._usage(batch)
        self.step += 1
        self.agent.state["episodes"] += len(batch)
        self.metrics = {**metrics, "episodes": self.episodes, **used}
        if isinstance(self.callback, Monitor):
            self.metrics |= self.callback.measure(self, batch)
        self.taught |= "grad_norm" in metrics
        started = time.perf_counter()
        self.doctor.look(batch)
        self.run.log(self.step, self.metrics)
        self.run.log_rollout(self.step, batch)
        self._line.update(self.episodes, self.metrics)
        if self.step % self.agent.config.checkpoint_every == 0:
            self._save_checkpoint()
        self._log_seconds = time.perf_counter() - started
        if self.callback is not None and self.callback(self) is False:
            self.stopped = "the callback asked for it"

    def _usage(self, batch: Trajectories) -> dict[str, float]:
        """Where the time of the step under way went, and how well it was used."""
        agent = self.agent
        seconds = time.perf_counter() - self._step_started + self._log_seconds
        parts = dict.fromkeys(PARTS, 0.0) | agent.clock.take() | {"log": self._log_seconds}
        parts["prepare"] = seconds - sum(parts.values())  # all that no other part has timed
        flops, agent.flops = agent.flops, 0.0
        learned = parts["forward"] + parts["backward"]
        return {
            "seconds": seconds,
            "tokens_per_second": int(batch.sampled_BT.sum()) / seconds,
            **{f"time_{part}": took for part, took in parts.items()},
            "memory_peak_mb": memory_peak_mb(agent.policy.device),
            "mfu": flops / learned / self._peak_flops if learned else 0.0,
        }

    def _save_checkpoint(self) -> None:
        self._saved = self.step
        agent = self.agent
        reward_state, behaviour = agent.next_batch_state()
        state = {**agent.state, "reward": reward_state}
        self.run.save_checkpoint(self.step, agent.policy, agent.learner, state, behaviour)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._line.__exit__(kind, error, trace)
        self.seconds = time.monotonic() - self._started
        if isinstance(error, FloatingPointError):
            self.doctor.look_at_error()
        if error is not None:
            print(f"stopped after step {self.step}; go on with: textenv train --resume {self.run.folder}")
        self.run.close(patient=error is None)
        if error is None:
            peak = memory_peak_mb(self.agent.policy.device)
            print(f"memory: {peak:,.0f} MiB at the peak, {self.forecast.peak / 2**20:,.0f} predicted")
            if self.stopped is not None:
                print(f"training stopped after step {self.step}: {self.stopped}")
            if self.agent.start < self.step:  # an evaluation from before these steps is out of date
                (self.run.folder / "evaluation_after.json").unlink(missing_ok=True)
            self.after = self._evaluate_once("after")

    def _evaluate_once(self, moment: str) -> Evaluation:
        """The evaluation before or after training; a resumed run reads the one it made then."""
        path = self.run.folder / f"evaluation_{moment}.json"
        if path.exists():
            return Evaluation(**read_json(path))
        evaluation = self.agent.evaluate()
        self.run.save_json(path.name, asdict(evaluation))
        return evaluation


def default_run_dir(agent: str, env_id: str) -> Path:
    """A folder that nobody has used: ``runs/AGENT-ENVIRONMENT-TIME``."""
    name = f"{agent}-{env_id.replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    folders = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in count(1))
    return next(folder for folder in folders if not folder.exists())


def describe(agent: Agent) -> dict[str, Any]:
    """What a run is, for its ``config.json``."""
    packages = ("textenv", "torch", "transformers", "gymnasium", "numpy")
    return {
        "agent": agent.name,
        "imports": list(imported),
        "env": agent.env_id,
        "settings": {name: value for name, value in asdict(agent.config).items() if name != "run_dir"},
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "device": str(agent.policy.device),
        "parameters": sum(parameter.numel() for parameter in agent.policy.parameters()),
    }
