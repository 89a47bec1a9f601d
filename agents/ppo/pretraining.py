"""Pretraining text beside the reward, as in PPO-ptx (arXiv:2203.02155, eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from agents.core.learner import Beside, Scored
from agents.core.losses import Denominators, aggregate, count_denominators
from agents.core.trajectories import Trajectories
from rewards.rows import read_rows
from textenv.episodes import Source
from textenv.task import Finish
from textenv.tokenizer import Tokenizer

DRAWING = 0x5058
"""First word of every drawing's seed."""

Texts = Sequence[Sequence[int]]
"""Token ids of each text, at least two."""


def read_texts(file: str, tokenizer: Tokenizer, max_tokens: int) -> Texts:
    """The field "text" of every row of a data file as token ids, each text ended, and cut to ``max_tokens``.

    Args:
        file: see :func:`rewards.rows.read_rows`.
        tokenizer: the policy's.
        max_tokens: at least 2.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no rows, a row has no text, or the tokenizer cannot write one.
    """
    texts = []
    for number, row in read_rows(file):
        text = row.get("text") if isinstance(row, Mapping) else None
        if not isinstance(text, str) or not text:
            raise ValueError(f'{file}, row {number}: wanted an object with a "text", got {str(row)[:60]!r}')
        try:
            texts.append([*tokenizer.encode(text), tokenizer.eos_ids[0]][:max_tokens])
        except ValueError as error:
            raise ValueError(f"{file}, row {number}: {error}") from error
    if not texts:
        raise ValueError(f'{file} has no rows; ptx_file takes rows with a field "text"')
    return texts


def draw_texts(texts: Texts, seed: tuple[int, ...], rows: int, *, coef: float, device: torch.device) -> Beside:
    """``rows`` texts drawn with ``seed``, and the loss that raises their likelihood with weight ``coef``."""
    drawn = np.random.default_rng((DRAWING, *seed)).integers(len(texts), size=rows)
    batch = text_batch([texts[i] for i in drawn]).to(device)
    denominators = count_denominators(batch.sampled_BT, 1)
    return batch, partial(ptx_loss, coef=coef, denominators=denominators)


def ptx_loss(scored: Scored, *, coef: float, denominators: Denominators) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of ``coef`` times the mean negative log-likelihood of a token."""
    nll = aggregate(-scored.logp_RT, scored.sampled_RT, "token_mean", denominators)
    return coef * nll, {"ptx_nll": nll.detach()}


def text_batch(texts: Texts) -> Trajectories:
    """Texts as episodes whose every token but the first, which has no context, is to be made likelier."""
    shape = len(texts), max(map(len, texts))
    tokens_BT, source_BT = np.zeros(shape, np.int64), np.zeros(shape, np.uint8)
    for row, text in enumerate(texts):
        tokens_BT[row, : len(text)] = text
        source_BT[row, : len(text)] = [Source.PROMPT] + [Source.SAMPLED] * (len(text) - 1)
    return Trajectories(
        tokens_BT=torch.from_numpy(tokens_BT),
        source_BT=torch.from_numpy(source_BT),
        logp_BT=torch.zeros(shape),
        reward_BT=torch.zeros(shape, dtype=torch.float64),
        penalty_B=torch.zeros(len(texts), dtype=torch.float64),
        group_B=torch.arange(len(texts)),
        scores=[],
        finish_B=np.full(len(texts), Finish.EOS),
        prompts=[],
        completions=[],
        references=[],
    )
