"""Images end to end: from a file to tokens, through a served bundle, as transformers draws them."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from contextlib import ExitStack

import grpc
import numpy as np
import pytest
import torch
from helpers.http_door import ask as ask_http
from helpers.media import encoded, picture
from helpers.models import make_tail
from helpers.servers import serving, serving_http
from motet.export.bundle_writer import export_bundle
from motet.proto import inference_pb2, inference_pb2_grpc
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.limits import MAX_REQUEST_BYTES
from motet.runtime.api.prompt import Conversation
from motet.runtime.api.request import Ensemble, Member, Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.backends.onnx.sessions import pool_threads
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import read_weights
from motet.runtime.checkpoints.members.tail import read_tail
from motet.runtime.checkpoints.vision import VisionEncoder
from motet.runtime.client.client import Client
from motet.runtime.encoders.images import open_media
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import ConfigError, ContextLengthError, InvalidRequestError, NotFoundError
from motet.runtime.serve.audited import AuditSink
from motet.runtime.text.prompt import read_prompt
from motet.runtime.trust.audit.reader import records
from motet.runtime.trust.audit.writer import AuditLog
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.native]
GREEDY = {"temperature": 0.0, "ignore_eos": True}
CONFIG = {"threads": 1, "kv_dtype": "bf16", "backend": "cpu", "max_image_pixels": 10**6, "max_image_bytes": 2**20}
NEAR = 0.05  # between the two best logits: the cache holds 16-bit floats, so such a tie may fall the other way


@pytest.fixture(scope="module")
def image_bundle(image_model_dir, tmp_path_factory):
    return export_bundle(image_model_dir, tmp_path_factory.mktemp("images") / "tiny", bits=32)


@pytest.fixture(scope="module")
def image_engine(image_bundle):
    with Engine.from_bundle(image_bundle, EngineConfig(**CONFIG)) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(image_engine):
    with serving(image_engine) as server, Client(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def alone(image_bundle):
    """(host:port of an HTTP door, the engine): the doors' ends drain their engines, so it has its own."""
    with (
        Engine.from_bundle(image_bundle, EngineConfig(**CONFIG)) as engine,
        serving_http(engine) as (address, _service),
    ):
        yield address, engine


def image(content):
    return {"type": "image", "image": content}


def text(value):
    return {"type": "text", "text": value}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def pictures(count, seed=0):
    return [picture(29 + 31 * (i + seed), 17 + 53 * (i + seed) % 111, seed=10 * seed + i) for i in range(count)]


def question(images):
    return user(*(part for index, one in enumerate(images) for part in (image(one), text(f" no {index} "))))


def expected(reference, images, count):
    """(token ids of the prompt, the drawn ones, log-probabilities [tokens, vocabulary]) of transformers."""
    model, processor = reference
    turns = [{"role": m["role"], "content": [{k: v for k, v in p.items() if k != "image"} for p in m["content"]]}
             for m in question(images)]  # fmt: skip
    rendered = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=rendered, images=images, return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "eos_token_id": None}
    found = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    prompt = inputs["input_ids"][0].tolist()
    return prompt, found.sequences[0, len(prompt) :].tolist(), torch.stack(found.logits)[:, 0]


def check_drawn(drawn, token_ids, logits):
    for place, (own, theirs) in enumerate(zip(drawn, token_ids, strict=True)):
        if own != theirs:
            assert logits[place].max() - logits[place, own] < NEAR, f"token {place}"
            return


@pytest.mark.parametrize("count", range(1, 7))
def test_greedy_answers_are_transformers(client, reference, count):
    images = pictures(count)
    prompt, token_ids, logits = expected(reference, images, 16)
    [answer] = client.complete(question(images), max_tokens=16, **GREEDY)
    assert client.tokenize(question(images)) == prompt
    assert answer.usage.prompt_tokens == len(prompt)
    check_drawn(answer.token_ids, token_ids, logits)


