"""Sounds end to end: from a file to tokens, through a served bundle, as transformers draws them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.media import GREEDY, text, user
from helpers.servers import serving
from helpers.sounds import CONFIG, RATE, audio, filed, reference_inputs, sounds, tone
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.client.client import Client
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import NumericalError
from motet.runtime.text.media import MediaFile
from motet.runtime.text.prompt import read_prompt

pytestmark = [pytest.mark.slow, pytest.mark.native]
NEAR = 0.05  # between the two best logits: the cache holds 16-bit floats, so such a tie may fall the other way


@pytest.fixture(scope="module")
def bundle(model_dir, tmp_path_factory):
    return export_bundle(model_dir, tmp_path_factory.mktemp("sounds") / "tiny", bits=32, graphs=False)


@pytest.fixture(scope="module")
def engine(bundle):
    with Engine.from_bundle(bundle, EngineConfig(**CONFIG)) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(bundle):
    with (
        Engine.from_bundle(bundle, EngineConfig(**CONFIG)) as engine,
        serving(engine) as server,
        Client(server.address) as client,
    ):
        yield client


def question(contents):
    return user(*(part for index, one in enumerate(contents) for part in (audio(one), text(f" no {index} "))))


def test_rows_that_are_not_those_of_the_placeholders_are_refused(engine, monkeypatch):
    """A graph of sounds says nothing of their number, and rows beside their places would be everybody's step."""
    kind, prompt = engine.media.kinds["audio"], question([filed(tone(1.4, 33))])
    built = read_prompt(engine.tokenizer, prompt, 4096, engine.media)
    for change in (lambda rows: rows[1:], lambda rows: np.concatenate([rows, rows]), lambda rows: rows[:, 1:]):
        monkeypatch.setattr(kind, "encode", lambda *given, change=change: change(type(kind).encode(kind, *given)))
        with pytest.raises(NumericalError, match="cannot be used"):
            built.spans(b"a salt of its own")


@pytest.mark.parametrize("count", range(1, 4))
def test_greedy_answers_are_transformers(client, model, model_dir, family, count):
    given = sounds(count)
    if family == "voxtral" and count == 2:
        given = [tone(4.5, 70), given[0]]  # of three pieces
    inputs = reference_inputs(model_dir, family, question([b""] * count), given)
    options = {"do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16, "eos_token_id": None}
    found = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    prompt = inputs["input_ids"][0].tolist()
    drawn, logits = found.sequences[0, len(prompt) :].tolist(), torch.stack(found.logits)[:, 0]
    asked = question([filed(one) for one in given])
    [answer] = client.complete(asked, max_tokens=16, **GREEDY)
    assert client.tokenize(asked) == prompt
    assert answer.usage.prompt_tokens == len(prompt)
    for place, (own, theirs) in enumerate(zip(answer.token_ids, drawn, strict=True)):
        if own != theirs:
            assert logits[place].max() - logits[place, own] < NEAR, f"token {place}"
            break


def test_answers_do_not_depend_on_who_else_is_there(bundle, engine):
    """Sounds beside text, in chunks that cut their rows, preempted for lack of blocks, with a cached prefix or none."""

    def request(name, prompt):
        built = read_prompt(engine.tokenizer, prompt, 2048, engine.media)
        params = SamplingParams(max_tokens=10, logprobs=0, **GREEDY)
        ensemble = engine.model.default_ensemble
        return Request(name, (built.token_ids,), ensemble, params, embedded=(built.spans(b""),))

    prompts = [question([filed(one) for one in sounds(n, seed)]) for n, seed in ((1, 0), (2, 0), (1, 1), (3, 0))]
    prompts += ["a text", user(text("hi"))]
    requests = [request(f"r{index}", prompt) for index, prompt in enumerate(prompts)]
    small = EngineConfig(**CONFIG, max_model_len=512, max_num_seqs=2, prefill_chunk=48, max_num_batched_tokens=96)
    bare = EngineConfig(**CONFIG, max_model_len=512, prefix_cache=False)
    found = []
    for config in (bare, small):
        with Engine.from_bundle(bundle, config) as own:
            one_by_one = [own.complete([each])[0][0] for each in requests]
            together = [each[0] for each in own.complete(requests)]
            found += [[(one.token_ids, one.logprobs) for one in answers] for answers in (one_by_one, together)]
    assert found[0] == found[1] == found[2] == found[3]


def test_prefixes_are_shared_with_the_same_sound_and_no_other(client):
    """Sounds of one length have the same token ids: what tells them apart is what is in them."""
    first, second = filed(tone(1.9, 1)), filed(tone(1.9, 2))
    tail = text(" and a long question about it, which all of them ask in the same words")

    def ask(content):
        [answer] = client.complete(user(text("hear:"), audio(content), tail), max_tokens=4, cache_salt="own", **GREEDY)
        return answer.usage.cached_tokens, answer.token_ids

    (_, answer), (cached, again) = ask(first), ask(first)
    assert cached > 20
    assert again == answer
    cached, other = ask(second)
    assert cached == 0
    assert other != answer


def test_what_is_encoded_is_kept_for_the_same_salt_only(engine, monkeypatch):
    session, runs = engine.media.sessions["audio"], []

    class Counted:
        def run(self, *arguments):
            runs.append(1)
            return session.run(*arguments)

    monkeypatch.setitem(engine.media.sessions, "audio", Counted())
    [medium] = engine.media.read([MediaFile("audio", filed(tone(1.1, 500)))])
    rows, again = medium.encode(b"a"), medium.encode(b"a")
    assert len(runs) == 1
    assert all(np.array_equal(a, b) for a, b in zip(rows, again, strict=True))
    medium.encode(b"b")
    assert len(runs) == 2


def test_a_sound_of_another_rate_is_the_sound(client):
    """Of 48,000 samples a second in stereo, and as it was before: the same number of rows."""
    own, other = filed(tone(1.0, 3)), filed(tone(1.0, 3, 48000, 2), "FLAC", 48000)
    lengths = {len(client.tokenize(user(audio(one)))) for one in (own, other)}
    assert len(lengths) == 1
    assert client.complete(user(audio(other)), max_tokens=2, **GREEDY)
    assert RATE == 16000
