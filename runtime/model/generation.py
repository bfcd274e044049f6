"""The sampling that a model's makers recommend: the fields of generation_config.json, under Motet's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..api.sampling import SamplingParams
from ..errors import BundleError, InvalidRequestError, UnsupportedModelError
from .files import read_object

_NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}
# They say how to run the model, or are read elsewhere; answers do not depend on them.
_OTHERS = {
    *("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"),
    *("_from_model_config", "use_cache", "cache_implementation", "return_dict_in_generate", "do_sample"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "max_length"),
}
# Rules that Motet does not have are off at one of these values, and these rules at 1 too.
_OFF: tuple[Any, ...] = (None, False, [], {})
_OFF_AT_ONE = {"num_beams", "num_beam_groups", "num_return_sequences", "encoder_repetition_penalty", "guidance_scale"}


def _is_off(name: str, value: Any) -> bool:
    return value in _OFF or (name in _OFF_AT_ONE and value == 1)


def recommended_sampling(directory: Path) -> dict[str, Any]:
    """Field of `SamplingParams` → value, of the generation_config.json of a model or a bundle; empty without one.

    `do_sample: false` is temperature 0. Only what the file says counts, not what transformers would assume.
    `max_length` is not used: an answer ends with the context. Raises `UnsupportedModelError` for a rule that Motet
    does not have (such as beams), `BundleError` if the file is damaged.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return {}
    values = read_object(path, "pull or export the model again")
    unknown = [name for name, value in values.items() if name not in {*_NAMES, *_OTHERS} and not _is_off(name, value)]
    if unknown:
        raise UnsupportedModelError(
            f"'{path}' has rules that Motet does not have: {sorted(unknown)}; sample without them"
        )
    result = {_NAMES[name]: value for name, value in values.items() if name in _NAMES and value is not None}
    if values.get("do_sample") is False:
        result["temperature"] = 0.0
    try:
        SamplingParams(**result)
    except InvalidRequestError as error:
        raise BundleError(f"'{path}' cannot be used: {error}") from error
    return result
