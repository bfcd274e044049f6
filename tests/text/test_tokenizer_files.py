"""Settings in a tokenizer's files: those that transformers applies are applied, those that it resets are dropped."""

from __future__ import annotations

import json

import pytest
import tokenizers
import transformers
from motet.runtime.errors import BundleError
from motet.runtime.text.tokenizer import Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

TEXTS = ("Hello", " two words", "café", "cafe\u0301", "a<|im_end|>b", "new\nline  ", "", "x <|extra|> y", "word " * 300)


def sentencepiece_like():
    """Metaspace, as Llama-2's tokenizer: the first space of a text is dropped when it is decoded."""
    letters = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyzéHW,.", "▁a", "▁word", "▁Hello", "▁wo"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(letters))}
    merges = [("▁", "a"), ("▁", "w"), ("▁w", "o")]
    merges = [(a, b) for a, b in merges if a in vocab and b in vocab and a + b in vocab]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def truncated(tokenizer):
    tokenizer.enable_truncation(max_length=8)


def padded(tokenizer):
    tokenizer.enable_padding(length=64, pad_id=257, pad_token="<|im_start|>")


def with_bos(tokenizer):
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )


def normalised(tokenizer):
    tokenizer.normalizer = normalizers.NFC()


CASES = {
    "plain": (lambda tokenizer: None, {}),
    "truncation": (truncated, {}),
    "padding": (padded, {}),
    "both": (lambda tokenizer: (truncated(tokenizer), padded(tokenizer)), {}),
    "bos": (with_bos, {}),
    "bos-off": (with_bos, {"add_bos_token": False}),
    "bos-on": (lambda tokenizer: None, {"add_bos_token": True}),
    "eos-on": (lambda tokenizer: None, {"add_eos_token": True}),
    "bos-and-eos": (with_bos, {"add_bos_token": True, "add_eos_token": True}),
    "nfc": (normalised, {}),
    "max-length": (lambda tokenizer: None, {"model_max_length": 16}),
    "clean-up": (lambda tokenizer: None, {"clean_up_tokenization_spaces": True}),
    "added": (lambda tokenizer: None, {"added_tokens_decoder": {"259": {"content": "<|extra|>", "special": True}}}),
    "strips": (
        lambda tokenizer: None,
        {"added_tokens_decoder": {"259": {"content": "<|extra|>", "special": False, "lstrip": True, "rstrip": True}}},
    ),
    "bos-token-in-words": (lambda tokenizer: None, {"bos_token": {"content": "<|endoftext|>", "__type": "AddedToken"}}),
    "split-special": (lambda tokenizer: None, {"split_special_tokens": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_text_has_the_ids_of_transformers(case, tokenizer_dir, tmp_path):
    change, config = CASES[case]
    inner = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    change(inner)
    inner.save(str(tmp_path / "tokenizer.json"))
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special | config))
    ours, theirs = Tokenizer.from_dir(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = theirs(text, padding=False, truncation=False)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False), text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text


def test_a_long_prompt_is_whole_whatever_the_file_says(tokenizer_dir, tmp_path):
    inner = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    truncated(inner)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_dir(tmp_path).encode("word " * 3000)) == 15000


def test_a_config_that_contradicts_the_tokenizer_is_refused(tokenizer_dir, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    config = {"added_tokens_decoder": {"300": {"content": "<|extra|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match=r"'<\|extra\|>' the id 300, tokenizer.json 259"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("prompt", ["Hello", "a word", "Hello a", ""])
@pytest.mark.parametrize("answer", [" word", " a a", "a", " Hello, word"])
def test_the_first_space_of_an_answer_is_kept(prompt, answer):
    """Decoders of SentencePiece drop the first space of a text, but an answer is not the start of one."""
    tokenizer = Tokenizer(sentencepiece_like(), None)
    prompt_ids = [1, *tokenizer.encode(prompt, add_special_tokens=False)]
    ids = tokenizer.encode("a" + answer, add_special_tokens=False)[1:]
    stream = tokenizer.stream(prompt_ids)
    found = "".join([*(stream.push([i]) for i in ids), stream.flush()])
    assert found == tokenizer.decode(prompt_ids + ids)[len(tokenizer.decode(prompt_ids)) :]
    if prompt:
        assert found == answer


def test_a_character_that_the_prompt_left_unfinished_comes_with_the_answer(tokenizer):
    ids = tokenizer.encode("né🙂!", add_special_tokens=False)
    for cut in range(1, len(ids)):
        stream = tokenizer.stream(ids[:cut])
        found = "".join([*(stream.push([i]) for i in ids[cut:]), stream.flush()])
        assert "né🙂!".endswith(found)
        assert tokenizer.decode(ids[:cut]).rstrip("\N{REPLACEMENT CHARACTER}") + found == "né🙂!"


@pytest.mark.parametrize(
    ("normalizer", "expected"), [(None, 13), (normalizers.NFC(), 3 * 13), (normalizers.Strip(), None)]
)
def test_most_bytes_of_a_token(tokenizer_dir, normalizer, expected):
    """The longest token is `<|endoftext|>`."""
    inner = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    if normalizer is not None:
        inner.normalizer = normalizer
    assert Tokenizer(inner, None).max_token_bytes == expected
    assert Tokenizer(sentencepiece_like(), None).max_token_bytes is None
