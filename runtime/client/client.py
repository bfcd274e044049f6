"""`Client` and `AsyncClient`: call a Motet server from Python. They raise the error classes that the server raised."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ...proto import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from ..api.model_info import ModelInfo
from ..api.output import Completion, Output, join
from ..api.prompt import Prompt, PromptContent
from ..api.request import Ensemble, Member, Space
from ..api.rules import Flag
from ..api.sampling import SamplingParams, check_names
from ..api.structure import Structure
from ..errors import InvalidEnsembleError, InvalidRequestError, shown
from ..serve.grpc.answers import model_from_proto, output_from_response
from ..serve.grpc.statuses import error_of
from ..serve.grpc.wire import ensemble_to_proto, prompt_to_proto, request_to_proto
from .connection import Connection
from .media import with_files

Mix = Ensemble | Mapping[str, float] | None


def _message(
    prompt: Prompt,
    *,
    mix: Mix = None,
    space: Space | None = None,
    views: Sequence[Prompt] = (),
    request_id: str = "",
    time_limit_s: float | None = None,
    return_member_logprobs: bool = False,
    return_confidence: bool = False,
    abstain_below: float | None = None,
    drafts: int = 0,
    priority: int = 0,
    cache_salt: str = "",
    structure: Structure | None = None,
    sampling: SamplingParams | None = None,
    **fields: Any,
) -> inference_pb2.GenerateRequest:
    """The options of a request, which all calls share, as a proto.

    `mix`: a mapping member → coefficient, or an `Ensemble`, whose members with view i see `views[i - 1]`; None is the
    bundle's own. `space`: of a `mix` that is a mapping; default LOGITS. `request_id` is returned with every output.
    `time_limit_s`: seconds after which the answer ends with what it has. `return_confidence`, `abstain_below`,
    `drafts`, `priority`, `cache_salt`, `structure`: see `GenerateRequest`. Sampling parameters are passed as `sampling`
    or as keywords. Everything is checked before anything is sent; an option that would have no effect is refused.
    Raises `InvalidRequestError`, `InvalidEnsembleError`.
    """
    check_names(fields, _OPTIONS)
    if sampling is not None and fields:
        raise InvalidRequestError(
            f"sampling is given, and {sorted(fields)} beside it; put them into sampling", field="sampling"
        )
    if isinstance(views, str):
        raise InvalidRequestError("views must be a list with one prompt per view, got one text", field="views")
    return request_to_proto(
        with_files(prompt),
        ensemble=_ensemble(mix, space),
        views=tuple(map(with_files, views)),
        sampling=sampling if sampling is not None else SamplingParams(**fields),
        request_id=request_id,
        time_limit_s=time_limit_s,
        return_member_logprobs=return_member_logprobs,
        return_confidence=return_confidence,
        abstain_below=abstain_below,
        drafts=drafts,
        priority=priority,
        cache_salt=cache_salt,
        structure=structure,
    )


def _ensemble(mix: Mix, space: Space | None) -> Ensemble | None:
    if space is not None and not isinstance(mix, Mapping):
        raise InvalidEnsembleError(
            "space is of a mix of member names; give mix, or set the space of the Ensemble", field="ensemble.space"
        )
    if isinstance(mix, Mapping):
        members = tuple(Member(name, coefficient) for name, coefficient in mix.items())
        return Ensemble(members, Space.LOGITS if space is None else space)
    if not isinstance(mix, Ensemble | None):
        raise InvalidEnsembleError(
            f"mix must be a mapping of member names to coefficients or an Ensemble, got {shown(mix)}", field="ensemble"
        )
    return mix


def _embed(prompts: Sequence[Prompt], mix: Mix) -> inference_pb2.EmbedRequest:
    if isinstance(prompts, str):
        raise InvalidRequestError("prompts must be a list with one prompt per embedding, got one text", field="input")
    message = inference_pb2.EmbedRequest(prompts=[prompt_to_proto(with_files(prompt)) for prompt in prompts])
    if (ensemble := _ensemble(mix, None)) is not None:
        message.ensemble.CopyFrom(ensemble_to_proto(ensemble))
    return message


def _tokenize(prompt: Prompt) -> inference_pb2.TokenizeRequest:
    return inference_pb2.TokenizeRequest(prompt=prompt_to_proto(with_files(prompt)))


def _detokenize(token_ids: Sequence[int], skip_special_tokens: bool) -> inference_pb2.DetokenizeRequest:
    content = PromptContent.read(token_ids)
    if content.token_ids is None:
        raise InvalidRequestError("token_ids must be a list of integers", field="token_ids")
    Flag().check("skip_special_tokens", skip_special_tokens)
    return inference_pb2.DetokenizeRequest(token_ids=content.token_ids, skip_special_tokens=skip_special_tokens)


_OPTIONS = [
    name for name, option in inspect.signature(_message).parameters.items() if option.kind is option.KEYWORD_ONLY
]


class Client:
    """Synchronous client.

    >>> with Client("127.0.0.1:50051") as client:
    ...     for delta in client.generate("Once upon a time", mix={"code": 0.3, "docs": 0.7}, max_tokens=40):
    ...         print(delta.text, end="", flush=True)

    `address`: host:port, or a `Connection` with a key or TLS. `prompt`: text, token ids, messages ({"role", "content"}), or
    a `Conversation`. A content is a text, or a list of parts: {"type": "text", "text"}, {"type": "image", "image"} and
    {"type": "audio", "audio"}, where image and audio are a `pathlib.Path` or the bytes of a file, image also an image of Pillow,
    audio also (samples [frames] or [frames, channels], samples a second). Options: see `_message` (mix, space, views,
    request_id, time_limit_s, return_member_logprobs, return_confidence, abstain_below, drafts, priority, cache_salt, structure,
    sampling, or the fields of `SamplingParams`).
    `timeout_s` is the call's deadline, after which it fails; after `time_limit_s` the answer ends with what it has.
    Raises the errors of the server, and `UnavailableError` if there is no answer from it.
    """

    def __init__(self, address: str | Connection = "127.0.0.1:50051") -> None:
        connection = Connection(address) if isinstance(address, str) else address
        self._channel, self._metadata = connection.channel(), connection.metadata
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._admin = admin_pb2_grpc.AdminStub(self._channel)  # type: ignore[no-untyped-call]
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def generate(self, prompt: Prompt, *, timeout_s: float | None = None, **options: Any) -> Iterator[Output]:
        """Stream the deltas of all choices. Leaving the loop early cancels the request."""
        message = _message(prompt, **options)
        return self._deltas(self._inference.Generate(message, timeout=timeout_s, metadata=self._metadata))

    def _deltas(self, call: Any) -> Iterator[Output]:
        try:
            for response in call:
                yield output_from_response(response)
        except grpc.RpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()

    def complete(self, prompt: Prompt, *, timeout_s: float | None = None, **options: Any) -> list[Completion]:
        """The whole answer: `n` completions, in the order of the choices. It is streamed: its size has no limit."""
        choices: dict[int, Completion] = {}
        for delta in self.generate(prompt, timeout_s=timeout_s, **options):
            join(choices, delta)
        return [choices[choice] for choice in sorted(choices)]

    def embed(self, prompts: Sequence[Prompt], *, mix: Mix = None, timeout_s: float | None = None) -> list[list[float]]:
        """The embedding of each prompt, of length 1: Σ mix · mean of the member's final hidden states."""
        try:
            response = self._inference.Embed(_embed(prompts, mix), timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error
        return [list(embedding.values) for embedding in response.embeddings]

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, chat template applied."""
        try:
            request = _tokenize(prompt)
            response = self._inference.Tokenize(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error
        return list(response.token_ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        try:
            request = _detokenize(token_ids, skip_special_tokens)
            response = self._inference.Detokenize(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error
        return str(response.text)

    def models(self) -> list[ModelInfo]:
        """The models that the server serves."""
        try:
            response = self._admin.ListModels(admin_pb2.ListModelsRequest(), metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error
        return [model_from_proto(model) for model in response.models]

    def abort(self, request_id: str) -> int:
        """End the open requests with this id, of whichever client of the tenant; their answers keep what they have. Returns
        how many there were."""
        try:
            response = self._inference.Abort(inference_pb2.AbortRequest(request_id=request_id), metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error
        return int(response.aborted)

    def drain(self) -> None:
        """Let the server finish the requests that run, accept no more, and end."""
        try:
            self._admin.Drain(admin_pb2.DrainRequest(), metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error

    def is_serving(self, timeout_s: float = 5.0) -> bool:
        """Whether the server's health service reports SERVING within `timeout_s` seconds."""
        try:
            response = self._health.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=True)
        except grpc.RpcError:
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


