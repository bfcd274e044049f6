"""A model directory's SentencePiece tokenizer.model: SentencePiece's own ids, transformers' for added tokens, and damage."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil

import pytest
import sentencepiece
from helpers import texts
from motet.runtime.checkpoints.sentencepiece_tokenizer import write_sentencepiece
from motet.runtime.checkpoints.store import pull
from motet.runtime.errors import DataError, MotetError, NotFoundError, UnsupportedModelError
from motet.runtime.text.tokenizer import Tokenizer as ServedTokenizer
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

TEXTS = [
    *texts.TEXTS,
    *(
        "<0x41> a<0x0A>b <0xZZ>",
        "▁ ▁▁a ▁",
        "ab<user>cd <user> <user><user",
        "end ▁",
        "\n\n\n  \n\n x",
    ),
    *("<us<user>er>", "日本<user>語", "##" * 9 + " ###"),
]


def random_texts(count):
    """Pieces of the documentation, with what is unusual between them."""
    draw = random.Random(5)
    strange = ["  ", " ", "\n\n", "▁", "<user>", "##", "é", "日", "😀", "\t", "<0x41>", "", "ab", "\u0301"]
    found = []
    for _ in range(count):
        parts = []
        for _ in range(draw.randint(1, 6)):
            at = draw.randrange(len(texts.DOCS))
            parts += [texts.DOCS[at : at + draw.randint(0, 40)], draw.choice(strange)]
        found.append("".join(parts))
    return found


def train(**options):
    model = io.BytesIO()
    options = {"vocab_size": 1200, "normalization_rule_name": "identity", "character_coverage": 0.999, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts.DOCS.splitlines()),
        model_writer=model,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return model.getvalue()


def converted(folder, model, **files):
    """The tokenizer.json of a directory with this model; `files`: name → what is in the JSON file of that name."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    (folder / "out").mkdir(exist_ok=True)
    write_sentencepiece(folder, folder / "out")
    return Tokenizer.from_file(str(folder / "out" / "tokenizer.json"))


def is_tie(reference, expected, found):
    """Whether the same pieces stand in another order: both sums of scores are the same, and rounding errors choose."""
    return sorted(expected) == sorted(found) and reference.decode(expected) == reference.decode(found)


OPTIONS = {
    "plain": {},
    "bytes": {"byte_fallback": True},
    "llama": {"byte_fallback": True, "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    "gemma": {
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "split_digits": True,
        "user_defined_symbols": ["<user>", "▁▁", "▁▁▁", "\n\n", "##", "###"],
    },
    "symbols": {"user_defined_symbols": ["<user>", "##"]},
}


CASES = [
    pytest.param(kind, name, id=f"{kind}-{name}")
    for kind in ("bpe", "unigram")
    for name, options in OPTIONS.items()
    if not (kind == "unigram" and "user_defined_symbols" in options)
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_ids_are_sentencepieces(tmp_path, kind, name):
    model = train(model_type=kind, **OPTIONS[name])
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = converted(tmp_path / "m", model)
    wrong = []
    for text in TEXTS + random_texts(400):
        expected, found = reference.encode(text), tokenizer.encode(text, add_special_tokens=False).ids
        if found != expected and not (kind == "unigram" and is_tie(reference, expected, found)):
            wrong.append((text, reference.id_to_piece(expected), [tokenizer.id_to_token(i) for i in found]))
        elif reference.unk_id() not in expected:
            assert tokenizer.decode(found) == reference.decode(expected), text
    assert not wrong, (len(wrong), wrong[:5])


@pytest.fixture(scope="module")
def llama():
    """A model with Llama 2's settings."""
    return train(model_type="bpe", vocab_size=900, **OPTIONS["llama"])


LLAMA_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "normalized": False, "__type": "AddedToken"},
    "unk_token": "<unk>",
    "legacy": False,
    "sp_model_kwargs": {},
    "chat_template": "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}",
}
WITH_ADDED = [
    "a<|user|>Hi there</s>x",
    "<s>no <|pad|>b",
    "<|user|><|user|>two  spaces ",
    "Hello",
    "a</s>b",
    "x\n\n<|user|>\n",
]
AFTER_A_SPACE = ["a<|user|> Hi there</s>  x", "Hi <s> a", "b <|pad|> "]


