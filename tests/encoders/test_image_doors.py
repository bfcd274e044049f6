"""Images through every door, what each refuses, and the servers that take none."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import ExitStack

import grpc
import numpy as np
import pytest
from helpers.batch_jobs import ended, serve
from helpers.http_door import ask as ask_http
from helpers.media import CONFIG, GREEDY, encoded, image, picture, text, uri, user
from helpers.servers import serving
from motet.export.bundle_writer import export_bundle
from motet.proto import inference_pb2, inference_pb2_grpc
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.limits import MAX_REQUEST_BYTES
from motet.runtime.api.prompt import Conversation
from motet.runtime.api.request import Ensemble, Member
from motet.runtime.backends.onnx.sessions import pool_threads
from motet.runtime.client.batch import BatchClient
from motet.runtime.client.client import Client
from motet.runtime.encoders.reader import open_media
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import (
    ConfigError,
    InvalidRequestError,
    NotFoundError,
)
from motet.runtime.serve.audited import AuditSink
from motet.runtime.serve.grpc import wire
from motet.runtime.text.prompt import read_prompt
from motet.runtime.trust.audit.reader import records
from motet.runtime.trust.audit.writer import AuditLog
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.native]


def post(address, path, **body):
    status, _, content = ask_http(address, "POST", f"/v1/{path}", body)
    return status, json.loads(content)


def test_every_door_gives_the_same_answer(alone, client, tmp_path):
    content = encoded(picture(90, 50))
    (tmp_path / "a.png").write_bytes(content)
    address, _ = alone
    options = {"temperature": 0, "ignore_eos": True}
    [own] = client.complete(user(image(content), text("what?")), max_tokens=6, logprobs=0, **GREEDY)
    for source in (tmp_path / "a.png", picture(90, 50)):
        assert client.complete(user(image(source), text("what?")), max_tokens=6, **GREEDY)[0].text == own.text
    whole = Conversation(user(image(content), text("what?")))
    assert client.complete(whole, max_tokens=6, **GREEDY)[0].text == own.text
    parts = [{"type": "image_url", "image_url": {"url": uri(content), "detail": "auto"}}, text("what?")]
    status, found = post(address, "chat/completions", messages=user(*parts), max_tokens=6, **options)
    assert (status, found["choices"][0]["message"]["content"]) == (200, own.text)
    assert found["usage"]["prompt_tokens"] == own.usage.prompt_tokens
    asked = [{"type": "input_image", "image_url": uri(content)}, {"type": "input_text", "text": "what?"}]
    body = {"input": user(*asked), "max_output_tokens": 6, **options}
    status, found = post(address, "responses", **body)
    assert (status, found["output"][0]["content"][0]["text"]) == (200, own.text)


def test_views_have_images_of_their_own(client):
    """A member that does not see the picture, as in context-aware decoding."""
    seen, unseen = user(image(picture(60, 60)), text("what?")), user(text("what?"))
    mix = Ensemble((Member("base", 1.5), Member("base", -0.5, 1)))
    [answer] = client.complete(seen, mix=mix, views=[unseen], max_tokens=4, **GREEDY)
    [plain] = client.complete(seen, max_tokens=4, **GREEDY)
    assert answer.usage.prompt_tokens == plain.usage.prompt_tokens
    [turned] = client.complete(unseen, mix=mix, views=[seen], max_tokens=4, **GREEDY)
    assert turned.usage.prompt_tokens < answer.usage.prompt_tokens


def test_text_is_what_it_is_without_images(client):
    assert client.tokenize(user(text("hi"))) == client.tokenize([{"role": "user", "content": "hi"}])
    assert client.complete("plain <image> text", max_tokens=2, **GREEDY)[0].usage.completion_tokens == 2
    assert client.models()[0].media == ("image",)


REFUSED = {
    "a url": ({"url": "http://example.org/a.png"}, "data URI .*nothing is fetched"),
    "https": ({"url": "HTTPS://example.org/a.png"}, "nothing is fetched"),
    "a file": ({"url": "file:///etc/passwd"}, "nothing is fetched"),
    "a path": ({"url": "/etc/passwd"}, "nothing is fetched"),
    "no base64": ({"url": "data:image/png,abc"}, "in base64"),
    "bad base64": ({"url": "data:image/png;base64,a*b="}, "no base64"),
    "no image": ({"url": "data:text/plain;base64,aGk="}, "an image in base64"),
    "another type": ({"url": uri(encoded(picture(9, 9)), "jpeg")}, "said to be 'image/jpeg' and is image/png"),
    "another detail": ({"url": uri(encoded(picture(9, 9))), "detail": "low"}, "detail"),
    "svg": ({"url": uri(b"<svg/>", "svg+xml")}, "no image of a kind"),
    "an unknown field": ({"url": uri(encoded(picture(9, 9))), "size": 1}, "image_url.size is unknown"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_http_refuses_what_is_no_image_in_the_request(alone, name):
    fields, message = REFUSED[name]
    parts = [{"type": "image_url", "image_url": fields}, text("what?")]
    status, found = post(alone[0], "chat/completions", messages=user(*parts), max_tokens=2)
    assert status == 400
    assert re.search(message, found["error"]["message"])
    assert post(alone[0], "completions", prompt="x", max_tokens=1)[0] == 200


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (user(image("http://example.org/a.png")), "the bytes of a file"),
        (user(image(b"")), "has no bytes"),
        (user(image(b"no image")), "no image of a kind"),
        (user(image(encoded(picture(1200, 900)))), "1080000 pixels, at most max_image_pixels"),
        (user(*[image(encoded(picture(9, 9)))] * 9), r"9 images, at most max_images \(8\)"),
        (user(image(bytes(2**20 + 1))), r"at most max_image_bytes \(1048576\)"),
        (user({"type": "image", "image": b"x", "detail": "low"}), "the bytes of a file"),
        (user({"type": "audio", "audio": b"x"}), "text and image only here: 'tiny' has no encoder of audio"),
        ([{"role": "user", "content": [b"x"]}], "the bytes of a file"),
    ],
)
def test_clients_and_server_refuse(client, prompt, message):
    with pytest.raises(InvalidRequestError, match=message):
        client.complete(prompt, max_tokens=1)
    with pytest.raises(InvalidRequestError):
        client.tokenize(prompt)
    assert client.complete("x", max_tokens=1)


def test_other_calls_take_text_only(client, tmp_path):
    with pytest.raises(InvalidRequestError, match="text only"):
        client.embed([user(image(picture(9, 9)))])
    with pytest.raises(InvalidRequestError, match="prompt_logprobs are of tokens"):
        client.complete(user(image(picture(9, 9))), max_tokens=1, prompt_logprobs=1)
    with pytest.raises(NotFoundError, match="there is no image"):
        client.complete(user(image(tmp_path / "none.png")))


def test_the_wire_has_room_for_images_and_for_nothing_else(client):
    """The limit of a message without its images stays what it is elsewhere."""
    own = inference_pb2.ContentPart
    stub = inference_pb2_grpc.InferenceStub(client._channel)

    def status(*parts, call=stub.Complete, kind=inference_pb2.GenerateRequest, **fields):
        message = kind(**fields)
        message.prompt.messages.messages.add(role="user", parts=parts, **({} if parts else {"content": "x"}))
        try:
            call(message, timeout=20)
        except grpc.RpcError as error:
            return error.code().name, error.details()
        return "OK", ""

    noise = np.random.default_rng(1).integers(0, 256, (540, 540, 3), np.uint8)
    large = encoded(Image.fromarray(noise))
    assert MAX_REQUEST_BYTES > len(large) > 0.8 * MAX_REQUEST_BYTES
    stopping = inference_pb2.Stopping(max_tokens=1)
    assert status(own(image=large), own(text="x" * 200), stopping=stopping) == ("OK", "")
    code, details = status(own(image=large), own(text="x" * (MAX_REQUEST_BYTES + 1)))
    assert code == "INVALID_ARGUMENT"
    assert "beside media" in details
    code, details = status(own())
    assert (code, "part of a message's content is empty" in details) == ("INVALID_ARGUMENT", True)
    message = inference_pb2.GenerateRequest()
    message.prompt.messages.messages.add(role="user", content="x", parts=[own(text="y")])
    with pytest.raises(grpc.RpcError) as caught:
        stub.Complete(message)
    assert "content or parts" in caught.value.details()


@pytest.mark.parametrize(
    ("count", "message"),
    [
        ({"parts": 600_000}, "at most 4096 parts"),
        ({"messages": 600_000}, "at most 4096 messages"),
        ({"members": 600_000}, "1 to [0-9]+ members, got 600000"),
    ],
)
def test_a_large_message_of_too_many_pieces_is_refused_before_they_are_read(client, count, message, monkeypatch):
    """It is read on the event loop, where everybody waits."""
    request = inference_pb2.GenerateRequest()
    chat = request.prompt.messages
    for _ in range(count.get("messages", 1)):
        chat.messages.add()
    for _ in range(count.get("parts", 1)):
        chat.messages[0].parts.add()
    for _ in range(count.get("members", 0)):
        request.ensemble.members.add()
    assert request.ByteSize() > MAX_REQUEST_BYTES
    made = []
    monkeypatch.setattr(wire, "_part_from_proto", made.append)
    with pytest.raises(grpc.RpcError, match=message):
        inference_pb2_grpc.InferenceStub(client._channel).Complete(request, timeout=60)
    assert not made
    with pytest.raises(InvalidRequestError, match=message):
        wire.media_bytes(request)


def test_the_audit_log_has_what_was_embedded_as_it_has_texts(image_bundle, tmp_path):
    """Sealed, and an HMAC of it: two calls with one image have the same, another image has another."""
    parts = [user(image(encoded(picture(30, 30, seed))), text("x")) for seed in (1, 1, 2)]
    with AuditLog(tmp_path / "audit", with_content=True) as audit, ExitStack() as stack:
        engine = stack.enter_context(Engine.from_bundle(image_bundle, EngineConfig(**CONFIG)))
        server = stack.enter_context(serving(engine, service={"sinks": [AuditSink(audit, "digest")]}))
        client = stack.enter_context(Client(server.address))
        for prompt in (*parts, "text"):
            client.complete(prompt, max_tokens=1, **GREEDY)
    *calls, plain = [one for one in records(tmp_path / "audit") if "prompt_hmac" in one]
    hashes = [one["embedded_hmac"] for one in calls]
    assert hashes[0] == hashes[1] != hashes[2]
    assert calls[0]["prompt_hmac"] == calls[2]["prompt_hmac"], "the token ids are the same"
    [spans] = json.loads(calls[0]["embedded"])
    assert len(spans) == 10
    assert "embedded_hmac" not in plain


def test_a_batch_job_answers_records_with_images(image_bundle, tmp_path):
    content = encoded(picture(60, 40))
    asked = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}
    good = user({"type": "image_url", "image_url": {"url": uri(content)}}, text("what?"))
    bad = user({"type": "image_url", "image_url": {"url": "http://example.org/a.png"}})
    process, address = serve(image_bundle, tmp_path / "state")
    try:
        with BatchClient(address) as batch, Client(address) as own:
            records = [(name, {"messages": messages, **asked}) for name, messages in (("good", good), ("bad", bad))]
            _, found = ended(batch, batch.submit("/v1/chat/completions", records).id)
            [answer] = own.complete(user(image(content), text("what?")), max_tokens=3, **GREEDY)
    finally:
        process.kill()
        process.wait()
    assert found["good"].response["choices"][0]["message"]["content"] == answer.text
    assert "nothing is fetched" in str(found["bad"])


# ---- servers without images, and the command line --------------------------------------------------------------------


def test_servers_that_take_no_images_say_why(image_bundle, image_model_dir, tmp_path, monkeypatch):
    prompt = user(image(encoded(picture(9, 9))), text("what?"))

    def refusal(bundle, **config):
        with Engine.from_bundle(bundle, EngineConfig(**({"threads": 1} | config))) as engine:
            assert engine.model.media == ()
            assert len(read_prompt(engine.tokenizer, user(text("hi")), 2048, engine.media).token_ids)
            with pytest.raises(InvalidRequestError, match="text only here") as caught:
                read_prompt(engine.tokenizer, prompt, 2048, engine.media)
            return str(caught.value)

    onnx = {"backend": "onnx", "threads": pool_threads() or 1}
    settings = {"max_images": 3, "media_cache_bytes": 0}
    assert "media need backend cpu, and backend onnx serves" in refusal(image_bundle, **onnx)
    with pytest.raises(ConfigError, match=r"max_images, media_cache_bytes: media need backend cpu.*leave them out"):
        refusal(image_bundle, **onnx, **settings)
    with pytest.raises(ConfigError, match=r"max_image_pixels: .*\(max_images is 0\); leave them out"):
        refusal(image_bundle, max_images=0, max_image_pixels=9)
    assert "max_images is 0" in refusal(image_bundle, max_images=0)
    monkeypatch.setattr("motet.runtime.encoders.reader.find_spec", lambda name: None)
    assert "pip install 'motet[multimodal]'" in refusal(image_bundle)
    with pytest.raises(ConfigError, match=r"max_images, media_cache_bytes: image needs Pillow.*leave them out"):
        refusal(image_bundle, **settings)


def test_a_cluster_refuses_settings_of_images(image_bundle):
    pytest.importorskip("ray")
    from motet.runtime.cluster.engine import ClusterEngine
    from motet.runtime.cluster.settings import ClusterSettings

    with pytest.raises(ConfigError, match="max_image_bytes: replicas on a cluster take text only; leave them out"):
        ClusterEngine(image_bundle, EngineConfig(max_image_bytes=9), ClusterSettings("local", 1))


def test_a_bundle_without_an_encoder_refuses_images_and_their_settings(tmp_path, tiny_model_dir):
    bundle = export_bundle(tiny_model_dir("llama"), tmp_path / "b", graphs=False)
    with Engine.from_bundle(bundle, EngineConfig(threads=1)) as engine:
        with pytest.raises(InvalidRequestError, match="has no encoder"):
            read_prompt(engine.tokenizer, user(image(b"x")), 512, engine.media)
        with pytest.raises(ConfigError, match=r"max_images: .*has no encoder; leave them out"):
            open_media_of(engine, bundle, EngineConfig(max_images=3))


def open_media_of(engine, bundle, config):
    from motet.runtime.model.bundle import Bundle

    return open_media(Bundle.load(bundle), config, engine._backend)


def test_the_command_line(image_bundle, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture(60, 30)))
    options = ("--bundle", image_bundle, "--max-tokens", 4, "--temperature", 0, "--ignore-eos")

    def run(*arguments, stdin=""):
        command = [sys.executable, "-m", "motet.cli", *map(str, arguments), *map(str, options)]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)

    with_image = run("generate", "what?", "--image", tmp_path / "a.png", "--json")
    assert with_image.returncode == 0, with_image.stderr
    assert json.loads(with_image.stdout)["usage"]["prompt_tokens"] > 50
    refused = run("generate", "what?", "--image", tmp_path / "a.png", "--raw")
    assert (refused.returncode, "--raw sends a text" in refused.stderr) == (2, True)
    refused = run("generate", "what?", "--image", tmp_path / "none.png")
    assert (refused.returncode, "there is no image" in refused.stderr) == (2, True)
    (tmp_path / "b.png").write_bytes(b"no image")
    lines = f"/image {tmp_path / 'a.png'}\n/image {tmp_path / 'none'}\nwhat is it?\n/image {tmp_path / 'b.png'}\nx\nand now?\n\n"
    chat = run("chat", stdin=lines)
    assert chat.returncode == 0, chat.stderr
    assert "image 1 of the next message" in chat.stderr
    assert "there is no image" in chat.stderr
    assert "no image of a kind that is read" in chat.stderr
    assert "this message was left out" in chat.stderr
    assert chat.stderr.count("tok/s") == 2
