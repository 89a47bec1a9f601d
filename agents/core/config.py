"""Settings that every agent shares. An agent's own config adds what its algorithm needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from agents.core.doctor import check_alarms

TINY = "tiny"


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What is trained, on what, and how a run is kept. A setting means the same for every agent.

    Raises:
        ValueError: a value out of its range.
    """

    model: str = TINY
    """A transformers folder, a hub name, or "tiny": a model of a million parameters made on the spot."""
    env_options: Annotated[dict[str, str], tyro.conf.arg(metavar="NAME VALUE ...")] = field(default_factory=dict)
    """Options of the environment, e.g. digits 3 operators +-."""
    reward: str | None = None
    """What scores the episodes; default the task's own reward."""
    max_new_tokens: int | None = None
    """Budget of one completion in tokens, the end token included; default the task's own."""
    max_tokens: int | None = None
    """Size of the context in tokens, prompt and replies included; default the task's own."""
    seed: int = 0
    """Of problems, sampling and the tiny model's weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; "auto" takes a GPU when there is one."""
    engine: str = "native"
    """What generates: "native", "vllm" or "vllm_server", which options may follow: "native dtype bfloat16 max_rows 64"."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the learner computes in; its weights and its optimiser stay in float32."""
    save_memory: Literal["no", "recompute", "offload"] = "no"
    """Learn with less memory and more time: compute activations again for the gradient, or keep the optimiser's state on the
    CPU as well."""

    max_ungraded: float = 0.5
    """Largest share of a rollout's episodes that the reward may leave ungraded before the run stops."""

    total_episodes: int = 100_000
    """Training ends after this many episodes, rounded up to whole steps."""
    prompts_per_step: int = 32
    """Problems a step."""
    lora_rank: int = 0
    """Train low-rank adapters of this rank on all linear layers instead of the weights; 0 trains the weights."""
    learning_rate: float | None = None
    """Of Adam; default 3e-4 for the tiny model, 1e-6 for others."""
    learning_rate_decay: Literal["linear", "constant"] = "linear"
    """Lower the learning rate to 0 at the end, or keep it."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled from the gradient."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to this."""
    tokens_per_microbatch: int = 16_384
    """Most tokens, padding included, that go through the model at once while learning. Changes memory, not results."""

    eval_episodes: int = 512
    """Held-out problems played before and after training."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step always leaves one."""
    keep: int = 2
    """Checkpoints that stay, the newest ones. More than one, so that there is another where the newest is damaged."""
    run_dir: str | None = None
    """Where the run is kept; default runs/AGENT-ENVIRONMENT-TIME."""
    on_alarm: Literal["warn", "stop"] = "warn"
    """What follows when a rule of agents/core/doctor.py finds something wrong: a warning, or also the end of the training with
    that step."""
    alarms: Annotated[dict[str, float], tyro.conf.arg(metavar="RULE THRESHOLD ...")] = field(default_factory=dict)
    """Thresholds of these rules, e.g. cut_answers 0.5 length inf; inf turns one off."""

    def __post_init__(self) -> None:
        for name in (
            "total_episodes",
            "prompts_per_step",
            "tokens_per_microbatch",
            "eval_episodes",
            "checkpoint_every",
            "keep",
        ):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("warmup_steps", "weight_decay", "seed", "lora_rank"):
            require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        require(self.seed < 2**32, "seed", "below 2**32", self.seed)
        require(0 <= self.max_ungraded < 1, "max_ungraded", "from 0 to below 1", self.max_ungraded)
        check_alarms(self.alarms)
        require(self.max_grad_norm > 0, "max_grad_norm", "more than 0", self.max_grad_norm)
        require(self.learning_rate is None or self.learning_rate >= 0, "learning_rate", "0 or more", self.learning_rate)

    @property
    def base_learning_rate(self) -> float:
        """The learning rate after the warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 3e-4 if self.model == TINY else 1e-6

    def learning_rate_at(self, step: int, done: float) -> float:
        """The learning rate of step ``step``, counted from 0, when a share ``done`` of the training lies behind it."""
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        fall = 1 - done if self.learning_rate_decay == "linear" else 1.0
        return self.base_learning_rate * rise * fall


def require(condition: bool, name: str, wanted: str, got: Any) -> None:
    """Refuse a setting.

    Raises:
        ValueError: ``condition`` is false.
    """
    if not condition:
        raise ValueError(f"{name} must be {wanted}, got {got}")
