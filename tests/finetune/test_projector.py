"""A frozen model learns through a projector what pictures show, and its directory is a model like any other."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.colours import COLOURS, QUESTION, TRAINING, train_on_pictures
from motet.export.bundle_writer import export_bundle
from motet.finetune.params import TuneParams
from motet.finetune.projector_params import ProjectorParams
from motet.finetune.search.answers import answers_of
from motet.finetune.search.distil import distil
from motet.finetune.search.fuse import fuse
from motet.finetune.search.params import DistilParams, FuseParams, SearchParams, SearchSpace
from motet.finetune.search.search import search, trial_dir
from motet.finetune.training.loop import Watch
from motet.finetune.training.progress import Progress
from motet.finetune.training.train import Workbench, tune
from motet.finetune.training.trunk_cache import TrunkCache
from motet.finetune.training.tune_projector import tune_projector
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.encoders import encoder_pages
from motet.runtime.checkpoints.huggingface import checkpoint_digest
from motet.runtime.checkpoints.members.peft_format import CONFIG
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import ConfigError
from motet.runtime.text.prompt import read_prompt
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def answer_of(page, decoder, tokenizer, media, picture):
    """What the page in torch says greedily, and the distances of its two best logits."""
    prompt = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]}]
    built = read_prompt(tokenizer, prompt, 512, media)
    ids = list(built.token_ids)
    with torch.no_grad():
        [medium] = built.media
        pixels = (torch.tensor(media.decoded(medium).values) / 255 - 0.5) / 0.5
        rows, drawn = page(pixels)[0], []
        start = ids.index(page.encoder.token_id)
        for _ in range(6):
            hidden = decoder.embed(torch.tensor([ids]), [(0, start, rows)])
            logits = decoder.head(decoder.norm(decoder.run_layers(hidden, 0, decoder.config.num_layers)))[0, -1]
            best = logits.topk(2)
            drawn.append((int(best.indices[0]), float(best.values[0] - best.values[1])))
            ids.append(drawn[-1][0])
    return built, drawn


def test_pictures_are_named(seeing):
    """Who sees no picture can say no more than that the four names are equally likely."""
    _, made = seeing
    metrics = made["metrics"]
    letters = sum(len(name) + 1 for name in COLOURS) / len(COLOURS)  # of an answer, with its end
    blind = math.log(len(COLOURS)) / letters
    assert metrics["validation_loss_after"] < 0.2 * blind < metrics["validation_loss_before"]
    assert made["encoders"]["image"]["is_new"]


def test_base_and_tower_stay_as_they_are(seeing):
    folder, made = seeing
    base, tuned = (load_file(folder / name / "model.safetensors") for name in ("base", "seeing"))
    assert base.keys() == tuned.keys() and all(torch.equal(base[name], tuned[name]) for name in base)
    tower = {
        name.removeprefix("vision_model."): tensor
        for name, tensor in load_file(folder / "tower" / "model.safetensors").items()
        if not name.removeprefix("vision_model.").startswith("head.")
    }
    own = load_file(folder / "seeing" / "encoder-image.safetensors")
    assert {n for n in own if n.startswith("tower.")} == {f"tower.{name}" for name in tower}
    assert all(torch.equal(own[f"tower.{name}"], tensor) for name, tensor in tower.items())
    assert made["base"]["digest"] == checkpoint_digest(folder / "base") != checkpoint_digest(folder / "seeing")


@pytest.mark.native
def test_the_bundle_says_what_the_page_says(seeing, tmp_path):
    folder, _ = seeing
    config = EngineConfig(threads=1, kv_dtype="bf16", backend="cpu")
    page = encoder_pages(folder / "seeing")["image"]
    decoder = Decoder.from_dir(folder / "seeing")
    export_bundle(folder / "seeing", tmp_path / "bundle", bits=32, graphs=False)
    right = 0
    with Engine.from_bundle(tmp_path / "bundle", config) as engine:
        assert engine.model.media == ("image",)
        for name in COLOURS:
            picture = (folder / "pictures" / f"{name}-3.png").read_bytes()
            built, drawn = answer_of(page, decoder, engine.tokenizer, engine.media, picture)
            params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
            request = Request(
                name, (built.token_ids,), engine.model.default_ensemble, params, embedded=(built.spans(b""),)
            )
            [[answer]] = engine.complete([request])
            for own, (theirs, margin) in zip(answer.token_ids, drawn, strict=True):
                if own != theirs:
                    assert margin < 0.05  # a tie: the cache holds 16-bit floats
                    break
            right += engine.tokenizer.decode([t for t in answer.token_ids if t != 258]).startswith(name)
    assert right == len(COLOURS)


class Killed(Exception):
    pass


def test_a_run_that_is_killed_ends_with_the_same_weights(seeing):
    folder, made = seeing
    steps = []

    def kill(step, _loss):
        steps.append(step)
        if len(steps) == 2:
            raise Killed

    with pytest.raises(Killed):
        train_on_pictures(folder, "again", name="seeing", watch=Watch(validated=kill))
    assert not (folder / "again").exists()
    resumed = []
    again = train_on_pictures(folder, "again", name="seeing", watch=Watch(stepped=lambda step, _: resumed.append(step)))
    assert 1 < resumed[0] < again["metrics"]["steps"]
    assert again["metrics"] == made["metrics"]
    first, second = (load_file(folder / name / "encoder-image.safetensors") for name in ("seeing", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_projector_is_trained_on(seeing):
    """From where it was: the base's own encoder, or that of another directory."""
    folder, made = seeing
    short = TuneParams(**{**TRAINING, "epochs": 1, "evaluations": 1})
    on = train_on_pictures(folder, "on", short, ProjectorParams(), encoders={"image": folder / "seeing"})
    assert on["metrics"]["validation_loss_before"] == pytest.approx(made["metrics"]["validation_loss_after"], abs=2e-3)
    assert not on["encoders"]["image"]["is_new"]
    own = tune_projector(
        folder / "seeing", str(folder / "data.jsonl"), folder / "own", params=short, cache=TrunkCache(folder / "cache"),
        show_progress=False,
    )  # fmt: skip
    assert own["metrics"]["validation_loss_before"] == on["metrics"]["validation_loss_before"]
    with pytest.raises(ConfigError, match="pool is of a new projector"):
        train_on_pictures(folder, "no", encoders={"image": folder / "seeing"})