def test_answers_do_not_depend_on_who_else_is_there(image_bundle, image_engine):
    """Images beside text, in chunks that cut their rows, preempted for lack of blocks, with a cached prefix or none."""

    def request(name, prompt):
        built = read_prompt(image_engine.tokenizer, prompt, 2048, image_engine.media)
        params = SamplingParams(max_tokens=10, logprobs=0, **GREEDY)
        ensemble = image_engine.model.default_ensemble
        return Request(name, (built.token_ids,), ensemble, params, embedded=(built.spans(b""),))

    counts = ((1, 0), (2, 0), (1, 1), (3, 0))
    prompts = [question(list(map(encoded, pictures(n, seed)))) for n, seed in counts]
    prompts += ["a text", user(text("hi"))]
    requests = [request(f"r{index}", prompt) for index, prompt in enumerate(prompts)]
    small = EngineConfig(**CONFIG, max_model_len=512, max_num_seqs=2, prefill_chunk=48, max_num_batched_tokens=96)
    bare = EngineConfig(**CONFIG, max_model_len=512, prefix_cache=False)
    found = []
    for config in (bare, small):
        with Engine.from_bundle(image_bundle, config) as engine:
            one_by_one = [engine.complete([each])[0][0] for each in requests]
            together = [each[0] for each in engine.complete(requests)]
            found += [[(one.token_ids, one.logprobs) for one in answers] for answers in (one_by_one, together)]
            assert engine.stats().cached_tokens > 0 or config is bare
    assert found[0] == found[1] == found[2] == found[3]


def test_prefixes_are_shared_with_the_same_image_and_no_other(client):
    """Images of one size have the same token ids: what tells them apart is what is in them."""
    first, second = encoded(picture(80, 40, 1)), encoded(picture(80, 40, 2))
    tail = text(" and a long question about it, which all of them ask in the same words")

    def ask(content):
        [answer] = client.complete(user(text("look:"), image(content), tail), max_tokens=4, cache_salt="own", **GREEDY)
        return answer.usage.cached_tokens, answer.token_ids

    assert client.tokenize(user(text("look:"), image(first), tail)) == client.tokenize(
        user(text("look:"), image(second), tail)
    )
    (_, answer), (cached, again) = ask(first), ask(first)
    assert cached > 64
    assert again == answer
    cached, other = ask(second)
    assert cached == 0
    assert other != answer


def test_what_is_encoded_is_kept_for_the_same_salt_only(image_bundle):
    config = EngineConfig(**CONFIG, image_cache_bytes=60_000)
    with Engine.from_bundle(image_bundle, config) as engine:
        runs, session = [], engine.media._session

        class Counted:
            def run(self, *arguments):
                runs.append(1)
                return session.run(*arguments)

        engine.media._session = Counted()

        def encode(content, salt=b""):
            before = len(runs)
            [medium] = engine.media.read([(content, "")])
            rows = medium.encode(salt)
            assert engine.media._num_bytes == sum(kept.nbytes for kept in engine.media._kept.values()) <= 60_000
            return rows, len(runs) > before

        one, two, three = (encoded(picture(70, 70, seed)) for seed in range(3))  # 10 tiles of 9 rows: 23,040 bytes each
        rows, ran = encode(one)
        assert ran
        again, ran = encode(one)
        assert not ran
        assert all(np.array_equal(a, b) for a, b in zip(rows, again, strict=True))
        assert encode(one, b"another tenant")[1], "whether it is kept would tell that somebody sent it"
        assert [encode(each)[1] for each in (two, three)] == [True, True]
        assert encode(one)[1], "the oldest made room"
    with Engine.from_bundle(image_bundle, EngineConfig(**CONFIG, image_cache_bytes=0)) as engine:
        [medium] = engine.media.read([(one, "")])
        assert len(medium.encode(b"")) == 10
        assert not engine.media._kept


def test_members_with_tails_see_what_the_trunk_saw(image_model_dir, tmp_path):
    """A mix of the base and a tail, over one trunk that the image's rows enter, is the mix of two whole models."""
    tail = make_tail(image_model_dir, tmp_path / "t", "t", 3, 0.5)
    export_bundle(image_model_dir, tmp_path / "b", tails={"base": None, "t": tail}, bits=32, graphs=False)
    page, weights = VisionEncoder.from_dir(image_model_dir), read_weights(image_model_dir)
    base = Decoder.from_dir(image_model_dir)
    other = Decoder.from_weights(base.config, {**weights, **read_tail(tail)[1]})
    ensemble = Ensemble((Member("base", 0.4), Member("t", 0.6)))
    with Engine.from_bundle(tmp_path / "b", EngineConfig(**CONFIG)) as engine:
        built = read_prompt(engine.tokenizer, question(list(map(encoded, pictures(2)))), 2048, engine.media)
        rows = [medium.tiles.pixels for medium in built.media]
        params = SamplingParams(max_tokens=8, **GREEDY)
        request = Request("r", (built.token_ids,), ensemble, params, embedded=(built.spans(b""),))
        [[answer]] = engine.complete([request])
        normalised = engine.media._normalised
        pixels = torch.from_numpy(np.concatenate([normalised(each, page.encoder_config.processor) for each in rows]))
    with torch.no_grad():
        ids = torch.tensor([[*built.token_ids, *answer.token_ids]])
        hidden = base.embed(ids)
        hidden[ids == page.encoder_config.token_id] = page(pixels).flatten(0, 1)
        logits = [d.head(d.norm(d.run_layers(hidden, 0, d.config.num_layers)))[0] for d in (base, other)]
        mixed = 0.4 * logits[0] + 0.6 * logits[1]
    at = mixed[len(built.token_ids) - 1 : -1]
    assert all(row.max() - row[token] < NEAR for row, token in zip(at, answer.token_ids, strict=True))
    assert any(row.argmax() != one.argmax() for row, one in zip(at, logits[0][len(built.token_ids) - 1 : -1]))


