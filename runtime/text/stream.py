"""`TextStream`: an answer's tokens → text deltas. Text that may be the start of a stop string is held back."""

from __future__ import annotations

from collections.abc import Mapping

from ..api.sampling import SamplingParams
from .incremental import IncrementalDecoder
from .tokenizer import Tokenizer


def answer_stream(tokenizer: Tokenizer, prompt: tuple[int, ...], params: SamplingParams) -> TextStream:
    """The stream of an answer to `prompt`."""
    special, stop, skip = tokenizer.special_tokens, params.stop, params.skip_special_tokens
    named = any(text in string for string in stop for text in special.values())
    return TextStream(
        tokenizer.stream(prompt),
        stop,
        special if named or not skip else {},
        skip_special_tokens=skip,
        include_stop=params.include_stop_str_in_output,
    )


class TextStream:
    """Feed tokens with `push`. `stopped` is the stop string that ended the text. Without `include_stop` the text ends before it.

    The stop string that is complete first wins; if several end at the same character, the longest. So the cut does not
    depend on how the text is divided into tokens. `special`: token id → its text, which stop strings are compared with,
    and which is not sent with `skip_special_tokens`. With `include_stop` the stop string is part of the text.
    """

    def __init__(
        self,
        decoder: IncrementalDecoder,
        stop: tuple[str, ...],
        special: Mapping[int, str] = {},
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self._decoder = decoder
        self._stop = stop
        self._special = special
        self._skip_special_tokens = skip_special_tokens
        self._include_stop = include_stop
        self._longest = max((len(string) for string in stop), default=0)
        self._held = ""  # the longest end of the text that is the start of a stop string
        self._is_hidden: list[bool] = []  # of each character held
        self.stopped: str | None = None

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """The text that can be sent after this token. If `may_stop` is false, no stop string ends in this token."""
        special = self._special.get(token_id)
        if special is None:
            return self._cut(self._decoder.push([token_id]), may_stop=may_stop)
        text = self._cut(self._decoder.flush(), may_stop=may_stop)  # no character goes on after it
        if self.stopped is not None:
            return text
        return text + self._cut(special, may_stop=may_stop, is_hidden=self._skip_special_tokens)

    def flush(self) -> str:
        """The rest of the text at the end of the answer; empty after a stop string. The rest may complete one."""
        return "" if self.stopped is not None else self._cut(self._decoder.flush(), is_final=True)

    def _cut(self, text: str, *, may_stop: bool = True, is_hidden: bool = False, is_final: bool = False) -> str:
        if not self._stop:
            return text
        seen, self._held = len(self._held), self._held + text
        self._is_hidden += [is_hidden] * len(text)
        if text and may_stop and (match := self._first_match(seen)):
            at, self.stopped = match
            at += len(self.stopped) if self._include_stop else 0
            self._held = self._held[:at]
            return self._send(at)
        return self._send(len(self._held) - (0 if is_final else self._possible_start()))

    def _send(self, count: int) -> str:
        """Take the first characters off the held text; returns those that are not hidden."""
        pairs = zip(self._held[:count], self._is_hidden, strict=False)
        text = "".join(character for character, is_hidden in pairs if not is_hidden)
        self._held, self._is_hidden = self._held[count:], self._is_hidden[count:]
        return text

    def _first_match(self, seen: int) -> tuple[int, str] | None:
        """(start, string) of the stop string that is complete first, among those that end after `seen` characters."""
        best: tuple[int, int, str] | None = None  # end, start, string
        for string in self._stop:
            at = self._held.find(string, max(0, seen - len(string) + 1))
            if at >= 0 and (best is None or (at + len(string), at) < best[:2]):
                best = (at + len(string), at, string)
        return None if best is None else best[1:]

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that is the start of a stop string."""
        for size in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-size:]
            if any(len(string) > size and string.startswith(end) for string in self._stop):
                return size
        return 0
