"""`DataFile`: the tensors of an ONNX graph in a file beside it, of any size, written one after the other."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.model.stored import StoredTensor, read_bytes, read_tensor
from .graph_nodes import Place

_PAGE = 4096  # bytes; a tensor begins with one, so that it can be mapped


class DataFile:
    """Writes the file `path`, and reads tensors of the weights file `source`. Use it in a `with` block. Raises `BundleError` if
    `source` is shorter than it was."""

    def __init__(self, path: Path, source: Path) -> None:
        self._source_path, self._source = source, source.open("rb")
        self._name, self._file = path.name, path.open("wb")
        self._places: dict[StoredTensor, Place] = {}

    def read(self, tensor: StoredTensor) -> npt.NDArray[Any]:
        """The values of a stored tensor."""
        return read_tensor(self._source, self._source_path, tensor)

    def copy(self, tensor: StoredTensor) -> Place:
        """Write the bytes of a stored tensor, the first time. Returns their place."""
        if tensor not in self._places:
            self._places[tensor] = self.add(read_bytes(self._source, self._source_path, tensor))
        return self._places[tensor]

    def add(self, values: npt.NDArray[Any]) -> Place:
        """Write an array, little-endian and row by row. Returns its place."""
        offset = -(-self._file.tell() // _PAGE) * _PAGE
        self._file.seek(offset)
        values = np.ascontiguousarray(values)
        self._file.write(values.reshape(-1).view(np.uint8).data)
        return self._name, offset, values.nbytes

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._source.close()
        self._file.close()