def other_answers(folder):
    """The same pictures, with another colour's name each; the path of the records."""
    names = [*COLOURS]
    records = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for one in records:
        one["completion"] = names[names.index(one["completion"]) - 1]
    path = folder / "other.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return str(path)


@pytest.mark.parametrize("method", ["tail", "lora"])
def test_members_are_trained_on_pictures(seeing, method):
    """On other answers, which only who sees the picture knows, over a trunk cache; without one, the same losses."""
    folder, _ = seeing
    params = TuneParams(
        method=method,
        layers=3,
        examples=48,
        validation_examples=8,
        epochs=12,
        learning_rate=1e-2,
        evaluations=1,
        max_length=100,
        batch_tokens=512,
    )
    cache = TrunkCache(folder / "cache")
    data, out = other_answers(folder), folder / f"member-{method}"
    made = tune(folder / "seeing", data, out, params=params, cache=cache, show_progress=False)
    bare = tune(folder / "seeing", data, folder / "bare", params=params, use_cache=False, show_progress=False)
    letters = sum(len(name) + 1 for name in COLOURS) / len(COLOURS)
    assert made["metrics"]["validation_loss_after"] < 0.5 * math.log(len(COLOURS)) / letters
    assert made["metrics"]["validation_loss_before"] > math.log(len(COLOURS)) / letters
    assert made["metrics"] == bare["metrics"]
    shutil.rmtree(folder / "bare")
    members, counts = {"base": None, "tuned": out}, {"validation": 8}
    cached, direct = (
        answers_of(Workbench(folder / "seeing", data, store), members, 100, counts, Progress(False))["validation"]
        for store in (cache, None)
    )
    assert torch.allclose(cached.states, direct.states, atol=0.15)  # the cache is in bfloat16
    assert not torch.allclose(cached.states[0], cached.states[1], atol=0.15)
    kind = {"loras": {"t": out}} if (out / CONFIG).is_file() else {"tails": {"t": out}}
    bundle = export_bundle(folder / "seeing", folder / f"bundle-{method}", bits=32, graphs=False, **kind)
    assert (bundle / "encoder-image.onnx").is_file()


def test_search_fuse_and_distil_take_pictures(seeing):
    """Each gains what only who sees the picture can gain."""
    folder, _ = seeing
    bench = Workbench(folder / "seeing", other_answers(folder), TrunkCache(folder / "cache"))
    base = TuneParams(
        method="lora", examples=48, validation_examples=8, epochs=12, bag=0.9, evaluations=1, max_length=100
    )
    space = SearchSpace(
        layers=(3,), rank=(8,), batch_tokens=(512,), learning_rate=(1e-2, 1.1e-2), augmentation=("none",)
    )
    found = search(bench, folder / "search", SearchParams(base=base, space=space, trials=2, startup=2))
    members = {f"t{trial.number}": trial_dir(folder / "search", trial.number) for trial in found.trials}
    fused = fuse(bench, members, folder / "fused", FuseParams(validation_examples=8, test_examples=8, max_length=100))
    report = fused["report"]
    assert report["fitted"]["test"] < 0.5 * report["members"]["base"]["test"]
    student = replace(base, bag=1.0, learning_rate=1e-2, layers=3, batch_tokens=512)
    params = DistilParams(base=student, test_examples=8)
    losses = distil(bench, folder / "fused", folder / "student", params)["distilled"]["test"]
    assert losses["student"] < 0.5 * losses["base"]


def test_the_trunk_cache_knows_pictures_apart(seeing):
    """Two examples whose token ids are equal: what is cached of one is not the other's."""
    folder, _ = seeing
    bench = Workbench(folder / "seeing", str(folder / "data.jsonl"), TrunkCache(folder / "cache"))
    params = TuneParams(layers=2, max_length=100)
    items = bench.load(params, {"train": 200}).parts["train"]
    by_tokens = {}
    for item in items:
        by_tokens.setdefault(item.encoded.token_ids, []).append(item)
    first, second = max(by_tokens.values(), key=len)[:2]
    assert first.encoded.embedded[0].digest != second.encoded.embedded[0].digest
    start = first.encoded.embedded[0].start
    assert torch.equal(first.hidden[:start], second.hidden[:start])
    assert not torch.equal(first.hidden[start], second.hidden[start])
