"""What the user asks of quantisation, and the `Quantiser` that does it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from ...runtime.errors import BundleError, ConfigError
from ...runtime.model.config import DecoderConfig
from ...runtime.model.layout import decoder_layout
from .method import Method, Target
from .quantiser import Quantiser, can_sharpen, check_columns, choose_scales, planned, uniform
from .statistics import Statistics, channel_rms, check_text, gather, text_digest

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass(frozen=True, slots=True)
class Calibration:
    """Text on which weights are calibrated: chunks of token ids. `cache`: a folder that keeps what was found, by the digests of
    model and text; None: it is found anew. `seed`: of what is drawn."""

    chunks: Sequence[Sequence[int]]
    cache: Path | None = None
    on_progress: Progress = lambda _what, _done, _total: None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class QuantisationConfig:
    """See `export_bundle`."""

    bits: int | None = None
    group_size: int | None = None
    method: Method = Method.ROUND
    target: Target | None = None

    def __post_init__(self) -> None:
        if self.target is not None and (self.bits is not None or self.group_size is not None):
            raise ConfigError("a target chooses bits and groups of each weight; leave out bits and group_size")
        if self.num_bits not in (4, 8, 32):
            raise ConfigError(f"bits must be 4, 8 or 32, got {self.bits}")
        if self.num_bits == 32 and self.group_size is not None:
            raise ConfigError("group_size is for 4 and 8 bits; leave it out with 32")
        if self.method is not Method.ROUND and self.target is None and self.bits != 4:
            raise ConfigError(
                f"method {self.method} chooses values of 4 bits; give 4 bits or a target, or leave it out with {self.num_bits}"
            )

    @property
    def num_bits(self) -> int:
        """Of the layers, without a target."""
        return 8 if self.bits is None else self.bits

    @property
    def is_calibrated(self) -> bool:
        """Whether statistics of text choose the values."""
        return self.method is not Method.ROUND or self.target is not None

    def check(self, config: DecoderConfig, calibration: Calibration | None) -> None:
        """Raises `ConfigError` for what cannot be done with this model and text."""
        if self.is_calibrated:
            if calibration is None:
                raise ConfigError(f"method {self.method} and targets need calibration text, and there is none")
            check_text(calibration.chunks)
        elif calibration is not None and self.num_bits != 8:
            raise ConfigError(
                f"{self.num_bits} bits with method {self.method} use no calibration text; leave it out, or give another method"
            )
        if self.method is Method.AWQ and not can_sharpen(config):
            raise ConfigError("method awq scales channels of this family's layers nowhere; use search or gptq")
        if self.target is None:
            uniform(config, self.num_bits, self.group_size, self.method, None)
        else:
            check_columns(config)

    def quantiser(
        self,
        config: DecoderConfig,
        weights: Mapping[str, torch.Tensor],
        digest: str,
        calibration: Calibration | None,
        stack: ExitStack,
    ) -> Quantiser:
        """For a model with these weights and this digest of them. What it reads is closed with `stack`."""
        layout = decoder_layout(config)
        if not self.is_calibrated:
            quantiser = uniform(config, self.num_bits, self.group_size, self.method, None)
            if self.num_bits == 8 and calibration is not None:
                choose_scales(quantiser, layout, weights, channel_rms(config, weights, calibration.chunks))
            return quantiser
        assert calibration is not None
        statistics = _statistics(config, weights, digest, calibration, stack)
        if self.target is None:
            quantiser = uniform(config, self.num_bits, self.group_size, self.method, statistics)
        else:
            total, done = len(list(layout.linears)) + 2 - config.tied_head, 0

            def advance() -> None:
                nonlocal done
                done += 1
                calibration.on_progress("choosing bits", done, total)

            quantiser = planned(config, weights, self.target, self.method, statistics, advance)
        rms = {one.name: statistics.rms(f"{one.name}.weight") for one in layout.linears if one.source is not None}
        choose_scales(quantiser, layout, weights, rms)
        return quantiser


def _statistics(
    config: DecoderConfig,
    weights: Mapping[str, torch.Tensor],
    digest: str,
    calibration: Calibration,
    stack: ExitStack,
) -> Statistics:
    """From the cache, or gathered."""
    folder = calibration.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
    folder.mkdir(parents=True, exist_ok=True)
    path, done = folder / f"{text_digest(digest, calibration.chunks, calibration.seed)}.safetensors", 0

    def advance() -> None:
        nonlocal done
        done += 1
        calibration.on_progress("calibrating", done, 2 * config.num_layers)

    if not path.is_file():
        gather(config, weights, calibration.chunks, path, advance, calibration.seed)
    try:
        statistics = Statistics(path)
    except BundleError:  # torn, by a machine that went down
        gather(config, weights, calibration.chunks, path, advance, calibration.seed)
        statistics = Statistics(path)
    stack.callback(statistics.close)
    return statistics
