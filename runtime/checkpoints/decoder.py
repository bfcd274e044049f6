"""The decoder on one page, in torch: for training, for export's fp32 reference, and as the oracle. Needs torch.

Derived from `DecoderConfig` alone; parameter names are the canonical ones (Hugging Face's llama names). Any slice of it
can be run apart: `embed` → `run_layers(…, 0, split)` is the trunk, `run_layers(…, split, L)` → `norm` a tail.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.config import DecoderConfig
from ..model.rotary import rotary_tables


def _norm(config: DecoderConfig, size: int | None = None) -> nn.Module:
    if config.norm == "rms" or size is not None:
        return nn.RMSNorm(size or config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, S, head_size]; cos, sin [S, head_size / 2]. Halves, not pairs (Hugging Face's layout)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(config.hidden_size, config.q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.q_size, config.hidden_size, bias=config.out_bias)
        if config.qk_norm:
            self.q_norm = _norm(config, config.head_size)
            self.k_norm = _norm(config, config.head_size)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:  # x [B, S, hidden]
        size = self.config.head_size
        q, k, v = (p(x).unflatten(-1, (-1, size)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, heads, S, head_size]
        if tables is not None:
            q, k = rotate(q, *tables), rotate(k, *tables)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        result: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return result


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        if self.gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = (
            F.silu(self.gate_proj(x)) * self.up_proj(x) if self.gated else F.gelu(self.up_proj(x), approximate="tanh")
        )
        result: Tensor = self.down_proj(inner)
        return result


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = _norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), tables)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class Body(nn.Module):
    """The checkpoint's `model.`: embeddings, layers, final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = _norm(config)


class Decoder(nn.Module):
    """A decoder-only language model: token ids [B, S] → logits [B, S, vocab]."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        if not config.tied_head:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def from_weights(cls, config: DecoderConfig, weights: Mapping[str, Tensor]) -> Decoder:
        """A decoder on `weights` (shared, not copied; canonical names, see `checkpoint.read_weights`)."""
        with torch.device("meta"):
            decoder = cls(config)
        decoder.load_state_dict(dict(weights), strict=True, assign=True)
        return decoder

    @classmethod
    def from_dir(cls, model_dir: Path) -> Decoder:
        """Read a Hugging Face model directory (errors: see `checkpoint.read_weights`)."""
        from .huggingface import read_config, read_weights

        return cls.from_weights(read_config(model_dir), read_weights(model_dir))

    def embed(self, token_ids: Tensor) -> Tensor:  # [B, S] → [B, S, hidden]
        hidden: Tensor = self.model.embed_tokens(token_ids)
        if self.config.positions == "learned":
            hidden = hidden + self.model.embed_positions(torch.arange(token_ids.shape[1], device=token_ids.device))
        return hidden

    def run_layers(self, hidden: Tensor, start: int, stop: int) -> Tensor:  # [B, S, hidden] → [B, S, hidden]
        tables = None
        if self.config.positions == "rotary" and stop > start:
            cos, sin = (torch.from_numpy(table[: hidden.shape[1]]) for table in rotary_tables(self.config))
            tables = (cos.to(hidden), sin.to(hidden))
        for layer in self.model.layers[start:stop]:
            hidden = layer(hidden, tables)
        return hidden

    def norm(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.model.norm(hidden)
        return result

    def head(self, hidden: Tensor) -> Tensor:  # [..., hidden] → [..., vocab]
        return F.linear(hidden, self.model.embed_tokens.weight if self.config.tied_head else self.lm_head.weight)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.head(self.norm(self.run_layers(self.embed(token_ids), 0, self.config.num_layers)))
