"""A prompt (text, token ids or chat messages) → token ids."""

from __future__ import annotations

from ..api.prompt import Prompt, PromptContent
from ..errors import InvalidRequestError
from .tokenizer import Tokenizer


def build_prompt(tokenizer: Tokenizer, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt: text, a list of token ids, or a list of chat messages ({"role", "content"}).

    Raises `InvalidRequestError` if it is empty, mixes these kinds, or has a message that the chat template cannot take.
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
