"""`SamplingParams`: how to choose tokens and when to end. The table of its fields is the only list of them.

Each line of the table states a field's type, default, rule and help. The check at construction, the conversion to and
from protos, the client's keywords and the options of the command line are made from it. A new parameter is a line
here and a field of the same name in `proto/motet/v1/inference.proto`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import InvalidRequestError
from .limits import (
    MAX_CHOICES,
    MAX_LOGIT_BIASES,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_LOGPROBS,
    MAX_SPECULATIVE_TOKENS,
    MAX_STOP_BYTES,
    MAX_STOPS,
)
from .rules import Biases, Flag, Integer, Number, Rule, Strings, TokenIds


def _field(default: Any, rule: Rule, help: str) -> Any:
    """A line of the table. None is an allowed value if it is the default."""
    metadata = {"rule": rule, "help": help}
    return (
        field(default_factory=dict, metadata=metadata) if default == {} else field(default=default, metadata=metadata)
    )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to end. The defaults sample from the mixed distribution unchanged.

    Truncation rules apply to the tempered distribution, in the order top-k, top-p, min-p, typical-p.
    Log-probabilities are those of the mixed distribution before penalties, temperature and truncation. Drafts change
    the speed of an answer only; `speculative_tokens` 0 turns them off, None uses the engine's default. Raises
    `InvalidRequestError`, naming the field.
    """

    # fmt: off
    max_tokens: int | None = _field(None, Integer(1), "Most tokens of the answer; default: up to the end of the context.")
    min_tokens: int = _field(0, Integer(), "Before this many tokens, no stop token or stop string ends the answer.")
    temperature: float = _field(1.0, Number(0, 100), "Divides the logits; 0 is greedy.")
    top_k: int = _field(0, Integer(), "Draw from the k most probable tokens; 0 is off.")
    top_p: float = _field(1.0, Number(0, 1, is_above=True), "Draw from the best tokens that sum to this; 1 is off.")
    min_p: float = _field(0.0, Number(0, 1), "Drop tokens below this share of the highest probability; 0 is off.")
    typical_p: float = _field(1.0, Number(0, 1, is_above=True), "Draw from the typical tokens that sum to this; 1 is off.")
    repetition_penalty: float = _field(1.0, Number(0.01, 100), "Penalises tokens of prompt and answer (CTRL); 1 is off.")
    presence_penalty: float = _field(0.0, Number(), "Subtracted from the logit of every token in the answer.")
    frequency_penalty: float = _field(0.0, Number(), "Subtracted from a token's logit per occurrence in the answer.")
    logit_bias: Mapping[int, float] = _field({}, Biases(MAX_LOGIT_BIASES), "Token id → number added to its logit.")
    seed: int | None = _field(None, Integer(0, 2**64 - 1), "Of the draws; default: random, reported with the answer.")
    stop: tuple[str, ...] = _field((), Strings("stop strings", MAX_STOPS, MAX_STOP_BYTES), "Text that ends the answer.")
    stop_token_ids: tuple[int, ...] = _field((), TokenIds("stop token ids", MAX_STOPS), "Token id that ends the answer.")
    ignore_eos: bool = _field(False, Flag(), "Go on after an end-of-sequence token.")
    include_stop_str_in_output: bool = _field(False, Flag(), "The text ends with the stop string, or the stop token's text.")
    skip_special_tokens: bool = _field(True, Flag(), "Special tokens are no part of the text.")
    n: int = _field(1, Integer(1, MAX_CHOICES), "Choices: how many answers to the prompt.")
    logprobs: int | None = _field(None, Integer(0, MAX_LOGPROBS), "Report log-probabilities: chosen token and k best.")
    prompt_logprobs: int | None = _field(None, Integer(0, MAX_LOGPROBS), "The same of the prompt's tokens, from the second on.")
    logprob_token_ids: tuple[int, ...] = _field((), TokenIds("token ids", MAX_LOGPROB_TOKEN_IDS), "Report this token id's, too.")
    speculative_tokens: int | None = _field(None, Integer(0, MAX_SPECULATIVE_TOKENS), "Most tokens per draft: speed only.")
    # fmt: on

    def __post_init__(self) -> None:
        for name, rule in RULES.items():
            value = getattr(self, name)
            if value is not None or DEFAULTS[name] is not None:
                object.__setattr__(self, name, rule.check(name, value))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}", field="min_tokens"
            )


RULES: Mapping[str, Rule] = {item.name: item.metadata["rule"] for item in fields(SamplingParams)}
HELP: Mapping[str, str] = {item.name: item.metadata["help"] for item in fields(SamplingParams)}
DEFAULTS: Mapping[str, Any] = {
    item.name: item.default_factory() if callable(item.default_factory) else item.default
    for item in fields(SamplingParams)
}


def check_names(names: Iterable[str], other: Iterable[str] = ()) -> None:
    """Raises `InvalidRequestError` for a name that is neither a sampling field nor one of `other`."""
    for name in names:
        if name not in RULES and name not in other:
            raise InvalidRequestError(f"unknown option '{name}'; known are {sorted((*other, *RULES))}", field=name)
