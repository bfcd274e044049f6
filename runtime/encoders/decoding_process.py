"""The process that decodes images for `ImageDecoder`. A line of JSON with the settings comes in; then, for each image, a line
with its size, and its bytes. Out go a line that it was taken, a line with the answer, and the tiles if they are wanted.
"""

from __future__ import annotations

import json
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..model.encoders.vision import ImageProcessor

U8 = npt.NDArray[np.uint8]
KINDS = {"PNG": "png", "JPEG": "jpeg", "MPO": "jpeg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
READ = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # a JPEG of several pictures becomes an MPO
FORMATS = "PNG, JPEG, WebP, GIF or BMP"
MEMORY = 2 * 2**30  # of the process, address space, beside what it has when it is ready
_TURNED = (5, 6, 7, 8)  # EXIF's orientations that change edges
_LATE_EXIF = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")  # a PNG may have them behind its pixels


def _decoded(
    content: bytes, settings: ImageProcessor, most_pixels: int, *, is_look: bool
) -> tuple[dict[str, Any], U8 | None]:
    """The answer, and the tiles if there are any. `is_look`: without them, by the header alone where that is enough."""
    from PIL import ExifTags, Image, ImageOps

    from .tiles import cut, shape

    try:
        image = Image.open(BytesIO(content), formats=READ)
    except MemoryError:
        return {"refused": "memory"}, None
    except Exception:  # decoders raise what they like
        return {"refused": "format"}, None
    width, height = image.size
    if width * height > most_pixels:
        return {"too_many": width * height}, None
    kind = str(image.format)
    try:
        if kind != "MPO" and getattr(image, "n_frames", 1) > 1:  # of a JPEG, the first picture is the photograph
            return {"refused": "animation"}, None
        if image.mode in ("I", "F", "I;16", "I;16B", "I;16L", "I;16N"):  # Pillow would cut their values off
            return {"refused": "depth"}, None
        if is_look:
            if kind == "PNG" and not any(mark in content for mark in _LATE_EXIF):
                return _said(*shape(width, height, settings), kind), None
            is_turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
            edges = (height, width) if is_turned else (width, height)
            return _said(*shape(*edges, settings), kind), None
        image.load()
        upright = ImageOps.exif_transpose(image).convert("RGB")
        pixels, rows, columns = cut(upright, settings)
    except MemoryError:
        return {"refused": "memory"}, None
    except Exception:
        return {"refused": "damaged"}, None
    return _said(rows, columns, kind), pixels


def _said(rows: int, columns: int, kind: str) -> dict[str, Any]:
    return {"rows": rows, "columns": columns, "kind": KINDS[kind]}


def _main() -> None:
    import resource
    import warnings

    from PIL import Image

    from . import tiles  # noqa: F401  before the limit

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    setting = json.loads(sys.stdin.buffer.readline())
    settings = ImageProcessor(**setting["processor"])
    Image.MAX_IMAGE_PIXELS = None  # the limit is asked here, when the header is read
    Image.preinit()
    Image.init()
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    out = sys.stdout.buffer
    out.write(b'"ready"\n')
    out.flush()
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        content = sys.stdin.buffer.read(asked["size"])
        out.write(b'"taken"\n')  # from here on, an end is the image's fault
        out.flush()
        answer, pixels = _decoded(content, settings, setting["most_pixels"], is_look=asked["is_look"])
        out.write(json.dumps(answer).encode() + b"\n")
        if pixels is not None:
            out.write(pixels.data)
        out.flush()


if __name__ == "__main__":
    _main()
