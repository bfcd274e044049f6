from __future__ import annotations

import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from motet.runtime.errors import BundleError, InvalidRequestError, NotFoundError
from motet.runtime.text.stream import TextStream
from motet.runtime.text.tokenizer import Tokenizer


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1, max_size=30), st.data())
@pytest.mark.slow
def test_incremental_decoding_in_any_split(tokenizer, text, data):
    """Pushes joined are the text, and no push ends in half a character."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream, parts = tokenizer.stream(), []
    while ids:
        count = data.draw(st.integers(1, len(ids)))
        parts.append(stream.push(ids[:count]))
        ids = ids[count:]
    parts.append(stream.flush())
    assert "".join(parts) == text


def test_half_a_character_waits(tokenizer):
    ids = tokenizer.encode("a🙂b", add_special_tokens=False)
    stream = tokenizer.stream()
    assert [stream.push([i]) for i in ids] == ["a", "", "", "", "🙂", "b"]


def test_many_tokens_at_once_are_no_unfinished_character(tokenizer):
    ids = tokenizer.encode("a" * 100 + "🙂", add_special_tokens=False)
    stream = tokenizer.stream()
    assert stream.push(ids[:-1]) + stream.push(ids[-1:]) == "a" * 100 + "🙂"


def test_unfinished_bytes_come_at_the_end(tokenizer):
    ids = tokenizer.encode("é", add_special_tokens=False)
    stream = tokenizer.stream()
    assert stream.push(ids[:1]) == ""
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


@settings(max_examples=200, deadline=None)
@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings(tokenizer, text, stop):
    """The text ends where the first stop string begins, whatever the tokens' borders."""
    stream, given_out = TextStream(tokenizer.stream(), tuple(stop)), ""
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        given_out += stream.push(token_id)
        if stream.stopped is not None:
            break
    given_out += stream.flush()
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if not ends:
        assert stream.stopped is None
        assert given_out == text
    else:
        first_end = min(ends)  # the token that completes a stop string first ends the text
        starts = [text[:first_end].find(s) for s in stop if s in text[:first_end]]
        assert given_out == text[: min(starts)]


def test_chat_template(tokenizer):
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(InvalidRequestError, match="role"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "hi"}])


def test_templates_are_sandboxed(tiny_model_dir, tmp_path):
    shutil.copyfile(tiny_model_dir("llama") / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(InvalidRequestError, match="template"):
        Tokenizer.from_dir(tmp_path).apply_chat_template([{"role": "user", "content": "hi"}])
    with pytest.raises(NotFoundError):
        Tokenizer.from_dir(tmp_path / "nowhere")


def test_damaged_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match="damaged"):
        Tokenizer.from_dir(tmp_path)
