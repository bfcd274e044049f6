"""The kinds of encoders: what turns something that is no text into rows of embeddings, which stand in a prompt for a run of
placeholder tokens. A bundle has at most one encoder of each medium, and a medium is the name of a part of a message.

A model family with another encoder is a file here, a row in `READERS`, and a parity test against transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ...errors import BundleError, ConfigError, UnsupportedModelError
from ..families.family import Json
from ..files import read_object
from .audio import AudioEncoder
from .idefics3 import idefics3_encoder
from .image import ImageEncoder
from .whisper import QWEN2_AUDIO_TEMPLATE, qwen2_audio_encoder, voxtral_encoder

IMAGE, AUDIO = "image", "audio"
_REMEDY = "pull the model again"
Encoder = ImageEncoder | AudioEncoder
KINDS: Mapping[str, type[ImageEncoder] | type[AudioEncoder]] = {IMAGE: ImageEncoder, AUDIO: AudioEncoder}
# config.json's `model_type` → the medium, and (config.json, preprocessor's settings, processor's settings) → its encoder
READERS: Mapping[str, tuple[str, Callable[[Json, Json, Json], Encoder]]] = {
    "idefics3": (IMAGE, idefics3_encoder),
    "smolvlm": (IMAGE, idefics3_encoder),
    "qwen2_audio": (AUDIO, qwen2_audio_encoder),
    "voxtral": (AUDIO, voxtral_encoder),
}
TEMPLATE, OLD_TEMPLATE = "chat_template.jinja", "chat_template.json"  # the second of processors, before the first
# Chat templates of processors that have one in their program.
_TEMPLATES: Mapping[str, str] = {"qwen2_audio": QWEN2_AUDIO_TEMPLATE}


def processor_template(directory: Path) -> str | None:
    """The chat template of a model's processor where it is not in the file of today: older ones have a file of JSON, and some
    have it in their program. It goes before the tokenizer's own. Raises `BundleError` for files that are damaged or hold none."""
    config, old = directory / "config.json", directory / OLD_TEMPLATE
    if (directory / TEMPLATE).is_file() or not config.is_file():
        return None
    family = read_object(config, _REMEDY).get("model_type")
    if not isinstance(family, str) or family not in READERS:
        return None
    if not old.is_file():
        return _TEMPLATES.get(family)
    template = read_object(old, _REMEDY).get("chat_template")
    if not isinstance(template, str):
        raise BundleError(f"'{old}' has no chat_template, a text; {_REMEDY}")
    return template


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
