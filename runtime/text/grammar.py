"""`Grammars`: structures compiled for one tokenizer, and `GrammarMatcher`, which follows one answer. llguidance does the work."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from ..api.structure import Structure, StructureKind
from ..errors import InvalidRequestError, MissingPackageError, shown
from .grammar_trial import Trial
from .tokenizer import Tokenizer

U32 = npt.NDArray[np.uint32]

# One line, as json.dumps writes it: no model can spend its answer on white space, and most of what is between values is forced.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# What one token of an answer may cost. A grammar with more ends its request: it is ambiguous, or written to be slow. All answers
# of a compiled structure share the states of its lexer.
_LIMITS = {"max_items_in_row": 500, "step_max_items": 3000, "step_lexer_fuel": 100_000, "max_lexer_states": 50_000}
_KEPT = 128  # compiled structures
_KEPT_REFUSALS = 1024
_STACK = 16 * 2**20
_STACK_LOCK = Lock()  # the size is of all threads that start
_QUICK_S = 0.05  # what is compiled as fast may be compiled again for an answer whose lexer is full


class GrammarMatcher:
    """Where an answer is in its structure. Token ids are drawn from `mask`, and `accept` is told of each.

    `again` compiles the structure anew, if that is quick: other answers may have filled the lexer that this one shares.
    """

    def __init__(self, matcher: Any, words: int, again: Callable[[], Any] | None = None) -> None:
        self._matcher = matcher
        self._words = words  # of 32 bits, in a mask
        self._again = again
        self._accepted: tuple[Any, int] | None = None  # (what was accepted before, the last token)

    def fork(self) -> GrammarMatcher:
        """An independent copy."""
        copy = GrammarMatcher(self._matcher.deep_copy(), self._words, self._again)
        copy._accepted = self._accepted
        return copy

    def mask(self) -> U32:
        """Bit id % 32 of word id // 32 is 1 for the tokens that may follow; no bit if the grammar has failed."""
        for _ in range(2):
            if not self._matcher.is_error():
                found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._words]
                if not self._matcher.is_error():
                    return found
            if not self._renewed():
                break
        return np.zeros(self._words, np.uint32)

    def accept(self, token_id: int) -> None:
        self._accepted = self._accepted, token_id
        self._matcher.consume_token(token_id)
        if self._matcher.is_error():
            self._renewed()

    def _renewed(self) -> bool:
        """Begin again with a lexer of its own, once. Returns whether that helped."""
        if self._again is None:
            return False
        self._matcher, self._again = self._again(), None
        token_ids, rest = list[int](), self._accepted
        while rest is not None:
            rest, token_id = rest
            token_ids.append(token_id)
        self._matcher.consume_tokens(token_ids[::-1])
        return not self._matcher.is_error()

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
    """Compiles structures and keeps those of late. Safe to share between threads. With `tries_first`, a structure is tried in
    another process before (see `Trial`): for those of clients that are not trusted."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, list(eos_token_ids)
        self._lock, self._trial_lock = Lock(), Lock()
        self._compiled: OrderedDict[tuple[str, Structure], GrammarMatcher] = OrderedDict()  # by tenant
        self._refused: OrderedDict[Structure, str] = OrderedDict()  # why
        self._for_tokenizer: Any = None
        self._trial: Trial | None = None
        self.tries_first = False

    def is_known(self, structure: Structure, tenant: str = "") -> bool:
        """Whether `matcher` need not compile it, or has refused it already."""
        with self._lock:
            return structure in self._refused or (tenant, structure) in self._compiled

    def matcher(self, structure: Structure, tenant: str = "") -> GrammarMatcher:
        """At the beginning of an answer. The first time it takes up to some hundred milliseconds, with `tries_first` up to
        seconds. Raises `InvalidRequestError` for what cannot be compiled, `MissingPackageError`, `UnavailableError`."""
        with self._lock:
            found = self._compiled.get((tenant, structure))
            if found is not None:
                self._compiled.move_to_end((tenant, structure))
                copy = found.fork()
                if copy.mask().any():
                    return copy  # else the answers before have filled its lexer
        self._open()
        if self.tries_first:
            self._try(structure)
        began = time.monotonic()
        compiled = _compile(
            self._for_tokenizer, structure.kind, structure.spec
        )  # not under a lock: others need not wait
        if isinstance(compiled, str):
            raise self._refusal(structure, compiled)
        again = None
        if time.monotonic() - began < _QUICK_S:
            again = lambda: _compile(self._for_tokenizer, structure.kind, structure.spec)  # noqa: E731
        found = GrammarMatcher(compiled, -(-self._vocab_size // 32), again)
        with self._lock:
            self._compiled[tenant, structure] = found
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            return found.fork()

    def close(self) -> None:
        with self._trial_lock:
            if self._trial is not None:
                self._trial.close()

    def _try(self, structure: Structure) -> None:
        """Raises `InvalidRequestError` if another process could not compile it."""
        with self._lock:
            reason = self._refused.get(structure)
        if reason is None:
            with self._trial_lock:
                if self._trial is None:
                    self._trial = Trial(self._tokenizer.to_json(), self._vocab_size, self._eos)
                reason = self._trial.reason_against(structure.kind, structure.spec)
        if reason:
            with self._lock:
                self._refused[structure] = reason
                if len(self._refused) > _KEPT_REFUSALS:
                    self._refused.popitem(last=False)
            raise self._refusal(structure, reason)

    def _refusal(self, structure: Structure, reason: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"the {structure.kind} {shown(structure.spec)} cannot be used: {reason}", field="structure"
        )

    def _open(self) -> None:
        if self._for_tokenizer is not None:
            return
        if not self._eos:
            raise InvalidRequestError(
                "the model has no end-of-sequence token, which structured output needs; leave structure out",
                field="structure",
            )
        try:
            self._for_tokenizer = library_tokenizer(self._tokenizer.to_json(), self._vocab_size, self._eos)
        except ImportError as error:
            raise MissingPackageError(
                f"structured output needs llguidance ({error}); install it with `pip install llguidance`"
            ) from error
        except ValueError as error:
            raise InvalidRequestError(
                f"this model's tokenizer has no structured output ({error}); leave structure out", field="structure"
            ) from error


def library_tokenizer(tokenizer: str, vocab_size: int, eos: list[int]) -> Any:
    """llguidance's form of a tokenizer. Raises `ImportError`, `ValueError`."""
    import llguidance

    return llguidance.LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos)


