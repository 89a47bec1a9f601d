"""Drawing tokens: a distribution from logits, cut if wanted, and inverted at uniform numbers of each row's own.

Shapes: B rows, V vocabulary, C blocks of it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from agents.core.engines.base import Sampling

BLOCK = 512
"""Tokens whose masses are added up together; a larger vocabulary is searched block by block."""
DRAWS_AT_ONCE = 64
"""Tokens for which uniform numbers are drawn at a time."""
BELOW_ONE = 1 - 2**-52


def choose(
    logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling, allowed_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A token of each row and its log-probability in the distribution that a sampling asks for.

    Args:
        logits_BV: of any float type.
        uniform_B: see :func:`draw`; has no say in a greedy choice.
        sampling: temperature and cuts.
        allowed_V: bool, False for ids that have no probability.
    """
    logits_BV = logits_BV.float()
    if allowed_V is not None:
        logits_BV = logits_BV.masked_fill(~allowed_V, -torch.inf)
    if sampling.temperature == 0:
        token_B1 = logits_BV.argmax(dim=1, keepdim=True)
        logp_B1 = logits_BV.gather(1, token_B1) - logits_BV.logsumexp(dim=1, keepdim=True)
        return token_B1.squeeze(1), logp_B1.squeeze(1)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
        logits_BV = _truncate(logits_BV.log_softmax(dim=1), sampling.top_k, sampling.top_p, sampling.min_p)
    return draw(logits_BV, uniform_B)


def draw(logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """A token of each row's distribution, its distribution function inverted at ``uniform_B``, and its log-probability.

    Args:
        logits_BV: float32, or log-probabilities; ``-inf`` for what cannot be drawn.
        uniform_B: float64, in [0, 1).

    Returns:
        ``token_B``, int64, and ``logp_B``, float32.
    """
    vocabulary = logits_BV.shape[1]
    top_B1 = logits_BV.amax(dim=1, keepdim=True)
    mass_BV = (logits_BV - top_B1).exp_()
    if vocabulary <= BLOCK:
        token_B1, total_B1 = _invert(mass_BV, uniform_B.unsqueeze(1))
    else:
        mass_BCK = functional.pad(mass_BV, (0, -vocabulary % BLOCK)).unflatten(1, (-1, BLOCK))
        block_B1, total_B1, rest_B1 = _search(mass_BCK.sum(dim=2, dtype=torch.float64), uniform_B.unsqueeze(1))
        mass_BK = mass_BCK[torch.arange(len(mass_BCK), device=mass_BCK.device), block_B1.squeeze(1)]
        inner_BK = mass_BK.double().cumsum(dim=1)
        token_B1 = block_B1 * BLOCK + _first_above(inner_BK, rest_B1)
    logp_B1 = (logits_BV.gather(1, token_B1) - top_B1).double() - total_B1.log()
    return token_B1.squeeze(1), logp_B1.squeeze(1).float()


class Uniforms:
    """Uniform numbers in [0, 1) for the tokens of ``rows`` completions: a row's do not depend on how many rows there are.

    Args:
        seed: of all of them.
        rows: completions.
        tokens: most tokens of one.
        device: where they are wanted.
    """

    def __init__(self, seed: int | tuple[int, ...], rows: int, tokens: int, device: torch.device) -> None:
        self._words = [seed] if isinstance(seed, int) else list(seed)
        self._drawn = 0
        self._uniform_BT = torch.empty(
            rows, -(-tokens // DRAWS_AT_ONCE) * DRAWS_AT_ONCE, dtype=torch.float64, device=device
        )

    def at(self, row_B: Tensor, token_B: Tensor, latest: int) -> Tensor:
        """Those of some rows ``(B,)``, each for a token of its own, counted from 0 and at most ``latest``."""
        while self._drawn <= latest:
            block = np.random.default_rng([*self._words, self._drawn // DRAWS_AT_ONCE]).random(
                (len(self._uniform_BT), DRAWS_AT_ONCE)
            )
            self._uniform_BT[:, self._drawn : self._drawn + DRAWS_AT_ONCE] = torch.from_numpy(block)
            self._drawn += DRAWS_AT_ONCE
        return self._uniform_BT[row_B, token_B]


def _invert(mass_BV: Tensor, uniform_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row's distribution function passes its number, and the row's total mass."""
    sum_BV = mass_BV.double().cumsum(dim=1)
    total_B1 = sum_BV[:, -1:]
    return _first_above(sum_BV, uniform_B1 * total_B1), total_B1


def _search(mass_BC: Tensor, uniform_B1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The block in which that happens, the row's total mass, and how far into the block."""
    sum_BC = mass_BC.cumsum(dim=1)
    total_B1 = sum_BC[:, -1:]
    wanted_B1 = uniform_B1 * total_B1
    block_B1 = _first_above(sum_BC, wanted_B1)
    return block_B1, total_B1, (wanted_B1 - (sum_BC - mass_BC).gather(1, block_B1)).clamp(min=0)


def _first_above(sum_BC: Tensor, wanted_B1: Tensor) -> Tensor:
    """The first entry of each row of growing sums that is above the number wanted, or the last one that adds anything.

    Only an entry with a mass of its own is ever above, so that rounding never picks one without.
    """
    return torch.searchsorted(sum_BC, wanted_B1.minimum(sum_BC[:, -1:] * BELOW_ONE), right=True)


def _truncate(logp_BV: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Log-probabilities once all but the k likeliest, those beyond a mass of p, and those less than ``min_p`` times as likely
    as the likeliest are cut off."""
    sorted_BV, order_BV = logp_BV.sort(dim=1, descending=True, stable=True)
    before_BV = sorted_BV.exp().cumsum(dim=1) - sorted_BV.exp()
    cut_BV = before_BV >= top_p
    if top_k:
        cut_BV[:, top_k:] = True
    if min_p:
        cut_BV |= sorted_BV < sorted_BV[:, :1] + float(np.log(min_p))
    return torch.log_softmax(logp_BV.masked_fill(cut_BV.gather(1, order_BV.argsort(dim=1)), -torch.inf), dim=1)
