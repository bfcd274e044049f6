"""How a document of any length is summarised: pieces, their summaries, summaries of these, until there is one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import ConfigError
from .documents import split_document
from .prompt import build_prompt
from .tokenizer import Tokenizer

INSTRUCTION = "Summarise the following text in a few sentences.\n\n"
SUMMARY_TOKENS = 96  # most tokens of a summary, where the context allows it
CHUNK_TOKENS = 1024
_SEPARATOR = "\n\n"  # between summaries that are summarised together
_JOINT_TOKENS = 4  # by which a text in its prompt may have more tokens than alone


@dataclass(frozen=True, slots=True)
class SummariseParams:
    """Settings of a job. Lengths are in tokens; None is the default, or what the model's context allows if that is
    less (see `fitted`). Raises `ConfigError`."""

    instruction: str = INSTRUCTION
    max_summary_tokens: int | None = None  # default: SUMMARY_TOKENS
    chunk_tokens: int | None = None  # default: CHUNK_TOKENS
    temperature: float = 0.0
    repetition_penalty: float = 1.05
    seed: int = 0
    speculative_tokens: int = 8  # most per draft; summaries copy from their source. 0: no drafts
    concurrency: int | None = None  # records in flight, at most the engine's max_waiting; None: its max_num_seqs
    abstain_below: float | None = None  # mark summaries with less confidence; the bundle must be calibrated
    drafts: int = 0  # each summary is the one of so many that agrees most with the others; 0: no drafts

    def __post_init__(self) -> None:
        for name in ("max_summary_tokens", "chunk_tokens", "concurrency"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
        if not isinstance(self.drafts, int) or isinstance(self.drafts, bool) or self.drafts < 0 or self.drafts == 1:
            raise ConfigError(f"drafts must be 0 (none) or at least 2, got {self.drafts!r}")
        if self.abstain_below is not None and not 0 <= self.abstain_below <= 1:
            raise ConfigError(f"abstain_below must be in 0…1, got {self.abstain_below!r}")

    def fitted(self, tokenizer: Tokenizer, max_model_len: int) -> SummariseParams:
        """These settings with the lengths that are used in a context of `max_model_len` positions.

        Instruction, chunk and summary fit the context together, and two summaries fit a chunk: so each round of a
        long document has at most half the texts of the one before, rounded up. Raises `ConfigError` if the lengths
        given cannot meet that.
        """
        overhead = len(summary_prompt(tokenizer, self.instruction, "x")) + _JOINT_TOKENS
        separator = len(tokenizer.encode(_SEPARATOR, add_special_tokens=False)) + _JOINT_TOKENS
        room = max_model_len - overhead  # of a chunk and its summary
        most = (room - separator) // 3
        if most < 1:
            raise ConfigError(
                f"the instruction and the chat template have {overhead} tokens; the context of {max_model_len} "
                "must hold two summaries and their summary too; shorten the instruction"
            )
        summary = min(SUMMARY_TOKENS, most) if self.max_summary_tokens is None else self.max_summary_tokens
        if self.max_summary_tokens is None and self.chunk_tokens is not None:
            summary = max(1, min(summary, (self.chunk_tokens - separator) // 2, room - self.chunk_tokens))
        if summary > most:
            raise ConfigError(
                f"max_summary_tokens must be at most {most} in a context of {max_model_len}, got {summary}"
            )
        least, longest = 2 * summary + separator, room - summary
        chunk = max(least, min(CHUNK_TOKENS, longest)) if self.chunk_tokens is None else self.chunk_tokens
        if not least <= chunk <= longest:
            raise ConfigError(
                f"chunk_tokens must be in {least}…{longest} (two summaries of {summary} tokens fit a chunk, "
                f"a chunk and its summary the context of {max_model_len}), got {chunk}"
            )
        return replace(self, max_summary_tokens=summary, chunk_tokens=chunk)


def joined(tokenizer: Tokenizer, params: SummariseParams, summaries: list[str]) -> list[str]:
    """Join neighbours, as many as fit a chunk, and never fewer than two: so the number of texts falls. A summary whose
    text has more tokens than were drawn (it ends in half a character) is cut to `max_summary_tokens`, so two fit."""
    assert params.max_summary_tokens is not None
    assert params.chunk_tokens is not None
    groups: list[list[str]] = []
    for summary in summaries:
        summary = split_document(tokenizer, summary, params.max_summary_tokens)[0]
        wider = _SEPARATOR.join([*groups[-1], summary]) if groups else ""
        if groups and (
            len(groups[-1]) == 1 or len(tokenizer.encode(wider, add_special_tokens=False)) <= params.chunk_tokens
        ):
            groups[-1].append(summary)
        else:
            groups.append([summary])
    return [_SEPARATOR.join(group) for group in groups]


def summary_prompt(tokenizer: Tokenizer, instruction: str, text: str) -> tuple[int, ...]:
    content = instruction + text
    return build_prompt(tokenizer, [{"role": "user", "content": content}] if tokenizer.has_chat_template else content)
