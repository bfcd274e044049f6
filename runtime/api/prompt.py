"""A prompt as a caller passes it: text, token ids, or a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

from ..errors import InvalidRequestError, shown
from .limits import MAX_MESSAGES
from .rules import Integer, num_bytes

Message = Mapping[str, str]  # {"role", "content"}
Prompt = str | Sequence[int] | Sequence[Message]
_KEYS = {"role", "content"}
_TOKEN_ID = Integer()


@dataclass(frozen=True, slots=True)
class PromptContent:
    """The content of a prompt: exactly one of the three is not None. That it is not empty, and that ids and roles
    exist, is checked later, by the tokenizer and the model."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None

    @classmethod
    def read(cls, prompt: Prompt) -> PromptContent:
        """Find out which of the three kinds a prompt is. Raises `InvalidRequestError` for any other kind and for a
        mixture."""
        if isinstance(prompt, str):
            if num_bytes(prompt) is None:
                raise InvalidRequestError("the prompt is not valid Unicode text", field="prompt")
            return cls(text=prompt)
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
            raise InvalidRequestError(
                f"a prompt is text, a list of token ids or a list of messages, got {type(prompt).__name__}",
                field="prompt",
            )
        if all(isinstance(item, SupportsIndex) for item in prompt):
            return cls(
                token_ids=tuple(_TOKEN_ID.check("prompt", item, "every token id of a prompt") for item in prompt)
            )
        if len(prompt) > MAX_MESSAGES:
            raise InvalidRequestError(
                f"a conversation has at most {MAX_MESSAGES} messages, got {len(prompt)}", field="messages"
            )
        messages = [item for item in prompt if isinstance(item, Mapping)]
        if len(messages) != len(prompt):
            raise InvalidRequestError("a prompt is text, token ids or messages, not a mixture", field="prompt")
        for message in messages:
            if set(message) != _KEYS or not all(
                isinstance(text, str) and num_bytes(text) is not None for text in message.values()
            ):
                raise InvalidRequestError(
                    f"a message has a role and a content, both text, got {shown(sorted(map(str, message)))}",
                    field="messages",
                )
        return cls(messages=tuple(messages))
