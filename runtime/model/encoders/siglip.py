"""SigLIP's vision tower by its own files: config.json and the image processor's."""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError, UnsupportedModelError, shown
from ..families.family import Json, require
from ..families.keys import check_keys_read
from .image import ImageProcessor, VisionConfig
from .processor import processor_settings

# Of transformers' SiglipVisionConfig, for keys that config.json leaves out.
_DEFAULTS: Json = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_OTHERS = frozenset({"vision_use_head"})  # the head is not read
_MEAN = [0.5, 0.5, 0.5]
_PROCESSOR: Json = {  # of transformers' SiglipImageProcessor
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": _MEAN,
    "image_std": _MEAN,
    "do_convert_rgb": True,
    "do_center_crop": False,
    "do_pad": False,
}
_NEUTRAL = frozenset(
    [
        *("image_processor_type", "processor_class", "_processor_class", "data_format", "device", "return_tensors"),
        *("input_data_format", "disable_grouping", "default_to_square", "backend", "image_seq_length"),
        *("crop_size", "pad_size"),  # nothing is cropped or padded
    ]
)


def vision_config(vision: Json, *, shuffle: int, output_size: int) -> VisionConfig:
    """Of transformers' settings of a SigLIP tower."""
    return VisionConfig(
        hidden_size=vision["hidden_size"],
        intermediate_size=vision["intermediate_size"],
        num_layers=vision["num_hidden_layers"],
        num_heads=vision["num_attention_heads"],
        patch_size=vision["patch_size"],
        image_size=vision["image_size"],
        norm_eps=vision["layer_norm_eps"],
        shuffle=shuffle,
        output_size=output_size,
    )


def pixel_settings(values: Json) -> dict[str, Any]:
    """Fields of `ImageProcessor`, of transformers' settings of an image processor."""
    return {
        "resample": values["resample"],
        "rescale": values["rescale_factor"] if values["do_rescale"] else None,
        "mean": tuple(values["image_mean"]) if values["do_normalize"] else None,
        "std": tuple(values["image_std"]) if values["do_normalize"] else None,
    }


def siglip_tower(config: Json, preprocessor: Json, processor: Json) -> tuple[VisionConfig, ImageProcessor]:
    """`config`: of SigLIP, or of its vision tower alone. Raises `UnsupportedModelError` for an option that is not computed,
    `ConfigError` if a key is missing or has the wrong type."""
    try:
        own = config["vision_config"] if config.get("model_type") == "siglip" else config
        vision = {**_DEFAULTS, **{key: value for key, value in own.items() if value is not None}}
        check_keys_read({**vision, "model_type": "siglip_vision"}, {*_DEFAULTS, *_OTHERS})
        require(vision, "hidden_act", ("gelu_pytorch_tanh",))
        require(vision, "num_channels", (3,))
        values = processor_settings(
            preprocessor, processor, "image_processor", _PROCESSOR, _NEUTRAL, ("tokenizer", "chat_template", "auto_map")
        )
        for name, wanted in (("do_center_crop", False), ("do_pad", False), ("do_convert_rgb", True)):
            require(values, name, (wanted,))
        edge = values["size"].get("height")
        if values["size"] != {"height": edge, "width": edge} or edge != vision["image_size"] or not values["do_resize"]:
            raise UnsupportedModelError(
                f"the image processor makes images of {shown(values['size'])}, and the tower takes squares of "
                f"{shown(vision['image_size'])} pixels; use the processor that it was trained with"
            )
        tower = vision_config(vision, shuffle=1, output_size=1)
        return tower, ImageProcessor(tile_size=edge, longest_edge=None, splits=False, **pixel_settings(values))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the files of SigLIP lack or misstate {error}") from error
