"""Causal attention over tokens laid out flat, sequence after sequence, without padding in between.

Shapes: N tokens of all sequences, R sequences of a bucket, T their longest, H query heads, K key heads, D their width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

PADDING = 1.25
"""Sequences up to this much longer than the shortest of a bucket are attended to together with it."""


class Attend(Protocol):
    """How the tokens of a forward pass look at one another."""

    def __call__(self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float) -> Tensor:
        """What each token gathers ``(N, H·D)`` in this layer."""


@dataclass(frozen=True)
class _Bucket:
    """Sequences of about one length, next to each other. ``taken`` and ``given`` are None when there is no padding."""

    start: int
    end: int
    rows: int
    width: int
    taken: Tensor | None
    """where each place of the padded bucket is among the bucket's tokens ``(R·T,)``"""
    given: Tensor | None
    """which places are tokens"""


class Segments:
    """Each token looks at itself and at what stands before it in its own sequence.

    Sequences of about one length are padded to the longest of them for the attention alone. They should be sorted by
    length; in any order the result is the same.

    Args:
        lengths: tokens of each sequence, in the order in which they lie.
        device: of the tokens.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.buckets = list(_buckets(lengths, device))

    def __call__(self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float) -> Tensor:
        parts = [self._attend(bucket, query_NHD, key_NKD, value_NKD, scale) for bucket in self.buckets]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def _attend(bucket: _Bucket, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float) -> Tensor:
        def padded(x_NHD: Tensor) -> Tensor:
            x_NHD = x_NHD[bucket.start : bucket.end]
            if bucket.taken is not None:
                x_NHD = x_NHD.index_select(0, bucket.taken)
            return x_NHD.view(bucket.rows, bucket.width, *x_NHD.shape[1:]).transpose(1, 2)

        heads, width = query_NHD.shape[1:]
        seen_RHTD = functional.scaled_dot_product_attention(
            padded(query_NHD),
            padded(key_NKD),
            padded(value_NKD),
            is_causal=True,
            scale=scale,
            enable_gqa=key_NKD.shape[1] != heads,
        )
        seen = seen_RHTD.transpose(1, 2).reshape(bucket.rows * bucket.width, heads * width)
        return seen if bucket.given is None else seen.index_select(0, bucket.given)


def _buckets(lengths: Sequence[int], device: torch.device | str) -> Iterator[_Bucket]:
    first = start = 0
    while first < len(lengths):
        last, shortest, longest = first, lengths[first], lengths[first]
        while last + 1 < len(lengths):
            low, high = min(shortest, lengths[last + 1]), max(longest, lengths[last + 1])
            if high > PADDING * low:
                break
            last, shortest, longest = last + 1, low, high
        length_R = torch.tensor(lengths[first : last + 1])
        tokens = int(length_R.sum())
        taken = given = None
        if shortest != longest:
            real_RT = torch.arange(longest) < length_R.unsqueeze(1)
            begin_R1 = (length_R.cumsum(0) - length_R).unsqueeze(1)
            # A place of padding comes after its sequence, where causal attention never looks; any token will do.
            taken = torch.where(real_RT, begin_R1 + torch.arange(longest), begin_R1).flatten().to(device)
            given = real_RT.flatten().nonzero().squeeze(1).to(device)
        yield _Bucket(start, start + tokens, len(length_R), longest, taken, given)
        first, start = last + 1, start + tokens
