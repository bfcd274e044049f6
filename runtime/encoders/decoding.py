"""`MediaDecoder`: files of images and sounds are decoded in a process of its own, with bounds on memory and time. What decodes
them is not Python: a hostile file may end the process, or take all of its memory, or never end."""

from __future__ import annotations

import json
import logging
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequestError, UnavailableError, shown
from ..processes import cpu_seconds
from . import decoding_process
from .kind import Dims, MediumKind

log = logging.getLogger("motet.media")
LIMIT_S = 5.0  # of computing, of a file
_WAIT_S = 60.0  # for that, on a busy machine
_START_S, _END_S = 60.0, 5.0
_LONGEST_LINE = 2**16
_LOGGED_LINES, _LOGGED_BYTES = 20, 500
# All that the process gets of the environment: where Python and its libraries are. Keys and passwords are not for it.
_ENVIRONMENT = ("PATH", "HOME", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "PYTHONUSERBASE", "LANG", "LC_ALL")


@dataclass(frozen=True, slots=True)
class Decoded:
    """`dims`: its sizes, as the medium counts them. `values`: see `MediumKind.decoded_as`."""

    dims: Dims
    values: npt.NDArray[Any]


class MediaDecoder:
    """Thread-safe: one file at a time. The process is started when it is first needed."""

    def __init__(self, kinds: Sequence[MediumKind]) -> None:
        self._setting = json.dumps({kind.medium: dict(kind.settings) for kind in kinds})
        self._process: subprocess.Popen[bytes] | None = None  # whoever holds `_using` starts, asks and reaps it
        self._log: threading.Thread | None = None
        self._using, self._starting = threading.Lock(), threading.Lock()
        self._is_closed = False

    def look(self, kind: MediumKind, content: bytes, media_type: str = "") -> Dims:
        """The sizes of what `decode` will give, by the file's header. `kind`: one of those that the decoder was made with.
        `media_type`: what the sender says that it is, such as image/png; empty: nothing. Raises `InvalidRequestError` for what
        is no file that is read, and `UnavailableError` if that could not be found out: the process did not start, had no time on
        a busy machine, or `close` was called. However else the process ends once it has a file, that is the file's fault."""
        answer = self._ask(kind, content, is_look=True)
        if media_type and kind.type_of(media_type) != answer["type"]:
            raise refusal(kind, f"it is said to be {shown(media_type)} and is {answer['type']}; say what it is")
        dims: Dims = answer["dims"]
        problem = kind.check_file(dims)
        if problem is not None:
            raise refusal(kind, kind.reasons[problem])
        return dims

    def decode(self, kind: MediumKind, content: bytes) -> Decoded:
        """Raises what `look` raises."""
        answer = self._ask(kind, content, is_look=False)
        return Decoded(answer["dims"], answer["values"])

    def _ask(self, kind: MediumKind, content: bytes, *, is_look: bool) -> dict[str, Any]:
        if not content:
            raise refusal(kind, "it has no bytes")
        with self._using:
            return self._ask_process(kind, content, is_look=is_look)

    def _ask_process(self, kind: MediumKind, content: bytes, *, is_look: bool) -> dict[str, Any]:
        try:
            line = json.dumps({"medium": kind.medium, "size": len(content), "is_look": is_look}).encode()
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
                    self._end()  # it ended, and had not seen the file
                    continue
                answer = self._line(before, until)
                if answer is not None:
                    return self._answered(kind, answer, until, is_look=is_look)
                spent = cpu_seconds(process.pid) - before
                has_ended = process.poll() is not None
                self._end()
                if self._is_closed:
                    raise _closed()
                if spent > LIMIT_S:
                    raise refusal(kind, f"it takes more than {LIMIT_S:g} s to decode; send a smaller or simpler one")
                if has_ended:  # by whatever signal, or with whatever status
                    log.warning(
                        "the process that decodes media ended with status %s on %s", process.returncode, kind.noun
                    )
                    raise refusal(kind, "it cannot be decoded")
                break
        except InvalidRequestError:
            raise
        except (
            ValueError,
            KeyError,
            TypeError,
            OverflowError,
            RecursionError,
        ) as error:  # it says what it never says: a file rules it
            self._end()
            raise refusal(kind, "it cannot be decoded") from error
        except Exception:
            self._end()
            raise
        self._end()
        if self._is_closed:
            raise _closed()
        raise UnavailableError(f"{kind.noun} could not be decoded, because the server is busy; try again later")

    def close(self) -> None:
        """End the process, now and for good. A thread that waits for it gets `UnavailableError`."""
        with self._starting:
            self._is_closed = True
            if self._process is not None:
                self._process.kill()
        with self._using:  # the thread that asked it reaps it, or this one does
            self._end()

    def _end(self) -> None:
        """End the process; the next file has a new one."""
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

    def _answered(self, kind: MediumKind, answer: Any, until: float, *, is_look: bool) -> dict[str, Any]:
        """What the process says, checked: one that was taken over may say anything."""
        if "refused" in answer:
            reason = kind.reasons[answer["refused"]]  # an unknown word is a KeyError
            raise refusal(kind, reason.format(value=shown(answer.get("value"))))
        found = {"dims": kind.check_dims(tuple(map(int, answer["dims"]))), "type": answer["type"]}
        if answer["type"] not in kind.types:
            raise ValueError("another type")
        if is_look:
            return found
        dtype, shape = kind.decoded_as(found["dims"])
        content = self._bytes(math.prod(shape) * dtype.itemsize, until)
        if content is None:
            self._end()
            raise _closed() if self._is_closed else refusal(kind, "it cannot be decoded")
        return {**found, "values": np.frombuffer(content, dtype).reshape(shape)}

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
                raise UnavailableError("media cannot be decoded: their process does not start; try again later")
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
            piece = self._piece(1, began, until)  # the values follow; a line is short
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


def refusal(kind: MediumKind, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"{kind.noun} cannot be used: {reason}", field="messages.content")


def _log_lines(stream: IO[bytes]) -> None:
    """What the process says of itself goes to the log, its beginning; nothing of it goes to a client."""
    with stream:
        for number, line in enumerate(iter(lambda: stream.readline(_LOGGED_BYTES), b"")):
            if number < _LOGGED_LINES:
                log.warning("the process that decodes media says: %s", shown(line.decode(errors="replace").rstrip()))
