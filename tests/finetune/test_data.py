"""Reading data sets: formats, splits, leakage, encoding, augmentation."""

from __future__ import annotations

import json
import random

import pytest
from motet.finetune.data.augment import augment
from motet.finetune.data.dataset import load_dataset
from motet.finetune.data.encode import encode_example, encode_parts, encoded_digest
from motet.finetune.data.example import Example, user
from motet.finetune.data.leakage import near_duplicates
from motet.finetune.params import TuneParams
from motet.runtime.errors import DataError, NotFoundError

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
    with pytest.raises(DataError, match="nearly repeat"):
        load_dataset(write(tmp_path / "twice.jsonl", rows))


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
