"""A SentencePiece `tokenizer.model`: reading the file.

The file is one protobuf message, `ModelProto` of SentencePiece's sentencepiece_model.proto. The fields that say how text is
encoded are described here, in a pool of their own: other packages register the same file under the same name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from ..errors import DataError, UnsupportedModelError, shown
from .pieces import BYTE, BYTES, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

UNIGRAM, BPE = 1, 2
_LIMIT = 16 * 2**20  # bytes; the largest that are published have some 5 MB
_MAX_PIECES = 2**20

# Message → field → number and type. "*": repeated.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "Piece": {"piece": (1, "BYTES"), "score": (2, "FLOAT"), "type": (3, "INT32")},
    "Trainer": {
        "model_type": (3, "INT32"),
        "treat_whitespace_as_suffix": (24, "BOOL"),
        "byte_fallback": (35, "BOOL"),
    },
    "Normalizer": {
        "name": (1, "BYTES"),
        "precompiled_charsmap": (2, "BYTES"),
        "add_dummy_prefix": (3, "BOOL"),
        "remove_extra_whitespaces": (4, "BOOL"),
        "escape_whitespaces": (5, "BOOL"),
    },
    "Model": {
        "pieces": (1, "*Piece"),
        "trainer_spec": (2, "Trainer"),
        "normalizer_spec": (3, "Normalizer"),
        "denormalizer_spec": (5, "Normalizer"),
    },
}
_DEFAULTS = {
    "type": "1",
    "model_type": "1",
    "add_dummy_prefix": "true",
    "remove_extra_whitespaces": "true",
    "escape_whitespaces": "true",
}


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What a tokenizer.model says. `pieces`, `scores`, `types`: of each token id."""

    path: Path
    kind: int  # UNIGRAM or BPE
    pieces: list[str]
    scores: list[float]
    types: list[int]
    byte_fallback: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool

    def of_type(self, *types: int) -> dict[str, float]:
        """The pieces of these types → their scores."""
        return {p: s for p, s, kind in zip(self.pieces, self.scores, self.types) if kind in types}


@cache
def _message_class() -> Any:
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="tokenizer_model.proto", package="tokenizer_model", syntax="proto2")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for label, (number, kind) in fields.items():
            is_repeated, kind = kind.startswith("*"), kind.lstrip("*")
            added = message.field.add(name=label, number=number)
            added.label = field.LABEL_REPEATED if is_repeated else field.LABEL_OPTIONAL
            if kind in _MESSAGES:
                added.type, added.type_name = field.TYPE_MESSAGE, f".tokenizer_model.{kind}"
            else:
                added.type = getattr(field, f"TYPE_{kind}")
            if label in _DEFAULTS:
                added.default_value = _DEFAULTS[label]
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tokenizer_model.Model"))


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Raises `DataError` for a file that is damaged, and `UnsupportedModelError` for a kind of model or a setting that
    tokenizer.json cannot describe exactly."""
    size = path.stat().st_size
    if size > _LIMIT:
        raise DataError(f"'{path}' has {size} bytes; a SentencePiece model has at most {_LIMIT}")
    try:
        found = _message_class().FromString(path.read_bytes())
        if len(found.pieces) > _MAX_PIECES:
            raise DataError(f"'{path}' has {len(found.pieces)} pieces; {_MAX_PIECES} is the most")
        pieces = [piece.piece.decode() for piece in found.pieces]
    except (DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' is no SentencePiece model, or it is damaged ({error}); fetch it again") from error
    trainer, normalizer = found.trainer_spec, found.normalizer_spec
    _check_settings(path, trainer, normalizer, found.denormalizer_spec)
    model = SentencePieceModel(
        path=path,
        kind=trainer.model_type,
        pieces=pieces,
        scores=[piece.score for piece in found.pieces],
        types=[piece.type for piece in found.pieces],
        byte_fallback=trainer.byte_fallback,
        add_dummy_prefix=normalizer.add_dummy_prefix,
        remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
    )
    _check_pieces(model)
    return model


def _check_settings(path: Path, trainer: Any, normalizer: Any, denormalizer: Any) -> None:
    if trainer.model_type not in (UNIGRAM, BPE):
        raise UnsupportedModelError(
            f"'{path}' is a SentencePiece model of type {trainer.model_type}; 1 (unigram) and 2 (BPE) are read"
        )
    if trainer.treat_whitespace_as_suffix:
        raise UnsupportedModelError(f"'{path}' has treat_whitespace_as_suffix=true, which is not computed here")
    if not normalizer.escape_whitespaces:
        raise UnsupportedModelError(f"'{path}' has escape_whitespaces=false, which is not computed here")
    for name, spec in (("normaliser", normalizer), ("denormaliser", denormalizer)):
        if spec.precompiled_charsmap:
            # The tokenizers library's `Precompiled` is not the same: of "a", an acute accent and a dot below it makes "á".
            raise UnsupportedModelError(
                f"'{path}' rewrites characters by a table (its {name} is {shown(spec.name.decode(errors='replace'))}); a "
                "tokenizer.json cannot say the same of all texts, so 'identity' alone is read; save a tokenizer.json "
                "beside it with the program that the model was trained with"
            )


def _check_pieces(model: SentencePieceModel) -> None:
    path, pieces, types = model.path, model.pieces, model.types
    if not pieces or len(pieces) > _MAX_PIECES or len(set(pieces)) != len(pieces) or "" in pieces:
        raise DataError(
            f"'{path}' has {len(pieces)} pieces, {len(set(pieces))} different ones; they have to differ, none is empty, and "
            f"{_MAX_PIECES} is the most"
        )
    if not all(NORMAL <= kind <= BYTE for kind in types):
        raise DataError(f"'{path}' has types of pieces outside of {NORMAL}…{BYTE}")
    if not all(abs(score) < 1e30 for score in model.scores):
        raise DataError(f"'{path}' has scores that are no finite numbers")
    if types.count(UNKNOWN) != 1:
        raise DataError(f"'{path}' has {types.count(UNKNOWN)} unknown pieces; it must have one")
    if UNUSED in types:
        raise UnsupportedModelError(f"'{path}' has {types.count(UNUSED)} unused pieces, which are not computed here")
    bytes_of = model.of_type(BYTE)
    if model.byte_fallback and set(bytes_of) != set(BYTES):
        raise DataError(f"'{path}' has byte_fallback=true and {len(bytes_of)} pieces of bytes; it needs all 256")
    if bytes_of and not model.byte_fallback:
        raise DataError(f"'{path}' has byte_fallback=false and {len(bytes_of)} pieces of bytes")
    plain = model.of_type(NORMAL)
    if not plain:
        raise DataError(f"'{path}' has no piece of plain text")
    strange = [piece for piece in (*plain, *model.of_type(USER_DEFINED)) if " " in piece]
    if strange:
        raise DataError(f"'{path}' has pieces with a space, {shown(strange[0])}; SentencePiece writes it as '▁'")
    long = {piece: score for piece, score in plain.items() if len(piece) > 1}
    if model.kind == BPE and len(set(long.values())) != len(long):
        raise UnsupportedModelError(
            f"'{path}' has {len(long) - len(set(long.values()))} pieces with the score of another one: which is merged first "
            "depends on where they stand, and a tokenizer.json cannot say it; save a tokenizer.json beside it"
        )
