"""The encoder of images whose tower is EfficientNet-Lite0, and its weights as a `.pth` file of torch stores them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import BundleError, UnsupportedModelError, shown
from ...model.encoders.efficientnet import LEVELS, Convolution, EfficientNetConfig, blocks
from ...model.encoders.image import ImageEncoder
from ..pickled import read_pickled
from .page import EncoderPage, projector_of

_EPS = 1e-3  # of the norms that are folded
_UNUSED = ("_fc.weight", "_fc.bias")  # the classifier


class _Convolution(nn.Conv2d):
    def __init__(self, one: Convolution) -> None:
        super().__init__(one.channels, one.out, one.kernel, one.stride, groups=one.groups)
        self.one = one

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(F.pad(x, self.one.padding * 2))
        return F.relu6(x) if self.one.is_activated else x


class _Tower(nn.Module):
    def __init__(self, levels: str) -> None:
        super().__init__()
        self.parts, self.levels = list(blocks(levels)), levels
        for one in (one for block in self.parts for one in block.convolutions):
            module: nn.Module = self
            *path, name = one.name.split(".")
            for step in path:
                if not hasattr(module, step):
                    module.add_module(step, nn.Module())
                module = module.get_submodule(step)
            module.add_module(name, _Convolution(one))

    def forward(self, pixels: Tensor) -> Tensor:  # [tiles, 3, edge, edge] → [tiles, width, places, places]
        x, found = pixels, []
        taken = {name: (side, mean) for name, _, side, mean in LEVELS}
        for block in self.parts:
            before = x
            for one in block.convolutions:
                x = self.get_submodule(one.name)(x)
            x = x + before if block.is_residual else x
            if self.levels == "all" and block.name in taken:
                side, mean = taken[block.name]
                found.append(_stacked(F.avg_pool2d(x, mean), side // mean))
        return torch.cat(found, 1) if found else x


def _stacked(x: Tensor, side: int) -> Tensor:
    """[tiles, channels, side · places, side · places] → [tiles, side² · channels, places, places], as ONNX's SpaceToDepth."""
    tiles, channels, height, width = x.shape
    x = x.view(tiles, channels, height // side, side, width // side, side).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(tiles, side * side * channels, height // side, width // side)


class EfficientNetPage(EncoderPage):
    """Pixels [tiles, 3, edge, edge], normalised → rows [tiles, rows of a tile, hidden size of the text model]."""

    encoder: ImageEncoder

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        assert isinstance(encoder.vision, EfficientNetConfig)
        self.encoder, self.pool = encoder, encoder.vision.pool
        self.tower = _Tower(encoder.vision.levels)
        self.projector = projector_of(encoder, encoder.vision.width)

    def features(self, inputs: Tensor) -> Tensor:
        return F.avg_pool2d(self.tower(inputs), self.pool).flatten(2).transpose(1, 2)

    def example(self) -> Tensor:
        edge = self.encoder.processor.tile_size
        pixels = torch.rand(2, 3, edge, edge, generator=torch.Generator().manual_seed(0)) * 2 - 1
        pixels[1] = pixels[1, :, :1, :1]
        return pixels


def read_tower(path: Path) -> dict[str, Tensor]:
    """The tower's weights of a `.pth` file, float32, under the page's names without `tower.`, the norms folded into the
    convolutions. The names are those of the first port to torch (`_conv_stem`, `_blocks.0._depthwise_conv`). Raises
    `BundleError` for a damaged file, or one with other shapes, `UnsupportedModelError` for one with other weights."""
    stored = {name: tensor for name, tensor in read_pickled(path).items() if not name.endswith(".num_batches_tracked")}
    found: dict[str, Tensor] = {}
    expected: set[str] = set(_UNUSED)
    for one in (one for block in blocks() for one in block.convolutions):
        convolution, norm = _stored_names(one.name)
        names = [
            f"{convolution}.weight",
            *(f"{norm}.{kind}" for kind in ("weight", "bias", "running_mean", "running_var")),
        ]
        expected.update(names)
        missing = [name for name in names if name not in stored]
        if missing:
            raise UnsupportedModelError(f"'{path}' has no {shown(missing)}; the tower is an EfficientNet-Lite0")
        shape = (one.out, one.channels // one.groups, one.kernel, one.kernel)
        wrong = [name for name in names if stored[name].shape != (shape if name == names[0] else shape[:1])]
        if wrong or not all(stored[name].is_floating_point() for name in names):
            raise BundleError(
                f"{shown(wrong or names)} of '{path}' have other shapes or types than EfficientNet-Lite0's"
            )
        weight, gain, bias, mean, variance = (stored[name].double() for name in names)
        scale = gain / (variance + _EPS).sqrt()
        found[f"{one.name}.weight"] = (weight * scale[:, None, None, None]).float()
        found[f"{one.name}.bias"] = (bias - mean * scale).float()
        if not all(torch.isfinite(found[f"{one.name}.{kind}"]).all() for kind in ("weight", "bias")):
            raise BundleError(f"{shown(names)} of '{path}' hold values that cannot be used; download it again")
    unknown = sorted(set(stored) - expected)
    if unknown:
        raise UnsupportedModelError(f"'{path}' holds weights that no EfficientNet-Lite0 has: {shown(unknown)}")
    return found


def _stored_names(name: str) -> tuple[str, str]:
    """(convolution, its norm) of a file."""
    if name == "stem":
        return "_conv_stem", "_bn0"
    if name == "head":
        return "_conv_head", "_bn1"
    block, _, part = name.rpartition(".")
    norm = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}[part]
    return f"_{block}._{part}_conv", f"_{block}.{norm}"
