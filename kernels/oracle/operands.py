"""What the GPU ops work on: weights, the KV cache of a layer, which rows attend to what. Plain holders of torch tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """A weight `W [N, K]`, dense or quantised along K in groups, and perhaps a bias [N] float32.

    dense      values [N, K] floating point; no scales
    8 bits     values [N, K] u8;             w = (q − 128) · scale
    4 bits     values [N, K / 2] u8, low nibble first; w = q · scale + minimum

    scales, minima: [K / group_size, N] floating point. Groups come first, so that neighbouring outputs are neighbours in
    memory. A bundle's group-sum columns and whole zero points are folded into `minima` when it is loaded.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    minima: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def bits(self) -> int:
        """8, 4, or 0 for dense."""
        return 0 if self.scales is None else 8 if self.minima is None else 4

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        n, stored = self.values.shape
        return n, 2 * stored if self.bits == 4 else stored

    @property
    def group_size(self) -> int:
        return 0 if self.scales is None else self.shape[1] // len(self.scales)

    @property
    def num_bytes(self) -> int:
        """What a step reads of it."""
        tensors = (self.values, self.scales, self.minima, self.bias)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, [blocks, kv_heads, block_size, head_size]: floating point, int8 or float8_e4m3fn.

    int8 and fp8 have a scale for each position and head, [blocks, kv_heads, block_size] float32: nothing to calibrate, and
    one loud position does not spoil its neighbours. The last block is the dummy: rows that count for nothing write there.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    @property
    def block_size(self) -> int:
        return self.keys.shape[2]


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Rows that attend one by one: flat row `rows[i]` sees the first `lengths[i]` positions of block table `seqs[i]`.

    rows, seqs, lengths: [D] int32; length 0 is a padded row, whose output is 0. tables: [tables, max_blocks] int32.
    `max_length`: what any length may become; it fixes the launch, so that a captured graph serves every length.
    """

    rows: torch.Tensor
    seqs: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    max_length: int


@dataclass(frozen=True, slots=True)
class PrefillChunks:
    """Chunks of neighbouring rows: chunk i is flat rows `starts[i]` … `+ sizes[i]`, the last of the first `lengths[i]`
    positions of block table `seqs[i]`. All [P] int32. `max_size`: the largest of the sizes."""

    starts: torch.Tensor
    sizes: torch.Tensor
    lengths: torch.Tensor
    seqs: torch.Tensor
    tables: torch.Tensor
    max_size: int


@dataclass(frozen=True, slots=True)
class AdapterWeight:
    """The low-rank updates of one linear layer, stacked and padded to one rank: a [adapters, rank, K], b [adapters, N, rank].
    y += b (a x); the scale lies in b, a padded rank is zeros."""

    a: torch.Tensor
    b: torch.Tensor


ADAPTER_TILE = 16  # rows a tile


@dataclass(frozen=True, slots=True)
class AdapterTiles:
    """Rows grouped by their adapter: tile t is rows `order[16 t]` … `order[16 t + 15]`, all with adapter `adapters[t]`.

    order [16 T] int32, -1 for an empty place; adapters [T] int32, -1 for an empty tile.
    """

    order: torch.Tensor
    adapters: torch.Tensor


@dataclass(frozen=True, slots=True)
class Mixture:
    """A ragged mix of `B` requests in compressed rows: request b mixes rows `rows[starts[b]:starts[b + 1]]`.

    starts [B + 1] int32; rows [terms] int32; coefficients [terms] float32; is_probs [B] int32 (0: logits space).
    `any_probs` False promises that no request is in probs space: a pass over the logits is saved.
    """

    starts: torch.Tensor
    rows: torch.Tensor
    coefficients: torch.Tensor
    is_probs: torch.Tensor
    any_probs: bool = True


# Truncation rules that `Draw` carries and the ops apply, with the dtype of their values.
FUSED_RULES = {"top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}


@dataclass(frozen=True, slots=True)
class Draw:
    """How to sample, one entry a request: temperature [B] float32 (0: greedy), top_k [B] int32 (0: off), top_p and min_p
    [B] float32 (1 and 0: off), seeds [B] int64 (the bits of the unsigned seed), positions [B] int32. `any_cut` False
    promises that no request is truncated."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    any_cut: bool = True
