"""`Worker`: another runtime (or Motet) in its own process, which runs `peer_worker.py`. And where peers are found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from ...runtime.checkpoints.huggingface import checkpoint_digest
from ...runtime.checkpoints.sources import SMOLLM2, fetch_gguf
from ...runtime.checkpoints.store import models_dir, resolve_model
from ...runtime.errors import MotetError
from . import peer_worker

WORKER = Path(peer_worker.__file__)


def peer_python() -> Path:
    """The interpreter of the environment that `make peers` made, else this one."""
    found = models_dir().parent / "peers" / "venv" / "bin" / "python"
    return found if found.exists() else Path(sys.executable)


def peer_paths(model: str) -> dict[str, str]:
    """Paths: the directories `model` and `scratch`, and `gguf`, the file that the model was pulled from, if any."""
    scratch = models_dir().parent / "peers"
    scratch.mkdir(parents=True, exist_ok=True)
    directory = resolve_model(model)
    converted = scratch / f"ctranslate2-int8-{checkpoint_digest(directory)[:16]}"
    paths = {"model": str(directory), "scratch": str(scratch), "ctranslate2": str(converted)}
    if model == SMOLLM2:
        paths["gguf"] = str(fetch_gguf(scratch / "gguf"))
    return paths


class Worker:
    """A runtime's process. It runs from `_ask` until its answer, and is stopped (SIGSTOP) at all other times."""

    def __init__(self, runtime: str, variant: str, python: str, job: dict[str, Any]) -> None:
        self.runtime, self.variant = runtime, variant
        self.name = f"{runtime} {variant}"
        self.errors: dict[str, str] = {}  # case → why it has no figure
        log = None if os.environ.get("MOTET_BENCH_VERBOSE") else subprocess.DEVNULL
        self._process = subprocess.Popen(
            [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        answer = self._ask({"runtime": runtime, "variant": variant, **job})
        self.error: str | None = answer.get("error")
        self.version: str = answer.get("version", "")

    def begin(self, prompts: list[list[int]], steps: int, chunks: int) -> float:
        """Seconds until every sequence has its first token. Raises `MotetError` if the runtime fails."""
        return float(self._ask_for({"prompts": prompts, "steps": steps, "chunks": chunks}, "seconds")["seconds"])

    def chunk(self) -> dict[str, float]:
        """Run the next measured steps: their `seconds`, `tokens` and `cpu_seconds`. Raises `MotetError` if it fails."""
        sample: dict[str, float] = self._ask_for({"go": True}, "cpu_seconds")
        return sample

    def end(self, num_tokens: int) -> None:
        """Wait for the end of a generation. Raises `MotetError` unless it has `num_tokens` tokens."""
        found = self._ask_for(None, "sequence")["sequence"]
        if len(found) != num_tokens:
            raise MotetError(f"generated {len(found)} tokens, {num_tokens} were asked for")

    def _ask_for(self, message: dict[str, Any] | None, field: str) -> dict[str, Any]:
        answer = self._ask(message)
        if field not in answer:
            raise MotetError(answer.get("error", "the generation ended too early"))
        return answer

    def _ask(self, message: dict[str, Any] | None) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            if message is not None:
                self._process.stdin.write(json.dumps(message) + "\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.error = f"the process ended with {self._process.wait()}"
            return {"error": self.error}
        self._process.send_signal(signal.SIGSTOP)
        result: dict[str, Any] = json.loads(line)
        return result

    def score(self, token_ids: list[int], out: Path) -> None:
        """Write the logits [tokens, vocab] f32 of one sequence to the .npy file `out`."""
        self._ask_for({"token_ids": token_ids, "out": str(out)}, "scored")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
