"""`ImageDecoder`: files of images become tiles in a process of its own, with bounds on memory and time. What decodes them is not
Python: a hostile file may end the process, or take all of its memory, or never end.

Run as a module it is that process: a line of JSON with the settings comes in; then, for each image, a line with its size and its
bytes, and a line goes out, and the tiles if they are wanted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequestError, UnavailableError, shown
from ..model.encoders.vision import MOST_TILES, ImageProcessor

U8 = npt.NDArray[np.uint8]
LIMIT_S = 5.0  # of computing, of an image
_WAIT_S = 60.0  # for that, on a busy machine
_MEMORY = 2 * 2**30  # of the process, address space, beside what it has when it is ready
_START_S, _END_S = 60.0, 5.0
_LONGEST_LINE = 2**16
_KINDS = {"PNG": "png", "JPEG": "jpeg", "MPO": "jpeg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # a JPEG of several pictures becomes an MPO
FORMATS = "PNG, JPEG, WebP, GIF or BMP"
# What is wrong with a file, by the worker's word for it. The library's own text stays here: it may say what lies in memory.
_REASONS = {
    "format": f"it is no image of a kind that is read: {FORMATS}",
    "damaged": "it is damaged or cut off; send the whole file",
    "animation": "it is an animation; send one picture of it",
    "depth": "its pixels have more than 8 bits a channel of grey, or are floats; convert it to 8 bits",
    "memory": f"it takes more than {_MEMORY >> 30} GiB to decode; send a smaller one",
}


@dataclass(frozen=True, slots=True)
class Tiles:
    """`pixels` [tiles, 3, edge, edge]; `rows` and `columns` of tiles before the whole image, 0 if that is all."""

    pixels: U8
    rows: int
    columns: int


class ImageDecoder:
    """Not thread-safe. The process is started when it is first needed. `most_pixels`: an image with more is refused when its
    header is read."""

    def __init__(self, settings: ImageProcessor, most_pixels: int) -> None:
        self._most_pixels, self._edge = most_pixels, settings.tile_size
        self._setting = json.dumps({"processor": dataclasses.asdict(settings), "most_pixels": most_pixels})
        self._process: subprocess.Popen[bytes] | None = None

    def look(self, content: bytes, media_type: str = "") -> tuple[int, int]:
        """Rows and columns of the tiles that `decode` will give, by the image's header. `media_type`: what the sender says that
        it is, such as image/png; empty: nothing. Raises `InvalidRequestError` for what is no image that is read, and
        `UnavailableError` if that could not be found out: the process did not start, was ended by somebody, or had no time on a
        busy machine."""
        answer = self._ask(content, is_look=True)
        _check_type(media_type, answer["kind"])
        return int(answer["rows"]), int(answer["columns"])

    def decode(self, content: bytes) -> Tiles:
        """The tiles of an image. Raises what `look` raises."""
        answer = self._ask(content, is_look=False)
        return Tiles(answer["pixels"], int(answer["rows"]), int(answer["columns"]))

    def _ask(self, content: bytes, *, is_look: bool) -> dict[str, Any]:
        if not content:
            raise refusal("it has no bytes")
        try:
            line = json.dumps({"size": len(content), "is_look": is_look}).encode()
            for _ in range(2):
                process = self._started()
                before = _cpu_seconds(process.pid)
                if not self._send(line + b"\n" + content, before):
                    if process.poll() is None:  # it takes in nothing
                        break
                    self.close()  # it had ended before it was asked
                    continue
                answer = self._line(before)
                if answer is not None:
                    return self._answered(answer, is_look=is_look)
                spent = _cpu_seconds(process.pid) - before
                self.close()
                if process.returncode in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS):
                    raise refusal("it cannot be decoded")
                if spent > LIMIT_S:
                    raise refusal(f"it takes more than {LIMIT_S:g} s to decode; send a smaller or simpler one")
                break
        except InvalidRequestError:
            raise
        except Exception:
            self.close()
            raise
        self.close()
        raise UnavailableError("the image could not be decoded, because the server is busy; try again later")

    def close(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.communicate()
            self._process = None

    def _answered(self, answer: Any, *, is_look: bool) -> dict[str, Any]:
        """What the process says, checked: one that was taken over may say anything."""
        if "too_many" in answer:
            raise refusal(
                f"it has {shown(answer['too_many'])} pixels, at most max_image_pixels ({self._most_pixels}) are read; scale it "
                "down"
            )
        if "refused" in answer:
            raise refusal(_REASONS[answer["refused"]])
        rows, columns, edge = int(answer["rows"]), int(answer["columns"]), self._edge
        fits = 0 <= min(rows, columns) <= max(rows, columns) <= MOST_TILES and answer["kind"] in _KINDS.values()
        count = rows * columns + 1
        found = {"rows": rows, "columns": columns, "kind": answer["kind"]}
        if fits and is_look:
            return found
        content = self._bytes(count * 3 * edge * edge) if fits else None
        if content is None:
            self.close()
            raise UnavailableError("the process that decodes images has ended; try again")
        return {**found, "pixels": np.frombuffer(content, np.uint8).reshape(count, 3, edge, edge)}

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is for the server
                env={
                    **os.environ,
                    "OPENBLAS_NUM_THREADS": "1",
                    "OMP_NUM_THREADS": "1",
                },  # numpy here multiplies nothing
            )
            assert self._process.stdin is not None and self._process.stdout is not None
            os.set_blocking(self._process.stdin.fileno(), False)
            try:
                self._send(self._setting.encode() + b"\n", None)
                is_ready = self._line(None) == "ready"
            except OSError:
                is_ready = False
            if not is_ready:
                self.close()
                raise UnavailableError("images cannot be decoded: their process does not start; try again later")
        return self._process

    def _send(self, content: bytes, began: float | None) -> bool:
        """False if the process does not take it."""
        assert self._process is not None and self._process.stdin is not None
        handle, poll, left = self._process.stdin.fileno(), select.poll(), memoryview(content)
        poll.register(handle, select.POLLOUT)
        until = time.monotonic() + _WAIT_S
        while left:
            if time.monotonic() > until or self._is_over(began):
                return False
            if not poll.poll(200):
                continue
            try:
                left = left[os.write(handle, left[: 2**20]) :]
            except BlockingIOError:
                continue
            except OSError:
                return False
        return True

    def _line(self, began: float | None) -> Any:
        """The next line of JSON; None if it does not come."""
        content = bytearray()
        while not content.endswith(b"\n"):
            piece = self._piece(1, began)  # the tiles follow; a line is short
            if not piece or len(content) > _LONGEST_LINE:
                return None
            content += piece
        return json.loads(content)

    def _bytes(self, size: int) -> bytes | None:
        content = bytearray()
        while len(content) < size:
            piece = self._piece(min(size - len(content), 2**20), None)
            if not piece:
                return None
            content += piece
        return bytes(content)

    def _piece(self, size: int, began: float | None) -> bytes:
        """At most `size` bytes that the process has written; none if it ends or takes too long. `began`: the seconds that it
        had computed when it was asked; None: they do not count."""
        assert self._process is not None and self._process.stdout is not None
        handle, poll = self._process.stdout.fileno(), select.poll()  # select.select has no room for many descriptors
        poll.register(handle, select.POLLIN)
        until = time.monotonic() + (_WAIT_S if began is not None else _START_S)
        while not poll.poll(100):
            if time.monotonic() > until or self._is_over(began):
                return b""
        piece = os.read(handle, size)
        if not piece:  # it ends: how, is known in a moment
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
        return piece

    def _is_over(self, began: float | None) -> bool:
        assert self._process is not None
        return began is not None and _cpu_seconds(self._process.pid) - began > LIMIT_S


def refusal(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"an image cannot be used: {reason}", field="messages.content")


def _check_type(said: str, kind: str) -> None:
    """Whether a file is what its sender says."""
    own = said.removeprefix("image/").removeprefix("x-").replace("jpg", "jpeg").replace("ms-bmp", "bmp")
    if said and own != kind:
        raise refusal(f"it is said to be {shown(said)} and is image/{kind}; say what it is")


def _cpu_seconds(pid: int) -> float:
    """Of a process so far, all threads; 0 if that is not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


# ---- the process -----------------------------------------------------------------------------------------------------


_TURNED = (5, 6, 7, 8)  # EXIF's orientations that change edges
_LATE_EXIF = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")  # a PNG may have them behind its pixels


def _decoded(
    content: bytes, settings: ImageProcessor, most_pixels: int, *, is_look: bool
) -> tuple[dict[str, Any], U8 | None]:
    """The answer, and the tiles if there are any. `is_look`: without them, by the header alone where that is enough."""
    from PIL import ExifTags, Image, ImageOps

    from .tiles import cut, shape

    try:
        image = Image.open(BytesIO(content), formats=_FORMATS)
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
    return {"rows": rows, "columns": columns, "kind": _KINDS[kind]}


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
    resource.setrlimit(resource.RLIMIT_AS, (held + _MEMORY, held + _MEMORY))
    out = sys.stdout.buffer
    out.write(b'"ready"\n')
    out.flush()
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        content = sys.stdin.buffer.read(asked["size"])
        answer, pixels = _decoded(content, settings, setting["most_pixels"], is_look=asked["is_look"])
        out.write(json.dumps(answer).encode() + b"\n")
        if pixels is not None:
            out.write(pixels.data)
        out.flush()


if __name__ == "__main__":
    _main()
