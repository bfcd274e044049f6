"""`EncoderPage`: an encoder in torch, export's reference, and what its graph is written from. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from ...errors import BundleError, UnsupportedModelError, shown
from ...model.encoders import Encoder


def projector_of(encoder: Encoder, width: int) -> nn.Module:
    """[..., width] → [..., hidden size of the text model], with random weights."""
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
    damaged = sorted(name for name, tensor in found.items() if not torch.isfinite(tensor).all())
    if damaged:
        raise BundleError(f"{shown(damaged)} of '{where}' hold NaN or infinite values; the training failed")
