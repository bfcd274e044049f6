"""`ImageReader`: the images of a request become rows of a bundle's model. Nothing of it runs in the engine's thread."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.util import find_spec
from queue import LifoQueue

import numpy as np
import numpy.typing as npt

from ..api.config import EngineConfig
from ..backends.base import Backend
from ..backends.onnx.sessions import encoder_session
from ..errors import BundleError, ConfigError, InvalidRequestError, NumericalError
from ..model.bundle import Bundle
from ..model.encoders.idefics3 import expansion
from ..model.encoders.vision import ImageEncoder
from ..text.media import MediaReader, Medium, NoMedia
from .decoding import ImageDecoder, Tiles, refusal

F32 = npt.NDArray[np.float32]
DECODERS = 2  # processes, and requests with images that are read at once
_TILES_AT_ONCE = 4  # so that a run needs little memory, and is the same whatever else is encoded


def open_media(bundle: Bundle, config: EngineConfig, backend: Backend) -> MediaReader:
    """What reads the media of the messages that a bundle is sent. Raises `BundleError` for an encoder that cannot be loaded, and
    `ConfigError` for settings of images where none are taken."""
    encoder = bundle.image_encoder
    if encoder is None:
        return no_images(config, f"'{bundle.name}' has no encoder of images", "send text")
    if not backend.takes_embedded:
        return no_images(config, f"images need backend cpu, and backend {backend.name} serves '{bundle.name}'")
    if find_spec("PIL") is None:
        return no_images(
            config, "images need Pillow, which is not installed there", "`pip install 'motet[multimodal]'` does it"
        )
    if not config.max_images:
        return no_images(config, "this server is set to take no images (max_images is 0)")
    return ImageReader(bundle, encoder, config)


def no_images(config: EngineConfig, reason: str, remedy: str = "") -> NoMedia:
    """For a server that takes none for this reason. Raises `ConfigError` for settings of images: nothing would use them."""
    given = [
        one.name
        for one in fields(EngineConfig)
        if "image" in one.name and getattr(config, one.name) != one.default
        if (one.name, getattr(config, one.name)) != ("max_images", 0)  # which is so
    ]
    if given:
        raise ConfigError(f"{', '.join(given)}: {reason}; leave them out")
    return NoMedia(f"{reason}; {remedy}" if remedy else reason)


@dataclass(frozen=True, slots=True)
class _Image:
    """A `Medium`."""

    reader: ImageReader
    content: bytes
    rows: int  # of tiles, by the header
    columns: int
    digest: bytes

    @property
    def text(self) -> str:
        return expansion(self.rows, self.columns, self.reader.encoder.rows_per_tile)

    @property
    def runs(self) -> Sequence[int]:
        return [self.reader.encoder.rows_per_tile] * (self.rows * self.columns + 1)

    def encode(self, salt: bytes) -> Sequence[F32]:
        return list(self.reader.rows(self, salt))


class ImageReader:
    """`MediaReader` of a bundle with an encoder of images. The rows of an image are kept under its digest and the caller's salt,
    `image_cache_bytes` of them."""

    def __init__(self, bundle: Bundle, encoder: ImageEncoder, config: EngineConfig) -> None:
        from .tiles import normalised  # it needs Pillow

        self.encoder = encoder
        self._normalised = normalised
        self._config = config
        self._session = encoder_session(bundle, bundle.encoder_files[0], config)
        self._check_graph(bundle)
        self._encoding = threading.Lock()  # one image at a time: each run takes all threads
        self._keeping = threading.Lock()
        self._kept: OrderedDict[tuple[bytes, bytes], F32] = OrderedDict()
        self._num_bytes = 0
        self._decoders: LifoQueue[ImageDecoder] = LifoQueue()
        self._all = [ImageDecoder(encoder.processor, config.max_image_pixels) for _ in range(DECODERS)]
        for decoder in self._all:
            self._decoders.put(decoder)

    @property
    def token(self) -> str:
        return self.encoder.token

    @property
    def token_id(self) -> int:
        return self.encoder.token_id

    @property
    def most_bytes(self) -> int:
        return self._config.max_image_bytes

    def close(self) -> None:
        for decoder in self._all:
            decoder.close()

    def read(self, contents: Sequence[tuple[bytes, str]]) -> Sequence[Medium]:
        """See `MediaReader.read`."""
        if len(contents) > self._config.max_images:
            raise InvalidRequestError(
                f"the request has {len(contents)} images, at most max_images ({self._config.max_images}) are read; send fewer",
                field="messages.content",
            )
        size = sum(len(content) for content, _ in contents)
        if size > self._config.max_image_bytes:
            raise InvalidRequestError(
                f"the request's images have {size} bytes, at most max_image_bytes ({self._config.max_image_bytes}) are read; "
                "scale them down, or compress them",
                field="messages.content",
            )
        read = {file: self._read(*file) for file in dict.fromkeys(contents)}
        return [read[file] for file in contents]

    def tiles(self, image: _Image) -> Tiles:
        """Decodes an image. Raises what `ImageDecoder.decode` raises."""
        with self._decoder() as decoder:
            tiles = decoder.decode(image.content)
        if (tiles.rows, tiles.columns) != (image.rows, image.columns):
            raise refusal("its header and its pixels differ in size; send a file that is whole")
        return tiles

    def rows(self, image: _Image, salt: bytes) -> F32:
        """[tiles, rows of a tile, hidden], in float32; decoded and encoded, or kept from before."""
        key = salt, image.digest
        found = self._find(key)  # which waits for nobody's encoding
        if found is not None:
            return found
        pixels, settings = self.tiles(image).pixels, self.encoder.processor
        with self._encoding:
            found = self._find(key)  # another request had the same
            if found is not None:
                return found
            parts = [
                self._session.run(None, {"pixels": self._normalised(pixels[i : i + _TILES_AT_ONCE], settings)})[0]
                for i in range(0, len(pixels), _TILES_AT_ONCE)
            ]
            rows: F32 = np.concatenate(parts)
            if not np.isfinite(rows).all():
                raise NumericalError("the encoder makes NaN or infinite values of an image; it cannot be used")
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
        if rows.nbytes > self._config.image_cache_bytes:
            return
        with self._keeping:
            self._kept[key] = rows
            self._num_bytes += rows.nbytes
            while self._num_bytes > self._config.image_cache_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._num_bytes -= oldest.nbytes

    @contextmanager
    def _decoder(self) -> Iterator[ImageDecoder]:
        decoder = self._decoders.get()
        try:
            yield decoder
        finally:
            self._decoders.put(decoder)

    def _read(self, content: bytes, media_type: str) -> _Image:
        with self._decoder() as decoder:
            rows, columns = decoder.look(content, media_type)
        return _Image(self, content, rows, columns, hashlib.sha256(self.encoder.processor.digest + content).digest())

    def _check_graph(self, bundle: Bundle) -> None:
        """Raises `BundleError` for a graph that does not take tiles and give rows as the manifest says."""
        edge, vision = self.encoder.processor.tile_size, self.encoder.vision
        wanted = ([3, edge, edge], [self.encoder.rows_per_tile, vision.output_size])
        (inputs, outputs) = self._session.get_inputs(), self._session.get_outputs()
        found = tuple([*value.shape[1:]] for value in (*inputs, *outputs))
        if (
            found != wanted
            or [value.name for value in inputs] != ["pixels"]
            or vision.output_size != bundle.config.hidden_size
        ):
            raise BundleError(
                f"the encoder of '{bundle.path}' has inputs and outputs of {found}, its manifest says {wanted}; export it again"
            )
