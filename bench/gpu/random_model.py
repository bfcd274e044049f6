"""Models of known shapes with random weights, made on the device. The speed of a step does not depend on the values."""

from __future__ import annotations

import torch

from ...kernels.oracle.operands import LinearWeight
from ...runtime.backends.torch.weights import LayerWeights, LinearLayer, MLPWeights, ModelWeights, Norm
from ...runtime.errors import ConfigError
from ...runtime.model import layout
from ...runtime.model.config import DecoderConfig
from ...runtime.model.rotary import rotary_tables


def _llama(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, size: int, **more: object
) -> DecoderConfig:
    values = {
        "family": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_size": size,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    }
    return DecoderConfig.from_dict(values | more)


SHAPES = {
    "llama-8b": _llama(128256, 4096, 14336, 32, 32, 8, 128, tied_head=False),
    "llama-1b": _llama(128256, 2048, 8192, 16, 32, 8, 64),
    "smollm2-135m": _llama(49152, 576, 1536, 30, 9, 3, 64, rope_theta=100000.0),
}


def shape(name: str) -> DecoderConfig:
    """The configuration of a named shape. Raises `ConfigError` for an unknown name."""
    if name not in SHAPES:
        raise ConfigError(f"'{name}' is no known shape; known are {sorted(SHAPES)}")
    return SHAPES[name]


class RandomModel:
    """Makes random `ModelWeights` of a shape. 16 bits: dense in `dtype`; 8 and 4: quantised in groups (head and
    embedding keep 8)."""

    def __init__(
        self, config: DecoderConfig, bits: int, device: torch.device, dtype: torch.dtype, group_size: int = 32
    ) -> None:
        if bits not in (16, 8, 4):
            raise ConfigError(f"bits must be 16, 8 or 4, got {bits}")
        self._config, self._bits, self._device, self._dtype, self._group = config, bits, device, dtype, group_size

    def weights(self, num_tails: int = 1, tail_layers: int = 0) -> ModelWeights:
        """One trunk and `num_tails` tails of `tail_layers` layers each."""
        config = self._config
        table = layout.decoder_layout(config)
        split = config.num_layers - tail_layers
        tied = self._linear(config.vocab_size, config.hidden_size, max(self._bits, 8))
        tables = {name: torch.from_numpy(table).to(self._device) for name, table in rotary_tables(config).items()}
        return ModelWeights(
            embedding=tied,
            position_embedding=None,
            rotary={names: (tables[names[0]], tables[names[1]]) for names in table.rotary_tables},
            trunk=[self._layer(layer) for layer in table.layers[:split]],
            tails=[[self._layer(layer) for layer in table.layers[split:]] for _ in range(num_tails)],
            tail_of=tuple(range(num_tails)),
            norms=[self._norm(table.norm) for _ in range(num_tails)],
            adapter_of=(-1,) * num_tails,
            head=tied if config.tied_head else self._linear(config.vocab_size, config.hidden_size, max(self._bits, 8)),
        )

    def _layer(self, layer: layout.Layer) -> LayerWeights:
        qkv, out, up, down = (self._projection(linear) for linear in layer.linears)
        assert layer.attention_norm is not None and layer.mlp_norm is not None, "norms are before attention and MLP"
        return LayerWeights(
            attention_norm=self._norm(layer.attention_norm),
            qkv=qkv,
            head_norms=None,
            out=out,
            mlp_norm=self._norm(layer.mlp_norm),
            mlps=[MLPWeights(up, layer.mlp.up.epilogue, down)],
            parallel=layer.parallel,
        )

    def _projection(self, linear: layout.Linear) -> LinearLayer:
        return LinearLayer(self._linear(linear.rows, linear.columns, self._bits), None)

    def _norm(self, norm: layout.Norm) -> Norm:
        return Norm(torch.ones(norm.size, device=self._device), None)

    def _linear(self, n: int, k: int, bits: int) -> LinearWeight:
        device = self._device
        if bits == 16:
            return LinearWeight((torch.randn(n, k, device=device, dtype=self._dtype) * k**-0.5).contiguous())
        values = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8, device=device)
        kind = torch.float32 if self._dtype is torch.float32 else torch.float16
        # Uniform values with step s have a deviation of s · 2^bits / √12; it shall be k^-0.5, as of a dense weight.
        step = (12.0 / k) ** 0.5 / 2**bits
        scales = torch.full((k // self._group, n), step, dtype=kind, device=device)
        return LinearWeight(values, scales, None if bits == 8 else -7.5 * scales)
