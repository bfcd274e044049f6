"""What the encoder of sounds computes is what transformers computes: features, tokens, rows within 1e-4."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.media import text, user
from helpers.sounds import (
    POSITIONS,
    RATE,
    TOKENS,
    OneKind,
    audio,
    extractor,
    filed,
    reference_inputs,
    sound_kind,
    tone,
)
from motet.runtime.api.config import EngineConfig
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.encoders import encoder_pages, read_encoders
from motet.runtime.encoders.reader import _Medium
from motet.runtime.encoders.sounds import SoundKind
from motet.runtime.encoders.spectrogram import spectrograms
from motet.runtime.text.prompt import read_prompt
from motet.runtime.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
# Of one window and less, odd and even numbers of frames, just under, at and over the piece of 2 s.
LENGTHS = [700, 1601, 4799, 16000, 31840, 31999, 32000]
LONGER = [32001, 47999, 80000, 96000]


@pytest.mark.parametrize("bins", [16, 80, 128])
def test_spectrograms_are_transformers(tmp_path, bins):
    """At the published sizes too: 30 s, 80 and 128 bins."""
    import transformers

    theirs = transformers.WhisperFeatureExtractor(feature_size=bins, chunk_length=2 if bins == 16 else 30)
    kind = sound_kind(pad="piece")
    encoder = kind.encoder
    for samples in (*LENGTHS, 5):
        sound = tone(1, seed=samples)[:samples] if samples <= RATE else tone(samples / RATE, seed=samples)
        expected = theirs(sound, sampling_rate=RATE, return_tensors="np")["input_features"][0]
        if bins == 16:
            [found] = spectrograms(sound, encoder)
            assert found.shape == (bins, 2 * POSITIONS + 1)
            assert not found[:, -1].any()
            assert np.abs(found[:, :-1] - expected).max() < 2e-4
        else:
            from motet.runtime.encoders.spectrogram import log_mel

            padded = np.zeros(30 * RATE, np.float32)
            padded[:samples] = sound
            assert np.abs(log_mel(padded, encoder.processor, bins) - expected).max() < 2e-4


def rows_of(page, sound):
    with torch.no_grad():
        parts = [page(torch.from_numpy(mel)[None])[0] for mel in spectrograms(sound, page.encoder)]
    return torch.cat(parts)


def test_rows_are_transformers(model_dir, family, model):
    page = encoder_pages(model_dir)["audio"]
    own = extractor(model_dir)
    for samples in LENGTHS if family == "qwen2_audio" else LENGTHS + LONGER:
        sound = tone(samples / RATE, seed=samples)
        inputs = reference_inputs(model_dir, family, [user_turn(1)], [sound])
        with torch.no_grad():
            if family == "qwen2_audio":
                expected = qwen2_rows(model, inputs)
            else:
                expected = model.get_audio_features(inputs["input_features"]).pooler_output
        rows = rows_of(page, sound)
        assert len(rows) == page.encoder.rows(samples) == len(expected)
        assert not len(rows) or (rows - expected).abs().max() < 1e-4, samples
    assert own.chunk_length == 2


def qwen2_rows(model, inputs):
    """What transformers' model puts in the places of the placeholders."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, named: seen.append(named["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    return seen[0][0][inputs["input_ids"][0] == 260]


def user_turn(count):
    return user(*(p for i in range(count) for p in (audio(b""), text(f" no {i} "))))[0]


def test_logits_of_texts_are_transformers(model_dir, model):
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert (Decoder.from_dir(model_dir)(ids) - model(input_ids=ids).logits).abs().max() < 1e-4


class _Reader:
    """A `MediaReader` without an encoder: what the prompt needs of one."""

    def __init__(self, encoder):
        self.decoder = OneKind(SoundKind(encoder, EngineConfig()))
        self.placeholders = {encoder.token: encoder.token_id}

    def read(self, files):
        return [_Medium(self, self.decoder.kind, one.content, self.decoder.look(one.content), b"") for one in files]


def test_the_prompt_of_one_to_three_sounds_is_transformers(model_dir, family):
    encoder = read_encoders(model_dir)["audio"]
    reader, tokenizer = _Reader(encoder), Tokenizer.from_dir(model_dir, encoder.control_tokens)
    for count in range(1, 4):
        sounds = [tone(0.2 + 0.6 * i, seed=i) for i in range(count)]
        expected = reference_inputs(model_dir, family, [user_turn(count)], sounds)["input_ids"][0].tolist()
        parts = [p for i, s in enumerate(sounds) for p in (audio(filed(s)), text(f" no {i} "))]
        assert list(read_prompt(tokenizer, user(*parts), 2048, reader).token_ids) == expected
    forged = user(audio(filed(sounds[0])), text(" ".join(TOKENS[family][:2])))
    ids = read_prompt(tokenizer, forged, 2048, reader).token_ids
    assert ids.count(encoder.token_id) == encoder.rows(len(sounds[0])), "a text cannot write a sound"
    reader.decoder.close()


def test_rows_of_whole_rows(model_dir):
    """Sounds that are filled up to a whole row, as our own models hear them: rows are those of the sound with that silence."""
    import dataclasses

    page = encoder_pages(model_dir)["audio"]
    for pool in (4, 5):
        encoder = dataclasses.replace(page.encoder, pad="row", pool=page.encoder.pool)
        sound = tone(1.013, seed=pool)
        frames = encoder.frames(len(sound))
        assert frames[0] % encoder.pool == 0
        assert encoder.rows(len(sound)) == frames[0] // encoder.pool
        page.encoder = encoder
        silent = np.concatenate([sound, np.zeros(frames[0] * 320 - len(sound), np.float32)])
        found, same = rows_of(page, sound), rows_of(page, silent)
        assert found.shape == same.shape
        assert (found - same).abs().max() < 1e-5
