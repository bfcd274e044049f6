"""The decoder in torch: for training, for export's fp32 reference, and as the oracle. Needs torch.

It is derived from `DecoderConfig` alone; parameter names are the canonical ones (Hugging Face's llama names). Any
slice of it can be run: `embed` → `run_layers(…, 0, split)` is the trunk, `run_layers(…, split, L)` → `norm` a tail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import layout
from ..model.config import DecoderConfig
from ..model.rotary import rotary_tables

Dropout = Callable[[Tensor], Tensor]


def _norm(norm: layout.Norm, eps: float) -> nn.Module:
    return nn.RMSNorm(norm.size, eps=eps) if norm.kind == "rms" else nn.LayerNorm(norm.size, eps=eps)


def _softcap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else torch.tanh(x / cap) * cap


def _projections(linear: layout.Linear) -> Iterator[nn.Linear]:
    return (nn.Linear(linear.columns, part.rows, bias=linear.bias) for part in linear.parts)


def _keep(x: Tensor) -> Tensor:
    return x


def _rows(x: Tensor, positions: Tensor | None) -> Tensor:
    """x [B, S, hidden] at `positions` [B, A] → [B, A, hidden]; None: x itself."""
    return x if positions is None else x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, S, head_size]; cos, sin [S, r / 2]: the first r channels rotate, i paired with i + r / 2 (Hugging Face's
    layout)."""
    half = cos.shape[-1]
    first, second, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def softcapped_attention(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor, enable_gqa: bool, scale: float | None, softcap: float
) -> Tensor:
    """`F.scaled_dot_product_attention` whose scores s become softcap · tanh(s / softcap)."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    attended: Tensor = _softcap(scores, softcap).masked_fill(~attn_mask, float("-inf")).softmax(-1) @ v
    return attended


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: layout.Layer) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.q_proj, self.k_proj, self.v_proj = _projections(layer.qkv)
        (self.o_proj,) = _projections(layer.out)
        self.head_norms = config.qk_norm
        if layer.head_norms is not None:
            self.q_norm, self.k_norm = (_norm(norm, config.norm_eps) for norm in layer.head_norms)
        self.rotary = layer.rotary
        self.window = layer.window
        self.scale, self.softcap = config.attention_scale, config.attention_softcap

    def forward(self, x: Tensor, tables: Mapping[str, Tensor], positions: Tensor | None = None) -> Tensor:
        """x [B, S, hidden] → [B, S, hidden]; with `positions` [B, A] only the rows of these queries → [B, A,
        hidden]."""
        q, k, v = self.q_proj(_rows(x, positions)), self.k_proj(x), self.v_proj(x)
        if self.head_norms == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_size)) for t in (q, k, v))
        if self.head_norms == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, heads, S, head_size]; q may have A instead of S
        if self.rotary is not None:
            cos, sin = (tables[name] for name in self.rotary)
            at = (cos, sin) if positions is None else (cos[positions][:, None], sin[positions][:, None])
            q, k = rotate(q, *at), rotate(k, cos, sin)
        if positions is None and self.window is None and self.softcap is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=self.scale)
        else:
            places = torch.arange(x.shape[1], device=x.device)
            own = (places[None] if positions is None else positions)[:, :, None]  # [B or 1, A or S, 1]
            visible = places <= own if self.window is None else (places <= own) & (places > own - self.window)
            attend = F.scaled_dot_product_attention
            if self.softcap is not None:
                attend = partial(softcapped_attention, softcap=self.softcap)
            out = attend(q, k, v, attn_mask=visible[:, None], enable_gqa=True, scale=self.scale)
        result: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return result


class MLP(nn.Module):
    def __init__(self, mlp: layout.MLP) -> None:
        super().__init__()
        self.activation = mlp.up.epilogue
        if self.activation in ("swiglu", "geglu"):
            self.gate_proj, self.up_proj = _projections(mlp.up)
        else:
            (self.up_proj,) = _projections(mlp.up)
        (self.down_proj,) = _projections(mlp.down)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "swiglu":
            inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        elif self.activation == "geglu":
            inner = F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x)
        else:
            inner = F.gelu(self.up_proj(x), approximate="none" if self.activation == "gelu_erf" else "tanh")
        result: Tensor = self.down_proj(inner)
        return result


class Experts(nn.Module):
    """A row's experts are the most probable ones; their results are added in ascending order."""

    def __init__(self, config: DecoderConfig, layer: layout.Layer) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(MLP(mlp) for mlp in layer.mlps)
        self.count, self.normalises = config.experts_per_token, config.normalises_experts

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        shares, chosen = self.gate(rows).softmax(-1).topk(self.count, dim=-1)
        if self.normalises:
            shares = shares / shares.sum(-1, keepdim=True)
        result = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            row, place = torch.where(chosen == index)
            if len(row):
                result = result.index_add(0, row, expert(rows[row]) * shares[row, place, None])
        return result.view_as(x)


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig, layer: layout.Layer) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(layer.mlp) if layer.router is None else Experts(config, layer)
        self.residual_scale, self.parallel = config.residual_scale, layer.parallel
        self.places = []  # modules of the norms around attention and MLP; their names are the checkpoint's
        for norm in (layer.attention_norm, layer.attention_out_norm, layer.mlp_norm, layer.mlp_out_norm):
            name = "" if norm is None else norm.name.rpartition(".")[2]
            self.places.append(name)
            if norm is not None:
                setattr(self, name, _norm(norm, config.norm_eps))

    def forward(
        self, x: Tensor, tables: Mapping[str, Tensor], positions: Tensor | None = None, dropout: Dropout = _keep
    ) -> Tensor:
        """x [B, S, hidden] → [B, S, hidden]; with `positions` [B, A] only these rows → [B, A, hidden], and the others
        only make keys and values. `dropout` is applied to what is added to the residual stream."""
        before, after, mlp_before, mlp_after = (getattr(self, name) if name else _keep for name in self.places)
        attended = after(self.self_attn(before(x), tables, positions))
        own = _rows(x, positions)
        x = own + dropout(attended) * self.residual_scale
        inner = mlp_before(own if self.parallel else x)
        return x + dropout(mlp_after(self.mlp(inner))) * self.residual_scale


