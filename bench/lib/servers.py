"""`server_process`, `running_server`: `motet serve` in a process of its own."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...runtime.errors import UnavailableError


@contextmanager
def server_process(bundle: Path, threads: int = 0, options: Sequence[str] = ()) -> Iterator[str]:
    """Run `motet serve` on a free port, with more `options`, yield its address, and end it. With `--http-port` the address is
    "HOST:PORT, HTTP on HOST:PORT".

    Raises `UnavailableError` if it does not start.
    """
    with running_server(bundle, threads, options) as server:
        yield server.address


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server's address and its process."""

    address: str
    pid: int

    def resident_mb(self) -> float:
        """Megabytes of memory that the process has."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1e6


@contextmanager
def running_server(bundle: Path, threads: int = 0, options: Sequence[str] = ()) -> Iterator[RunningServer]:
    """As `server_process`."""
    command = [sys.executable, "-m", "motet.cli", "serve", str(bundle), "--port", "0"]
    command += ["--threads", str(threads), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if " on " not in line:
                raise UnavailableError(f"the server did not start (exit code {process.wait()}); its message is above")
            yield RunningServer(line.split(") on ", 1)[1].strip(), process.pid)
        finally:
            process.terminate()
            process.wait(timeout=30)
