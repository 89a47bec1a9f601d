"""Supervised fine-tuning on what a task demonstrates, or on the answers of a dataset."""

from agents.sft.sft import SFT, SFTConfig, sft_step

__all__ = ["SFT", "SFTConfig", "sft_step"]
