"""A model directory's SentencePiece `tokenizer.model` → tokenizer.json and tokenizer_config.json.

Text without added tokens gets the ids that SentencePiece gives it. Added tokens, and what stands before and after a text, are as
transformers has them for Llama's and Gemma's tokenizers. With `"legacy": false` the prefix "▁" stands before the first text
only, and not before a space: so transformers' fast tokenizers have it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..errors import DataError, UnsupportedModelError, shown
from .pieces import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, around, merges_by_score
from .sentencepiece_file import BPE, SentencePieceModel, read_sentencepiece

TOKENIZER_MODEL = "tokenizer.model"
READ_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_CLASSES = (None, "LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "GemmaTokenizerFast")
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_USUAL = {"bos_token": ("<s>", "<bos>"), "eos_token": ("</s>", "<eos>")}
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
_LONGEST_PIECE = 512  # characters


def write_sentencepiece(directory: Path, out: Path) -> None:
    """Write the tokenizer of `directory`, a model directory with a SentencePiece `tokenizer.model`, into the folder `out`.

    Raises `DataError` for damaged files or files that contradict each other, and `UnsupportedModelError` for what
    tokenizer.json cannot describe exactly.
    """
    model = read_sentencepiece(directory / TOKENIZER_MODEL)
    config = _read(directory / "tokenizer_config.json")
    names = _special(model, config, _read(directory / "special_tokens_map.json"))
    added = _added(model, config, _read(directory / "added_tokens.json"))
    _check(directory, model, config)
    template = directory / "chat_template.jinja"
    mentions = json.dumps(config.get("chat_template"), ensure_ascii=False)
    if template.is_file():
        mentions = template.read_text(encoding="utf-8", errors="replace")
    in_text = {p for p in model.of_type(USER_DEFINED) if p in mentions or model.pieces.index(p) in added}
    tokenizer = _tokenizer(model, config, [p for p in model.of_type(USER_DEFINED) if p not in in_text])
    _add(directory, tokenizer, model, added, {n for n in names.values() if isinstance(n, str)}, in_text)
    listed = config.get("additional_special_tokens", names.get("additional_special_tokens", [])) or []
    extra = [_text(directory, "additional_special_tokens", token) for token in listed]
    for name, token in [(n, names.get(n)) for n in ("bos_token", "eos_token", "unk_token")] + [("", t) for t in extra]:
        if token is not None and tokenizer.token_to_id(token) is None:
            raise DataError(f"'{directory}' names {shown(token)} as {name or 'a special token'}, and it is no token")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in extra])
    ids = tokenizer.get_vocab()
    ends = []
    for name, default in (("bos_token", names.get("bos_token") is not None), ("eos_token", False)):
        adds = _flag(directory, config, f"add_{name}", default)
        ends.append((names.get(name) or "") if adds else None)
    tokenizer.post_processor = around(directory / TOKENIZER_MODEL, ids, *ends)
    tokenizer.save(str(out / "tokenizer.json"))
    kept = ("chat_template", "model_max_length", "split_special_tokens")
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: names[name] for name in _NAMES if names.get(name) is not None},
        **({"additional_special_tokens": extra} if extra else {}),
        **{key: config[key] for key in kept if config.get(key) is not None},
    }
    (out / "tokenizer_config.json").write_text(json.dumps(values, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{path}' is not JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise DataError(f"'{path}' must hold a JSON object, it holds a {type(values).__name__}")
    return values


def _text(directory: Path, name: str, value: Any) -> str:
    """The content of a token, which is written as text or as an object."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise DataError(f"'{directory}' has {name}={shown(value)}; a token is a text that is not empty")
    return content


def _flag(directory: Path, config: Mapping[str, Any], name: str, default: bool) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise DataError(f"'{directory}' has {name}={shown(value)}; it must be true or false")
    return default if value is None else value


