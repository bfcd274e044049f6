"""How a bundle's weights file stores tensors, and how to find them. The file is safetensors; names are those of
`layout`.

A member's own tensor is stored as `members.<member>.<name>` and is preferred to the base's. A weight [rows, columns]
is one tensor in float32, or it is quantised in groups of columns and stored as two or three tensors:

    <weight>.values    [rows, groups, group_size * bits / 8] u8; 4 bits: low nibble first
    <weight>.scales    [rows, groups] float16 or float32
    <weight>.minima    [rows, groups] of the scales' type; 4 bits only

    8 bits    w = (value - 128) * scale
    4 bits    w = value * scale + minimum
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Container, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import BundleError

Array = npt.NDArray[Any]
MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it
DTYPES = {"F32": np.float32, "F16": np.float16, "U8": np.uint8}  # that a bundle's tensors may have
_MAX_DIMENSIONS = 16
_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}


class HasShape(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The place of a tensor in the weights file: bytes `offset` … `offset + length`."""

    dtype: str  # the name in safetensors: F32, F16, U8
    shape: tuple[int, ...]
    offset: int
    length: int


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The place of each tensor of a safetensors file (header: 8 bytes length, then JSON; its offsets count from its
    end). Raises `BundleError` for a header that is none, and for a tensor that is not in the file or has another size than
    its shape."""
    with path.open("rb") as file:
        return read_header(file, path)


def read_header(file: BufferedReader, path: Path) -> dict[str, StoredTensor]:
    """`stored_tensors` of an open file."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > min(size - 8, MAX_HEADER_BYTES):  # asked before so much memory is taken
        raise BundleError(
            f"'{path}' is torn or damaged, or no safetensors file: its header would have {length} bytes, the file has {size}; "
            "export the bundle again"
        )
    content = file.read(length)
    start = 8 + length
    try:
        header = json.loads(content)
        found = {name: _place(entry, start) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"'{path}' is torn or damaged, or no safetensors file: {error!r}; export the bundle again"
        ) from None
    for name, tensor in found.items():
        if tensor.offset < start or tensor.length < 0 or tensor.offset + tensor.length > size:
            raise BundleError(
                f"'{path}' is damaged: tensor '{name}' would be bytes {tensor.offset} to {tensor.offset + tensor.length} of "
                f"{size}; export the bundle again"
            )
    return found


def _place(entry: Mapping[str, Any], start: int) -> StoredTensor:
    """Raises what a header that is none raises."""
    first, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and 0 <= number < 2**48 for number in (first, end, *shape)):
        raise ValueError(f"a size is no small integer: {entry}")
    if len(shape) > _MAX_DIMENSIONS or math.prod(max(number, 1) for number in shape) >= 2**48:
        raise ValueError(f"a shape is too large: {entry}")
    if end - first != math.prod(shape) * _BYTES[entry["dtype"]]:
        raise ValueError(f"a tensor's bytes are not those of its shape: {entry}")
    return StoredTensor(entry["dtype"], shape, start + first, end - first)


def read_tensor(file: BufferedReader, path: Path, tensor: StoredTensor) -> Array:
    """A tensor of the open file. It is read, not mapped, so that the file's pages do not stay in the process. Raises
    `BundleError` if the file is shorter than it was, or for a type that bundles do not have."""
    if tensor.dtype not in DTYPES:
        raise BundleError(
            f"'{path}' holds a tensor of type {tensor.dtype}, a bundle's are {list(DTYPES)}; export it again"
        )
    return read_bytes(file, path, tensor).view(DTYPES[tensor.dtype]).reshape(tensor.shape)


def read_bytes(file: BufferedReader, path: Path, tensor: StoredTensor) -> npt.NDArray[np.uint8]:
    """The bytes of a tensor. Raises `BundleError` if the file is shorter than it was."""
    values = np.empty(tensor.length, np.uint8)
    file.seek(tensor.offset)
    if file.readinto(values.data) != tensor.length:
        raise BundleError(f"'{path}' was changed while it was read; start again")
    return values


def own_name(member: str, name: str) -> str:
    """The stored name of a member's own tensor."""
    return f"members.{member}.{name}"


def resolve(tensors: Container[str], name: str, member: str | None) -> str:
    """The stored name of a tensor as `member` has it: its own if there is one, else the base's. `member` None: the
    base's."""
    if member is None:
        return name
    own = own_name(member, name)
    return own if own in tensors or f"{own}.values" in tensors else name


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """How the weight `name` [rows, columns] is stored. `bits` 32: as one tensor, without groups."""

    name: str
    rows: int
    columns: int
    bits: int = 32
    group_size: int = 0

    @property
    def values(self) -> str:
        return f"{self.name}.values"

    @property
    def scales(self) -> str:
        return f"{self.name}.scales"

    @property
    def minima(self) -> str | None:
        return f"{self.name}.minima" if self.bits == 4 else None

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that it is stored as."""
        if self.bits == 32:
            return (self.name,)
        return (self.values, self.scales) if self.minima is None else (self.values, self.scales, self.minima)

    @property
    def groups(self) -> int:
        """Number of groups of the columns. Quantised weights only."""
        return self.columns // self.group_size


def stored_weight(tensors: Mapping[str, HasShape], name: str) -> StoredWeight:
    """How the weight with the stored name `name` is stored. Raises `BundleError` if a tensor is missing or
    misshapen."""
    if name in tensors:
        shape = tensors[name].shape
        if len(shape) != 2:
            raise BundleError(f"the bundle's '{name}' has {len(shape)} dimensions, a weight has 2; export it again")
        return StoredWeight(name, *shape)
    if f"{name}.values" not in tensors or f"{name}.scales" not in tensors:
        raise BundleError(f"the bundle has no tensor '{name}'; export it again")
    shape = tensors[f"{name}.values"].shape
    bits = 4 if f"{name}.minima" in tensors else 8
    if len(shape) != 3 or not shape[2]:
        raise BundleError(f"the bundle's '{name}.values' are {list(shape)}, they must be [rows, groups, bytes]")
    group_size = shape[2] * 8 // bits
    return StoredWeight(name, shape[0], shape[1] * group_size, bits, group_size)


def unpack_nibbles(packed: Array) -> Array:
    """Unpack two values per byte along the last axis, low nibble first."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
