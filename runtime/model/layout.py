"""The table of a decoder's weights, derived from `DecoderConfig`: every weight, its shape, and how it is stored.

The decoder in torch, calibration, fusing, the graphs, the loaders of all backends, random models and the benches read
this table. Names are canonical (Hugging Face's llama names) and complete: `model.layers.3.self_attn.qkv_proj`.

A checkpoint stores the *parts* of a linear layer (q, k, v). A bundle stores the fused linear layer: the parts' rows,
one part after the other, because they have the same input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .config import DecoderConfig

EMBEDDING = "model.embed_tokens.weight"
POSITIONS = "model.embed_positions.weight"
HEAD = "lm_head.weight"
# (cosines, sines): tables that are in a bundle but in no checkpoint
ROTARY = ("rotary.cos", "rotary.sin")
WINDOW_ROTARY = ("rotary.window_cos", "rotary.window_sin")  # of layers with a window, where theirs differ

Epilogue = Literal["store", "add", "swiglu", "geglu", "gelu", "gelu_erf"]


@dataclass(frozen=True, slots=True)
class Part:
    """A projection as checkpoints store it: `<name>.weight` [rows, columns of its linear layer]."""

    name: str
    rows: int

    @property
    def short_name(self) -> str:
        """The name that users write, such as `q_proj`."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer as a bundle stores it: `<name>.weight` [rows, columns], and `<name>.bias` [rows] with `bias`.

    `epilogue` says what happens to the product: it is stored, added to the residual stream, or activated (swiglu,
    geglu: the parts are gate and up, and the result has half as many rows). `source` is the module whose output channels scale
    this layer's input channels one to one: the norm before it, or the up projection of a gated MLP; None if there is
    none.
    """

    name: str
    parts: tuple[Part, ...]
    columns: int
    bias: bool
    epilogue: Epilogue
    source: str | None

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)


@dataclass(frozen=True, slots=True)
class Norm:
    """`<name>.weight` [size], and `<name>.bias` [size] of a layer norm."""

    name: str
    size: int
    kind: Literal["rms", "layer"]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of its tensors: the weight, then the bias of a layer norm."""
        return (f"{self.name}.weight", f"{self.name}.bias") if self.kind == "layer" else (f"{self.name}.weight",)


@dataclass(frozen=True, slots=True)
class MLP:
    """down(activation(up(x)))."""

    up: Linear  # gate and up, if the activation is gated
    down: Linear


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: x += out_norm(attention(norm(x))), and the same with the MLP; norms that are None do nothing.

    `parallel`: the MLP reads x as it is before attention, and both are added to it; its norm may be attention's.
    With a `router`, a row's MLP is a weighted sum of some of `mlps`.
    `head_norms`: norms of q and of k before rotary, over each head or over all of them (`Norm.size`). `rotary`: names of the
    tables (cosines, sines) by which q and k are rotated; None: they are not. `window`: how many positions a row attends to,
    its own included; None: its own and all before it."""

    attention_norm: Norm | None
    qkv: Linear
    head_norms: tuple[Norm, Norm] | None
    out: Linear
    attention_out_norm: Norm | None
    mlp_norm: Norm | None
    mlps: tuple[MLP, ...]  # one, or the experts
    router: str | None  # of the experts: `<router>.weight` [experts, hidden], never quantised
    mlp_out_norm: Norm | None
    parallel: bool
    rotary: tuple[str, str] | None
    window: int | None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers, in the order in which they run; of experts, up and down of each."""
        return self.qkv, self.out, *(linear for mlp in self.mlps for linear in (mlp.up, mlp.down))

    @property
    def adaptable(self) -> tuple[Linear, ...]:
        """Those that may have low-rank updates beside them."""
        return self.linears if self.router is None else (self.qkv, self.out)

    @property
    def mlp(self) -> MLP:
        """The only one. Raises `ValueError` if there are experts."""
        (only,) = self.mlps
        return only

    @property
    def norms(self) -> tuple[Norm, ...]:
        own = (self.attention_norm, *(self.head_norms or ()))
        found = (*own, self.attention_out_norm, self.mlp_norm, self.mlp_out_norm)
        return tuple(dict.fromkeys(norm for norm in found if norm is not None))


