"""The encoders of a model directory, in torch. A tower is a file here, and a row in `PAGES`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ...errors import BundleError, NotFoundError, UnsupportedModelError
from ...model.encoders import Encoder, family_encoders
from ...model.encoders.audio import AudioEncoder
from ...model.encoders.efficientnet import EfficientNetConfig
from ...model.encoders.image import ImageEncoder
from ...model.families import FAMILIES
from ..huggingface import read_config
from ..own_encoders import OWN, own_tensors, read_own
from ..weight_files import FLOATS, open_tensors, read_json, read_tensor
from .efficientnet import EfficientNetPage
from .page import EncoderPage
from .siglip import SiglipPage
from .whisper import WhisperPage

PAGES: Mapping[type[Encoder], type[EncoderPage]] = {ImageEncoder: SiglipPage, AudioEncoder: WhisperPage}
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_TOWERS = ("vision_config", "audio_config")  # of config.json


def read_encoders(model_dir: Path) -> dict[str, Encoder]:
    """The encoders of a model directory, by medium: its family's and those beside it (see `own_encoders`). Raises
    `NotFoundError` without the processor's settings, and what `family_encoders` and `read_own` raise."""
    own = read_own(model_dir)
    found = _family_encoders(model_dir)
    twice = sorted(set(own) & set(found))
    if twice:
        raise BundleError(f"'{model_dir}' has encoders of {twice} in its own weights and in {OWN}; remove one of them")
    return found | own


def _family_encoders(model_dir: Path) -> dict[str, Encoder]:
    config = read_json(model_dir / "config.json")
    if not any(name in config for name in _TOWERS):
        return {}
    files = [model_dir / name for name in PROCESSORS]
    if not any(file.is_file() for file in files):
        raise NotFoundError(
            f"'{model_dir}' has neither {PROCESSORS[0]} nor {PROCESSORS[1]}, which say how media are prepared; pull the model "
            "again"
        )
    preprocessor, processor = (read_json(file) if file.is_file() else {} for file in files)
    return family_encoders(config, preprocessor, processor)


def encoder_pages(model_dir: Path) -> dict[str, EncoderPage]:
    """The encoders of a model directory with their weights, by medium. Raises what `read_encoders` and
    `EncoderPage.from_tensors` raise, `BundleError` if a file is damaged, `UnsupportedModelError` for weights that are no
    floats."""
    encoders = read_encoders(model_dir)
    if not encoders:
        return {}
    own = read_own(model_dir)
    tensors = {medium: own_tensors(model_dir, medium) for medium in own}
    if own.keys() != encoders.keys():
        family = _tensors(model_dir)
        tensors = dict.fromkeys(encoders, family) | tensors
    return {
        medium: page_class(encoder).from_tensors(encoder, tensors[medium], model_dir)
        for medium, encoder in encoders.items()
    }


def page_class(encoder: Encoder) -> type[EncoderPage]:
    if isinstance(encoder, ImageEncoder) and isinstance(encoder.vision, EfficientNetConfig):
        return EfficientNetPage
    return PAGES[type(encoder)]


def _tensors(model_dir: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model directory that are an encoder's and not the decoder's, in float32 under the page's names."""
    prefixes, found = FAMILIES[read_config(model_dir).family].encoders, {}
    stored = open_tensors(model_dir)
    try:
        for name, one in stored.items():
            prefix = next(filter(name.startswith, prefixes), None)
            if prefix is None or name.endswith(".position_ids"):  # a buffer of older checkpoints
                continue
            if one.place.dtype not in FLOATS:
                raise UnsupportedModelError(
                    f"'{name}' of '{model_dir}' is {one.place.dtype}; the weights of an encoder are {list(FLOATS)}"
                )
            found[prefixes[prefix] + name.removeprefix(prefix)] = read_tensor(one).float()
    finally:
        for one in stored.values():
            one.file.close()
    return found
