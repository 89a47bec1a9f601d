"""Rewards: what an episode is worth. The lowest floor; it imports none of the others."""

from rewards.compose import Gate, WeightedSum
from rewards.contract import FunctionReward, Reward, RewardError, Sample, Score, score_samples, ungraded
from rewards.registry import as_reward, make, names, register, reward

__all__ = [
    "FunctionReward",
    "Gate",
    "Reward",
    "RewardError",
    "Sample",
    "Score",
    "WeightedSum",
    "as_reward",
    "make",
    "names",
    "register",
    "reward",
    "score_samples",
    "ungraded",
]
