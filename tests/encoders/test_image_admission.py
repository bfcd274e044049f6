"""What a request with images may bring, and what is refused before a file is decoded."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager

import pytest
from helpers.callers import CALLER
from helpers.media import CONFIG, GREEDY, encoded, image, picture, text, user
from helpers.servers import serving
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Ensemble, GenerateRequest, Member
from motet.runtime.client.client import Client
from motet.runtime.encoders.decoding import MediaDecoder
from motet.runtime.encoders.reader import EncodedMedia
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import ContextLengthError, InvalidRequestError, MotetError, OverloadedError, UnavailableError
from motet.runtime.serve.local import local_server
from motet.runtime.serve.reading import RequestReader
from motet.runtime.serve.service import Service
from motet.runtime.text.media import MediaFile
from motet.runtime.trust.identity import Identity
from motet.runtime.trust.quotas import Quotas

pytestmark = [pytest.mark.slow, pytest.mark.native]


def test_limits_are_those_of_a_request_with_its_views_and_asked_first(client, image_engine, monkeypatch):
    """Of all prompts together, before any file is read; and a file that is sent several times is read once."""
    reads, read = [], EncodedMedia._read
    monkeypatch.setattr(EncodedMedia, "_read", lambda *args: reads.append(1) or read(*args))
    small = encoded(picture(9, 9, 77))
    large = small + bytes(400_000)  # Pillow ignores what follows
    mix = Ensemble((Member("base", 0.5), Member("base", 0.3, 1), Member("base", 0.2, 2)))

    def ask(*prompts):
        first, *views = (user(text(str(index)), *map(image, files)) for index, files in enumerate(prompts))
        return client.complete(first, views=views, mix=mix, max_tokens=1, **GREEDY)

    with pytest.raises(InvalidRequestError, match=r"the request has 9 images, at most max_images \(8\)"):
        ask([small] * 3, [small] * 3, [small] * 3)
    with pytest.raises(InvalidRequestError, match=r"images have 12\d{5} bytes, at most max_image_bytes \(1048576\)"):
        image_engine_read(image_engine, [large] * 3)
    assert not reads
    assert ask([small], [small, small], [small])
    assert len(reads) == 1


def image_engine_read(engine, files):
    """Over gRPC the message would be refused by its size."""
    request = GenerateRequest(
        prompt=user(image(files[0])),
        views=tuple(user(text(str(at)), image(one)) for at, one in enumerate(files[1:])),
        ensemble=Ensemble(tuple(Member("base", 1 / len(files), view) for view in range(len(files)))),
    )
    return RequestReader(engine, Quotas({}, 8)).read(request, Identity("", "x", frozenset()))


def test_too_many_rows_are_refused_before_they_are_encoded(client, monkeypatch):
    images = [image(encoded(picture(30, 30, seed))) for seed in range(8)]
    with nothing_decoded(monkeypatch), pytest.raises(ContextLengthError, match="media; the context holds"):
        client.complete(user(*images, text("x" * 1200)), max_tokens=1)


@contextmanager
def nothing_decoded(monkeypatch):
    decoded = []
    with monkeypatch.context() as patched:
        decode = MediaDecoder.decode
        patched.setattr(MediaDecoder, "decode", lambda *args: decoded.append(1) or decode(*args))
        yield
    assert not decoded


def test_a_closed_service_leaves_no_threads(image_bundle):
    """Of those that read messages, with images or without."""
    with local_server(image_bundle, EngineConfig(**CONFIG)) as address, Client(address) as client:
        before = {thread for thread in threading.enumerate() if thread.name.startswith(("motet-reader", "motet-media"))}
        assert client.complete(user(image(encoded(picture(20, 20)))), max_tokens=1, **GREEDY)
        own = [one for one in threading.enumerate() if one.name.startswith("motet-media") and one not in before]
        assert own
    for thread in own:
        thread.join(60)
        assert not thread.is_alive()


def test_what_is_kept_waits_for_nobody_s_encoding_and_is_not_decoded_again(image_engine, monkeypatch):
    reader = image_engine.media
    [medium] = reader.read([MediaFile("image", encoded(picture(40, 40, 401)))])
    first, found = medium.encode(b"s"), []
    with nothing_decoded(monkeypatch), reader._encoding:  # as another request does that encodes
        thread = threading.Thread(target=lambda: found.append(medium.encode(b"s")), daemon=True)
        thread.start()
        thread.join(60)
        assert [len(each) for each in found] == [len(first)]


def test_who_cancels_keeps_the_place_until_the_thread_is_done(image_engine, monkeypatch):
    """And it encodes no other image of the request."""
    began, goes_on, encoded_images, rows = threading.Event(), threading.Event(), [], EncodedMedia.rows

    def slow(*args):
        encoded_images.append(1)
        began.set()
        assert goes_on.wait(60)
        return rows(*args)

    monkeypatch.setattr(EncodedMedia, "rows", slow)
    files = [image(encoded(picture(20, 20, seed))) for seed in (301, 302, 303)]

    async def run():
        service = Service(image_engine)
        task = asyncio.create_task(service.complete(GenerateRequest(user(*files)), CALLER))
        assert await asyncio.to_thread(began.wait, 60)
        for _ in range(3):  # also whoever insists
            task.cancel()
            for _ in range(20):
                await asyncio.sleep(0)
        assert not task.done()
        assert not await service.wait_idle(0)
        goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await service.wait_idle(0)
        service.close()

    asyncio.run(run())
    assert len(encoded_images) == 1


def test_who_cancels_before_a_thread_is_free_is_cancelled(image_engine):
    """Both threads are busy with others'."""
    goes_on = threading.Event()
    request = GenerateRequest(user(image(encoded(picture(20, 20, 311)))))
    reading = RequestReader(image_engine, Quotas({}, 8)).read(request, Identity("", "x", frozenset()))

    async def run():
        service = Service(image_engine)
        busy = [service._media_readers.submit(goes_on.wait, 60) for _ in range(2)]
        task = asyncio.create_task(service._encoded(reading))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        goes_on.set()
        assert all(await asyncio.gather(*map(asyncio.wrap_future, busy)))
        service.close()

    asyncio.run(run())