# ---- doors -----------------------------------------------------------------------------------------------------------


def uri(content, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


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
        (user({"type": "audio", "audio": b"x"}), "the bytes of a file"),
        ([{"role": "user", "content": [b"x"]}], "the bytes of a file"),
    ],
)
def test_clients_and_server_refuse(client, prompt, message):
    with pytest.raises(InvalidRequestError, match=message):
        client.complete(prompt, max_tokens=1)
    with pytest.raises(InvalidRequestError):
        client.tokenize(prompt)
    assert client.complete("x", max_tokens=1)


def test_too_many_rows_are_refused_before_they_are_encoded(client, image_engine):
    images = [image(encoded(picture(30, 30, seed))) for seed in range(8)]
    before = len(image_engine.media._kept)
    with pytest.raises(ContextLengthError, match="tokens with its images; the context holds"):
        client.complete(user(*images * 1, *[text("x" * 1200)]), max_tokens=1)
    assert len(image_engine.media._kept) == before


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
    assert "beside images" in details
    code, details = status(own())
    assert (code, "part of a message's content is empty" in details) == ("INVALID_ARGUMENT", True)
    message = inference_pb2.GenerateRequest()
    message.prompt.messages.messages.add(role="user", content="x", parts=[own(text="y")])
    with pytest.raises(grpc.RpcError) as caught:
        stub.Complete(message)
    assert "content or parts" in caught.value.details()


def test_the_audit_log_has_what_was_embedded_as_it_has_texts(image_bundle, tmp_path):
    """Sealed, and an HMAC of it: two calls with one image have the same, another image has another."""
    parts = [user(image(encoded(picture(30, 30, seed))), text("x")) for seed in (1, 1, 2)]
    with AuditLog(tmp_path / "audit", with_content=True) as audit, ExitStack() as stack:
        engine = stack.enter_context(Engine.from_bundle(image_bundle, EngineConfig(**CONFIG)))
        server = stack.enter_context(serving(engine, service={"sinks": [AuditSink(audit, "digest")]}))
        client = stack.enter_context(Client(server.address))
        for prompt in (*parts, "text"):
            client.complete(prompt, max_tokens=1, **GREEDY)
    *calls, plain = [one for one in records(tmp_path / "audit") if one.get("method") == "generate"]
    hashes = [one["embedded_hmac"] for one in calls]
    assert hashes[0] == hashes[1] != hashes[2]
    assert calls[0]["prompt_hmac"] == calls[2]["prompt_hmac"], "the token ids are the same"
    [spans] = json.loads(calls[0]["embedded"])
    assert len(spans) == 10
    assert "embedded_hmac" not in plain


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
    assert "images need backend cpu, and backend onnx serves" in refusal(image_bundle, **onnx)
    assert "max_images is 0" in refusal(image_bundle, max_images=0)
    monkeypatch.setattr("motet.runtime.encoders.images.find_spec", lambda name: None)
    assert "pip install 'motet[multimodal]'" in refusal(image_bundle)


def test_a_bundle_without_an_encoder_refuses_images_and_their_settings(tmp_path, tiny_model_dir):
    bundle = export_bundle(tiny_model_dir("llama"), tmp_path / "b", graphs=False)
    with Engine.from_bundle(bundle, EngineConfig(threads=1)) as engine:
        with pytest.raises(InvalidRequestError, match="has no encoder of images"):
            read_prompt(engine.tokenizer, user(image(b"x")), 512, engine.media)
        with pytest.raises(ConfigError, match=r"max_images: .*no encoder of images; leave them out"):
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
    assert "picture 1 of the next message" in chat.stderr
    assert "there is no image" in chat.stderr
    assert "no image of a kind that is read" in chat.stderr
    assert "this message was left out" in chat.stderr
    assert chat.stderr.count("tok/s") == 2
