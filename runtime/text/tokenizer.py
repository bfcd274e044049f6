"""Text ↔ token ids: encoding, conversations, and incremental decoding (UTF-8-safe)."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from ..api.prompt import Message
from ..errors import BundleError, ContextLengthError, InvalidRequestError, NotFoundError, shown
from ..model.encoders import TEMPLATE, processor_template
from .incremental import IncrementalDecoder
from .marks import ControlTokens, Marks, filled, unused_characters
from .places import Placed, Placeholders, placed
from .template import ChatTemplate
from .token_bytes import bytes_of

ROLES = ("system", "user", "assistant", "tool")


class Tokenizer:
    """A model's tokenizer.json and chat template. Safe to share between threads."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        template: ChatTemplate | None,
        eos_token_id: int | None = None,
        config: Mapping[str, Any] | None = None,
        control: Collection[str] = (),
    ) -> None:
        """`config`: what tokenizer_config.json holds. `control`: control tokens beside the special ones."""
        self._tokenizer, self._config = tokenizer, dict(config or {})
        self._template = template
        self.eos_token_id = eos_token_id  # of the files' eos_token
        added = tokenizer.get_added_tokens_decoder()
        # Token ids that are left out of an answer's text, with their own text.
        self.special_tokens = {token_id: token.content for token_id, token in added.items() if token.special}
        names = {
            t.content for t in added.values() if t.special or (template is not None and template.mentions(t.content))
        }.union(control)
        # What a message's content must not be able to write: its tokens are commands to the model.
        self._control = ControlTokens(names)

    @classmethod
    def from_dir(cls, path: Path | str, control: Collection[str] = ()) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and the chat template of a model or bundle directory. `control`: see
        `__init__`.

        Truncation and padding that tokenizer.json may hold are the settings of a program that used it once: they are
        dropped. Raises `NotFoundError` without tokenizer.json, `BundleError` if a file is damaged or the two disagree.
        """
        path = Path(path)
        if not (path / "tokenizer.json").is_file():
            raise NotFoundError(
                f"'{path / 'tokenizer.json'}' does not exist; pull or export the model again (a pull makes it of tokenizer.model)"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            config = path / "tokenizer_config.json"
            values: dict[str, Any] = json.loads(config.read_bytes()) if config.is_file() else {}
            special = {name: _content(values[name]) for name in _SPECIAL_NAMES if values.get(name)}
            _configure(tokenizer, values, special)
            file = path / TEMPLATE
            source = file.read_text() if file.is_file() else processor_template(path)
            source = _default_template(values.get("chat_template")) if source is None else source
            eos = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
            return cls(tokenizer, None if source is None else ChatTemplate(source, special), eos, values, control)
        except BundleError:
            raise
        except Exception as error:  # the tokenizers library raises plain Exception
            raise BundleError(f"the tokenizer of '{path}' is damaged: {error}; pull or export it again") from error

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def check_ids(self, vocab_size: int) -> None:
        """Raises `BundleError` if the tokenizer has ids that a model with so many embeddings does not have."""
        highest = max(self._tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
        if highest[1] >= vocab_size:
            raise BundleError(
                f"the tokenizer gives {shown(highest[0])} the id {highest[1]}, and the model has {vocab_size} embeddings; use "
                "the tokenizer that the model was trained with"
            )

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def template_mentions(self, text: str) -> bool:
        return self._template is not None and self._template.mentions(text)

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

    def to_json(self) -> str:
        """The content of a tokenizer.json."""
        return str(self._tokenizer.to_str())

    def files(self) -> dict[str, str]:
        """Name → content of the files that other programs read this tokenizer from."""
        found = {"tokenizer.json": self.to_json(), "tokenizer_config.json": json.dumps(self._config)}
        return found if self._template is None else found | {TEMPLATE: self._template.source}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        # The same ids as `encode`, which holds the GIL: other threads would stand still while a long text is read.
        ids: list[int] = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; some are only a part of a character. Empty for an unknown id."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self.special_tokens:
            return (token or "").encode()
        return bytes_of(token, self._is_byte_level)

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in json.dumps(json.loads(self._tokenizer.to_str())["decoder"])

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry; None if the vocabulary does not have it."""
        result: int | None = self._tokenizer.token_to_id(token)
        return result

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        continue_final_message: bool = False,
    ) -> str:
        """The conversation as text, in the format that the model was trained on; arguments as in `Conversation`.

        Raises `InvalidRequestError` for an empty conversation, a wrong message, a conversation that the template
        refuses, or a model without a template.
        """
        return self._render(self._shaped(messages, tools), tools, add_generation_prompt, continue_final_message)

    def _shaped(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
        """The messages as the template takes them (see `ChatTemplate.shaped`), checked."""
        if self._template is None:
            raise InvalidRequestError("this model has no chat template; send a text prompt", field="messages")
        if not messages:
            raise InvalidRequestError("the conversation is empty; it needs at least one message", field="messages")
        for message in messages:
            if message.get("role") not in ROLES or not isinstance(message.get("content"), str | list | tuple):
                raise InvalidRequestError(
                    f"a message has a role of {ROLES} and a content, got role {shown(message.get('role'))}",
                    field="messages",
                )
        if tools and not self._template.reads("tools"):
            raise InvalidRequestError("the model's chat template takes no tools; leave them out", field="tools")
        return [self._template.shaped(message) for message in messages]

    def _render(
        self, shaped: Sequence[Message], tools: Sequence[Mapping[str, Any]], prompt: bool, continue_final: bool
    ) -> str:
        assert self._template is not None  # `_shaped` has asked
        return self._template.render(shaped, prompt, tools, continue_final)

    def encode_chat(
        self,
        messages: Sequence[Message],
        max_bytes: int | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        continue_final_message: bool = False,
        placeholders: Collection[str] = (),
        media: Sequence[tuple[str, str]] = (),
    ) -> list[int]:
        """The conversation's token ids, up to where the answer begins. Only the template adds special tokens: a
        control token that a message or a tool spells, such as `<|im_end|>`, is encoded as plain text. `placeholders`: of media,
        which the template writes; `media`: each one's, and what comes in its place, in order. A token that stands in several
        texts, which the template joins, is plain text too.

        Raises what `apply_chat_template` raises, and `ContextLengthError` if the rendered text has more than
        `max_bytes` bytes of UTF-8.
        """
        messages, own, media = self.placed(messages, placeholders, media, tools)
        text, marks = self._marked_chat(
            [*self._shaped(messages, tools), {"tools": list(tools)}], continue_final_message
        )
        if placeholders:
            text = filled(text, marks, {*placeholders, *own}, media)
        if max_bytes is not None and len(text.encode()) > max_bytes:
            raise ContextLengthError(f"the conversation has more than {max_bytes} bytes; shorten it", field="messages")
        return self.encode_rendered(text, marks)

    def placed(
        self,
        messages: Sequence[Message],
        placeholders: Collection[str],
        media: Placeholders,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Placed:
        """See `places.placed`."""
        has_place = self._template.has_place if self._template is not None else lambda _kind, _placeholders: False
        return placed(messages, placeholders, media, has_place, tools)

    def _marked_chat(self, both: Sequence[Message], continue_final_message: bool) -> tuple[str, Marks | None]:
        """Shaped messages, with the tools in the last place, as text, with marks where they spell a control token, also one
        that stands in several of their texts, which the template joins."""

        def render(found: Sequence[Message]) -> str:
            return self._render(found[:-1], found[-1]["tools"], True, continue_final_message)

        marked, marks = self.mark_control_tokens(both)
        text = render(marked)
        if self._control.may_join(both):
            own = marks or unused_characters(both)
            parted = render(self._control.parted(marked, own[0]))
            if self._control.written(parted, own) != self._control.written(text, own):
                return parted, own
        return text, marks

    def mark_control_tokens(self, messages: Sequence[Message]) -> tuple[Sequence[Message], Marks | None]:
        """The messages with marks around the control tokens that their texts spell, and the marks; the same messages
        and None if there are no such."""
        return self._control.mark(messages)

    def encode_rendered(self, text: str, marks: Marks | None) -> list[int]:
        """Token ids of a rendered conversation, or a part of it; what stands between marks is plain text."""
        return self.encode(text, add_special_tokens=False) if marks is None else self._encode_marked(text, *marks)

    def _encode_marked(self, text: str, start: str, end: str) -> list[int]:
        """Token ids of a rendered conversation in which control tokens between `start` and `end` are plain text. A mark
        without its partner, which a template may leave, only divides the text."""
        ids: list[int] = []
        pieces = re.split(f"{start}({self._control.pattern.pattern}){end}|[{start}{end}]", text)
        for index, piece in enumerate(pieces):
            if piece:
                ids += self._encode_inside(piece, is_plain=index % 2 == 1, is_first=not ids)
        return ids

    def _encode_inside(self, piece: str, *, is_plain: bool, is_first: bool) -> list[int]:
        """Token ids of a piece within a text. It is encoded after a line break, whose ids are then removed: at the start
        of a text some tokenizers add a space."""
        encoder = self._plain if is_plain else self._tokenizer
        if is_first:
            found: list[int] = encoder.encode(piece, add_special_tokens=False).ids
        else:
            line, both = (encoder.encode(t, add_special_tokens=False).ids for t in ("\n", "\n" + piece))
            found = (
                both[len(line) :] if both[: len(line)] == line else encoder.encode(piece, add_special_tokens=False).ids
            )
        if is_plain and self._tokenizer.token_to_id(piece) in found:  # the vocabulary itself has it as a piece
            return [token_id for letter in piece for token_id in encoder.encode(letter, add_special_tokens=False).ids]
        return found

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same vocabulary without added tokens: it has no other way to write one than in pieces."""
        state = json.loads(self._tokenizer.to_str())
        return tokenizers.Tokenizer.from_str(json.dumps(state | {"added_tokens": [], "post_processor": None}))

    def stream(self, prompt: Sequence[int] = ()) -> IncrementalDecoder:
        """A decoder of the tokens that follow `prompt`."""
        return IncrementalDecoder(self, prompt)


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


_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _configure(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Apply those settings of tokenizer_config.json that change token ids, as transformers does. Whether a text begins
    with a special token, and with a space, is tokenizer.json's to say. Raises `BundleError` if the two disagree on ids."""
    if config.get("split_special_tokens"):
        tokenizer.encode_special_tokens = True
    declared = {int(token_id): token for token_id, token in config.get("added_tokens_decoder", {}).items()}
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    for token_id, token in sorted(declared.items()):
        tokenizer.add_tokens([tokenizers.AddedToken(token["content"], **{f: token[f] for f in flags if f in token})])
        if tokenizer.token_to_id(token["content"]) != token_id:
            raise BundleError(
                f"tokenizer_config.json gives '{token['content']}' the id {token_id}, tokenizer.json "
                f"{tokenizer.token_to_id(token['content'])}; save the tokenizer again"
            )
    added = tokenizer.get_added_tokens_decoder()
    for content in special.values():
        found = tokenizer.token_to_id(content)
        if found is not None and (found not in added or not added[found].special):
            tokenizer.add_special_tokens([tokenizers.AddedToken(content, special=True, normalized=False)])


def _default_template(value: Any) -> str | None:
    """The template of tokenizer_config.json: text, or a list of named ones, of which the default is for chat."""
    if isinstance(value, list):
        value = {item["name"]: item["template"] for item in value}
    return value.get("default") if isinstance(value, dict) else value


def _content(value: Any) -> str:
    return value["content"] if isinstance(value, dict) else str(value)
