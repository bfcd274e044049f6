"""Writing a model directory: weights under canonical names, stored as the checkpoint that they come from stores them.

A tensor is read and written at a time, so that no model has to fit the memory. Needs torch.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import NumericalError, UnsupportedModelError
from ..model.config import DecoderConfig
from ..model.families import FAMILIES
from ..model.layout import decoder_layout
from ..model.stored import MAX_HEADER_BYTES
from .fused import join_rows
from .huggingface import Weights, stored_parts

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # of config.json's dtype
# Files of a model directory that say nothing of weights and sizes.
TEXTS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
OTHERS = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "LICENSE")

Places = Mapping[str, tuple[str, str]]


def plain_places(weights: Weights, values: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Weight → (name, type) of the tensor that a plain checkpoint stores it in. `values`: config.json, whose dtype is that of
    weights that were quantised (float32 if it says nothing). Float64 becomes float32."""
    given = values.get("dtype") or values.get("torch_dtype") or "float32"
    wide = _NAMES.get(str(given).removeprefix("torch."), "F32")
    return {name: (stored, dtype if dtype in _DTYPES else "F32" if dtype else wide)
            for name, (stored, dtype) in weights.places().items()}  # fmt: skip


def renumbered(name: str, number: int) -> str:
    """A stored tensor's name with another layer number, which is the first number in it; a name without one as it is."""
    return re.sub(r"(?<=\.)\d+(?=\.)", str(number), name, count=1)


def layer_of(name: str) -> int | None:
    """The layer of a weight with this canonical name; None if it belongs to none."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def copy_texts(model_dir: Path, work: Path, names: tuple[str, ...] = (*TEXTS, *OTHERS)) -> None:
    """Copy those of these files that are there."""
    for name in names:
        if (model_dir / name).is_file():
            shutil.copyfile(model_dir / name, work / name)


def write_weights(path: Path, config: DecoderConfig, weights: Mapping[str, Tensor], places: Places) -> None:
    """Write model.safetensors at `path`. `weights`: canonical name → float32, each asked for once for each tensor that it
    is a part of. `places`: as of `plain_places`, with the names that the new file has.

    Raises `NumericalError` for a number that its stored type cannot hold, `UnsupportedModelError` for a header that is larger
    than readers take.
    """
    family, layout = FAMILIES[config.family], decoder_layout(config)
    parts, shapes, norms = stored_parts(layout), layout.checkpoint_shapes(), layout.norm_tensors
    groups: dict[str, tuple[str, list[str]]] = {}  # stored name → (type, weights)
    for name, (stored, dtype) in places.items():
        groups.setdefault(stored, (dtype, []))[1].append(name)

    def is_transposed(stored: str, name: str) -> bool:
        return family.transposed and len(shapes[name]) == 2 and _module(family.canonical_name(stored)) in parts

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    size = 0
    for stored, (dtype, names) in groups.items():
        shape = [sum(shapes[name][0] for name in names), *shapes[names[0]][1:]]
        length = math.prod(shape) * _DTYPES[dtype].itemsize
        shape = shape[::-1] if is_transposed(stored, names[0]) else shape
        header[stored] = {"dtype": dtype, "shape": shape, "data_offsets": [size, size + length]}
        size += length
    text = json.dumps(header).encode()
    text = text.ljust((len(text) + 7) // 8 * 8)
    if len(text) > MAX_HEADER_BYTES:
        raise UnsupportedModelError(
            f"the model has so many tensors that its header has {len(text)} bytes, and at most {MAX_HEADER_BYTES} are read"
        )
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for stored, (dtype, names) in groups.items():
            rows = parts.get(_module(family.canonical_name(stored)), {})
            order = [f"{part}.{names[0].rpartition('.')[2]}" for part in rows] if len(names) > 1 else names
            pieces = [weights[name] - family.norm_offset if name in norms else weights[name] for name in order]
            whole = join_rows(config, rows, torch.cat(pieces)) if len(pieces) > 1 else pieces[0]
            whole = whole.t() if is_transposed(stored, names[0]) else whole
            cast = whole.to(_DTYPES[dtype]).contiguous()
            if not torch.isfinite(cast).all():
                raise NumericalError(
                    f"'{stored}' has a number that {dtype}, the type of the model's weights, cannot hold; store the model in "
                    "float32 first"
                )
            file.write(cast.reshape(-1).view(torch.uint8).numpy().data)


def _module(name: str | None) -> str:
    return (name or "").rpartition(".")[0]
