"""The encoder of images: a SigLIP vision tower, pixel shuffle, a linear projector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model.encoders.image import ImageEncoder, VisionConfig
from .page import Attention, EncoderPage, projector_of


class _MLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return result


class _Layer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config.hidden_size, config.num_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.layer_norm1(x)
        x = x + self.self_attn(normed, normed)
        result: Tensor = x + self.mlp(self.layer_norm2(x))
        return result


class _Tower(nn.Module):
    """Parameter names are those of transformers' Idefics3VisionTransformer."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        config = encoder.vision
        assert isinstance(config, VisionConfig)
        self.side, self.own = config.side, encoder.processor.tile_size // config.patch_size
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.embeddings.position_embedding = nn.Embedding(config.side**2, config.hidden_size)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def positions(self) -> Tensor:
        """What is added to the patches of a tile, [patches, hidden]: each takes the position that has the same place, as a
        fraction of the edge. The fractions are float32, as in transformers: where they fall on a limit, rounding decides."""
        limits = torch.arange(1 / self.side, 1.0, 1 / self.side)
        places = torch.arange(self.own, dtype=torch.float32) * (1.0 / torch.tensor(self.own))
        index = torch.bucketize(places.clamp(max=1.0 - 1e-6), limits, right=True)
        table: Tensor = self.embeddings.position_embedding.weight  # type: ignore[union-attr, assignment]
        return table[(index[:, None] * self.side + index[None, :]).flatten()]

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.positions()  # type: ignore[operator]
        for layer in self.encoder.layers:  # type: ignore[union-attr]
            x = layer(x)
        result: Tensor = self.post_layernorm(x)
        return result


class SiglipPage(EncoderPage):
    """Pixels [tiles, 3, edge, edge], normalised → rows [tiles, rows of a tile, hidden size of the text model]."""

    encoder: ImageEncoder

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        assert isinstance(encoder.vision, VisionConfig)
        self.encoder, self.vision = encoder, encoder.vision
        self.tower = _Tower(encoder)
        self.projector = projector_of(encoder, encoder.vision.width)

    def features(self, inputs: Tensor) -> Tensor:
        x = self.tower(inputs)
        side, shuffle = self.tower.own, self.vision.shuffle
        x = x.view(len(x), side // shuffle, shuffle, side // shuffle, shuffle, -1).transpose(2, 3)
        result: Tensor = x.flatten(3).flatten(1, 2)
        return result

    def example(self) -> Tensor:
        edge = self.encoder.processor.tile_size
        pixels = torch.rand(2, 3, edge, edge, generator=torch.Generator().manual_seed(0)) * 2 - 1
        pixels[1] = pixels[1, :, :1, :1]
        return pixels