class AsyncClient:
    """`Client` for asyncio programs: the same methods, arguments and errors."""

    def __init__(self, address: str | Connection = "127.0.0.1:50051") -> None:
        connection = Connection(address) if isinstance(address, str) else address
        self._channel, self._metadata = connection.aio_channel(), connection.metadata
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._admin = admin_pb2_grpc.AdminStub(self._channel)  # type: ignore[no-untyped-call]
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close(None)

    async def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Any
    ) -> AsyncIterator[Output]:
        message = await asyncio.to_thread(
            _message, prompt, **options
        )  # media are read and written: it may take seconds
        call = self._inference.Generate(message, timeout=timeout_s, metadata=self._metadata)
        try:
            async for response in call:
                yield output_from_response(response)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()

    async def complete(self, prompt: Prompt, *, timeout_s: float | None = None, **options: Any) -> list[Completion]:
        choices: dict[int, Completion] = {}
        async for delta in self.generate(prompt, timeout_s=timeout_s, **options):
            join(choices, delta)
        return [choices[choice] for choice in sorted(choices)]

    async def embed(
        self, prompts: Sequence[Prompt], *, mix: Mix = None, timeout_s: float | None = None
    ) -> list[list[float]]:
        message = await asyncio.to_thread(_embed, prompts, mix)
        call = self._inference.Embed(message, timeout=timeout_s, metadata=self._metadata)
        return [list(embedding.values) for embedding in (await _answer(call)).embeddings]

    async def tokenize(self, prompt: Prompt) -> list[int]:
        request = await asyncio.to_thread(_tokenize, prompt)
        return list((await _answer(self._inference.Tokenize(request, metadata=self._metadata))).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        request = _detokenize(token_ids, skip_special_tokens)
        return str((await _answer(self._inference.Detokenize(request, metadata=self._metadata))).text)

    async def models(self) -> list[ModelInfo]:
        response = await _answer(self._admin.ListModels(admin_pb2.ListModelsRequest(), metadata=self._metadata))
        return [model_from_proto(model) for model in response.models]

    async def abort(self, request_id: str) -> int:
        request = inference_pb2.AbortRequest(request_id=request_id)
        return int((await _answer(self._inference.Abort(request, metadata=self._metadata))).aborted)

    async def drain(self) -> None:
        await _answer(self._admin.Drain(admin_pb2.DrainRequest(), metadata=self._metadata))

    async def is_serving(self, timeout_s: float = 5.0) -> bool:
        call = self._health.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=True)
        try:
            return bool((await call).status == health_pb2.HealthCheckResponse.SERVING)
        except grpc.aio.AioRpcError:
            return False


async def _answer(call: Any) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise error_of(error) from error
