"""The weight files of a model directory: which there are, and every tensor in them. Needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from ..errors import BundleError, NotFoundError
from ..model.files import read_object
from ..model.stored import StoredTensor, read_bytes, read_header

SHARDS = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise NotFoundError(f"'{path}' does not exist; a model directory has config.json and model.safetensors")
    return read_object(path, "pull the model again")


def weight_files(model_dir: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names, sorted. Raises `NotFoundError`."""
    model_dir = Path(model_dir)
    index, single = model_dir / SHARDS, model_dir / "model.safetensors"
    names = sorted(set(shard_map(index).values())) if index.is_file() else [single.name]
    if single.is_file() and names != [single.name]:
        raise BundleError(
            f"'{model_dir}' has both {single.name} and {index.name}, which names other files; delete the older of the two"
        )
    for name in names:
        if not (model_dir / name).is_file():
            raise NotFoundError(
                f"'{model_dir / name}' does not exist; pull the model (only safetensors are read; a pull "
                "rewrites pytorch_model.bin)"
            )
    return [model_dir / name for name in names]


def shard_map(index: Path) -> dict[str, str]:
    """Tensor → file of an index of shards. Raises `BundleError` if the index is damaged."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise BundleError(f"'{index}' has no weight_map of tensors to files; pull the model again")
    if any(Path(file).name != file for file in found.values()):
        raise BundleError(f"'{index}' names files outside of the model's directory")
    return found


FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
DTYPES = FLOATS | {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in an open weight file."""

    file: BufferedReader
    path: Path
    place: StoredTensor


def open_tensors(model_dir: Path) -> dict[str, Stored]:
    """Every tensor of the weight files. With shards, the files hold what the index says, and each tensor once."""
    stored: dict[str, Stored] = {}
    index = model_dir / SHARDS
    places = shard_map(index) if index.is_file() else {}
    for path in weight_files(model_dir):
        file = path.open("rb")
        try:
            found = {name: Stored(file, path, place) for name, place in read_header(file, path).items()}
        except BundleError as error:
            raise BundleError(f"'{path}' is torn or damaged ({error}); pull the model again") from None
        if places:
            named = {name for name, place in places.items() if place == path.name}
            if named != set(found):
                odd = sorted(named ^ set(found))
                raise BundleError(
                    f"'{path}' and its index do not hold the same tensors: {odd[:3]}; pull the model again"
                )
        stored |= found
    return stored


def read_tensor(one: Stored) -> torch.Tensor:
    """Raises `BundleError` if the file is shorter than it was."""
    content = read_bytes(one.file, one.path, one.place)
    if not content.size:
        return torch.empty(one.place.shape, dtype=DTYPES[one.place.dtype])
    return torch.from_numpy(content).view(DTYPES[one.place.dtype]).reshape(one.place.shape)
