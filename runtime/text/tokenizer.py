"""Text ↔ token ids: encoding, the model's chat template (sandboxed), and incremental decoding (UTF-8-safe)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..api.prompt import Message
from ..errors import BundleError, InvalidRequestError, NotFoundError, shown

ROLES = ("system", "user", "assistant")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A model's tokenizer.json and chat template. Safe to share between threads."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, chat_template: str | None, special: Mapping[str, str]) -> None:
        self._tokenizer = tokenizer
        self._special = dict(special)
        self._template: jinja2.Template | None = None
        if chat_template is not None:
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            environment.globals["raise_exception"] = _raise_exception
            self._template = environment.from_string(chat_template)

    @classmethod
    def from_dir(cls, path: Path | str) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja of a model or bundle directory.

        Raises `NotFoundError` without tokenizer.json, `BundleError` if a file is damaged.
        """
        path = Path(path)
        if not (path / "tokenizer.json").is_file():
            raise NotFoundError(f"'{path / 'tokenizer.json'}' does not exist; pull or export the model again")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
            config = path / "tokenizer_config.json"
            values: dict[str, Any] = json.loads(config.read_bytes()) if config.is_file() else {}
            file = path / "chat_template.jinja"
            template = file.read_text() if file.is_file() else values.get("chat_template")
            special = {name: _content(values[name]) for name in ("bos_token", "eos_token") if values.get(name)}
            return cls(tokenizer, template, special)
        except Exception as error:  # the tokenizers library raises plain Exception
            raise BundleError(f"the tokenizer of '{path}' is damaged: {error}; pull or export it again") from error

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @cached_property
    def max_token_bytes(self) -> int | None:
        """Most bytes of UTF-8 that one token can stand for; None if there is no bound, because text may be dropped or
        rewritten before it is cut into tokens."""
        state = json.loads(self._tokenizer.to_str())
        added = state["added_tokens"]
        rewritten = _NORMALIZERS.get((state["normalizer"] or {}).get("type"))
        if rewritten is None or not _keeps_bytes(state) or any(token["lstrip"] or token["rstrip"] for token in added):
            return None
        # In a byte-level vocabulary a character is a byte.
        longest = max((len(token) for token in state["model"]["vocab"]), default=0)
        return rewritten * max(longest, *(len(token["content"].encode()) for token in added), 1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        # The same ids as `encode`, which holds the GIL: other threads would stand still while a long text is read.
        ids: list[int] = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry; None if the vocabulary does not have it."""
        result: int | None = self._tokenizer.token_to_id(token)
        return result

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text, in the format that the model was trained on.

        The template comes from the model, never from a request. Raises `InvalidRequestError` for an empty conversation,
        a wrong message, a conversation that the template refuses, or a model without a template.
        """
        if self._template is None:
            raise InvalidRequestError("this model has no chat template; send a text prompt", field="messages")
        if not messages:
            raise InvalidRequestError("the conversation is empty; it needs at least one message", field="messages")
        for message in messages:
            if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
                raise InvalidRequestError(
                    f"a message has a role of {ROLES} and a content, got role {shown(message.get('role'))}",
                    field="messages",
                )
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **{"bos_token": "", "eos_token": "", **self._special},
            )
        except jinja2.TemplateError as error:
            raise InvalidRequestError(
                f"the chat template refuses this conversation: {error}", field="messages"
            ) from error

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The conversation's token ids, up to where the answer begins. Only the template adds special tokens."""
        return self.encode(self.apply_chat_template(messages), add_special_tokens=False)

    def stream(self) -> IncrementalDecoder:
        return IncrementalDecoder(self)


class IncrementalDecoder:
    """Token ids in, text out, never half a character.

    It decodes a short window: the tokens since the last but one clean cut, less the text that is already out. A cut is
    clean if the window does not end in U+FFFD, which the decoder writes for an unfinished character. The texts of all
    pushes and of the flush, joined, are the text of all tokens.
    """

    # A longer run of unfinished bytes is no character: let it out instead of waiting for ever.
    _LONGEST_WAIT = 64

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # First token of the window. It is before the new tokens: the first token of a text may decode differently.
        self._prefix = 0
        self._read = 0  # number of tokens whose text is out

    def push(self, token_ids: Iterable[int]) -> str:
        """The complete characters that these tokens add. An unfinished character waits for the next push."""
        self._ids.extend(token_ids)
        return self._emit(final=False)

    def flush(self) -> str:
        """The rest of the text, with unfinished bytes as U+FFFD."""
        return self._emit(final=True)

    def _emit(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._prefix : self._read])
        window = self._tokenizer.decode(self._ids[self._prefix :])
        unread = len(self._ids) - self._read
        if window.endswith(REPLACEMENT) and not final and unread <= self._LONGEST_WAIT:
            return ""
        if len(window) <= len(before) and not final:
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return window[len(before) :]


# How many times shorter a normaliser can make a text. NFC joins decomposed characters: Unicode bounds it by 3.
_NORMALIZERS = {None: 1, "NFC": 3}


def _keeps_bytes(state: Mapping[str, Any]) -> bool:
    """Whether a serialised tokenizer is byte-level BPE whose pre-tokenizers drop nothing."""
    found = state["pre_tokenizer"] or {}
    steps = found.get("pretokenizers", [found])
    return (
        state["model"]["type"] == "BPE"
        and any(step.get("type") == "ByteLevel" for step in steps)
        and all(
            step.get("type") in ("ByteLevel", "Digits", "Split") and step.get("behavior") != "Removed" for step in steps
        )
    )


def _content(value: Any) -> str:
    return value["content"] if isinstance(value, dict) else str(value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
