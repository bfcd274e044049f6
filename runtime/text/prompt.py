"""A prompt (text, token ids or chat messages) → token ids, and the rows that are embedded in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ..api.embedded import EmbeddedSpan, Spans
from ..api.prompt import Conversation, Prompt, PromptContent
from ..errors import ContextLengthError, InvalidRequestError, UnavailableError
from .media import F32, MediaFile, MediaReader, Medium, NoMedia
from .tokenizer import Tokenizer

_TEXT_ONLY = NoMedia("this is no place for media; send text")


@dataclass(frozen=True, slots=True)
class BuiltPrompt:
    """`media`: in the order of their placeholders among the token ids."""

    token_ids: tuple[int, ...]
    media: Sequence[Medium] = ()

    def spans(
        self,
        salt: bytes,
        encoded: dict[bytes, Sequence[F32]] | None = None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Spans:
        """The rows of the media, encoded (see `Medium.encode`). `encoded`: by digest, those of the request so far. `is_wanted`
        is asked before each; raises `UnavailableError` if nobody waits for them any more."""
        encoded = {} if encoded is None else encoded
        found: list[EmbeddedSpan] = []
        places = iter(_runs(self.token_ids, {medium.token_id for medium in self.media}, self.media))
        for medium in self.media:
            if not is_wanted():
                raise UnavailableError("the request was cancelled before its media were encoded")
            if medium.digest not in encoded:
                encoded[medium.digest] = medium.encode(salt)
            for index, rows in enumerate(encoded[medium.digest]):
                found.append(EmbeddedSpan(next(places), rows, medium.digest + index.to_bytes(4, "little")))
        return tuple(found)


def build_prompt(tokenizer: Tokenizer, prompt: Prompt, max_tokens: int | None = None) -> tuple[int, ...]:
    """Token ids of a prompt: text, a list of token ids, a list of chat messages, or a `Conversation`.

    With `max_tokens`, what cannot have so few tokens is refused before it is read, rendered or tokenised; the result
    may still be longer. Raises `InvalidRequestError` if the prompt is empty, mixes these kinds, has a message that
    the chat template cannot take, or anything but text, `ContextLengthError` if it is too long.
    """
    return read_prompt(tokenizer, prompt, max_tokens).token_ids


def read_prompt(
    tokenizer: Tokenizer, prompt: Prompt, max_tokens: int | None = None, media: MediaReader = _TEXT_ONLY
) -> BuiltPrompt:
    """`build_prompt` of a prompt that may hold what `media` reads. A prompt with media that is too long is refused before they
    are encoded. Raises what `MediaReader.read` raises, too."""
    [built] = read_prompts(tokenizer, [prompt], max_tokens, media)
    return built


def read_prompts(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], max_tokens: int | None = None, media: MediaReader = _TEXT_ONLY
) -> list[BuiltPrompt]:
    """`read_prompt` of all prompts of a request. Limits of media are those of a request: of all prompts together."""
    contents = []
    for prompt in prompts:
        if max_tokens is not None and isinstance(prompt, list | tuple) and len(prompt) > max_tokens:
            # Each item is a token at least. It is asked before the items are checked one by one.
            raise _too_long(f"{len(prompt)} token ids or messages", max_tokens)
        contents.append(PromptContent.read(prompt))
    files = [_files(content) for content in contents]
    read = iter(media.read([file for own in files for file in own]))
    return [
        _built(tokenizer, content, max_tokens, media, list(islice(read, len(own))))
        for content, own in zip(contents, files)
    ]


def _built(
    tokenizer: Tokenizer, content: PromptContent, max_tokens: int | None, media: MediaReader, read: Sequence[Medium]
) -> BuiltPrompt:
    # A text that certainly has too many tokens is refused first: tokenising it would take seconds.
    longest = tokenizer.max_token_bytes if max_tokens is not None else None
    max_bytes = None if longest is None or max_tokens is None else longest * max_tokens
    if content.text is not None:
        if max_bytes is not None and (size := len(content.text.encode())) > max_bytes:
            raise _too_long(f"a text of {size} bytes, which is more than {max_tokens} tokens", max_tokens)
        token_ids = tuple(tokenizer.encode(content.text))
    elif (chat := content.conversation) is not None:
        token_ids = _encode_chat(tokenizer, chat, max_bytes, media, read)
        if read and max_tokens is not None and len(token_ids) > max_tokens:
            raise _too_long(f"{len(token_ids)} tokens with its media", max_tokens)
    else:
        token_ids = content.token_ids or ()
    if not token_ids:
        raise InvalidRequestError("the prompt is empty; it needs at least one token", field="prompt")
    return BuiltPrompt(token_ids, read)


def _files(content: PromptContent) -> list[MediaFile]:
    return [] if content.conversation is None else [MediaFile(*part) for part in content.conversation.media]


def _encode_chat(
    tokenizer: Tokenizer, chat: Conversation, max_bytes: int | None, media: MediaReader, read: Sequence[Medium]
) -> tuple[int, ...]:
    found = tuple(
        tokenizer.encode_chat(
            chat.messages,
            max_bytes,
            tools=chat.tools,
            continue_final_message=chat.continue_final_message,
            placeholders=media.placeholders,
            media=[(medium.token, medium.text) for medium in read],
        )
    )
    if media.placeholders:
        _runs(found, set(media.placeholders.values()), read)  # which is asked before they are encoded
    return found


def _runs(token_ids: tuple[int, ...], placeholders: Collection[int], media: Sequence[Medium]) -> list[int]:
    """Where each run of placeholders begins. Raises `InvalidRequestError` if there are others than those of the media: the
    tokenizer has made something else of their texts."""
    ids = np.array(token_ids, np.int64)
    at = np.flatnonzero(np.isin(ids, list(placeholders)))
    runs = [(medium.token_id, length) for medium in media for length in medium.runs]
    lengths = [length for _, length in runs]
    starts = np.cumsum([0, *lengths])[:-1]
    whole = len(at) == sum(lengths) and all(
        at[start + length - 1] - at[start] == length - 1 and (ids[at[start : start + length]] == token_id).all()
        for start, (token_id, length) in zip(starts.tolist(), runs)
    )
    if not whole:
        raise InvalidRequestError(
            f"the prompt has {len(at)} placeholders, and its media have {sum(lengths)} rows; the model's tokenizer or chat "
            "template does not fit its encoder",
            field="messages.content",
        )
    return [int(at[start]) for start in starts]


def _too_long(what: str, max_tokens: int | None) -> ContextLengthError:
    return ContextLengthError(
        f"the prompt has {what}; the context holds {max_tokens} with at least one for the answer; shorten it",
        field="prompt",
    )
