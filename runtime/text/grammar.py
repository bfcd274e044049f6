"""`Grammars`: structures compiled for one tokenizer, and `GrammarMatcher`, which follows one answer. llguidance does the work."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from ..api.structure import Structure, StructureKind
from ..errors import InvalidRequestError, MissingPackageError, shown
from .tokenizer import Tokenizer

U32 = npt.NDArray[np.uint32]

# One line, as json.dumps writes it: no model can spend its answer on white space, and most of what is between values is forced.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# What one token of an answer may cost. A grammar with more ends its request: it is ambiguous, or written to be slow.
_LIMITS = {"max_items_in_row": 500, "step_max_items": 3000, "step_lexer_fuel": 100_000, "max_lexer_states": 50_000}
_KEPT = 128  # compiled structures


class GrammarMatcher:
    """Where an answer is in its structure. Token ids are drawn from `mask`, and `accept` is told of each."""

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher = matcher
        self._words = words  # of 32 bits, in a mask

    def fork(self) -> GrammarMatcher:
        """An independent copy."""
        return GrammarMatcher(self._matcher.deep_copy(), self._words)

    def mask(self) -> U32:
        """Bit id % 32 of word id // 32 is 1 for the tokens that may follow; no bit if the grammar has failed."""
        if not self._matcher.is_error():
            found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._words]
            if not self._matcher.is_error():
                return found
        return np.zeros(self._words, np.uint32)

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)

    @property
    def is_complete(self) -> bool:
        """Whether the structure is whole and nothing more may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def failure(self) -> str:
        """Why no token can follow; empty if the structure is at fault for nothing."""
        return str(self._matcher.get_error()).strip().split("\n")[0] if self._matcher.is_error() else ""

    def forced(self) -> list[int]:
        """The tokens that must follow, as the tokenizer cuts their text. Other cuts of the same text may follow too."""
        return list(self._matcher.compute_ff_tokens())

    def num_valid(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens may follow, one after the other."""
        return int(self._matcher.validate_tokens(list(token_ids)))


class Grammars:
    """Compiles structures and keeps those of late. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, list(eos_token_ids)
        self._lock = Lock()
        self._compiled: OrderedDict[Structure, GrammarMatcher] = OrderedDict()
        self._for_tokenizer: Any = None

    def matcher(self, structure: Structure) -> GrammarMatcher:
        """At the beginning of an answer. The first time it takes up to some hundred milliseconds. Raises
        `InvalidRequestError` for what cannot be compiled, `MissingPackageError`."""
        with self._lock:
            found = self._compiled.get(structure)
            if found is not None:
                self._compiled.move_to_end(structure)
                return found.fork()
        library = self._open()
        found = self._compile(library, structure)  # not under the lock: those who have one need not wait
        with self._lock:
            self._compiled[structure] = found
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            return found.fork()

    def _open(self) -> Any:
        try:
            import llguidance
        except ImportError as error:
            raise MissingPackageError(
                f"structured output needs llguidance ({error}); install it with `pip install llguidance`"
            ) from error
        if self._for_tokenizer is None:
            if not self._eos:
                raise InvalidRequestError(
                    "the model has no end-of-sequence token, which structured output needs; leave structure out",
                    field="structure",
                )
            try:
                self._for_tokenizer = llguidance.LLTokenizer(
                    self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=self._eos
                )
            except ValueError as error:
                raise InvalidRequestError(
                    f"this model's tokenizer has no structured output ({error}); leave structure out", field="structure"
                ) from error
        return llguidance

    def _compile(self, library: Any, structure: Structure) -> GrammarMatcher:
        make, kind, spec = library.LLMatcher, structure.kind, structure.spec
        try:
            if kind is StructureKind.JSON_SCHEMA or kind is StructureKind.JSON_OBJECT:
                grammar = make.grammar_from_json_schema(spec or '{"type": "object"}', defaults=_JSON)
            elif kind is StructureKind.REGEX:
                grammar = make.grammar_from_regex(spec)
            elif kind is StructureKind.GRAMMAR:
                grammar = make.grammar_from_lark(spec)
            else:  # a terminal: all texts are one state of the lexer, where a rule would have a branch for each
                grammar = make.grammar_from_lark(
                    f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, json.loads(spec)))}"
                )
        except ValueError as error:
            raise InvalidRequestError(f"the {kind} {shown(spec)} cannot be read: {error}", field="structure") from None
        limits = library.LLParserLimits(verbose_errors=False, **_LIMITS)
        matcher = make(self._for_tokenizer, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            reason = matcher.get_error().replace("<non-verbose/>", "").strip()
            raise InvalidRequestError(
                f"the {kind} {shown(spec)} cannot be used: {shown(reason.splitlines()[0])}", field="structure"
            )
        return GrammarMatcher(matcher, -(-self._vocab_size // 32))
