"""CTranslate2's model.bin: which variables it holds, and their values (OpenNMT/CTranslate2, `specs/model_spec.py`).

All numbers are little-endian. A text is its length with a closing zero byte (u16), its bytes, the zero byte.

    u32 version (6)    text specification, u32 its revision
    u32 count, and so many variables:   text name, u8 rank, u32 per dimension, u8 type, u32 bytes, the bytes
    u32 count, and so many aliases:     text alias, text variable

A file is a stranger's: everything is checked against its size before it is used, and values are read when they are asked for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch

from ..errors import BundleError, NotFoundError, UnsupportedModelError, shown

FILE = "model.bin"
_VERSION = 6
_TYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)
_MOST, _LONGEST, _RANK = 2**16, 512, 8  # variables, bytes of a name, dimensions


@dataclass(frozen=True, slots=True)
class _Variable:
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int  # of its bytes in the file
    length: int


class Variables(Mapping[str, torch.Tensor]):
    """The variables of a model directory by name, aliases among them; those of a quantised weight w (int8 with a scale for each
    row, int16 with one for all) as w / scale. Floats are float32. Each is read when it is asked for; a value that is not finite
    is a `BundleError`. Close it, or use it in a `with` block.

    Raises `NotFoundError` without a model.bin, `BundleError` if it is damaged, `UnsupportedModelError` for another version of
    the format or another specification than `specification`."""

    def __init__(self, model_dir: Path, specification: str) -> None:
        self.path = model_dir / FILE
        if not self.path.is_file():
            raise NotFoundError(f"'{self.path}' does not exist; convert the model with CTranslate2 again")
        self._file = self.path.open("rb")
        try:
            self._found, self._aliases = _read_header(self._file, self.path, specification)
        except BaseException:
            self._file.close()
            raise

    def __getitem__(self, name: str) -> torch.Tensor:
        variable = self._variable(name)
        values = self._read(name, variable)
        scale_name = f"{name}_scale"
        if variable.dtype not in (torch.int8, torch.int16) or scale_name not in self:
            return values.float() if values.is_floating_point() else values
        scale = self._read(scale_name, self._variable(scale_name)).float()
        if not (scale > 0).all() or scale.shape not in ((), (1,), variable.shape[:1]):
            raise BundleError(
                f"'{scale_name}' of '{self.path}' fits no weight of the shape {variable.shape}; convert it again"
            )
        scale = scale if scale.ndim == 0 or len(scale) == 1 else scale.view(-1, *[1] * (values.ndim - 1))
        return values.float() / scale

    def __iter__(self) -> Iterator[str]:
        yield from self._found
        yield from self._aliases

    def __len__(self) -> int:
        return len(self._found) + len(self._aliases)

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self._found or name in self._aliases

    def shape(self, name: str) -> tuple[int, ...]:
        return self._variable(name).shape

    def close(self) -> None:
        """Nothing can be read any more."""
        self._file.close()

    def __enter__(self) -> Variables:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _variable(self, name: str) -> _Variable:
        return self._found[self._aliases.get(name, name)]

    def _read(self, name: str, variable: _Variable) -> torch.Tensor:
        self._file.seek(variable.start)
        content = self._file.read(variable.length)
        if len(content) < variable.length:
            raise BundleError(f"'{self.path}' became shorter while it was read; convert the model again")
        if not content:
            return torch.empty(variable.shape, dtype=variable.dtype)
        values = torch.frombuffer(bytearray(content), dtype=variable.dtype).view(variable.shape)
        if values.is_floating_point() and not torch.isfinite(values).all():
            raise BundleError(f"'{name}' of '{self.path}' holds NaN or infinite values; convert the model again")
        return values


class _Header:
    """Reads a file from its beginning. Raises `BundleError` at its end."""

    def __init__(self, file: BufferedReader, path: Path) -> None:
        self._file, self._path = file, path
        self.size = path.stat().st_size

    def number(self, kind: str) -> int:
        (value,) = struct.unpack(f"<{kind}", self._bytes(struct.calcsize(kind)))
        return int(value)

    def text(self) -> str:
        length = self.number("H")
        if not 1 <= length <= _LONGEST:
            raise self.damage(f"a name has {length} bytes, at most {_LONGEST} are read")
        content = self._bytes(length)
        try:
            text = content[:-1].decode()
        except UnicodeDecodeError:
            text = "\0"
        if content[-1] or "\0" in text:
            raise self.damage("a name is no text that ends with a zero byte")
        return text

    def skip(self, length: int) -> int:
        """Where the next `length` bytes begin, which are left out."""
        start = self._file.tell()
        if length > self.size - start:
            raise self.damage(f"{length} bytes are announced at byte {start}, and {self.size - start} are left")
        self._file.seek(length, 1)
        return start

    def at_end(self) -> bool:
        return self._file.tell() == self.size

    def damage(self, what: str) -> BundleError:
        return BundleError(f"'{self._path}' is torn or damaged ({what}); convert the model with CTranslate2 again")

    def _bytes(self, length: int) -> bytes:
        content = self._file.read(length)
        if len(content) < length:
            raise self.damage("it ends too early")
        return content


def _read_header(file: BufferedReader, path: Path, specification: str) -> tuple[dict[str, _Variable], dict[str, str]]:
    header = _Header(file, path)
    version = header.number("I")
    if version != _VERSION:
        raise UnsupportedModelError(
            f"'{path}' has version {version} of CTranslate2's format, version {_VERSION} is read; convert the model with "
            "CTranslate2 3 or later"
        )
    name = header.text()
    if name != specification:
        raise UnsupportedModelError(
            f"'{path}' holds a {shown(name)}, and a {specification} is needed; give another model"
        )
    header.number(
        "I"
    )  # the specification's revision: it says which optional variables there are, and they say it themselves
    found: dict[str, _Variable] = {}
    for _ in range(_count(header, "variables")):
        name = header.text()
        if name in found:
            raise header.damage(f"'{name}' stands there twice")
        found[name] = _variable(header, name)
    aliases: dict[str, str] = {}
    for _ in range(_count(header, "aliases")):
        alias, name = header.text(), header.text()
        if name not in found or alias in found or alias in aliases:
            raise header.damage(f"the alias '{alias}' of '{name}' is none")
        aliases[alias] = name
    if not header.at_end():
        raise header.damage("it goes on after its last alias")
    return found, aliases


def _count(header: _Header, what: str) -> int:
    count = header.number("I")
    if count > _MOST:
        raise header.damage(f"it has {count} {what}, at most {_MOST} are read")
    return count


def _variable(header: _Header, name: str) -> _Variable:
    rank = header.number("B")
    if rank > _RANK:
        raise header.damage(f"'{name}' has {rank} dimensions, at most {_RANK} are read")
    shape = tuple(header.number("I") for _ in range(rank))
    kind, length = header.number("B"), header.number("I")
    if kind >= len(_TYPES):
        raise header.damage(f"'{name}' has the unknown type {kind}")
    if length != math.prod(shape) * _TYPES[kind].itemsize:
        raise header.damage(f"'{name}' has the shape {shape} and {length} bytes")
    return _Variable(shape, _TYPES[kind], header.skip(length), length)
