"""Pretraining text beside the reward, as in PPO-ptx (arXiv:2203.02155, eq. 2)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from agents.core.learner import Beside, Scored
from agents.core.losses import Denominators, aggregate, count_denominators
from agents.core.policy import Policy
from agents.core.trajectories import Trajectories
from textenv.episodes import Source
from textenv.task import Finish

DRAWING = 0x5058
"""First word of every drawing's seed."""


class Pretraining:
    """The texts of a JSON lines file, in its field "text".

    Raises:
        ValueError: there is no such file, it is empty, or a line has no text.
    """

    def __init__(self, path: str) -> None:
        if not Path(path).is_file():
            raise ValueError(f'no file {path!r} with pretraining text; ptx_file takes JSON lines with a field "text"')
        self.path = path
        self.texts: list[str] = []
        for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
            row = json.loads(line) if line.startswith("{") else None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"]:
                raise ValueError(f'{path}, line {number}: wanted an object with a "text", got {line[:60]!r}')
            self.texts.append(row["text"])
        if not self.texts:
            raise ValueError(f'{path} is empty; ptx_file takes JSON lines with a field "text"')

    def encoded(self, policy: Policy, max_tokens: int) -> Texts:
        """The texts as token ids, each ended, and cut to ``max_tokens``.

        Raises:
            ValueError: the tokenizer cannot write one of them.
        """
        tokenizer = policy.tokenizer
        ids = [[*tokenizer.encode(text), tokenizer.eos_ids[0]][:max_tokens] for text in self.texts]
        return Texts(ids, policy.device)


@dataclass(frozen=True)
class Texts:
    """Encoded texts, of at least two tokens each, and where they are to be scored."""

    ids: list[list[int]]
    device: torch.device

    def draw(self, seed: tuple[int, ...], rows: int, coef: float) -> Beside:
        """``rows`` texts drawn with ``seed``, and the loss that raises their likelihood with weight ``coef``."""
        drawn = np.random.default_rng((DRAWING, *seed)).integers(len(self.ids), size=rows)
        batch = text_batch([self.ids[i] for i in drawn]).to(self.device)
        denominators = count_denominators(batch.sampled_BT, 1)
        return batch, partial(ptx_loss, coef=coef, denominators=denominators)


def ptx_loss(scored: Scored, *, coef: float, denominators: Denominators) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of ``coef`` times the mean negative log-likelihood of a token."""
    nll = aggregate(-scored.logp_RT, scored.sampled_RT, "token_mean", denominators)
    return coef * nll, {"ptx_nll": nll.detach()}


def text_batch(ids: list[list[int]]) -> Trajectories:
    """Texts as episodes whose every token but the first is to be made likelier."""
    width = max(map(len, ids))
    tokens_BT, source_BT = np.zeros((len(ids), width), np.int64), np.zeros((len(ids), width), np.uint8)
    for row, text in enumerate(ids):
        tokens_BT[row, : len(text)] = text
        source_BT[row, : len(text)] = [Source.PROMPT] + [Source.SAMPLED] * (len(text) - 1)
    shape = (len(ids), width)
    return Trajectories(
        tokens_BT=torch.from_numpy(tokens_BT),
        source_BT=torch.from_numpy(source_BT),
        logp_BT=torch.zeros(shape),
        reward_BT=torch.zeros(shape, dtype=torch.float64),
        penalty_B=torch.zeros(len(ids), dtype=torch.float64),
        group_B=torch.arange(len(ids)),
        scores=[],
        finish_B=np.full(len(ids), Finish.EOS),
        prompts=[],
        completions=[],
        references=[],
    )
