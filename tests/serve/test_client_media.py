"""What the clients make of images before they send them."""

from __future__ import annotations

import asyncio
import io
import threading

import numpy as np
import pytest
from motet.runtime import errors
from motet.runtime.client import client as client_module
from motet.runtime.client.client import AsyncClient
from motet.runtime.client.media import image_bytes
from motet.runtime.serve.grpc.wire import prompt_to_proto
from PIL import Image, ImageOps


def test_a_media_type_has_no_field_on_the_wire():
    part = {"type": "image", "image": b"x", "media_type": "image/png"}
    with pytest.raises(errors.InvalidRequestError, match="media_type has no field"):
        prompt_to_proto([{"role": "user", "content": [part]}])


def picture(mode, size=(4, 2)):
    through = {"LAB": "RGB", "HSV": "RGB", "RGBa": "RGBA"}.get(mode, "L")
    return Image.radial_gradient("L").resize(size).convert(through).convert(mode)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]
)
def test_an_image_of_any_mode_is_sent_as_it_looks(mode):
    found = Image.open(io.BytesIO(image_bytes(source := picture(mode))))
    wanted = source.convert("RGBA" if mode in ("PA", "RGBa") else "RGB").convert("RGB")
    assert np.array_equal(np.asarray(found.convert("RGB")), np.asarray(wanted))


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_an_image_of_more_than_8_bits_is_refused(mode):
    with pytest.raises(errors.InvalidRequestError, match="more than 8 bits"):
        image_bytes(Image.new(mode, (4, 2)))


def test_an_image_that_cannot_be_written_is_a_typed_error():
    with pytest.raises(errors.InvalidRequestError, match="cannot be written as a PNG"):
        image_bytes(Image.new("La", (4, 2)))
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(file, "JPEG")
    with pytest.raises(errors.InvalidRequestError, match="truncated"):
        image_bytes(Image.open(io.BytesIO(file.getvalue()[:-500])))


def test_an_image_is_sent_as_its_exif_turns_it():
    """A PNG does not keep what a JPEG says of its orientation."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x112] = 6
    picture("RGB").save(file, "JPEG", exif=exif)
    source = Image.open(io.BytesIO(file.getvalue()))
    found = Image.open(io.BytesIO(image_bytes(source)))
    assert found.size == (2, 4)
    assert np.array_equal(np.asarray(found), np.asarray(ImageOps.exif_transpose(source)))


def test_the_asynchronous_client_reads_images_in_another_thread(monkeypatch):
    threads = []

    def read(_prompt):
        threads.append(threading.current_thread())
        raise errors.InvalidRequestError("stop")

    monkeypatch.setattr(client_module, "with_files", read)

    async def ask():
        async with AsyncClient("127.0.0.1:1") as client:
            for call in (client.complete("x"), client.tokenize("x"), client.embed(["x"])):
                with pytest.raises(errors.InvalidRequestError, match="stop"):
                    await call

    asyncio.run(ask())
    assert len(threads) == 3
    assert threading.main_thread() not in threads
