"""Summaries and classes of documents, made of the service's answers."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..api.output import Completion
from ..api.request import Ensemble, FinishReason, GenerateRequest
from ..api.rules import Strings
from ..api.sampling import SamplingParams
from ..api.structure import Structure
from ..errors import ContextLengthError, InvalidRequestError, OverloadedError, UnavailableError
from ..text.documents import split_document
from ..text.summary import SummariseParams, joined, summary_prompt
from .calls import Caller
from .service import Service

REFINE = "\n\nThis is the summary of what came before:\n\n{summary}\n\nWrite one summary of both. The text goes on:\n\n"
TITLE = "Write a short title for this text.\n\n"
_TITLE_TOKENS = 16
_AT_ONCE = 8  # requests of one document
_MOST_WAITS, _LONGEST_WAIT_S = 20, 30.0  # for room
_LABELS = Strings("labels", 64, 256)


@dataclass(slots=True)
class Summary:
    text: str
    finish_reason: FinishReason
    title: str | None = None
    chunks: int = 0  # answers that it is made of
    prompt_tokens: int = 0
    completion_tokens: int = 0
    confidence: float | None = None  # of the last answer, if the request asked for one
    abstained: bool = False


@dataclass(frozen=True, slots=True)
class Label:
    """`logprob`: log-probability of the label's text as the answer. `probability`: among the labels."""

    label: str
    logprob: float
    probability: float


class _Worker:
    """Asks the service for one document, a few requests at once, and counts."""

    def __init__(
        self,
        service: Service,
        params: SummariseParams,
        ensemble: Ensemble | None,
        caller: Caller,
        allow_negative: bool,
    ) -> None:
        self._service, self._params, self._ensemble, self._caller = service, params, ensemble, caller
        self._allow_negative = allow_negative
        self._room = asyncio.Semaphore(service.at_once(_AT_ONCE, caller))
        self.found = Summary("", FinishReason.STOP)

    async def ask(self, instruction: str, text: str, max_tokens: int | None) -> Completion:
        async with self._room:
            return await self._ask(instruction, text, max_tokens)

    async def _ask(self, instruction: str, text: str, max_tokens: int | None) -> Completion:
        params = self._params
        tokens = await self._service.in_thread(
            lambda: summary_prompt(self._service.tokenizer, instruction, text), self._caller
        )
        request = GenerateRequest(
            tokens,
            self._ensemble,
            sampling=SamplingParams(
                max_tokens=max_tokens,
                temperature=params.temperature,
                repetition_penalty=params.repetition_penalty,
                seed=params.seed,
                speculative_tokens=params.speculative_tokens,
            ),
            abstain_below=params.abstain_below,
            drafts=params.drafts,
            allow_negative=self._allow_negative,
        )
        [answer] = await _patiently(self._service, request, self._caller, is_one_of_many=self.found.chunks > 0)
        _check_whole(answer)
        self.found.chunks += 1
        if answer.usage is not None:
            self.found.prompt_tokens += answer.usage.prompt_tokens
            self.found.completion_tokens += answer.usage.completion_tokens
        return answer

    async def map_reduce(self, texts: list[str]) -> Completion:
        """Summaries of the texts, then of their summaries, until one is left."""
        params = self._params
        while True:
            tasks = [
                asyncio.create_task(self.ask(params.instruction, text, params.max_summary_tokens)) for text in texts
            ]
            try:
                summaries = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
            told = [one for one in summaries if one.text.strip()] or summaries[:1]
            if len(told) == 1:
                return told[0]
            each = [one.text.strip() for one in told]
            texts = await self._service.in_thread(
                lambda: joined(self._service.tokenizer, params, each),  # noqa: B023
                self._caller,
            )

    async def refine(self, texts: list[str]) -> Completion:
        """A summary of the first text, rewritten with each that follows."""
        params = self._params
        answer = await self.ask(params.instruction, texts[0], params.max_summary_tokens)
        for text in texts[1:]:
            told = params.instruction.rstrip() + REFINE.format(summary=answer.text.strip())
            answer = await self.ask(told, text, params.max_summary_tokens)
        return answer


