"""Files of sounds, in the process that decodes them: what `sounds.SoundKind` asks for."""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
TYPES = {"WAV": "audio/wav", "WAVEX": "audio/wav", "FLAC": "audio/flac", "OGG": "audio/ogg", "MP3": "audio/mpeg"}
FORMATS = "WAV, FLAC, Ogg (Vorbis or Opus) or MP3"
MOST_CHANNELS = 16
RATES = (1000, 384_000)  # Hz
LARGEST = 100.0  # of a sample, where 1 is full scale
_FRAMES_AT_ONCE = 2**16
_STREAMED = (0, 2**32 - 1)  # sizes of a WAV that was written before its end was known


class SoundFiles:
    """Made before the process has its limits: it imports what it needs."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import soundfile
        import soxr

        self._open, self._resample = soundfile.SoundFile, soxr.resample
        self._rate, self._most_seconds = settings["sampling_rate"], settings["most_seconds"]
        self._resample(np.zeros(64, np.float32), 2, 1)

    def decoded(self, content: bytes, is_look: bool) -> tuple[dict[str, Any], F32 | None]:
        """The answer, and the samples of one channel, the mean of all, at the wanted rate. `is_look`: without them, by the
        header."""
        if not _is_known(content):
            return {"refused": "format"}, None
        try:
            file = self._open(BytesIO(content))
        except MemoryError:
            return {"refused": "memory"}, None
        except Exception:  # soundfile raises what it likes
            return {"refused": "damaged"}, None
        try:
            with file:
                frames, rate, channels, kind = file.frames, file.samplerate, file.channels, file.format
                refused = self._refused(content, frames, rate, channels, kind)
                if refused is not None:
                    return refused, None
                samples = math.ceil(frames * self._rate / rate)
                answer = {"dims": [samples], "type": TYPES[kind]}
                if is_look:
                    return answer, None
                mono = _mono(file, frames, channels)
            if mono is None:
                return {"refused": "damaged"}, None
            if not np.isfinite(mono).all():
                return {"refused": "nan"}, None
            if np.abs(mono).max() > LARGEST:
                return {"refused": "loud"}, None
            found = mono if rate == self._rate else self._resample(mono, rate, self._rate)
            fitted = np.zeros(samples, np.float32)
            fitted[: min(len(found), samples)] = found[:samples]
        except MemoryError:
            return {"refused": "memory"}, None
        except Exception:
            return {"refused": "damaged"}, None
        return answer, fitted

    def _refused(self, content: bytes, frames: int, rate: int, channels: int, kind: str) -> dict[str, Any] | None:
        if kind not in TYPES:
            return {"refused": "format"}
        if not RATES[0] <= rate <= RATES[1]:
            return {"refused": "rate", "value": rate}
        if not 1 <= channels <= MOST_CHANNELS:
            return {"refused": "channels", "value": channels}
        if (kind in ("WAV", "WAVEX") and _is_cut_wav(content)) or (kind == "OGG" and not _has_end(content)):
            return {"refused": "damaged"}  # what reads them takes what there is
        if frames < 1:
            return {"refused": "empty"}
        if frames > self._most_seconds * rate:
            return {"refused": "long", "value": round(frames / rate, 1)}
        return None


def _is_known(content: bytes) -> bool:
    """Whether a file begins as those that are read: the library knows many more kinds."""
    if content[:4] == b"RIFF":
        return content[8:12] == b"WAVE"
    is_mpeg = len(content) > 1 and content[0] == 0xFF and content[1] & 0xE0 == 0xE0
    return content[:4] in (b"fLaC", b"OggS") or content[:3] == b"ID3" or is_mpeg


def _is_cut_wav(content: bytes) -> bool:
    """Whether the samples of a WAV would go on behind its end."""
    at = 12
    while at + 8 <= len(content):
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        if content[at : at + 4] == b"data":
            return size not in _STREAMED and at + 8 + size > len(content)
        at += 8 + size + size % 2
    return True


def _has_end(content: bytes) -> bool:
    """Whether the last page of an Ogg is whole, and says that it is the last."""
    at = content.rfind(b"OggS")
    if len(content) < at + 27:
        return False
    segments = content[at + 26]
    size = sum(content[at + 27 : at + 27 + segments])
    return bool(content[at + 5] & 4) and len(content) >= at + 27 + segments + size


def _mono(file: Any, frames: int, channels: int) -> F32 | None:
    """The mean of the channels; None if there are other than so many frames."""
    found, at = np.empty(frames, np.float32), 0
    while True:
        block = file.read(_FRAMES_AT_ONCE, dtype="float32", always_2d=True)
        if not len(block):
            return found if at == frames else None
        if at + len(block) > frames:
            return None
        found[at : at + len(block)] = block.mean(axis=1) if channels > 1 else block[:, 0]
        at += len(block)
