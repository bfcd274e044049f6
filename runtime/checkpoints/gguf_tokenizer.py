"""The tokenizer of a GGUF file → tokenizer.json, tokenizer_config.json and chat_template.jinja.

Two kinds are read: byte-level BPE with its merges ("gpt2"), whose text is first cut into words by a regular expression that the
file names, and SentencePiece BPE with scores ("llama"). Regular expressions: src/llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..errors import DataError, UnsupportedModelError, shown
from .pieces import BYTE, BYTES, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, around, merges_by_score, pairs

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def _llama3(digits: str) -> str:
    """Llama 3's expression, with so many digits together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )


def _case(first: str, then: str) -> str:
    """A word of GPT-4o: letters of the classes `first`, then of `then`, perhaps with an English ending."""
    upper, lower = (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]")
    return rf"[^\r\n\p{{L}}\p{{N}}]?{upper}{first}{lower}{then}(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


_GPT4O = rf"{_case('*', '+')}|{_case('+', '*')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_FALCON = (r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]")
LLAMA3_WORDS = _llama3("{1,3}")

# Name of a way to cut words → the expressions that cut, one after the other. Files without a name, or with "default", were made
# before there were names: their words are cut in no way that is known, but for GPT-2's own.
_CUTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "falcon3"), (LLAMA3_WORDS,)),
    "qwen2": (_llama3(""),),
    "gpt-4o": (_GPT4O,),
    "falcon": _FALCON,
}
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3")  # a word that is a token is not cut into merges
_BEGINS = ("llama-bpe", "llama3", "llama-v3", "falcon3")  # where add_bos_token is absent
# Texts of tokens that end a turn, as llama.cpp knows them too. A file need not name their ids.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|end_of_text|>", "<|eom_id|>", "<|endoftext|>")
_COMPOSED = ("qwen2", "olmo")  # text is brought into Unicode's form NFC first
# of Phi-3, whose other added tokens take the spaces that follow them
_WITHOUT_SPACES = ("<unk>", "<s>", "<|endoftext|>")

