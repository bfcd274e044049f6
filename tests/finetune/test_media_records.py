"""Images and sounds in records: what is read, what is refused by name, and what tells examples apart."""

from __future__ import annotations

import json

import pytest
from motet.finetune.data.augment import augment
from motet.finetune.data.dataset import encode_prompt, load_dataset
from motet.finetune.data.encode import encode_example
from motet.finetune.data.formats import read_examples
from motet.finetune.data.leakage import near_duplicates
from motet.runtime.errors import DataError

TALK = {"prompt": "what is it?", "completion": "a cat"}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "c.wav"):
        (tmp_path / name).write_bytes(f"the content of {name}".encode())
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    return tmp_path


def examples(folder, *records):
    return list(read_examples(write(folder / "data.jsonl", *records)))


def shape(example):
    return [
        [(p["type"], p["text"] if p["type"] == "text" else p[p["type"]].path.name) for p in m["content"]]
        if isinstance(m["content"], list)
        else m["content"]
        for m in example.messages
    ]


def test_media_come_before_the_text_of_the_first_user_message_images_first(folder):
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "no"},
    ]
    one, several, late = examples(
        folder,
        {**TALK, "image": "a.png"},
        {"messages": chat, "audio": "c.wav", "image": ["b.png", "a.png"]},
        {"instruction": "what?", "output": "x", "audio": str(folder / "c.wav")},
    )
    assert shape(one) == [[("image", "a.png"), ("text", "what is it?")]]
    parts = [("image", "b.png"), ("image", "a.png"), ("audio", "c.wav"), ("text", "look")]
    assert shape(several) == ["be brief", parts, "yes", "again"]
    assert shape(late) == [[("audio", "c.wav"), ("text", "what?")]]
    assert several.prompt == "be brief\n\nlook\n\nyes\n\nagain"


def test_messages_may_hold_parts(folder):
    parts = [
        {"type": "text", "text": "first"},
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "then", "image": None},  # as Parquet reads them
        {"type": "audio", "audio": "c.wav"},
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "ans"}, {"type": "text", "text": "wer"}]}
    [example] = examples(folder, {"messages": [{"role": "user", "content": parts}, answer]})
    assert shape(example) == [[("text", "first"), ("image", "a.png"), ("text", "then"), ("audio", "c.wav")]]
    assert example.completion == "answer"
    assert [file.kind for file in example.media] == ["image", "audio"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"image": "missing.png"}, "line 1: there is no file '.*missing.png' for the image"),
        ({"image": ["a.png", "missing.png"]}, "there is no file"),
        ({"image": "."}, "there is no file"),
        ({"image": "a\0.png"}, "there is no file|cannot be read"),
        ({"image": 3}, "image is the path of a file or a list of paths, got 3"),
        ({"image": []}, "or a list of paths"),
        ({"audio": {"bytes": "x"}}, "audio is the path"),
        ({"audio": [["c.wav"]]}, "audio is the path"),
    ],
)
def test_records_that_name_no_file_are_refused(folder, changes, match):
    with pytest.raises(DataError, match=match):
        examples(folder, {**TALK, **changes})


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"text": "plain", "image": "a.png"}, "no message for an image"),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "x"}], "image": "a.png"},
         "the record has none"),
        ({"messages": [{"role": "user", "content": []}, {"role": "assistant", "content": "x"}]}, "no parts"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                       {"role": "assistant", "content": "x"}]}, "2 texts and no media"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a"}]}]}, "a part of a content is"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png", "detail": "high"}]}]}, "a part"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": b"x".hex(), "text": "y"}]}]}, "a part"),
        ({"messages": [{"role": "user", "content": ["a.png"]}]}, "a part of a content is"),
        ({"messages": [{"role": "user", "content": "x"},
                       {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}]}, "only a user's may"),
    ],
)  # fmt: skip
def test_parts_that_are_none_are_refused(folder, record, match):
    with pytest.raises(DataError, match=match):
        examples(folder, record)


def test_examples_with_other_media_differ(folder):
    same, copy, other, text = examples(
        folder,
        *({**TALK, **changes} for changes in ({"image": "a.png"}, {"image": "copy.png"}, {"image": "b.png"}, {})),
    )
    assert same.media == copy.media != other.media
    assert same.source == copy.source != other.source, "the same file is one document"
    assert near_duplicates([copy], [same]) == [(0, 0)]
    assert near_duplicates([other], [same]) == near_duplicates([text], [same]) == []
    long = {"prompt": " ".join(f"word{i}" for i in range(40)), "completion": "yes"}
    first, second, third = examples(
        folder, {**long, "image": "a.png"}, {**long, "image": "b.png"}, {**long, "image": "a.png", "completion": "no"}
    )
    assert near_duplicates([second], [first]) == []
    assert near_duplicates([third], [first]) == [(0, 0)]


def test_the_digest_of_a_data_set_is_of_the_contents_and_not_of_the_names(folder):
    records = [{"prompt": f"{i}", "completion": "x", "id": str(i), "image": "a.png"} for i in range(8)]
    first = load_dataset(str(write(folder / "1.jsonl", *records))).digest
    moved = [{**record, "image": "copy.png"} for record in records]
    assert load_dataset(str(write(folder / "2.jsonl", *moved))).digest == first
    changed = [{**record, "image": "b.png"} for record in records]
    assert load_dataset(str(write(folder / "3.jsonl", *changed))).digest != first


def test_augmentation_changes_words_and_keeps_media(folder):
    import random

    [example] = examples(folder, {"prompt": "one two three four five six seven", "completion": "x", "image": "a.png"})
    changed = augment(example, "span-mask", random.Random(0))
    assert changed.media == example.media
    assert "…" in changed.prompt


def test_where_no_media_are_taken_they_are_refused(folder, tokenizer):
    [example] = examples(folder, {**TALK, "image": "a.png"})
    with pytest.raises(DataError, match="holds an image, and the model has no encoder of image"):
        encode_example(tokenizer, example, (258,))
    with pytest.raises(DataError, match="only texts are taken here"):
        encode_prompt(tokenizer, example)
