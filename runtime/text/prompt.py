"""A prompt (text, token ids or chat messages) → token ids."""

from __future__ import annotations

from ..api.prompt import Prompt, PromptContent
from ..errors import ContextLengthError, InvalidRequestError
from .tokenizer import Tokenizer


def build_prompt(tokenizer: Tokenizer, prompt: Prompt, max_tokens: int | None = None) -> tuple[int, ...]:
    """Token ids of a prompt: text, a list of token ids, a list of chat messages, or a `Conversation`.

    With `max_tokens`, what cannot have so few tokens is refused before it is read, rendered or tokenised; the result
    may still be longer. Raises `InvalidRequestError` if the prompt is empty, mixes these kinds, or has a message that
    the chat template cannot take, `ContextLengthError` if it is too long.
    """
    if max_tokens is not None and isinstance(prompt, list | tuple) and len(prompt) > max_tokens:
        # Each item is a token at least. It is asked before the items are checked one by one.
        raise _too_long(f"{len(prompt)} token ids or messages", max_tokens)
    content = PromptContent.read(prompt)
    # A text that certainly has too many tokens is refused first: tokenising it would take seconds.
    longest = tokenizer.max_token_bytes if max_tokens is not None else None
    max_bytes = None if longest is None or max_tokens is None else longest * max_tokens
    if content.text is not None:
        if max_bytes is not None and (size := len(content.text.encode())) > max_bytes:
            raise _too_long(f"a text of {size} bytes, which is more than {max_tokens} tokens", max_tokens)
        token_ids = tuple(tokenizer.encode(content.text))
    elif (chat := content.conversation) is not None:
        found = tokenizer.encode_chat(
            chat.messages, max_bytes, tools=chat.tools, continue_final_message=chat.continue_final_message
        )
        token_ids = tuple(found)
    else:
        token_ids = content.token_ids or ()
    if not token_ids:
        raise InvalidRequestError("the prompt is empty; it needs at least one token", field="prompt")
    return token_ids


def _too_long(what: str, max_tokens: int | None) -> ContextLengthError:
    return ContextLengthError(
        f"the prompt has {what}; the context holds {max_tokens} with at least one for the answer; shorten it",
        field="prompt",
    )
