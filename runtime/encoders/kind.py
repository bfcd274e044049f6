"""`MediumKind`: what the reader of media knows about images, and about sounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..api.config import EngineConfig
from ..model.encoders import Encoder

if TYPE_CHECKING:
    import onnxruntime as ort

F32 = npt.NDArray[np.float32]
Dims = tuple[int, ...]


class MediumKind(ABC):
    """`medium`: its name, which is the type of a part of a message. `most`: of a request, `most_bytes`: of their files together.
    Both sides are here: what the decoding process may answer, and what the encoder's graph gets of it."""

    medium: str
    noun: str  # with its article
    remedy: str  # for files that have too many bytes
    reasons: Mapping[str, str]  # why a file is refused, by the process's word for it; {value} is a number that it says
    types: frozenset[str]  # of files that are read, such as image/png
    packages: Sequence[tuple[str, str]]  # module → the name that its package is known by
    encoder: Encoder

    def __init__(self, encoder: Encoder, config: EngineConfig) -> None:
        self.most: int = getattr(config, f"max_{self.medium}s")
        self.most_bytes: int = getattr(config, f"max_{self.medium}_bytes")

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """JSON, for the decoding process."""

    @property
    @abstractmethod
    def digest(self) -> bytes:
        """Of the settings: what is made of a file with others has other rows."""

    @abstractmethod
    def check_dims(self, dims: Dims) -> Dims:
        """Sizes that the process says of a file. Raises `ValueError` for what cannot be: one that was taken over may say
        anything."""

    def check_file(self, dims: Dims) -> str | None:
        """Why a file of these sizes cannot be used, a key of `reasons`; None: it can."""
        return None

    @abstractmethod
    def decoded_as(self, dims: Dims) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Type and shape of what a file of these sizes is decoded to."""

    @abstractmethod
    def text(self, dims: Dims) -> str:
        """What the prompt has in the place of a file of these sizes."""

    @abstractmethod
    def runs(self, dims: Dims) -> Sequence[int]:
        """Lengths of the runs of placeholders in that."""

    @abstractmethod
    def encode(self, session: ort.InferenceSession, values: npt.NDArray[Any]) -> F32:
        """The rows of what was decoded, [rows of all runs, hidden]."""

    @abstractmethod
    def graph_shapes(self) -> tuple[list[Any], list[Any]]:
        """Shapes of the graph's input and output, without the number of inputs; None for what is not fixed."""

    def type_of(self, said: str) -> str:
        """A media type as senders write it, under the name that `types` has."""
        return said.replace("/x-", "/")
