"""`SoundKind`: sounds become spectrograms, and these rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..api.config import EngineConfig
from ..model.encoders import AUDIO
from ..model.encoders.audio import AudioEncoder
from .decoding_process import MEMORY
from .kind import F32, Dims, MediumKind
from .sound_files import FORMATS, LARGEST, MOST_CHANNELS, RATES, TYPES
from .spectrogram import spectrograms

if TYPE_CHECKING:
    import onnxruntime as ort

# How senders write a type, the end of a file's name among it.
_NAMES = {
    "audio/wave": "audio/wav",
    "audio/vnd.wave": "audio/wav",
    "audio/mp3": "audio/mpeg",
    "audio/opus": "audio/ogg",
}


class SoundKind(MediumKind):
    """The size of a sound: its samples, at the rate of the encoder."""

    medium = AUDIO
    noun = "a sound"
    remedy = "shorten them, or send FLAC, Ogg or MP3"
    types = frozenset(TYPES.values())
    packages = (("soundfile", "soundfile"), ("soxr", "soxr"))
    encoder: AudioEncoder

    def __init__(self, encoder: AudioEncoder, config: EngineConfig) -> None:
        super().__init__(encoder, config)
        self.encoder = encoder
        self._most_seconds = min(config.max_audio_seconds, encoder.max_seconds)
        who = "max_audio_seconds" if self._most_seconds == config.max_audio_seconds else "what the model hears"
        self.reasons = {
            "format": f"it is no sound of a kind that is read: {FORMATS}",
            "damaged": "it is damaged or cut off; send the whole file",
            "empty": "it has no samples",
            "short": "it is too short: it gives no row",
            "rate": f"it has {{value}} samples a second, {RATES[0]} to {RATES[1]} are read; resample it",
            "channels": f"it has {{value}} channels, at most {MOST_CHANNELS} are read; mix them",
            "long": f"it has {{value}} seconds, at most {who} ({self._most_seconds:g}) are read; send a part of it",
            "nan": "it has samples that are NaN or infinite",
            "loud": f"it has samples above {LARGEST:g}, where 1 is full scale; scale it",
            "memory": f"it takes more than {MEMORY >> 30} GiB to decode; send a shorter one",
        }

    @property
    def settings(self) -> Mapping[str, Any]:
        rate = self.encoder.processor.sampling_rate
        return {"sampling_rate": rate, "most_seconds": self._most_seconds}

    @property
    def digest(self) -> bytes:
        return self.encoder.digest

    def check_dims(self, dims: Dims) -> Dims:
        [samples] = dims
        if not 1 <= samples <= math.ceil(self._most_seconds * self.encoder.processor.sampling_rate):
            raise ValueError("more samples than there can be")
        return dims

    def check_file(self, dims: Dims) -> str | None:
        return None if self.encoder.rows(dims[0]) else "short"

    def decoded_as(self, dims: Dims) -> tuple[np.dtype[Any], tuple[int, ...]]:
        return np.dtype(np.float32), dims

    def text(self, dims: Dims) -> str:
        return self.encoder.expansion(self.encoder.rows(dims[0]))

    def runs(self, dims: Dims) -> Sequence[int]:
        return [self.encoder.rows(dims[0])]

    def encode(self, session: ort.InferenceSession, values: npt.NDArray[Any]) -> F32:
        parts = [session.run(None, {"mel": mel[None]})[0][0] for mel in spectrograms(values, self.encoder)]
        rows: F32 = np.concatenate(parts)
        return rows

    def graph_shapes(self) -> tuple[list[Any], list[Any]]:
        return [self.encoder.tower.mel_bins, None], [None, self.encoder.output_size]

    def type_of(self, said: str) -> str:
        known = super().type_of(said)
        return _NAMES.get(known, known)
