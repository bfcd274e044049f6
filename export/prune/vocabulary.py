"""A tokenizer with the tokens that a corpus uses, and no others but those from which any text can be spelled.

Byte-pair encoding takes the pair of the lowest rank again and again. If every merge that a word needs is kept, in the same
order, and none is added, the same pair is the lowest each time, so the word becomes the same tokens. A token's own letters,
alone, become that token through the merges that made it inside a word: pairs that reach over its ends were never taken. So
what is kept is, for each token that is used, its path: its letters, the tokens between, and their merges.

A unigram model takes the most probable path of pieces. That path is still there, and every other path was there before.

Text outside the corpus is spelled out of shorter tokens, at worst of bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from ...runtime.errors import BundleError, DataError, UnsupportedModelError, shown
from ...runtime.text.token_bytes import byte_letters
from .path import Path, Paths

_BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trimmed:
    """`tokenizer`: the content of the new tokenizer.json. `kept`: new token id → the old one."""

    tokenizer: State
    kept: tuple[int, ...]


def trim(state: State, texts: Callable[[], Iterable[str]], more: Iterable[int] = ()) -> Trimmed:
    """Keep what `texts` needs, the added tokens and the ids `more`. `state`: a parsed tokenizer.json. `texts()`: the corpus,
    read anew each time: twice.

    Raises `UnsupportedModelError` for a tokenizer that cannot be trimmed or does not cut the corpus as before, `DataError` for a
    corpus that is empty or has a character that the tokenizer cannot spell, `BundleError` for a tokenizer that is damaged.
    """
    state = json.loads(json.dumps(state)) | {"truncation": None, "padding": None}
    _check_kind(state)
    before = _load(state)
    used, characters = _used(before, texts())
    _check_spelled(before, state, characters)
    added = {token["id"] for token in state["added_tokens"]}
    model = _vocabulary(state["model"])
    tokens = {token_id: token for token, token_id in model.items()}
    needed = set(used) | added | set(more)
    if state["model"]["type"] == "BPE":
        own, merges = _pairs(state, model, [tokens[i] for i in needed if i in tokens and i not in added])
    else:
        own, merges = _pieces(state["model"], [tokens[i] for i in needed if i in tokens]), []
    kept_own = sorted({model[token] for token in own} | {i for i in needed if i in tokens})
    beside = sorted(added - set(kept_own))
    rest = sorted(needed - set(kept_own) - set(beside))  # ids that the model knows and the tokenizer does not
    kept = (*kept_own, *beside, *rest)
    trimmed = Trimmed(_rewritten(state, kept, kept_own, merges), kept)
    _check_same(before, _load(trimmed.tokenizer), trimmed.kept, texts(), kept_own + beside)
    return trimmed


def _load(state: State) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(state))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise BundleError(f"tokenizer.json is damaged: {error}; pull the model again") from error


# ---- what can be trimmed -----------------------------------------------------------------------------------------------


def _check_kind(state: State) -> None:
    """Raises `UnsupportedModelError` for a kind of vocabulary whose rules are not known here."""
    model = state["model"]
    kind = model.get("type")
    if kind not in ("BPE", "Unigram"):
        raise UnsupportedModelError(
            f"a vocabulary of kind {shown(kind)} is not trimmed; known are BPE of bytes, and BPE or Unigram that falls back "
            "to bytes"
        )
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UnsupportedModelError(f"tokenizer.json has {option}={shown(model[option])}, which is not trimmed")
    if _is_byte_level(state):
        return
    missing = [piece for piece in _BYTE_PIECES if piece not in _vocabulary(model)]
    if not model.get("byte_fallback") or missing:
        raise UnsupportedModelError(
            f"the vocabulary (kind {kind}) neither is of bytes nor falls back to them (byte_fallback is "
            f"{bool(model.get('byte_fallback'))}, {len(missing)} of 256 byte tokens are missing), so a trimmed one could not "
            "spell every text"
        )


def _is_byte_level(state: State) -> bool:
    found = state.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    return state["model"]["type"] == "BPE" and any(step.get("type") == "ByteLevel" for step in steps)


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    found = model["vocab"]
    return dict(found) if isinstance(found, dict) else {piece: index for index, (piece, _) in enumerate(found)}


# ---- the corpus --------------------------------------------------------------------------------------------------------


def _used(tokenizer: tokenizers.Tokenizer, texts: Iterable[str]) -> tuple[set[int], set[str]]:
    """(token ids, characters) of the corpus."""
    used: set[int] = set()
    characters: set[str] = set()
    for text in texts:
        used.update(tokenizer.encode(text, add_special_tokens=True).ids)
        characters.update(text)
    if not characters:
        raise DataError("the corpus is empty, so no token is used; give text")
    return used, characters


def _check_spelled(tokenizer: tokenizers.Tokenizer, state: State, characters: Iterable[str]) -> None:
    """Raises `DataError` for a character that the tokenizer drops, or knows as unknown only."""
    model = _vocabulary(state["model"])
    letters = {byte: letter for letter, byte in byte_letters().items()}
    unknown = state["model"].get("unk_id")
    name = state["model"].get("unk_token")
    unknown = model.get(name) if name is not None else unknown
    alone = tokenizer.encode("aa", add_special_tokens=False).ids
    for character in sorted(characters):
        if _is_byte_level(state):
            written = character if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(character)
            spelled = all(letters[byte] in model for byte in written.encode())
        else:
            found = tokenizer.encode(f"a{character}a", add_special_tokens=False).ids
            spelled = unknown not in found and found != alone
        if not spelled:
            raise DataError(
                f"the corpus has the character {character!r} (U+{ord(character):04X}), which the tokenizer cannot spell; "
                "leave it out"
            )


def _check_same(
    before: tokenizers.Tokenizer,
    after: tokenizers.Tokenizer,
    kept: Sequence[int],
    texts: Iterable[str],
    ids: Iterable[int],
) -> None:
    """Raises `UnsupportedModelError` unless the corpus is cut as before and reads as before, and tokens have their ids."""
    new = {old: index for index, old in enumerate(kept)}
    for old in ids:
        if after.id_to_token(new[old]) != before.id_to_token(old):
            raise UnsupportedModelError(
                f"the token {shown(before.id_to_token(old))} has another id than its place says"
            )
    for text in texts:
        first, second = (one.encode(text, add_special_tokens=True).ids for one in (before, after))
        same_text = after.decode(second, skip_special_tokens=False) == before.decode(first, skip_special_tokens=False)
        if [kept[i] for i in second] != first or not same_text:
            raise UnsupportedModelError(f"the trimmed tokenizer cuts {shown(text)} into other tokens than before")


# ---- what is kept ------------------------------------------------------------------------------------------------------


def _pairs(state: State, vocab: Mapping[str, int], tokens: Iterable[str]) -> tuple[set[str], list[list[str]]]:
    """(tokens, merges in their order) on the paths of `tokens`, and the letters or bytes."""
    model = state["model"]
    merges = [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    paths = Paths([(left, right) for left, right in merges])
    ranks: set[int] = set()
    kept = {letter for letter in byte_letters() if letter in vocab} if _is_byte_level(state) else set(_BYTE_PIECES)
    if model.get("unk_token") is not None:
        kept.add(model["unk_token"])
    for token in tokens:
        path: Path | None = paths.of(token)
        kept.add(token)
        if path is None:
            # It stands in the text as it is: a byte of the fallback, or a word of a vocabulary that is looked up first.
            continue
        kept |= path.tokens
        ranks |= path.ranks
    return kept & set(vocab), [merges[rank] for rank in sorted(ranks)]


def _pieces(model: Mapping[str, Any], tokens: Iterable[str]) -> set[str]:
    """Pieces of a unigram model: those that are used; their letters, for a letter without a piece is unknown wherever it
    stands; the least probable one, which what is unknown is measured by."""
    pieces = [piece for piece, _ in model["vocab"]]
    scores = [score for _, score in model["vocab"]]
    used = set(tokens)
    letters = {letter for piece in used for letter in piece}
    least = pieces[min(range(len(scores)), key=scores.__getitem__)]
    unknown = {pieces[model["unk_id"]]} if model.get("unk_id") is not None else set()
    return used | (letters & set(pieces)) | {least} | unknown | set(_BYTE_PIECES)


def _rewritten(state: State, kept: Sequence[int], own: Sequence[int], merges: list[list[str]]) -> State:
    """tokenizer.json with the new ids."""
    new = {old: index for index, old in enumerate(kept)}
    model = dict(state["model"])
    if model["type"] == "BPE":
        tokens = {token_id: token for token, token_id in model["vocab"].items()}
        model |= {"vocab": {tokens[old]: new[old] for old in own}, "merges": merges}
    else:
        model["vocab"] = [model["vocab"][old] for old in own]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    added = [{**token, "id": new[token["id"]]} for token in state["added_tokens"]]
    return {
        **state,
        "model": model,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "post_processor": _processor(state.get("post_processor"), new),
    }


def _processor(values: State | None, new: Mapping[int, int]) -> State | None:
    """What is put around a text, with the new ids. Raises `UnsupportedModelError` for a kind whose ids are not known."""
    if values is None or values["type"] == "ByteLevel":
        return values
    if values["type"] == "Sequence":
        return {**values, "processors": [_processor(part, new) for part in values["processors"]]}
    if values["type"] == "TemplateProcessing":
        named = values["special_tokens"].items()
        found = {name: {**token, "ids": [_id(i, new) for i in token["ids"]]} for name, token in named}
        return {**values, "special_tokens": found}
    if values["type"] in ("BertProcessing", "RobertaProcessing"):
        return {**values, **{side: [values[side][0], _id(values[side][1], new)] for side in ("sep", "cls")}}
    raise UnsupportedModelError(f"tokenizer.json has a post_processor {shown(values['type'])}, whose ids are not known")


def _id(old: int, new: Mapping[int, int]) -> int:
    if old not in new:
        raise UnsupportedModelError(
            f"tokenizer.json puts the token {old} around texts, and that is no added token; add it"
        )
    return new[old]
