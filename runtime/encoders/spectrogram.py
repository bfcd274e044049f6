"""A sound as a log-mel spectrogram, as transformers' WhisperFeatureExtractor makes it: Slaney's mel scale up to 8 kHz, the power
of windows of Hann, its logarithm down to 8 below the largest."""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

from ..model.encoders.audio import AudioEncoder, AudioProcessor

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
_HIGHEST = 8000.0  # Hz
_LINEAR_HZ, _LINEAR_MEL, _STEP = 1000.0, 15.0, 27.0 / math.log(6.4)  # the scale: linear below, a logarithm above
_FLOOR = 1e-10
_AT_ONCE = 2048  # windows, so that little memory is needed


def spectrograms(samples: F32, encoder: AudioEncoder) -> list[F32]:
    """What the encoder's graph takes for each piece of a sound, [mel bins, 2 · frames + 1]. `samples`: at the processor's
    rate."""
    hop, pool = encoder.processor.hop_length, encoder.pool
    whole = math.ceil(len(samples) / encoder.piece) * encoder.piece
    # Silence up to the end of the last piece, as far as a window or a frame may reach.
    size = whole if encoder.pad == "piece" else len(samples) + encoder.processor.n_fft + 2 * (pool + 2) * hop
    padded = np.zeros(min(whole, math.ceil(size / hop) * hop), np.float32)
    padded[: len(samples)] = samples
    mel = log_mel(padded, encoder.processor, encoder.tower.mel_bins)
    found = []
    for index, frames in enumerate(encoder.frames(len(samples))):
        begin = index * 2 * encoder.tower.max_positions
        piece = np.zeros((len(mel), 2 * frames + 1), np.float32)
        own = mel[:, begin : begin + min(2 * frames + 1, 2 * encoder.tower.max_positions)]
        piece[:, : own.shape[1]] = own
        found.append(piece)
    return found


def log_mel(samples: F32, processor: AudioProcessor, mel_bins: int) -> F32:
    """[mel bins, samples // hop_length]. The samples are a multiple of `hop_length`, more than half a window."""
    size, hop = processor.n_fft, processor.hop_length
    around = np.pad(samples, size // 2, "reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    filters = _filters(processor.sampling_rate, size, mel_bins)
    windows = np.lib.stride_tricks.sliding_window_view(around, size)[::hop][: len(samples) // hop]
    found = np.empty((len(windows), mel_bins), np.float32)
    for begin in range(0, len(windows), _AT_ONCE):
        spectrum = np.fft.rfft(windows[begin : begin + _AT_ONCE] * window, axis=1)  # in float64
        mel = (spectrum.real**2 + spectrum.imag**2) @ filters
        found[begin : begin + _AT_ONCE] = np.log10(np.maximum(mel, _FLOOR))
    np.maximum(found, found.max() - 8.0, out=found)
    return (found.T + 4.0) / 4.0


@functools.cache
def _filters(rate: int, size: int, mel_bins: int) -> F64:
    """[frequencies of a window's spectrum, mel bins]: triangles of equal area, between neighbours on the mel scale."""
    mel = np.linspace(0.0, _LINEAR_MEL + math.log(_HIGHEST / _LINEAR_HZ) * _STEP, mel_bins + 2)
    edges = np.where(mel < _LINEAR_MEL, mel * 200.0 / 3.0, _LINEAR_HZ * np.exp((mel - _LINEAR_MEL) / _STEP))
    frequencies = np.linspace(0, rate // 2, size // 2 + 1)
    slopes, widths = edges[None, :] - frequencies[:, None], np.diff(edges)
    triangles = np.maximum(0.0, np.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]))
    return triangles * (2.0 / (edges[2:] - edges[:-2]))
