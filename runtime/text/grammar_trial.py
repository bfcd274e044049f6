"""`Trial`: tries a structure in a process of its own before it is compiled here. What compiles it is not Python: a hostile one
may end the process, or take all of its memory, or never end.

Run as a module it is that process: a line of JSON comes in for each structure, and one goes out.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from ..errors import UnavailableError
from ..processes import cpu_seconds

LIMIT_S = 0.7  # of a structure
_MEMORY = 2 * 2**30  # of the process, address space
_STACK = 2**20  # of the thread there; that here has sixteen times as much
_START_S, _END_S = 60.0, 5.0
_HOSTILE = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)  # ends by its own fault


class Trial:
    """Not thread-safe. `tokenizer`: its JSON; the process is started when it is first needed."""

    def __init__(self, tokenizer: str, vocab_size: int, eos: list[int]) -> None:
        self._setting = json.dumps({"tokenizer": tokenizer, "vocab_size": vocab_size, "eos": eos})
        self._process: subprocess.Popen[bytes] | None = None

    def reason_against(self, kind: str, spec: str) -> str:
        """Why the structure cannot be used; empty if it can. Raises `UnavailableError` if that could not be found out: the
        process did not start, was ended by somebody, or had no time on a busy machine."""
        try:
            for _ in range(2):
                process = self._started()
                before = cpu_seconds(process.pid)
                try:
                    assert process.stdin is not None
                    process.stdin.write(json.dumps([kind, spec]).encode() + b"\n")
                    process.stdin.flush()
                except OSError:  # it had ended before it was asked
                    self.close()
                    continue
                found = self._line(LIMIT_S)
                if found is not None:
                    return str(found)
                spent = cpu_seconds(process.pid) - before
                self.close()
                if process.returncode in _HOSTILE or spent > LIMIT_S / 5:
                    return f"it takes more than {LIMIT_S:g} s or {_MEMORY >> 30} GiB to compile, or is nested too deep"
                break
        except Exception:
            self.close()
            raise
        raise UnavailableError("the structure could not be tried, because the server is busy; try again later")

    def close(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.communicate()
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is for the server
            )
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(self._setting.encode() + b"\n")
                self._process.stdin.flush()
                is_ready = self._line(_START_S) == "ready"
            except OSError:
                is_ready = False
            if not is_ready:
                self.close()
                raise UnavailableError("structures cannot be tried: their process does not start; try again later")
        return self._process

    def _line(self, seconds: float) -> Any:
        """The next line of JSON; None if it does not come in time."""
        assert self._process is not None and self._process.stdout is not None
        content, until = b"", time.monotonic() + seconds
        handle, poll = self._process.stdout.fileno(), select.poll()  # select.select has no room for many descriptors
        poll.register(handle, select.POLLIN)
        while not content.endswith(b"\n"):
            left = until - time.monotonic()
            if left <= 0 or not poll.poll(1000 * left):
                return None
            piece = os.read(handle, 2**16)
            if not piece:  # it ends: how, is known in a moment
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(_END_S)
                return None
            content += piece
        return json.loads(content)


def _main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from .grammar import library_tokenizer, try_structure

    setting = json.loads(sys.stdin.buffer.readline())
    tokenizer = library_tokenizer(setting["tokenizer"], setting["vocab_size"], setting["eos"])
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin.buffer:
        kind, spec = json.loads(line)
        print(json.dumps(try_structure(tokenizer, kind, spec)), flush=True)


if __name__ == "__main__":
    threading.stack_size(_STACK)
    main = threading.Thread(target=_main)
    main.start()
    main.join()
