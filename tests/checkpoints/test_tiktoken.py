"""Llama 3's original tokenizer.model: tiktoken's own ids, other files of ranks refused."""

from __future__ import annotations

import base64
import itertools
import json
import random
import shutil

import pytest
import tiktoken
from helpers import texts
from motet.runtime.checkpoints.store import pull
from motet.runtime.checkpoints.tiktoken_tokenizer import is_tiktoken, write_tiktoken
from motet.runtime.errors import DataError, MotetError, UnsupportedModelError
from motet.runtime.text.tokenizer import Tokenizer as ServedTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

DOCS = texts.DOCS.replace("<|", "< |")  # texts of special tokens are another matter
# As Llama 3's reference code has it.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train(size):
    """Tokens in the order of their ranks: trained on the documentation, then pairs of tokens that are none yet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=min(size, 3000), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(DOCS.splitlines(keepends=True), trainer)
    by_id = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    byte = {chr(b): b for b in printable} | {
        chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)
    }
    tokens = dict.fromkeys(bytes(byte[letter] for letter in token) for token in by_id)
    draw = random.Random(1)
    known = [token for token in tokens if token.isalpha()]
    pairs = (b"".join(pair) for pair in itertools.product(known, draw.sample(known, min(300, len(known)))))
    for token in pairs:
        if len(tokens) >= size:
            break
        tokens.setdefault(token)
    return list(tokens)[:size]


def write(path, tokens):
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """A directory with 128,000 ranks, and tiktoken's encoding of them."""
    folder, tokens = tmp_path_factory.mktemp("llama3"), train(128_000)
    assert len(tokens) == 128_000
    write(folder / "tokenizer.model", tokens)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    special = {"<|begin_of_text|>": 128_000, "<|start_header_id|>": 128_006, "<|eot_id|>": 128_009}
    return folder, tiktoken.Encoding("llama3", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)


@pytest.mark.slow
def test_ids_are_tiktokens(llama3, tmp_path):
    folder, reference = llama3
    assert is_tiktoken(folder / "tokenizer.model")
    write_tiktoken(folder, tmp_path)
    served = ServedTokenizer.from_dir(tmp_path)
    draw = random.Random(2)
    places = [draw.randrange(len(DOCS)) for _ in range(300)]
    for text in [*texts.TEXTS, *(DOCS[at : at + draw.randint(1, 200)] for at in places)]:
        expected = reference.encode_ordinary(text)
        assert served.encode(text) == [128_000, *expected], text
        assert served.decode(expected) == text
    text = "<|start_header_id|>user\n\nHi<|eot_id|>"
    assert served.encode(text)[1:] == reference.encode(text, allowed_special="all")
    assert (served.vocab_size, served.eos_token_id) == (128_256, 128_001)
    assert served.token_id("<|reserved_special_token_4|>") == 128_008 and served.token_id("<|eom_id|>") is None


@pytest.mark.slow
def test_names_of_special_tokens(llama3, tmp_path):
    """Llama 3.1 gave names to three more; the files may declare them otherwise."""
    source = tmp_path / "m"
    shutil.copytree(llama3[0], source)
    (source / "config.json").write_text(json.dumps({"model_type": "llama", "rope_scaling": {"rope_type": "llama3"}}))
    declared = {"128011": {"content": "<|mine|>", "special": True}}
    (source / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": declared, "eos_token": "<|eot_id|>"})
    )
    write_tiktoken(source, tmp_path)
    served = ServedTokenizer.from_dir(tmp_path)
    names = ("<|finetune_right_pad_id|>", "<|eom_id|>", "<|python_tag|>", "<|mine|>", "<|reserved_special_token_247|>")
    assert [served.token_id(name) for name in names] == [128_004, 128_008, 128_010, 128_011, 128_255]
    assert served.eos_token_id == 128_009


@pytest.mark.slow
def test_other_files_of_ranks_are_refused(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("MOTET_HOME", str(tmp_path / "home"))
    source = tmp_path / "m"
    shutil.copytree(tiny_model_dir("llama"), source)
    (source / "tokenizer.json").unlink()
    write(source / "qwen.tiktoken", train(300))
    with pytest.raises(UnsupportedModelError, match=r"has qwen\.tiktoken, which holds ranks and not"):
        pull(str(source), show_progress=False)
    (source / "qwen.tiktoken").rename(source / "tokenizer.model")
    with pytest.raises(UnsupportedModelError, match="ranks of 300 tokens and not the expression"):
        pull(str(source), show_progress=False)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("???? 300", "damaged in line 301"),
        ("YWI= x", "line 301"),
        ("YWI= 5", "a rank of its own"),
        ("YWI= 999", "without gaps"),
        ("YQ== 300", "without gaps, and a token has one"),
        (base64.b64encode(b"x" * 600).decode() + " 300", "1 to 512 bytes"),
    ],
)
def test_damage(tmp_path, line, says):
    write(tmp_path / "tokenizer.model", train(300))
    with (tmp_path / "tokenizer.model").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=says):
        write_tiktoken(tmp_path, tmp_path)


def test_missing_bytes(tmp_path):
    write(tmp_path / "tokenizer.model", train(300)[1:])
    with pytest.raises(MotetError, match="single bytes"):
        write_tiktoken(tmp_path, tmp_path)
