"""A model directory's SentencePiece `tokenizer.model` → tokenizer.json and tokenizer_config.json.

Text without added tokens gets the ids that SentencePiece gives it. Added tokens, and what stands before and after a text, are as
transformers has them for Llama's and Gemma's tokenizers. With `"legacy": false` the prefix "▁" stands before the first text
only, and not before a space: so transformers' fast tokenizers have it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..errors import DataError, UnsupportedModelError, shown
from .pieces import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, merges_by_score
from .sentencepiece_file import BPE, SentencePieceModel, read_sentencepiece
from .tokenizer_settings import TOKENIZER_MODEL, TokenizerSettings

_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "GemmaTokenizerFast")
_USUAL = {"bos_token": ("<s>", "<bos>"), "eos_token": ("</s>", "<eos>")}
_LONGEST_PIECE = 512  # characters


def write_sentencepiece(directory: Path, out: Path) -> None:
    """Write the tokenizer of `directory`, a model directory with a SentencePiece `tokenizer.model`, into the folder `out`.

    Raises `DataError` for damaged files or files that contradict each other, and `UnsupportedModelError` for what
    tokenizer.json cannot describe exactly.
    """
    model, settings = read_sentencepiece(directory / TOKENIZER_MODEL), TokenizerSettings.read(directory)
    _check(model, settings)
    controls, unknown = model.of_type(CONTROL), next(iter(model.of_type(UNKNOWN)))
    usual = {name: next((token for token in texts if token in controls), None) for name, texts in _USUAL.items()}
    names = settings.special({"unk_token": unknown, **usual})
    declared, mentions = settings.added(model.pieces), settings.template
    added, symbols = {}, []
    # An added token cuts the text before it is normalised. Where that adds or removes spaces, the parts would get other ids.
    is_whole = model.add_dummy_prefix or model.remove_extra_whitespaces
    for index, (piece, kind) in enumerate(zip(model.pieces, model.types)):
        if kind in (CONTROL, UNKNOWN):
            added[index] = AddedToken(piece, normalized=False, special=True)
        elif kind == USER_DEFINED and piece in mentions and not is_whole:
            added[index] = AddedToken(piece, normalized=False, special=False)
        elif kind == USER_DEFINED and index not in declared:
            symbols.append(piece)
    special = {token.content for token in added.values() if token.special} | set(names.values())
    for index, token in declared.items():
        token.special = token.special or token.content in special
        added[index] = token
    tokenizer = _tokenizer(model, settings, symbols)
    settings.add(tokenizer, added)
    settings.write(tokenizer, names, out)


def _check(model: SentencePieceModel, settings: TokenizerSettings) -> None:
    settings.check_class(_CLASSES)
    options = settings.config.get("sp_model_kwargs")
    if options:
        raise UnsupportedModelError(
            f"'{settings.directory}' has sp_model_kwargs={shown(options)}, which are not computed here"
        )
    longest = max(map(len, model.of_type(NORMAL)))
    if longest > _LONGEST_PIECE:
        raise DataError(f"'{model.path}' has a piece of {longest} characters; the limit is {_LONGEST_PIECE}")


def _tokenizer(model: SentencePieceModel, settings: TokenizerSettings, symbols: Collection[str]) -> Tokenizer:
    """The tokenizer without added tokens; `symbols`: user-defined pieces that are cut out of the text before all else."""
    prefix = model.add_dummy_prefix and settings.flag("add_prefix_space", True)
    everywhere = settings.flag("legacy", True)
    tokenizer = Tokenizer(_bpe(model, symbols) if model.kind == BPE else _unigram(model))
    steps: list[Any] = []
    if model.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +|[ ▁]+\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if prefix and everywhere:
        steps.append(normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    cuts: list[Any] = [pre_tokenizers.Metaspace("▁", "first", split=False)] if prefix and not everywhere else []
    if symbols and model.kind == BPE:
        longest_first = sorted(symbols, key=len, reverse=True)
        cuts.append(pre_tokenizers.Split(Regex("|".join(map(_quoted, longest_first))), "isolated"))
    if model.byte_fallback:  # the text "<0x41>" is not the piece of that name
        cuts.append(pre_tokenizers.Split(Regex("(?<=<)(?=0x[0-9A-F]{2}>)"), "isolated"))
    if cuts:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    spaces = 2**31 if model.remove_extra_whitespaces else int(prefix)  # that decoding drops at the start
    strip: list[Any] = [decoders.Strip(" ", spaces, 0)] if spaces else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _quoted(text: str) -> str:
    """A regular expression for just this text."""
    return re.sub(r"([^\w\s])", r"\\\1", text, flags=re.ASCII) if text.isascii() else re.escape(text)


def _bpe(model: SentencePieceModel, symbols: Collection[str]) -> models.BPE:
    ids = {piece: index for index, piece in enumerate(model.pieces)}
    merges, unknown = merges_by_score(model.of_type(NORMAL), ids), next(iter(model.of_type(UNKNOWN)))

    def made(ignore_merges: bool) -> models.BPE:
        options = {"fuse_unk": True, "byte_fallback": model.byte_fallback, "ignore_merges": ignore_merges}
        return models.BPE(vocab=ids, merges=merges, unk_token=unknown, **options)

    if not symbols:
        return made(ignore_merges=False)
    # A symbol stands alone after the cut, and is looked up whole. So is every other text that is one piece: it has to be
    # what its merges make, too.
    alone = Tokenizer(made(ignore_merges=False))
    plain = list(model.of_type(NORMAL))
    unlike = [p for p, e in zip(plain, alone.encode_batch_fast(plain)) if e.ids != [ids[p]]]
    if unlike:
        raise UnsupportedModelError(
            f"'{model.path}' has user-defined pieces, and {len(unlike)} pieces that its merges do not make, such as "
            f"{shown(unlike[0])}; a tokenizer.json cannot say both; save a tokenizer.json beside it"
        )
    return made(ignore_merges=True)


def _unigram(model: SentencePieceModel) -> models.Unigram:
    """The pieces with their scores; those that no text can reach have the lowest.

    Ways to cut a text that have the same sum of scores are chosen among by rounding errors: SentencePiece adds in float32,
    the tokenizers library in float64.
    """
    unknown = next(iter(model.of_type(UNKNOWN)))
    plain = model.of_type(NORMAL)
    lowest = min(plain.values())
    symbols = model.of_type(USER_DEFINED)
    if symbols:  # SentencePiece weighs them by a rule of its own, against the pieces around them
        raise UnsupportedModelError(
            f"'{model.path}' is a unigram model with {len(symbols)} user-defined pieces, such as {shown(next(iter(symbols)))}; a "
            "tokenizer.json cannot weigh them as it does; save a tokenizer.json beside it"
        )
    unreached = (UNKNOWN, CONTROL, BYTE)
    scores = [(p, lowest if kind in unreached else s) for p, s, kind in zip(model.pieces, model.scores, model.types)]
    return models.Unigram(scores, model.pieces.index(unknown), model.byte_fallback)
