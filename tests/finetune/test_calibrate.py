"""`motet calibrate`: the fit, the error that it is measured by, and confidences from the bundle to the client and the job."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers.callers import CALLER
from helpers.models import make_adapter
from motet.cli import main
from motet.export.bundle_writer import export_bundle
from motet.finetune.search.calibrate import Tokens, calibrate, calibration_error, fit
from motet.runtime.api.confidence import Calibration, disagreement
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Ensemble, GenerateRequest, Member, Request, Space
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.client.client import Client
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import BundleError, ConfigError, DataError, InvalidRequestError
from motet.runtime.jobs.summarise import summarise
from motet.runtime.model.bundle import Bundle
from motet.runtime.serve.local import serve_engine
from motet.runtime.serve.service import Service
from motet.runtime.text.summary import SummariseParams

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def tokens_of(logprobs, apart, right):
    empty = np.zeros((1, 1, len(right)))
    return Tokens(np.asarray(logprobs), np.asarray(apart), np.asarray(right, float), empty, empty, empty[0])


def test_the_fit_finds_how_sure_the_tokens_are():
    """Tokens that are right with a probability that falls with the disagreement: the fit finds it again."""
    rng = np.random.default_rng(0)
    logprobs, apart = np.log(rng.uniform(0.05, 0.95, 20_000)), rng.exponential(0.5, 20_000)
    truth = Calibration(-0.3, 0.6, -1.0)
    chance = np.array([truth.confidence(p, d) for p, d in zip(logprobs, apart)])
    found = fit(tokens_of(logprobs, apart, rng.random(20_000) < chance))
    for name in ("intercept", "probability", "disagreement"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), abs=0.08)
    right = (rng.random(20_000) < chance).astype(float)
    sure = np.array([found.confidence(p, d) for p, d in zip(logprobs, apart)])
    assert calibration_error(sure, right) < 0.02 < calibration_error(np.exp(logprobs), right)
    with pytest.raises(DataError, match="all tokens are right, or all wrong"):
        fit(tokens_of(logprobs[:5], apart[:5], np.ones(5)))


def test_calibration_error_of_bins():
    """Two bins of two: |0.15 − 0.5| and |0.85 − 1|."""
    assert calibration_error(np.array([0.9, 0.1, 0.8, 0.2]), np.array([1.0, 0, 1, 1]), bins=2) == pytest.approx(0.25)
    assert calibration_error(np.array([0.5]), np.array([1.0])) == pytest.approx(0.5)


@pytest.fixture(scope="module", params=list(Space))
def bundle(request, tiny_model_dir, tmp_path_factory):
    """(a calibrated bundle of the base and an adapter, the data)."""
    root, model = tmp_path_factory.mktemp("calibrate"), tiny_model_dir("llama")
    records = ({"prompt": f"say {i}", "completion": f"the answer is {i % 3}"} for i in range(60))
    data = root / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    lora = make_adapter(model, root / "x", 1, layers=2)
    export_bundle(model, root / "b", tails={"base": None}, loras={"x": lora}, space=request.param, graphs=False)
    before = Bundle.load(root / "b")
    assert before.calibration is None
    with pytest.raises(DataError):  # a random model is never right
        calibrate(root / "b", str(data), examples=4, test_examples=4, max_length=100)
    manifest = json.loads((root / "b" / "motet.json").read_text())
    coefficients = {"intercept": -0.2, "probability": 0.5, "disagreement": -2.0}
    (root / "b" / "motet.json").write_text(json.dumps({**manifest, "calibration": coefficients}))
    assert Bundle.load(root / "b").digest != before.digest  # confidences depend on it
    return root / "b", data


def test_confidence_is_made_of_what_the_members_say(bundle):
    path, _ = bundle
    with Engine.from_bundle(path, EngineConfig(max_num_seqs=2, threads=2)) as engine:
        mix = engine.model.default_ensemble
        asked = [
            Request(
                "a", ((5, 6, 7),), mix, replace(GREEDY, logprobs=2), return_member_logprobs=True, return_confidence=True
            ),
            Request("b", ((5, 6, 7),), mix, GREEDY, abstain_below=1.0),
            Request("c", ((5, 6, 7),), mix, GREEDY),
        ]
        whole, bare, plain = (choices[0] for choices in engine.complete(asked))
        with pytest.raises(InvalidRequestError, match="calibrated for its own members and mix"):
            engine.complete([Request("d", ((5,),), Ensemble((Member("x", 1.0),)), GREEDY, return_confidence=True)])
        calibration = engine.model.calibration
    shares = [member.mix for member in mix.members]
    assert whole.disagreement == [disagreement(members, shares) for members in whole.member_logprobs]
    assert min(whole.disagreement) >= 0 and max(whole.disagreement) > 0
    expected = [calibration.confidence(p, d) for p, d in zip(whole.logprobs, whole.disagreement)]
    assert whole.confidence == expected
    assert whole.answer_confidence == pytest.approx(np.mean(expected)) and not whole.abstained
    assert (bare.confidence, bare.logprobs, bare.member_logprobs) == (whole.confidence, [], [])
    assert bare.abstained and bare.token_ids == whole.token_ids == plain.token_ids
    assert (plain.confidence, plain.disagreement, plain.answer_confidence, plain.abstained) == ([], [], None, False)


def test_confidence_through_the_door(bundle):
    path, _ = bundle
    with Engine.from_bundle(path, EngineConfig(max_num_seqs=2, threads=2)) as engine:
        request = Request("a", ((5, 6, 7),), engine.model.default_ensemble, GREEDY, abstain_below=1.0)
        expected = engine.complete([request])[0][0]
        with serve_engine(engine) as address, Client(address) as client:
            found = client.complete((5, 6, 7), sampling=GREEDY, abstain_below=1.0)[0]
            deltas = list(client.generate((5, 6, 7), sampling=GREEDY, return_confidence=True))
    assert found.confidence == pytest.approx(expected.confidence)
    assert found.disagreement == pytest.approx(expected.disagreement)
    assert found.answer_confidence == pytest.approx(expected.answer_confidence)
    assert found.abstained and not deltas[-1].abstained
    streamed = [value for delta in deltas for value in delta.confidence]
    assert streamed == pytest.approx(expected.confidence)
    assert [delta.answer_confidence is None for delta in deltas] == [*[True] * (len(deltas) - 1), False]


def test_a_bundle_that_is_not_calibrated_has_no_confidence(tiny_model_dir, tmp_path):
    path = export_bundle(tiny_model_dir("llama"), tmp_path / "b", graphs=False)
    texts = tmp_path / "in"
    texts.mkdir()
    (texts / "a.txt").write_text("some text")
    with Engine.from_bundle(path, EngineConfig(max_num_seqs=1, threads=2)) as engine:
        request = Request("a", ((5,),), engine.model.default_ensemble, GREEDY, return_confidence=True)
        with pytest.raises(InvalidRequestError, match=r"not calibrated.*motet calibrate"):
            engine.complete([request])
        with pytest.raises(ConfigError, match=r"not calibrated \(motet calibrate\); leave abstain_below out"):
            summarise(engine, texts, tmp_path / "out.jsonl", params=SummariseParams(abstain_below=0.5))

        async def ask():
            async for _ in Service(engine).generate(GenerateRequest("x", sampling=GREEDY, abstain_below=0.5), CALLER):
                raise AssertionError("an answer without confidence")

        with pytest.raises(InvalidRequestError, match="not calibrated"):
            asyncio.run(ask())


def test_a_job_has_the_confidence_of_each_summary(bundle, tmp_path):
    path, _ = bundle
    texts = tmp_path / "in"
    texts.mkdir()
    for index in range(3):
        (texts / f"{index}.txt").write_text(f"some text, number {index}")
    with Engine.from_bundle(path, EngineConfig(max_num_seqs=2, threads=2)) as engine:
        params = SummariseParams(max_summary_tokens=8, abstain_below=1.0)
        for change in (
            {"params": replace(params, drafts=2)},
            {"ensemble": Ensemble((Member("x", 1.0),)), "params": params},
        ):
            with pytest.raises(ConfigError, match="the bundle's own mix without drafts"):
                summarise(engine, texts, tmp_path / "out.jsonl", **change)
        summarise(engine, texts, tmp_path / "out.jsonl", params=params)
        summarise(engine, texts, tmp_path / "plain.jsonl", params=SummariseParams(max_summary_tokens=8))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all(0 < line["confidence"] < 1 and line["abstained"] for line in lines)
    plain = [json.loads(line) for line in (tmp_path / "plain.jsonl").read_text().splitlines()]
    confidence = {line["id"]: line["confidence"] for line in lines}
    assert {line["id"]: line["confidence"] for line in plain} == confidence
    assert all("abstained" not in line for line in plain)
    with pytest.raises(ConfigError, match="abstain_below must be in 0…1, got 2"):
        SummariseParams(abstain_below=2)


def test_what_a_member_was_trained_on_is_not_calibrated_on(bundle, tmp_path):
    path, data = bundle
    copy = tmp_path / "b"
    shutil.copytree(path, copy)
    manifest = json.loads((copy / "motet.json").read_text())
    manifest["members"][1]["provenance"]["data"] = {"name": "data.jsonl", "digest": "of another split"}
    (copy / "motet.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"the member 'x' was trained on another version or split of 'data\.jsonl'"):
        calibrate(copy, str(data), examples=4, test_examples=4, max_length=100)


@pytest.mark.slow
def test_the_command_writes_what_it_fitted(tiny_model_dir, tmp_path, monkeypatch, capsys):
    """A bundle whose tokens are sometimes right: the references are what the model itself says, half of the time."""
    model = tiny_model_dir("llama")
    export_bundle(model, tmp_path / "b", tails={"base": None}, graphs=False)
    with Engine.from_bundle(tmp_path / "b", EngineConfig(max_num_seqs=1, threads=2)) as engine:
        records = []
        for index in range(40):
            prompt = f"say {index}"
            request = GenerateRequest([{"role": "user", "content": prompt}], sampling=replace(GREEDY, max_tokens=8))
            text = engine.complete([Service(engine)._reader.read(request, CALLER.identity).request])[0][0].text
            records.append({"prompt": prompt, "completion": text.strip() or "x" if index % 2 else f"other {index}"})
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    words = f"calibrate {tmp_path / 'b'} --data {data} --examples 4 --test-examples 4 --max-length 100"
    monkeypatch.setattr(sys, "argv", ["motet", *words.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    assert ended.value.code == 0, shown.err
    bundle = Bundle.load(tmp_path / "b")
    report = bundle.manifest["calibration"]["report"]
    assert bundle.calibration is not None and math.isfinite(bundle.calibration.intercept)
    assert set(report["ece"]) == {"ensemble", "ensemble_calibrated", "best_single", "best_single_tempered"}
    assert all(
        f"{name:22} expected calibration error {error:.4f}" in shown.out for name, error in report["ece"].items()
    )
