"""What gateways speak: vLLM's engine service on the public stubs, and the Open Inference Protocol with Triton's own client."""

from __future__ import annotations

import importlib.util
import io
import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import grpc
import numpy as np
import pytest
from helpers.fake_backend import FakeBackend, make_engine
from helpers.servers import serving
from motet.proto import grpc_predict_v2_pb2 as v2
from motet.proto import grpc_predict_v2_pb2_grpc
from motet.runtime.api.output import Output, join
from motet.runtime.client.client import Client
from motet.runtime.serve.grpc import vllm as gateway
from motet.runtime.serve.grpc.gate import OPEN_TO_ALL, ROLES
from motet.runtime.serve.grpc.vllm import vllm_engine_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
CODES = grpc.StatusCode


@pytest.fixture(scope="module")
def address(tokenizer):
    with (
        make_engine(tokenizer, FakeBackend(200, vocab_size=259), max_num_seqs=16) as engine,
        serving(engine, with_gateways=True, with_reflection=True) as running,
    ):
        yield running.address


@pytest.fixture(scope="module")
def channel(address):
    with grpc.insecure_channel(address) as channel:
        yield channel


@pytest.fixture(scope="module")
def vllm(channel):
    return vllm_engine_pb2_grpc.VllmEngineStub(channel)


@pytest.fixture(scope="module")
def kserve(channel):
    return grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def own(address):
    with Client(address) as client:
        yield client


def test_the_table_has_every_method():
    engine = vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"]
    for service in (engine, v2.DESCRIPTOR.services_by_name["GRPCInferenceService"]):
        for method in service.methods:
            name = f"/{service.full_name}/{method.name}"
            assert (name in ROLES) != name.startswith(OPEN_TO_ALL), name


# ---- vLLM's service --------------------------------------------------------------------------------------------------


def message(ids=(5, 6, 7), stream=False, request_id="r", **params):
    return vllm_engine_pb2.GenerateRequest(
        request_id=request_id,
        tokenized=vllm_engine_pb2.TokenizedInput(input_ids=ids),
        stream=stream,
        sampling_params=vllm_engine_pb2.SamplingParams(**(GREEDY | params)),
    )


def test_generate_is_the_own_clients_answer(vllm, own):
    options = {"temperature": 0.8, "seed": 9, "n": 3, "top_k": 7, "logprobs": 2, "prompt_logprobs": 1}
    expected = own.complete([5, 6, 7], max_tokens=12, ignore_eos=True, **options)
    whole = {one.complete.index: one.complete for one in vllm.Generate(message(**options))}
    assert set(whole) == {0, 1, 2}
    for one in expected:
        found = whole[one.choice]
        assert list(found.output_ids) == one.token_ids
        assert found.finish_reason == "length"
        assert (found.prompt_tokens, found.completion_tokens) == (3, 12)
        np.testing.assert_allclose(found.output_logprobs.token_logprobs, one.logprobs, rtol=1e-5)
        assert [list(top.token_ids) for top in found.output_logprobs.top_logprobs] == [
            [token for token, _ in top] for top in one.top_logprobs
        ]
    values = whole[0].input_logprobs
    assert list(values.token_ids) == [5, 6, 7]
    assert not values.token_logprobs[0].HasField("value")
    np.testing.assert_allclose([v.value for v in values.token_logprobs[1:]], expected[0].prompt_logprobs, rtol=1e-5)
    chunks: dict[int, list[int]] = {}
    for one in vllm.Generate(message(stream=True, **options)):
        if one.HasField("chunk"):
            chunks.setdefault(one.chunk.index, []).extend(one.chunk.token_ids)
            assert one.chunk.completion_tokens == len(chunks[one.chunk.index])
        else:
            assert list(one.complete.output_ids) == chunks[one.complete.index]
    assert chunks == {one.choice: one.token_ids for one in expected}


