"""Motet's own layout of a model with encoders: any model directory, and beside it

    encoders.json                  {"format": 1, "encoders": {medium: the fields of its encoder}}
    encoder-<medium>.safetensors   the weights of tower and projector, under the page's names

`motet tune --method projector` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import BundleError, ConfigError, NotFoundError, UnsupportedModelError, shown
from ..model.encoders import KINDS, Encoder
from ..model.files import read_object
from ..model.stored import read_header
from .weight_files import FLOATS, Stored, read_tensor

OWN = "encoders.json"
FORMAT = 1
_REMEDY = "tune the projector again"


def weights_file(medium: str) -> str:
    return f"encoder-{medium}.safetensors"


def read_own(model_dir: Path) -> dict[str, Encoder]:
    """The encoders that lie beside a model, by medium; empty if there are none. Raises `BundleError` for a damaged file."""
    path = model_dir / OWN
    if not path.is_file():
        return {}
    values = read_object(path, _REMEDY)
    entries = values.get("encoders")
    if values.get("format") != FORMAT or set(values) != {"format", "encoders"} or not isinstance(entries, dict):
        raise BundleError(f"'{path}' must have format {FORMAT} and encoders, got {shown(values)}; {_REMEDY}")
    unknown = sorted(set(entries) - set(KINDS))
    if unknown or not entries:
        raise BundleError(f"'{path}' has encoders of {shown(unknown)}; known are {[*KINDS]}")
    found = {}
    for medium, entry in entries.items():
        try:
            found[medium] = KINDS[medium].from_dict(dict(entry))
        except (ConfigError, KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise BundleError(f"the encoder of {medium} in '{path}' is inconsistent: {error}; {_REMEDY}") from error
    return found


def own_files(model_dir: Path) -> list[Path]:
    """The files of this layout, sorted; empty if the directory has none. Raises `BundleError`, `NotFoundError`."""
    found = [model_dir / weights_file(medium) for medium in read_own(model_dir)]
    for path in found:
        if not path.is_file():
            raise NotFoundError(f"'{path}' does not exist, and {OWN} names its encoder; {_REMEDY}")
    return sorted([model_dir / OWN, *found]) if found else []


def own_tensors(model_dir: Path, medium: str) -> dict[str, torch.Tensor]:
    """The weights of an encoder in float32, under the page's names. Raises `NotFoundError`, `BundleError` if the file is damaged,
    `UnsupportedModelError` for weights that are no floats."""
    path = model_dir / weights_file(medium)
    if not path.is_file():
        raise NotFoundError(f"'{path}' does not exist, and {OWN} names its encoder; {_REMEDY}")
    found = {}
    with path.open("rb") as file:
        for name, place in read_header(file, path).items():
            if place.dtype not in FLOATS:
                raise UnsupportedModelError(f"'{name}' of '{path}' is {place.dtype}; weights are {list(FLOATS)}")
            found[name] = read_tensor(Stored(file, path, place)).float()
    return found


def write_own(work: Path, encoders: Mapping[str, tuple[Encoder, Mapping[str, torch.Tensor]]]) -> None:
    """Write the files of this layout into a model directory: of each medium its encoder, and its weights under the page's
    names."""
    entries = {medium: encoder.to_dict() for medium, (encoder, _) in encoders.items()}
    (work / OWN).write_text(json.dumps({"format": FORMAT, "encoders": entries}, indent=1) + "\n")
    for medium, (_, tensors) in encoders.items():
        whole = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
        save_file(whole, work / weights_file(medium), {"format": "pt"})
