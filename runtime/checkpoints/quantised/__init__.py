"""Quantised checkpoints: bitsandbytes, GPTQ, AWQ, compressed-tensors, FP8. Each weight is widened when it is read; export and
fine-tuning then treat it like that of any checkpoint. Needs torch.

A new method is a file here and a row in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import UnsupportedModelError, shown
from .awq import Awq
from .bitsandbytes import BitsAndBytes
from .gptq import Gptq
from .method import Method, Settings
from .scaled import CompressedTensors, Fp8

METHODS: Mapping[str, Callable[[Settings], Method]] = {
    "bitsandbytes": BitsAndBytes,
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "fp8": Fp8,
}


def method_of(config: Mapping[str, Any]) -> Method | None:
    """How the weights of a model with this config.json are quantised; None: they are not. Raises `UnsupportedModelError` for
    another method, or an option of one that is not computed."""
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings is None:
        return None
    if config.get("compression_config") not in (None, settings):
        raise UnsupportedModelError(
            "config.json has quantization_config and compression_config, and they differ; remove one"
        )
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if (
        method is None
        and isinstance(settings, Mapping)
        and (settings.get("load_in_4bit") or settings.get("load_in_8bit"))
    ):
        method = "bitsandbytes"  # written by releases without quant_method
    if not isinstance(method, str) or method not in METHODS:
        raise UnsupportedModelError(
            f"checkpoints quantised by {method!r} are not supported, those of {sorted(METHODS)} are; pull the model in float"
        )
    try:
        return METHODS[method](settings)
    except (TypeError, AttributeError, KeyError) as error:
        raise UnsupportedModelError(f"quantization_config of '{method}' lacks or misstates {error}") from error


OLD_SETTINGS = "quantize_config.json"  # where AutoGPTQ wrote what quantization_config says now


def with_old_settings(config: Mapping[str, Any], old: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json with what quantize_config.json beside it says. Raises `UnsupportedModelError` if that is not GPTQ's, lacks
    what is needed, or is not what config.json says."""
    method = old.get("quant_method", "gptq")
    if method != "gptq":
        raise UnsupportedModelError(f"{OLD_SETTINGS} has quant_method={shown(method)}; 'gptq' is read from there")
    lacking = [name for name in ("bits", "group_size") if name not in old]
    if lacking:
        raise UnsupportedModelError(f"{OLD_SETTINGS} lacks {lacking}: it is not AutoGPTQ's; pull the model in float")
    settings = config.get("quantization_config")
    if settings is None:
        return {**config, "quantization_config": {**old, "quant_method": "gptq"}}
    both = {"quant_method": "gptq", **old}
    differs = [
        name
        for name in ("quant_method", "bits", "group_size", "desc_act", "checkpoint_format")
        if isinstance(settings, Mapping) and name in both and name in settings and both[name] != settings[name]
    ]
    if differs:
        raise UnsupportedModelError(f"config.json and {OLD_SETTINGS} differ in {differs}; remove the wrong one")
    return config