def test_a_long_prompts_log_probabilities_come_in_pieces():
    """A step scores a part of it; each chunk has the tokens that its values belong to."""
    ids, whole, parts = tuple(range(30, 40)), {}, []
    for values in ([-1.0, -2.0, -3.0], [-4.0] * 5, [-5.0]):
        output = Output("r", 0, 0, prompt_logprobs=values, prompt_top_logprobs=[[(7, value)] for value in values])
        parts.append(gateway._chunk(output, whole, ids).input_logprobs)
        join(whole, output)
    assert [list(part.token_ids) for part in parts] == [[30, 31, 32, 33], [34, 35, 36, 37, 38], [39]]
    assert all(len(p.token_ids) == len(p.token_logprobs) == len(p.top_logprobs) for p in parts)
    found = [value for part in parts for value in part.token_logprobs]
    assert not found[0].HasField("value")
    assert [value.value for value in found[1:]] == [-1.0, -2.0, -3.0] + [-4.0] * 5 + [-5.0]


def test_an_absent_number_is_the_default(vllm, own):
    [expected] = own.complete([5, 6, 7], max_tokens=12, ignore_eos=True, seed=4)
    params = vllm_engine_pb2.SamplingParams(max_tokens=12, ignore_eos=True, seed=4)
    asked = vllm_engine_pb2.GenerateRequest(tokenized={"input_ids": [5, 6, 7]}, sampling_params=params)
    [found] = vllm.Generate(asked)
    assert list(found.complete.output_ids) == expected.token_ids
    asked = vllm_engine_pb2.GenerateRequest(text="hello", sampling_params=params)
    [found] = vllm.Generate(asked)
    assert list(found.complete.output_ids) == own.complete("hello", max_tokens=12, ignore_eos=True, seed=4)[0].token_ids


def test_constraints_stops_and_ensembles(vllm, own, tokenizer):
    def text(**params):
        [found] = vllm.Generate(message(ignore_eos=False, **params))
        return tokenizer.decode(found.complete.output_ids), found.complete

    assert text(choice={"choices": ["yes", "no"]})[0] in ("yes", "no")
    assert text(regex="[ab]{3}")[0].strip("ab") == ""
    assert text(json_object=True)[0].startswith("{")
    assert text(json_schema='{"enum": ["x"]}')[0] == '"x"'
    assert text(grammar='start: "q"')[0] == "q"
    [free] = own.complete([5, 6, 7], **GREEDY)
    stopped = text(stop_token_ids=[free.token_ids[3]])[1]
    assert (stopped.finish_reason, stopped.matched_token_id) == ("stop", free.token_ids[3])
    [mixed] = own.complete([5, 6, 7], mix={"b": 0.5, "c": 0.5}, **GREEDY)
    [found] = vllm.Generate(message(), metadata=[("motet-model", "fake:b=0.5,c=0.5")])
    assert list(found.complete.output_ids) == mixed.token_ids


