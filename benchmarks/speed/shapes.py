"""Models of given shapes with fresh weights, and batches for them. What they write never ends, so that lengths are ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from agents.core.policy import Policy
from agents.core.trajectories import Trajectories
from rewards import Score
from textenv.episodes import Source
from textenv.task import Finish
from textenv.tokenizer import CHARACTERS, CharTokenizer

FURTHER_CHARACTERS = 0x10000
"""Code point from which large vocabularies go on."""


@dataclass(frozen=True)
class Shape:
    """A Llama.

    Attributes:
        name: for tables, after its number of parameters.
        kv_heads: heads of keys and values; 0 for as many as ``heads``.
        tied: the output head is the embedding.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab: int
    kv_heads: int = 0
    tied: bool = False
    context: int = 2048

    @property
    def kv_width(self) -> int:
        """Numbers that a token leaves in the keys of a layer."""
        return self.hidden // self.heads * (self.kv_heads or self.heads)

    @property
    def layer_weights(self) -> int:
        """Entries of all matrices of all layers."""
        attention = 2 * self.hidden * (self.hidden + self.kv_width)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Entries of the output head."""
        return self.vocab * self.hidden

    def token_flops(self, context: float) -> float:
        """Of writing one token after ``context`` tokens, itself included: a multiplication and an addition for every weight
        of layers and head, and the same for every entry of keys and values that each of its heads attends to."""
        return 2 * (self.layer_weights + self.head_weights) + 4 * self.layers * self.hidden * context

    def update_flops(self, length_B: np.ndarray, scored_B: np.ndarray) -> float:
        """Of forward and backward, three times the forward, over rows of ``length_B`` tokens, whose last ``scored_B`` go
        through the head."""
        attention = 2 * self.layers * self.hidden * (length_B.astype(float) ** 2).sum()
        return float(3 * (2 * self.layer_weights * length_B.sum() + 2 * self.head_weights * scored_B.sum() + attention))

    def weight_bytes(self, itemsize: int) -> int:
        """What a step of a batch has to read of the weights."""
        return (self.layer_weights + self.head_weights) * itemsize

    def cache_bytes(self, itemsize: int) -> int:
        """What one token of context adds to the keys and values."""
        return 2 * self.layers * self.kv_width * itemsize

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or self.heads,
            tie_word_embeddings=self.tied,
            max_position_embeddings=self.context,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=None,
        )

    def policy(self, device: str = "cpu", dtype: torch.dtype = torch.float32, *, endless: bool = True) -> Policy:
        """A policy with fresh weights; if ``endless`` it gives no chance to the end token."""
        torch.manual_seed(0)
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(self.config(), dtype=dtype, attn_implementation="sdpa")
        tokenizer = tokenizer_of(self.vocab)
        if endless:
            tokenizer.decodable_V[list(tokenizer.eos_ids)] = False
        return Policy(model, tokenizer)


def tokenizer_of(vocab: int) -> CharTokenizer:
    """A character tokenizer of that many ids."""
    further = range(FURTHER_CHARACTERS, FURTHER_CHARACTERS + vocab - 1 - len(CHARACTERS))
    return CharTokenizer((CHARACTERS + "".join(map(chr, further)))[: vocab - 1])


TOY = Shape("toy", hidden=64, layers=1, heads=2, intermediate=64, vocab=97, context=256)
SMALL = Shape("0.8M", hidden=128, layers=4, heads=4, intermediate=352, vocab=97)
MIDDLE = Shape("15M", hidden=384, layers=6, heads=6, intermediate=1024, vocab=6144)
LARGE = Shape("124M", hidden=768, layers=12, heads=12, intermediate=2048, vocab=25_600)


def random_prompts(num: int, length: int, vocab: int) -> list[list[int]]:
    """Prompts of random ids, none of them the end token."""
    return np.random.default_rng(0).integers(1, vocab, (num, length)).tolist()


def uneven_lengths(num: int, longest: int) -> np.ndarray:
    """Lengths ``(num,)`` as reasoning has them: geometric with a mean of a sixth of ``longest``, cut there."""
    return np.random.default_rng(0).geometric(6 / longest, num).clip(max=longest)


def random_batch(vocab: int, prompt: int, length_B: np.ndarray, device: str = "cpu") -> Trajectories:
    """Episodes of random ids: a prompt of ``prompt`` tokens each, then ``length_B`` sampled ones."""
    rng = np.random.default_rng(0)
    rows, width = len(length_B), prompt + int(length_B.max())
    column_T = np.arange(width)
    source_BT = np.full((rows, width), Source.PAD, dtype=np.uint8)
    source_BT[:, :prompt] = Source.PROMPT
    source_BT[(column_T >= prompt) & (column_T < prompt + length_B[:, None])] = Source.SAMPLED
    tokens_BT = np.where(source_BT == Source.PAD, 0, rng.integers(1, vocab, (rows, width)))
    return Trajectories(
        tokens_BT=torch.from_numpy(tokens_BT),
        source_BT=torch.from_numpy(source_BT),
        logp_BT=torch.zeros(rows, width),
        reward_BT=torch.zeros(rows, width, dtype=torch.float64),
        penalty_B=torch.zeros(rows, dtype=torch.float64),
        group_B=torch.arange(rows),
        scores=[Score(0.0)] * rows,
        finish_B=np.full(rows, Finish.LENGTH),
        prompts=[""] * rows,
        completions=[[""]] * rows,
        references=[None] * rows,
    ).to(torch.device(device))
