"""`TextStream`: an answer's tokens → text deltas, with stop strings. What may become a stop string is held back."""

from __future__ import annotations

from .tokenizer import IncrementalDecoder


class TextStream:
    """Feed tokens with `push`; `stopped` names the stop string that ended the text, which is not part of it."""

    def __init__(self, decoder: IncrementalDecoder, stop: tuple[str, ...]) -> None:
        self._decoder = decoder
        self._stop = stop
        self._longest = max((len(string) for string in stop), default=0)
        self._held = ""
        self.stopped: str | None = None

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """The text that may be given out after this token. Without `may_stop` no stop string ends in this token."""
        text = self._decoder.push([token_id])
        return self._cut(text, final=False) if may_stop else text

    def flush(self) -> str:
        """The rest of the text, at the end of the answer."""
        return "" if self.stopped is not None else self._cut(self._decoder.flush(), final=True)

    def _cut(self, text: str, *, final: bool) -> str:
        if not self._stop:
            return text
        self._held += text
        found = [(self._held.find(string), string) for string in self._stop if string in self._held]
        if found:
            at, self.stopped = min(found, key=lambda match: (match[0], -len(match[1])))
            text, self._held = self._held[:at], ""
            return text
        keep = 0 if final else self._possible_start()
        text = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return text

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        for size in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-size:]
            if any(string.startswith(end) for string in self._stop):
                return size
        return 0