REFUSED = {
    "truncation": {"truncate_prompt_tokens": 3},
    "structural tag": {"structural_tag": "{}"},
    "all logprobs": {"logprobs": -1},
    "a wrong value": {"top_p": 2.0},
    "a broken schema": {"json_schema": "{"},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(vllm, case):
    with pytest.raises(grpc.RpcError) as refused:
        list(vllm.Generate(message(**REFUSED[case])))
    assert refused.value.code() is CODES.INVALID_ARGUMENT


def test_what_has_no_meaning_is_refused(vllm):
    for field in (
        {"kv_transfer_params_json": "{}"},
        {"mm_inputs": {}},
        {"extra_mm_inputs": [{}]},
        {"data_parallel_rank": 1},
    ):
        asked = message()
        asked.MergeFrom(vllm_engine_pb2.GenerateRequest(**field))
        with pytest.raises(grpc.RpcError) as refused:
            list(vllm.Generate(asked))
        assert refused.value.code() is CODES.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as refused:
        vllm.FlushCache(common_pb2.FlushCacheRequest())
    assert refused.value.code() in (CODES.UNIMPLEMENTED, CODES.PERMISSION_DENIED)


def test_the_rest_of_the_engine(vllm, own, tokenizer):
    assert vllm.HealthCheck(vllm_engine_pb2.HealthCheckRequest()).healthy
    info = vllm.GetModelInfo(vllm_engine_pb2.GetModelInfoRequest())
    assert (info.served_model_name, info.max_context_length, info.is_generation) == ("fake", 96, True)
    loads = vllm.GetLoads(vllm_engine_pb2.GetLoadsRequest()).loads
    assert (loads[0].max_running_requests, loads[0].num_running_reqs) == (16, 0)
    assert vllm.GetServerInfo(vllm_engine_pb2.GetServerInfoRequest()).uptime_seconds > 0
    vllm.Abort(vllm_engine_pb2.AbortRequest(request_ids=["nobody"]))
    found = vllm.Embed(vllm_engine_pb2.EmbedRequest(tokenized={"input_ids": [5, 6, 7]}))
    np.testing.assert_allclose(found.embedding, own.embed([[5, 6, 7]])[0], rtol=1e-6)
    chunks = list(vllm.GetTokenizer(common_pb2.GetTokenizerRequest()))
    with zipfile.ZipFile(io.BytesIO(b"".join(chunk.data for chunk in chunks))) as archive:
        assert archive.read("tokenizer.json").decode() == tokenizer.to_json()
        assert "im_start" in archive.read("chat_template.jinja").decode()
    assert len(chunks[-1].sha256) == 64


# ---- the Open Inference Protocol -------------------------------------------------------------------------------------


def tensor(name, value):
    kind = "BOOL" if isinstance(value, bool) else "BYTES"
    contents = {"bool_contents": [value]} if isinstance(value, bool) else {"bytes_contents": [value.encode()]}
    return {"name": name, "datatype": kind, "shape": [1], "contents": contents}


def infer(text="hello", model="fake", raw=False, outputs=(), **inputs):
    values = {"text_input": text, **inputs}
    request = v2.ModelInferRequest(
        model_name=model,
        inputs=[tensor(*item) for item in values.items()],
        outputs=[{"name": name} for name in outputs],
    )
    if raw:
        for one in request.inputs:
            data = bytes(one.contents.bool_contents) or one.contents.bytes_contents[0]
            request.raw_input_contents.append(data if one.datatype == "BOOL" else struct.pack("<I", len(data)) + data)
            one.ClearField("contents")
    return request


def texts(response, name="text_output"):
    index = [output.name for output in response.outputs].index(name)
    data, found = response.raw_output_contents[index], []
    while data:
        size = struct.unpack("<I", data[:4])[0]
        found.append(data[4 : 4 + size].decode())
        data = data[4 + size :]
    return found


SAMPLING = json.dumps(GREEDY)


def test_infer_is_the_own_clients_answer(kserve, own):
    [expected] = own.complete("hello", **GREEDY)
    for raw in (True, False):
        found = kserve.ModelInfer(infer(sampling_parameters=SAMPLING, raw=raw))
        assert texts(found) == [expected.text]
        assert texts(found, "finish_reason") == ["length"]
    with_input = kserve.ModelInfer(infer(sampling_parameters=SAMPLING, exclude_input_in_output=False))
    assert texts(with_input) == ["hello" + expected.text]
    several = json.dumps(GREEDY | {"n": 2, "temperature": 0.7, "seed": 3})
    choices = own.complete("hello", **(GREEDY | {"n": 2, "temperature": 0.7, "seed": 3}))
    only = kserve.ModelInfer(infer(sampling_parameters=several, outputs=["text_output"]))
    assert texts(only) == [one.text for one in choices]
    assert [output.name for output in only.outputs] == ["text_output"]
    [mixed] = own.complete("hello", mix={"b": 1.0}, **GREEDY)
    assert texts(kserve.ModelInfer(infer(model="fake:b", sampling_parameters=SAMPLING))) == [mixed.text]


def test_stream_infer(kserve, own):
    [expected] = own.complete("hello", **GREEDY)
    good = infer(sampling_parameters=SAMPLING, stream=True)
    good.id = "x"
    bad = infer(sampling_parameters='{"temperature": -1}', stream=True)
    found, errors, finals = "", [], 0
    for response in kserve.ModelStreamInfer(iter([good, bad, good])):
        if response.error_message:
            errors.append(response.error_message)
        else:
            found += texts(response.infer_response)[0]
            finals += response.infer_response.parameters["triton_final_response"].bool_param
            assert response.infer_response.id == "x"
    assert found == 2 * expected.text
    assert (len(errors), finals) == (1, 2)
    assert "temperature" in errors[0]


BAD = {
    "no input": v2.ModelInferRequest(model_name="fake"),
    "an unknown input": infer(colour="red"),
    "another model": infer(model="gpt"),
    "no JSON": infer(sampling_parameters="{"),
    "an unknown field": infer(sampling_parameters='{"best": 1}'),
    "an unknown output": infer(outputs=["logits"]),
    "a stream": infer(stream=True),
    "a prompt twice": infer(sampling_parameters='{"prompt": "x"}'),
    "torn raw content": v2.ModelInferRequest(
        model_name="fake",
        inputs=[{"name": "text_input", "datatype": "BYTES", "shape": [1]}],
        raw_input_contents=[b"\x09"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_infer_refuses(kserve, case):
    with pytest.raises(grpc.RpcError) as refused:
        kserve.ModelInfer(BAD[case])
    assert refused.value.code() in (CODES.INVALID_ARGUMENT, CODES.NOT_FOUND)


def test_metadata(kserve):
    assert kserve.ServerLive(v2.ServerLiveRequest()).live
    assert kserve.ServerReady(v2.ServerReadyRequest()).ready
    assert kserve.ModelReady(v2.ModelReadyRequest(name="fake")).ready
    found = kserve.ModelMetadata(v2.ModelMetadataRequest(name="fake"))
    assert found.inputs[0].name == "text_input"
    assert kserve.ServerMetadata(v2.ServerMetadataRequest()).name == "motet"
    with pytest.raises(grpc.RpcError):
        kserve.ModelReady(v2.ModelReadyRequest(name="gpt"))


TRITON = """
import json, queue, sys
import numpy as np
import tritonclient.grpc as triton
client = triton.InferenceServerClient(sys.argv[1])
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("fake")
def tensor(name, value):
    kind = "BOOL" if isinstance(value, bool) else "BYTES"
    one = triton.InferInput(name, [1], kind)
    one.set_data_from_numpy(np.array([value], bool) if kind == "BOOL" else np.array([value.encode()], object))
    return one
def inputs(stream):
    return [tensor("text_input", "hello"), tensor("stream", stream), tensor("sampling_parameters", sys.argv[2])]
whole = client.infer("fake", inputs(False)).as_numpy("text_output")[0].decode()
found = queue.Queue()
client.start_stream(lambda result, error: found.put((result, error)))
client.async_stream_infer("fake", inputs(True))
text = ""
while True:
    result, error = found.get(timeout=20)
    assert error is None, error
    text += result.as_numpy("text_output")[0].decode()
    if result.get_response().parameters["triton_final_response"].bool_param:
        break
client.stop_stream()
print(json.dumps([whole, text]))
"""


@pytest.mark.skipif(importlib.util.find_spec("tritonclient") is None, reason="tritonclient is not installed")
def test_tritons_own_client(address, own):
    """In a process of its own: it brings the same protos under the same names."""
    letters = {"logit_bias": {str(token): 60 for token in range(66, 80)}}
    options = GREEDY | letters
    command = [sys.executable, "-c", TRITON, address, json.dumps(options)]
    whole, streamed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)
    biases = {int(token): bias for token, bias in letters["logit_bias"].items()}
    [expected] = own.complete("hello", logit_bias=biases, **GREEDY)
    assert whole == streamed == expected.text


def test_reflection_finds_every_service(address):
    """As grpcurl asks: the names of the services, then the file of each."""
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        names = set(database.get_services())
        assert {"vllm.grpc.engine.VllmEngine", "inference.GRPCInferenceService", "motet.v1.Batch"} <= names
        for name in names:
            assert database.FindFileContainingSymbol(name).name


def test_the_protos_are_in_the_package():
    root = Path(__file__).parents[2] / "proto"
    assert (root / "inference" / "grpc_predict_v2.proto").is_file()
