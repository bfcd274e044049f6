"""Images end to end: from a file to tokens, through a served bundle, as transformers draws them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.media import CONFIG, GREEDY, encoded, image, picture, pictures, question, text, user
from helpers.models import make_tail
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Ensemble, Member, Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.encoders import encoder_pages
from motet.runtime.checkpoints.huggingface import read_weights
from motet.runtime.checkpoints.members.tail import read_tail
from motet.runtime.encoders.tiles import normalised
from motet.runtime.engine.engine import Engine
from motet.runtime.text.media import MediaFile
from motet.runtime.text.prompt import read_prompt

pytestmark = [pytest.mark.slow, pytest.mark.native]
NEAR = 0.05  # between the two best logits: the cache holds 16-bit floats, so such a tie may fall the other way


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
    config = EngineConfig(**CONFIG, media_cache_bytes=60_000)
    with Engine.from_bundle(image_bundle, config) as engine:
        runs, session = [], engine.media.sessions["image"]

        class Counted:
            def run(self, *arguments):
                runs.append(1)
                return session.run(*arguments)

        engine.media.sessions["image"] = Counted()

        def encode(content, salt=b""):
            before = len(runs)
            [medium] = engine.media.read([MediaFile("image", content)])
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
    with Engine.from_bundle(image_bundle, EngineConfig(**CONFIG, media_cache_bytes=0)) as engine:
        [medium] = engine.media.read([MediaFile("image", one)])
        assert len(medium.encode(b"")) == 10
        assert not engine.media._kept


def test_members_with_tails_see_what_the_trunk_saw(image_model_dir, tmp_path):
    """A mix of the base and a tail, over one trunk that the image's rows enter, is the mix of two whole models."""
    tail = make_tail(image_model_dir, tmp_path / "t", "t", 3, 0.5)
    export_bundle(image_model_dir, tmp_path / "b", tails={"base": None, "t": tail}, bits=32, graphs=False)
    page, weights = encoder_pages(image_model_dir)["image"], read_weights(image_model_dir)
    base = Decoder.from_dir(image_model_dir)
    other = Decoder.from_weights(base.config, {**weights, **read_tail(tail)[1]})
    ensemble = Ensemble((Member("base", 0.4), Member("t", 0.6)))
    with Engine.from_bundle(tmp_path / "b", EngineConfig(**CONFIG)) as engine:
        built = read_prompt(engine.tokenizer, question(list(map(encoded, pictures(2)))), 2048, engine.media)
        rows = [engine.media.decoded(medium).values for medium in built.media]
        params = SamplingParams(max_tokens=8, **GREEDY)
        request = Request("r", (built.token_ids,), ensemble, params, embedded=(built.spans(b""),))
        [[answer]] = engine.complete([request])
        pixels = torch.from_numpy(np.concatenate([normalised(each, page.encoder.processor) for each in rows]))
    with torch.no_grad():
        ids = torch.tensor([[*built.token_ids, *answer.token_ids]])
        hidden = base.embed(ids)
        hidden[ids == page.encoder.token_id] = page(pixels).flatten(0, 1)
        logits = [d.head(d.norm(d.run_layers(hidden, 0, d.config.num_layers)))[0] for d in (base, other)]
        mixed = 0.4 * logits[0] + 0.6 * logits[1]
    at = mixed[len(built.token_ids) - 1 : -1]
    assert all(row.max() - row[token] < NEAR for row, token in zip(at, answer.token_ids, strict=True))
    assert any(row.argmax() != one.argmax() for row, one in zip(at, logits[0][len(built.token_ids) - 1 : -1]))
