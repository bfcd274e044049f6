"""A trimmed vocabulary: the corpus is cut as before, every other text is still spelled, and the model says the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from helpers.models import write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from motet.export.prune.params import PruneParams
from motet.export.prune.path import Paths
from motet.export.prune.prune import prune
from motet.export.prune.token_ids import ids_in, renumbered_ids
from motet.export.prune.vocabulary import trim
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import eos_token_ids, read_config
from motet.runtime.checkpoints.pruned import origins_of, read_record
from motet.runtime.errors import BundleError, ConfigError, DataError, NotFoundError, UnsupportedModelError
from motet.runtime.text.tokenizer import Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

DOCS = Path(__file__).parents[2] / "docs"
TRAINED_ON = [path.read_text() for path in sorted(DOCS.glob("*.md"))]
CORPUS = "The trunk is run once.\n\nEvery member has a tail, naïve or not: 1 + 2 = 3 → 日本.\n  indented\n"
MARKED = "<|im_start|>The trunk<|im_end|>"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(ignore_merges=False):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINED_ON, trainer)
    if not ignore_merges:
        return tokenizer
    state = json.loads(tokenizer.to_str())
    state["model"]["ignore_merges"] = True
    state["model"]["vocab"][" unreachable"] = len(state["model"]["vocab"])  # no merge leads to it
    state["model"]["vocab"]["Ġmember"] = state["model"]["vocab"].pop("Ġmember", len(state["model"]["vocab"]))
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def sentencepiece_bpe():
    """As Llama 2: spaces are ▁, bytes where there is no letter, a token in front of each text."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False)
    tokenizer.train_from_iterator([word for text in TRAINED_ON for word in text.split("\n")], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in BYTES]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens(SPECIAL)
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return tokenizer


def unigram():
    learned = tokenizers.Tokenizer(models.Unigram())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=900, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    learned.train_from_iterator(TRAINED_ON, trainer)
    pieces = [tuple(piece) for piece in json.loads(learned.to_str())["model"]["vocab"]]
    vocab = [pieces[0], *((piece, -20.0) for piece in BYTES), *pieces[1:]]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    return tokenizer


KINDS = {
    "byte-level": byte_level,
    "ignore-merges": lambda: byte_level(True),
    "sentencepiece-bpe": sentencepiece_bpe,
    "unigram": unigram,
}


def state_of(tokenizer):
    return json.loads(tokenizer.to_str())


def trimmed(tokenizer, *texts):
    found = trim(state_of(tokenizer), lambda: texts)
    return tokenizers.Tokenizer.from_str(json.dumps(found.tokenizer)), found.kept


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    """(tokenizer, the trimmed one, new id → old id)."""
    before = KINDS[request.param]()
    return before, *trimmed(before, CORPUS, *CORPUS.split("\n"), MARKED)


def test_the_corpus_is_cut_as_before(pair):
    before, after, kept = pair
    assert len(kept) == after.get_vocab_size() < before.get_vocab_size()
    for text in (CORPUS, *CORPUS.split("\n"), MARKED):
        first, second = before.encode(text), after.encode(text)
        assert first.tokens == second.tokens
        assert [kept[token_id] for token_id in second.ids] == first.ids
        assert after.decode(second.ids, skip_special_tokens=False) == before.decode(
            first.ids, skip_special_tokens=False
        )
    for token in SPECIAL:
        assert kept[after.token_to_id(token)] == before.token_to_id(token)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_is_still_spelled(pair, text):
    before, after, _ = pair
    assert after.decode(after.encode(text).ids) == before.decode(before.encode(text).ids)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(texts=st.lists(st.text(alphabet=" \nabcdetrunk<|>0ñ日", min_size=1), min_size=1))
def test_any_corpus_is_cut_as_before(texts):
    """`trim` itself compares, and raises if it is not so."""
    for kind in ("byte-level", "sentencepiece-bpe", "unigram"):
        before = _MADE.setdefault(kind, KINDS[kind]())
        after, kept = trimmed(before, *texts)
        for text in texts:
            assert [kept[token_id] for token_id in after.encode(text).ids] == before.encode(text).ids


