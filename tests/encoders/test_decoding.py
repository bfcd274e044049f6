"""Files of images, and what only looks like one: a tile or a clear refusal, and the process goes on."""

from __future__ import annotations

import io
import struct
import sys
import threading
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
from helpers.media import SETTINGS, OneKind, encoded, image_decoder, image_kind, picture
from motet.runtime.encoders import decoding
from motet.runtime.encoders.tiles import cut
from motet.runtime.errors import InvalidRequestError, UnavailableError
from PIL import Image

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def decoder():
    decoder = image_decoder(2**22)
    yield decoder
    decoder.close()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, data=b""):
    """The header of a PNG that says it has this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def animation(kind):
    content = io.BytesIO()
    frames = [picture(20, 20, seed) for seed in range(3)]
    frames[0].save(content, kind, save_all=True, append_images=frames[1:])
    return content.getvalue()


def palette_with_alpha():
    image = picture(40, 30).convert("P")
    return encoded(image, "PNG", transparency=bytes(range(256)))


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    return encoded(picture(60, 20), "JPEG", exif=exif, quality=95)


READ = {
    "1x1": encoded(picture(1, 1)),
    "png": encoded(picture(50, 30)),
    "jpeg": encoded(picture(50, 30), "JPEG"),
    "webp": encoded(picture(50, 30), "WEBP"),
    "gif": encoded(picture(50, 30), "GIF"),
    "bmp": encoded(picture(50, 30), "BMP"),
    "grey": encoded(picture(50, 30).convert("L")),
    "black and white": encoded(picture(50, 30).convert("1")),
    "alpha": encoded(picture(50, 30).convert("RGBA")),
    "grey and alpha": encoded(picture(50, 30).convert("LA")),
    "palette and alpha": palette_with_alpha(),
    "cmyk": encoded(picture(50, 30).convert("CMYK"), "JPEG"),
    "rotated": rotated(),
    "progressive": encoded(picture(50, 30), "JPEG", progressive=True),
}


@pytest.mark.parametrize("name", READ)
def test_pictures_are_read_as_transformers_reads_them(decoder, name):
    from transformers.image_utils import load_image

    expected, rows, columns = cut(load_image(Image.open(io.BytesIO(READ[name]))), SETTINGS)
    found = decoder.decode(READ[name])
    assert found.dims == decoder.look(READ[name]) == (rows, columns)
    assert np.array_equal(found.values, expected)


def test_a_rotated_picture_stands_upright(decoder):
    found = decoder.decode(READ["rotated"])
    assert found.dims[0] > found.dims[1]


def late(orientation):
    """A PNG that says behind its pixels how it stands."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    whole = encoded(picture(60, 20))
    return whole[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + whole[-12:]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "late"])
