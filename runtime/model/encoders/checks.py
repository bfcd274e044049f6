"""Checks that the settings of all encoders share."""

from __future__ import annotations

import sys
from typing import Any

from ...errors import ConfigError, shown


def is_number(value: object) -> bool:
    """Of a size that a float can have."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # which is False for NaN


def check_sizes(values: Any, names: tuple[str, ...], what: str) -> None:
    """Raises `ConfigError` for a size that is none."""
    for name in names:
        value = getattr(values, name)
        if type(value) is not int or not 1 <= value < 2**20:
            raise ConfigError(f"{name} of {what} must be an integer in 1…{2**20 - 1}, got {shown(value)}")


def check_tower(values: Any, what: str) -> None:
    """Of a transformer: `norm_eps`, and heads that divide its size. Raises `ConfigError`."""
    if not is_number(values.norm_eps) or not 0 < values.norm_eps < 1:
        raise ConfigError(f"norm_eps of {what} must be in 0…1, got {shown(values.norm_eps)}")
    if values.hidden_size % values.num_heads:
        raise ConfigError(
            f"hidden_size of {what} ({values.hidden_size}) must be a multiple of num_heads ({values.num_heads})"
        )


def check_placeholder(token: object, token_id: object, what: str) -> None:
    """Raises `ConfigError` for what is no token."""
    if not isinstance(token, str) or not token:
        raise ConfigError(f"the placeholder of {what} must be a token, got {shown(token)}")
    if type(token_id) is not int or not 0 <= token_id < 2**31:
        raise ConfigError(f"the placeholder's id must be a token id, got {shown(token_id)}")


def check_projector(encoder: Any, kinds: tuple[str, ...]) -> None:
    """Raises `ConfigError` unless `projector` is one of these kinds, with what belongs to it."""
    if encoder.projector not in kinds:
        raise ConfigError(f"projector must be one of {kinds}, got {shown(encoder.projector)}")
    if (encoder.projector == "linear") != (encoder.projector_size is None):
        raise ConfigError("projector_size is of a projector that is not linear, which must have one; null with linear")
    if encoder.projector_size is not None:
        check_sizes(encoder, ("projector_size",), "the encoder")
    if not isinstance(encoder.projector_bias, bool):
        raise ConfigError(f"projector_bias must be true or false, got {shown(encoder.projector_bias)}")
