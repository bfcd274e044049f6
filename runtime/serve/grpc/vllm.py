"""`vllm.grpc.engine.VllmEngine`, which gateways speak to vLLM. The stubs are those of the package `smg-grpc-proto`.

A gateway tokenises and detokenises; answers are token ids. An absent number of proto3 is 0, which means the default here, as it
does in vLLM. Metadata `motet-model` chooses an ensemble, as the model's name does in the HTTP API.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import time
import zipfile
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

from ...api.output import Output, join
from ...api.prompt import Prompt
from ...api.request import Ensemble, FinishReason, GenerateRequest
from ...api.sampling import SamplingParams
from ...api.structure import Structure
from ...errors import InvalidRequestError, MissingPackageError, UnimplementedError
from ..model_names import ensemble_of
from ..service import Service
from .gate import caller_of

try:
    from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2, vllm_engine_pb2_grpc
except ImportError as error:
    raise MissingPackageError(
        f"the gateways' services need packages ({error}); install them with `pip install 'motet[gateways]'`"
    ) from error

Context = Any  # grpc.aio.ServicerContext: grpc ships no types
SERVICE = "vllm.grpc.engine.VllmEngine"
_MODEL = "motet-model"
_MOST_IDS = 256
_CHUNK = 2**18  # bytes of a tokenizer at once
_NO_MEANING = ("mm_inputs", "extra_mm_inputs", "media_refs", "kv_transfer_params", "kv_transfer_params_json")
_NUMBERS = {  # of which 0 is the default
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "n": 1,
}


class VllmEngine(vllm_engine_pb2_grpc.VllmEngineServicer):  # type: ignore[misc]
    def __init__(self, service: Service) -> None:
        self._service, self._started, self._last = service, time.monotonic(), 0.0
        self._zip: bytes | None = None  # of the tokenizer, when somebody has asked

    async def Generate(self, message: Any, context: Context) -> AsyncIterator[Any]:
        caller, ensemble = caller_of(context), _ensemble(context, self._service)
        self._last = time.time()
        request = await self._service.read("generate", lambda: _request(message, ensemble), caller)
        whole: dict[int, Output] = {}
        prompt = await self._prompt_ids(request, caller)
        if not message.stream:
            for output in await self._service.complete(request, caller):
                complete = _complete(output)
                _add_logprobs(complete, output, prompt)
                yield vllm_engine_pb2.GenerateResponse(complete=complete)
            return
        async with aclosing(self._service.generate(request, caller)) as outputs:
            async for output in outputs:
                chunk = _chunk(output, whole, prompt)
                join(whole, output)
                yield vllm_engine_pb2.GenerateResponse(chunk=chunk)
                if output.finish_reason is not None:  # log-probabilities were in the chunks
                    yield vllm_engine_pb2.GenerateResponse(complete=_complete(whole[output.choice]))

    async def _prompt_ids(self, request: GenerateRequest, caller: Any) -> tuple[int, ...]:
        """Of a request that wants to know its prompt's log-probabilities; else nobody asks."""
        if request.sampling.prompt_logprobs is None:
            return ()
        return await self._service.tokenize(request.prompt, caller)

    async def Embed(self, message: Any, context: Context) -> Any:
        prompt: Prompt = tuple(message.tokenized.input_ids)
        found = await self._service.embed([prompt], _ensemble(context, self._service), caller_of(context))
        [vector] = found.vectors
        return vllm_engine_pb2.EmbedResponse(
            embedding=vector, prompt_tokens=found.prompt_tokens, embedding_dim=len(vector)
        )

    async def HealthCheck(self, _message: Any, _context: Context) -> Any:
        healthy = self._service.failure is None and not self._service.is_leaving
        return vllm_engine_pb2.HealthCheckResponse(healthy=healthy, message="" if healthy else "out of service")

    async def Abort(self, message: Any, context: Context) -> Any:
        if len(message.request_ids) > _MOST_IDS:
            raise InvalidRequestError(f"at most {_MOST_IDS} requests are ended at once", field="request_ids")
        for request_id in message.request_ids:
            self._service.abort(request_id, caller_of(context))
        return vllm_engine_pb2.AbortResponse()

    async def GetModelInfo(self, _message: Any, context: Context) -> Any:
        model = self._service.model("", caller_of(context))
        return vllm_engine_pb2.GetModelInfoResponse(
            model_path=model.name,
            served_model_name=model.name,
            tokenizer_path=model.name,
            is_generation=True,
            max_context_length=model.max_model_len,
            max_req_input_len=model.max_model_len - 1,
            vocab_size=model.vocab_size,
            model_type="motet",
            eos_token_ids=model.eos_token_ids,
            default_sampling_params_json="{}",
        )

    async def GetServerInfo(self, _message: Any, _context: Context) -> Any:
        stats = self._service.stats()
        return vllm_engine_pb2.GetServerInfoResponse(
            active_requests=stats.running + stats.waiting,
            last_receive_timestamp=self._last,
            uptime_seconds=time.monotonic() - self._started,
            server_type="motet",
            data_parallel_size=1,
            max_num_seqs=self._service.places_for_jobs,
        )

    async def GetLoads(self, _message: Any, _context: Context) -> Any:
        stats = self._service.stats()
        used = 1 - stats.free_blocks / stats.num_blocks
        most = self._service.places_for_jobs
        load = vllm_engine_pb2.SchedulerLoad(
            num_running_reqs=stats.running,
            num_waiting_reqs=stats.waiting,
            num_total_reqs=stats.running + stats.waiting,
            token_usage=used,
            cache_hit_rate=stats.cached_tokens / max(1, stats.prompt_tokens),
            utilization=stats.running / most,
            max_running_requests=most,
        )
        stamp = datetime.now(UTC).isoformat()
        return vllm_engine_pb2.GetLoadsResponse(timestamp=stamp, version="motet", dp_rank_count=1, loads=[load])

    async def GetTokenizer(self, _message: Any, context: Context) -> AsyncIterator[Any]:
        """A zip of tokenizer.json, tokenizer_config.json and chat_template.jinja, as far as there are such."""
        if self._zip is None:
            self._zip = await self._service.in_thread(lambda: _zipped(self._service), caller_of(context))
        data = self._zip
        for first in range(0, len(data), _CHUNK):
            is_last = first + _CHUNK >= len(data)
            digest = hashlib.sha256(data).hexdigest() if is_last else ""
            yield common_pb2.GetTokenizerChunk(data=data[first : first + _CHUNK], sha256=digest)
            await asyncio.sleep(0)

    async def FlushCache(self, _message: Any, _context: Context) -> None:
        raise _not_offered("FlushCache")

    async def StartProfile(self, _message: Any, _context: Context) -> None:
        raise _not_offered("StartProfile")

    async def StopProfile(self, _message: Any, _context: Context) -> None:
        raise _not_offered("StopProfile")

    async def SubscribeKvEvents(self, _message: Any, _context: Context) -> AsyncIterator[Any]:
        raise _not_offered("SubscribeKvEvents")
        yield  # makes it a stream