class Body(nn.Module):
    """The modules under `model.` in a checkpoint: embeddings, layers, final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        table = layout.decoder_layout(config)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in table.layers)
        self.norm = _norm(table.norm, config.norm_eps)


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
        """A decoder on `weights` (shared, not copied; canonical names, see `huggingface.read_weights`)."""
        with torch.device("meta"):
            decoder = cls(config)
        decoder.load_state_dict(dict(weights), strict=True, assign=True)
        return decoder

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor], *modules: str) -> Iterator[None]:
        """Hold the weights of these modules, and of those in them, inside the block only: for a decoder of the device `meta`,
        most of whose weights are not in memory."""
        names = [name for name in weights if any(name.startswith(f"{module}.") for module in modules)]
        self.load_state_dict({name: weights[name] for name in names}, strict=False, assign=True)
        try:
            yield
        finally:
            for module in modules:
                self.get_submodule(module).to("meta")

    @classmethod
    def from_dir(cls, model_dir: Path) -> Decoder:
        """Read a Hugging Face model directory (errors: see `huggingface.read_weights`)."""
        from .huggingface import read_config, read_weights

        return cls.from_weights(read_config(model_dir), read_weights(model_dir))

    def run_streamed(
        self,
        weights: Mapping[str, Tensor],
        chunks: Sequence[Sequence[int]],
        prepare: Callable[[int], AbstractContextManager[None]] | None = None,
    ) -> list[Tensor]:
        """Hidden states [S, hidden] after the last layer, of each chunk of token ids, for a decoder of the device `meta`: each
        layer's weights are held while all chunks run through it. `prepare(layer)` is entered meanwhile."""
        tables = ("model.embed_tokens", *(("model.embed_positions",) if self.config.positions == "learned" else ()))
        with torch.no_grad():
            with self.holding(weights, *tables):
                states = [self.embed(torch.tensor([list(chunk)])) for chunk in chunks]
            for index in range(self.config.num_layers):
                with self.holding(weights, f"model.layers.{index}"), prepare(index) if prepare else nullcontext():
                    states = [self.run_layers(hidden, index, index + 1) for hidden in states]
        return [hidden[0] for hidden in states]

    def embed(self, token_ids: Tensor, spans: Iterable[tuple[int, int, Tensor]] = ()) -> Tensor:
        """[B, S] → [B, S, hidden]. `spans`: (example, start, rows [n, hidden]) that come in the place of n tokens' embeddings."""
        hidden: Tensor = self.model.embed_tokens(token_ids) * self.config.embedding_scale
        for example, start, rows in spans:
            hidden[example, start : start + len(rows)] = rows.to(hidden)
        if self.config.positions == "learned":
            hidden = hidden + self.model.embed_positions(torch.arange(token_ids.shape[1], device=token_ids.device))
        return hidden

    def run_layers(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        *,
        positions: Tensor | None = None,
        dropout: Dropout = _keep,
    ) -> Tensor:
        """hidden [B, S, hidden] through layers `start` to `stop` → [B, S, hidden].

        With `positions` [B, A] the last of these layers computes only these rows → [B, A, hidden]. The result equals
        running all rows and selecting these.
        """
        tables: dict[str, Tensor] = {}
        if self.config.positions == "rotary" and stop > start:
            for name, table in rotary_tables(self.config, hidden.shape[1]).items():
                tables[name] = torch.from_numpy(table).to(hidden)
        for index in range(start, stop):
            hidden = self.model.layers[index](hidden, tables, positions if index + 1 == stop else None, dropout)
        return hidden if stop > start else _rows(hidden, positions)

    def norm(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.model.norm(hidden)
        return result

    def head(self, hidden: Tensor) -> Tensor:  # [..., hidden] → [..., vocab]
        weight = self.model.embed_tokens.weight if self.config.tied_head else self.lm_head.weight
        return _softcap(F.linear(hidden, weight) * self.config.logit_scale, self.config.logit_softcap)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.head(self.norm(self.run_layers(self.embed(token_ids), 0, self.config.num_layers)))
