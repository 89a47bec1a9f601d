"""Keys and values of the sequences being written, and attention into them.

Shapes: R rows, N new tokens of all rows, H query heads, K key heads, D their width, S places of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

LINE = 64
"""Bytes that a processor reads at once: each layer begins with a new line of memory."""


class Cache:
    """Keys and values of ``rows`` sequences, by layer ``(R, K, S, D)``.

    The rows in use are the first ones, and all places of a row are attended to, those not written yet behind a mask: a
    processor reads memory without gaps up to twice as fast as with them. All layers lie in one piece of memory, with room for
    one more beside them: as rows grow, each moves into the room next to it.

    Args:
        layers, heads, width: of the model's keys.
        dtype, device: of what is kept.
    """

    def __init__(self, layers: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._memory = torch.empty(2 * layers + 1, 0, dtype=dtype, device=device)
        self._first = 0
        """where the first layer is: at 0, and the last room free, or at 1"""
        self.keys = [torch.zeros(0, heads, 0, width, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(0, heads, 0, width, dtype=dtype, device=device) for _ in range(layers)]

    @property
    def rows(self) -> int:
        return self.keys[0].shape[0]

    @property
    def places(self) -> int:
        return self.keys[0].shape[2]

    def resize(self, rows: int, places: int, held: int, most_places: int | None = None) -> None:
        """Make room for ``rows`` rows of ``places``, no fewer than before, and keep the first ``held``.

        Args:
            most_places: that the rows will have one day, for which memory is set aside now; default ``places``.
        """
        self._move(rows, places, max(places, most_places or 0), lambda old, new: _put(old[:held], new))

    def take(self, row_R: Tensor) -> None:
        """Hold these rows from now on, in this order."""
        self._move(len(row_R), self.places, self.places, lambda old, new: torch.index_select(old, 0, row_R, out=new))

    def _move(self, rows: int, places: int, most_places: int, write: Callable[[Tensor, Tensor], object]) -> None:
        """Give every layer another room, into which ``write`` brings what it held: the one next to it, or in fresh memory."""
        shape = rows, self.keys[0].shape[1], places, self.keys[0].shape[3]
        size = shape[0] * shape[1] * shape[2] * shape[3]
        memory, step = self._memory, 1 - 2 * self._first
        if size > memory.shape[1]:
            memory, step = _memory_like(memory, size // places * most_places), 0
        # Moving up, the last layer goes first.
        for buffers, layer, room in [*self._rooms()][:: -1 if step == 1 else 1]:
            old, buffers[layer] = buffers[layer], memory[room + step][:size].view(shape)
            write(old, buffers[layer])
        self._memory, self._first = memory, self._first + step

    def _rooms(self) -> Iterator[tuple[list[Tensor], int, int]]:
        """Each buffer, as an entry of a list, and which part of the memory it lies in."""
        for number, buffers in enumerate((self.keys, self.values)):
            for layer in range(len(buffers)):
                yield buffers, layer, self._first + number * len(buffers) + layer

    def repeat(self, first: int, number: int, owner_R: Tensor) -> None:
        """Write what the ``number`` rows from ``first`` on hold to the rows after them, to each what its owner does."""
        for buffer in (*self.keys, *self.values):
            start = first + number
            torch.index_select(buffer[first:start], 0, owner_R, out=buffer[start : start + len(owner_R)])

    def copy(self, sources_R: Tensor, targets_R: Tensor) -> None:
        """Overwrite the rows ``targets_R`` with what ``sources_R`` hold."""
        for buffer in (*self.keys, *self.values):
            buffer.index_copy_(0, targets_R, buffer.index_select(0, sources_R))

    def swap(self, ones_R: Tensor, others_R: Tensor) -> None:
        """Exchange two sets of rows."""
        for buffer in (*self.keys, *self.values):
            kept = buffer[ones_R]
            buffer[ones_R] = buffer[others_R]
            buffer[others_R] = kept


class Reading:
    """New tokens of the rows, one or more each: written to the cache, they look at it and at those before them.

    Args:
        cache: has the places that they take.
        row_N: the row of each, in order.
        position_N: the place that it takes.
        rows: how many rows they belong to, the first ``rows`` from ``first`` on.
        first: the first of them.
        places: of each row that are looked at; default all.
    """

    def __init__(
        self, cache: Cache, row_N: Tensor, position_N: Tensor, rows: int, first: int = 0, places: int | None = None
    ) -> None:
        self.cache = cache
        self.span, self.places = slice(first, first + rows), places or cache.places
        self.one_each = len(row_N) == rows
        # Where the key of each token and head goes, in a flat view of the buffer.
        heads = cache.keys[0].shape[1]
        head_K = torch.arange(heads, device=position_N.device)
        self.slot_M = ((row_N.unsqueeze(1) * heads + head_K) * cache.places + position_N.unsqueeze(1)).flatten()
        query_RT = position_N.unsqueeze(1)
        if not self.one_each:
            local_N = row_N - first
            count_R = torch.bincount(local_N, minlength=rows)
            begin_R = count_R.cumsum(0) - count_R
            column_N = torch.arange(len(row_N), device=row_N.device) - begin_R[local_N]
            self.shape = rows, int(count_R.max())
            self.taken = local_N * self.shape[1] + column_N
            query_RT = position_N.new_zeros(self.shape).flatten().scatter(0, self.taken, position_N).view(self.shape)
        place_S = torch.arange(self.places, device=position_N.device)
        seen_R1TS = (place_S <= query_RT.unsqueeze(2)).unsqueeze(1)
        self.mask_R1TS = torch.where(seen_R1TS, 0.0, -torch.inf).to(cache.keys[0].dtype)
        self.mask_PHS: Tensor | None = None
        """the same for each pair of a row and a key head, once it is known how many heads read the same keys"""

    def __call__(self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        width = keys.shape[3]
        keys.view(-1, width).index_copy_(0, self.slot_M, key_NKD.reshape(-1, width))
        values.view(-1, width).index_copy_(0, self.slot_M, value_NKD.reshape(-1, width))
        read = self._read_one if self.one_each else self._read_several
        return read(keys[self.span, :, : self.places], values[self.span, :, : self.places], query_NHD, scale)

    def _read_one(self, keys_RKSD: Tensor, values_RKSD: Tensor, query_RHD: Tensor, scale: float) -> Tensor:
        rows, heads, places, width = keys_RKSD.shape
        shared = query_RHD.shape[1] // heads  # query heads that read the same keys
        if query_RHD.dtype != torch.float32:  # products of half types are to be added up in float32
            query = query_RHD.reshape(rows, heads, shared, width)
            seen = functional.scaled_dot_product_attention(
                query, keys_RKSD, values_RKSD, attn_mask=self.mask_R1TS, scale=scale
            )
            return seen.reshape(rows, -1)
        pairs = rows * heads
        if self.mask_PHS is None:
            self.mask_PHS = self.mask_R1TS.expand(rows, heads, shared, places).reshape(pairs, shared, places)
        keys_PDS = keys_RKSD.view(pairs, places, width).transpose(1, 2)
        product_PHS = torch.baddbmm(self.mask_PHS, query_RHD.reshape(pairs, shared, width), keys_PDS, alpha=scale)
        return torch.bmm(product_PHS.softmax(dim=2), values_RKSD.view(pairs, places, width)).view(rows, -1)

    def _read_several(self, keys_RKSD: Tensor, values_RKSD: Tensor, query_NHD: Tensor, scale: float) -> Tensor:
        heads, width = query_NHD.shape[1:]
        query = query_NHD.new_zeros(self.shape[0] * self.shape[1], heads, width)
        query = query.index_copy_(0, self.taken, query_NHD).view(*self.shape, heads, width).transpose(1, 2)
        seen_RHTD = functional.scaled_dot_product_attention(
            query, keys_RKSD, values_RKSD, attn_mask=self.mask_R1TS, scale=scale, enable_gqa=heads != keys_RKSD.shape[1]
        )
        return seen_RHTD.transpose(1, 2).reshape(-1, heads * width).index_select(0, self.taken)


def _put(old: Tensor, new: Tensor) -> None:
    new[: len(old), :, : old.shape[2]] = old


def _memory_like(memory: Tensor, size: int) -> Tensor:
    """Zeros for as many parts of ``size`` entries each, of the same type.

    What is masked is multiplied by 0, so that all there ever is has to be finite.
    """
    parts, line = len(memory), LINE // memory.itemsize
    size = -(-size // line) * line
    if memory.device.type != "cpu":
        return memory.new_zeros(parts, size)
    # numpy asks Linux for large pages, torch does not: the first touch of a small one costs more than all later ones.
    fresh = np.zeros(parts * size * memory.itemsize + LINE, dtype=np.uint8)
    start = -fresh.ctypes.data % LINE
    return torch.from_numpy(fresh[start : start - LINE or None]).view(memory.dtype).view(parts, size)