def test_the_header_says_how_many_tiles_there_are(decoder, kind, orientation):
    """However the picture is turned: the tokens are counted by the header."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = late(orientation) if kind == "late" else encoded(picture(60, 20), kind, exif=exif)
    rows, columns = decoder.look(content)
    found = decoder.decode(content)
    assert found.dims == (rows, columns)
    assert (rows > columns) == (orientation >= 5)


REFUSED = {
    "nothing": (b"", "has no bytes"),
    "text": (b"hello", "no image of a kind that is read"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image of a kind"),
    "pdf": (b"%PDF-1.7\n1 0 obj\n", "no image of a kind"),
    "tiff": (encoded(picture(9, 9), "TIFF"), "no image of a kind"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a kind"),
    "truncated png": (READ["png"][: len(READ["png"]) // 2], "damaged or cut off"),
    "truncated jpeg": (encoded(picture(400, 300), "JPEG", quality=95)[:5000], "damaged or cut off"),
    "header alone": (READ["jpeg"][:30], "no image of a kind|damaged"),
    "no pixels": (png(9, 9), "damaged or cut off"),
    "bomb": (png(50_000, 50_000), "2500000000 pixels, at most max_image_pixels"),
    "one line too large": (png(2**31 - 1, 1), "pixels, at most|no image"),
    "just too large": (encoded(Image.new("1", (2049, 2048))), "4196352 pixels, at most"),
    "gif animation": (animation("GIF"), "is an animation"),
    "webp animation": (animation("WEBP"), "is an animation"),
    "png animation": (animation("PNG"), "is an animation"),
    "16 bits": (encoded(Image.fromarray(np.zeros((9, 9), np.uint16))), "more than 8 bits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_and_the_next_one_is_read(decoder, name):
    content, message = REFUSED[name]
    with pytest.raises(InvalidRequestError, match=message) as caught:
        decoder.decode(content)
    if "damaged" not in message:  # the header says so
        with pytest.raises(InvalidRequestError, match=message):
            decoder.look(content)
    assert caught.value.field == "messages.content"
    assert len(decoder.decode(READ["1x1"]).values) == 10


def test_random_damage_is_a_refusal_or_an_image(decoder):
    """Bytes of real files, changed and cut: nothing but these two comes of it."""
    random = np.random.default_rng(5)
    refused = 0
    for name in ("png", "jpeg", "webp", "gif", "bmp", "palette and alpha"):
        for _ in range(40):
            content = bytearray(READ[name])
            for place in random.integers(0, len(content), random.integers(1, 12)):
                content[place] = random.integers(0, 256)
            try:
                tiles = decoder.decode(bytes(content[: random.integers(1, len(content) + 1)]))
                assert tiles.values.shape[1:] == (3, 24, 24)
            except InvalidRequestError:
                refused += 1
    assert refused > 100


def test_what_a_sender_says_must_be_so(decoder):
    assert decoder.look(READ["png"], "image/png") == decoder.look(READ["jpeg"], "image/jpg")
    with pytest.raises(InvalidRequestError, match="said to be 'image/jpeg' and is image/png"):
        decoder.look(READ["png"], "image/jpeg")
    assert len(decoder.decode(READ["1x1"]).values) == 10


def test_a_process_that_is_killed_is_started_again(decoder):
    decoder.decode(READ["1x1"])
    decoder.process.kill()
    decoder.process.wait()
    assert len(decoder.decode(READ["1x1"]).values) == 10


def test_an_image_that_takes_too_long_is_refused(monkeypatch):
    """The process computes on, and is ended. What ends it is its own computing time, not the clock."""
    monkeypatch.setattr(decoding, "LIMIT_S", 0.05)
    decoder = image_decoder(2**28)
    decoder.decode(READ["1x1"])
    large = encoded(Image.new("RGB", (9000, 9000)))
    try:
        with pytest.raises(InvalidRequestError, match=r"takes more than 0\.05 s to decode"):
            decoder.decode(large)
    finally:
        decoder.close()


def test_an_image_that_takes_too_much_memory_is_refused(monkeypatch):
    monkeypatch.setattr(decoding, "LIMIT_S", 60.0)
    kind = image_kind(2**28)
    kind._most_pixels = 2**30  # more than a server can be set to
    decoder = OneKind(kind)
    try:
        with pytest.raises(InvalidRequestError, match="more than 2 GiB"):
            decoder.decode(png(30_000, 30_000))
        assert len(decoder.decode(READ["1x1"]).values) == 10
    finally:
        decoder.close()


def test_a_process_that_does_not_start_is_unavailable(monkeypatch):
    monkeypatch.setattr(decoding.sys, "executable", "/bin/false")
    decoder = image_decoder(2**20)
    with pytest.raises(UnavailableError, match="does not start"):
        decoder.decode(READ["1x1"])
    decoder.close()


def test_two_decoders_work_beside_each_other(decoder):
    other, found = image_decoder(2**20), []
    threads = [
        threading.Thread(target=lambda one=one: found.extend(len(one.decode(READ["png"]).values) for _ in range(20)))
        for one in (decoder, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert found == [7] * 40


@contextmanager
def instead(monkeypatch, tmp_path, *lines):
    """A decoder whose process runs these lines, once it has read its settings."""
    script = tmp_path / "python"
    script.write_text("\n".join([f"#!{sys.executable}", "import sys, time", "sys.stdin.buffer.readline()", *lines]))
    script.chmod(0o755)
    monkeypatch.setattr(decoding.sys, "executable", str(script))
    decoder = image_decoder(2**20)
    yield decoder
    decoder.close()


def test_all_answers_to_a_question_have_one_limit_of_time(monkeypatch, tmp_path):
    """Here a byte comes every 20 ms for a minute, and never a line."""
    monkeypatch.setattr(decoding, "_WAIT_S", 1.0)
    said = (
        "for text in ('\"ready\"\\n', '\"taken\"\\n', *' ' * 3000): print(text, end='', flush=True); time.sleep(0.02)"
    )
    with instead(monkeypatch, tmp_path, said) as decoder, pytest.raises(UnavailableError, match="try again later"):
        decoder.decode(READ["1x1"])


def test_an_answer_that_is_deeper_than_json_goes(monkeypatch, tmp_path):
    said = "print('\"ready\"\\n\"taken\"\\n' + '[' * 60000, flush=True)"
    decoder_of = instead(monkeypatch, tmp_path, said, "sys.stdin.buffer.read()")
    with decoder_of as decoder, pytest.raises(InvalidRequestError, match="cannot be decoded"):
        decoder.decode(READ["1x1"])
