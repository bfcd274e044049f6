"""`ImageKind`: images become tiles, and tiles rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..api.config import EngineConfig
from ..model.encoders import IMAGE
from ..model.encoders.image import MOST_TILES, ImageEncoder
from .decoding_process import MEMORY
from .image_files import FORMATS, TYPES
from .kind import F32, Dims, MediumKind

if TYPE_CHECKING:
    import onnxruntime as ort

_TILES_AT_ONCE = 4  # so that a run needs little memory, and is the same whatever else is encoded


class ImageKind(MediumKind):
    """Sizes of an image: rows and columns of its tiles before the whole image, 0 if that is all."""

    medium = IMAGE
    noun = "an image"
    remedy = "scale them down, or compress them"
    types = frozenset(TYPES.values())
    packages = (("PIL", "Pillow"),)
    encoder: ImageEncoder

    def __init__(self, encoder: ImageEncoder, config: EngineConfig) -> None:
        super().__init__(encoder, config)
        self.encoder = encoder
        self._most_pixels = config.max_image_pixels
        self.reasons = {
            "format": f"it is no image of a kind that is read: {FORMATS}",
            "damaged": "it is damaged or cut off; send the whole file",
            "animation": "it is an animation; send one picture of it",
            "depth": "its pixels have more than 8 bits a channel of grey, or are floats; convert it to 8 bits",
            "memory": f"it takes more than {MEMORY >> 30} GiB to decode; send a smaller one",
            "pixels": f"it has {{value}} pixels, at most max_image_pixels ({self._most_pixels}) are read; scale it down",
        }

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"processor": dataclasses.asdict(self.encoder.processor), "most_pixels": self._most_pixels}

    @property
    def digest(self) -> bytes:
        return self.encoder.processor.digest

    def check_dims(self, dims: Dims) -> Dims:
        rows, columns = dims
        if not 0 <= min(rows, columns) <= max(rows, columns) <= MOST_TILES:
            raise ValueError("more tiles than there can be")
        return dims

    def decoded_as(self, dims: Dims) -> tuple[np.dtype[Any], tuple[int, ...]]:
        edge = self.encoder.processor.tile_size
        return np.dtype(np.uint8), (dims[0] * dims[1] + 1, 3, edge, edge)

    def text(self, dims: Dims) -> str:
        return self.encoder.expansion(*dims)

    def runs(self, dims: Dims) -> Sequence[int]:
        return [self.encoder.rows_per_tile] * (dims[0] * dims[1] + 1)

    def encode(self, session: ort.InferenceSession, values: npt.NDArray[Any]) -> F32:
        from .tiles import normalised  # it needs Pillow

        settings = self.encoder.processor
        parts = [
            session.run(None, {"pixels": normalised(values[i : i + _TILES_AT_ONCE], settings)})[0]
            for i in range(0, len(values), _TILES_AT_ONCE)
        ]
        rows: F32 = np.concatenate(parts)
        return rows.reshape(-1, rows.shape[-1])

    def graph_shapes(self) -> tuple[list[Any], list[Any]]:
        edge = self.encoder.processor.tile_size
        return [3, edge, edge], [self.encoder.rows_per_tile, self.encoder.output_size]

    def type_of(self, said: str) -> str:
        return super().type_of(said).replace("jpg", "jpeg").replace("ms-bmp", "bmp")
