"""`/v1/completions`: a prompt, or several, without a chat template."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from ...api.limits import MAX_CHOICES, MAX_HTTP_ANSWER_BYTES
from ...api.model_info import ModelInfo
from ...api.output import PER_TOKEN, Output, Usage
from ...api.request import GenerateRequest
from ...errors import InvalidRequestError
from ...text.tokenizer import Tokenizer
from ..calls import Caller
from .answers import finish_reason, motet_fields, usage_of
from .app import Door, Work, send_whole
from .events import Events, stream_events
from .wire import Common, ResponseFormat, generate_request, prompts_of, structure_of

_MAX_TOKENS = 16


class CompletionRequest(Common, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[Any]  # a text, token ids, or a list of these
    max_tokens: int | None = None  # 16, as in OpenAI's API
    logprobs: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: None = None
    response_format: ResponseFormat | None = None


async def completions(door: Door, request: Request) -> Response:
    fields: Any = await door.body(request, CompletionRequest, "generate")
    caller = door.caller(request, fields.user)
    asked = await door.service.read("generate", lambda: completion_requests(fields, door.service.served), caller)
    if fields.stream_options is not None and not fields.stream:
        raise InvalidRequestError("stream_options is for a stream; set stream, or leave it out", field="stream_options")
    answer = _Answer(door, fields, asked, caller)
    return Work(answer.stream if fields.stream else answer.whole)


def completion_requests(fields: Any, model: ModelInfo) -> list[GenerateRequest]:
    """One per prompt."""
    prompts = prompts_of(fields.prompt, "prompt")
    n = fields.n or 1
    if isinstance(n, int) and len(prompts) * n > MAX_CHOICES:
        raise InvalidRequestError(
            f"{len(prompts)} prompts of {n} choices each are more than {MAX_CHOICES} answers; send fewer",
            field="prompt",
        )
    if fields.best_of is not None and fields.best_of != n:
        raise InvalidRequestError(f"best_of must be n ({n}) or absent; every choice is returned", field="best_of")
    if fields.echo and fields.logprobs is not None and fields.prompt_logprobs is None:
        fields.prompt_logprobs = fields.logprobs
    if fields.max_tokens == 0 and not fields.echo:
        raise InvalidRequestError("max_tokens must be at least 1; with echo it may be 0", field="max_tokens")
    if fields.echo and fields.stream:
        raise InvalidRequestError("echo is for a whole answer; leave it out, or stream", field="echo")
    return [
        generate_request(
            fields,
            prompt,
            model,
            max_tokens=_MAX_TOKENS if fields.max_tokens is None else max(1, fields.max_tokens),  # of 0 it is left out
            logprobs=fields.logprobs,
            structure=structure_of(fields.response_format),
        )
        for prompt in prompts
    ]


class _Answer:
    def __init__(self, door: Door, fields: Any, asked: list[GenerateRequest], caller: Caller) -> None:
        self._door, self._fields, self._asked, self._caller = door, fields, asked, caller
        self._head = {
            "id": f"cmpl-{asked[0].request_id or uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": fields.model or door.service.served.name,
            "system_fingerprint": door.service.served.digest or None,
        }

    async def whole(self, send: Send) -> None:
        service = self._door.service
        room = asyncio.Semaphore(service.at_once(len(self._asked), self._caller))

        async def complete(asked: GenerateRequest) -> list[Output]:
            async with room:
                return await service.complete(asked, self._caller, MAX_HTTP_ANSWER_BYTES)

        tasks = [asyncio.create_task(complete(asked)) for asked in self._asked]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        prompts = [await service.tokenize(asked.prompt, self._caller) for asked in self._asked if self._fields.echo]
        body = await service.encode(lambda: msgspec.json.encode(self._body(answers, prompts)))
        await send_whole(send, body)

    def _body(self, answers: Sequence[list[Output]], prompts: Sequence[tuple[int, ...]]) -> dict[str, Any]:
        per_prompt = len(answers[0])
        for outputs, prompt in zip(answers, prompts):
            self._echo(outputs, prompt)
        choices = [
            self._choice(output, index * per_prompt, 0) for index, outputs in enumerate(answers) for output in outputs
        ]
        usage = _sum([usage_of([output.usage for output in outputs]) for outputs in answers])
        return self._head | {"choices": choices, "usage": usage}

    def _echo(self, outputs: list[Output], prompt: tuple[int, ...]) -> None:
        """Put the prompt before each choice, with the log-probabilities that choice 0 has of it."""
        text = self._door.service.tokenizer.decode(prompt)
        scores, best = [math.nan, *outputs[0].prompt_logprobs], [[], *outputs[0].prompt_top_logprobs]
        for output in outputs:
            if self._fields.max_tokens == 0:
                output.text, output.stop_matched = "", None
                for name in PER_TOKEN:
                    setattr(output, name, [])
                if output.usage is not None:
                    output.usage = dataclasses.replace(output.usage, completion_tokens=0)
            output.text = text + output.text
            if self._fields.logprobs is not None:
                output.token_ids = [*prompt, *output.token_ids]
                output.logprobs, output.top_logprobs = [*scores, *output.logprobs], [*best, *output.top_logprobs]

    def _choice(self, output: Output, first: int, offset: int) -> dict[str, Any]:
        return {
            "index": first + output.choice,
            "text": output.text,
            "logprobs": logprobs_of(self._door.service.tokenizer, output, offset),
            "finish_reason": finish_reason(output),
            **motet_fields(output),
        }

    async def stream(self, send: Send) -> None:
        async with aclosing(self._chunks()) as chunks:
            await stream_events(send, chunks, str(self._head["id"]))

    async def _chunks(self) -> AsyncGenerator[Events, None]:
        usages: dict[tuple[int, int], Usage | None] = {}
        offsets: dict[int, int] = {}
        options = self._fields.stream_options
        with_usage = options is not None and options.include_usage
        per_prompt = self._asked[0].sampling.n
        async with aclosing(_merged(self._door, self._asked, self._caller)) as outputs:
            async for prompt, output in outputs:
                if output.finish_reason is not None:
                    usages[prompt, output.choice] = output.usage
                first = prompt * per_prompt
                at = first + output.choice
                choice = self._choice(output, first, offsets.get(at, 0))
                offsets[at] = offsets.get(at, 0) + len(output.text)
                yield [self._head | {"choices": [choice]} | ({"usage": None} if with_usage else {})]
        if with_usage:
            each = [
                usage_of([usage for (own, _), usage in usages.items() if own == prompt])
                for prompt in range(len(self._asked))
            ]
            yield [self._head | {"choices": [], "usage": _sum(each)}]


async def _merged(door: Door, asked: list[GenerateRequest], caller: Caller) -> AsyncGenerator[tuple[int, Output], None]:
    """The deltas of several requests as they come: (index of the request, delta)."""
    if len(asked) == 1:
        async with aclosing(door.service.generate(asked[0], caller)) as outputs:
            async for output in outputs:
                yield 0, output
        return
    reader, is_ending = asyncio.current_task(), False
    room = asyncio.Semaphore(door.service.at_once(len(asked), caller))
    queue: asyncio.Queue[tuple[int, Output | Exception | None]] = asyncio.Queue(2 * len(asked))

    async def read(index: int) -> None:
        try:
            async with room, aclosing(door.service.generate(asked[index], caller)) as outputs:
                async for output in outputs:
                    await queue.put((index, output))
            await queue.put((index, None))
        except asyncio.CancelledError:
            if not is_ending and reader is not None:
                reader.cancel()  # the service has ended the answer, because it was not read
            raise
        except Exception as error:
            await queue.put((index, error))

    tasks = [asyncio.create_task(read(index)) for index in range(len(asked))]
    unfinished = len(asked)
    try:
        while unfinished:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                unfinished -= 1
            else:
                yield index, item
    finally:
        is_ending = True
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _sum(usages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = dict(usages[0])
    for other in usages[1:]:
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            found[name] += other[name]
        cached = other["prompt_tokens_details"]["cached_tokens"]
        found["prompt_tokens_details"] = {"cached_tokens": found["prompt_tokens_details"]["cached_tokens"] + cached}
    return found


def logprobs_of(tokenizer: Tokenizer, output: Output, offset: int) -> dict[str, Any] | None:
    """OpenAI's completion form; `offset`: characters of the text before this delta."""
    if not output.logprobs:
        return None
    texts = [tokenizer.token_bytes(token_id).decode(errors="replace") for token_id in output.token_ids]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    best = [_by_text(tokenizer, top) for top in output.top_logprobs]
    return {
        "tokens": texts,
        "token_logprobs": [None if math.isnan(value) else max(value, -9999.0) for value in output.logprobs],
        "top_logprobs": [one or None for one in best] if any(best) else None,
        "text_offset": offsets,
    }


def _by_text(tokenizer: Tokenizer, top: list[tuple[int, float]]) -> dict[str, float]:
    """Text → log-probability; of tokens that look alike, such as parts of characters, the most probable."""
    found: dict[str, float] = {}
    for token_id, value in top:
        found.setdefault(tokenizer.token_bytes(token_id).decode(errors="replace"), max(value, -9999.0))
    return found
