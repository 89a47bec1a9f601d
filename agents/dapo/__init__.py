"""DAPO: decoupled clip and dynamic sampling policy optimisation."""

from agents.dapo.dapo import DAPO, DAPOConfig

__all__ = ["DAPO", "DAPOConfig"]
