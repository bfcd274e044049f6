"""`MediaFeatures`: the images and sounds of examples become what an encoder's projector gets, once for each file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...runtime.api.config import EngineConfig
from ...runtime.checkpoints.encoders.page import EncoderPage
from ...runtime.encoders.decoding import MediaDecoder
from ...runtime.encoders.kind import Dims, MediumKind
from ...runtime.encoders.reader import MEDIA_KINDS
from ...runtime.errors import DataError, InvalidRequestError, MissingPackageError, NumericalError
from .encode import EmbeddedRows
from .example import MediaPath
from .feature_cache import FeatureCache

MOST_BYTES = 256 << 20  # of a file: the process that decodes it may take 2 GiB


@dataclass(frozen=True, slots=True)
class _Look:
    """What a file's header says."""

    kind: MediumKind
    dims: Dims


class _Tower:
    """An encoder's tower where its graph's session is expected."""

    def __init__(self, page: EncoderPage) -> None:
        self._page = page

    @torch.no_grad()
    def run(self, _outputs: None, inputs: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[np.float32]]:
        return [self._page.features(*map(torch.from_numpy, inputs.values())).numpy()]


class MediaFeatures:
    """`pages`: by medium. Without a cache, features stay in memory. Files are decoded as a server decodes them, in a process with
    limits; what it refuses is a `DataError`. `close` it when files have been read. Raises `MissingPackageError`."""

    def __init__(self, pages: Mapping[str, EncoderPage], cache: FeatureCache | None) -> None:
        self.pages = pages
        self._cache = cache
        self._kinds = {medium: MEDIA_KINDS[medium](page.encoder, EngineConfig()) for medium, page in pages.items()}
        missing = [name for kind in self._kinds.values() for module, name in kind.packages if find_spec(module) is None]
        if missing:
            raise MissingPackageError(
                f"images and sounds need {', '.join(missing)}; install them with `pip install 'motet[multimodal]'`"
            )
        self._digests = {medium: _tower_digest(page) for medium, page in pages.items()}
        self._looks: dict[MediaPath, _Look] = {}
        self._held: dict[str, Tensor] = {}  # without a cache
        self._process: MediaDecoder | None = None

    @property
    def _decoder(self) -> MediaDecoder:
        if self._process is None:
            self._process = MediaDecoder(list(self._kinds.values()))
        return self._process

    def close(self) -> None:
        """End the process that decodes; it is started again when it is needed."""
        if self._process is not None:
            self._process.close()
        self._process = None

    @property
    def placeholders(self) -> Collection[str]:
        """Of all media that the model takes."""
        return [page.encoder.token for page in self.pages.values()]

    def look(self, file: MediaPath) -> _Look:
        """By a file's header. Raises `DataError`."""
        if file not in self._looks:
            kind = self._kinds.get(file.kind)
            if kind is None:
                raise DataError(
                    f"'{file.path}' is an {file.kind}, and the model has no encoder of that; `motet tune --method projector` "
                    "gives it one"
                )
            dims = self._asked(file, lambda content: self._decoder.look(kind, content))
            self._looks[file] = _Look(kind, dims)
        return self._looks[file]

    def text(self, file: MediaPath) -> tuple[str, str]:
        """The placeholder of a file, and what the prompt has in its place. Raises `DataError`."""
        look = self.look(file)
        return look.kind.encoder.token, look.kind.text(look.dims)

    def embedded(self, files: Sequence[MediaPath], token_ids: Sequence[int]) -> tuple[EmbeddedRows, ...]:
        """The rows of an example's files, at the placeholders of its token ids. Raises `DataError` if they do not fit, or a file
        is damaged, and what the cache raises."""
        found: list[EmbeddedRows] = []
        ids, at = np.array(token_ids), 0
        for file in files:
            look = self.look(file)
            digest, features = self.features(file)
            project = self.pages[file.kind].projector
            for index, length in enumerate(look.kind.runs(look.dims)):
                token = look.kind.encoder.token_id
                places = np.flatnonzero(ids[at:] == token)
                start = at + int(places[0]) if len(places) else len(ids)
                at = start + length
                if at > len(ids) or not (ids[start:at] == token).all():
                    raise DataError(
                        f"the prompt has no {length} placeholders for '{file.path}'; the model's tokenizer or chat template does "
                        "not fit its encoder"
                    )
                found.append(EmbeddedRows(start, file.kind, f"{digest} {index}", features[index], project))
        return tuple(found)

    def features(self, file: MediaPath) -> tuple[str, Tensor]:
        """(digest, [runs, rows, width] bfloat16)."""
        look = self.look(file)
        key = hashlib.sha256(f"{self._digests[file.kind]} {file.digest}".encode()).hexdigest()
        found = self._held.get(key) if self._cache is None else self._cache.read(key)
        if found is None:
            values = self._asked(file, lambda content: self._decoder.decode(look.kind, content))
            rows = torch.from_numpy(look.kind.encode(_Tower(self.pages[file.kind]), values.values))
            if values.dims != look.dims:
                raise DataError(f"'{file.path}': its header and its content differ in size; give a file that is whole")
            if not torch.isfinite(rows).all():
                raise NumericalError(f"the encoder makes NaN or infinite values of '{file.path}'; it cannot be used")
            rows = rows.view(len(look.kind.runs(look.dims)), -1, rows.shape[-1]).to(torch.bfloat16)
            found = rows if self._cache is None else self._cache.write(key, rows)
            if self._cache is None:
                self._held[key] = found
        return key, found

    def _asked(self, file: MediaPath, ask: Callable[[bytes], Any]) -> Any:
        try:
            if (size := file.path.stat().st_size) > MOST_BYTES:
                raise DataError(
                    f"'{file.path}' has {size} bytes, at most {MOST_BYTES} are read; shorten it, or compress it"
                )
            content = file.path.read_bytes()
            if hashlib.sha256(content).hexdigest() != file.digest:
                raise DataError(f"'{file.path}' changed while it was read; run the command again")
            return ask(content)
        except InvalidRequestError as error:
            raise DataError(f"'{file.path}': {error}") from error
        except OSError as error:
            raise DataError(f"'{file.path}' cannot be read: {error.strerror or error}") from error


def _tower_digest(page: EncoderPage) -> str:
    """SHA-256 of what features depend on: the tower's weights, and the encoder's settings but for projector and placeholder."""
    settings = {
        k: v for k, v in page.encoder.to_dict().items() if not k.startswith(("projector", "token", "layout", "queries"))
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(page.state_dict().items()):
        if not name.startswith("projector."):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