# Keys after "tokenizer.ggml." → their type; of lists, that of their elements.
_LISTS = {"tokens": str, "merges": str, "scores": float, "token_type": int}
_IDS = ("bos", "eos", "unknown", "padding", "eot", "eom")
_UNUSED_IDS = (
    *("seperator", "mask", "cls", "prefix", "suffix", "middle"),
    *(f"fim_{name}" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
)
_FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix", "add_sep_token", "remove_extra_whitespaces")
KEYS = frozenset(
    [
        "tokenizer.chat_template",
        *(f"tokenizer.ggml.{name}" for name in ("model", "pre", "token_type_count", *_LISTS, *_FLAGS)),
        *(f"tokenizer.ggml.{name}_token_id" for name in (*_IDS, *_UNUSED_IDS)),
    ]
)


def check_tokenizer(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raises `UnsupportedModelError` for a kind of tokenizer, a way to cut words, or an option that is not read, and
    `DataError` for values of a wrong type or ids that are no tokens."""
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}.get
    for name, kind in _LISTS.items():
        value = get(name, [])
        if not isinstance(value, list) or not all(type(one) is kind for one in value):
            raise DataError(f"'{path}' has {name} that are no list of {kind.__name__}")
    for name, kind in (*((f"{name}_token_id", int) for name in _IDS), *((name, bool) for name in _FLAGS)):
        if get(name) is not None and type(get(name)) is not kind:
            raise DataError(f"'{path}' has {name}={shown(get(name))}; it must be of the type {kind.__name__}")
    count = len(get("tokens", []))
    for name in _IDS:
        index = get(f"{name}_token_id")
        if index is not None and not 0 <= index < count:
            raise DataError(f"'{path}' has {name}_token_id={index}; there are {count} tokens")
    for name in (
        "add_sep_token",
        "remove_extra_whitespaces",
        *(["add_space_prefix"] if get("model") == "gpt2" else []),
    ):
        if get(name):
            raise UnsupportedModelError(f"'{path}' has {name}=true, which is not computed here")
    if get("model") not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"'{path}' has a tokenizer of the kind {shown(get('model'))}; 'gpt2' and 'llama' are read"
        )
    if get("model") == "gpt2" and _cut(metadata) not in _CUTS:
        raise UnsupportedModelError(
            f"'{path}' cuts words by '{_cut(metadata)}'; of GGUF files {sorted(_CUTS)} are read; pull the model's directory"
        )


def _cut(metadata: Mapping[str, Any]) -> str:
    name = str(metadata.get("tokenizer.ggml.pre", "default"))
    return "gpt-2" if name == "default" and metadata.get("general.architecture") == "gpt2" else name


def write_tokenizer(path: Path, metadata: Mapping[str, Any], out: Path) -> None:
    """Write the tokenizer of the file `path` with this metadata into the folder `out`.

    Raises `DataError` if its parts do not fit each other, and what `check_tokenizer` raises.
    """
    check_tokenizer(path, metadata)
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}.get
    tokens = list(get("tokens", []))
    types = list(get("token_type", [])) or [NORMAL] * len(tokens)
    if not tokens or len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise DataError(f"'{path}' has {len(tokens)} tokens, {len(set(tokens))} different ones, and {len(types)} types")
    if not all(NORMAL <= kind <= BYTE for kind in types):
        raise DataError(f"'{path}' has token types outside of {NORMAL}…{BYTE}")
    if get("model") == "gpt2":
        tokenizer, begins = _byte_level(path, tokens, get("merges", []), _cut(metadata)), _cut(metadata) in _BEGINS
    else:
        own = get("scores", []), get("merges", []), get("add_space_prefix", True)
        tokenizer, begins = _sentencepiece(path, tokens, types, *own), True
    ids = {key: get(f"{key}_token_id") for key in _IDS}
    takes_spaces = any(name in str(metadata.get("general.name")).lower() for name in ("phi-3", "phi3"))
    special = {index for key, index in ids.items() if index is not None and key != "unknown"}
    for at, (token, kind) in enumerate(zip(tokens, types)):
        if kind in (CONTROL, USER_DEFINED, UNKNOWN) or at in special:
            is_special = kind != USER_DEFINED or at in special
            strips = takes_spaces and token not in _WITHOUT_SPACES
            added = AddedToken(token, normalized=False, special=is_special, rstrip=strips)
            tokenizer.add_tokens([added])
    short = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    named = {f"{name}_token": tokens[index] for key, name in short.items() if (index := ids[key]) is not None}
    adds = {}
    for name, default in (("bos_token", begins), ("eos_token", False)):
        given = get(f"add_{name}")
        adds[name] = named.get(name, "") if (default if given is None else given) else None
    of_token = {token: index for index, token in enumerate(tokens)}
    tokenizer.post_processor = around(path, of_token, adds["bos_token"], adds["eos_token"])
    tokenizer.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    template = metadata.get("tokenizer.chat_template")
    if template:
        (out / "chat_template.jinja").write_text(str(template), encoding="utf-8")


def end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """The ids that end an answer: those that the file names, and ends of a turn that its chat template writes."""
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}.get
    ends = [get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    template = str(metadata.get("tokenizer.chat_template", ""))
    written = {
        token: at
        for at, (token, kind) in enumerate(zip(get("tokens", []), get("token_type", [])))
        if token in _TURN_ENDS and kind in (CONTROL, USER_DEFINED) and token in template
    }
    ends += [written[token] for token in _TURN_ENDS if token in written]
    return list(dict.fromkeys(int(token_id) for token_id in ends if token_id is not None))


def _byte_level(path: Path, tokens: Sequence[str], merges: Sequence[str], cut: str) -> Tokenizer:
    ids = {token: index for index, token in enumerate(tokens)}
    model = models.BPE(vocab=ids, merges=pairs(path, ids, merges), ignore_merges=cut in _WHOLE_WORDS)
    tokenizer = Tokenizer(model)
    if cut in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in _CUTS[cut]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    path: Path,
    tokens: Sequence[str],
    types: Sequence[int],
    scores: Sequence[float],
    merges: Sequence[str],
    prefix: bool,
) -> Tokenizer:
    """Pairs are merged in the order of `merges`; without them, in that of the scores of what they make."""
    ids = {token: index for index, token in enumerate(tokens)}
    if not all(piece in ids for piece in BYTES):
        raise DataError(f"'{path}' lacks tokens of bytes")
    given = pairs(path, ids, merges) or _scored(path, tokens, types, scores)
    unknown = next((token for token, kind in zip(tokens, types) if kind == UNKNOWN), None)
    model = models.BPE(vocab=ids, merges=given, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ends: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return tokenizer


def _scored(path: Path, tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All pairs that make a token, the best one first."""
    ids = {token: index for index, token in enumerate(tokens)}
    if len(scores) != len(tokens) or not all(map(math.isfinite, scores)):
        raise DataError(
            f"'{path}' has {len(scores)} scores for {len(tokens)} tokens, or some that are no finite numbers"
        )
    if len({scores[index] for index, kind in enumerate(types) if kind == NORMAL}) < 2:
        raise DataError(f"'{path}' has the same score for each token, and no merges: their order is lost")
    mergeable = (NORMAL, USER_DEFINED, UNUSED)
    return merges_by_score({t: scores[ids[t]] for t, kind in zip(tokens, types) if kind in mergeable}, ids)
