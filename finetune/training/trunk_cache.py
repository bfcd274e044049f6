"""The trunk cache: the outputs of the frozen layers for every example, computed once and read by every trial.

An entry is a directory, named by a digest of (base model, split layer, token ids and media of all examples). So another model,
split, tokenizer, template, data set or augmentation has another entry, and a stale entry is never used:

    hidden.bin     bfloat16 rows [tokens, hidden], memory-mapped; examples in order of length
    index.json     row counts, chunk digests

It is written in chunks, each with its SHA-256 in a journal; after a kill, the next writer goes on after the last
whole chunk. The entry of a later split is computed from that of an earlier split if there is one. The least recently
used entries are removed if the cache would exceed its bound.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...runtime.checkpoints.decoder import Decoder
from ...runtime.checkpoints.store import models_dir
from ...runtime.errors import ConfigError, UnavailableError
from ...runtime.model.files import put_in_place, remove_directory
from ..data.batches import embed
from ..data.encode import Encoded, encoded_digest
from ..data.feature_cache import FeatureCache

FORMAT = 2
CHUNK = 8  # examples that are computed, written and checked together
# PyTorch's attention on a CPU works in blocks of 32 queries up to a length of 192. With whole blocks, a row has the
# same bits in any batch.
BLOCK = 32
DEFAULT_BYTES = 8 << 30
_FEATURES = "features"


def cache_dir() -> Path:
    """$MOTET_HOME/trunk-cache."""
    return models_dir().parent / "trunk-cache"


class TrunkCache:
    """Entries under `root`, together at most `max_bytes`."""

    def __init__(self, root: Path | None = None, max_bytes: int = DEFAULT_BYTES) -> None:
        self.root = cache_dir() if root is None else root
        self.max_bytes = max_bytes

    @property
    def features(self) -> FeatureCache:
        """What towers make of images and sounds, beside it, with the same bound."""
        return FeatureCache(self.root / _FEATURES, self.max_bytes)

    def hidden(
        self,
        make_trunk: Callable[[], Decoder],
        model_digest: str,
        split: int,
        items: Sequence[Encoded],
        on_progress: Callable[[int], None] = lambda _count: None,
    ) -> list[Tensor]:
        """[S - 1, hidden] bfloat16 of each item (all its tokens but the last): the input of layer `split`.

        `make_trunk` returns the base in bfloat16; it is called only if something has to be computed. `on_progress` is
        called with the number of further examples that are done. Raises `ConfigError` (the entry is larger than the
        bound), `UnavailableError` (the disk is full).
        """
        order = sorted(range(len(items)), key=lambda i: len(items[i].token_ids))
        ordered = [items[i] for i in order]
        path = self._path(model_digest, split, items)
        with self._locked(path):
            if not (path / "index.json").is_file() or not self._is_intact(path):
                self._write(path, make_trunk, model_digest, split, items, ordered, on_progress)
            else:
                on_progress(len(items))
            os.utime(path)
        arrays = _read(path, [len(item.token_ids) - 1 for item in ordered])
        result: list[Tensor | None] = [None] * len(items)
        for index, array in zip(order, arrays):
            result[index] = array
        return [array for array in result if array is not None]

    def _path(self, model_digest: str, split: int, items: Sequence[Encoded]) -> Path:
        key = json.dumps([FORMAT, model_digest, split, encoded_digest(items)])
        return self.root / hashlib.sha256(key.encode()).hexdigest()[:32]

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Allow one writer per entry; a second one waits and then finds the entry complete."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / f"{path.name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _is_intact(self, path: Path) -> bool:
        """Whether every chunk has its recorded digest. A damaged entry is removed."""
        chunks = json.loads((path / "index.json").read_bytes())["chunks"]
        with (path / "hidden.bin").open("rb") as file:
            intact = all(hashlib.sha256(file.read(c["bytes"])).hexdigest() == c["sha256"] for c in chunks)
            intact = intact and not file.read(1)
        if not intact:
            remove_directory(path)
        return intact

    def _write(
        self,
        path: Path,
        make_trunk: Callable[[], Decoder],
        model_digest: str,
        split: int,
        items: Sequence[Encoded],
        ordered: Sequence[Encoded],
        on_progress: Callable[[int], None],
    ) -> None:
        trunk = make_trunk()
        self._make_room(path, 2 * trunk.config.hidden_size * sum(len(item.token_ids) - 1 for item in items))
        start, earlier = self._earlier(model_digest, split, items, ordered)
        partial = path.with_name(f"{path.name}.partial")
        try:
            partial.mkdir(exist_ok=True)
            journal = _resume(partial)
            on_progress(CHUNK * len(journal))
            with (partial / "hidden.bin").open("r+b") as data, (partial / "journal").open("a") as log:
                data.seek(0, os.SEEK_END)
                for first in range(CHUNK * len(journal), len(ordered), CHUNK):
                    chunk = ordered[first : first + CHUNK]
                    known = earlier[first : first + CHUNK] if earlier else None
                    content = _compute(trunk, chunk, start, split, known)
                    data.write(content)
                    _flush(data)
                    journal.append({"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
                    log.write(json.dumps(journal[-1]) + "\n")
                    _flush(log)
                    on_progress(len(chunk))
            (partial / "index.json").write_text(json.dumps({"format": FORMAT, "split": split, "chunks": journal}))
            put_in_place(partial, path)
        except OSError as error:
            raise UnavailableError(
                f"the trunk cache at '{self.root}' cannot be written ({error.strerror}); make room or choose another "
                "--cache; what is written is kept and the next run goes on from there"
            ) from error

    def _earlier(
        self, model_digest: str, split: int, items: Sequence[Encoded], ordered: Sequence[Encoded]
    ) -> tuple[int, list[Tensor] | None]:
        """The latest earlier split that has an entry, and its rows; (0, None) if there is none."""
        for start in range(split - 1, 0, -1):
            path = self._path(model_digest, start, items)
            if (path / "index.json").is_file() and self._is_intact(path):
                return start, _read(path, [len(item.token_ids) - 1 for item in ordered])
        return 0, None

    def _make_room(self, path: Path, size: int) -> None:
        """Remove the least recently used entries until `size` more bytes are within the bound. Raises `ConfigError`
        if `size` alone exceeds it."""
        if size > self.max_bytes:
            raise ConfigError(
                f"the trunk cache may hold {self.max_bytes / 1e9:.2f} GB, this data set takes {size / 1e9:.2f} GB; "
                "raise --cache-gb, or take fewer or shorter examples"
            )
        entries = [
            p for p in self.root.iterdir() if p.is_dir() and p.name != _FEATURES and not p.name.startswith(path.name)
        ]
        sizes = {p: sum(f.stat().st_size for f in p.iterdir()) for p in entries}
        for entry in sorted(entries, key=lambda p: p.stat().st_mtime):
            if size + sum(sizes.values()) <= self.max_bytes:
                break
            remove_directory(entry)
            del sizes[entry]


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _resume(partial: Path) -> list[dict[str, Any]]:
    """The journal's entries of the chunks that a killed writer finished. What it wrote after them is removed."""
    data, log = partial / "hidden.bin", partial / "journal"
    data.touch()
    journal: list[dict[str, Any]] = []
    size = 0
    with data.open("rb") as file:
        for line in log.read_text().splitlines() if log.is_file() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                break  # the line that the writer did not finish
            content = file.read(entry["bytes"])
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                break
            journal.append(entry)
            size += len(content)
    os.truncate(data, size)
    log.write_text("".join(json.dumps(entry) + "\n" for entry in journal))
    return journal


