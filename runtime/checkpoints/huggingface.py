"""Reading a Hugging Face model directory: configuration, weights under canonical names, digest. Needs torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import BundleError, MotetError, UnsupportedModelError
from ..model.config import DecoderConfig
from ..model.families import FAMILIES, decoder_config
from ..model.files import file_digest
from ..model.layout import EMBEDDING, HEAD, Layout, decoder_layout
from .fused import split_rows
from .own_encoders import own_files
from .quantised import OLD_SETTINGS, method_of, with_old_settings
from .quantised.method import Method
from .weight_files import DTYPES, FLOATS, Stored, open_tensors, read_json, read_tensor, weight_files


def read_config(model_dir: Path) -> DecoderConfig:
    """The model's `DecoderConfig`. Raises `NotFoundError`, `BundleError`, `UnsupportedModelError`."""
    values = _settings(Path(model_dir))
    method_of(values)  # refuses other quantisation methods
    return decoder_config(values)


def _settings(model_dir: Path) -> Mapping[str, Any]:
    """What config.json says, and a quantize_config.json beside it."""
    values, old = read_json(model_dir / "config.json"), model_dir / OLD_SETTINGS
    return with_old_settings(values, read_json(old)) if old.is_file() else values


def eos_token_ids(model_dir: Path, tokenizer_eos: int | None, vocab_size: int | None = None) -> tuple[int, ...]:
    """The ids that end an answer: those of generation_config.json, of config.json, and `tokenizer_eos`, the tokenizer's own.
    Models often name the end of a turn in one of them only. `vocab_size`: default is config.json's. Raises
    `BundleError` for an id that the vocabulary does not have."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = Path(model_dir) / name
        values = read_json(path) if path.is_file() else {}
        value = values.get("eos_token_id")
        if value is None and not found and isinstance(text := values.get("text_config"), dict):
            value = text.get("eos_token_id")  # of a text model within another, if nothing else says it
        found += value if isinstance(value, list) else [] if value is None else [value]
    found += [] if tokenizer_eos is None else [tokenizer_eos]
    size = read_config(model_dir).vocab_size if vocab_size is None else vocab_size
    for token_id in found:
        if type(token_id) is not int or not 0 <= token_id < size:
            raise BundleError(f"'{model_dir}' has eos_token_id {token_id!r}; an id is an integer in 0…{size - 1}")
    return tuple(dict.fromkeys(found))


def checkpoint_digest(model_dir: Path) -> str:
    """SHA-256 over the configuration and the weight files, those of encoders beside the model too. Directories with the same
    digest hold the same model."""
    digest = hashlib.sha256()
    old = [path] if (path := Path(model_dir) / OLD_SETTINGS).is_file() else []
    for path in (Path(model_dir) / "config.json", *old, *weight_files(model_dir), *own_files(Path(model_dir))):
        digest.update(file_digest(path).encode())
    return digest.hexdigest()


def read_weights(model_dir: Path) -> dict[str, torch.Tensor]:
    """All weights of `open_weights`, read. Raises `BundleError` also for values that are not finite."""
    with open_weights(model_dir) as weights:
        return dict(weights)


def open_weights(model_dir: Path) -> Weights:
    """The weights in float32 under canonical names (`Layout.checkpoint_shapes`), shapes as `nn.Linear` [out, in].

    Raises `BundleError` if a file is damaged, or if weights are missing, stored twice or do not have the shapes that the
    configuration implies, and `UnsupportedModelError` for weights that the family does not use.
    """
    return Weights(Path(model_dir))


class Weights(Mapping[str, torch.Tensor]):
    """A model directory's weights, each read from its file when it is asked for. Raises `BundleError` for values that are
    not finite, and for a file that became shorter. The files are opened once and stay open until the end of the `with` block: a
    directory that is replaced meanwhile changes nothing. They are read and not mapped, so that what was read does not count as
    memory of the process, and a file that is truncated ends nobody."""

    def __init__(self, model_dir: Path) -> None:
        self._dir = model_dir
        self._layout = decoder_layout(read_config(model_dir))
        self._family = FAMILIES[self._layout.config.family]
        self._parts, self._norms = stored_parts(self._layout), self._layout.norm_tensors
        self._latest: tuple[str, dict[str, torch.Tensor]] = "", {}  # stored name → the weights of that tensor
        self._stored = open_tensors(model_dir)
        self._method = method_of(_settings(model_dir))
        self._quantised = {} if self._method is None else _quantised(self._method, self._stored)
        self._place, found = self._find(self._shapes())
        if self._layout.config.tied_head and HEAD in self._place and EMBEDDING in self._place:
            if not torch.equal(self[HEAD], self[EMBEDDING]):
                raise BundleError(
                    f"config.json of '{model_dir}' ties the head to the embedding, and a different head is stored; set "
                    "tie_word_embeddings to false, or delete the stored head"
                )
            del self._place[HEAD], found[HEAD]
        self._drop_zero_biases(found)
        _check(model_dir, self._layout, found)

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._place[name]
        if self._latest[0] != stored:
            values = self._widen(stored) if stored in self._quantised else self._read(stored)
            canonical = self._family.canonical_name(stored)
            assert canonical is not None
            pieces = _unpack(self._layout.config, self._parts, canonical, values.float())
            if not all(torch.isfinite(piece).all() for piece in pieces.values()):
                raise BundleError(f"'{stored}' of '{self._dir}' holds NaN or infinite values; the training failed")
            self._latest = stored, pieces
        weight = self._latest[1][name]
        return weight + self._family.norm_offset if name in self._norms else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self._place

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing can be read any more."""
        for one in self._stored.values():
            one.file.close()
        self._latest = "", {}

    @property
    def config(self) -> DecoderConfig:
        return self._layout.config

    def places(self) -> dict[str, tuple[str, str]]:
        """Weight → (the stored tensor that it is, or is a part of; its type as safetensors names it, "" if it is quantised)."""
        return {
            name: (stored, "" if stored in self._quantised else self._stored[stored].place.dtype)
            for name, stored in self._place.items()
        }

    def _find(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
        """(weight → the stored tensor that it is a part of, its shape)."""
        place: dict[str, str] = {}
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            canonical = self._family.canonical_name(name)
            if canonical is None:
                continue
            if name not in self._quantised and self._stored[name].place.dtype not in FLOATS:
                raise UnsupportedModelError(
                    f"'{name}' of '{self._dir}' is {self._stored[name].place.dtype}; weights are {list(FLOATS)}, or as "
                    "quantization_config of config.json says"
                )
            empty = torch.empty(shape, device="meta")
            for part, piece in _unpack(self._layout.config, self._parts, canonical, empty).items():
                if part in place:
                    raise BundleError(f"'{self._dir}' stores '{part}' twice, as '{name}' and under another name")
                place[part], found[part] = name, tuple(piece.shape)
        return place, found

    def _drop_zero_biases(self, found: dict[str, tuple[int, ...]]) -> None:
        """AutoGPTQ gives each quantised layer a bias, of zeros where the family has none."""
        quantised = {part for name in self._quantised for part, place in self._place.items() if place == name}
        for name in set(found) - set(self._layout.checkpoint_shapes()):
            if name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in quantised and not self[name].any():
                del found[name], self._place[name]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights as a plain checkpoint stores them."""
        parts = {part for names in self._quantised.values() for part in names}
        shapes = {name: one.place.shape for name, one in self._stored.items() if name not in parts}
        for name, names in self._quantised.items():
            assert self._method is not None
            own = {part: self._stored[part].place.shape for part in names}
            with _damage(name):
                shape = self._method.shape(name, own, self._read)
                if len(shape) != 2 or not all(type(size) is int and 0 < size < 2**31 for size in shape):
                    raise ValueError(f"it has the shape {shape}")
            shapes[name] = shape[::-1] if self._family.transposed else shape
        return shapes

    def _widen(self, name: str) -> torch.Tensor:
        """A quantised weight in float32, shaped as in a plain checkpoint."""
        assert self._method is not None
        parts = {part: self._read(part) for part in self._quantised[name]}
        with _damage(name):
            wide = self._method.widen(name, parts)
        return wide.t() if self._family.transposed else wide

    def _read(self, name: str) -> torch.Tensor:
        one = self._stored[name]
        if one.place.dtype not in DTYPES:
            raise UnsupportedModelError(f"'{name}' of '{self._dir}' is {one.place.dtype}; known are {list(DTYPES)}")
        return read_tensor(one)


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """What parts of a quantised weight that do not fit raise becomes a `BundleError`."""
    try:
        yield
    except MotetError:
        raise
    except Exception as error:  # the parts are a stranger's, and libraries widen them
        if "allocate memory" in str(error):
            raise
        said = f"there is no {error}" if isinstance(error, KeyError) else str(error) or repr(error)
        raise BundleError(f"the quantised weight '{name}' is damaged ({said}); pull the model again") from error


def _quantised(method: Method, stored: Mapping[str, Stored]) -> dict[str, list[str]]:
    """Quantised weight → the names of the tensors that it is stored as, its own among them if it has one."""
    found: dict[str, list[str]] = {}
    for name in stored:
        weight = method.owner(name)
        if weight is not None:
            found.setdefault(weight, []).append(name)
    for weight, names in found.items():
        if weight in stored:
            names.append(weight)
    return found


def stored_parts(layout: Layout) -> dict[str, dict[str, int]]:
    """Module of a linear layer, as a checkpoint may store it (fused, or one part) → its parts' names and rows."""
    parts: dict[str, dict[str, int]] = {}
    for linear in layout.linears:
        parts |= {part.name: {part.name: part.rows} for part in linear.parts}
        parts[linear.name] = {part.name: part.rows for part in linear.parts}
    return parts


def _unpack(
    config: DecoderConfig, parts: dict[str, dict[str, int]], name: str, tensor: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The parts of a stored tensor, each as [out, in]: a checkpoint may store q, k and v as one."""
    module, _, kind = name.rpartition(".")
    if module not in parts:
        return {name: tensor}
    tensor = tensor.t().contiguous() if FAMILIES[config.family].transposed and tensor.ndim == 2 else tensor
    rows = parts[module]
    if tensor.shape[:1] != (sum(rows.values()),):
        return {name: tensor}  # `_check` reports it
    return {f"{part}.{kind}": piece.contiguous() for part, piece in split_rows(config, rows, tensor).items()}


def _check(model_dir: Path, layout: Layout, found: Mapping[str, tuple[int, ...]]) -> None:
    expected = layout.checkpoint_shapes()
    missing = sorted(set(expected) - set(found))
    unknown = sorted(set(found) - set(expected))
    wrong = sorted(f"{n} {found[n]}≠{expected[n]}" for n in expected if n in found and found[n] != expected[n])
    if unknown and not missing and not wrong:
        raise UnsupportedModelError(f"'{model_dir}' holds weights that its family does not use: {unknown[:5]}")
    if missing or wrong:
        raise BundleError(
            f"the weights of '{model_dir}' do not fit its config.json: missing {missing[:5]}, shapes {wrong[:5]}"
        )
