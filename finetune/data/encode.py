"""Examples as the model sees them: token ids, and where the answer begins. Also the report on the data."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ...runtime.api.prompt import Message
from ...runtime.errors import ConfigError, DataError, InvalidRequestError
from ...runtime.text.marks import Marks, filled, written_placeholders
from ...runtime.text.tokenizer import Tokenizer
from ..params import TuneParams
from .augment import augment
from .dataset import Dataset, encode_prompt
from .example import Example, MediaPath, Split


@dataclass(frozen=True, slots=True)
class EmbeddedRows:
    """Placeholders of an example, from index `start` on, one for each row of an encoder."""

    start: int
    medium: str
    digest: str  # SHA-256 of what they are made from and of what makes them, but for the projector
    features: Tensor = field(repr=False, compare=False)  # [places, width] bfloat16, what the projector gets
    project: Callable[[Tensor], Tensor] = field(
        repr=False, compare=False
    )  # the projector of [1, places, width], frozen

    def rows(self) -> Tensor:
        """[rows, hidden] float32, what comes in the place of the placeholders' embeddings."""
        with torch.no_grad():
            return self.project(self.features[None].float())[0]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a conversation with its answer. The loss is taken on the tokens from index `answer` on, and on those
    of `earlier`, the assistant's earlier turns."""

    token_ids: tuple[int, ...]
    answer: int  # at least 1: no token predicts the first one
    source: str
    earlier: tuple[range, ...] = ()  # indices, each range at least 1
    embedded: tuple[EmbeddedRows, ...] = ()

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


class Media(Protocol):
    """What makes rows of the images and sounds of examples (`features.MediaFeatures`)."""

    @property
    def placeholders(self) -> Collection[str]:
        """Of all media that the model takes."""
        ...

    def text(self, file: MediaPath) -> tuple[str, str]:
        """The placeholder of a file, and what the prompt has in its place. Raises `DataError`, also for media that the model does
        not take."""
        ...

    def embedded(self, files: Sequence[MediaPath], token_ids: Sequence[int]) -> tuple[EmbeddedRows, ...]:
        """The rows of an example's files, at the placeholders of its token ids. Raises `DataError`."""
        ...


def encode_parts(
    tokenizer: Tokenizer,
    dataset: Dataset,
    counts: dict[Split, int],
    params: TuneParams,
    end: Sequence[int],
    media: Media | None = None,
    on_progress: Callable[[str, int, int], None] = lambda _what, _count, _total: None,
) -> tuple[dict[Split, list[Encoded]], DataReport]:
    """Encode the first `counts[part]` examples of each split that fit `params.max_length` tokens.

    Only training examples are augmented. `end`: token ids that end a text for which the chat template has no end. `media`: None
    for a model that takes none. `on_progress(what, examples more, examples in all)` is called where there are media. Raises
    `DataError` if no example of a split fits, and what `encode_example` raises.
    """
    report = DataReport(dataset.name, dataset.digest, str(dataset.near_duplicates), dataset.num_duplicates)
    parts: dict[Split, list[Encoded]] = {}
    for part, count in counts.items():
        report.parts[part] = PartReport()
        found = _encode(tokenizer, dataset, part, count, params, end, report.parts[part], media)
        parts[part] = _with_rows(part, found, media, on_progress)
        if not parts[part]:
            counted = report.parts[part]
            raise DataError(
                f"no {part} example of '{dataset.spec}' fits max_length {params.max_length} "
                f"({counted.too_long} are too long, {counted.answer_too_long} by their answer alone); raise it"
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
    media: Media | None,
) -> list[tuple[Encoded, list[MediaPath]]]:
    """The examples without their rows, and their files."""
    assert params.max_length is not None  # set by `TuneParams.fitted`
    found: list[tuple[Encoded, list[MediaPath]]] = []
    how = params.augmentation if part == "train" else "none"
    for index, example in enumerate(dataset.splits[part]):
        if len(found) == count:
            break
        rng = random.Random(f"{how} {index}")  # without the run's seed, so that all trials of a search share one cache
        item = encode_example(tokenizer, augment(example, how, rng), end, params.loss, media)
        if len(item.token_ids) <= params.max_length and item.num_targets:
            found.append((item, example.media))
        else:
            report.too_long += 1
            report.answer_too_long += item.num_targets > params.max_length
    encoded = [item for item, _ in found]
    report.examples = len(encoded)
    report.documents = len({item.source for item in encoded})
    report.tokens = sum(len(item.token_ids) for item in encoded)
    report.answer_tokens = sum(item.num_targets for item in encoded)
    report.longest = max((len(item.token_ids) for item in encoded), default=0)
    return found


