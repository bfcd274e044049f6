"""The plain oracle of the GPU ops, in eager torch, with the signatures of the Triton kernels.

The kernels are compared with it, and the torch backend runs it on a CPU. `mix_sample` calls the numpy oracle of sampling,
`reference`, row by row, so that the draw is defined in one place. The other ops compute in float32; a lower `dtype` rounds
where the kernels round, at the end of an op.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from . import reference
from .operands import (
    ADAPTER_TILE,
    FUSED_RULES,
    PLAIN_SCORES,
    AdapterTiles,
    AdapterWeight,
    DecodeRows,
    Draw,
    LayerCache,
    LinearWeight,
    Mixture,
    PrefillChunks,
    Scores,
)

Tensor = torch.Tensor


def residual_norm(
    branch: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """residual [rows, H] float32 += Σ branch [splits, rows, H], in place. Returns its norm [rows, H] in `dtype`: an RMS norm, or
    a layer norm if there is a bias."""
    if branch is not None:
        residual += branch.float().sum(0)
    x = residual if bias is None else residual - residual.mean(-1, keepdim=True)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (normed if bias is None else normed + bias.float()).to(dtype)


def activate(parts: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    """parts [splits, rows, 2 I] → silu(gate) · up ("swiglu") or gelu(gate) · up ("geglu"); [splits, rows, I] → gelu ("gelu"), or
    the exact one ("gelu_erf"). In `dtype`; gelu is the tanh approximation."""
    x = parts.float().sum(0)
    if activation in ("gelu", "gelu_erf"):
        return F.gelu(x, approximate="none" if activation == "gelu_erf" else "tanh").to(dtype)
    gate, up = x.chunk(2, dim=-1)
    inner: Tensor = (F.silu(gate) if activation == "swiglu" else F.gelu(gate, approximate="tanh")) * up
    return inner.to(dtype)


def rotary_write(
    qkv: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    positions: Tensor,
    slots: Tensor,
    cache: LayerCache,
    num_heads: int,
    dtype: torch.dtype,
) -> Tensor:
    """qkv [splits, rows, (heads + 2 kv_heads) · D] → queries [rows, heads, D]. Writes keys and values to their slots."""
    kv_heads, block_size, size = cache.keys.shape[1:]
    heads = qkv.float().sum(0).reshape(qkv.shape[1], -1, size)
    query, key, value = torch.split(heads, [num_heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        query, key = (F.rms_norm(x, (size,), w.float(), eps) for x, w in zip((query, key), norms, strict=True))
    if tables is not None:
        cos, sin = (table[positions.long()][:, None] for table in tables)  # [rows, 1, rotary size / 2]
        query, key = (_rotate(x, cos, sin) for x in (query, key))
    block, offset = slots.long() // block_size, slots.long() % block_size
    for x, target, scales in ((key, cache.keys, cache.key_scales), (value, cache.values, cache.value_scales)):
        if scales is not None:
            largest = 127.0 if target.dtype == torch.int8 else 448.0
            scale = (x.abs().amax(-1) / largest).clamp_min(1e-30)
            scales[block, :, offset] = scale
            x = x / scale[..., None]
            x = torch.floor(x + 0.5) if target.dtype == torch.int8 else x
        target[block, :, offset] = x.to(target.dtype)
    return query.to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    rotated: Tensor = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
    return rotated


def _context(cache: LayerCache, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [kv_heads, length, D] float32 of the first `length` positions of a block table."""
    blocks = table[: -(-length // cache.block_size)].long()
    found = []
    for stored, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
        x = stored[blocks].float()
        if scales is not None:
            x = x * scales[blocks][..., None]
        found.append(x.transpose(0, 1).flatten(1, 2)[:, :length])
    return found[0], found[1]


def _attend(query: Tensor, cache: LayerCache, table: Tensor, length: int, how: Scores) -> Tensor:
    """Causal attention [Q, heads, D] of query [Q, heads, D], the last Q of `length` positions. With a window, each sees only
    that many positions, its own included."""
    window = how.window
    keys, values = _context(cache, table, length)
    count, _, size = query.shape
    q = query.float().transpose(0, 1).reshape(len(keys), -1, count, size)  # [kv_heads, group, Q, D]
    scores = q @ keys[:, None].transpose(-1, -2) * how.scale_for(size)
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    place = torch.arange(length, device=query.device)
    own = place[length - count :, None]
    unseen = place > own if window is None else (place > own) | (place <= own - window)
    p = scores.masked_fill(unseen, float("-inf")).softmax(-1)
    out: Tensor = (p @ values[:, None]).flatten(0, 1).transpose(0, 1).to(query.dtype)
    return out


def decode_attention(
    query: Tensor, cache: LayerCache, rows: DecodeRows, out: Tensor, scores: Scores = PLAIN_SCORES
) -> None:
    """Write out[r] [heads, D] for each row r of `rows`. A row of length 0 gets zeros."""
    for row, seq, length in zip(rows.rows.tolist(), rows.seqs.tolist(), rows.lengths.tolist(), strict=True):
        out[row] = _attend(query[row : row + 1], cache, rows.tables[seq], length, scores)[0] if length else 0


def prefill_attention(
    query: Tensor, cache: LayerCache, chunks: PrefillChunks, out: Tensor, scores: Scores = PLAIN_SCORES
) -> None:
    """Write out[r] [heads, D] for each row r of the chunks."""
    fields = (chunks.starts, chunks.sizes, chunks.lengths, chunks.seqs)
    for start, size, length, seq in zip(*(field.tolist() for field in fields), strict=True):
        out[start : start + size] = _attend(query[start : start + size], cache, chunks.tables[seq], length, scores)


def dequantise(weight: LinearWeight) -> Tensor:
    """W [N, K]: float32 if it was quantised, else as it is stored."""
    if weight.scales is None:
        return weight.values
    q = weight.values
    if weight.bits == 4:
        q = torch.stack([q & 15, q >> 4], dim=-1).flatten(1)
    groups = q.float().reshape(len(q), len(weight.scales), -1)  # [N, groups, group_size]
    scales = weight.scales.float().t()[..., None]
    if weight.minima is None:
        return ((groups - 128) * scales).flatten(1)
    return (groups * scales + weight.minima.float().t()[..., None]).flatten(1)


def matmul(x: Tensor, weight: LinearWeight) -> Tensor:
    """x Wᵀ + bias as one part [1, M, N]: float32 for M ≤ 64, else in x's dtype."""
    product = F.linear(x.float(), dequantise(weight).float(), weight.bias)
    return product[None] if len(x) <= 64 else product[None].to(x.dtype)


def add_adapter(x: Tensor, weight: AdapterWeight, tiles: AdapterTiles, parts: Tensor) -> None:
    """parts[0, r] += B[d] (A[d] x[r]), in place, for every row r of the tiles; d is the row's adapter."""
    for order, adapter in zip(tiles.order.view(-1, ADAPTER_TILE), tiles.adapters.tolist(), strict=True):
        rows = order[order >= 0].long()
        if adapter >= 0 and len(rows):
            update = x[rows].float() @ weight.a[adapter].float().t() @ weight.b[adapter].float().t()
            parts[0, rows] += update.to(parts.dtype)


def mix_rows(hidden: Tensor, mixture: Mixture) -> Tensor:
    """Σ coefficient · hidden[row] for each request, [B, H] float32, added in the order of the terms."""
    mixed = torch.zeros(len(mixture.starts) - 1, hidden.shape[1], device=hidden.device)
    for request in range(len(mixed)):
        for term in range(int(mixture.starts[request]), int(mixture.starts[request + 1])):
            if mixture.coefficients[term] != 0:
                mixed[request] += mixture.coefficients[term] * hidden[mixture.rows[term]].float()
    return mixed


def mix_sample(logits: Tensor, mixture: Mixture, draw: Draw) -> tuple[Tensor, Tensor]:
    """Tokens [B] int32 and their log-probabilities [B] float32, drawn from mixes of the members' logits [R, vocab].

    The token is -1 if a mix has a NaN or no finite largest logit.
    """
    starts = mixture.starts.tolist()
    tokens = torch.full((len(starts) - 1,), -1, dtype=torch.int32, device=logits.device)
    logprobs = torch.full((len(starts) - 1,), float("nan"), device=logits.device)
    for request, (start, end) in enumerate(pairwise(starts)):
        rows = logits[mixture.rows[start:end].long()].float().cpu().numpy()
        space = "probs" if mixture.is_probs[request] else "logits"
        with np.errstate(invalid="ignore"):
            mixed = reference.mix(rows, mixture.coefficients[start:end].tolist(), space)
        if np.isnan(mixed).any() or not -np.inf < mixed.max() < np.inf:
            continue
        token = reference.sample(
            mixed,
            temperature=float(draw.temperature[request]),
            seed=int(draw.seeds[request]) % 2**64,
            position=int(draw.positions[request]),
            **{rule: float(getattr(draw, rule)[request]) for rule in FUSED_RULES},
        )
        tokens[request] = token
        logprobs[request] = float(reference.log_softmax(mixed)[token])
    return tokens, logprobs


def mix_head_sample(hidden: Tensor, head: LinearWeight, mixture: Mixture, draw: Draw) -> tuple[Tensor, Tensor]:
    """Mix hidden states, apply the head, and draw: tokens [B] int32 and their log-probabilities [B] float32."""
    logits = mix_rows(hidden, mixture) @ dequantise(head).float().t()
    count = len(logits)
    device = hidden.device
    single = Mixture(
        torch.arange(count + 1, dtype=torch.int32, device=device),
        torch.arange(count, dtype=torch.int32, device=device),
        torch.ones(count, device=device),
        torch.zeros(count, dtype=torch.int32, device=device),
        any_probs=False,
    )
    return mix_sample(logits, single, draw)
