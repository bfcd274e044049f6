"""`EncoderPage`: an encoder in torch, export's reference, and what its graph is written from. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import BundleError, UnsupportedModelError, shown
from ...model.encoders import Encoder
from ...model.encoders.image import RESAMPLER_HEADS, ImageEncoder


class Attention(nn.Module):
    """Of x [B, Q, size] to y [B, P, size], all of it → [B, Q, size]."""

    def __init__(self, size: int, heads: int, *, key_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.v_proj, self.out_proj = (nn.Linear(size, size) for _ in range(3))
        self.k_proj = nn.Linear(size, size, bias=key_bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        parts = (self.q_proj(x), self.k_proj(y), self.v_proj(y))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        result: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return result


class Resampler(nn.Module):
    """A fixed number of rows that attend to all places of a tile (Alayrac et al. 2022): what no place alone can say, such as how
    many there are, needs all of them. The places attend to each other first. [B, places, width] → [B, queries, output size]."""

    def __init__(self, encoder: ImageEncoder, width: int) -> None:
        super().__init__()
        size, queries = encoder.projector_size, encoder.queries
        assert size is not None and queries is not None
        self.input = nn.Linear(width, size)  # the first linear layer, and `output` the last: training scales them
        self.positions = nn.Parameter(torch.randn(encoder.places, size) * 0.1)
        self.queries = nn.Parameter(torch.randn(queries, size))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(4))
        self.attention, self.cross = (Attention(size, RESAMPLER_HEADS) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.inner, self.output = nn.Linear(size, 2 * size), nn.Linear(2 * size, encoder.output_size)

    def forward(self, features: Tensor) -> Tensor:
        x = self.input(features) + self.positions
        y = self.norms[0](x)
        x = x + self.attention(y, y)
        x = x + self.fc2(F.gelu(self.fc1(self.norms[1](x))))
        queries = self.queries.expand(len(x), -1, -1)
        queries = queries + self.cross(queries, self.norms[2](x))
        rows: Tensor = self.output(F.gelu(self.inner(self.norms[3](queries))))
        return rows


def projector_of(encoder: Encoder, width: int) -> nn.Module:
    """[inputs, rows, width] → [inputs, rows, hidden size of the text model], with random weights. A resampler gets places, not
    rows."""
    if isinstance(encoder, ImageEncoder) and encoder.projector == "resampler":
        return Resampler(encoder, width)
    hidden, bias = encoder.projector_size, encoder.projector_bias
    if hidden is None:
        return nn.Linear(width, encoder.output_size, bias)
    return nn.Sequential(nn.Linear(width, hidden, bias), nn.GELU(), nn.Linear(hidden, encoder.output_size, bias))


class EncoderPage(nn.Module):
    """An encoder, derived from its configuration alone. `features` runs what was trained before, with what has no weights behind
    it; `projector` ([..., width] → [..., hidden size of the text model]) makes embeddings of its rows. Parameters are named
    `tower.…` and `projector.…`."""

    encoder: Encoder
    projector: nn.Module

    def features(self, inputs: Tensor) -> Tensor:
        """What the projector gets: [inputs, rows, width]."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        """[inputs, rows, hidden size of the text model]."""
        result: Tensor = self.projector(self.features(inputs))
        return result

    def example(self) -> Tensor:
        """Inputs of noise and of one value, for comparisons."""
        raise NotImplementedError

    @classmethod
    def from_tensors(cls, encoder: Encoder, tensors: Mapping[str, Tensor], where: Path) -> Self:
        """The encoder with weights in float32, under the page's names. `where`: the directory that they are from. Raises
        `BundleError` for weights that are missing, misshapen or not finite, `UnsupportedModelError` for weights that it does
        not have."""
        if encoder.num_layers > len(tensors):  # asked before so many modules are made
            raise BundleError(
                f"the encoder of '{where}' says that it has {encoder.num_layers} layers, and there are {len(tensors)} weights"
            )
        with torch.device("meta"):
            page = cls(encoder)
        _check(where, {name: tuple(own.shape) for name, own in page.state_dict().items()}, tensors)
        page.load_state_dict(tensors, strict=True, assign=True)
        return page.eval()


def _check(where: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> None:
    unknown, missing = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
    if unknown:
        raise UnsupportedModelError(f"'{where}' holds weights that its encoder does not use: {shown(unknown)}")
    wrong = sorted(name for name, tensor in found.items() if tuple(tensor.shape) != expected[name])
    if missing or wrong:
        raise BundleError(
            f"the encoder's weights of '{where}' do not fit its config.json: missing {shown(missing)}, of other shapes "
            f"{shown(wrong)}"
        )
    damaged = sorted(
        name for name, tensor in found.items() if not tensor.is_floating_point() or not torch.isfinite(tensor).all()
    )
    if damaged:
        raise BundleError(
            f"{shown(damaged)} of '{where}' hold NaN or infinite values, or no floats; the training or the conversion failed"
        )
