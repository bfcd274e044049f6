"""Rows learn to spell the answer without the language model: the first phase of projectors."""

from __future__ import annotations

import pytest
import torch
from helpers.colours import COLOURS, TRAINING, train_on_pictures
from motet.export.bundle_writer import export_bundle
from motet.finetune.params import TuneParams
from motet.finetune.projector_params import ProjectorParams
from motet.finetune.training.loop import Watch
from motet.finetune.training.spelling import Spelled, spell
from motet.runtime.api.config import EngineConfig
from motet.runtime.checkpoints.encoders import read_encoders
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import ConfigError, DataError
from motet.runtime.text.prompt import read_prompt
from safetensors.torch import load_file

VOCABULARY, HIDDEN, WIDTH = 20, 16, 24
ALONE = TuneParams(**{k: v for k, v in TRAINING.items() if k not in ("learning_rate", "evaluations")} | {"epochs": 0})


def said(generator, code):
    """Token ids, and features in which each of them stands once, among rows of nothing in particular."""
    token_ids = torch.randint(3, VOCABULARY, (5,), generator=generator).tolist()
    features = torch.zeros(14, WIDTH)
    places = torch.randperm(6, generator=generator)[:5].sort().values * 2 + 1
    features[places] = code[token_ids]
    return Spelled(features + 0.05 * torch.randn(14, WIDTH, generator=generator), 14, tuple(token_ids))


def test_what_was_never_heard_together_is_spelled():
    generator = torch.Generator().manual_seed(0)
    code = torch.randn(VOCABULARY, WIDTH, generator=generator)
    embeddings = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    examples = [said(generator, code) for _ in range(300)]
    seen = {one.token_ids for one in examples}
    torch.manual_seed(0)
    projector = torch.nn.Sequential(torch.nn.Linear(WIDTH, 32), torch.nn.GELU(), torch.nn.Linear(32, HIDDEN))
    speller = spell(projector, examples, embeddings, epochs=25, seed=0)
    tests = [one for one in (said(generator, code) for _ in range(60)) if one.token_ids not in seen]
    assert len(tests) > 50
    right = sum(tuple(speller.spelled(one.features)) == one.token_ids for one in tests)
    assert right / len(tests) > 0.9
    row = projector(code[7])  # it comes near to the token's embedding, which is what the model knows
    assert int((embeddings[3:] @ row).argmax()) + 3 == 7


def test_two_equal_tokens_need_a_row_between():
    assert Spelled(torch.zeros(5, 2), 5, (1, 1, 2)).fits and Spelled(torch.zeros(4, 2), 4, (1, 1, 2)).fits
    assert not Spelled(torch.zeros(3, 2), 3, (1, 1, 2)).fits and Spelled(torch.zeros(3, 2), 3, (1, 3, 2)).fits
    assert not Spelled(torch.zeros(3, 2), 3, ()).fits


@pytest.mark.slow
def test_a_resampler_spells_and_is_served(seeing, tmp_path):
    """Eight rows of a picture, whatever its places; the same weights after a kill in the phase that follows."""
    folder, _ = seeing
    params = ProjectorParams(pool=1, projector="resampler", queries=8, spell_epochs=30)
    made = train_on_pictures(folder, "spelled", ALONE, params)
    spelled = made["spelled"]["image"]
    assert spelled["examples"] >= 32 and spelled["left_out"] == 0 and spelled["loss"] < 0.1
    assert made["metrics"]["steps"] == 0
    encoder = read_encoders(folder / "spelled")["image"]
    assert encoder.places == 9 and encoder.rows_per_tile == encoder.queries == 8
    export_bundle(folder / "spelled", tmp_path / "bundle", bits=32, graphs=False)
    with Engine.from_bundle(tmp_path / "bundle", EngineConfig(threads=1, backend="cpu")) as engine:
        picture = (folder / "pictures" / "red-3.png").read_bytes()
        prompt = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "?"}]}]
        built = read_prompt(engine.tokenizer, prompt, 512, engine.media)
        assert built.token_ids.count(encoder.token_id) == 8
        [span] = built.spans(b"")
        assert span.rows.shape[0] == 8

    class Killed(Exception):
        pass

    def kill(_step, _loss):
        raise Killed

    short = TuneParams(**{**TRAINING, "epochs": 1, "evaluations": 1})
    train_on_pictures(folder, "whole", short, params, name="x")
    with pytest.raises(Killed):
        train_on_pictures(folder, "killed", short, params, name="x", watch=Watch(stepped=kill))
    assert (folder / "..killed.projector.run" / "spelled.safetensors").is_file()
    train_on_pictures(folder, "killed", short, params, name="x")
    first, second = (load_file(folder / name / "encoder-image.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_what_cannot_be_spelled_is_refused(seeing):
    folder, _ = seeing
    with pytest.raises(ConfigError, match="nothing would be trained"):
        train_on_pictures(folder, "no", ALONE)
    with pytest.raises(ConfigError, match="spell_epochs must be at least 1"):
        ProjectorParams(spell_epochs=0)
    with pytest.raises(ConfigError, match="queries are of a resampler"):
        train_on_pictures(folder, "no", ALONE, ProjectorParams(queries=3, spell_epochs=1))
    assert max(map(len, COLOURS)) > 1
    with pytest.raises(DataError, match="an answer with as few tokens as there are rows"):
        train_on_pictures(folder, "no", ALONE, ProjectorParams(pool=3, spell_epochs=1))
    with pytest.raises(ConfigError, match="epochs must be at least 1"):
        TuneParams(epochs=0)
    with pytest.raises(ConfigError, match="l1 is of epochs, and there are none"):
        TuneParams(method="projector", epochs=0, l1=0.1)
