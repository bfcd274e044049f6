"""Llama 3's original `tokenizer.model` → tokenizer.json and tokenizer_config.json.

The file is tiktoken's: a line for each token, its bytes in base64 and its rank. It says neither how text is cut into words nor
which special tokens there are. Both are known for Llama 3 (tokenizer.py of its reference code), which is told by the number of
its tokens and the family in config.json. Other such files are refused.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from ..errors import DataError, UnsupportedModelError
from .gguf_tokenizer import LLAMA3_WORDS
from .pieces import merges_by_score
from .tokenizer_settings import TOKENIZER_MODEL, TokenizerSettings, read_settings

_LIMIT = 16 * 2**20  # bytes; Llama 3's has 2.2 MB
_LONGEST = 512  # bytes of a token; Llama 3's longest has 128
_TOKENS, _SPECIAL = 128_000, 256  # of Llama 3
_CLASSES = ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "LlamaTokenizer", "LlamaTokenizerFast")
# Place among the special tokens → text. The others are reserved: "<|reserved_special_token_N|>", counted from 0.
_LLAMA_3 = {
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"
}  # fmt: skip
_LLAMA_3_1 = _LLAMA_3 | {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}


def is_tiktoken(path: Path) -> bool:
    """Whether the file begins as tiktoken's do: base64, a space, a number."""
    with path.open("rb") as file:
        token, _, rank = file.readline(4 * _LONGEST).strip().partition(b" ")
    try:
        return bool(base64.b64decode(token, validate=True)) and rank.isdigit()
    except binascii.Error:
        return False


def write_tiktoken(directory: Path, out: Path) -> None:
    """Write the tokenizer of `directory`, a model directory with Llama 3's original `tokenizer.model`, into the folder `out`.

    Raises `DataError` for damaged files or files that contradict each other, and `UnsupportedModelError` for another model's.
    """
    path, settings = directory / TOKENIZER_MODEL, TokenizerSettings.read(directory)
    config = read_settings(directory / "config.json")
    settings.check_class(_CLASSES)
    ranked = _read(path)
    if len(ranked) != _TOKENS or config.get("model_type") != "llama":
        raise UnsupportedModelError(
            f"'{path}' has tiktoken's ranks of {len(ranked)} tokens and not the expression that cuts text into words; it is "
            f"known for Llama 3 alone (model_type llama, {_TOKENS} tokens); save a tokenizer.json beside it"
        )
    letters = _letters()
    pieces = ["".join(letters[byte] for byte in token) for token in ranked]
    ids = {piece: index for index, piece in enumerate(pieces)}
    # Two neighbours are joined if together they are a token, that of the lowest rank first, whatever their own ranks are.
    merges = merges_by_score({piece: -float(index) for index, piece in enumerate(pieces)}, ids)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = _LLAMA_3_1 if config.get("rope_scaling") else _LLAMA_3
    reserved = iter(range(_SPECIAL))
    texts = [special.get(at) or f"<|reserved_special_token_{next(reserved)}|>" for at in range(_SPECIAL)]
    added = {_TOKENS + at: AddedToken(text, normalized=False, special=True) for at, text in enumerate(texts)}
    settings.add(tokenizer, added | settings.added(pieces))
    settings.write(tokenizer, settings.special({"bos_token": texts[0], "eos_token": texts[1]}), out)


def _letters() -> list[str]:
    """GPT-2's letter of each byte: printable ones stand for themselves, the others for letters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _read(path: Path) -> list[bytes]:
    """The tokens in the order of their ranks."""
    size = path.stat().st_size
    if size > _LIMIT:
        raise DataError(f"'{path}' has {size} bytes; a file of tiktoken's ranks has at most {_LIMIT}")
    found: dict[int, bytes] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        token, _, rank = line.partition(b" ")
        try:
            content = base64.b64decode(token, validate=True)
        except binascii.Error as error:
            raise DataError(f"'{path}' is damaged in line {number}: {error}") from error
        if not content or len(content) > _LONGEST or not rank.isdigit() or len(rank) > 9 or int(rank) in found:
            raise DataError(
                f"'{path}' is damaged in line {number}: a token has 1 to {_LONGEST} bytes, and a rank of its own"
            )
        found[int(rank)] = content
    tokens = [found[rank] for rank in sorted(found)]
    if sorted(found) != list(range(len(found))) or len(set(tokens)) != len(tokens):
        raise DataError(f"'{path}' is damaged: ranks are 0, 1, 2 … without gaps, and a token has one of them")
    if not {bytes([byte]) for byte in range(256)} <= set(tokens):
        raise DataError(f"'{path}' is damaged: it lacks tokens of single bytes")
    return tokens
