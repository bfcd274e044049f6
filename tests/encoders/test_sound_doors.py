"""Sounds through every door, what each refuses, and the servers that take none."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers.batch_jobs import ended, serve
from helpers.http_door import ask as ask_http
from helpers.media import GREEDY, encoded, image, picture, text, user
from helpers.servers import serving, serving_http
from helpers.sounds import CONFIG, RATE, audio, filed, tone, write_sound_model
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.client.batch import BatchClient
from motet.runtime.client.client import Client
from motet.runtime.encoders.decoding import MediaDecoder
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import ConfigError, ContextLengthError, InvalidRequestError, NotFoundError
from motet.runtime.text.prompt import read_prompt

pytestmark = [pytest.mark.slow, pytest.mark.native]
SOUND = tone(1.2, 9)
FILE = filed(SOUND)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("doors")
    return export_bundle(write_sound_model(path / "m"), path / "tiny", bits=32)


@pytest.fixture(scope="module")
def client(bundle):
    with (
        Engine.from_bundle(bundle, EngineConfig(**CONFIG)) as engine,
        serving(engine) as server,
        Client(server.address) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def address(bundle):
    with Engine.from_bundle(bundle, EngineConfig(**CONFIG)) as engine, serving_http(engine) as (address, _service):
        yield address


def post(address, path, **body):
    status, _, content = ask_http(address, "POST", f"/v1/{path}", body)
    return status, json.loads(content)


def part(content=FILE, kind="wav", **fields):
    data = base64.b64encode(content).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": kind} | fields}


def test_every_door_gives_the_same_answer(address, client, tmp_path):
    (tmp_path / "a.wav").write_bytes(FILE)
    options = {"temperature": 0, "ignore_eos": True}
    [own] = client.complete(user(audio(FILE), text("what?")), max_tokens=6, **GREEDY)
    for source in (tmp_path / "a.wav", (SOUND, RATE), (SOUND[:, None].astype(np.float64), RATE)):
        assert client.complete(user(audio(source), text("what?")), max_tokens=6, **GREEDY)[0].text == own.text
    status, found = post(address, "chat/completions", messages=user(part(), text("what?")), max_tokens=6, **options)
    assert (status, found["choices"][0]["message"]["content"]) == (200, own.text)
    assert found["usage"]["prompt_tokens"] == own.usage.prompt_tokens
    asked = user(part(), {"type": "input_text", "text": "what?"})
    status, found = post(address, "responses", input=asked, max_output_tokens=6, **options)
    assert (status, found["output"][0]["content"][0]["text"]) == (200, own.text)
    assert client.models()[0].media == ("audio",)


def test_samples_of_16_bits_are_sent_as_they_are(client):
    whole = np.round(SOUND * 32767).astype(np.int16)
    as_file = user(audio(filed(whole, subtype="PCM_16")))
    [expected] = client.complete(as_file, max_tokens=6, **GREEDY)
    assert client.complete(user(audio((whole, RATE))), max_tokens=6, **GREEDY)[0].token_ids == expected.token_ids


REFUSED = {
    "bad base64": ({"data": "a*b="}, "data of input_audio is no base64"),
    "another format": ({"format": "mp3"}, "said to be 'audio/mp3' and is audio/wav"),
    "an unknown format": ({"format": "m4a"}, "said to be 'audio/m4a' and is audio/wav"),
    "no format": ({"format": None}, "format"),
    "a url": ({"url": "http://example.org/a.wav"}, "input_audio.url is unknown"),
    "no sound": ({"data": "aGVsbG8="}, "no sound of a kind"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_http_refuses_what_is_no_sound_in_the_request(address, name):
    fields, message = REFUSED[name]
    status, found = post(address, "chat/completions", messages=user(part(**fields)), max_tokens=2)
    assert status == 400
    assert re.search(message, found["error"]["message"])
    assert post(address, "completions", prompt="x", max_tokens=1)[0] == 200


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"type": "input_audio"}], "input_audio is of a part of type input_audio"),
        (
            [{"type": "input_text", "text": "x", "input_audio": {"data": "", "format": "wav"}}],
            "input_audio is of a part",
        ),
        ([part() | {"text": "x"}], "its medium and nothing else"),
        ([part() | {"image_url": "data:image/png;base64,aGk="}], "image_url, and perhaps detail"),
    ],
)
def test_the_door_of_responses_refuses_mixtures(address, parts, message):
    status, found = post(address, "responses", input=user(*parts), max_output_tokens=1)
    assert status == 400
    assert message in found["error"]["message"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (user(audio("http://example.org/a.wav")), "are the bytes of a file"),
        (user(audio(b"")), "has no bytes"),
        (user(audio(b"no sound")), "no sound of a kind"),
        (user(audio(filed(tone(6.1)))), r"has 6.1 seconds, at most what the model hears \(2\)"),
        (user(*[audio(FILE)] * 9), r"9 audios, at most max_audios \(8\)"),
        (user(audio(bytes(2**20 + 1))), r"at most max_audio_bytes \(1048576\)"),
        (user({"type": "audio", "audio": b"x", "detail": "low"}), "are the bytes of a file"),
        (user({"type": "audio", "image": b"x"}), "are the bytes of a file"),
        (user(image(encoded(picture(9, 9)))), "may hold text and audio only here: 'tiny' has no encoder of image"),
        (user(audio((SOUND.astype(np.int32), RATE))), "floats in -1…1 or int16, got int32"),
        (user(audio((SOUND, 16000.0))), "samples a second"),
        (user(audio((SOUND[:0], RATE))), "samples a second"),
        (user(audio((SOUND[:9, None, None], RATE))), "samples a second"),
    ],
)
def test_clients_and_server_refuse(client, prompt, message):
    with pytest.raises(InvalidRequestError, match=message):
        client.complete(prompt, max_tokens=1)
    assert client.complete("x", max_tokens=1)


def test_other_calls_take_text_only(client, tmp_path):
    with pytest.raises(InvalidRequestError, match="text only"):
        client.embed([user(audio(FILE))])
    with pytest.raises(NotFoundError, match="there is no sound"):
        client.complete(user(audio(tmp_path / "none.wav")))


def test_too_many_rows_are_refused_before_they_are_encoded(bundle, monkeypatch):
    decoded, decode = [], MediaDecoder.decode
    monkeypatch.setattr(MediaDecoder, "decode", lambda *args: decoded.append(1) or decode(*args))
    with Engine.from_bundle(bundle, EngineConfig(**CONFIG, max_model_len=100)) as engine:
        asked = user(*[audio(filed(tone(2.0, seed), "FLAC")) for seed in range(3)])
        with pytest.raises(ContextLengthError, match="more than 1300 bytes; shorten it"):
            read_prompt(engine.tokenizer, asked, 100, engine.media)
    assert not decoded


def test_servers_that_take_no_sounds_say_why(bundle, monkeypatch):
    prompt = user(audio(FILE), text("what?"))

    def refusal(**config):
        with Engine.from_bundle(bundle, EngineConfig(threads=1, **config)) as engine:
            assert engine.model.media == ()
            with pytest.raises(InvalidRequestError, match="text only here") as caught:
                read_prompt(engine.tokenizer, prompt, 2048, engine.media)
            return str(caught.value)

    assert "max_audios is 0" in refusal(max_audios=0)
    with pytest.raises(ConfigError, match=r"max_audio_seconds: .*\(max_audios is 0\); leave them out"):
        refusal(max_audios=0, max_audio_seconds=9)
    with pytest.raises(ConfigError, match=r"max_images: 'tiny' has no encoder of image; leave them out"):
        Engine.from_bundle(bundle, EngineConfig(threads=1, max_images=3))
    monkeypatch.setattr("motet.runtime.encoders.reader.find_spec", lambda name: None)
    assert "audio needs soundfile and soxr, which is not installed there; `pip install" in refusal()


def test_a_sound_that_the_model_cannot_hear_is_refused(bundle):
    """Qwen2-Audio hears one piece: what is longer is refused, and not cut off."""
    config = EngineConfig(**CONFIG | {"max_audio_seconds": 100})
    with Engine.from_bundle(bundle, config) as engine:
        most = engine.media.kinds["audio"].encoder.max_seconds
        with pytest.raises(InvalidRequestError, match=rf"at most what the model hears \({most:g}\)"):
            read_prompt(engine.tokenizer, user(audio(filed(tone(most + 0.1), "FLAC"))), 2048, engine.media)


def test_a_batch_job_answers_records_with_sounds(bundle, tmp_path):
    asked = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}
    process, address = serve(bundle, tmp_path / "state")
    try:
        with BatchClient(address) as batch, Client(address) as own:
            records = [
                ("good", {"messages": user(part(), text("what?")), **asked}),
                ("bad", {"messages": user(part(b"x")), **asked}),
            ]
            _, found = ended(batch, batch.submit("/v1/chat/completions", records).id)
            [answer] = own.complete(user(audio(FILE), text("what?")), max_tokens=3, **GREEDY)
    finally:
        process.kill()
        process.wait()
    assert found["good"].response["choices"][0]["message"]["content"] == answer.text
    assert "no sound of a kind" in str(found["bad"])


def test_the_command_line(bundle, tmp_path):
    (tmp_path / "a.wav").write_bytes(FILE)
    options = ("--bundle", bundle, "--max-tokens", 4, "--temperature", 0, "--ignore-eos")

    def run(*arguments, stdin=""):
        command = [sys.executable, "-m", "motet.cli", *map(str, arguments), *map(str, options)]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)

    heard = run("generate", "what?", "--audio", tmp_path / "a.wav", "--json")
    assert heard.returncode == 0, heard.stderr
    raw = run("generate", "what?", "--raw", "--audio", tmp_path / "a.wav")
    assert raw.returncode != 0
    assert "--audio are parts of a chat message" in " ".join(raw.stderr.split())
    chat = run("chat", stdin=f"/audio {tmp_path / 'a.wav'}\n/audio none.wav\nwhat?\n\n")
    assert chat.returncode == 0, chat.stderr
    assert "sound 1 of the next message" in chat.stderr
    assert "there is no sound 'none.wav'" in chat.stderr
    with Engine.from_bundle(bundle, EngineConfig(threads=1)) as engine:
        built = read_prompt(engine.tokenizer, user(audio(FILE), text("what?")), 2048, engine.media)
    assert json.loads(heard.stdout)["usage"]["prompt_tokens"] == len(built.token_ids)
