"""Data sets: files and two built-in sets, split into train, validation and test without leakage.

Examples are split by document: all examples of a document are in the same split. A training example that nearly repeats a
held-out one would make the held-out figures too good: `NearDuplicates` says what is done with it.
"""

from __future__ import annotations

import functools
import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

from ...runtime.errors import DataError
from ...runtime.text.tokenizer import Tokenizer
from ..params import NearDuplicates
from .built_in import BUILT_IN, CODE_INSTRUCTION, DOCS_INSTRUCTION, built_in_examples
from .example import Example, Split
from .formats import read_examples
from .leakage import common_ngrams, near_duplicates

__all__ = ["BUILT_IN", "CODE_INSTRUCTION", "DOCS_INSTRUCTION", "Dataset", "Example", "Split", "load_dataset"]


@dataclass(frozen=True, slots=True)
class Dataset:
    name: str
    spec: str  # the argument of `load_dataset`
    digest: str  # SHA-256 over the examples of each split, with their documents
    splits: dict[Split, list[Example]]
    near_duplicates: NearDuplicates
    num_duplicates: int  # near-duplicates of held-out examples that were found


def load_dataset(spec: str, near_duplicates: NearDuplicates = NearDuplicates.DROP) -> Dataset:
    """Load a data set. `spec` is the name of a built-in set or a path (see `formats`).

    The examples of a split are shuffled, always in the same way. Raises `NotFoundError`, and `DataError`, which names the
    record and what is expected there, or the examples that leak.
    """
    built_in = spec in BUILT_IN
    examples = list(built_in_examples(spec) if built_in else read_examples(Path(spec)))
    if not examples:
        raise DataError(f"'{spec}' holds no examples")
    splits: dict[Split, list[Example]] = {"train": [], "validation": [], "test": []}
    for example in examples:
        splits[_split_of(example.source)].append(example)
    if not built_in and not (splits["validation"] and splits["train"]):
        splits = _split_small(examples)
    num_duplicates = _treat_leaks(spec, splits, near_duplicates)
    digest = hashlib.sha256()
    for name, part in splits.items():
        random.Random(0).shuffle(part)
        for example in part:
            digest.update(repr((name, example.messages, example.completion, example.source)).encode())
    return Dataset(Path(spec).name, spec, digest.hexdigest(), splits, near_duplicates, num_duplicates)


def _split_of(source: str) -> Split:
    """80 % of documents are train, 10 % validation and 10 % test, by a hash of the document's name."""
    bucket = int(hashlib.sha256(source.encode()).hexdigest(), 16) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def _split_small(examples: list[Example]) -> dict[Split, list[Example]]:
    """The splits of a few documents, in the order of the file. Splitting by hash could leave a split empty."""
    documents = list(dict.fromkeys(example.source for example in examples))
    count = len(documents) // 5
    if not count:
        raise DataError(
            f"{len(examples)} examples from {len(documents)} documents are too few to keep some for validation and "
            "test; give at least 5 documents (records without a source are one each)"
        )
    side: dict[str, Split] = {
        name: "validation" if i < count else "test" if i < 2 * count else "train" for i, name in enumerate(documents)
    }
    splits: dict[Split, list[Example]] = {"train": [], "validation": [], "test": []}
    for example in examples:
        splits[side[example.source]].append(example)
    return splits


def _treat_leaks(spec: str, splits: dict[Split, list[Example]], choice: NearDuplicates) -> int:
    """Find training examples that nearly repeat a held-out one, and validation examples that nearly repeat a test one,
    and do with them what `choice` says. Returns how many there are. Raises `DataError` if nothing else is left."""
    found = 0
    common = common_ngrams([example for part in splits.values() for example in part])
    pairs_of: tuple[tuple[Split, list[Example]], ...] = (
        ("train", splits["validation"] + splits["test"]),
        ("validation", splits["test"]),
    )
    for part, held_out in pairs_of:
        pairs = near_duplicates(splits[part], held_out, common)
        found += len(pairs)
        if not pairs or choice is NearDuplicates.KEEP:
            continue
        leaked = {index for index, _ in pairs}
        left = [example for index, example in enumerate(splits[part]) if index not in leaked]
        if choice is NearDuplicates.REFUSE or not left:
            first, other = splits[part][pairs[0][0]], held_out[pairs[0][1]]
            raise DataError(
                f"'{spec}': {len(pairs)} of {len(splits[part])} {part} examples nearly repeat a held-out one, the first "
                f"from '{first.source}' that from '{other.source}'; remove them, give both the same source to keep them "
                "on one side, or set near_duplicates to keep" + (" or drop" if left else "")
            )
        splits[part] = left
    return found


def heldout_token_ids(tokenizer: Tokenizer, num_tokens: int, *, context: int, split: Split = "test") -> list[list[int]]:
    """Text from a split of the built-in sets, as chunks that make at least `num_tokens` predictions: of 512 token ids, or
    of as many as the model's `context` has positions, if these are fewer.

    It is conversations with their answers, as the model sees them. Use the test split to measure quality, the train split
    to calibrate.
    """
    chunk = min(512, context)
    parts = [_built_in(name).splits[split] for name in BUILT_IN]
    token_ids: list[int] = []
    for code, docs in zip(*parts, strict=False):
        for example in (code, docs):
            token_ids += encode_prompt(tokenizer, example) + tokenizer.encode(
                example.completion, add_special_tokens=False
            )
        if len(token_ids) >= num_tokens + chunk:
            break
    return _chunks(token_ids, num_tokens, chunk)


def text_token_ids(path: Path, tokenizer: Tokenizer, num_tokens: int, *, context: int) -> list[list[int]]:
    """The first `num_tokens` of a user's examples or texts, in such chunks. Raises `NotFoundError`, `DataError`."""
    token_ids: list[int] = []
    for example in read_examples(path):
        token_ids += encode_prompt(tokenizer, example) + tokenizer.encode(example.completion, add_special_tokens=False)
        if len(token_ids) > num_tokens:
            break
    return _chunks(token_ids, num_tokens, min(512, context))


def _chunks(token_ids: list[int], num_tokens: int, size: int) -> list[list[int]]:
    count = -(-num_tokens // (size - 1))  # a chunk of S tokens has S - 1 predictions
    chunks = [token_ids[i * size : (i + 1) * size] for i in range(count)]
    return [part for part in chunks if len(part) > 1]


def encode_prompt(tokenizer: Tokenizer, example: Example) -> list[int]:
    """Token ids of the conversation up to the answer; none for plain text. Without a chat template, the texts joined. Raises
    `DataError` for a conversation with media."""
    if example.media:
        raise DataError(
            f"the example from '{example.source}' holds an {example.media[0].kind}; only texts are taken here"
        )
    if not example.messages:
        return []
    if tokenizer.has_chat_template:
        return tokenizer.encode_chat(example.messages)
    return tokenizer.encode(example.prompt + "\n\n")


@functools.cache
def _built_in(name: str) -> Dataset:
    """A built-in set. Making one takes seconds, and an export needs both splits of it."""
    return load_dataset(name)
