"""The kinds of encoders: what turns something that is no text into rows of embeddings, which stand in a prompt for a run of
placeholder tokens. A bundle has at most one encoder of each medium, and a medium is the name of a part of a message: `image`.

A model family with another encoder is a file here, a row in `READERS`, and a parity test against transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...errors import ConfigError, UnsupportedModelError
from ..families.family import Json
from .idefics3 import idefics3_encoder
from .vision import ImageEncoder

IMAGE = "image"
# config.json's `model_type` → (config.json, preprocessor's settings, processor's settings) → the model's encoder of images
READERS: Mapping[str, Callable[[Json, Json, Json], ImageEncoder]] = {
    "idefics3": idefics3_encoder,
    "smolvlm": idefics3_encoder,
}


def image_encoder(config: Json, preprocessor: Json, processor: Json) -> ImageEncoder | None:
    """The encoder of images of a model directory; None if its family has none. `config`, `preprocessor`, `processor`: what
    config.json, preprocessor_config.json and processor_config.json hold. Raises `UnsupportedModelError` for an option that is
    not computed, `ConfigError` if a key is missing or has the wrong type."""
    family = config.get("model_type")
    reader = READERS.get(family) if isinstance(family, str) else None
    if reader is None:
        return None
    try:
        return reader(config, preprocessor, processor)
    except (UnsupportedModelError, ConfigError):
        raise
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"the files of family '{family}' lack or misstate {error}") from error
