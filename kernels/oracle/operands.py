"""The operands of the GPU ops: weights, a layer's KV cache, which rows attend to which positions. Plain holders of tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """A weight `W [N, K]`, dense or quantised in groups along K, with an optional bias [N] float32.

    dense      values [N, K] floating point; no scales
    8 bits     values [N, K] u8;             w = (q − 128) · scale
    4 bits     values [N, K / 2] u8, low nibble first; w = q · scale + minimum

    scales, minima: [K / group_size, N] floating point. The group is the first index, so that neighbouring outputs are
    neighbours in memory.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    minima: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def bits(self) -> int:
        """8 or 4; 0 if the weight is dense."""
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
        """Bytes of all its tensors."""
        tensors = (self.values, self.scales, self.minima, self.bias)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer's attention scores are made. `window`: positions that a row attends to, its own included; None: all before
    it. `scale`: None is D^-0.5. `softcap`: scores s become c · tanh(s / c)."""

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None

    def scale_for(self, head_size: int) -> float:
        return self.scale if self.scale is not None else float(head_size**-0.5)


PLAIN_SCORES = Scores()


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, [blocks, kv_heads, block_size, head_size]: floating point, int8 or float8_e4m3fn.

    int8 and fp8 have one scale per position and head, [blocks, kv_heads, block_size] float32. So they need no calibration, and
    a position with large values does not cost others precision. The last block is the dummy block, for rows without a result.
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
    """Rows that attend one by one: flat row `rows[i]` attends to the first `lengths[i]` positions of block table `seqs[i]`.

    rows, seqs, lengths: [D] int32; length 0 marks a padding row, whose output is 0. tables: [tables, max_blocks] int32.
    max_length: the largest possible length. It sets the size of the launch, so one captured graph serves every length.
    """

    rows: torch.Tensor
    seqs: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    max_length: int


@dataclass(frozen=True, slots=True)
class PrefillChunks:
    """Chunks of neighbouring rows. Chunk i has the `sizes[i]` flat rows from `starts[i]` on. They are the last of the first
    `lengths[i]` positions of block table `seqs[i]`.

    starts, sizes, lengths, seqs: [P] int32. tables: [tables, max_blocks] int32. max_size: the largest size.
    """

    starts: torch.Tensor
    sizes: torch.Tensor
    lengths: torch.Tensor
    seqs: torch.Tensor
    tables: torch.Tensor
    max_size: int


@dataclass(frozen=True, slots=True)
class AdapterWeight:
    """The adapters of one linear layer, y += b (a x), stacked and padded with zeros to one rank.

    a [adapters, rank, K], b [adapters, N, rank]; b includes the scale.
    """

    a: torch.Tensor
    b: torch.Tensor


ADAPTER_TILE = 16  # rows per tile


@dataclass(frozen=True, slots=True)
class AdapterTiles:
    """Rows by adapter: tile t has rows `order[16 t]` … `order[16 t + 15]`, all with adapter `adapters[t]`.

    order [16 T] int32; -1: no row. adapters [T] int32; -1: the tile is empty.
    """

    order: torch.Tensor
    adapters: torch.Tensor


@dataclass(frozen=True, slots=True)
class Mixture:
    """The mixes of `B` requests, as compressed sparse rows: request b mixes rows `rows[starts[b]:starts[b + 1]]`.

    starts [B + 1] int32; rows [terms] int32; coefficients [terms] float32; is_probs [B] int32 (0: logits space, 1: probs).
    If `any_probs` is false, `is_probs` must be all 0; this saves a pass over the logits.
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
    """How to sample, one entry per request.

    temperature [B] float32 (0: greedy); top_k [B] int32 (0: off); top_p, min_p [B] float32 (1 and 0: off); seeds [B] int64
    (the bits of the unsigned seed); positions [B] int32. If `any_cut` is false, top_k, top_p and min_p must be off for all.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    any_cut: bool = True
