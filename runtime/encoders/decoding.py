"""`ImageDecoder`: files of images become tiles in a process of its own, with bounds on memory and time. What decodes them is not
Python: a hostile file may end the process, or take all of its memory, or never end.

Run as a module it is that process: a line of JSON with the settings comes in; then, for each image, a line with its size and its
bytes, and a line goes out, and the tiles.
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

    def decode(self, content: bytes, media_type: str = "") -> Tiles:
        """The tiles of an image. `media_type`: what the sender says that it is, such as image/png; empty: nothing. Raises
        `InvalidRequestError` for what is no image that is read, and `UnavailableError` if that could not be found out: the
        process did not start, was ended by somebody, or had no time on a busy machine."""
        if not content:
            raise refusal("it has no bytes")
        try:
            for _ in range(2):
                process = self._started()
                before = _cpu_seconds(process.pid)
                if not self._send(json.dumps({"size": len(content)}).encode() + b"\n" + content, before):
                    if process.poll() is None:  # it takes in nothing
                        break
                    self.close()  # it had ended before it was asked
                    continue
                answer = self._line(before)
                if answer is not None:
                    return self._answered(answer, media_type)
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

    def _answered(self, answer: Any, media_type: str) -> Tiles:
        if "pixels" in answer:
            raise refusal(
                f"it has {shown(answer['pixels'])} pixels, at most max_image_pixels ({self._most_pixels}) are read; scale it down"
            )
        if "refused" in answer:
            raise refusal(_REASONS[answer["refused"]])
        count, rows, columns, edge = *(int(answer[name]) for name in ("tiles", "rows", "columns")), self._edge
        fits = 0 <= min(rows, columns) <= max(rows, columns) <= MOST_TILES and count == rows * columns + 1
        content = (
            self._bytes(count * 3 * edge * edge) if fits else None
        )  # a process that was taken over may say anything
        if content is None:
            self.close()
            raise UnavailableError("the process that decodes images has ended; try again")
        kind = media_type.removeprefix("image/").removeprefix("x-").replace("jpg", "jpeg").replace("ms-bmp", "bmp")
        if media_type and kind != answer["kind"]:
            raise refusal(f"it is said to be {shown(media_type)} and is image/{answer['kind']}; say what it is")
        pixels = np.frombuffer(content, np.uint8).reshape(count, 3, edge, edge)
        return Tiles(pixels, rows, columns)

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


def _cpu_seconds(pid: int) -> float:
    """Of a process so far, all threads; 0 if that is not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


# ---- the process -----------------------------------------------------------------------------------------------------


def _decoded(content: bytes, settings: ImageProcessor, most_pixels: int) -> tuple[dict[str, Any], U8 | None]:
    """The answer, and the tiles if there are any."""
    from PIL import Image, ImageOps

    from .tiles import cut

    try:
        image = Image.open(BytesIO(content), formats=_FORMATS)
    except MemoryError:
        return {"refused": "memory"}, None
    except Exception:  # decoders raise what they like
        return {"refused": "format"}, None
    width, height = image.size
    if width * height > most_pixels:
        return {"pixels": width * height}, None
    kind = str(image.format)
    try:
        if kind != "MPO" and getattr(image, "n_frames", 1) > 1:  # of a JPEG, the first picture is the photograph
            return {"refused": "animation"}, None
        if image.mode in ("I", "F", "I;16", "I;16B", "I;16L", "I;16N"):  # Pillow would cut their values off
            return {"refused": "depth"}, None
        image.load()
        upright = ImageOps.exif_transpose(image).convert("RGB")
        pixels, rows, columns = cut(upright, settings)
    except MemoryError:
        return {"refused": "memory"}, None
    except Exception:
        return {"refused": "damaged"}, None
    return {"tiles": len(pixels), "rows": rows, "columns": columns, "kind": _KINDS[kind]}, pixels


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
        content = sys.stdin.buffer.read(json.loads(line)["size"])
        answer, pixels = _decoded(content, settings, setting["most_pixels"])
        out.write(json.dumps(answer).encode() + b"\n")
        if pixels is not None:
            out.write(pixels.data)
        out.flush()


if __name__ == "__main__":
    _main()