def add(service: Service, server: Any) -> None:
    """Let a gRPC server answer it."""
    vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(VllmEngine(service), server)


def _not_offered(name: str) -> UnimplementedError:
    return UnimplementedError(f"Motet does not offer {name}")


def _ensemble(context: Context, service: Service) -> Ensemble | None:
    names = [value for key, value in context.invocation_metadata() or () if key == _MODEL]
    if len(names) > 1:
        raise InvalidRequestError(f"metadata {_MODEL} is given twice", field=_MODEL)
    return ensemble_of(names[0], service.served) if names else None


def _request(message: Any, ensemble: Ensemble | None) -> GenerateRequest:
    """Raises `InvalidRequestError`, also for what would have no effect."""
    for name in _NO_MEANING:
        value = getattr(message, name)
        repeated = not message.DESCRIPTOR.fields_by_name[name].has_presence
        if value if repeated else message.HasField(name):
            raise InvalidRequestError(f"{name} has no meaning here; leave it out", field=name)
    if message.HasField("data_parallel_rank") and message.data_parallel_rank != 0:
        raise InvalidRequestError("data_parallel_rank must be 0: there is one engine", field="data_parallel_rank")
    prompt: Prompt = tuple(message.tokenized.input_ids) if message.HasField("tokenized") else message.text
    return GenerateRequest(
        prompt,
        ensemble,
        sampling=_sampling(message.sampling_params),
        request_id=message.request_id,
        structure=_structure(message.sampling_params),
    )


