"""The encoder of sounds: Whisper's encoder, frames that are averaged or stacked to rows, a projector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model.encoders.audio import AudioEncoder, WhisperConfig
from .page import Attention, EncoderPage, projector_of


class _Layer(nn.Module):
    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.self_attn_layer_norm = nn.LayerNorm(size, config.norm_eps)
        self.self_attn = Attention(config.hidden_size, config.num_heads, key_bias=False)
        self.final_layer_norm = nn.LayerNorm(size, config.norm_eps)
        self.fc1, self.fc2 = nn.Linear(size, config.intermediate_size), nn.Linear(config.intermediate_size, size)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.self_attn_layer_norm(x)
        x = x + self.self_attn(normed, normed)
        result: Tensor = x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))
        return result


class _Tower(nn.Module):
    """Parameter names are those of transformers' WhisperEncoder."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.conv1 = nn.Conv1d(config.mel_bins, size, 3, padding=1)
        self.conv2 = nn.Conv1d(size, size, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_positions, size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.layer_norm = nn.LayerNorm(size, config.norm_eps)

    def frames(self, mel: Tensor) -> Tensor:
        """Before the last norm, [sounds, frames, hidden]."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel))))[..., :-1].transpose(1, 2)
        x = x + self.embed_positions.weight[: x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return x


class WhisperPage(EncoderPage):
    """Spectrograms [sounds, mel bins, 2 · frames + 1] → rows [sounds, frames // pool, hidden size of the text model]. The last
    column is what comes after the frames, zeros at the end of a piece: the last frame's convolution reaches into it."""

    encoder: AudioEncoder

    def __init__(self, encoder: AudioEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.tower = _Tower(encoder.tower)
        self.projector = projector_of(encoder, encoder.width)

    def features(self, inputs: Tensor) -> Tensor:
        x, pool = self.tower.frames(inputs), self.encoder.pool
        rows = x.shape[1] // pool
        x = x[:, : rows * pool].reshape(len(x), rows, pool, -1)
        average = self.encoder.pooling == "average"
        result: Tensor = self.tower.layer_norm(x.mean(2) if average else x)
        return result if average else result.flatten(2)

    def example(self) -> Tensor:
        tower = self.encoder.tower
        frames = min(tower.max_positions, 4 * self.encoder.pool + 1)
        mel = torch.rand(2, tower.mel_bins, 2 * frames + 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
        mel[1] = mel[1, :, :1]
        return mel
