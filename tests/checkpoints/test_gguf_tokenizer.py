"""Tokenizers of GGUF files: SentencePiece's own ids, words cut as the file's name for it says, and damage."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from motet.runtime.checkpoints.gguf_tokenizer import end_tokens, write_tokenizer
from motet.runtime.errors import DataError, UnsupportedModelError
from motet.runtime.text.tokenizer import Tokenizer as ServedTokenizer
from tokenizers import Tokenizer, pre_tokenizers

ROOT = Path(__file__).parents[2]
TEXTS = [
    *(
        "Hello  world",
        " leading",
        "trailing  ",
        "",
        " ",
        "a\nb\n\nc",
        "tab\tand 12345.67",
        "naïve Straße Ωmega 日本語 😀👍🏽",
    ),
    *("<user>Hi there</s> and <unk>", "don't we'll I'VE", "x" * 40, "def f(x):\n    return x ** 2\n"),
]


def metadata_of(model):
    """What llama.cpp's converter writes of a SentencePiece model."""
    ids = range(model.get_piece_size())
    types = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    types = [4 if model.id_to_piece(i) == "<user>" else kind for i, kind in zip(ids, types)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [model.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
    }


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no-prefix"])
def trained(request):
    """A SentencePiece model of this project's documentation, with a symbol of the user's."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=1200,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<user>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()), request.param


def test_sentencepiece(trained, tmp_path):
    """Texts without special tokens: a symbol of the user's takes the prefix of what follows it, and neither takes any other."""
    model, prefix = trained
    metadata = metadata_of(model) | {"tokenizer.ggml.add_space_prefix": prefix, "tokenizer.chat_template": "{{ x }}"}
    write_tokenizer(tmp_path, metadata, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    docs = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    for text in [*TEXTS, *docs]:
        if any(symbol in text for symbol in ("<user>", "</s>", "<unk>", "<s>")):
            continue
        expected = model.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected, text[:80]
        assert tokenizer.decode(expected) == model.decode(expected)
    assert tokenizer.encode("one").ids[0] == model.bos_id()
    assert tokenizer.encode("</s><user>", add_special_tokens=False).ids == [model.eos_id(), model.piece_to_id("<user>")]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ x }}"
    assert ServedTokenizer.from_dir(tmp_path) is not None