_MADE: dict[str, tokenizers.Tokenizer] = {}


def test_a_token_keeps_the_tokens_on_its_path():
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("e", "l")]
    path = Paths(merges).of("hello")
    assert path is not None
    assert path.tokens == {*"hello", "he", "ll", "hell", "hello"} and path.ranks == {0, 1, 2, 3}
    assert Paths(merges).of("hel") is None  # "he", "l"
    assert Paths([("a", "a"), ("aa", "a")]).of("aaa").tokens == {"a", "aa", "aaa"}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda s: s["model"].update(type="WordPiece"), UnsupportedModelError, "WordPiece"),
        (lambda s: s["model"].update(dropout=0.1), UnsupportedModelError, "dropout"),
        (lambda s: s["model"].update(end_of_word_suffix="</w>"), UnsupportedModelError, "end_of_word_suffix"),
        (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), UnsupportedModelError, "byte"),
        (lambda s: s["model"]["merges"].append(["nobody", "knows"]), BundleError, "damaged"),
    ],
)
def test_tokenizers_that_are_refused(change, error, said):
    state = state_of(byte_level())
    change(state)
    with pytest.raises(error, match=said):
        trim(state, lambda: [CORPUS])


def test_characters_that_cannot_be_spelled_are_named():
    state = state_of(byte_level())
    gone = {letter: token_id for letter, token_id in state["model"]["vocab"].items() if "ä" not in letter}  # byte 0xE4
    state["model"]["vocab"] = {letter: index for index, letter in enumerate(gone)}
    merges = state["model"]["merges"]
    state["model"]["merges"] = [pair for pair in merges if all(part in gone for part in (*pair, "".join(pair)))]
    state["added_tokens"] = []
    with pytest.raises(DataError, match=r"'中' \(U\+4E2D\)"):
        trim(state, lambda: ["all 中"])
    for texts in ((), ("",)):
        with pytest.raises(DataError, match="empty"):
            trim(state, lambda texts=texts: texts)


# ---- whole models ------------------------------------------------------------------------------------------------------


def write_with(path, family, tokenizer, **ids):
    """A tiny model with this tokenizer, and rows of embeddings beyond it as models have them."""
    import helpers.models as tiny

    size, tiny.VOCAB_SIZE = tiny.VOCAB_SIZE, tokenizer.get_vocab_size() + 13
    try:
        write_model(path, family)
    finally:
        tiny.VOCAB_SIZE = size
    tokenizer.save(str(path / "tokenizer.json"))
    end = tokenizer.token_to_id("<|im_end|>")
    content = {"content": "<|im_end|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    settings = {"eos_token": "<|im_end|>", "added_tokens_decoder": {str(end): {**content, "single_word": False}}}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((path / "config.json").read_text())
    config |= {"eos_token_id": [end], "bos_token_id": 1, "pad_token_id": None}
    (path / "config.json").write_text(json.dumps(config | ids))
    other = {"eos_token_id": end, "suppress_tokens": [end, 700], "bad_words_ids": [[700, 701], [end]]}
    (path / "generation_config.json").write_text(json.dumps(other))
    return path


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(CORPUS)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "byte-level"), ("llama-untied", "sentencepiece-bpe"), ("gemma2", "unigram"), ("gpt2", "byte-level")],
)
def test_a_model_says_the_same_with_fewer_tokens(tmp_path, corpus, family, kind):
    model, out = write_with(tmp_path / "m", family, KINDS[kind]()), tmp_path / "out"
    record = prune(model, out, PruneParams(), vocabulary=[corpus])
    kept = torch.tensor(origins_of(read_record(out))[0].tokens)
    before, after = Tokenizer.from_dir(model), Tokenizer.from_dir(out)
    assert record["vocabulary"]["after"] == len(kept) == read_config(out).vocab_size
    ids = torch.tensor([after.encode_chat([{"role": "user", "content": CORPUS}])])
    assert kept[ids][0].tolist() == before.encode_chat([{"role": "user", "content": CORPUS}])
    with torch.no_grad():
        expected = Decoder.from_dir(model)(kept[ids])[..., kept]
        found = Decoder.from_dir(out)(ids)
        reference = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()(ids).logits
    # The same products, which a matrix of another size may sum in another order.
    assert torch.allclose(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    assert torch.allclose(reference, expected, rtol=0, atol=3e-5 * float(expected.abs().max()))
    end = after.token_id("<|im_end|>")
    assert eos_token_ids(out, after.eos_token_id) == (end,)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": end, "suppress_tokens": [end], "bad_words_ids": [[end]]}
    assert list(json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]) == [str(end)]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(out / "tokenizer.json"))
    assert fast(CORPUS)["input_ids"] == after.encode(CORPUS)


