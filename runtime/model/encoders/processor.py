"""The settings of a processor, in either place that transformers stores them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ...errors import UnsupportedModelError, shown
from ..families.family import Json


def processor_settings(
    preprocessor: Json, processor: Json, name: str, defaults: Json, neutral: Collection[str], whole: Collection[str]
) -> dict[str, Any]:
    """The settings of preprocessor_config.json or, as transformers 5 stores them, under `name` of processor_config.json, with the
    defaults for what they leave out. `neutral`: keys of either that change nothing; `whole`: further ones of
    processor_config.json. Raises `UnsupportedModelError` for other keys, and if the two places differ."""
    nested = processor.get(name) or {}
    kept, own = ({k: v for k, v in one.items() if k not in neutral and v is not None} for one in (nested, preprocessor))
    if nested and preprocessor and kept != own:
        raise UnsupportedModelError(
            f"preprocessor_config.json and the {name} of processor_config.json differ; remove one of them"
        )
    values = kept if nested else own
    others = {key for key, value in processor.items() if value is not None and key not in neutral}
    unknown = sorted({*values} - {*defaults}) + sorted(others - {name, *whole})
    if unknown:
        raise UnsupportedModelError(
            f"the {name.replace('_', ' ')} has {shown(unknown)}, which is not computed here; remove the key only if the model "
            "was trained without it"
        )
    return {**defaults, **values}
