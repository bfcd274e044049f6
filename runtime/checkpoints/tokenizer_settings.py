"""What the JSON files of a model directory say about a tokenizer that is made of another file than tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ..errors import DataError, UnsupportedModelError, shown
from ..model.files import read_object
from .pieces import around

TOKENIZER_MODEL = "tokenizer.model"  # the file that the tokenizer is made of
REWRITTEN = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
READ_BESIDE = (*REWRITTEN, "chat_template.jinja")
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file. Raises `DataError`."""
    return read_object(path, "fetch it again", DataError) if path.is_file() else {}


@dataclass(frozen=True)
class TokenizerSettings:
    """tokenizer_config.json, special_tokens_map.json, added_tokens.json and the chat template of a model directory."""

    directory: Path
    config: Mapping[str, Any]
    mapped: Mapping[str, Any]
    added_ids: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path) -> TokenizerSettings:
        """Raises `DataError` for a file that is no JSON object."""
        return cls(directory, *(read_settings(directory / name) for name in REWRITTEN))

    @property
    def template(self) -> str:
        """The chat template as text to search in."""
        file = self.directory / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="replace")
        return json.dumps(self.config.get("chat_template"), ensure_ascii=False)

    def check_class(self, classes: Sequence[str]) -> None:
        """Raises `UnsupportedModelError` if another class of transformers cuts the text."""
        given = self.config.get("tokenizer_class")
        if given is not None and given not in classes:
            raise UnsupportedModelError(
                f"'{self.directory}' has tokenizer_class={shown(given)}; with a {TOKENIZER_MODEL} alone, "
                f"{', '.join(classes)} are read; save a tokenizer.json beside it"
            )

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            raise DataError(f"'{self.directory}' has {name}={shown(value)}; it must be true or false")
        return default if value is None else value

    def special(self, defaults: Mapping[str, str | None]) -> dict[str, str | None]:
        """Names of special tokens → their texts, None where there is none. `defaults`: where no file says."""
        found = dict(defaults)
        for values in (self.mapped, self.config):
            for name in _NAMES:
                if name in values:
                    found[name] = None if values[name] is None else self._text(name, values[name])
        return found

    def added(self, pieces: Sequence[str]) -> dict[int, AddedToken]:
        """Token id → added token. An id that is one of `pieces` must have the same text."""
        found: dict[int, AddedToken] = {}
        for token, index in self.added_ids.items():
            if type(index) is not int or index < 0 or not token or index in found:
                raise DataError(
                    f"'{self.directory}' has in added_tokens.json {shown(token)} with the id {shown(index)}"
                )
            found[index] = AddedToken(token, normalized=False, special=False)
        declared = self.config.get("added_tokens_decoder", {})
        if not isinstance(declared, dict):
            raise DataError(f"'{self.directory}' has added_tokens_decoder={shown(declared)}; it must be an object")
        for key, value in declared.items():
            index, own = self._declared(key, value)
            if index in found and found[index].content != own.content:
                texts = f"{shown(found[index].content)} and {shown(own.content)}"
                raise DataError(f"'{self.directory}' gives the id {key} to {texts}")
            found[index] = own
        for index, added in found.items():
            if index < len(pieces) and pieces[index] != added.content:
                raise DataError(
                    f"'{self.directory}' gives the id {index} to {shown(added.content)}, and {TOKENIZER_MODEL} to "
                    f"{shown(pieces[index])}"
                )
        return found

    def add(self, tokenizer: Tokenizer, tokens: Mapping[int, AddedToken]) -> None:
        """Give the tokenizer its added tokens. Raises `DataError` for ids with gaps, and texts with two ids."""
        ordered = sorted(tokens.items())
        tokenizer.add_tokens([token for _, token in ordered])  # together: one by one takes the square of their number
        for index, token in ordered:
            found = tokenizer.token_to_id(token.content)
            if found != index:
                raise DataError(
                    f"'{self.directory}' gives {shown(token.content)} the id {index}; the next free one is {found}: ids have "
                    "no gaps, and a text has one id"
                )

    def write(self, tokenizer: Tokenizer, names: Mapping[str, str | None], out: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into the folder `out`. `names`: of `special`. Raises `DataError` for
        special tokens that are no tokens."""
        if self.config.get("extra_special_tokens"):
            raise UnsupportedModelError(
                f"'{self.directory}' has extra_special_tokens={shown(self.config['extra_special_tokens'])}, which is not read; "
                "write them as additional_special_tokens"
            )
        listed = self.config.get("additional_special_tokens", self.mapped.get("additional_special_tokens")) or []
        if not isinstance(listed, list):
            raise DataError(f"'{self.directory}' has additional_special_tokens={shown(listed)}; it must be a list")
        extra = [self._text("additional_special_tokens", token) for token in listed]
        for name, token in [(n, names.get(n)) for n in ("bos_token", "eos_token", "unk_token")] + [
            ("", t) for t in extra
        ]:
            if token is not None and tokenizer.token_to_id(token) is None:
                raise DataError(
                    f"'{self.directory}' names {shown(token)} as {name or 'a special token'}, and it is no token"
                )
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in extra])
        adds = {"bos_token": names.get("bos_token") is not None, "eos_token": False}  # where the files do not say
        bos, eos = ((names.get(n) or "") if self.flag(f"add_{n}", default) else None for n, default in adds.items())
        tokenizer.post_processor = around(self.directory / TOKENIZER_MODEL, tokenizer.get_vocab(), bos, eos)
        tokenizer.save(str(out / "tokenizer.json"))
        kept = ("chat_template", "model_max_length", "split_special_tokens")
        values = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{name: names[name] for name in _NAMES if names.get(name) is not None},
            **({"additional_special_tokens": extra} if extra else {}),
            **{key: self.config[key] for key in kept if self.config.get(key) is not None},
        }
        (out / "tokenizer_config.json").write_text(json.dumps(values, indent=1) + "\n")

    def _text(self, name: str, value: Any) -> str:
        """The content of a token, which is written as text or as an object."""
        content = value.get("content") if isinstance(value, dict) else value
        if not isinstance(content, str) or not content:
            raise DataError(f"'{self.directory}' has {name}={shown(value)}; a token is a text that is not empty")
        return content

    def _declared(self, key: str, value: Any) -> tuple[int, AddedToken]:
        """An entry of added_tokens_decoder."""
        content = self._text("added_tokens_decoder", value)
        flags = {flag: value[flag] for flag in _FLAGS if isinstance(value, dict) and flag in value}
        is_id = key.isascii() and key.isdigit() and len(key) <= 9
        if not is_id or not all(isinstance(flag, bool) for flag in flags.values()):
            raise DataError(f"'{self.directory}' has in added_tokens_decoder {shown({key: value})}")
        # Normalising would only write spaces as "▁", and put a prefix before the token's own text.
        return int(key), AddedToken(content, **{**flags, "normalized": False})
