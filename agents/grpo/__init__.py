"""Group Relative Policy Optimisation: sample a group of completions a problem, raise those above the group's mean."""

from agents.grpo.grpo import GRPO, GRPOConfig

__all__ = ["GRPO", "GRPOConfig"]