def with_added(folder, llama, **config):
    """The directory's tokenizer as Motet reads it, and as transformers does: two added tokens, declared in the config."""
    import transformers

    count = sentencepiece.SentencePieceProcessor(model_proto=llama).get_piece_size()
    tokens = {count: ("<|user|>", True), count + 1: ("<|pad|>", False)}
    declared = {
        str(i): {"content": text, "special": special, "normalized": False} for i, (text, special) in tokens.items()
    }
    config = LLAMA_CONFIG | {"added_tokens_decoder": declared} | config
    converted(folder, llama, tokenizer_config=config, added_tokens={text: i for i, (text, _) in tokens.items()})
    return ServedTokenizer.from_dir(folder / "out"), transformers.LlamaTokenizer.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True)])
def test_added_tokens_are_transformers(tmp_path, llama, legacy, bos, eos):
    """With tokens before and after each text."""
    served, reference = with_added(tmp_path, llama, legacy=legacy, add_bos_token=bos, add_eos_token=eos)
    assert served.token_id("<|pad|>") == served.vocab_size - 1
    assert served.eos_token_id == reference.eos_token_id == 2
    texts = WITH_ADDED + [text for text in TEXTS if not text.startswith((" ", "▁"))] + ([] if legacy else AFTER_A_SPACE)
    for text in texts:
        assert served.encode(text) == reference(text)["input_ids"], text
    user = served.token_id("<|user|>")
    assert served.encode_chat([{"role": "user", "content": "Hi<|user|>"}]).count(user) == 1


def test_legacy_texts_between_added_tokens_are_sentencepieces(tmp_path, llama):
    """Each has the prefix, before a space too; transformers 4 had it so."""
    reference = sentencepiece.SentencePieceProcessor(model_proto=llama)
    added = {"<|user|>": reference.get_piece_size()}
    converted(tmp_path, llama, added_tokens=added)
    found = ServedTokenizer.from_dir(tmp_path / "out").encode("a<|user|> b</s>  c")
    expected = [1, *reference.encode("a"), *added.values(), *reference.encode(" b"), 2, *reference.encode("  c")]
    assert found == expected


def changed(model, **changes):
    """The model with other values: `piece`, a change of one piece, or "spec.field"."""
    found = sentencepiece_model_pb2.ModelProto.FromString(model)
    for name, value in changes.items():
        part, _, field = name.partition("__")
        target = found.pieces[500] if part == "piece" else getattr(found, part)
        setattr(target, field, value)
    return found.SerializeToString()


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"trainer_spec__treat_whitespace_as_suffix": True}, UnsupportedModelError, "treat_whitespace_as_suffix"),
        ({"normalizer_spec__escape_whitespaces": False}, UnsupportedModelError, "escape_whitespaces"),
        ({"normalizer_spec__precompiled_charsmap": b"abc"}, UnsupportedModelError, "rewrites characters by a table"),
        ({"denormalizer_spec__precompiled_charsmap": b"abc"}, UnsupportedModelError, "denormaliser"),
        ({"trainer_spec__model_type": 3}, UnsupportedModelError, "type 3"),
        ({"trainer_spec__byte_fallback": False}, DataError, "256 pieces of bytes"),
        ({"piece__piece": "<0x41>"}, DataError, "different ones"),
        ({"piece__piece": ""}, DataError, "none is empty"),
        ({"piece__piece": "a b"}, DataError, "a space"),
        ({"piece__piece": "x" * 600}, DataError, "600 characters; the limit"),
        ({"piece__score": float("nan")}, DataError, "no finite"),
        ({"piece__type": 5}, UnsupportedModelError, "unused"),
        ({"piece__type": 2}, DataError, "2 unknown pieces"),
        ({"piece__score": -1.0}, UnsupportedModelError, "the score of another one"),
    ],
)
def test_what_is_not_read_is_said(tmp_path, llama, changes, error, says):
    with pytest.raises(error, match=says):
        converted(tmp_path, changed(llama, **changes))