@dataclass(frozen=True, slots=True)
class Layout:
    """A whole decoder: its layers and the norm after them. Embedding and head are [vocab_size, hidden_size]."""

    config: DecoderConfig
    layers: tuple[Layer, ...]
    norm: Norm

    @property
    def head(self) -> str:
        """Name of the head's weight: the embedding if they are tied."""
        return EMBEDDING if self.config.tied_head else HEAD

    @property
    def linears(self) -> Iterator[Linear]:
        return (linear for layer in self.layers for linear in layer.linears)

    @property
    def norm_tensors(self) -> frozenset[str]:
        norms = (*(norm for layer in self.layers for norm in layer.norms), self.norm)
        return frozenset(name for norm in norms for name in norm.tensors)

    @property
    def rotary_tables(self) -> tuple[tuple[str, str], ...]:
        """The pairs of tables that some layer uses."""
        return tuple(dict.fromkeys(layer.rotary for layer in self.layers if layer.rotary is not None))

    @property
    def targets(self) -> tuple[str, ...]:
        """Short names of the projections that an adapter may change: those of a layer, but not of experts."""
        linears = min((layer.adaptable for layer in self.layers), key=len)
        return tuple(part.short_name for linear in linears for part in linear.parts)

    @property
    def adaptable(self) -> Iterator[Linear]:
        return (linear for layer in self.layers for linear in layer.adaptable)

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape of every tensor of a checkpoint."""
        config = self.config
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
        if config.positions == "learned":
            shapes[POSITIONS] = (config.max_position_embeddings, config.hidden_size)
        for norm in (*(norm for layer in self.layers for norm in layer.norms), self.norm):
            shapes |= dict.fromkeys(norm.tensors, (norm.size,))
        for layer in self.layers:
            if layer.router is not None:
                shapes[f"{layer.router}.weight"] = (config.num_experts, config.hidden_size)
        for linear in self.linears:
            for part in linear.parts:
                shapes[f"{part.name}.weight"] = (part.rows, linear.columns)
                if linear.bias:
                    shapes[f"{part.name}.bias"] = (part.rows,)
        return shapes | {self.head: (config.vocab_size, config.hidden_size)}


def decoder_layout(config: DecoderConfig) -> Layout:
    """The table of a decoder's weights."""
    layers = tuple(_layer(config, index) for index in range(config.num_layers))
    return Layout(config, layers, Norm("model.norm", config.hidden_size, config.norm))


def _layer(config: DecoderConfig, index: int) -> Layer:
    name, hidden = f"model.layers.{index}", config.hidden_size
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    before, after = config.norm_places != "after", config.norm_places != "before"
    names = _NORMS if after else _NORMS_BEFORE
    norms = {place: Norm(f"{name}.{own}", hidden, config.norm) for place, own in names.items()}
    attention_norm, mlp_norm = (norms[place] if before else None for place in ("attention", "mlp"))
    mlp_norm = attention_norm if config.shared_norm else mlp_norm
    sizes = {"q": config.q_size, "k": config.kv_size, "v": config.kv_size}
    has_experts = config.num_experts > 0 and index not in config.dense_layers
    windowed = config.sliding_window is not None and (config.window_layers is None or index in config.window_layers)
    rotates = config.positions == "rotary" and index not in config.unrotated_layers
    return Layer(
        attention_norm=attention_norm,
        qkv=Linear(
            name=f"{attention}.qkv_proj",
            parts=tuple(Part(f"{attention}.{part}_proj", rows) for part, rows in sizes.items()),
            columns=hidden,
            bias=config.qkv_bias,
            epilogue="store",
            source=None if config.shared_norm else _name(attention_norm),
        ),
        head_norms=_head_norms(config, attention),
        out=_whole(Part(f"{attention}.o_proj", hidden), config.q_size, config.out_bias, "add", None),
        attention_out_norm=norms["attention_out"] if after else None,
        mlp_norm=mlp_norm,
        mlps=tuple(
            # The router reads the norm, too, so it does not scale the experts' inputs alone.
            _mlp(config, f"{mlp}.experts.{expert}", config.expert_size, None)
            for expert in range(config.num_experts)
        )
        if has_experts
        else (_mlp(config, mlp, config.intermediate_size, None if config.shared_norm else _name(mlp_norm)),),
        router=f"{mlp}.gate" if has_experts else None,
        mlp_out_norm=norms["mlp_out"] if after else None,
        parallel=config.parallel_residual,
        rotary=None if not rotates else WINDOW_ROTARY if windowed and config.window_rope_theta is not None else ROTARY,
        window=config.sliding_window if windowed else None,
    )


# Place of a norm → its name in checkpoints. Where there are norms of what is added, the second name means something else.
_NORMS_BEFORE = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
_NORMS = {
    "attention": "input_layernorm",
    "attention_out": "post_attention_layernorm",
    "mlp": "pre_feedforward_layernorm",
    "mlp_out": "post_feedforward_layernorm",
}


def _mlp(config: DecoderConfig, name: str, inner: int, source: str | None) -> MLP:
    up, hidden, bias = Part(f"{name}.up_proj", inner), config.hidden_size, config.mlp_bias
    down = Part(f"{name}.down_proj", hidden)
    if config.activation in ("gelu", "gelu_erf"):  # activated(gate) · up is linear in up; gelu(up) is not
        return MLP(_whole(up, hidden, bias, config.activation, source), _whole(down, inner, bias, "add", None))
    parts = (Part(f"{name}.gate_proj", inner), up)
    both = Linear(f"{name}.gate_up_proj", parts, hidden, bias, config.activation, source)
    return MLP(both, _whole(down, inner, bias, "add", up.name))


def _head_norms(config: DecoderConfig, attention: str) -> tuple[Norm, Norm] | None:
    if config.qk_norm is None:
        return None
    sizes = (config.head_size,) * 2 if config.qk_norm == "head" else (config.q_size, config.kv_size)
    return Norm(f"{attention}.q_norm", sizes[0], "rms"), Norm(f"{attention}.k_norm", sizes[1], "rms")


def _name(norm: Norm | None) -> str | None:
    return None if norm is None else norm.name


def _whole(part: Part, columns: int, bias: bool, epilogue: Epilogue, source: str | None) -> Linear:
    """A linear layer of one part, which a bundle stores as the checkpoint does."""
    return Linear(part.name, (part,), columns, bias, epilogue, source)
