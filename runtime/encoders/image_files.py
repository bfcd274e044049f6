"""Files of images, in the process that decodes them: what `images.ImageKind` asks for."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt

from ..model.encoders.image import ImageProcessor

U8 = npt.NDArray[np.uint8]
TYPES = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",  # a JPEG of several pictures
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
}
FORMATS = "PNG, JPEG, WebP, GIF or BMP"
_READ = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_TURNED = (5, 6, 7, 8)  # EXIF's orientations that change edges
_LATE_EXIF = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")  # a PNG may have them behind its pixels


class ImageFiles:
    """Made before the process has its limits: it imports what it needs."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from PIL import Image

        from . import tiles  # noqa: F401

        self._most_pixels, self._processor = settings["most_pixels"], ImageProcessor(**settings["processor"])
        Image.MAX_IMAGE_PIXELS = None  # the limit is asked here, when the header is read
        Image.preinit()
        Image.init()

    def decoded(self, content: bytes, is_look: bool) -> tuple[dict[str, Any], U8 | None]:
        """The answer, and the tiles if there are any. `is_look`: without them, by the header alone where that is enough."""
        from PIL import ExifTags, Image, ImageOps

        from .tiles import cut, shape

        try:
            image = Image.open(BytesIO(content), formats=_READ)
        except MemoryError:
            return {"refused": "memory"}, None
        except Exception:  # decoders raise what they like
            return {"refused": "format"}, None
        width, height = image.size
        if width * height > self._most_pixels:
            return {"refused": "pixels", "value": width * height}, None
        kind = str(image.format)
        try:
            if kind != "MPO" and getattr(image, "n_frames", 1) > 1:  # of a JPEG, the first picture is the photograph
                return {"refused": "animation"}, None
            if image.mode in ("I", "F", "I;16", "I;16B", "I;16L", "I;16N"):  # Pillow would cut their values off
                return {"refused": "depth"}, None
            if is_look:
                if kind == "PNG" and not any(mark in content for mark in _LATE_EXIF):
                    return _said(shape(width, height, self._processor), kind), None
                is_turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
                edges = (height, width) if is_turned else (width, height)
                return _said(shape(*edges, self._processor), kind), None
            image.load()
            upright = ImageOps.exif_transpose(image).convert("RGB")
            pixels, rows, columns = cut(upright, self._processor)
        except MemoryError:
            return {"refused": "memory"}, None
        except Exception:
            return {"refused": "damaged"}, None
        return _said((rows, columns), kind), pixels


def _said(dims: tuple[int, int], kind: str) -> dict[str, Any]:
    return {"dims": dims, "type": TYPES[kind]}
