"""The Open Inference Protocol (KServe v2) and Triton's stream, with the tensors of Triton's vLLM backend.

In: `text_input` BYTES [1]; optional `stream` BOOL [1], `sampling_parameters` BYTES [1] (JSON: the fields of /v1/completions) and
`exclude_input_in_output` BOOL [1]. Out: `text_output` BYTES, one per choice, and `finish_reason` BYTES and `token_count` INT32.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import struct
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec

from ....proto import grpc_predict_v2_pb2 as v2
from ....proto import grpc_predict_v2_pb2_grpc
from ...api.output import Output
from ...api.request import GenerateRequest
from ...errors import InvalidRequestError, MissingPackageError, MotetError, shown
from ..calls import Caller
from ..model_names import ensemble_of
from ..service import Service
from .gate import caller_of

try:
    from ..http.app import decoded
    from ..http.completions import CompletionRequest, completion_requests
except ImportError as error:
    raise MissingPackageError(
        f"the gateways' services need packages ({error}); install them with `pip install 'motet[gateways]'`"
    ) from error

Context = Any  # grpc.aio.ServicerContext: grpc ships no types
SERVICE = "inference.GRPCInferenceService"
_WITHOUT_OUTPUT = {
    *("prompt", "model", "stream", "stream_options", "echo", "logprobs", "prompt_logprobs", "logprob_token_ids"),
    *("return_member_logprobs", "return_confidence", "abstain_below"),
}
_NEXT_S = 300.0  # for the next request of a stream
_INPUTS = {
    "text_input": "BYTES",
    "stream": "BOOL",
    "sampling_parameters": "BYTES",
    "exclude_input_in_output": "BOOL",
}
_OUTPUTS = {"text_output": "BYTES", "finish_reason": "BYTES", "token_count": "INT32"}


@dataclasses.dataclass(frozen=True, slots=True)
class _Asked:
    request: GenerateRequest
    stream: bool
    prefix: str  # of every answer: the prompt, if it was asked for
    outputs: tuple[str, ...]


class KServe(grpc_predict_v2_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, service: Service) -> None:
        self._service = service

    async def ServerLive(self, _message: Any, _context: Context) -> v2.ServerLiveResponse:
        return v2.ServerLiveResponse(live=self._service.failure is None)

    async def ServerReady(self, _message: Any, _context: Context) -> v2.ServerReadyResponse:
        return v2.ServerReadyResponse(ready=self._is_ready)

    @property
    def _is_ready(self) -> bool:
        return self._service.failure is None and not self._service.is_leaving

    async def ModelReady(self, message: v2.ModelReadyRequest, _context: Context) -> v2.ModelReadyResponse:
        ensemble_of(message.name, self._service.served)
        return v2.ModelReadyResponse(ready=self._is_ready)

    async def ServerMetadata(self, _message: Any, _context: Context) -> v2.ServerMetadataResponse:
        return v2.ServerMetadataResponse(name="motet", version="2", extensions=["stream"])

    async def ModelMetadata(self, message: v2.ModelMetadataRequest, context: Context) -> v2.ModelMetadataResponse:
        model = self._service.model("", caller_of(context))
        ensemble_of(message.name, model)
        tensor = v2.ModelMetadataResponse.TensorMetadata
        return v2.ModelMetadataResponse(
            name=message.name or model.name,
            versions=["1"],
            platform="motet",
            inputs=[tensor(name=name, datatype=kind, shape=[1]) for name, kind in _INPUTS.items()],
            outputs=[tensor(name=name, datatype=kind, shape=[-1]) for name, kind in _OUTPUTS.items()],
            properties={"digest": model.digest},
        )

    async def ModelInfer(self, message: v2.ModelInferRequest, context: Context) -> v2.ModelInferResponse:
        caller = caller_of(context)
        asked = await self._service.read("complete", lambda: _read(message, self._service), caller)
        if asked.stream:
            raise InvalidRequestError("stream is for ModelStreamInfer; leave it out", field="stream")
        choices = await self._service.complete(asked.request, caller)
        return _response(message, asked, choices)

    async def ModelStreamInfer(
        self, messages: AsyncIterator[v2.ModelInferRequest], context: Context
    ) -> AsyncIterator[v2.ModelStreamInferResponse]:
        """Requests one after the other. An error is a message, as Triton's clients expect, and the stream goes on."""
        caller = caller_of(context)
        while True:
            try:
                message = await asyncio.wait_for(anext(messages), _NEXT_S)
            except (StopAsyncIteration, TimeoutError):
                return
            try:
                async with aclosing(self._answer(message, caller)) as responses:
                    async for response in responses:
                        yield v2.ModelStreamInferResponse(infer_response=response)
            except MotetError as error:
                failed = v2.ModelInferResponse(model_name=message.model_name, id=message.id)
                yield v2.ModelStreamInferResponse(error_message=str(error), infer_response=failed)

    async def _answer(self, message: v2.ModelInferRequest, caller: Caller) -> Any:
        asked = await self._service.read("generate", lambda: _read(message, self._service), caller)
        if not asked.stream:
            response = _response(message, asked, await self._service.complete(asked.request, caller))
            response.parameters["triton_final_response"].bool_param = True
            yield response
            return
        unfinished, begun = asked.request.sampling.n, set[int]()
        async with aclosing(self._service.generate(asked.request, caller)) as outputs:
            async for output in outputs:
                unfinished -= output.finish_reason is not None
                own = asked if output.choice not in begun else dataclasses.replace(asked, prefix="")
                begun.add(output.choice)
                response = _response(message, own, [output])
                response.parameters["choice"].int64_param = output.choice
                response.parameters["triton_final_response"].bool_param = not unfinished
                yield response


