"""Token ids → text as they are drawn, never half a character."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class IncrementalDecoder:
    """Token ids in, text out, never half a character.

    It decodes a short window: the tokens since the last but one clean cut, less the text that is already out. A cut is
    clean if the window does not end in U+FFFD, which the decoder writes for an unfinished character. The texts of all
    pushes and of the flush, joined, are the text of prompt and tokens less that of the prompt: the window begins with
    the prompt's last tokens, because some decoders drop the first space of a text.
    """

    # A longer run of unfinished bytes is no character: let it out instead of waiting for ever.
    _LONGEST_WAIT = 64
    _PROMPT_TOKENS = 8  # of the prompt's end: more than a character has bytes

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = list(prompt[-self._PROMPT_TOKENS :])
        # First token of the window. It is before the new tokens: the first token of a text may decode differently.
        self._prefix = 0
        self._read = len(self._ids)  # number of tokens whose text is out
        # A character that the prompt left unfinished comes out with the answer's first tokens, which finish it.
        while self._read and tokenizer.decode(self._ids[: self._read]).endswith(REPLACEMENT):
            self._read -= 1

    def push(self, token_ids: Iterable[int]) -> str:
        """The complete characters that these tokens add. An unfinished character waits for the next push."""
        text = ""
        for token_id in token_ids:
            self._ids.append(token_id)
            text += self._emit(final=False)
        return text

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
