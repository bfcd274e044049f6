"""What a bundle is asked, beside the text that it is scored on: questions with exact answers, and summaries."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ...runtime.api.request import Request
from ...runtime.api.sampling import SamplingParams
from ...runtime.engine.consensus import similarity
from ...runtime.engine.engine import Engine
from ...runtime.text.tokenizer import Tokenizer

NUM_RECALL = 40
_NAMES = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Iris",
    "Jack",
    "Kate",
    "Leo",
    "Mary",
    "Noah",
)
_ANSWER = 8  # tokens, in which a number of four digits has room


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and the answer that is wanted; both are token ids."""

    prompt: Sequence[int]
    answer: Sequence[int]


@dataclass(frozen=True, slots=True)
class Answers:
    """`recall`: share of the codes that were given exactly, None if the context is too short for them; `rouge_l`: mean F measure
    of the answers' token ids, None without questions."""

    recall: float | None
    rouge_l: float | None


def ask(engine: Engine, tokenizer: Tokenizer, questions: Sequence[Question]) -> Answers:
    """Greedy answers of the bundle's own mix. A recall question lists six codes and asks for one of them: what a model needs to
    look things up in its prompt."""
    recall = [(tuple(tokenizer.encode(text)), code) for text, code in _recall(random.Random(0))]
    if max(len(prompt) for prompt, _ in recall) + _ANSWER > engine.model.max_model_len:
        recall = []
    ensemble = engine.model.default_ensemble
    asked = [
        Request(f"recall-{index}", (prompt,), ensemble, _greedy(_ANSWER)) for index, (prompt, _) in enumerate(recall)
    ]
    asked += [
        Request(f"question-{index}", (tuple(one.prompt),), ensemble, _greedy(len(one.answer)))
        for index, one in enumerate(questions)
    ]
    found = [choices[0].token_ids for choices in engine.complete(asked)]
    right = [
        tokenizer.decode(list(token_ids)).strip().startswith(code)
        for (_, code), token_ids in zip(recall, found[: len(recall)], strict=True)
    ]
    likes = [similarity(answer, one.answer) for answer, one in zip(found[len(recall) :], questions, strict=True)]
    return Answers(_mean(right), _mean(likes))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0.0)


def _recall(rng: random.Random) -> list[tuple[str, str]]:
    """(text, the code that goes on it)."""
    found = []
    for _ in range(NUM_RECALL):
        names = rng.sample(_NAMES, 6)
        codes = {name: str(rng.randrange(1000, 10_000)) for name in names}
        lines = [f"The code of {name} is {code}." for name, code in codes.items()]
        asked = rng.choice(names)
        found.append((" ".join([*lines, f"The code of {asked} is"]), codes[asked]))
    return found
