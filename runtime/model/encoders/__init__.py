"""The kinds of encoders: what turns something that is no text into rows of embeddings, which stand in a prompt for a run of
placeholder tokens. A bundle has at most one encoder of each medium, and a medium is the name of a part of a message.

A model family with another encoder is a file here, a row in `READERS`, and a parity test against transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...errors import ConfigError, UnsupportedModelError
from ..families.family import Json
from .audio import AudioEncoder
from .idefics3 import idefics3_encoder
from .image import ImageEncoder
from .whisper import QWEN2_AUDIO_TEMPLATE, qwen2_audio_encoder, voxtral_encoder

IMAGE, AUDIO = "image", "audio"
Encoder = ImageEncoder | AudioEncoder
KINDS: Mapping[str, type[ImageEncoder] | type[AudioEncoder]] = {IMAGE: ImageEncoder, AUDIO: AudioEncoder}
# config.json's `model_type` → the medium, and (config.json, preprocessor's settings, processor's settings) → its encoder
READERS: Mapping[str, tuple[str, Callable[[Json, Json, Json], Encoder]]] = {
    "idefics3": (IMAGE, idefics3_encoder),
    "smolvlm": (IMAGE, idefics3_encoder),
    "qwen2_audio": (AUDIO, qwen2_audio_encoder),
    "voxtral": (AUDIO, voxtral_encoder),
}
# Chat templates of processors that have one in their program.
TEMPLATES: Mapping[str, str] = {"qwen2_audio": QWEN2_AUDIO_TEMPLATE}


def family_encoders(config: Json, preprocessor: Json, processor: Json) -> dict[str, Encoder]:
    """The encoders of a model directory, by medium; empty if its family has none. `config`, `preprocessor`, `processor`: what
    config.json, preprocessor_config.json and processor_config.json hold. Raises `UnsupportedModelError` for an option that is
    not computed, `ConfigError` if a key is missing or has the wrong type."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in READERS:
        return {}
    medium, reader = READERS[family]
    try:
        return {medium: reader(config, preprocessor, processor)}
    except (UnsupportedModelError, ConfigError):
        raise
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"the files of family '{family}' lack or misstate {error}") from error
