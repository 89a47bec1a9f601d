"""The tokens of a batch laid side by side, without padding, and each common beginning only once.

A causal model makes of a token's prefix what it makes of it in every other row that begins so. The completions of one
problem share its prompt, and short ones are often the same altogether; what they share goes through the model once, and
its gradient is the sum of theirs.

Shapes: B rows, T columns, N tokens of all rows, U of them to be computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agents.core.attention import Attend, Segments

WORTHWHILE = 0.9
"""Common beginnings are computed once where at most this share of the tokens is left."""


@dataclass(frozen=True)
class Packed:
    """What a :class:`agents.core.decoder.Decoder` is called with, and where the states of the sampled tokens are then."""

    tokens_U: Tensor
    position_U: Tensor
    attend: Attend
    state_N: Tensor
    """of each sampled token, row after row: the place of the state that it was chosen in"""


def pack(tokens_BT: Tensor, sampled_BT: Tensor) -> Packed:
    """Lay out what the sampled tokens depend on: in each row all tokens before the last sampled one.

    Args:
        tokens_BT: int64 ids; what stands after a row's last sampled token is not looked at.
        sampled_BT: bool, True where the policy chose the token; never in the first column, in one place at least.
    """
    device = tokens_BT.device
    tokens, sampled = tokens_BT.cpu().numpy(), sampled_BT.cpu().numpy()
    column_T = np.arange(tokens.shape[1])
    length_B = (sampled * column_T).max(axis=1)
    order = length_B.argsort(kind="stable")  # by length, as Segments wants its rows
    length_B = length_B[order]
    real_BT: np.ndarray = column_T < length_B[:, np.newaxis]
    once_BT, number_BT = _common_beginnings(np.where(real_BT, tokens[order], -1))
    if once_BT.sum() > WORTHWHILE * real_BT.sum():
        once_BT, number_BT = real_BT, _count(real_BT)
    # Rows that are the beginnings of others have nothing to be computed.
    needed_B = once_BT.sum(axis=1) > 0
    attend: Attend = Segments(length_B[needed_B].tolist(), device)
    if once_BT is not real_BT:
        needed_BT = real_BT & needed_B[:, np.newaxis]
        attend = _Once(attend, _to(number_BT[needed_BT], device), _to(_count(needed_BT)[once_BT], device))
    place_BT = np.empty_like(number_BT)
    place_BT[order] = number_BT
    return Packed(
        tokens_U=_to(tokens[order][once_BT], device),
        position_U=_to(np.broadcast_to(column_T, once_BT.shape)[once_BT], device),
        attend=attend,
        state_N=_to(place_BT[:, :-1][sampled[:, 1:]], device),
    )


class _Once:
    """Attention of tokens that stand for several rows: it is taken in full rows, and kept for one of them."""

    def __init__(self, rows: Attend, place_N: Tensor, first_U: Tensor) -> None:
        self.rows, self.place_N, self.first_U = rows, place_N, first_U

    def __call__(self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float) -> Tensor:
        query_NHD, key_NKD, value_NKD = (x.index_select(0, self.place_N) for x in (query_NHD, key_NKD, value_NKD))
        return self.rows(layer, query_NHD, key_NKD, value_NKD, scale).index_select(0, self.first_U)


def _common_beginnings(tokens_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens ``(B, T)`` are the first with their prefix, and where each token's prefix is among those, row after row.

    In lexicographic order a row shares with the one before it all that it shares with any earlier one.

    Args:
        tokens_BT: -1 for padding, on the right.
    """
    rows, width = tokens_BT.shape
    order = np.array(sorted(range(rows), key=[row.tobytes() for row in tokens_BT].__getitem__))
    ordered = tokens_BT[order]
    first = ordered >= 0
    first[1:] &= ~np.logical_and.accumulate(ordered[1:] == ordered[:-1], axis=1)
    # The row that has the prefix first: the last one up to here that does not share it.
    owner = np.maximum.accumulate(np.where(first, np.arange(rows)[:, np.newaxis], 0), axis=0)
    once, owner_BT = np.empty_like(first), np.empty_like(owner)
    once[order], owner_BT[order] = first, order[owner]
    return once, _count(once)[owner_BT, np.arange(width)]


def _count(which_BT: np.ndarray) -> np.ndarray:
    """The number of each that is marked, from 0, row after row."""
    return which_BT.cumsum().reshape(which_BT.shape) - 1


def _to(x: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(device)