def test_merges_go_before_scores_that_say_nothing(trained, tmp_path):
    model, prefix = trained
    metadata = metadata_of(model) | {"tokenizer.ggml.add_space_prefix": prefix}
    same = metadata | {"tokenizer.ggml.scores": [-1000.0] * model.get_piece_size()}
    with pytest.raises(DataError, match="the same score for each token"):
        write_tokenizer(tmp_path, same, tmp_path)
    with pytest.raises(DataError, match="no finite numbers"):
        write_tokenizer(
            tmp_path, metadata | {"tokenizer.ggml.scores": [float("nan")] * model.get_piece_size()}, tmp_path
        )
    write_tokenizer(tmp_path, metadata, tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    write_tokenizer(tmp_path, same | {"tokenizer.ggml.merges": [" ".join(pair) for pair in merges]}, tmp_path)
    text = (ROOT / "docs" / "cpu.md").read_text(encoding="utf-8")
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids[1:] == model.encode(text)


def test_composed_letters(tmp_path):
    """Qwen's tokenizer composes a letter and its accent, Llama's does not."""
    for cut, length in (("qwen2", 2), ("llama-bpe", 3)):
        write_tokenizer(tmp_path, byte_level(cut, add_bos_token=False), tmp_path)
        assert len(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("e\u0301").ids) == length


def test_a_named_token_is_one_whatever_its_type(tmp_path):
    write_tokenizer(tmp_path, byte_level("gpt-2", token_type=[1] * 261), tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a<|end|>").ids[-1] == 256


@pytest.mark.parametrize(
    ("kind", "template", "ends"),
    [
        (3, "{{ m }}<|im_end|>", [256, 257]),
        (4, "<|im_end|>", [256, 257]),
        (1, "<|im_end|>", [256]),
        (3, "{{ m }}", [256]),
        (3, None, [256]),
    ],
)
def test_ends_that_the_template_writes_end_an_answer(kind, template, ends):
    """As llama.cpp has it, which knows them by their text; here the template has to write them."""
    metadata = byte_level("gpt-2")
    metadata["tokenizer.ggml.tokens"][257] = "<|im_end|>"
    metadata["tokenizer.ggml.token_type"][257] = kind
    metadata |= {} if template is None else {"tokenizer.chat_template": template}
    assert end_tokens(metadata) == ends
    assert end_tokens(metadata | {"tokenizer.ggml.eot_token_id": 257}) == [256, 257]


def byte_level(cut, **changes):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": cut,
        "tokenizer.ggml.tokens": [*letters, "<|end|>", "ab", "abc", "Ġa", "Ġab"],
        "tokenizer.ggml.token_type": [1] * 256 + [3, 1, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b", "ab c", "Ġ a"],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 256,
        **{f"tokenizer.ggml.{name}": value for name, value in changes.items()},
    }


TEXT = "I'VE  seen 12345 cats,\n\n  ab's"
WORDS = {
    "gpt-2": ["I", "'", "VE", " ", " seen", " 12345", " cats", ",", "\n\n ", " ab", "'s"],
    "smollm": ["I", "'", "VE", " ", " seen", " ", *"12345", " cats", ",", "\n\n ", " ab", "'s"],
    "llama-bpe": ["I", "'VE", " ", " seen", " ", "123", "45", " cats", ",\n\n", " ", " ab", "'s"],
    "qwen2": ["I", "'VE", " ", " seen", " ", *"12345", " cats", ",\n\n", " ", " ab", "'s"],
}


WORDS["falcon"] = ["I", "'", "VE", " ", " seen", " ", "123", "45", " cats", ",", "\n\n ", " ab", "'", "s"]
WORDS["gpt-4o"] = ["I'VE", " ", " seen", " ", "123", "45", " cats", ",\n\n", " ", " ab's"]


@pytest.mark.parametrize("cut", WORDS)
def test_words_are_cut_as_the_file_says(tmp_path, cut):
    write_tokenizer(tmp_path, byte_level(cut), tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    found = [TEXT[first:last] for _, (first, last) in tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert found == WORDS[cut]
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.encode("abc").ids[0] == 256) == (cut == "llama-bpe")  # it begins each text, unless the file says


def test_letters_of_two_cases(tmp_path):
    write_tokenizer(tmp_path, byte_level("gpt-4o"), tmp_path)
    cut = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).pre_tokenizer.pre_tokenize_str
    text = "camelCase XMLHttp Été//\n"
    expected = ["camel", "Case", " XMLHttp", " Été", "//\n"]
    assert [text[first:last] for _, (first, last) in cut(text)] == expected


def test_spaces_after_the_tokens_of_phi_3(trained, tmp_path):
    """They belong to the token, but after those that begin or end a text."""
    model, prefix = trained
    metadata = metadata_of(model) | {"tokenizer.ggml.add_space_prefix": prefix}
    for name, strips in (("Phi-3 mini", True), ("Gemma", False)):
        write_tokenizer(tmp_path, metadata | {"general.name": name}, tmp_path)
        encode = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode
        alone, spaced = (encode(f"<user>{spaces}one", add_special_tokens=False).ids for spaces in ("", " \n "))
        assert (alone == spaced) == strips
        assert encode("<s>  one").ids != encode("<s>one").ids


def test_a_word_that_is_a_token(tmp_path):
    """Llama 3 takes it whole, though no merges lead to it."""
    for cut, expected in (("llama-bpe", [260]), ("qwen2", [259, ord("b") - ord("!")])):
        write_tokenizer(tmp_path, byte_level(cut, add_bos_token=False), tmp_path)
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        tokens = [tokenizer.id_to_token(i) for i in tokenizer.encode(" ab").ids]
        assert tokens == (["Ġab"] if expected == [260] else ["Ġ", "ab"])


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        (byte_level("deepseek-v3"), UnsupportedModelError, "cuts words by 'deepseek-v3'"),
        (byte_level("gpt-2", model="bert"), UnsupportedModelError, "of the kind 'bert'"),
        (byte_level("default"), UnsupportedModelError, "cuts words by 'default'"),
        (byte_level("gpt-2", add_sep_token=True), UnsupportedModelError, "add_sep_token=true"),
        (byte_level("gpt-2", add_space_prefix=True), UnsupportedModelError, "add_space_prefix=true"),
        (byte_level("gpt-2", tokens=5), DataError, "tokens that are no list of str"),
        (byte_level("gpt-2", token_type=[9] * 261), DataError, "token types outside of 1…6"),
        (byte_level("gpt-2", bos_token_id="x"), DataError, "bos_token_id='x'; it must be of the type int"),
        (byte_level("gpt-2", add_bos_token="false"), DataError, "add_bos_token='false'"),
        (byte_level(["x"]), UnsupportedModelError, "cuts words by"),
        (byte_level("llama-bpe", bos_token_id=None), DataError, "adds bos_token to each text"),
        (byte_level("gpt-2", merges=["a z z"]), DataError, "merges of tokens that it does not have"),
        (byte_level("gpt-2", merges=["ab"]), DataError, "merges of tokens that it does not have"),
        (byte_level("gpt-2", token_type=[1]), DataError, "and 1 types"),
        (
            byte_level("gpt-2", tokens=["a", "a"], token_type=[1, 1], bos_token_id=None, eos_token_id=0),
            DataError,
            "2 tokens, 1 different ones",
        ),
        (byte_level("gpt-2", eos_token_id=900), DataError, "eos_token_id=900; there are 261 tokens"),
        (
            byte_level("gpt-2", add_bos_token=True, bos_token_id=None),
            DataError,
            "adds bos_token to each text, and it is ''",
        ),
        (byte_level("gpt-2", model="llama"), DataError, "lacks tokens of bytes"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, metadata, error, message):
    with pytest.raises(error, match=message):
        write_tokenizer(tmp_path / "m.gguf", metadata, tmp_path)