@pytest.mark.parametrize(
    ("config", "added", "error", "says"),
    [
        ({"tokenizer_class": "XGLMTokenizer"}, {}, UnsupportedModelError, "XGLMTokenizer"),
        ({"sp_model_kwargs": {"enable_sampling": True}}, {}, UnsupportedModelError, "sp_model_kwargs"),
        ({"legacy": "no"}, {}, DataError, "legacy"),
        ({"add_bos_token": 1}, {}, DataError, "add_bos_token"),
        ({"bos_token": "<none>"}, {}, DataError, "<none>"),
        ({"bos_token": None, "add_bos_token": True}, {}, DataError, "adds bos_token"),
        ({"eos_token": 5}, {}, DataError, "eos_token=5"),
        ({"additional_special_tokens": ["<gone>"]}, {}, DataError, "<gone>"),
        ({"added_tokens_decoder": []}, {}, DataError, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"x": "a"}}, {}, DataError, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"7": {"content": "<|a|>"}}}, {}, DataError, "the id 7"),
        ({}, {"<|a|>": 5000}, DataError, "no gaps"),
        ({}, {"<|a|>": "x"}, DataError, "added_tokens.json"),
    ],
)
def test_settings_that_contradict(tmp_path, llama, config, added, error, says):
    with pytest.raises(error, match=says):
        converted(tmp_path, llama, tokenizer_config=LLAMA_CONFIG | config, added_tokens=added)


def test_damage_is_a_typed_error(tmp_path, llama):
    draw = random.Random(3)
    for _ in range(60):
        data = bytearray(llama)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        with contextlib.suppress(MotetError):
            converted(tmp_path, bytes(data[: draw.choice([len(data), draw.randrange(len(data))])]))
    with pytest.raises(DataError, match="no SentencePiece model"):
        converted(tmp_path, b"\xff" * 50)


def test_unigram_symbols_are_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="user-defined"):
        converted(tmp_path, train(model_type="unigram", vocab_size=300, user_defined_symbols=["<user>"]))


@pytest.mark.slow
def test_pieces_that_a_template_mentions_are_sentencepieces(tmp_path):
    """Spaces in front of and around them are as SentencePiece has them, wherever the template stands."""
    model = train(model_type="bpe", user_defined_symbols=["\n", "[X]"])
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    template = "{% for message in messages %}[X]\n{{ message['content'] }}{% endfor %}"
    tokenizer = converted(tmp_path / "m", model, tokenizer_config={"chat_template": template})
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "chat_template.jinja").write_text(template)
    for own in (tokenizer, converted(tmp_path / "n", model)):
        for text in ("a\nhe", "a [X] he", "[X]", "  a  [X]\n he"):
            assert own.encode(text, add_special_tokens=False).ids == reference.encode(text), text


def test_a_pulled_directory_has_a_tokenizer_json(tmp_path, tiny_model_dir, llama, monkeypatch):
    """Made of tokenizer.model; a change of what it was made of is seen. One that is there already is kept."""
    monkeypatch.setenv("MOTET_HOME", str(tmp_path / "home"))
    source = tmp_path / "source"
    shutil.copytree(tiny_model_dir("llama"), source)
    given = (source / "tokenizer.json").read_bytes()
    (source / "tokenizer.model").write_bytes(llama)
    assert (pull(str(source), show_progress=False) / "tokenizer.json").read_bytes() == given
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).unlink(missing_ok=True)
    (source / "tokenizer_config.json").write_text(json.dumps(LLAMA_CONFIG))
    target = pull(str(source), show_progress=False)
    assert not (target / "tokenizer.model").exists()
    reference = sentencepiece.SentencePieceProcessor(model_proto=llama)
    served = ServedTokenizer.from_dir(target)
    assert served.encode("Hello there") == [1, *reference.encode("Hello there")] and served.has_chat_template
    (source / "special_tokens_map.json").write_text(json.dumps({"pad_token": "</s>"}))
    pull(str(source), show_progress=False)
    assert json.loads((target / "tokenizer_config.json").read_text())["pad_token"] == "</s>"
    (source / "tokenizer.model").unlink()
    with pytest.raises(NotFoundError, match="and no tokenizer"):
        pull(str(source), show_progress=False)
