"""Rewards from a model that judges, behind any OpenAI-compatible server."""

from rewards.judge.client import Chat, Reply, Request
from rewards.judge.pairwise import Comparison, GroupJudge, Pair, PairwiseJudge, bradley_terry
from rewards.judge.pointwise import Judge

__all__ = [
    "Chat",
    "Comparison",
    "GroupJudge",
    "Judge",
    "Pair",
    "PairwiseJudge",
    "Reply",
    "Request",
    "bradley_terry",
]
