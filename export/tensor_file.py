"""`TensorFile`: a safetensors file that is written tensor by tensor, so that no more than one is in memory.

The header comes first and names every tensor, so room for it is left free; what is not needed is filled with spaces, which the
format allows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.errors import UnsupportedModelError
from ..runtime.model.stored import DTYPES, MAX_HEADER_BYTES

_DTYPES = {np.dtype(kind): name for name, kind in DTYPES.items()}
_ENTRY = 160  # bytes of an entry beside its name: type, four sizes and two offsets of at most 19 digits


class TensorFile:
    """`names`: of all tensors that may be written. Use it in a `with` block; if that raises, the file stays without a header.
    Raises `UnsupportedModelError` if the header would be larger than readers take."""

    def __init__(self, path: Path, names: Iterable[str], metadata: Mapping[str, str]) -> None:
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)}
        room = len(json.dumps(self._header)) + sum(len(json.dumps(name)) + _ENTRY for name in names)
        if room >= MAX_HEADER_BYTES:
            raise UnsupportedModelError(
                f"the bundle has so many tensors that its header has {room} bytes, and at most {MAX_HEADER_BYTES} are read; "
                "export fewer members together"
            )
        self._room = (room + 7) // 8 * 8
        self._size = 0
        self._file = path.open("wb")
        self._file.seek(8 + self._room)

    def add(self, name: str, values: npt.NDArray[Any]) -> None:
        if name in self._header:
            raise ValueError(f"{name} is written twice")
        values = np.ascontiguousarray(values)
        place = [self._size, self._size + values.nbytes]
        self._header[name] = {"dtype": _DTYPES[values.dtype], "shape": list(values.shape), "data_offsets": place}
        self._file.write(values.reshape(-1).view(np.uint8).data)
        self._size += values.nbytes

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is not None:
                return
            header = json.dumps(self._header).encode()
            if len(header) > self._room:
                raise ValueError("more was written than was announced")
            self._file.seek(0)
            self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
