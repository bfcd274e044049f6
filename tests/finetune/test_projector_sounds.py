"""Ears for a model that sees, and for one whose chat template knows images alone."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.colours import (
    COLOURS,
    QUESTION,
    write_base,
    write_pictures,
    write_records,
    write_siglip,
    write_tones,
    write_whisper,
)
from helpers.media import write_image_model
from motet.export.bundle_writer import export_bundle
from motet.finetune.params import TuneParams
from motet.finetune.projector_params import ProjectorParams
from motet.finetune.training.train import Workbench
from motet.finetune.training.trunk_cache import TrunkCache
from motet.finetune.training.tune_projector import tune_projector
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.checkpoints.encoders import encoder_pages, read_encoders
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import ConfigError
from motet.runtime.model.bundle import Bundle
from motet.runtime.text.prompt import read_prompt
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
PARAMS = TuneParams(
    method="projector",
    examples=200,
    validation_examples=32,
    epochs=12,
    learning_rate=3e-3,
    batch_tokens=512,
    evaluations=2,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with towers and records, a model that sees, and one that sees and hears."""
    folder = tmp_path_factory.mktemp("tones")
    write_base(folder / "base")
    write_siglip(folder / "eyes")
    write_whisper(folder / "ears")
    write_records(folder / "pictures.jsonl", write_pictures(folder / "pictures"), "pictures/")
    write_records(folder / "tones.jsonl", write_tones(folder / "tones"), "tones/", "audio")
    run(folder, "base", "seeing", "pictures", {"image": folder / "eyes"}, ProjectorParams(pool=3))
    return folder, run(
        folder, "seeing", "both", "tones", {"audio": folder / "ears"}, ProjectorParams(projector="linear")
    )


def run(folder, base, out, data, encoders, projector, **changes):
    params = TuneParams.from_dict({**PARAMS.to_dict(), **changes})
    return tune_projector(
        folder / base,
        str(folder / f"{data}.jsonl"),
        folder / out,
        encoders=encoders,
        params=params,
        projector=projector,
        cache=TrunkCache(folder / "cache"),
        show_progress=False,
    )


def test_tones_are_named(place):
    folder, made = place
    blind = math.log(len(COLOURS)) / (sum(len(name) + 1 for name in COLOURS) / len(COLOURS))
    assert made["metrics"]["validation_loss_after"] < 0.2 * blind < made["metrics"]["validation_loss_before"]
    encoders = read_encoders(folder / "both")
    assert encoders["image"].token != encoders["audio"].token
    assert encoders["audio"].pad == "row" and encoders["audio"].width == 4 * 32
    seeing, both = (load_file(folder / name / "encoder-image.safetensors") for name in ("seeing", "both"))
    assert all(torch.equal(seeing[name], both[name]) for name in seeing)


@pytest.mark.native
def test_the_bundle_hears_and_sees(place, tmp_path):
    """Each medium alone is named; both in one prompt have their rows where they stand."""
    folder, _ = place
    export_bundle(folder / "both", tmp_path / "bundle", bits=32, graphs=False)
    assert set(Bundle.load(tmp_path / "bundle").encoders) == {"image", "audio"}
    pages = encoder_pages(folder / "both")
    with Engine.from_bundle(tmp_path / "bundle", EngineConfig(threads=1, kv_dtype="bf16", backend="cpu")) as engine:
        params = SamplingParams(max_tokens=6, temperature=0.0)

        def prompt(*parts):
            content = [*parts, {"type": "text", "text": QUESTION}]
            return read_prompt(engine.tokenizer, [{"role": "user", "content": content}], 512, engine.media)

        for name in COLOURS:
            image = {"type": "image", "image": (folder / "pictures" / f"{name}-3.png").read_bytes()}
            sound = {"type": "audio", "audio": (folder / "tones" / f"{name}-3.wav").read_bytes()}
            for part in (image, sound):
                built = prompt(part)
                spans = (built.spans(b""),)
                ensemble = engine.model.default_ensemble
                [[answer]] = engine.complete([Request(name, (built.token_ids,), ensemble, params, embedded=spans)])
                assert engine.tokenizer.decode(answer.token_ids) == name
            built = prompt(sound, image)
            starts = [built.token_ids.index(pages[medium].encoder.token_id) for medium in ("audio", "image")]
            assert [span.start for span in built.spans(b"")] == starts == sorted(starts)


def test_examples_with_both_media_have_the_rows_of_a_server(place, tmp_path):
    """The same token ids and rows, in training and in a prompt that is served."""
    folder, _ = place
    records = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "spells <image>"},
                        {"type": "audio", "audio": f"tones/{name}-{index}.wav"},
                        {"type": "image", "image": f"pictures/{name}-{index}.png"},
                    ],
                },
                {"role": "assistant", "content": name},
            ]
        }
        for index in range(2)
        for name in COLOURS
    ]
    (folder / "two.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    bench = Workbench(folder / "both", str(folder / "two.jsonl"), TrunkCache(folder / "cache"))
    items = bench.load(TuneParams(layers=2), {"train": 9}).parts["train"]
    export_bundle(folder / "both", tmp_path / "bundle", bits=32, graphs=False)
    with Engine.from_bundle(tmp_path / "bundle", EngineConfig(threads=1, kv_dtype="bf16", backend="cpu")) as engine:
        for item, example in zip(items, bench.dataset.splits["train"], strict=True):
            parts = [
                part
                if part["type"] == "text"
                else {"type": part["type"], part["type"]: part[part["type"]].path.read_bytes()}
                for part in example.messages[0]["content"]
            ]
            built = read_prompt(engine.tokenizer, [{"role": "user", "content": parts}], 512, engine.media)
            assert item.encoded.token_ids[: item.encoded.answer] == built.token_ids
            spans = built.spans(b"")
            assert [span.start for span in spans] == [part.start for part in item.encoded.embedded]
            for span, part in zip(spans, item.encoded.embedded, strict=True):
                rows = torch.tensor(span.rows)
                assert (part.rows() - rows).abs().max() < 0.03 * rows.abs().max()  # features are kept in bfloat16


def test_a_template_with_a_place_for_images_alone(place, tmp_path):
    """A model with an encoder of images in its own weights gets ears: its images stand where its template puts them."""
    folder, _ = place
    write_image_model(tmp_path / "base")
    import tokenizers

    path = tmp_path / "base" / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<audio>"])
    tokenizer.save(str(path))
    lines = [json.loads(line) for line in (folder / "tones.jsonl").read_text().splitlines()]
    for one in lines:
        one |= {
            "audio": str(folder / one["audio"]),
            "image": str(folder / "pictures" / "red-1.png"),
            "source": one["id"],
        }
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    short = {"epochs": 1, "evaluations": 1, "max_length": 1000, "examples": 8, "validation_examples": 2}
    made = run(tmp_path, "base", "out", "data", {"audio": folder / "ears"}, ProjectorParams(), **short)
    assert set(made["encoders"]) == {"audio"}
    encoders = read_encoders(tmp_path / "out")
    assert set(encoders) == {"image", "audio"}
    assert encoder_pages(tmp_path / "out").keys() == encoders.keys()
    bench = Workbench(tmp_path / "out", str(tmp_path / "data.jsonl"), None)
    [item] = bench.encode(TuneParams(max_length=1000), {"train": 1})[0]["train"]
    assert [part.medium for part in item.embedded] == ["image"] * (len(item.embedded) - 1) + ["audio"]
    with pytest.raises(ConfigError, match="in its own weights"):
        run(tmp_path, "base", "no", "data", {"image": folder / "eyes"}, ProjectorParams())
