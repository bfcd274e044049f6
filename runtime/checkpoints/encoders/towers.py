"""Towers of other models, for encoders whose projector is yet to be trained: Whisper as transformers or CTranslate2 stores
it, SigLIP, EfficientNet-Lite0."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import BundleError, NotFoundError, UnsupportedModelError, shown
from ...model.encoders import AUDIO, IMAGE
from ...model.encoders.audio import AudioProcessor, WhisperConfig
from ...model.encoders.efficientnet import TOWER, EfficientNetConfig
from ...model.encoders.image import ImageProcessor, VisionConfig
from ...model.encoders.siglip import siglip_tower
from ...model.encoders.whisper import whisper_tower
from ..ctranslate2 import FILE as CTRANSLATE2
from ..ctranslate2 import Variables
from ..weight_files import FLOATS, open_tensors, read_json, read_tensor
from .efficientnet import read_tower

_PREPROCESSOR, _PROCESSOR = "preprocessor_config.json", "processor_config.json"
_EDGE = 224  # of images that EfficientNet-Lite0 was trained on
_WHISPER = "WhisperSpec"


@dataclass(frozen=True, slots=True)
class Tower:
    """`config`, `processor`: of an encoder; a tower of images has a pool of 1 and no output size yet. `weights`: under the page's
    names, without `tower.`."""

    medium: str
    config: WhisperConfig | VisionConfig | EfficientNetConfig
    processor: AudioProcessor | ImageProcessor
    weights: Mapping[str, Tensor]


def read_source(source: Path) -> Tower:
    """The tower in a directory or file. Raises `NotFoundError` if there is none, `UnsupportedModelError` for another kind of
    model or settings that are not computed, `BundleError` if it is damaged."""
    if source.is_file():
        mean, deviation = (127 / 255,) * 3, (128 / 255,) * 3  # as its authors prepare images
        processor = ImageProcessor(_EDGE, None, False, 3, 1 / 255, mean, deviation)
        return Tower(IMAGE, EfficientNetConfig(TOWER, 1, 1), processor, read_tower(source))
    if not (source / "config.json").is_file():
        raise NotFoundError(
            f"there is no encoder at '{source}': it is a directory of Whisper (transformers' or CTranslate2's), SigLIP or a "
            "model with encoders, or a .pth file of EfficientNet-Lite0"
        )
    config, settings = (
        read_json(source / "config.json"),
        [_settings(source / name) for name in (_PREPROCESSOR, _PROCESSOR)],
    )
    kind = config.get("model_type")
    if kind is None and (source / CTRANSLATE2).is_file():
        return _ctranslate2(source, settings[0], settings[1])
    if not isinstance(kind, str) or kind not in _READERS:
        raise UnsupportedModelError(
            f"'{source}' is a model of type {shown(kind)}; encoders are made of {', '.join(sorted(_READERS))}, CTranslate2's "
            "Whisper, or EfficientNet-Lite0"
        )
    return _READERS[kind](source, config, settings[0], settings[1])


def _whisper(
    source: Path, config: Mapping[str, Any], preprocessor: Mapping[str, Any], processor: Mapping[str, Any]
) -> Tower:
    tower, audio = whisper_tower(config, preprocessor, processor)
    weights = _weights(source, ("model.encoder.", "encoder."), ("model.decoder.", "decoder.", "proj_out."))
    return Tower(AUDIO, tower, audio, weights)


def _siglip(
    source: Path, config: Mapping[str, Any], preprocessor: Mapping[str, Any], processor: Mapping[str, Any]
) -> Tower:
    tower, image = siglip_tower(config, preprocessor, processor)
    others = ("vision_model.head.", "head.", "text_model.", "logit_scale", "logit_bias")
    return Tower(
        IMAGE, tower, image, _weights(source, ("vision_model.", ""), others)
    )  # the tower alone may have no prefix


_READERS: Mapping[str, Callable[..., Tower]] = {
    "whisper": _whisper,
    "siglip": _siglip,
    "siglip_vision_model": _siglip,
}


def _settings(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _weights(source: Path, prefixes: tuple[str, ...], others: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors with one of these prefixes, which are taken away; those of `others` are not read."""
    found: dict[str, Tensor] = {}
    stored = open_tensors(source)
    try:
        for name, one in stored.items():
            if name.startswith(others) or name.endswith(".position_ids"):
                continue
            prefix = next(filter(name.startswith, prefixes), None)
            if prefix is None or one.place.dtype not in FLOATS:
                raise UnsupportedModelError(f"'{source}' holds '{name}' ({one.place.dtype}), which no such encoder has")
            found[name.removeprefix(prefix)] = read_tensor(one).float()
    finally:
        for one in stored.values():
            one.file.close()
    return found