@torch.no_grad()
def _compute(trunk: Decoder, items: Sequence[Encoded], start: int, split: int, known: Sequence[Tensor] | None) -> bytes:
    hidden = run_trunk(trunk, items, split) if known is None else run_from(trunk, known, start, split)
    rows = [hidden[i, : len(item.token_ids) - 1] for i, item in enumerate(items)]
    return torch.cat(rows).view(torch.uint8).numpy().tobytes()


@torch.no_grad()
def run_trunk(trunk: Decoder, items: Sequence[Encoded], split: int) -> Tensor:
    """[B, S, hidden]: the input of layer `split`, padded at the end; attention is causal, so padding changes
    nothing."""
    longest = max(len(item.token_ids) for item in items) - 1
    hidden = embed(trunk, items, _whole_blocks(trunk, longest))
    return trunk.run_layers(hidden, 0, split)[:, :longest]


@torch.no_grad()
def run_from(trunk: Decoder, known: Sequence[Tensor], start: int, split: int) -> Tensor:
    """As `run_trunk`, from known inputs of layer `start`, each [S, hidden]."""
    hidden = torch.nn.utils.rnn.pad_sequence(list(known), batch_first=True)
    longest = hidden.shape[1]
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, _whole_blocks(trunk, longest) - longest))
    return trunk.run_layers(hidden, start, split)[:, :longest]


def _whole_blocks(trunk: Decoder, length: int) -> int:
    return max(length, min(-(-length // BLOCK) * BLOCK, trunk.config.max_position_embeddings))


def _read(path: Path, lengths: Sequence[int]) -> list[Tensor]:
    """Views of the memory-mapped file, in its order."""
    stored = np.memmap(path / "hidden.bin", np.uint16, mode="c")  # copy on write: torch wants it writable
    width = len(stored) // sum(lengths)
    rows = torch.from_numpy(stored.reshape(-1, width)).view(torch.bfloat16)
    return list(torch.split(rows, list(lengths)))
