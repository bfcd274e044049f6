"""The forward pass of the torch backend: flat rows of any sequences through the trunk, then through the tails. Members
that share a tail run it together: their rows go through each linear layer at once, with keys and values of their own.

    residual  [rows, H] float32          branch  [splits, rows, H], added to it by the next norm

Every op exists twice with the same signature: as a Triton kernel (`kernels.triton.ops`) and in the eager oracle
(`kernels.oracle.eager`). This file works with either. It reads no value on the device, except in layers of experts
(`experts`), so without these it can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import ModuleType

import torch

from ....kernels.oracle.eager import dequantise
from ....kernels.oracle.operands import (
    ADAPTER_TILE,
    AdapterTiles,
    DecodeRows,
    LayerCache,
    LinearWeight,
    PrefillChunks,
    Scores,
)
from ...model.config import DecoderConfig
from .experts import run_experts
from .paged_cache import PagedCache
from .weights import LayerWeights, LinearLayer, ModelWeights, Norm

Tensor = torch.Tensor

HEAD_ROWS = 32  # hidden states per head call: with their remainders, as many rows as the small matmul accepts


@dataclass(frozen=True, slots=True)
class RowInputs:
    """A `RowPlan` on the device."""

    positions: Tensor  # [rows] int32
    slots: Tensor  # [rows] int32
    decode: DecodeRows
    chunks: PrefillChunks

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.positions)

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
        return cls(get("positions"), get("slots"), decode, chunks)


@dataclass(frozen=True, slots=True)
class MemberRows:
    """The rows that a member's tail runs over. `index`: flat rows of the batch; None: all."""

    member: int
    index: Tensor | None
    inputs: RowInputs


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

    def run(self, token_ids: Tensor, rows: RowInputs, members: Sequence[MemberRows]) -> Tensor:
        """Normed hidden states [Σ rows, H] of every member's rows, in the order of `Forward.order`.

        token_ids [rows] int32.
        """
        weights = self._weights
        residual, branch = self._embed(token_ids, rows.positions), None
        tiles = self._tiles(members, token_ids.device) if len(weights.norms) == 1 else None  # one member: all is trunk
        for layer, cache in zip(weights.trunk, self._cache.trunk, strict=True):
            branch = self._layer(layer, [cache], residual, branch, [rows], tiles)
        if len(members) > 1 or members[0].index is not None:
            # Add the trunk's last branch before the residual is copied, with the norms' op, so that the bits are equal.
            self._norm(weights.norms[members[0].member], residual, branch)
            branch = None
        hidden = [self._tail(group, residual, branch) for group in self._groups(members)]
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def order(self, members: Iterable[int]) -> list[int]:
        """The order of the members' hidden states: tail by tail."""
        return sorted(members, key=lambda member: (self._weights.tail_of[member], member))

    def _groups(self, members: Sequence[MemberRows]) -> Iterator[list[MemberRows]]:
        """Members with the same tail."""
        by_member = {rows.member: rows for rows in members}
        ordered = [by_member[member] for member in self.order(by_member)]
        for _, group in groupby(ordered, key=lambda rows: self._weights.tail_of[rows.member]):
            yield list(group)

    def _tail(self, group: Sequence[MemberRows], residual: Tensor, branch: Tensor | None) -> Tensor:
        weights, inputs = self._weights, [rows.inputs for rows in group]
        if branch is None:  # other tails read the residual too
            parts = [residual if rows.index is None else residual.index_select(0, rows.index) for rows in group]
            residual = torch.cat(parts) if len(parts) > 1 or parts[0] is residual else parts[0]
        tiles = self._tiles(group, residual.device)
        caches = [self._cache.tails[rows.member] for rows in group]
        tail = weights.tails[weights.tail_of[group[0].member]]
        for index, layer in enumerate(tail):
            branch = self._layer(layer, [cache[index] for cache in caches], residual, branch, inputs, tiles)
        norms = [weights.norms[rows.member] for rows in group]
        normed = self._norm(norms[0], residual, branch)
        if all(norm is norms[0] for norm in norms):
            return normed
        pieces = torch.split(residual, [part.count for part in inputs])
        return torch.cat([self._norm(norm, piece, None) for norm, piece in zip(norms, pieces, strict=True)])

    def _tiles(self, group: Sequence[MemberRows], device: torch.device) -> AdapterTiles | None:
        """The rows of members with low-rank updates; None if there are none."""
        orders, adapters, start = [], [], 0
        for rows in group:
            count, adapter = rows.inputs.count, self._weights.adapter_of[rows.member]
            if adapter >= 0:
                tiles = -(-count // ADAPTER_TILE)
                order = torch.arange(tiles * ADAPTER_TILE, dtype=torch.int32, device=device)
                orders.append(torch.where(order < count, order + start, -1))
                adapters.append(torch.full((tiles,), adapter, dtype=torch.int32, device=device))
            start += count
        return AdapterTiles(torch.cat(orders), torch.cat(adapters)) if orders else None

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
        logits, config = torch.cat(pieces), self._config
        logits = logits if config.logit_scale == 1 else logits * config.logit_scale
        return (
            logits if config.logit_softcap is None else torch.tanh(logits / config.logit_softcap) * config.logit_softcap
        )

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        hidden = _rows_of(self._weights.embedding, token_ids)
        if self._config.embedding_scale != 1:
            hidden = hidden * self._config.embedding_scale
        if self._weights.position_embedding is not None:
            hidden = hidden + self._weights.position_embedding.index_select(0, positions).float()
        return hidden.contiguous()

    def _norm(self, norm: Norm, residual: Tensor, branch: Tensor | None) -> Tensor:
        normed: Tensor = self._ops.residual_norm(
            branch, residual, norm.weight, norm.bias, self._config.norm_eps, self._dtype
        )
        return normed

    def _layer(
        self,
        layer: LayerWeights,
        caches: Sequence[LayerCache],
        residual: Tensor,
        branch: Tensor | None,
        parts: Sequence[RowInputs],
        tiles: AdapterTiles | None,
    ) -> Tensor:
        """Run one layer over the rows of all parts, one part after the other, each with its own cache. Returns the
        layer's last branch, which is not yet added to the residual."""
        qkv = self._linear(self._input_of(layer.attention_norm, residual, branch), layer.qkv, tiles)
        own = [qkv]
        if len(parts) > 1:
            own = [piece.contiguous() for piece in torch.split(qkv, [part.count for part in parts], dim=1)]
        attended = [self._attend(layer, *each) for each in zip(own, caches, parts, strict=True)]
        out = attended[0] if len(attended) == 1 else torch.cat(attended)
        branch = self._branch(layer.attention_out_norm, self._linear(out.flatten(1), layer.out, tiles))
        normed = self._input_of(layer.mlp_norm, residual, None if layer.parallel else branch)
        added = self._branch(layer.mlp_out_norm, self._mlp(layer, normed, tiles))
        return torch.cat([branch, added]) if layer.parallel else added

    def _mlp(self, layer: LayerWeights, x: Tensor, tiles: AdapterTiles | None) -> Tensor:
        """[splits, rows, H]."""
        if layer.router is not None:
            return run_experts(self._ops, layer, x, self._config, self._dtype)
        (mlp,) = layer.mlps
        inner = self._ops.activate(self._linear(x, mlp.up, tiles), mlp.activation, self._dtype)
        return self._linear(inner, mlp.down, tiles)

    def _input_of(self, norm: Norm | None, residual: Tensor, branch: Tensor | None) -> Tensor:
        """What attention or an MLP gets; the branch is added to the residual."""
        if norm is not None:
            return self._norm(norm, residual, branch)
        if branch is not None:
            residual += branch.float().sum(0)
        return residual.to(self._dtype)

    def _branch(self, norm: Norm | None, parts: Tensor) -> Tensor:
        """What is added to the residual, [splits, rows, H]."""
        scale = self._config.residual_scale
        if norm is not None:
            total = torch.zeros_like(parts[0], dtype=torch.float32)
            normed = self._ops.residual_norm(parts, total, norm.weight, norm.bias, self._config.norm_eps, torch.float32)
            parts = normed[None]
        return parts if scale == 1 else parts * scale

    def _normed_projections(self, layer: LayerWeights, qkv: Tensor) -> Tensor:
        """Norms of all of q and of all of k: qkv [splits, rows, N] → [1, rows, N]."""
        config = self._config
        q, k, v = torch.split(qkv.float().sum(0), [config.q_size, config.kv_size, config.kv_size], dim=-1)
        assert layer.head_norms is not None
        q, k = (
            self._ops.residual_norm(None, x.contiguous(), weight, None, config.norm_eps, torch.float32)
            for x, weight in zip((q, k), layer.head_norms, strict=True)
        )
        return torch.cat([q, k, v], dim=-1)[None]

    def _attend(self, layer: LayerWeights, qkv: Tensor, cache: LayerCache, rows: RowInputs) -> Tensor:
        """qkv [splits, rows, N] → [rows, heads, head_size]."""
        config, ops = self._config, self._ops
        together = config.qk_norm == "projection"
        query = ops.rotary_write(
            self._normed_projections(layer, qkv) if together else qkv,
            None if layer.rotary is None else self._weights.rotary[layer.rotary],
            None if together else layer.head_norms,
            config.norm_eps,
            rows.positions,
            rows.slots,
            cache,
            config.num_heads,
            self._dtype,
        )
        out = torch.empty_like(query)
        scores = Scores(layer.window, config.attention_scale, config.attention_softcap)
        ops.decode_attention(query, cache, rows.decode, out, scores)
        ops.prefill_attention(query, cache, rows.chunks, out, scores)
        return out

    def _linear(self, x: Tensor, linear: LinearLayer, tiles: AdapterTiles | None) -> Tensor:
        parts: Tensor = self._ops.matmul(x, linear.weight)
        if linear.adapter is not None and tiles is not None:
            self._ops.add_adapter(x, linear.adapter, tiles, parts)
        return parts


def _rows_of(table: LinearWeight, token_ids: Tensor) -> Tensor:
    """Rows of an embedding, dense or quantised, as [tokens, H] float32."""
    groups = [None if t is None else t.index_select(1, token_ids) for t in (table.scales, table.minima)]
    return dequantise(LinearWeight(table.values.index_select(0, token_ids), *groups)).float()
