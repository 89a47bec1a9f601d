"""RAFT, RAFT++ and Reinforce-Rej: learning from the accepted samples alone."""

from agents.raft.raft import RAFT, RAFTConfig

__all__ = ["RAFT", "RAFTConfig"]
