"""PPO on the token-level environment, with a critic."""

from agents.ppo.ppo import PPO, PPOConfig

__all__ = ["PPO", "PPOConfig"]
