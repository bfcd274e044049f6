"""The encoder of images in torch: export's reference, and what its graph is written from. Needs torch.

It is derived from `ImageEncoder` alone. Parameter names are those of the checkpoint (transformers' Idefics3), without the prefix
of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BundleError, NotFoundError, UnsupportedModelError, shown
from ..model.encoders import image_encoder
from ..model.encoders.vision import ImageEncoder, VisionConfig
from ..model.families import FAMILIES
from .huggingface import read_config
from .weight_files import FLOATS, open_tensors, read_json, read_tensor

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
OLD_TEMPLATE = "chat_template.json"  # of processors, before chat_template.jinja
_PREFIXES = ("model.vision_model.", "model.connector.modality_projection.")


def read_image_encoder(model_dir: Path) -> ImageEncoder | None:
    """The encoder of images of a model directory; None if the model has none. Raises `NotFoundError` without the processor's
    settings, and what `image_encoder` raises."""
    config = read_json(model_dir / "config.json")
    if "vision_config" not in config:
        return None
    files = [model_dir / name for name in PROCESSORS]
    if not any(file.is_file() for file in files):
        raise NotFoundError(
            f"'{model_dir}' has neither {PROCESSORS[0]} nor {PROCESSORS[1]}, which say how images are prepared; pull the model "
            "again"
        )
    preprocessor, processor = (read_json(file) if file.is_file() else {} for file in files)
    return image_encoder(config, preprocessor, processor)


class _Attention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        size = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        result: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return result


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
        self.self_attn = _Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        result: Tensor = x + self.mlp(self.layer_norm2(x))
        return result


class VisionEncoder(nn.Module):
    """Pixels [tiles, 3, edge, edge], normalised → rows [tiles, rows of a tile, hidden size of the text model]."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        config = encoder.vision
        self.encoder_config = encoder
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.embeddings.position_embedding = nn.Embedding(config.side**2, config.hidden_size)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.proj = nn.Linear(config.hidden_size * config.shuffle**2, config.output_size, bias=False)

    @classmethod
    def from_dir(cls, model_dir: Path) -> VisionEncoder:
        """The encoder of a model directory. Raises `BundleError` for weights that are missing, misshapen or not finite,
        `UnsupportedModelError` for weights that it does not have or a model without an encoder, and what `read_image_encoder`
        raises."""
        encoder = read_image_encoder(model_dir)
        if encoder is None:
            raise UnsupportedModelError(f"the model '{model_dir}' has no encoder of images")
        with torch.device("meta"):
            page = cls(encoder)
        stored = _tensors(model_dir)
        found: dict[str, Tensor] = {}
        for name, tensor in stored.items():
            short = next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)
            found[short] = tensor
        _check(model_dir, {name: tuple(own.shape) for name, own in page.state_dict().items()}, found)
        page.load_state_dict(found, strict=True, assign=True)
        return page.eval()

    def positions(self) -> Tensor:
        """What is added to the patches of a tile, [patches, hidden]: each takes the position that has the same place, as a
        fraction of the edge. The fractions are float32, as in transformers: where they fall on a limit, rounding decides."""
        side, own = self.encoder_config.vision.side, self.encoder_config.side
        limits = torch.arange(1 / side, 1.0, 1 / side)
        places = torch.arange(own, dtype=torch.float32) * (1.0 / torch.tensor(own))
        index = torch.bucketize(places.clamp(max=1.0 - 1e-6), limits, right=True)
        table: Tensor = self.embeddings.position_embedding.weight  # type: ignore[union-attr, assignment]
        return table[(index[:, None] * side + index[None, :]).flatten()]

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.positions()  # type: ignore[operator]
        for layer in self.encoder.layers:  # type: ignore[union-attr]
            x = layer(x)
        x = self.post_layernorm(x)
        side, shuffle = self.encoder_config.side, self.encoder_config.vision.shuffle
        x = x.view(len(x), side // shuffle, shuffle, side // shuffle, shuffle, -1).transpose(2, 3)
        result: Tensor = self.proj(x.flatten(3).flatten(1, 2))
        return result


def _check(model_dir: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> None:
    unknown, missing = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
    if unknown:
        raise UnsupportedModelError(f"'{model_dir}' holds weights that its encoder does not use: {shown(unknown)}")
    wrong = sorted(name for name, tensor in found.items() if tuple(tensor.shape) != expected[name])
    if missing or wrong:
        raise BundleError(
            f"the encoder's weights of '{model_dir}' do not fit its config.json: missing {shown(missing)}, of other shapes "
            f"{shown(wrong)}"
        )
    damaged = sorted(name for name, tensor in found.items() if not torch.isfinite(tensor).all())
    if damaged:
        raise BundleError(f"{shown(damaged)} of '{model_dir}' hold NaN or infinite values; the training failed")


def _tensors(model_dir: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model directory that are an encoder's and not the decoder's, in float32 under their stored names. Raises
    `BundleError` if a file is damaged, `UnsupportedModelError` for other types than floats."""
    prefixes, found = FAMILIES[read_config(model_dir).family].encoders, {}
    stored = open_tensors(Path(model_dir))
    try:
        for name, one in stored.items():
            if not name.startswith(prefixes) or name.endswith(".position_ids"):  # a buffer of older checkpoints
                continue
            if one.place.dtype not in FLOATS:
                raise UnsupportedModelError(
                    f"'{name}' of '{model_dir}' is {one.place.dtype}; the weights of an encoder are {list(FLOATS)}"
                )
            found[name] = read_tensor(one).float()
    finally:
        for one in stored.values():
            one.file.close()
    return found
