"""`ImageDecoder`: files of images become tiles in a process of its own, with bounds on memory and time. What decodes them is not
Python: a hostile file may end the process, or take all of its memory, or never end."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequestError, UnavailableError, shown
from ..model.encoders.vision import MOST_TILES, ImageProcessor
from ..processes import cpu_seconds
from . import decoding_process
from .decoding_process import FORMATS, KINDS, MEMORY

log = logging.getLogger("motet.images")
U8 = npt.NDArray[np.uint8]
LIMIT_S = 5.0  # of computing, of an image
_WAIT_S = 60.0  # for that, on a busy machine
_START_S, _END_S = 60.0, 5.0
_LONGEST_LINE = 2**16
_LOGGED_LINES, _LOGGED_BYTES = 20, 500
# All that the process gets of the environment: where Python and its libraries are. Keys and passwords are not for it.
_ENVIRONMENT = ("PATH", "HOME", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "PYTHONUSERBASE", "LANG", "LC_ALL")
# What is wrong with a file, by the worker's word for it. The library's own text stays here: it may say what lies in memory.
_REASONS = {
    "format": f"it is no image of a kind that is read: {FORMATS}",
    "damaged": "it is damaged or cut off; send the whole file",
    "animation": "it is an animation; send one picture of it",
    "depth": "its pixels have more than 8 bits a channel of grey, or are floats; convert it to 8 bits",
    "memory": f"it takes more than {MEMORY >> 30} GiB to decode; send a smaller one",
}


@dataclass(frozen=True, slots=True)
class Tiles:
    """`pixels` [tiles, 3, edge, edge]; `rows` and `columns` of tiles before the whole image, 0 if that is all."""

    pixels: U8
    rows: int
    columns: int


class ImageDecoder:
    """Thread-safe: one image at a time. The process is started when it is first needed. `most_pixels`: an image with more is
    refused when its header is read."""

    def __init__(self, settings: ImageProcessor, most_pixels: int) -> None:
        self._most_pixels, self._edge = most_pixels, settings.tile_size
        self._setting = json.dumps({"processor": dataclasses.asdict(settings), "most_pixels": most_pixels})
        self._process: subprocess.Popen[bytes] | None = None  # whoever holds `_using` starts, asks and reaps it
        self._log: threading.Thread | None = None
        self._using, self._starting = threading.Lock(), threading.Lock()
        self._is_closed = False

    def look(self, content: bytes, media_type: str = "") -> tuple[int, int]:
        """Rows and columns of the tiles that `decode` will give, by the image's header. `media_type`: what the sender says that
        it is, such as image/png; empty: nothing. Raises `InvalidRequestError` for what is no image that is read, and
        `UnavailableError` if that could not be found out: the process did not start, had no time on a busy machine, or `close`
        was called. However else the process ends once it has an image, that is the image's fault."""
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
        with self._using:
            return self._ask_process(content, is_look=is_look)

    def _ask_process(self, content: bytes, *, is_look: bool) -> dict[str, Any]:
        try:
            line = json.dumps({"size": len(content), "is_look": is_look}).encode()
            for _ in range(2):
                process = self._started()
                before, until = cpu_seconds(process.pid), time.monotonic() + _WAIT_S
                if not self._send(line + b"\n" + content, before, until):
                    if process.poll() is None:  # it takes in nothing
                        break
                    self._end()  # it had ended before it was asked
                    continue
                if self._line(before, until) != "taken":
                    if process.poll() is None:
                        break
                    self._end()  # it ended, and had not seen the image
                    continue
                answer = self._line(before, until)
                if answer is not None:
                    return self._answered(answer, until, is_look=is_look)
                spent = cpu_seconds(process.pid) - before
                has_ended = process.poll() is not None
                self._end()
                if self._is_closed:
                    raise _closed()
                if spent > LIMIT_S:
                    raise refusal(f"it takes more than {LIMIT_S:g} s to decode; send a smaller or simpler one")
                if has_ended:  # by whatever signal, or with whatever status
                    log.warning("the process that decodes images ended with status %s on an image", process.returncode)
                    raise refusal("it cannot be decoded")
                break
        except InvalidRequestError:
            raise
        except (
            ValueError,
            KeyError,
            TypeError,
            OverflowError,
            RecursionError,
        ) as error:  # it says what it never says: an image rules it
            self._end()
            raise refusal("it cannot be decoded") from error
        except Exception:
            self._end()
            raise
        self._end()
        if self._is_closed:
            raise _closed()
        raise UnavailableError("the image could not be decoded, because the server is busy; try again later")

    def close(self) -> None:
        """End the process, now and for good. A thread that waits for it gets `UnavailableError`."""
        with self._starting:
            self._is_closed = True
            if self._process is not None:
                self._process.kill()
        with self._using:  # the thread that asked it reaps it, or this one does
            self._end()

    def _end(self) -> None:
        """End the process; the next image has a new one."""
        process = self._process
        if process is None:
            return
        process.kill()
        process.wait()
        if self._log is not None:
            self._log.join(_END_S)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()
        with self._starting:
            self._process = self._log = None

    def _answered(self, answer: Any, until: float, *, is_look: bool) -> dict[str, Any]:
        """What the process says, checked: one that was taken over may say anything."""
        if "too_many" in answer:
            raise refusal(
                f"it has {shown(answer['too_many'])} pixels, at most max_image_pixels ({self._most_pixels}) are read; scale it "
                "down"
            )
        if "refused" in answer:
            raise refusal(_REASONS[answer["refused"]])  # an unknown word is a KeyError
        rows, columns, edge = int(answer["rows"]), int(answer["columns"]), self._edge
        fits = 0 <= min(rows, columns) <= max(rows, columns) <= MOST_TILES and answer["kind"] in KINDS.values()
        count = rows * columns + 1
        found = {"rows": rows, "columns": columns, "kind": answer["kind"]}
        if fits and is_look:
            return found
        content = self._bytes(count * 3 * edge * edge, until) if fits else None
        if content is None:
            self._end()
            raise _closed() if self._is_closed else refusal("it cannot be decoded")
        return {**found, "pixels": np.frombuffer(content, np.uint8).reshape(count, 3, edge, edge)}

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            own = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
            with self._starting:
                if self._is_closed:
                    raise _closed()
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        decoding_process.__name__,
                    ],  # -P: modules in the working directory are not for it
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,  # a Ctrl-C is for the server
                    env={**own, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},  # numpy here multiplies nothing
                )
            self._log = threading.Thread(target=_log_lines, args=(self._process.stderr,), daemon=True)
            self._log.start()
            assert self._process.stdin is not None and self._process.stdout is not None
            os.set_blocking(self._process.stdin.fileno(), False)
            try:
                until = time.monotonic() + _START_S
                self._send(self._setting.encode() + b"\n", None, until)
                is_ready = self._line(None, until) == "ready"
            except OSError:
                is_ready = False
            if not is_ready:
                self._end()
                if self._is_closed:
                    raise _closed()
                raise UnavailableError("images cannot be decoded: their process does not start; try again later")
        return self._process

    def _send(self, content: bytes, began: float | None, until: float) -> bool:
        """False if the process does not take it."""
        assert self._process is not None and self._process.stdin is not None
        handle, poll, left = self._process.stdin.fileno(), select.poll(), memoryview(content)
        poll.register(handle, select.POLLOUT)
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

    def _line(self, began: float | None, until: float) -> Any:
        """The next line of JSON; None if it does not come by `until` (`time.monotonic`), which all of a question shares."""
        content = bytearray()
        while not content.endswith(b"\n"):
            piece = self._piece(1, began, until)  # the tiles follow; a line is short
            if not piece or len(content) > _LONGEST_LINE:
                return None
            content += piece
        return json.loads(content)

    def _bytes(self, size: int, until: float) -> bytes | None:
        content = bytearray()
        while len(content) < size:
            piece = self._piece(min(size - len(content), 2**20), None, until)
            if not piece:
                return None
            content += piece
        return bytes(content)

    def _piece(self, size: int, began: float | None, until: float) -> bytes:
        """At most `size` bytes that the process has written; none if it ends or takes too long. `began`: the seconds that it
        had computed when it was asked; None: they do not count."""
        assert self._process is not None and self._process.stdout is not None
        handle, poll = self._process.stdout.fileno(), select.poll()  # select.select has no room for many descriptors
        poll.register(handle, select.POLLIN)
        while not poll.poll(100):
            if time.monotonic() > until or self._is_over(began):
                return b""
        if time.monotonic() > until:
            return b""
        piece = os.read(handle, size)
        if not piece:  # it ends: how, is known in a moment
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
        return piece

    def _is_over(self, began: float | None) -> bool:
        assert self._process is not None
        return began is not None and cpu_seconds(self._process.pid) - began > LIMIT_S


def _closed() -> UnavailableError:
    return UnavailableError("the server is shutting down; send the request to another one")


def refusal(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"an image cannot be used: {reason}", field="messages.content")


def _log_lines(stream: IO[bytes]) -> None:
    """What the process says of itself goes to the log, its beginning; nothing of it goes to a client."""
    with stream:
        for number, line in enumerate(iter(lambda: stream.readline(_LOGGED_BYTES), b"")):
            if number < _LOGGED_LINES:
                log.warning("the process that decodes images says: %s", shown(line.decode(errors="replace").rstrip()))


def _check_type(said: str, kind: str) -> None:
    """Whether a file is what its sender says."""
    own = said.removeprefix("image/").removeprefix("x-").replace("jpg", "jpeg").replace("ms-bmp", "bmp")
    if said and own != kind:
        raise refusal(f"it is said to be {shown(said)} and is image/{kind}; say what it is")
