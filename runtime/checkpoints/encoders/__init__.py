"""The encoders of a model directory, in torch. A tower is a file here, and a row in `PAGES`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ...errors import NotFoundError, UnsupportedModelError
from ...model.encoders import Encoder, family_encoders
from ...model.encoders.audio import AudioEncoder
from ...model.encoders.image import ImageEncoder
from ...model.families import FAMILIES
from ..huggingface import read_config
from ..weight_files import FLOATS, open_tensors, read_json, read_tensor
from .page import EncoderPage
from .siglip import SiglipPage
from .whisper import WhisperPage

PAGES: Mapping[type[Encoder], type[EncoderPage]] = {ImageEncoder: SiglipPage, AudioEncoder: WhisperPage}
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
OLD_TEMPLATE = "chat_template.json"  # of processors, before chat_template.jinja
_TOWERS = ("vision_config", "audio_config")  # of config.json


def read_encoders(model_dir: Path) -> dict[str, Encoder]:
    """The encoders of a model directory, by medium. Raises `NotFoundError` without the processor's settings, and what
    `family_encoders` raises."""
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
    tensors = _tensors(model_dir)
    return {
        medium: PAGES[type(encoder)].from_tensors(encoder, tensors, model_dir) for medium, encoder in encoders.items()
    }


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