def _sampling(params: Any) -> SamplingParams:
    for name in ("truncate_prompt_tokens", "grammar_from_first_token"):
        present = params.HasField(name) if name == "truncate_prompt_tokens" else getattr(params, name)
        if present:
            raise InvalidRequestError(f"{name} is not offered; leave it out", field=name)
    numbers: dict[str, Any] = {name: getattr(params, name) or default for name, default in _NUMBERS.items()}
    return SamplingParams(
        temperature=params.temperature if params.HasField("temperature") else 1.0,
        max_tokens=params.max_tokens if params.HasField("max_tokens") else None,
        stop=tuple(params.stop),
        stop_token_ids=tuple(params.stop_token_ids),
        skip_special_tokens=params.skip_special_tokens,
        ignore_eos=params.ignore_eos,
        include_stop_str_in_output=params.include_stop_str_in_output,
        logprobs=params.logprobs if params.HasField("logprobs") else None,
        prompt_logprobs=params.prompt_logprobs if params.HasField("prompt_logprobs") else None,
        seed=params.seed % 2**64 if params.HasField("seed") else None,
        logit_bias=dict(params.logit_bias),
        **numbers,
    )


def _structure(params: Any) -> Structure | None:
    match params.WhichOneof("constraint"):
        case None:
            return None
        case "json_object":
            return Structure.json_object() if params.json_object else None
        case "choice":
            return Structure.choice(params.choice.choices)
        case "structural_tag":
            raise InvalidRequestError("structural_tag is not offered; send a grammar", field="structural_tag")
        case "json_schema":
            return Structure.json_schema(params.json_schema)
        case "regex":
            return Structure.regex(params.regex)
        case _:
            return Structure.grammar(params.grammar)


def _chunk(output: Output, whole: dict[int, Output], prompt: tuple[int, ...]) -> Any:
    earlier = whole.get(output.choice)
    before = 0 if earlier is None else len(earlier.token_ids)
    usage = output.usage
    chunk = vllm_engine_pb2.GenerateStreamChunk(
        token_ids=output.token_ids,
        prompt_tokens=usage.prompt_tokens if usage is not None else 0,
        cached_tokens=usage.cached_tokens if usage is not None else 0,
        completion_tokens=before + len(output.token_ids),
        index=output.choice,
    )
    _add_logprobs(chunk, output, prompt, 0 if earlier is None else len(earlier.prompt_logprobs))
    return chunk


def _complete(output: Output) -> Any:
    assert output.usage is not None
    reasons = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
    complete = vllm_engine_pb2.GenerateComplete(
        output_ids=output.token_ids,
        finish_reason=reasons.get(output.finish_reason or FinishReason.STOP, "abort"),
        prompt_tokens=output.usage.prompt_tokens,
        completion_tokens=output.usage.completion_tokens,
        cached_tokens=output.usage.cached_tokens,
        index=output.choice,
    )
    if isinstance(output.stop_matched, str):
        complete.matched_stop_str = output.stop_matched
    elif output.stop_matched is not None:
        complete.matched_token_id = output.stop_matched
    return complete


def _add_logprobs(target: Any, output: Output, prompt: tuple[int, ...], num_sent: int = 0) -> None:
    """`num_sent`: log-probabilities of the prompt that earlier chunks had."""
    if output.logprobs:
        target.output_logprobs.token_logprobs.extend(output.logprobs)
        target.output_logprobs.token_ids.extend(output.token_ids)
        for top in output.top_logprobs:
            _add_top(target.output_logprobs, top)
    if output.prompt_logprobs:
        values, first = target.input_logprobs, num_sent + 1 if num_sent else 0
        values.token_ids.extend(prompt[first : num_sent + 1 + len(output.prompt_logprobs)])
        if not num_sent:
            values.token_logprobs.add()  # the first token has none
            values.top_logprobs.add()
        for logprob, top in zip(output.prompt_logprobs, output.prompt_top_logprobs, strict=True):
            values.token_logprobs.add(value=logprob)
            _add_top(values, top)


def _add_top(target: Any, top: list[tuple[int, float]]) -> None:
    target.top_logprobs.add(values=[value for _, value in top], token_ids=[token_id for token_id, _ in top])


def _zipped(service: Service) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in service.tokenizer.files().items():
            archive.writestr(zipfile.ZipInfo(name), text)
        archive.writestr(zipfile.ZipInfo("config.json"), json.dumps({"model_type": "motet"}))
    return content.getvalue()
