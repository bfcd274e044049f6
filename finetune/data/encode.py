"""Examples as the model sees them: token ids, and where the answer begins. Also the report on the data."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...runtime.errors import DataError
from ...runtime.text.tokenizer import Tokenizer
from ..params import TuneParams
from .augment import augment
from .dataset import Dataset, encode_prompt
from .example import Example, Split


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a conversation with its answer. The loss is taken on the tokens from index `answer` on."""

    token_ids: tuple[int, ...]
    answer: int  # at least 1: no token predicts the first one
    source: str

    @property
    def num_targets(self) -> int:
        return len(self.token_ids) - self.answer


@dataclass(slots=True)
class PartReport:
    """How many examples and tokens of a split are used, and how many examples are left out."""

    examples: int = 0
    documents: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    longest: int = 0  # tokens of the longest example
    too_long: int = 0  # left out: longer than max_length, or without an answer
    answer_too_long: int = 0  # of those, examples whose answer alone is too long


@dataclass(slots=True)
class DataReport:
    """Counts and lengths of a run's data, for its manifest."""

    name: str
    digest: str
    near_duplicates: int
    parts: dict[str, PartReport] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def encode_parts(
    tokenizer: Tokenizer, dataset: Dataset, counts: dict[Split, int], params: TuneParams, end: Sequence[int]
) -> tuple[dict[Split, list[Encoded]], DataReport]:
    """Encode the first `counts[part]` examples of each split that fit `params.max_length` tokens.

    Only training examples are augmented. `end`: token ids that end an answer. Raises `DataError` if no example of a split
    fits.
    """
    assert params.max_length is not None, "set by `TuneParams.fitted`"
    report = DataReport(dataset.name, dataset.digest, dataset.num_duplicates)
    parts: dict[Split, list[Encoded]] = {}
    for part, count in counts.items():
        report.parts[part] = PartReport()
        how = params.augmentation if part == "train" else "none"
        parts[part] = _encode(tokenizer, dataset.splits[part], count, params.max_length, end, how, report.parts[part])
        if not parts[part]:
            found = report.parts[part]
            raise DataError(
                f"no {part} example of '{dataset.spec}' fits max_length {params.max_length} "
                f"({found.too_long} are too long, {found.answer_too_long} by their answer alone); raise it"
            )
    return parts, report


def _encode(
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    count: int,
    max_length: int,
    end: Sequence[int],
    how: str,
    report: PartReport,
) -> list[Encoded]:
    encoded: list[Encoded] = []
    for index, example in enumerate(examples):
        if len(encoded) == count:
            break
        rng = random.Random(f"{how} {index}")  # without the run's seed, so that all trials of a search share one cache
        item = encode_example(tokenizer, augment(example, how, rng), end)
        if len(item.token_ids) <= max_length and item.num_targets:
            encoded.append(item)
        else:
            report.too_long += 1
            report.answer_too_long += item.num_targets > max_length
    report.examples = len(encoded)
    report.documents = len({item.source for item in encoded})
    report.tokens = sum(len(item.token_ids) for item in encoded)
    report.answer_tokens = sum(item.num_targets for item in encoded)
    report.longest = max((len(item.token_ids) for item in encoded), default=0)
    return encoded


def encode_example(tokenizer: Tokenizer, example: Example, end: Sequence[int]) -> Encoded:
    prompt = encode_prompt(tokenizer, example)
    answer = tokenizer.encode(example.completion, add_special_tokens=False) + list(end)
    return Encoded((*prompt, *answer), max(1, len(prompt)), example.source)


def encoded_digest(items: Sequence[Encoded]) -> str:
    """SHA-256 of what the model sees. It changes with the data, the tokenizer, the chat template and the augmentation."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr((item.token_ids, item.answer)).encode())
    return digest.hexdigest()
