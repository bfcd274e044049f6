"""Reading data sets: formats, splits, leakage, encoding, augmentation."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from helpers.models import CHAT_TEMPLATE, write_tokenizer
from motet.finetune.data.augment import augment
from motet.finetune.data.dataset import load_dataset
from motet.finetune.data.encode import encode_example, encode_parts, encoded_digest
from motet.finetune.data.example import Example, user
from motet.finetune.data.formats import read_examples
from motet.finetune.data.leakage import near_duplicates
from motet.finetune.params import NearDuplicates, TuneParams
from motet.runtime.errors import DataError, NotFoundError
from motet.runtime.text.tokenizer import Tokenizer

TEXT = "the quick brown fox number {} jumps over the lazy dog and runs away from it as fast as it can every {} morning"


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def records(count=40):
    rng = random.Random(0)
    return [
        {"prompt": " ".join(str(rng.random()) for _ in range(8)), "completion": f"answer {i}"} for i in range(count)
    ]


def test_formats_agree(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = records()
    chat = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in rows
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chat), tmp_path / "c.parquet")
    sets = [
        load_dataset(spec)
        for spec in (
            write(tmp_path / "a.jsonl", rows),
            write(tmp_path / "b.jsonl", chat),
            str(tmp_path / "a.parquet"),
            str(tmp_path / "c.parquet"),
        )
    ]
    assert len({dataset.digest for dataset in sets}) == 1
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="no Parquet file"):
        load_dataset(str(tmp_path / "broken.parquet"))


def test_plain_text(tmp_path, tokenizer):
    for name in "abcdefgh":
        rng = random.Random(name)
        paragraphs = [" ".join(str(rng.random()) for _ in range(30)) for _ in range(6)]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(paragraphs))
    dataset = load_dataset(str(tmp_path))
    examples = [example for part in dataset.splits.values() for example in part]
    assert {example.source for example in examples} == {f"{name}.txt" for name in "abcdefgh"}
    encoded = encode_example(tokenizer, examples[0], (258,))
    assert encoded.answer == 1  # all of it is the answer but the first token
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="no text file"):
        load_dataset(str(tmp_path / "empty"))


def test_documents_stay_on_one_side(tmp_path):
    rows = [{**record, "source": f"doc {i // 8}"} for i, record in enumerate(records(48))]
    splits = load_dataset(write(tmp_path / "a.jsonl", rows)).splits
    sides = [{example.source for example in part} for part in splits.values()]
    assert all(sides)
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


def test_near_duplicates(tmp_path):
    train = [Example(user(TEXT.format(1, "single")), "x", "a"), Example(user("something else"), "y", "b")]
    held = [Example(user("again " + TEXT.format(1, "single")), "x", "c")]
    assert near_duplicates(train, held) == [(0, 0)]
    rows = records(60)
    rows += [{**row, "completion": row["completion"]} for row in rows]  # every record twice, as documents of their own
    twice = write(tmp_path / "twice.jsonl", rows)
    with pytest.raises(DataError, match="nearly repeat"):
        load_dataset(twice, NearDuplicates.REFUSE)
    kept, dropped = (load_dataset(twice, choice) for choice in (NearDuplicates.KEEP, NearDuplicates.DROP))
    assert sum(map(len, kept.splits.values())) == 120
    assert kept.num_duplicates == dropped.num_duplicates > 0
    assert sum(map(len, dropped.splits.values())) == 120 - dropped.num_duplicates
    sides = [{(e.prompt, e.completion) for e in part} for part in dropped.splits.values()]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert kept.digest != dropped.digest  # so what is keyed by the digest is not mixed


INSTRUCTION = (
    "You are a helpful assistant. Translate the following English word into French, and answer with the word only."
)


@pytest.mark.parametrize(
    "texts",
    [
        [(f"{INSTRUCTION}\n\n{word}", word[::-1]) for word in ("tree", "cat", "dog", "sun", "moon", "sea", "wind")],
        [("🙂", "🙁"), ("🙁", "🙂"), ("🎉", "👍"), ("👍🏽", "👍"), ("❤", "💔"), ("?", "!"), ("!", "?")],
        [(f"What is 7 {sign} 2?", "Think!") for sign in "+-*/%^&|<>"],
        [("你好吗", "很好"), ("你是谁", "朋友"), ("几点了", "三点"), ("去哪里", "回家"), ("为什么", "不知道")],
        [(f"Is {n} a prime number? Answer with yes or no, please.", "no") for n in (4, 6, 8, 9, 10, 12, 14, 15)],
    ],
    ids=["instruction", "emoji", "signs", "chinese", "last-word"],
)
def test_what_differs_is_no_duplicate(tmp_path, texts):
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in texts]
    assert load_dataset(write(tmp_path / "a.jsonl", rows), NearDuplicates.REFUSE).num_duplicates == 0
    again = load_dataset(write(tmp_path / "b.jsonl", rows + rows), NearDuplicates.KEEP)
    assert again.num_duplicates  # an equal record is one, however short


def test_every_format_is_the_same_example(tmp_path):
    """One conversation in each format that can say it: the same messages and answer, however it is written."""
    system, turns = "Be kind.", [("hi", "hello"), ("how are you?", "fine")]
    chat = [{"role": "system", "content": system}]
    for question, answer in turns:
        chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[m["role"]], "value": m["content"]} for m in chat]
    records = [
        {"messages": chat},
        {"conversations": sharegpt},
        {"conversations": sharegpt[1:], "system": system},
        {"conversations": chat, "text": "all of it"},
        {"prompt": chat[:-1], "completion": chat[-1:]},
        {"instruction": "how are you?", "input": "", "output": "fine", "system": system, "history": [list(turns[0])]},
    ]
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps(records), encoding="utf-8")
    for example in read_examples(path):
        assert (list(example.messages), example.completion) == (chat[:-1], "fine")
    (alpaca,) = read_examples(
        Path(write(tmp_path / "b.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3"}]))
    )
    assert (alpaca.prompt, alpaca.completion) == ("Add.\n\n1 2", "3")
    (text,) = read_examples(Path(write(tmp_path / "c.jsonl", [{"text": "a story"}])))
    assert (text.messages, text.completion) == ((), "a story")
    tool = [chat[1], {"role": "assistant", "content": "f()"}, {"role": "tool", "content": "7"}, chat[-1]]
    (called,) = read_examples(Path(write(tmp_path / "d.jsonl", [{"messages": tool}])))
    assert list(called.messages) == tool[:-1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_a_byte_order_mark_is_left_out(tmp_path, name):
    text = "a story" if name == "a.txt" else json.dumps({"text": "a story"})
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [example.completion for example in read_examples(tmp_path / name)] == ["a story"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"text": "half \ud83d"}', r"line 1: '\\ud83d' is half of a surrogate pair"),
        (r'{"messages": [{"role": "user", "content": "\udc00"}]}', "line 1: .*surrogate"),
        ("[" * 100_000, "line 1: not JSON"),
        ('{"prompt": "a", "completion": " "}', "line 1: the answer is empty"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
            "the answer is empty",
        ),
        ('{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]}', "the answer is empty"),
        ('{"instruction": "a", "output": ""}', "the answer is empty"),
        ('{"text": "\\n"}', "the answer is empty"),
        ('{"conversations": [{"from": "alien", "value": "a"}]}', "conversations 1: .*role 'alien'"),
        ('{"messages": [{"role": "user", "content": "a", "tool_calls": []}]}', "'tool_calls' of a message"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "no message before"),
        ('{"prompt": 1, "completion": "b"}', "prompt must be a text, got a int"),
    ],
)
def test_a_bad_record_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=message):
        list(read_examples(path))


def test_a_half_pair_is_refused_and_a_whole_one_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "\ud83d\ude42"}')
    assert [example.completion for example in read_examples(path)] == ["🙂"]


# ---- ends of turns, and the loss -------------------------------------------------------------------------------------

CHAT = (
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
)
TEMPLATES = {  # name: (template, the text of the turn that answers "later" to CHAT)
    "chatml": (CHAT_TEMPLATE, "later<|im_end|>"),
    "space": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} "
        "<|im_end|>{% endif %}{% endfor %}",
        " later <|im_end|>",
    ),
    "other end": (CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>"), "later<|endoftext|>"),
    "no end": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "later<|im_end|>"),
    "thought": (CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n"), "later<|im_end|>"),
}


def with_template(tmp_path, template):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    return Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_ends_as_the_template_ends_a_turn(tmp_path, name):
    template, expected = TEMPLATES[name]
    tokenizer = with_template(tmp_path, template)
    if name == "no end":  # the prompt ends where the answer begins
        expected = "assistant: later<|im_end|>"
    encoded = encode_example(tokenizer, Example(CHAT, "later", "a"), (258,))
    assert list(encoded.token_ids[: encoded.answer]) == tokenizer.encode_chat(CHAT)
    answer = [encoded.token_ids[i] for i in encoded.targets]
    assert tokenizer.decode(answer, skip_special_tokens=False) == expected


def test_the_loss_is_on_every_turn_if_asked(tmp_path):
    """transformers' assistant mask says which tokens are the assistant's; its template marks them."""
    import transformers

    tokenizer = with_template(tmp_path, CHAT_TEMPLATE)
    encoded = encode_example(tokenizer, Example(CHAT, "later", "a"), (258,), "all")
    marked = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    )
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")).apply_chat_template(
        [*CHAT, {"role": "assistant", "content": "later"}],
        chat_template=marked,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert oracle["input_ids"][:-1] == list(encoded.token_ids)  # but the line break after the last turn
    assert [i for i, mine in enumerate(oracle["assistant_masks"]) if mine] == encoded.targets
    last = encode_example(tokenizer, Example(CHAT, "later", "a"), (258,))
    assert last.token_ids == encoded.token_ids
    assert last.targets == encoded.targets[-len("later") - 1 :]
    forgetful = CHAT_TEMPLATE.replace("{{ message.content }}", "{{ message.content if loop.last else '…' }}")
    with pytest.raises(DataError, match="writes an earlier turn differently"):
        encode_example(with_template(tmp_path, forgetful), Example(CHAT, "later", "a"), (258,), "all")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no examples"),
        ([{"prompt": "a", "completion": "b"}], "too few"),
        (
            [{"id": 1, "prompt": "a", "completion": "b"}, {"id": 1, "prompt": "c", "completion": "d"}],
            "the id '1' is also at .*line 1;",
        ),
    ],
)
def test_unusable_sets(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load_dataset(write(tmp_path / "a.jsonl", rows))


def test_answers_longer_than_the_context(tmp_path, tokenizer):
    rows = [{**record, "completion": "long " * 60} for record in records()]
    dataset = load_dataset(write(tmp_path / "a.jsonl", rows))
    with pytest.raises(DataError, match="by their answer alone"):
        encode_parts(tokenizer, dataset, {"train": 10, "validation": 2}, TuneParams(max_length=100), (258,))


def test_the_report_counts(tmp_path, tokenizer):
    rows = [{**record, "completion": "long " * (60 if i % 4 == 0 else 1)} for i, record in enumerate(records())]
    dataset = load_dataset(write(tmp_path / "a.jsonl", rows))
    parts, report = encode_parts(
        tokenizer, dataset, {"train": 100, "validation": 100}, TuneParams(max_length=320), (258,)
    )
    for part, items in parts.items():
        found = report.parts[part]
        assert found.examples == len(items)
        assert found.examples + found.too_long == len(dataset.splits[part])
        assert found.tokens == sum(len(item.token_ids) for item in items)
    assert report.parts["train"].too_long > 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["token-dropout", "span-mask", "paraphrase"])
def test_augmentation_is_seeded_and_leaves_the_answer(how, tokenizer, tmp_path):
    example = load_dataset("stdlib-code").splits["train"][0]
    variants = [augment(example, how, random.Random(seed)) for seed in (1, 1, 2, 3, 4)]
    assert variants[0] == variants[1]
    assert len({variant.prompt for variant in variants}) > 1
    assert all(variant.completion == example.completion for variant in variants)
    digests = {encoded_digest([encode_example(tokenizer, e, (258,))]) for e in (example, variants[3], variants[2])}
    assert len(digests) > 1  # another augmentation is another cache entry


def test_control_tokens_in_an_example_are_plain_text_as_they_are_served(tokenizer):
    """Prompt and answer spell the end of a turn; only the template's own ends are tokens."""
    messages = ({"role": "user", "content": "end it with <|im_end|>"},)
    item = encode_example(tokenizer, Example(messages, "<|im_end|> it is", "s"), [])
    prompt = tokenizer.encode_chat(messages)
    assert list(item.token_ids[: len(prompt)]) == prompt
    end = tokenizer.token_id("<|im_end|>")
    plain = encode_example(tokenizer, Example(({"role": "user", "content": "x"},), "y", "s"), [])
    assert item.token_ids.count(end) == plain.token_ids.count(end) == 2
    assert tokenizer.decode(item.token_ids[len(prompt) :]) == "<|im_end|> it is"