def try_structure(tokenizer: Any, kind: str, spec: str) -> str:
    """Why a structure cannot be used; empty if it can. It is compiled, and its first token drawn."""
    matcher = _compiled(tokenizer, StructureKind(kind), spec)
    if isinstance(matcher, str):
        return matcher
    mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    matcher.consume_token(int(mask.argmax()))
    if not matcher.is_error() and not matcher.is_stopped():
        matcher.compute_bitmask()
    return _reason(matcher) if matcher.is_error() else ""


def _compile(tokenizer: Any, kind: StructureKind, spec: str) -> Any:
    """llguidance's matcher, or the reason why there is none. It runs in a thread with a stack that is larger than that of the
    process which has tried it: what compiles is recursive, and some systems give threads little."""
    found: list[Any] = []
    with _STACK_LOCK:
        before = threading.stack_size(_STACK)
        try:
            thread = threading.Thread(target=lambda: found.append(_compiled(tokenizer, kind, spec)))
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    return found[0] if found else "the compiler failed"


def _compiled(tokenizer: Any, kind: StructureKind, spec: str) -> Any:
    import llguidance

    make = llguidance.LLMatcher
    try:
        if kind is StructureKind.JSON_SCHEMA or kind is StructureKind.JSON_OBJECT:
            grammar = make.grammar_from_json_schema(spec or '{"type": "object"}', defaults=_JSON)
        elif kind is StructureKind.REGEX:
            grammar = make.grammar_from_regex(spec)
        elif kind is StructureKind.GRAMMAR:
            grammar = make.grammar_from_lark(spec)
        else:  # a terminal: all texts are one state of the lexer, where a rule would have a branch for each
            grammar = make.grammar_from_lark(f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, json.loads(spec)))}")
    except ValueError as error:
        return f"it cannot be read: {error}"
    limits = llguidance.LLParserLimits(verbose_errors=False, **_LIMITS)
    matcher = make(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return _reason(matcher) if matcher.is_error() else matcher


def _reason(matcher: Any) -> str:
    return shown(matcher.get_error().replace("<non-verbose/>", "").strip().splitlines()[0])
