"""An image as tiles, as transformers' image processor of Idefics3 cuts it, on Pillow: the same pixels, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..model.encoders.image import MAX_EDGE, ImageProcessor

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]


def cut(image: Image.Image, settings: ImageProcessor) -> tuple[U8, int, int]:
    """(tiles [tiles, 3, edge, edge]; how many there are beside each other: rows, columns) of an RGB image. With 0 rows the whole
    image is the only tile, otherwise the last."""
    resample, edge = Image.Resampling(settings.resample), settings.tile_size
    if settings.longest_edge is not None:
        image = image.resize(_bounded(*_resized(*image.size, settings.longest_edge)), resample)
    if not settings.splits:
        return _stacked([image.resize((edge, edge), resample)]), 0, 0
    width, height = _whole_tiles(*image.size, edge)
    image = image.resize((width, height), resample)
    columns, rows = width // edge, height // edge
    if rows == columns == 1:
        return _stacked([image]), 0, 0
    pixels = np.asarray(image)
    tiles: list[Image.Image | U8] = [
        pixels[row * edge : (row + 1) * edge, column * edge : (column + 1) * edge]
        for row in range(rows)
        for column in range(columns)
    ]
    return _stacked([*tiles, image.resize((edge, edge), resample)]), rows, columns


def shape(width: int, height: int, settings: ImageProcessor) -> tuple[int, int]:
    """Rows and columns of tiles of an image of this size, as `cut` returns them."""
    if not settings.splits:
        return 0, 0
    if settings.longest_edge is not None:
        width, height = _bounded(*_resized(width, height, settings.longest_edge))
    whole_width, whole_height = _whole_tiles(width, height, settings.tile_size)
    columns, rows = whole_width // settings.tile_size, whole_height // settings.tile_size
    return (0, 0) if rows == columns == 1 else (rows, columns)


def normalised(tiles: U8, settings: ImageProcessor) -> F32:
    """What the encoder takes, [tiles, 3, edge, edge]."""
    values = tiles.astype(np.float32)
    if settings.rescale is not None:
        values = (tiles.astype(np.float64) * settings.rescale).astype(np.float32)
    if settings.mean is not None and settings.std is not None:
        mean, std = (np.array(three, np.float32)[:, None, None] for three in (settings.mean, settings.std))
        values = (values - mean) / std
    return np.ascontiguousarray(values)


def _resized(width: int, height: int, longest: int) -> tuple[int, int]:
    """The longer edge becomes `longest`, the other one an even number."""
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    return max(width, 1), max(height, 1)


def _bounded(width: int, height: int) -> tuple[int, int]:
    ratio = width / height
    if width >= height and width > MAX_EDGE:
        width, height = MAX_EDGE, int(MAX_EDGE / ratio)
    elif height > width and height > MAX_EDGE:
        width, height = int(MAX_EDGE * ratio), MAX_EDGE
    return max(width, 1), max(height, 1)


def _whole_tiles(width: int, height: int, edge: int) -> tuple[int, int]:
    """The size, in whole tiles, to which an image is resized before it is cut."""
    ratio = width / height
    if width >= height:
        width = math.ceil(width / edge) * edge
        height = math.ceil(int(width / ratio) / edge) * edge
    else:
        height = math.ceil(height / edge) * edge
        width = math.ceil(int(height * ratio) / edge) * edge
    return max(width, edge), max(height, edge)


def _stacked(tiles: Sequence[Image.Image | U8]) -> U8:
    return np.ascontiguousarray(np.stack([np.asarray(tile) for tile in tiles]).transpose(0, 3, 1, 2))
