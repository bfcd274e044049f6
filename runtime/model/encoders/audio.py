"""An encoder of sounds: Whisper's encoder (Radford et al. 2022) on a log-mel spectrogram, frames that are averaged or stacked to
rows, and a projector; and how sounds become its input.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from ...api.config import check_keys
from ...errors import ConfigError, shown
from .checks import check_placeholder, check_projector, check_sizes, check_tower, is_number

MAX_SECONDS = 3 * 3600  # of a sound, whatever a model says
_MOST_RATE = 192_000
_MOST_BINS, _MOST_ROWS = 512, 2**17


@dataclass(frozen=True, slots=True)
class WhisperConfig:
    """Sizes are counts of elements. `max_positions`: frames that the encoder sees at once, each of two of the spectrogram.
    Raises `ConfigError` for a value of the wrong type or out of its range."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    mel_bins: int
    max_positions: int
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        names = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "mel_bins", "max_positions")
        check_sizes(self, names, "the audio tower")
        check_tower(self, "the audio tower")
        if self.mel_bins > _MOST_BINS:
            raise ConfigError(f"mel_bins of the audio tower must be at most {_MOST_BINS}, got {self.mel_bins}")


@dataclass(frozen=True, slots=True)
class AudioProcessor:
    """How a sound becomes a spectrogram, as Whisper's feature extractor makes it. `sampling_rate` in Hz; `n_fft`, `hop_length`:
    samples of a window, and from one to the next. Raises `ConfigError`."""

    sampling_rate: int
    n_fft: int
    hop_length: int

    def __post_init__(self) -> None:
        check_sizes(self, ("sampling_rate", "n_fft", "hop_length"), "the audio processor")
        if not 1000 <= self.sampling_rate <= _MOST_RATE:
            raise ConfigError(f"sampling_rate must be in 1000…{_MOST_RATE}, got {self.sampling_rate}")
        if not self.hop_length <= self.n_fft <= 2**14:
            raise ConfigError(f"n_fft must be in hop_length ({self.hop_length})…{2**14}, got {self.n_fft}")


@dataclass(frozen=True, slots=True)
class AudioEncoder:
    """An encoder of sounds. A sound is cut into pieces of as many frames as the tower sees at once.

    `pad`: the last piece is filled up with silence to a whole "piece", to a whole "row", or not ("none": frames that fill no row
    are heard and give none). `pooling`: `pool` frames become a row, their average before the last norm, or stacked after it.
    `projector`: "linear", or "mlp" (linear, GELU, linear) with `projector_size` units, which is None otherwise;
    `projector_bias`: whether it has biases. `output_size`: hidden size of the text model. `token`, `token_id`: the placeholder,
    in the template's text and as a row of the prompt. `around`: tokens that the template writes around it. `max_seconds`: of a
    sound. Raises `ConfigError` if these do not fit together.
    """

    tower: WhisperConfig
    processor: AudioProcessor
    pad: Literal["piece", "row", "none"]
    pooling: Literal["average", "stack"]
    pool: int
    projector: Literal["linear", "mlp"]
    projector_size: int | None
    projector_bias: bool
    output_size: int
    token: str
    token_id: int
    around: tuple[str, ...]
    max_seconds: float

    def __post_init__(self) -> None:
        check_placeholder(self.token, self.token_id, "a sound")
        check_sizes(self, ("pool", "output_size"), "the encoder of sounds")
        for name, known in (
            ("pad", ("piece", "row", "none")),
            ("pooling", ("average", "stack")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {known}, got {shown(getattr(self, name))}")
        if self.tower.max_positions % self.pool:
            raise ConfigError(f"pool ({self.pool}) must divide the tower's max_positions ({self.tower.max_positions})")
        if self.piece < self.processor.sampling_rate:
            raise ConfigError(f"the tower must hear a second at least; its piece has {self.piece} samples")
        check_projector(self, ("linear", "mlp"))
        if not isinstance(self.around, list | tuple) or not all(isinstance(one, str) and one for one in self.around):
            raise ConfigError(f"around must be a list of tokens, got {shown(self.around)}")
        object.__setattr__(self, "around", tuple(self.around))
        if not is_number(self.max_seconds) or not 0 < self.max_seconds <= MAX_SECONDS:
            raise ConfigError(f"max_seconds must be in 0…{MAX_SECONDS}, got {shown(self.max_seconds)}")

        if (rows := self.rows(int(self.max_seconds * self.processor.sampling_rate))) > _MOST_ROWS:
            raise ConfigError(
                f"a sound may become at most {_MOST_ROWS} rows, and {self.max_seconds:g} s make {rows}; lower max_seconds"
            )

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """What stands for a sound in a prompt, which no text may write."""
        return (self.token, *self.around)

    @property
    def needed_tokens(self) -> tuple[str, ...]:
        """Those that the tokenizer must have, beside the placeholder."""
        return ()

    @property
    def num_layers(self) -> int:
        """Of the tower."""
        return self.tower.num_layers

    @property
    def width(self) -> int:
        """Of what the projector gets."""
        return self.tower.hidden_size * (self.pool if self.pooling == "stack" else 1)

    @property
    def piece(self) -> int:
        """Samples that the tower sees at once."""
        return 2 * self.tower.max_positions * self.processor.hop_length

    @property
    def digest(self) -> bytes:
        """SHA-256 of the settings of the processor and of padding: sounds that are processed in another way have other rows."""
        own = {**dataclasses.asdict(self.processor), "pad": self.pad}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).digest()

    def frames(self, samples: int) -> list[int]:
        """How many frames the tower sees of each piece of a sound."""
        whole, rest = divmod(samples, self.piece)
        found = [self.tower.max_positions] * whole
        if not rest:
            return found
        last = math.ceil(math.ceil(rest / self.processor.hop_length) / 2)
        if self.pad == "piece":
            last = self.tower.max_positions
        elif self.pad == "row":
            last = math.ceil(last / self.pool) * self.pool
        return [*found, last]

    def rows(self, samples: int) -> int:
        """Rows that a sound becomes; 0: it is too short."""
        return sum(frames // self.pool for frames in self.frames(samples))

    def expansion(self, rows: int) -> str:
        """The text that the prompt has for a sound."""
        return self.token * rows

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AudioEncoder:
        """Raises `ConfigError` for unknown keys, `TypeError` for missing ones."""
        check_keys(cls, values)
        for name, kind in (("tower", WhisperConfig), ("processor", AudioProcessor)):
            check_keys(kind, values[name])
        parts = {"tower": WhisperConfig(**values["tower"]), "processor": AudioProcessor(**values["processor"])}
        return cls(**(values | parts))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
