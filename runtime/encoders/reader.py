"""`EncodedMedia`: the images and sounds of a request become rows of a bundle's model, outside of the engine's thread."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.util import find_spec
from queue import LifoQueue

import numpy as np
import onnxruntime as ort

from ..api.config import EngineConfig
from ..backends.base import Backend
from ..backends.onnx.sessions import encoder_session
from ..errors import BundleError, ConfigError, InvalidRequestError, NumericalError
from ..model.bundle import Bundle
from ..model.encoders import KINDS
from ..text.media import MediaFile, MediaReader, Medium, NoMedia
from .decoding import Decoded, MediaDecoder, refusal
from .images import ImageKind
from .kind import F32, Dims, MediumKind
from .sounds import SoundKind

DECODERS = 2  # processes, and requests with media that are read at once
MEDIA_KINDS: Mapping[str, type[MediumKind]] = {kind.medium: kind for kind in (ImageKind, SoundKind)}
_SHARED = "media_cache_bytes"  # the setting that is of no medium alone


def open_media(bundle: Bundle, config: EngineConfig, backend: Backend) -> MediaReader:
    """What reads the media of the messages that a bundle is sent. Raises `BundleError` for an encoder that cannot be loaded, and
    `ConfigError` for settings of media that are not taken."""
    if not bundle.encoders:
        return no_media(config, f"'{bundle.name}' has no encoder", "send text")
    if not backend.takes_embedded:
        return no_media(config, f"media need backend cpu, and backend {backend.name} serves '{bundle.name}'")
    kinds, refused = [], {medium: f"'{bundle.name}' has no encoder of {medium}" for medium in KINDS}
    for medium, encoder in bundle.encoders.items():
        kind = MEDIA_KINDS[medium](encoder, config)
        missing = [name for module, name in kind.packages if find_spec(module) is None]
        if missing:
            refused[medium] = (
                f"{medium} needs {' and '.join(missing)}, which is not installed there; `pip install 'motet[multimodal]'` does it"
            )
        elif not kind.most:
            refused[medium] = f"this server is set to take none (max_{medium}s is 0)"
        else:
            del refused[medium]
            kinds.append(kind)
    if not kinds:
        reasons = {refused[medium] for medium in bundle.encoders}
        return no_media(config, "; ".join(sorted(reasons)))
    for medium, reason in refused.items():
        _check_unused(config, [medium], reason)
    return EncodedMedia(bundle, kinds, config, refused)


def no_media(config: EngineConfig, reason: str, remedy: str = "") -> NoMedia:
    """For a server that takes none for this reason. Raises `ConfigError` for settings of media: nothing would use them."""
    _check_unused(config, [*KINDS, _SHARED], reason)
    return NoMedia(f"{reason}; {remedy}" if remedy else reason)


def _check_unused(config: EngineConfig, names: Collection[str], reason: str) -> None:
    """Raises `ConfigError` for settings with these in their names that are not the defaults."""
    given = [
        one.name
        for one in fields(EngineConfig)
        if any(name in one.name for name in names) and getattr(config, one.name) != one.default
        if (one.name, getattr(config, one.name)) not in {(f"max_{medium}s", 0) for medium in KINDS}  # which is so
    ]
    if given:
        raise ConfigError(f"{', '.join(given)}: {reason}; leave them out")


@dataclass(frozen=True, slots=True)
class _Medium:
    """A `Medium`."""

    reader: EncodedMedia
    kind: MediumKind
    content: bytes
    dims: Dims  # by the header
    digest: bytes

    @property
    def token(self) -> str:
        return self.kind.encoder.token

    @property
    def token_id(self) -> int:
        return self.kind.encoder.token_id

    @property
    def text(self) -> str:
        return self.kind.text(self.dims)

    @property
    def runs(self) -> Sequence[int]:
        return self.kind.runs(self.dims)

    def encode(self, salt: bytes) -> Sequence[F32]:
        return np.split(self.reader.rows(self, salt), np.cumsum(self.runs)[:-1])


class EncodedMedia:
    """`MediaReader` of a bundle with encoders. The rows of a medium are kept under its digest and the caller's salt,
    `media_cache_bytes` of them. `refused`: why media of other names are not taken."""

    def __init__(
        self, bundle: Bundle, kinds: Sequence[MediumKind], config: EngineConfig, refused: Mapping[str, str]
    ) -> None:
        self.kinds = {kind.medium: kind for kind in kinds}
        self.placeholders = {encoder.token: encoder.token_id for encoder in bundle.encoders.values()}
        self._config, self._refused = config, refused
        self.sessions = {kind.medium: _session(bundle, kind, config) for kind in kinds}
        self._encoding = threading.Lock()  # one medium at a time: each run takes all threads
        self._keeping = threading.Lock()
        self._kept: OrderedDict[tuple[bytes, bytes], F32] = OrderedDict()
        self._num_bytes = 0
        self._decoders: LifoQueue[MediaDecoder] = LifoQueue()
        self._all = [MediaDecoder(kinds) for _ in range(DECODERS)]
        for decoder in self._all:
            self._decoders.put(decoder)

    @property
    def media(self) -> Sequence[str]:
        return list(self.kinds)

    @property
    def most_bytes(self) -> int:
        return sum(kind.most_bytes for kind in self.kinds.values())

    def close(self) -> None:
        for decoder in self._all:
            decoder.close()

    def read(self, files: Sequence[MediaFile]) -> Sequence[Medium]:
        """See `MediaReader.read`."""
        for medium in dict.fromkeys(file.medium for file in files):
            self._check([file.content for file in files if file.medium == medium], medium)
        read = {file: self._read(file) for file in dict.fromkeys(files)}
        return [read[file] for file in files]

    def _check(self, contents: Sequence[bytes], medium: str) -> None:
        """Raises `InvalidRequestError` for more files of a medium than a request may have."""
        kind = self.kinds.get(medium)
        if kind is None:
            reason = self._refused.get(medium, f"{medium} is no medium that is known")
            raise InvalidRequestError(
                f"messages may hold text and {' and '.join(self.kinds)} only here: {reason}", field="messages.content"
            )
        if len(contents) > kind.most:
            raise InvalidRequestError(
                f"the request has {len(contents)} {medium}s, at most max_{medium}s ({kind.most}) are read; send fewer",
                field="messages.content",
            )
        size = sum(map(len, contents))
        if size > kind.most_bytes:
            raise InvalidRequestError(
                f"the request's {medium}s have {size} bytes, at most max_{medium}_bytes ({kind.most_bytes}) are read; "
                f"{kind.remedy}",
                field="messages.content",
            )

    def decoded(self, medium: _Medium) -> Decoded:
        """Raises what `MediaDecoder.decode` raises."""
        with self._decoder() as decoder:
            found = decoder.decode(medium.kind, medium.content)
        if found.dims != medium.dims:
            raise refusal(medium.kind, "its header and its content differ in size; send a file that is whole")
        return found

    def rows(self, medium: _Medium, salt: bytes) -> F32:
        """[rows of all runs, hidden], in float32; decoded and encoded, or kept from before."""
        key = salt, medium.digest
        found = self._find(key)  # which waits for nobody's encoding
        if found is not None:
            return found
        values = self.decoded(medium).values
        with self._encoding:
            found = self._find(key)  # another request had the same
            if found is not None:
                return found
            rows = medium.kind.encode(self.sessions[medium.kind.medium], values)
            if rows.shape != (sum(medium.runs), medium.kind.encoder.output_size):  # a sound's graph says nothing of it
                raise NumericalError(
                    f"the encoder makes {rows.shape} values of {medium.kind.noun} that stands for {sum(medium.runs)} rows; it "
                    "cannot be used"
                )
            if not np.isfinite(rows).all():
                raise NumericalError(
                    f"the encoder makes NaN or infinite values of {medium.kind.noun}; it cannot be used"
                )
            rows.flags.writeable = False  # requests share it
            self._keep(key, rows)
            return rows

    def _find(self, key: tuple[bytes, bytes]) -> F32 | None:
        with self._keeping:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def _keep(self, key: tuple[bytes, bytes], rows: F32) -> None:
        if rows.nbytes > self._config.media_cache_bytes:
            return
        with self._keeping:
            self._kept[key] = rows
            self._num_bytes += rows.nbytes
            while self._num_bytes > self._config.media_cache_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._num_bytes -= oldest.nbytes

    @contextmanager
    def _decoder(self) -> Iterator[MediaDecoder]:
        decoder = self._decoders.get()
        try:
            yield decoder
        finally:
            self._decoders.put(decoder)

    def _read(self, file: MediaFile) -> _Medium:
        kind = self.kinds[file.medium]
        with self._decoder() as decoder:
            dims = decoder.look(kind, file.content, file.media_type)
        digest = hashlib.sha256(kind.digest + file.content).digest()
        return _Medium(self, kind, file.content, dims, digest)


def _session(bundle: Bundle, kind: MediumKind, config: EngineConfig) -> ort.InferenceSession:
    """Raises `BundleError` for a graph that does not take and give what the manifest says."""
    session = encoder_session(bundle, bundle.encoder_files[kind.medium][0], config)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    found = [[size if isinstance(size, int) else None for size in value.shape[1:]] for value in (*inputs, *outputs)]
    wanted = [*kind.graph_shapes()]
    if found != wanted or kind.encoder.output_size != bundle.config.hidden_size:
        raise BundleError(
            f"the encoder of {kind.medium} of '{bundle.path}' has inputs and outputs of {found}, its manifest says {wanted}; "
            "export it again"
        )
    return session
