"""A prompt (text, token ids or chat messages) → token ids."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InvalidRequestError
from .tokenizer import Message, Tokenizer

Prompt = str | Sequence[int] | Sequence[Message]


def build_prompt(tokenizer: Tokenizer, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt: text, a list of token ids, or a list of chat messages ({"role", "content"}).

    Raises `InvalidRequestError` if it is empty, mixes these kinds, or has a message that the chat template cannot take.
    """
    if isinstance(prompt, str):
        token_ids = tokenizer.encode(prompt)
    elif all(isinstance(item, int) for item in prompt):
        token_ids = [int(item) for item in prompt if isinstance(item, int)]
    else:
        messages = [item for item in prompt if not isinstance(item, int)]
        if len(messages) != len(prompt):
            raise InvalidRequestError("a prompt is text, token ids or messages, not a mixture", field="prompt")
        token_ids = tokenizer.encode_chat(messages)
    if not token_ids:
        raise InvalidRequestError("the prompt is empty; it needs at least one token", field="prompt")
    return tuple(token_ids)
