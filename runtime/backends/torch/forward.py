"""The forward pass of the torch backend: flat rows of any sequences through the trunk, then through the tails.

    residual  [rows, H] float32          branch  [splits, rows, H], added to it by the next norm

Every op exists twice with the same signature: as a Triton kernel (`kernels.triton.ops`) and in the eager oracle
(`kernels.oracle.eager`). This file works with either. It reads no value on the device, so it can be captured in a
CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from ....kernels.oracle.operands import AdapterTiles, DecodeRows, LayerCache, LinearWeight, PrefillChunks
from ...model.config import DecoderConfig
from .paged_cache import PagedCache
from .weights import LayerWeights, LinearLayer, ModelWeights, Norm

Tensor = torch.Tensor

HEAD_ROWS = 32  # hidden states per head call: with their remainders, as many rows as the small matmul accepts


@dataclass(frozen=True, slots=True)
class RowInputs:
    """A `RowPlan` on the device. `tiles` is None where no row has a low-rank adapter."""

    positions: Tensor  # [rows] int32
    slots: Tensor  # [rows] int32
    decode: DecodeRows
    chunks: PrefillChunks
    tiles: AdapterTiles | None

    @classmethod
    def of(
        cls, device: Mapping[str, Tensor], tables: Tensor, *, max_length: int, max_chunk: int, prefix: str = ""
    ) -> RowInputs:
        """Made from uploaded arrays, which have the names of `RowPlan.arrays` with a prefix."""

        def get(name: str) -> Tensor:
            return device[prefix + name]

        decode = DecodeRows(get("rows"), get("row_seqs"), get("row_lengths"), tables, max_length)
        chunks = PrefillChunks(
            get("chunk_starts"), get("chunk_sizes"), get("chunk_lengths"), get("chunk_seqs"), tables, max_chunk
        )
        tiles = AdapterTiles(get("adapter_order"), get("adapter_tiles"))
        return cls(
            get("positions"),
            get("slots"),
            decode,
            chunks,
            tiles if len(tiles.adapters) else None,
        )


class Forward:
    """A model and its paged KV cache."""

    def __init__(
        self, config: DecoderConfig, weights: ModelWeights, cache: PagedCache, ops: ModuleType, dtype: torch.dtype
    ) -> None:
        self._config = config
        self._weights = weights
        self._cache = cache
        self._ops = ops
        self._dtype = dtype

    def run(
        self,
        token_ids: Tensor,
        rows: RowInputs,
        tails: Sequence[tuple[int, Tensor | None, RowInputs]],
    ) -> Tensor:
        """Normed hidden states [Σ rows, H] of every tail's rows, one tail after the other.

        token_ids [rows] int32. tails: (tail, the flat rows that it runs over, None for all; the inputs of these rows).
        """
        weights, eps = self._weights, self._config.norm_eps
        residual, branch = self._embed(token_ids, rows.positions), None
        for layer, cache in zip(weights.trunk, self._cache.trunk, strict=True):
            branch = self._layer(layer, cache, residual, branch, rows)
        if len(tails) > 1 or tails[0][1] is not None:
            # Add the trunk's last branch before the residual is copied, with the norms' op, so that the bits are equal.
            norm = weights.tails[tails[0][0]].norm
            self._ops.residual_norm(branch, residual, norm.weight, norm.bias, eps, self._dtype)
            branch = None
        return torch.cat([self._tail(tail, residual, branch, index, inputs) for tail, index, inputs in tails])

    def _tail(
        self, tail: int, residual: Tensor, branch: Tensor | None, index: Tensor | None, rows: RowInputs
    ) -> Tensor:
        if branch is None:  # other tails read the residual too
            residual = residual.clone() if index is None else residual.index_select(0, index)
        own = self._weights.tails[tail]
        for layer, cache in zip(own.layers, self._cache.tails[tail], strict=True):
            branch = self._layer(layer, cache, residual, branch, rows)
        return self._norm(own.norm, residual, branch)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab] float32 of mixed hidden states [rows, H] float32.

        A mix is not exact in the model's dtype, so it goes in as two rows, its rounding and the remainder. At most
        `HEAD_ROWS` rows are computed at once, so that the logits of a row do not depend on how many others there are.
        """
        pieces = []
        for part in torch.split(hidden, HEAD_ROWS):
            coarse = part.to(self._dtype)
            rows = [coarse] if self._dtype is torch.float32 else [coarse, (part - coarse.float()).to(self._dtype)]
            logits = self._ops.matmul(torch.cat(rows), self._weights.head).float().sum(0)
            pieces.append(logits if len(rows) == 1 else logits[: len(part)] + logits[len(part) :])
        return torch.cat(pieces)

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        hidden = _rows_of(self._weights.embedding, token_ids)
        if self._weights.position_embedding is not None:
            hidden = hidden + self._weights.position_embedding.index_select(0, positions).float()
        return hidden.contiguous()

    def _norm(self, norm: Norm, residual: Tensor, branch: Tensor | None) -> Tensor:
        normed: Tensor = self._ops.residual_norm(
            branch, residual, norm.weight, norm.bias, self._config.norm_eps, self._dtype
        )
        return normed

    def _layer(
        self, layer: LayerWeights, cache: LayerCache, residual: Tensor, branch: Tensor | None, rows: RowInputs
    ) -> Tensor:
        """Run one layer. Returns its last branch, which is not yet added to the residual."""
        config, ops, tiles = self._config, self._ops, rows.tiles
        qkv = self._linear(self._norm(layer.attention_norm, residual, branch), layer.qkv, tiles)
        tables = self._weights.rotary
        query = ops.rotary_write(
            qkv,
            tables,
            layer.head_norms,
            config.norm_eps,
            rows.positions,
            rows.slots,
            cache,
            config.num_heads,
            self._dtype,
        )
        out = torch.empty_like(query)
        ops.decode_attention(query, cache, rows.decode, out, layer.window)
        ops.prefill_attention(query, cache, rows.chunks, out, layer.window)
        branch = self._linear(out.flatten(1), layer.out, tiles)
        up = self._linear(self._norm(layer.mlp_norm, residual, branch), layer.up, tiles)
        inner = ops.activate(up, layer.gated, self._dtype)
        return self._linear(inner, layer.down, tiles)

    def _linear(self, x: Tensor, linear: LinearLayer, tiles: AdapterTiles | None) -> Tensor:
        parts: Tensor = self._ops.matmul(x, linear.weight)
        if linear.adapter is not None and tiles is not None:
            self._ops.add_adapter(x, linear.adapter, tiles, parts)
        return parts


def _rows_of(table: LinearWeight, token_ids: Tensor) -> Tensor:
    """Rows of an embedding, dense or 8 bits, as [tokens, H] float32."""
    rows = table.values.index_select(0, token_ids).float()
    if table.scales is None:
        return rows
    scales = table.scales.index_select(1, token_ids).t().float()  # [tokens, groups]
    return ((rows - 128).reshape(*scales.shape, -1) * scales[..., None]).flatten(1)