def test_settings_that_are_refused(tmp_path, corpus):
    for name, ids, error, said in (
        ("a", {"pad_token_id": -1}, BundleError, "pad_token_id is -1"),
        ("b", {"forced_bos_token_id": 10**6}, BundleError, "forced_bos_token_id"),
    ):
        model = write_with(tmp_path / name, "llama", byte_level(), **ids)
        with pytest.raises(error, match=said):
            prune(model, tmp_path / "out", PruneParams(), vocabulary=[corpus])
    model = write_with(tmp_path / "c", "llama", byte_level())
    (model / "generation_config.json").write_text(json.dumps({"sequence_bias": [[[1], 2.0]]}))
    with pytest.raises(UnsupportedModelError, match="sequence_bias"):
        prune(model, tmp_path / "out", PruneParams(), vocabulary=[corpus])
    (model / "generation_config.json").unlink()
    settings = json.loads((model / "tokenizer_config.json").read_text()) | {"split_special_tokens": True}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModelError, match="split_special_tokens=true"):
        prune(model, tmp_path / "out", PruneParams(), vocabulary=[corpus])


def test_corpora_that_are_refused(tiny_model_dir, tmp_path, corpus):
    model = tiny_model_dir("llama")
    prune(model, tmp_path / "once", PruneParams(), vocabulary=[corpus])
    assert read_config(tmp_path / "once").vocab_size == 259  # of 320, of which the tokenizer has so many
    with pytest.raises(ConfigError, match="needs all 259"):
        prune(tmp_path / "once", tmp_path / "twice", PruneParams(), vocabulary=[corpus])
    with pytest.raises(NotFoundError):
        prune(model, tmp_path / "out", PruneParams(), vocabulary=[tmp_path / "nothing.txt"])
    (tmp_path / "bytes.txt").write_bytes(b"abc\n\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        prune(model, tmp_path / "out", PruneParams(), vocabulary=[tmp_path / "bytes.txt"])
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(DataError, match="empty"):
        prune(model, tmp_path / "out", PruneParams(), vocabulary=[tmp_path / "empty.txt"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_real_tokenizer(real_model_dir, tmp_path):
    """SmolLM2's, to the documentation: every line is cut as before, and the head is less than half."""
    tokenizer = tokenizers.Tokenizer.from_file(str(real_model_dir / "tokenizer.json"))
    lines = [line for text in TRAINED_ON for line in text.split("\n")]
    after, kept = trimmed(tokenizer, *TRAINED_ON, *lines)
    assert len(kept) <= tokenizer.get_vocab_size() / 2
    for text in (*TRAINED_ON, *lines):
        ids = after.encode(text).ids
        assert [kept[token_id] for token_id in ids] == tokenizer.encode(text).ids
        assert after.decode(ids, skip_special_tokens=False) == text


def test_other_objects_are_left_as_they_are():
    values = {"x": {"added_tokens_decoder": {"5": {}}}}
    assert renumbered_ids(values, {1: 0}) == values


def test_ids_in_nested_settings_and_in_lists_with_gaps():
    values = {"eos_token_id": [2, None], "task_specific_params": {"chat": {"eos_token_id": 2, "max_length": 2}}}
    assert ids_in(values, 10) == {2}
    assert renumbered_ids(values, {2: 0}) == {
        "eos_token_id": [0],
        "task_specific_params": {"chat": {"eos_token_id": 0, "max_length": 2}},
    }
