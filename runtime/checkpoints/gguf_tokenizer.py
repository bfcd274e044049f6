"""The tokenizer of a GGUF file → tokenizer.json, tokenizer_config.json and chat_template.jinja.

Two kinds are read: byte-level BPE with its merges ("gpt2"), whose text is first cut into words by a regular expression that the
file names, and SentencePiece BPE with scores ("llama"). Regular expressions: src/llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..errors import DataError, UnsupportedModelError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def _llama3(digits: str) -> str:
    """Llama 3's expression, with so many digits together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )


# Name of a way to cut words → the expressions that cut, one after the other.
_CUTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("default", "gpt-2", "gpt2", "olmo", "phi-2", "mpt", "jais"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "command-r", "exaone"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "falcon3"), (_llama3("{1,3}"),)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), (_llama3(""),)),
}
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3")  # a word that is a token is not cut into merges
_BEGINS = ("llama-bpe", "llama3", "llama-v3", "falcon3")  # where add_bos_token is absent
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # token types


def check_tokenizer(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raises `UnsupportedModelError` for a kind of tokenizer, or a way to cut words, that is not read."""
    kind, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(f"'{path}' has a tokenizer of the kind {kind!r}; 'gpt2' and 'llama' are read")
    if kind == "gpt2" and cut not in _CUTS:
        raise UnsupportedModelError(
            f"'{path}' cuts words by '{cut}'; of GGUF files {sorted(_CUTS)} are read; pull the model's directory"
        )


def write_tokenizer(path: Path, metadata: Mapping[str, Any], out: Path) -> None:
    """Write the tokenizer of the file `path` with this metadata into the folder `out`.

    Raises `DataError` if its parts do not fit each other, and what `check_tokenizer` raises.
    """
    check_tokenizer(path, metadata)
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}.get
    tokens = [str(token) for token in get("tokens", ())]
    types = list(get("token_type", ())) or [_NORMAL] * len(tokens)
    if not tokens or len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise DataError(f"'{path}' has {len(tokens)} tokens, {len(set(tokens))} different ones, and {len(types)} types")
    cut = str(get("pre", "default"))
    if get("model") == "gpt2":
        tokenizer, begins = _byte_level(path, tokens, get("merges", ()), cut), cut in _BEGINS
    else:
        tokenizer, begins = (
            _sentencepiece(path, tokens, types, get("scores", ()), bool(get("add_space_prefix", True))),
            True,
        )
    added = [(token, kind) for token, kind in zip(tokens, types) if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN)]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind != _USER_DEFINED) for token, kind in added])
    named = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = get(f"{key}_token_id")
        if index is not None and not 0 <= index < len(tokens):
            raise DataError(f"'{path}' has {key}_token_id={index}; there are {len(tokens)} tokens")
        if index is not None:
            named[f"{name}_token"] = tokens[index]
    around = []
    for name, default in (("bos_token", begins), ("eos_token", False)):
        adds = get(f"add_{name}")
        if adds and name not in named:
            raise DataError(f"'{path}' adds a token to each text that it does not name ({name})")
        around.append(named.get(name) if (default if adds is None else adds) else None)
    if any(around):
        first, last = (f"{token} " if token else "" for token in around)
        ids = [(token, tokens.index(token)) for token in around if token]
        tokenizer.post_processor = processors.TemplateProcessing(f"{first}$A {last}".strip(), None, ids)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    template = metadata.get("tokenizer.chat_template")
    if template:
        (out / "chat_template.jinja").write_text(str(template), encoding="utf-8")


def _byte_level(path: Path, tokens: Sequence[str], merges: Sequence[str], cut: str) -> Tokenizer:
    ids = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(str(merge).split(" ", 1)) for merge in merges]
    if not all(len(pair) == 2 and {*pair, "".join(pair)} <= ids.keys() for pair in pairs):
        raise DataError(f"'{path}' has merges of tokens that it does not have")
    model = models.BPE(vocab=ids, merges=pairs, ignore_merges=cut in _WHOLE_WORDS)  # type: ignore[arg-type]
    tokenizer = Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in _CUTS[cut]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    path: Path, tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], prefix: bool
) -> Tokenizer:
    """Pairs are merged in the order of the scores of what they make."""
    if len(scores) != len(tokens) or not all(f"<0x{byte:02X}>" in tokens for byte in range(256)):
        raise DataError(f"'{path}' has {len(scores)} scores for {len(tokens)} tokens, or lacks tokens of bytes")
    ids = {token: index for index, token in enumerate(tokens)}
    pieces = {token for token, kind in zip(tokens, types) if kind in (_NORMAL, _USER_DEFINED, _UNUSED)}
    found = []
    for token in pieces:
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        own = [(left, right) for left, right in splits if left in pieces and right in pieces]
        found += [(-scores[ids[token]], ids[left], ids[right], (left, right)) for left, right in own]
    found.sort()
    unknown = next((token for token, kind in zip(tokens, types) if kind == _UNKNOWN), None)
    model = models.BPE(
        vocab=ids, merges=[pair for *_, pair in found], unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ends: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return tokenizer