async def summarise(
    service: Service,
    text: str,
    params: SummariseParams,
    ensemble: Ensemble | None,
    caller: Caller,
    *,
    method: str = "map_reduce",
    with_title: bool = False,
    allow_negative: bool = False,
) -> Summary:
    """`method`: map_reduce, or refine, whose steps follow one another. Raises `InvalidRequestError` (no text), `ConfigError`
    (lengths that do not fit the context), and what `Service.complete` raises."""
    if not text.strip():
        raise InvalidRequestError("the text to summarise is empty", field="text")
    tokenizer, length = service.tokenizer, service.served.max_model_len
    overhead = REFINE.replace("{summary}", "") if method == "refine" else ""
    fitted = await service.in_thread(lambda: _fitted(params, overhead, tokenizer, length), caller)
    assert fitted.chunk_tokens is not None
    assert fitted.max_summary_tokens is not None
    size = fitted.chunk_tokens - (fitted.max_summary_tokens if method == "refine" else 0)
    texts = await service.in_thread(lambda: split_document(tokenizer, text, size), caller)
    worker = _Worker(service, fitted, ensemble, caller, allow_negative)
    answer = await (worker.refine(texts) if method == "refine" else worker.map_reduce(texts))
    found = worker.found
    found.text, found.finish_reason = answer.text.strip(), answer.finish_reason or FinishReason.STOP
    found.confidence, found.abstained = answer.answer_confidence, answer.abstained
    if with_title:
        title = await worker.ask(TITLE, found.text or text[:200], _TITLE_TOKENS)
        found.title = title.text.strip().split("\n")[0].strip('"* ')
    return found


def _fitted(params: SummariseParams, overhead: str, tokenizer: object, length: int) -> SummariseParams:
    """The lengths that fit; the instruction counts with what is added to it."""
    own = dataclasses.replace(params, instruction=params.instruction + overhead)
    return dataclasses.replace(own.fitted(tokenizer, length), instruction=params.instruction)  # type: ignore[arg-type]


async def _patiently(
    service: Service, request: GenerateRequest, caller: Caller, *, is_one_of_many: bool
) -> list[Completion]:
    """The answer to one request of many: when there is no room for it, the others shall not have been in vain."""
    for _ in range(_MOST_WAITS if is_one_of_many else 0):
        try:
            return await service.complete(request, caller)
        except OverloadedError as error:
            await asyncio.sleep(min(error.retry_after_s, _LONGEST_WAIT_S))
    return await service.complete(request, caller)


def _check_whole(answer: Completion) -> None:
    """Raises `UnavailableError` for an answer that was cut from outside: nothing may be made of it."""
    if answer.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
        raise UnavailableError(f"an answer on the way was cut ({answer.finish_reason}); send the request again")


async def classify(
    service: Service,
    prompt: str,
    labels: Sequence[str],
    ensemble: Ensemble | None,
    caller: Caller,
    *,
    allow_negative: bool = False,
) -> tuple[list[Label], int]:
    """How likely each label is as the answer to a prompt, the most likely first, and the tokens of the prompt. Raises
    `InvalidRequestError` and what `Service.complete` raises."""
    labels = _LABELS.check("labels", labels)
    if len(set(labels)) != len(labels) or len(labels) < 2:
        raise InvalidRequestError("a text is classified by two labels or more, each given once", field="labels")
    tokens = await service.in_thread(lambda: summary_prompt(service.tokenizer, "", prompt), caller)
    room = asyncio.Semaphore(service.at_once(_AT_ONCE, caller))

    async def score(label: str) -> tuple[float, int]:
        """The label is forced; log-probabilities are those of free text."""
        sampling = SamplingParams(temperature=0.0, logprobs=0, max_tokens=len(label.encode()) + 8)
        request = GenerateRequest(
            tokens,
            ensemble,
            sampling=sampling,
            allow_negative=allow_negative,
            structure=Structure.choice([label]),
        )
        async with room:
            [answer] = await _patiently(service, request, caller, is_one_of_many=label != labels[0])
        _check_whole(answer)
        if answer.finish_reason is not FinishReason.STOP:
            raise ContextLengthError("a label does not fit the context after this text; shorten the text", field="text")
        return math.fsum(answer.logprobs), answer.usage.prompt_tokens if answer.usage is not None else 0

    first = await score(labels[0])  # its prefix serves the others
    tasks = [asyncio.create_task(score(label)) for label in labels[1:]]
    try:
        scores = [first, *await asyncio.gather(*tasks)]
    finally:
        for task in tasks:
            task.cancel()
    most = max(value for value, _ in scores)
    total = math.fsum(math.exp(value - most) for value, _ in scores)
    found = [Label(label, value, math.exp(value - most) / total) for label, (value, _) in zip(labels, scores)]
    return sorted(found, key=lambda one: -one.logprob), first[1]
