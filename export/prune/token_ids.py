"""Token ids in config.json, generation_config.json and tokenizer_config.json: which they are, and the files with new ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...runtime.errors import BundleError, UnsupportedModelError, shown

_ENDINGS = ("_token_id", "_token_ids")
# Lists of ids that may lose some: a token that is not there cannot be drawn.
_FORBIDDEN = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
_REFUSED = ("forced_decoder_ids", "force_words_ids", "sequence_bias")


def ids_in(values: Mapping[str, Any], vocab_size: int) -> set[int]:
    """The ids that keys such as `eos_token_id` name. Raises `BundleError` for one that is none of the model's."""
    found: set[int] = set()
    for key, value in values.items():
        if key.endswith(_ENDINGS):
            for one in value if isinstance(value, list) else [value]:
                if one is not None and (type(one) is not int or not 0 <= one < vocab_size):
                    raise BundleError(
                        f"{key} is {shown(one)}, and a token id is an integer in 0…{vocab_size - 1}; correct it, or make it null"
                    )
            found.update(one for one in (value if isinstance(value, list) else [value]) if one is not None)
        elif isinstance(value, dict) and key != "added_tokens_decoder":  # such as task_specific_params
            found |= ids_in(value, vocab_size)
    return found


def renumbered_ids(values: Mapping[str, Any], new: Mapping[int, int], *, nested: bool = False) -> dict[str, Any]:
    """The same settings with new ids. `new`: old id → new id. Raises `UnsupportedModelError` for a key whose ids cannot be
    changed."""
    changed = dict(values)
    for key, value in values.items():
        if value is None:
            continue
        if key in _REFUSED:
            raise UnsupportedModelError(f"{key} names token ids, and these are not renumbered; remove the key")
        if key.endswith(_ENDINGS):
            changed[key] = [new[one] for one in value if one is not None] if isinstance(value, list) else new[value]
        elif key in _FORBIDDEN:
            changed[key] = _left(key, value, new)
        elif key == "added_tokens_decoder" and not nested:  # of tokenizer_config.json itself, see `declared_ids`
            changed[key] = {str(new[_number(token_id)]): token for token_id, token in value.items()}
        elif isinstance(value, dict):
            changed[key] = renumbered_ids(value, new, nested=True)
    return changed


def declared_ids(tokenizer_config: Mapping[str, Any]) -> set[int]:
    """The ids of tokenizer_config.json's added tokens. Raises `BundleError`."""
    found = tokenizer_config.get("added_tokens_decoder") or {}
    if not isinstance(found, dict):
        raise BundleError(f"tokenizer_config.json has added_tokens_decoder {shown(found)}, which must be an object")
    return {_number(token_id) for token_id in found}


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise BundleError(f"tokenizer_config.json has an added token with the id {shown(text)}") from None


def _left(key: str, value: Any, new: Mapping[int, int]) -> list[Any]:
    """Ids, or lists of ids that forbid a run of tokens, without those that are not there."""
    try:
        if key == "bad_words_ids":
            return [[new[one] for one in run] for run in value if all(one in new for one in run)]
        return [new[one] for one in value if one in new]
    except TypeError:
        raise BundleError(f"{key} is {shown(value)}, which must be a list of token ids") from None