def _check(directory: Path, model: SentencePieceModel, config: Mapping[str, Any]) -> None:
    if config.get("tokenizer_class") not in _CLASSES:
        raise UnsupportedModelError(
            f"'{directory}' has tokenizer_class={shown(config['tokenizer_class'])}; with a tokenizer.model alone, "
            f"{', '.join(filter(None, _CLASSES))} are read; save a tokenizer.json beside it"
        )
    if config.get("sp_model_kwargs"):
        raise UnsupportedModelError(
            f"'{directory}' has sp_model_kwargs={shown(config['sp_model_kwargs'])}, which are not computed here"
        )
    longest = max(map(len, model.of_type(NORMAL)))
    if longest > _LONGEST_PIECE:
        raise DataError(f"'{model.path}' has a piece of {longest} characters; the limit is {_LONGEST_PIECE}")


def _special(model: SentencePieceModel, config: Mapping[str, Any], mapped: Mapping[str, Any]) -> dict[str, Any]:
    """Names of special tokens → their texts, None where a file says that there is none."""
    found: dict[str, Any] = {"unk_token": next(iter(model.of_type(UNKNOWN)))}
    controls = model.of_type(CONTROL)
    for name, usual in _USUAL.items():
        found[name] = next((token for token in usual if token in controls), None)
    for values in (mapped, config):
        for name in _NAMES:
            if name in values:
                value = values[name]
                found[name] = None if value is None else _text(model.path.parent, name, value)
    found["additional_special_tokens"] = mapped.get("additional_special_tokens", [])
    return found


def _added(model: SentencePieceModel, config: Mapping[str, Any], mapped: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Token id → added token. An id that SentencePiece has too must have the same text."""
    directory = model.path.parent
    found: dict[int, AddedToken] = {}
    for token, index in mapped.items():
        if type(index) is not int or index < 0 or not token or index in found:
            raise DataError(f"'{directory}' has in added_tokens.json {shown(token)} with the id {shown(index)}")
        found[index] = AddedToken(token, normalized=False, special=False)
    declared = config.get("added_tokens_decoder", {})
    if not isinstance(declared, dict):
        raise DataError(f"'{directory}' has added_tokens_decoder={shown(declared)}; it must be an object")
    for key, value in declared.items():
        content = _text(directory, "added_tokens_decoder", value)
        flags = {f: value[f] for f in _FLAGS if isinstance(value, dict) and f in value}
        if (
            not key.isascii()
            or not key.isdigit()
            or len(key) > 9
            or not all(isinstance(f, bool) for f in flags.values())
        ):
            raise DataError(f"'{directory}' has in added_tokens_decoder {shown({key: value})}")
        if int(key) in found and found[int(key)].content != content:
            raise DataError(
                f"'{directory}' gives the id {key} to {shown(found[int(key)].content)} and {shown(content)}"
            )
        # Normalising only writes spaces as "▁", and would put a prefix before the token's own text.
        found[int(key)] = AddedToken(content, **{**flags, "normalized": False})
    for index, added in found.items():
        if index < len(model.pieces) and model.pieces[index] != added.content:
            raise DataError(
                f"'{directory}' gives the id {index} to {shown(added.content)}, and tokenizer.model to "
                f"{shown(model.pieces[index])}"
            )
    return found


def _add(
    directory: Path,
    tokenizer: Tokenizer,
    model: SentencePieceModel,
    added: Mapping[int, AddedToken],
    special: Collection[str],
    in_text: Collection[str],
) -> None:
    """Give the tokenizer its added tokens: those of the model, and those that the files declare."""
    own = {}
    for index, (piece, kind) in enumerate(zip(model.pieces, model.types)):
        if kind in (CONTROL, UNKNOWN) or piece in in_text:
            own[index] = AddedToken(piece, normalized=False, special=kind != USER_DEFINED)
    for index, token in sorted((own | dict(added)).items()):
        token.special = token.special or token.content in special or (index in own and own[index].special)
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != index:
            raise DataError(
                f"'{directory}' gives {shown(token.content)} the id {index}; the next free one is "
                f"{tokenizer.token_to_id(token.content)}: ids have no gaps, and a text has one id"
            )


def _tokenizer(model: SentencePieceModel, config: Mapping[str, Any], symbols: Collection[str]) -> Tokenizer:
    """The tokenizer without added tokens; `symbols`: user-defined pieces that are cut out of the text before all else."""
    directory = model.path.parent
    prefix = model.add_dummy_prefix and _flag(directory, config, "add_prefix_space", True)
    everywhere = _flag(directory, config, "legacy", True)
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
