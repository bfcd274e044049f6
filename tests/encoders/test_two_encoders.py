"""A bundle with an encoder of images and one of sounds: both in one message, in any order, and each with its own rows."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tokenizers
import torch
from helpers.media import CONFIG, GREEDY, encoded, image, picture, text, user, write_image_model
from helpers.sounds import audio, filed, tone, write_sound_model
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.encoders import encoder_pages
from motet.runtime.encoders.spectrogram import spectrograms
from motet.runtime.encoders.tiles import normalised
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import InvalidRequestError
from motet.runtime.model.bundle import MANIFEST, Bundle
from motet.runtime.model.files import file_digest
from motet.runtime.text.prompt import read_prompt

pytestmark = [pytest.mark.slow, pytest.mark.native]
NEAR = 0.05  # see test_served.py
PICTURE, SOUND = picture(40, 30, 5), tone(0.9, 5)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(the directory of a model that sees, one that hears, the bundle of the first with both encoders)."""
    path = tmp_path_factory.mktemp("two")
    seeing, hearing = write_image_model(path / "sees"), write_sound_model(path / "hears")
    tokenizer = tokenizers.Tokenizer.from_file(str(seeing / "tokenizer.json"))
    tokenizer.add_special_tokens(["<sound>"])
    tokenizer.save(str(seeing / "tokenizer.json"))
    template = (seeing / "chat_template.jinja").read_text()
    place = "{% elif line['type'] == 'image' %}"
    (seeing / "chat_template.jinja").write_text(
        template.replace(place, "{% elif line['type'] == 'audio' %}{{ '<sound>' }}" + place)
    )
    bundle = export_bundle(seeing, path / "both", bits=32, graphs=False)
    heard = Bundle.load(export_bundle(hearing, path / "other", bits=32, graphs=False))
    manifest = json.loads((bundle / MANIFEST).read_text())
    own = {"token": "<sound>", "token_id": tokenizer.token_to_id("<sound>"), "around": []}
    manifest["encoders"]["audio"] = heard.manifest["encoders"]["audio"] | own
    for file in heard.encoder_files["audio"]:
        shutil.copyfile(heard.path / file, bundle / file)
        manifest["files"][file] = file_digest(bundle / file)
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    return seeing, hearing, bundle


PARTS = {"image": image(encoded(PICTURE)), "audio": audio(filed(SOUND))}


@pytest.mark.parametrize("order", [("image", "audio"), ("audio", "image"), ("audio", "image", "audio"), ("audio",)])
def test_each_part_has_the_rows_of_its_encoder(models, order):
    seeing, hearing, bundle = models
    eyes, ears = encoder_pages(seeing)["image"], encoder_pages(hearing)["audio"]
    with Engine.from_bundle(bundle, EngineConfig(**CONFIG)) as engine:
        assert engine.model.media == ("image", "audio")
        prompt = user(*(p for one in order for p in (PARTS[one], text(f" {one} "))))
        built = read_prompt(engine.tokenizer, prompt, 2048, engine.media)
        params = SamplingParams(max_tokens=8, **GREEDY)
        spans = built.spans(b"")
        request = Request("r", (built.token_ids,), engine.model.default_ensemble, params, embedded=(spans,))
        [[answer]] = engine.complete([request])
        tiles = [engine.media.decoded(one).values for one in built.media if one.kind.medium == "image"]
        placeholders = engine.media.placeholders
    rows = {"image": [], "audio": []}
    with torch.no_grad():
        for pixels in tiles:
            rows["image"].append(eyes(torch.from_numpy(normalised(pixels, eyes.encoder.processor))).flatten(0, 1))
        heard = ears(torch.from_numpy(np.stack(spectrograms(SOUND, ears.encoder))))[0]
        rows["audio"] = [heard] * order.count("audio")
        model = Decoder.from_dir(seeing)
        ids = torch.tensor([[*built.token_ids, *answer.token_ids]])
        hidden = model.embed(ids)
        for name, token in (("image", "<image>"), ("audio", "<sound>")):
            if rows[name]:
                hidden[ids == placeholders[token]] = torch.cat(rows[name])
        logits = model.head(model.norm(model.run_layers(hidden, 0, model.config.num_layers)))[0]
    at = logits[len(built.token_ids) - 1 : -1]
    assert all(row.max() - row[token] < NEAR for row, token in zip(at, answer.token_ids, strict=True))
    own = torch.cat([torch.from_numpy(np.array(span.rows)) for span in spans])
    places = torch.isin(ids[0], torch.tensor(list(placeholders.values())))
    assert (hidden[0][places] - own).abs().max() < 1e-4


def test_limits_are_those_of_each_medium(models):
    _, _, bundle = models
    with Engine.from_bundle(bundle, EngineConfig(**CONFIG, max_images=1, max_audios=2)) as engine:
        for parts, message in (
            ([PARTS["audio"]] * 2 + [PARTS["image"]] * 2, "2 images, at most max_images"),
            ([PARTS["audio"]] * 3 + [PARTS["image"]], "3 audios, at most max_audios"),
            ([image(filed(SOUND))], "an image cannot be used: it is no image of a kind"),
            ([audio(encoded(PICTURE))], "a sound cannot be used: it is no sound of a kind"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                read_prompt(engine.tokenizer, user(*parts), 2048, engine.media)
    with Engine.from_bundle(bundle, EngineConfig(**CONFIG, max_audios=0)) as engine:
        assert engine.model.media == ("image",)
        with pytest.raises(InvalidRequestError, match=r"text and image only here: .*max_audios is 0"):
            read_prompt(engine.tokenizer, user(PARTS["audio"]), 2048, engine.media)
        assert read_prompt(engine.tokenizer, user(PARTS["image"]), 2048, engine.media).media
