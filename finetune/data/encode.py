"""Examples as the model sees them: token ids, and where the answer begins. Also the report on the data."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ...runtime.api.prompt import Message
from ...runtime.errors import ConfigError, DataError, InvalidRequestError
from ...runtime.text.marks import Marks
from ...runtime.text.tokenizer import Tokenizer
from ..params import TuneParams
from .augment import augment
from .dataset import Dataset, encode_prompt
from .example import Example, Split


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a conversation with its answer. The loss is taken on the tokens from index `answer` on, and on those
    of `earlier`, the assistant's earlier turns."""

    token_ids: tuple[int, ...]
    answer: int  # at least 1: no token predicts the first one
    source: str
    earlier: tuple[range, ...] = ()  # indices, each range at least 1

    @property
    def targets(self) -> list[int]:
        """Indices, ascending, of the tokens that the loss is taken on."""
        return [*(i for turn in self.earlier for i in turn), *range(self.answer, len(self.token_ids))]

    @property
    def num_targets(self) -> int:
        return len(self.token_ids) - self.answer + sum(map(len, self.earlier))


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
    near_duplicates: str  # what was done with them, a value of `NearDuplicates`
    num_duplicates: int
    encoded: str = ""  # SHA-256 of the examples as the model sees them
    parts: dict[str, PartReport] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def encode_parts(
    tokenizer: Tokenizer, dataset: Dataset, counts: dict[Split, int], params: TuneParams, end: Sequence[int]
) -> tuple[dict[Split, list[Encoded]], DataReport]:
    """Encode the first `counts[part]` examples of each split that fit `params.max_length` tokens.

    Only training examples are augmented. `end`: token ids that end a text for which the chat template has no end. Raises
    `DataError` if no example of a split fits, and what `encode_example` raises.
    """
    report = DataReport(dataset.name, dataset.digest, str(dataset.near_duplicates), dataset.num_duplicates)
    parts: dict[Split, list[Encoded]] = {}
    for part, count in counts.items():
        report.parts[part] = PartReport()
        parts[part] = _encode(tokenizer, dataset, part, count, params, end, report.parts[part])
        if not parts[part]:
            found = report.parts[part]
            raise DataError(
                f"no {part} example of '{dataset.spec}' fits max_length {params.max_length} "
                f"({found.too_long} are too long, {found.answer_too_long} by their answer alone); raise it"
            )
    digests = [(part, encoded_digest(items), [item.source for item in items]) for part, items in parts.items()]
    report.encoded = hashlib.sha256(repr(digests).encode()).hexdigest()
    return parts, report


def _encode(
    tokenizer: Tokenizer,
    dataset: Dataset,
    part: Split,
    count: int,
    params: TuneParams,
    end: Sequence[int],
    report: PartReport,
) -> list[Encoded]:
    assert params.max_length is not None  # set by `TuneParams.fitted`
    encoded: list[Encoded] = []
    how = params.augmentation if part == "train" else "none"
    for index, example in enumerate(dataset.splits[part]):
        if len(encoded) == count:
            break
        rng = random.Random(f"{how} {index}")  # without the run's seed, so that all trials of a search share one cache
        item = encode_example(tokenizer, augment(example, how, rng), end, params.loss)
        if len(item.token_ids) <= params.max_length and item.num_targets:
            encoded.append(item)
        else:
            report.too_long += 1
            report.answer_too_long += item.num_targets > params.max_length
    report.examples = len(encoded)
    report.documents = len({item.source for item in encoded})
    report.tokens = sum(len(item.token_ids) for item in encoded)
    report.answer_tokens = sum(item.num_targets for item in encoded)
    report.longest = max((len(item.token_ids) for item in encoded), default=0)
    return encoded


def encode_example(
    tokenizer: Tokenizer, example: Example, end: Sequence[int], loss: Literal["answer", "all"] = "answer"
) -> Encoded:
    """Encode a conversation as it is served, up to the end of the answer's turn; `loss` as in `TuneParams`.

    The end of a turn is the chat template's. `end` is added if there is no template, or if its turns end without a special
    token. Raises `DataError` for a conversation that the template does not take, `ConfigError` for a loss on all turns
    without a template.
    """
    if not (example.messages and tokenizer.has_chat_template):
        if loss == "all" and len(example.messages) > 1:
            raise ConfigError("loss 'all' needs the ends of turns, and the model has no chat template; use 'answer'")
        prompt = encode_prompt(tokenizer, example)
        answer = tokenizer.encode(example.completion, add_special_tokens=False) + list(end)
        return Encoded((*prompt, *answer), max(1, len(prompt)), example.source)
    try:
        text, turns, marks = _turns(tokenizer, example, loss)
    except InvalidRequestError as error:
        raise DataError(f"the example from '{example.source}': {error}") from error
    token_ids: list[int] = []
    spans = []
    done = 0
    for turn in turns:
        token_ids += tokenizer.encode_rendered(text[done : turn.start], marks)
        start = len(token_ids)
        token_ids += tokenizer.encode_rendered(text[turn.start : turn.stop], marks)
        spans.append(range(start, len(token_ids)))
        done = turn.stop
    if tokenizer.decode(token_ids[-1:]):  # not a special token
        token_ids += end
    return Encoded(tuple(token_ids), spans[-1].start, example.source, tuple(spans[:-1]))


def _turns(tokenizer: Tokenizer, example: Example, loss: str) -> tuple[str, list[range], Marks | None]:
    """The conversation as text, where the assistant's turns that have a loss are in it, the answer last, and the marks
    in it (see `Tokenizer.mark_control_tokens`)."""
    conversation, marks = tokenizer.mark_control_tokens(
        [*example.messages, {"role": "assistant", "content": example.completion}]
    )
    last = len(conversation) - 1
    chosen = [i for i, message in enumerate(conversation) if i == last or (loss == "all" and i and _spoke(message))]
    prompts = [tokenizer.apply_chat_template(conversation[:i]) for i in chosen]
    answers = [_turn(tokenizer, conversation[: i + 1], prompt) for i, prompt in zip(chosen, prompts)]
    text = prompts[-1] + answers[-1]
    for prompt, answer in zip(prompts, answers):
        if not text.startswith(prompt + answer):
            raise DataError(
                f"the example from '{example.source}': the chat template writes an earlier turn differently when others "
                "follow, so it cannot be trained on; use loss 'answer'"
            )
    return text, [range(len(prompt), len(prompt) + len(answer)) for prompt, answer in zip(prompts, answers)], marks


def _spoke(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip())


def _turn(tokenizer: Tokenizer, conversation: Sequence[Message], prompt: str) -> str:
    """What follows `prompt`, which asks for the last message: its content, and the end of its turn as the template writes
    it. Space after the end of a turn is left out: a model stops before it."""
    whole, content = (
        tokenizer.apply_chat_template(conversation, add_generation_prompt=False),
        conversation[-1]["content"],
    )
    if whole.startswith(prompt):
        return whole.removeprefix(prompt).rstrip()
    start = whole.rfind(content.strip())  # the prompt has more than the turn, such as the start of a thought
    if start < 0:
        raise InvalidRequestError("the chat template leaves out the answer", field="messages")
    return whole[start:].rstrip()


def encoded_digest(items: Sequence[Encoded]) -> str:
    """SHA-256 of what the trunk sees: the key of its cache. It changes with the data, the tokenizer, the chat template
    and the augmentation."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item.token_ids).encode())
    return digest.hexdigest()
