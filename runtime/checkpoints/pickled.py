"""Weights that torch has pickled (`pytorch_model.bin`), rewritten as safetensors. Needs torch.

A pickle can run any code. torch's restricted unpickler makes tensors and plain containers, and nothing else; it runs while a
model is pulled, and never afterwards: the copy in the store is safetensors.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import BundleError, NotFoundError, UnsupportedModelError
from .weight_files import SHARDS, shard_map

_SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def pickled_files(model_dir: Path) -> list[Path]:
    """pytorch_model.bin, or the shards that its index names; empty if there is neither. Raises `NotFoundError` for a shard that
    is missing, `BundleError` for a damaged index."""
    if (model_dir / _SINGLE).is_file():
        return [model_dir / _SINGLE]
    if not (model_dir / INDEX).is_file():
        return []
    names = sorted(set(shard_map(model_dir / INDEX).values()))
    for name in names:
        if not (model_dir / name).is_file():
            raise NotFoundError(f"'{model_dir / name}' does not exist; download the model again")
    return [model_dir / name for name in names]


def rewrite_pickled(files: list[Path], out: Path, on_file: Callable[[Path], None]) -> None:
    """Write the tensors of pickled files to `out` as shards with an index, one file at a time. Raises `UnsupportedModelError` for
    a file that holds anything but named tensors, `BundleError` for one that is damaged or stores a name twice."""
    places: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        shard = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = read_pickled(file)
        twice = sorted(set(tensors) & set(places))
        if twice:
            raise BundleError(f"'{file}' stores {twice[:3]}, and so does another shard; download the model again")
        # A copy of each: tied weights share memory, which safetensors refuses.
        save_file(
            {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, out / shard, {"format": "pt"}
        )
        places |= dict.fromkeys(tensors, shard)
        on_file(file)
    (out / SHARDS).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def read_pickled(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled file, by name. Raises `UnsupportedModelError` if it holds anything else, `BundleError` if it is
    damaged."""
    try:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # of before torch 1.6: no archive that can be mapped
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise UnsupportedModelError(
            f"'{file}' holds more than tensors, which is not unpickled ({reason}); save the model as safetensors"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError) as error:
        raise BundleError(f"'{file}' is torn or damaged ({error!r}); download the model again") from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in found.items()
    ):
        raise UnsupportedModelError(
            f"'{file}' must hold tensors by name, and nothing else; save the model as safetensors"
        )
    return found