def test_what_is_refused_is_refused_before_it_is_decoded(image_bundle, monkeypatch):
    """All that the engine, the queue and the size of the answer can refuse."""
    config = EngineConfig(**CONFIG, max_model_len=512, max_waiting=2)
    prompt = user(image(encoded(picture(60, 60, 99))), text("what?"))
    with (
        Engine.from_bundle(image_bundle, config) as engine,
        serving(engine) as server,
        Client(server.address) as client,
    ):
        room = 512 - len(client.tokenize(prompt))
        just_too_long = user(image(encoded(picture(60, 60, 99))), text("what?" + "x" * room))
        assert len(client.tokenize(just_too_long)) == 512
        cases = (
            (prompt, {"prompt_logprobs": 1}, "prompt_logprobs are of tokens"),
            (prompt, {"return_confidence": True}, "not calibrated"),
            (prompt, {"n": 3}, "at most max_waiting"),
            (prompt, {"drafts": 2}, "a greedy answer has 1"),
            (prompt, {"stop_token_ids": (10**6,)}, "stop_token_ids"),
            (just_too_long, {}, "prompt has 512 tokens; the context holds 512"),
        )
        with nothing_decoded(monkeypatch):
            for asked, options, message in cases:
                with pytest.raises(MotetError, match=message):
                    client.complete(asked, **{"max_tokens": 2, **GREEDY, **options})
            with monkeypatch.context() as full:
                full.setattr(engine._inbox, "_max_waiting", 0)
                with pytest.raises(OverloadedError, match="max_waiting"):
                    client.complete(prompt, max_tokens=2, **GREEDY)
            engine.drain()
            with pytest.raises(UnavailableError, match="shutting down"):
                client.complete(prompt, max_tokens=2, **GREEDY)
