"""`Structure`: the form that an answer must have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ..errors import InvalidRequestError, shown
from .limits import MAX_STRUCTURE_BYTES, MAX_STRUCTURE_CHOICES, MAX_STRUCTURE_DEPTH, MAX_STRUCTURE_RULES
from .rules import Strings, Text

_TEXT = Text(MAX_STRUCTURE_BYTES, min_bytes=1)
_CHOICES = Strings("choices", MAX_STRUCTURE_CHOICES, MAX_STRUCTURE_BYTES)


_RULE = re.compile(r"^\s*[?!]?\w+[^:\n\"/]*:", re.MULTILINE)  # the head of a rule or terminal


class StructureKind(StrEnum):
    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    GRAMMAR = "grammar"
    CHOICE = "choice"


@dataclass(frozen=True, slots=True)
class Structure:
    """The form that an answer must have; only tokens that keep to it are drawn. Make it with one of the class methods.

    JSON is written on one line, with ", " and ": " between its parts. The answer ends when nothing more can follow; where
    more may follow, when the model ends it. `max_tokens` may cut it before. Raises `InvalidRequestError`.
    """

    kind: StructureKind
    spec: str = ""  # a schema or a list of choices is JSON

    def __post_init__(self) -> None:
        if self.kind not in tuple(StructureKind):
            raise InvalidRequestError(
                f"a structure is one of {[str(kind) for kind in StructureKind]}, got {shown(self.kind)}",
                field="structure",
            )
        object.__setattr__(self, "kind", StructureKind(self.kind))
        if self.kind is StructureKind.JSON_OBJECT:
            if self.spec:
                raise InvalidRequestError(
                    "json_object takes nothing more; json_schema takes a schema", field="structure"
                )
            return
        _TEXT.check("structure", self.spec, f"the {self.kind}")
        if self.kind is StructureKind.JSON_SCHEMA and not isinstance(_parsed(self.spec), dict):
            raise InvalidRequestError(f"a JSON schema must be an object, got {shown(self.spec)}", field="structure")
        if self.kind is StructureKind.GRAMMAR and len(_RULE.findall(self.spec)) > MAX_STRUCTURE_RULES:
            raise InvalidRequestError(
                f"a grammar has at most {MAX_STRUCTURE_RULES} rules; use fewer", field="structure"
            )
        if self.kind is StructureKind.CHOICE and not _CHOICES.check("structure", _parsed(self.spec)):
            raise InvalidRequestError("a choice needs at least one text", field="structure")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Structure:
        """JSON that a schema describes (drafts 4 to 2020-12, without `not` and what else no grammar can hold)."""
        return cls(StructureKind.JSON_SCHEMA, schema if isinstance(schema, str) else _written(schema))

    @classmethod
    def json_object(cls) -> Structure:
        """Any JSON object."""
        return cls(StructureKind.JSON_OBJECT)

    @classmethod
    def regex(cls, regex: str) -> Structure:
        """Text that a regular expression matches as a whole (syntax of Rust's regex crate)."""
        return cls(StructureKind.REGEX, regex)

    @classmethod
    def grammar(cls, grammar: str) -> Structure:
        """Text of a context-free grammar in Lark's syntax, as llguidance reads it; its start rule is `start`."""
        return cls(StructureKind.GRAMMAR, grammar)

    @classmethod
    def choice(cls, texts: Iterable[str]) -> Structure:
        """One of some texts."""
        return cls(StructureKind.CHOICE, _written(list(texts)))


def _written(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the structure cannot be written as JSON: {error}", field="structure") from None


def _parsed(text: str) -> Any:
    """JSON of a bounded depth: what reads it further on is not Python, and must not run out of stack."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the structure is not JSON: {error}", field="structure") from None
    level, depth = [found], 0
    while level := [
        child
        for one in level
        if isinstance(one, dict | list)
        for child in (one.values() if isinstance(one, dict) else one)
    ]:
        depth += 1
        if depth > MAX_STRUCTURE_DEPTH:
            raise InvalidRequestError(
                f"the JSON of a structure is nested deeper than {MAX_STRUCTURE_DEPTH} levels; use $defs and $ref",
                field="structure",
            )
    return found