# ---- CTranslate2's Whisper ---------------------------------------------------------------------------------------------

_PLAIN = {
    "conv1/weight": "conv1.weight",
    "conv1/bias": "conv1.bias",
    "conv2/weight": "conv2.weight",
    "conv2/bias": "conv2.bias",
    "position_encodings/encodings": "embed_positions.weight",
    "layer_norm/gamma": "layer_norm.weight",
    "layer_norm/beta": "layer_norm.bias",
}
_OF_LAYER = {
    "self_attention/layer_norm/gamma": "self_attn_layer_norm.weight",
    "self_attention/layer_norm/beta": "self_attn_layer_norm.bias",
    "self_attention/linear_1/weight": "self_attn.out_proj.weight",
    "self_attention/linear_1/bias": "self_attn.out_proj.bias",
    "ffn/layer_norm/gamma": "final_layer_norm.weight",
    "ffn/layer_norm/beta": "final_layer_norm.bias",
    "ffn/linear_0/weight": "fc1.weight",
    "ffn/linear_0/bias": "fc1.bias",
    "ffn/linear_1/weight": "fc2.weight",
    "ffn/linear_1/bias": "fc2.bias",
}
_QKV = ("self_attention/linear_0/weight", "self_attention/linear_0/bias")  # of q, k and v, one below the other


def _ctranslate2(source: Path, preprocessor: Mapping[str, Any], processor: Mapping[str, Any]) -> Tower:
    with Variables(source, _WHISPER) as variables:
        sizes, found = _read_ctranslate2(variables)
    if not preprocessor and not processor:  # most conversions leave it out: it is Whisper's own but for the bins
        preprocessor = {"feature_size": sizes["num_mel_bins"]}
    tower, audio = whisper_tower(sizes, preprocessor, processor)
    return Tower(AUDIO, tower, audio, found)


def _read_ctranslate2(variables: Variables) -> tuple[dict[str, int], dict[str, Tensor]]:
    """(sizes under the names of config.json, weights under transformers' names)."""
    found: dict[str, Tensor] = {}
    layers = 0
    own = [name for name in variables if name.startswith("encoder/")]
    for name in own:
        short = name.removeprefix("encoder/")
        layer = re.fullmatch(r"layer_(\d{1,4})/(.+)", short)
        if short == "num_heads" or short.endswith("_scale"):
            continue
        if short in _PLAIN:
            found[_PLAIN[short]] = variables[name]
        elif layer is not None and layer[2] in _OF_LAYER:
            found[f"layers.{layer[1]}.{_OF_LAYER[layer[2]]}"] = variables[name]
        elif layer is not None and layer[2] in _QKV:
            found |= _split(variables, name, f"layers.{layer[1]}.self_attn.")
        else:
            raise UnsupportedModelError(f"'{variables.path}' holds '{name}', which no encoder of Whisper has")
        layers = max(layers, int(layer[1]) + 1 if layer is not None else 0)
    try:
        heads = int(variables["encoder/num_heads"])
        size, bins, _ = found["conv1.weight"].shape
        positions, inner = len(found["embed_positions.weight"]), len(found["layers.0.fc1.weight"])
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise BundleError(
            f"'{variables.path}' lacks a part of Whisper's encoder ({error}); convert the model again"
        ) from error
    sizes = {
        "d_model": size,
        "encoder_layers": layers,
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": inner,
        "num_mel_bins": bins,
        "max_source_positions": positions,
    }
    return sizes, found


def _split(variables: Variables, name: str, module: str) -> dict[str, Tensor]:
    """q, k and v of a fused weight or bias. Whisper's k has no bias."""
    whole, kind = variables[name], name.rpartition("/")[2]
    if not whole.ndim or len(whole) % 3:
        raise BundleError(f"'{name}' of '{variables.path}' is no three parts of q, k and v; convert the model again")
    q, k, v = whole.chunk(3)
    if kind == "bias":
        if k.any():
            raise UnsupportedModelError(
                f"'{name}' of '{variables.path}' has a bias of k, which no encoder of Whisper has"
            )
        return {f"{module}q_proj.bias": q.clone(), f"{module}v_proj.bias": v.clone()}
    return {f"{module}{part}_proj.weight": one.clone() for part, one in (("q", q), ("k", k), ("v", v))}
