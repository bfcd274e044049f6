"""Idefics3 and SmolVLM: the vision tower of config.json, and the processor's files."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError, shown
from ..families.family import Json, require
from ..families.keys import check_keys_read
from .image import ImageEncoder, ImageProcessor
from .processor import processor_settings
from .siglip import pixel_settings, vision_config

TOKEN = "<image>"
VISION_KEYS = frozenset(
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_channels",
        "image_size",
        "patch_size",
        "hidden_act",
        "layer_norm_eps",
        "max_image_size",
        "size",
        "tie_word_embeddings",
        "use_base_siglip",
    ]
)
# Of transformers' Idefics3VisionConfig, for keys that config.json leaves out.
_DEFAULTS: Json = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_MEAN = [0.5, 0.5, 0.5]  # of transformers' image processors, as the values below
_PROCESSOR: Json = {
    "do_resize": True,
    "size": {"longest_edge": 1456},
    "resample": 1,
    "do_image_splitting": True,
    "max_image_size": {"longest_edge": 364},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": _MEAN,
    "image_std": _MEAN,
    "do_convert_rgb": True,
}
# They change nothing: all tiles have one size, so that nothing is padded; what the others say is of video or of other programs.
_NEUTRAL = frozenset(
    [
        *("do_pad", "pad_size", "image_processor_type", "processor_class", "return_row_col_info", "_processor_class"),
        *("data_format", "device", "return_tensors", "input_data_format", "disable_grouping", "video_sampling"),
        *("default_to_square", "do_video_processing", "image_seq_len", "image_seq_length", "backend"),
    ]
)
_OF_THE_WHOLE = frozenset({"video_processor", "tokenizer", "chat_template"})


def idefics3_encoder(config: Json, preprocessor: Json, processor: Json) -> ImageEncoder:
    """Raises `UnsupportedModelError`, and what a missing key or a wrong type raises (see `family_encoders`)."""
    vision = {**_DEFAULTS, **{key: value for key, value in config["vision_config"].items() if value is not None}}
    check_keys_read({"model_type": "idefics3_vision", **vision}, VISION_KEYS)
    require(vision, "hidden_act", ("gelu_pytorch_tanh",))
    require(vision, "num_channels", (3,))
    values = _settings(preprocessor, processor)
    size, tile = values["size"], _longest_edge(values, "max_image_size")
    encoder = ImageEncoder(
        vision=vision_config(
            vision, shuffle=config.get("scale_factor", 2), output_size=config["text_config"]["hidden_size"]
        ),
        processor=ImageProcessor(
            tile_size=tile,
            longest_edge=_longest_edge({"size": size}, "size") if values["do_resize"] else None,
            splits=values["do_image_splitting"],
            **pixel_settings(values),
        ),
        token=TOKEN,
        token_id=config["image_token_id"],
    )
    for settings in (processor, preprocessor, processor.get("image_processor") or {}):
        rows = settings.get("image_seq_len")
        if rows not in (None, encoder.rows_per_tile):
            raise UnsupportedModelError(
                f"the processor has image_seq_len {shown(rows)}, and a tile of {tile} pixels has {encoder.rows_per_tile} rows; "
                "use the processor that the model was trained with"
            )
    return encoder


def _settings(preprocessor: Json, processor: Json) -> dict[str, Any]:
    values = processor_settings(preprocessor, processor, "image_processor", _PROCESSOR, _NEUTRAL, _OF_THE_WHOLE)
    for flag in ("do_resize", "do_image_splitting", "do_rescale", "do_normalize", "do_convert_rgb"):
        if not isinstance(values[flag], bool):
            raise UnsupportedModelError(
                f"{flag} of the image processor must be true or false, got {shown(values[flag])}"
            )
    if not values["do_convert_rgb"]:
        raise UnsupportedModelError("do_convert_rgb=false is not supported: a model's images have three channels")
    return values


def _longest_edge(values: Json, name: str) -> int:
    found = values[name]
    given = {key: value for key, value in found.items() if value is not None} if isinstance(found, dict) else {}
    if set(given) != {"longest_edge"}:
        raise UnsupportedModelError(
            f"{name}={shown(found)} of the image processor is not supported; it has a longest_edge"
        )
    edge: int = given["longest_edge"]
    return edge
