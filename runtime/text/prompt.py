"""A prompt as a person gives it (text, token ids, or a conversation) → token ids."""

from __future__ import annotations

from ..api.prompt import Prompt, PromptContent
from ..errors import InvalidRequestError
from .tokenizer import Tokenizer


def build_prompt(tokenizer: Tokenizer, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a text, a list of token ids, or a list of chat messages ({"role", "content"}).

    Raises `InvalidRequestError` if it is empty, mixed or none of these.
    """
    content = PromptContent.read(prompt)
    if content.text is not None:
        token_ids = tuple(tokenizer.encode(content.text))
    elif content.messages is not None:
        token_ids = tuple(tokenizer.encode_chat(content.messages))
    else:
        token_ids = content.token_ids or ()
    if not token_ids:
        raise InvalidRequestError("the prompt is empty; it needs at least one token", field="prompt")
    return token_ids
