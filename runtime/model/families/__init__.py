"""The model families: from Hugging Face's `config.json` to `DecoderConfig`, and how their checkpoints name tensors.

A new architecture is a file here, a row in `FAMILIES`, and a parity test against transformers.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import ConfigError, UnsupportedModelError
from ..config import DecoderConfig
from ..rotary import inverse_frequencies
from .audio import QWEN2_AUDIO, VOXTRAL
from .experts import OLMOE, QWEN3_MOE
from .falcon import FALCON
from .family import Family, Json
from .gemma import GEMMA, GEMMA2, GEMMA3
from .gpt2 import GPT2
from .gpt_neox import GPT_NEOX
from .granite import GRANITE
from .idefics3 import IDEFICS3, SMOLVLM
from .keys import check_keys_read
from .llama import LLAMA
from .mistral import MISTRAL
from .olmo2 import OLMO2
from .phi3 import PHI3
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .smollm3 import SMOLLM3

_LLAMA_LIKE = (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, SMOLLM3, GRANITE, OLMO2)
FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        *(*_LLAMA_LIKE, GEMMA, GEMMA2, GEMMA3, OLMOE, QWEN3_MOE, GPT2, GPT_NEOX, FALCON),
        *(IDEFICS3, SMOLVLM, QWEN2_AUDIO, VOXTRAL),
    )
}


def decoder_config(values: Json) -> DecoderConfig:
    """`DecoderConfig` of a parsed config.json. Raises `UnsupportedModelError` for an unknown family or option,
    `ConfigError` if a key is missing or has the wrong type."""
    family = values.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UnsupportedModelError(f"model family {family!r} is not supported; known are {sorted(FAMILIES)}")
    check_keys_read(values, FAMILIES[family].keys)
    try:
        config = FAMILIES[family].config(values)
        if config.positions == "rotary":
            inverse_frequencies(config)  # refuses what does not fit
        return config
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"config.json of family '{family}' lacks or misstates {error}") from error
