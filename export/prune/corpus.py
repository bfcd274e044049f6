"""The corpus that a vocabulary is trimmed to: text files, read in pieces, and a model's chat template with their first lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ...runtime.errors import InvalidRequestError, NotFoundError
from ...runtime.text.documents import decode_text
from ...runtime.text.tokenizer import Tokenizer

_PIECE = 1 << 20  # bytes that are read at once, up to the end of a line
_MESSAGES = 32  # lines that are rendered as messages


def corpus_texts(paths: Sequence[Path]) -> Iterator[str]:
    """Each file in pieces of whole lines, and each line by itself without its end. Raises `NotFoundError`, `DataError` for a
    file that is not UTF-8."""
    for path in paths:
        try:
            with path.open("rb") as file:
                while lines := file.readlines(_PIECE):
                    text = decode_text(b"".join(lines), f"'{path}'")
                    yield text
                    yield from filter(None, text.splitlines())
        except OSError as error:
            raise NotFoundError(f"the file '{path}' cannot be read: {error.strerror}") from error


def template_texts(tokenizer: Tokenizer, paths: Sequence[Path]) -> Iterator[str]:
    """Conversations as the chat template writes them, with the corpus's first lines as messages; nothing without a template."""
    if not tokenizer.has_chat_template:
        return
    texts = ["Hello"]
    for text in corpus_texts(paths):
        if "\n" not in text:
            texts.append(text)
        if len(texts) > _MESSAGES:
            break
    for text in texts:
        turn = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        for messages in (turn[:1], turn, [*turn, turn[0]], [{"role": "system", "content": text}, *turn]):
            for prompted in (True, False):
                try:
                    yield tokenizer.apply_chat_template(messages, add_generation_prompt=prompted)
                except InvalidRequestError:  # some templates take no system message
                    continue
