"""The trained part of a decoder, computed only where the answers need it.

All positions are needed below the last layer, whose keys and values they make; of the last layer's queries, output
projection and MLP, and of the norm and the head, only those positions that predict an answer's token. The result is what
running all positions and picking those gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.checkpoints.decoder import Attention, Decoder, Layer, rotate
from ...runtime.model.rotary import rotary_tables

Dropout = Callable[[Tensor], Tensor]


def answer_states(decoder: Decoder, hidden: Tensor, split: int, positions: Tensor, dropout: Dropout) -> Tensor:
    """The input [B, S, hidden] of layer `split` → the normed hidden states [B, A, hidden] at `positions` [B, A]."""
    config = decoder.config
    tables = None
    if config.positions == "rotary":
        cos, sin = (torch.from_numpy(table[: hidden.shape[1]]) for table in rotary_tables(config))
        tables = (cos.to(hidden), sin.to(hidden))
    *layers, last = cast(list[Layer], list(decoder.model.layers)[split:])
    for layer in layers:
        hidden = hidden + dropout(layer.self_attn(layer.input_layernorm(hidden), tables))
        hidden = hidden + dropout(layer.mlp(layer.post_attention_layernorm(hidden)))
    rows = hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.shape[2]))  # [B, A, hidden]
    normed = last.input_layernorm(hidden)
    rows = rows + dropout(_attend(last.self_attn, normed, tables, positions))
    rows = rows + dropout(last.mlp(last.post_attention_layernorm(rows)))
    return decoder.norm(rows)


def _attend(attention: Attention, x: Tensor, tables: tuple[Tensor, Tensor] | None, positions: Tensor) -> Tensor:
    """Attention of the queries at `positions` [B, A] over all of x [B, S, hidden] → [B, A, hidden]."""
    size = attention.config.head_size
    wanted = x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))
    q = attention.q_proj(wanted).unflatten(-1, (-1, size))
    k, v = (p(x).unflatten(-1, (-1, size)) for p in (attention.k_proj, attention.v_proj))
    if attention.config.qk_norm:
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, heads, A or S, head_size]
    if tables is not None:
        cos, sin = tables
        q, k = rotate(q, cos[positions][:, None], sin[positions][:, None]), rotate(k, cos, sin)
    visible = torch.arange(x.shape[1], device=x.device) <= positions[:, :, None]  # [B, A, S]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], enable_gqa=True)
    result: Tensor = attention.o_proj(out.transpose(1, 2).flatten(2))
    return result