def _with_rows(
    part: Split,
    found: list[tuple[Encoded, list[MediaPath]]],
    media: Media | None,
    on_progress: Callable[[str, int, int], None],
) -> list[Encoded]:
    encoded = []
    total = sum(bool(files) for _, files in found)
    for item, files in found:
        if files and media is not None:
            item = replace(item, embedded=media.embedded(files, item.token_ids))
            on_progress(f"media, {part}", 1, total)
        encoded.append(item)
    return encoded


def encode_example(
    tokenizer: Tokenizer,
    example: Example,
    end: Sequence[int],
    loss: Literal["answer", "all"] = "answer",
    media: Media | None = None,
) -> Encoded:
    """Encode a conversation as it is served, up to the end of the answer's turn, with placeholders where media stand; `loss` as
    in `TuneParams`.

    The end of a turn is the chat template's. `end` is added if there is no template, or if its turns end without a special
    token. Raises `DataError` for a conversation that the template does not take, `ConfigError` for a loss on all turns
    without a template.
    """
    if example.media and (media is None or not tokenizer.has_chat_template):
        reason = (
            "chat template, which says where media stand"
            if media is not None
            else f"encoder of {example.media[0].kind}"
        )
        raise DataError(
            f"the example from '{example.source}' holds an {example.media[0].kind}, and the model has no {reason}"
            + ("" if media is not None else "; `motet tune --method projector` gives it one")
        )
    if not (example.messages and tokenizer.has_chat_template):
        if loss == "all" and len(example.messages) > 1:
            raise ConfigError("loss 'all' needs the ends of turns, and the model has no chat template; use 'answer'")
        prompt = encode_prompt(tokenizer, example)
        answer = tokenizer.encode(example.completion, add_special_tokens=False) + list(end)
        return Encoded((*prompt, *answer), max(1, len(prompt)), example.source)
    try:
        pieces, marks = _pieces(tokenizer, example, loss, media)
    except InvalidRequestError as error:
        raise DataError(f"the example from '{example.source}': {error}") from error
    token_ids: list[int] = []
    spans = []
    for before, turn in pieces:
        token_ids += tokenizer.encode_rendered(before, marks)
        start = len(token_ids)
        token_ids += tokenizer.encode_rendered(turn, marks)
        spans.append(range(start, len(token_ids)))
    if tokenizer.decode(token_ids[-1:]):  # not a special token
        token_ids += end
    return Encoded(tuple(token_ids), spans[-1].start, example.source, tuple(spans[:-1]))


def _pieces(
    tokenizer: Tokenizer, example: Example, loss: str, media: Media | None
) -> tuple[list[tuple[str, str]], Marks | None]:
    """The conversation as text: the assistant's turns that have a loss, the answer last, each with what stands before it; and the
    marks in it (see `Tokenizer.mark_control_tokens`)."""
    texts = [media.text(file) for file in example.media] if media is not None else []
    known = set(media.placeholders) if media is not None else set()
    messages, own, files = tokenizer.placed(example.messages, known, texts)
    text, turns, marks = _turns(tokenizer, messages, example, loss)
    placeholders = known | own
    pieces, done = [], 0
    for turn in turns:
        pieces += [text[done : turn.start], text[turn.start : turn.stop]]
        done = turn.stop
    if placeholders:
        pieces = _filled(pieces, marks, placeholders, files)
    return list(zip(pieces[::2], pieces[1::2])), marks


def _filled(
    pieces: Sequence[str], marks: Marks | None, placeholders: Collection[str], files: Sequence[tuple[str, str]]
) -> list[str]:
    """Pieces of a conversation with the texts of its files in their places. Raises `InvalidRequestError` if these are others."""
    found, done = [], 0
    for piece in pieces:
        count = len(written_placeholders(piece, marks, placeholders))
        found.append(filled(piece, marks, placeholders, files[done : done + count]))
        done += count
    if done < len(files):
        raise InvalidRequestError("the model's chat template leaves out media", field="messages.content")
    return found


def _turns(
    tokenizer: Tokenizer, messages: Sequence[Message], example: Example, loss: str
) -> tuple[str, list[range], Marks | None]:
    """The conversation as text, where the assistant's turns that have a loss are in it, the answer last, and the marks
    in it (see `Tokenizer.mark_control_tokens`)."""
    conversation, marks = tokenizer.mark_control_tokens(
        [*messages, {"role": "assistant", "content": example.completion}]
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
    """SHA-256 of what the trunk sees: the key of its cache. It changes with the data, media among them, the tokenizer, the chat
    template and the augmentation."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item.token_ids).encode())
        if item.embedded:
            digest.update(repr(item.embedded).encode())
    return digest.hexdigest()
