"""Files of sounds, and what only looks like one: samples or a clear refusal, and the process goes on."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import soundfile
from helpers.media import encoded, image_kind, picture
from helpers.sounds import RATE, filed, sound_decoder, sound_kind, tone
from motet.runtime.encoders.decoding import MediaDecoder
from motet.runtime.encoders.sound_files import MOST_CHANNELS
from motet.runtime.errors import InvalidRequestError

pytestmark = pytest.mark.slow
SOUND = tone(1.3, seed=3)


@pytest.fixture(scope="module")
def decoder():
    decoder = sound_decoder()
    yield decoder
    decoder.close()


READ = {
    "wav": (filed(SOUND), "audio/wav", 1e-7),
    "16 bits": (filed(SOUND, subtype="PCM_16"), "audio/x-wav", 1e-4),
    "8 bits": (filed(SOUND, subtype="PCM_U8"), "audio/wave", 0.02),
    "extensible": (filed(SOUND, "WAVEX", subtype="PCM_24"), "audio/wav", 1e-6),
    "flac": (filed(SOUND, "FLAC", subtype="PCM_24"), "audio/x-flac", 1e-6),
    "vorbis": (filed(SOUND, "OGG"), "audio/ogg", None),
    "opus": (filed(SOUND, "OGG", subtype="OPUS"), "audio/opus", None),
    "mp3": (filed(SOUND, "MP3"), "audio/mp3", None),
}


@pytest.mark.parametrize("name", READ)
def test_sounds_are_read(decoder, name):
    content, media_type, error = READ[name]
    found = decoder.decode(content)
    assert decoder.look(content, media_type) == found.dims == (len(SOUND),)
    if error is not None:
        assert np.abs(found.values - SOUND).max() < error
    assert np.corrcoef(found.values, SOUND)[0, 1] > 0.99


def test_channels_become_one_their_mean(decoder):
    two = tone(0.7, seed=4, channels=2)
    assert np.allclose(decoder.decode(filed(two)).values, two.mean(1), atol=1e-6)
    many = tone(0.2, seed=4, channels=MOST_CHANNELS)
    assert np.allclose(decoder.decode(filed(many)).values, many.mean(1), atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_other_rates_are_resampled(decoder, rate):
    """A tone stays the tone that it is, and the number of samples is known before."""
    time = np.arange(rate) / rate
    content = filed(np.sin(2 * np.pi * 440 * time).astype(np.float32), rate=rate)
    found = decoder.decode(content)
    assert found.dims == decoder.look(content) == (RATE,)
    own = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    assert np.abs(found.values - own)[800:-800].max() < 1e-3


def wav(frames=4, channels=1, rate=RATE, bits=32, data=None, kind=3, size=None):
    """A WAV, with whatever its header is to say."""
    data = bytes(frames * channels * bits // 8) if data is None else data
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * channels * bits // 8 % 2**32, channels * bits // 8, bits)
    size = len(data) if size is None else size
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", (4 + len(chunks)) % 2**32) + b"WAVE" + chunks


def floats(*values):
    return wav(data=np.array([*values, *([0.0] * 2000)], "<f4").tobytes())


def saying(frames):
    """A FLAC whose header says that it has so many."""
    content = bytearray(READ["flac"][0])
    content[22:26] = frames.to_bytes(4, "big")
    return bytes(content)


REFUSED = {  # those that are said to be short are asked when the header is read
    "nothing": (b"", "has no bytes"),
    "text": (b"hello", "no sound of a kind that is read"),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(99), "no sound of a kind"),
    "a video": (b"\0\0\0\x18ftypmp42" + bytes(99), "no sound of a kind"),
    "aiff": (filed(SOUND, "AIFF", subtype="PCM_16"), "no sound of a kind"),
    "another riff": (b"RIFF" + struct.pack("<I", 99) + b"AVI " + bytes(99), "no sound of a kind"),
    "no samples": (wav(0), "no samples"),
    "header alone": (READ["wav"][0][:20], "damaged|no samples"),
    "truncated wav": (READ["wav"][0][:9000], "damaged or cut off"),
    "a byte less": (READ["16 bits"][0][:-1], "damaged or cut off"),
    "truncated flac": (READ["flac"][0][:20000], "damaged or cut off"),
    "truncated ogg": (READ["vorbis"][0][: len(READ["vorbis"][0]) // 2], "damaged or cut off"),
    "ogg without its last byte": (READ["opus"][0][:-1], "damaged or cut off"),
    "truncated mp3": (READ["mp3"][0][: len(READ["mp3"][0]) // 2], "damaged or cut off"),
    "too long": (filed(np.zeros(7 * RATE, np.float32)), r"has 7.0 seconds, at most max_audio_seconds \(6\)"),
    "3 hours": (saying(3 * 3600 * RATE), "has 10800.0 seconds, at most"),
    "many channels": (filed(tone(0.1, channels=17)), "has 17 channels, at most 16"),
    "a thousand channels": (wav(4, channels=1024), "has 1024 channels, at most 16"),
    "rate 1": (wav(5, rate=1), "has 1 samples a second"),
    "rate of millions": (wav(999, rate=50_000_000), "has 50000000 samples a second"),
    "nan": (floats(0.1, float("nan")), "NaN or infinite"),
    "infinite": (floats(0.1, float("inf")), "NaN or infinite"),
    "loud": (floats(0.1, -1e30), "samples above 100"),
    "too short": (wav(100), "too short: it gives no row"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_and_the_next_one_is_read(decoder, name):
    content, message = REFUSED[name]
    with pytest.raises(InvalidRequestError, match=message) as caught:
        (decoder.look if "short" in name else decoder.decode)(content)
    assert caught.value.field == "messages.content"
    assert str(caught.value).startswith("a sound cannot be used")
    assert decoder.decode(READ["wav"][0]).dims == (len(SOUND),)


def test_what_the_header_says_is_asked_before_anything_is_decoded(decoder):
    for name in ("too long", "3 hours", "many channels", "rate 1", "no samples", "too short", "truncated wav"):
        content, message = REFUSED[name]
        with pytest.raises(InvalidRequestError, match=message):
            decoder.look(content)


def test_a_header_of_more_frames_than_there_are(decoder):
    """Of a FLAC that says 5 s and has 1.3."""
    content = saying(5 * RATE)
    assert decoder.look(content) == (5 * RATE,)
    with pytest.raises(InvalidRequestError, match="damaged or cut off"):
        decoder.decode(content)


def test_random_damage_is_a_refusal_or_a_sound(decoder):
    """Bytes of real files, changed and cut: nothing but these two comes of it."""
    random = np.random.default_rng(5)
    refused = 0
    for name in ("wav", "16 bits", "flac", "vorbis", "opus", "mp3"):
        for _ in range(40):
            content = bytearray(READ[name][0])
            for place in random.integers(0, min(len(content), 2000), random.integers(1, 12)):
                content[place] = random.integers(0, 256)
            try:
                found = decoder.decode(bytes(content[: random.integers(1, 2 * len(content))]))
                assert found.values.shape == found.dims
                assert np.isfinite(found.values).all()
            except InvalidRequestError:
                refused += 1
    assert refused > 100


def test_one_process_decodes_images_and_sounds():
    """One after the other, and what refuses a file of one kind is of that kind."""
    kinds = image_kind(2**20), sound_kind()
    decoder, files = MediaDecoder(kinds), (encoded(picture(30, 20)), READ["flac"][0])
    try:
        for _ in range(3):
            shapes = [decoder.decode(kind, file).values.shape for kind, file in zip(kinds, files)]
            assert shapes == [(7, 3, 24, 24), (len(SOUND),)]
            process = decoder._process
        for kind, file, noun in zip(kinds, reversed(files), ("image", "sound")):
            with pytest.raises(InvalidRequestError, match=f"it is no {noun} of a kind that is read"):
                decoder.look(kind, file)
        assert decoder._process is process
    finally:
        decoder.close()


def test_what_a_sender_says_must_be_so(decoder):
    with pytest.raises(InvalidRequestError, match="said to be 'audio/mp3' and is audio/wav"):
        decoder.look(READ["wav"][0], "audio/mp3")


@pytest.mark.parametrize(
    "dims", [[], [0], [-5], [10**9], [1, 2], ["x"]], ids=["none", "zero", "negative", "many", "two", "text"]
)
def test_sizes_that_cannot_be_are_refused(dims):
    with pytest.raises((ValueError, TypeError)):
        sound_kind().check_dims(tuple(map(int, dims)))


def test_the_library_reads_what_is_said_to_be_read():
    assert {"WAV", "WAVEX", "FLAC", "OGG", "MP3"} <= set(soundfile.available_formats())