def add(service: Service, server: Any) -> None:
    """Let a gRPC server answer it."""
    grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(KServe(service), server)  # type: ignore[no-untyped-call]


def _read(message: v2.ModelInferRequest, service: Service) -> _Asked:
    """Raises `InvalidRequestError`, also for what would have no effect."""
    values = _tensors(message)
    if "text_input" not in values:
        raise InvalidRequestError("a request has the input text_input", field="text_input")
    if message.model_version not in ("", "1"):
        raise InvalidRequestError(f"there is one version, 1, got {shown(message.model_version)}", field="model_version")
    names = tuple(output.name for output in message.outputs) or tuple(_OUTPUTS)
    for output in message.outputs:
        if output.name not in _OUTPUTS or output.parameters:
            raise InvalidRequestError(f"outputs are {list(_OUTPUTS)}, without parameters", field="outputs")
    try:
        body = json.loads(values.get("sampling_parameters", b"{}"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"sampling_parameters is not JSON: {error}", field="sampling_parameters") from None
    if not isinstance(body, dict):
        raise InvalidRequestError("sampling_parameters is a JSON object", field="sampling_parameters")
    for name, parameter in message.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if name.startswith("triton_"):  # of the client library itself
            continue
        if kind is None or name in body:
            raise InvalidRequestError(f"the parameter {shown(name)} is empty, or given twice", field=name)
        body[name] = getattr(parameter, kind)
    if refused := _WITHOUT_OUTPUT & set(body):
        raise InvalidRequestError(
            f"{sorted(refused)} are no parameters here, or have no output", field="sampling_parameters"
        )
    text = values["text_input"].decode(errors="strict")
    if message.id:
        body.setdefault("request_id", message.id)
    content = msgspec.json.encode(body | {"prompt": text, "model": message.model_name})
    [request] = completion_requests(decoded(content, CompletionRequest), service.served)
    exclude = values.get("exclude_input_in_output", b"\x01") != b"\x00"
    return _Asked(request, values.get("stream", b"\x00") != b"\x00", "" if exclude else text, names)


def _tensors(message: v2.ModelInferRequest) -> dict[str, bytes]:
    """Name → the bytes of its one element."""
    found: dict[str, bytes] = {}
    raw = list(message.raw_input_contents)
    if raw and len(raw) != len(message.inputs):
        raise InvalidRequestError("raw_input_contents has one entry per input, or none", field="raw_input_contents")
    for index, tensor in enumerate(message.inputs):
        name = tensor.name
        if name not in _INPUTS or name in found or tensor.datatype != _INPUTS[name]:
            raise InvalidRequestError(
                f"inputs are {_INPUTS}, each given once; got {shown(name)} of type {shown(tensor.datatype)}",
                field="inputs",
            )
        if tuple(tensor.shape) not in ((1,), (1, 1)):
            raise InvalidRequestError(f"{name} has the shape [1], got {list(tensor.shape)[:8]}", field=name)
        if tensor.parameters:
            raise InvalidRequestError(f"{name} takes no parameters; leave them out", field=name)
        found[name] = _raw(raw[index], name) if raw else _content(tensor, name)
    for name in ("text_input", "sampling_parameters"):
        if name in found:
            try:
                found[name].decode()
            except UnicodeDecodeError:
                raise InvalidRequestError(f"{name} is not UTF-8", field=name) from None
    return found


def _raw(data: bytes, name: str) -> bytes:
    if _INPUTS[name] == "BOOL":
        if len(data) == 1:
            return data
    elif len(data) >= 4 and struct.unpack("<I", data[:4])[0] == len(data) - 4:
        return data[4:]
    raise InvalidRequestError(f"the raw content of {name} is no one element of its type", field=name)


def _content(tensor: Any, name: str) -> bytes:
    values = tensor.contents.bool_contents if _INPUTS[name] == "BOOL" else tensor.contents.bytes_contents
    if len(values) != 1:
        raise InvalidRequestError(f"{name} has one element, got {len(values)}", field=name)
    return bytes([values[0]]) if _INPUTS[name] == "BOOL" else values[0]


def _response(message: v2.ModelInferRequest, asked: _Asked, choices: list[Output]) -> v2.ModelInferResponse:
    values: dict[str, tuple[list[Any], bytes]] = {}
    texts = [(asked.prefix + output.text).encode() for output in choices]
    reasons = [str(output.finish_reason or "").encode() for output in choices]
    counts = [len(output.token_ids) for output in choices]
    values["text_output"] = (texts, _packed(texts))
    values["finish_reason"] = (reasons, _packed(reasons))
    values["token_count"] = (counts, struct.pack(f"<{len(counts)}i", *counts))
    response = v2.ModelInferResponse(model_name=message.model_name, model_version="1", id=message.id)
    for name in asked.outputs:
        response.outputs.add(name=name, datatype=_OUTPUTS[name], shape=[len(choices)])
        response.raw_output_contents.append(values[name][1])
    return response


def _no_number(text: str) -> float:
    """JSON has no NaN and no infinity; written again, they would be null, and so a default."""
    raise ValueError(f"{text} is not a number of JSON")


def _packed(texts: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)
