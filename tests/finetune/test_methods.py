"""Every method through one loop: it learns, resumes exactly after kill -9, stops early, refuses what cannot be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from motet.export.bundle_writer import export_bundle
from motet.finetune.params import TuneParams
from motet.finetune.search.repro import repro
from motet.finetune.training.privacy import PrivacyBudget, budget, epsilon_of
from motet.finetune.training.train import Workbench, tune
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import read_config, read_weights
from motet.runtime.checkpoints.members.adapter import attach, read_adapter
from motet.runtime.checkpoints.members.tail import read_tail
from motet.runtime.errors import ConfigError, DataError, InvalidEnsembleError, NumericalError
from motet.runtime.model.bundle import Bundle

pytestmark = pytest.mark.slow  # each trains
SMALL = {"examples": 32, "validation_examples": 8, "max_length": 100, "learning_rate": 3e-3, "batch_tokens": 256}

KILLED = """
import json, sys, time
from pathlib import Path
from motet.finetune.training import train
from motet.finetune.training.loop import Watch
from motet.finetune.params import TuneParams
from motet.finetune.training.trunk_cache import TrunkCache
model, data, out, cache, params, pause = sys.argv[1:]
bench = train.Workbench(Path(model), data, TrunkCache(Path(cache)))
def validated(step, loss):
    print(step, flush=True)
def stepped(step, loss):
    time.sleep(float(pause))
train.run(bench, Path(out), TuneParams(**json.loads(params)), name="x", watch=Watch(stepped, validated))
"""


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("MOTET_HOME", str(tmp_path / "home"))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"say {i}", "completion": f"the answer is {i % 3}"}) + "\n" for i in range(60))
    )
    return str(path)


def written_loss(model_dir, member, items, base) -> float:
    """Mean negative log-likelihood of the answers' tokens, nats, from the checkpoint alone: whole texts, one at a time."""
    config = read_config(model_dir)
    if (member / "adapter.json").is_file():
        decoder = attach(Decoder.from_weights(config, base), read_adapter(member, config)[1])
    else:
        weights = {**base, **read_tail(member)[1]}
        decoder = Decoder.from_weights(replace(config, tied_head="lm_head.weight" not in weights), weights)
    losses = []
    for encoded in items:
        tokens = torch.tensor(encoded.token_ids)
        with torch.no_grad():
            logprobs = decoder(tokens[None, :-1])[0].log_softmax(-1)
        losses.append(-logprobs.gather(1, tokens[1:, None])[encoded.answer - 1 :, 0])
    return float(torch.cat(losses).mean())


def base_weights(model_dir, method):
    """The weights beside which an adapter was trained: for qlora the layers' are rounded to NF4."""
    weights = read_weights(model_dir)
    if method == "qlora":
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        for name in (n for n in weights if n.endswith("_proj.weight")):
            weights[name] = dequantize_4bit(*quantize_4bit(weights[name], quant_type="nf4"))
    return weights


@pytest.mark.parametrize(
    ("settings", "learned"),  # the loss after / before at most: about twice what each method reaches
    [
        ({"method": "lora", "layers": 2, "targets": ("q_proj", "v_proj", "down_proj"), "learning_rate": 2e-2}, 0.3),
        ({"method": "qlora", "learning_rate": 2e-2}, 0.4),
        ({"method": "full"}, 0.1),
        ({"method": "tail", "head": True, "accumulate": 2, "precision": "bf16"}, 0.3),
        ({"l1": 1e-6, "label_smoothing": 0.1, "dropout": 0.1, "schedule": "linear", "augmentation": "span-mask"}, 0.4),
    ],
    ids=["lora", "qlora", "full", "tail", "regularised"],
)
def test_methods_learn(tiny_model_dir, data, tmp_path, settings, learned):
    params, model_dir = TuneParams(**{**SMALL, "epochs": 3, **settings}), tiny_model_dir("llama")
    manifest = tune(model_dir, data, tmp_path / "m", params=params, show_progress=False)
    metrics = manifest["metrics"]
    assert metrics["validation_loss_after"] < learned * metrics["validation_loss_before"]
    counts = {"train": params.examples, "validation": params.validation_examples}
    parts = Workbench(model_dir, data, None).load(replace(params, augmentation="none"), counts).parts
    train, validation = ([item.encoded for item in parts[part]] for part in ("train", "validation"))
    base = base_weights(model_dir, params.method)
    after = written_loss(model_dir, tmp_path / "m", validation, base)
    # hidden states below the trained layers are bfloat16, and so is qlora's arithmetic
    rounding = (1e-4 if params.method == "full" else 0.02) * after
    assert metrics["validation_loss_after"] == pytest.approx(after, abs=rounding)
    if params.augmentation == "none":
        gap = after - written_loss(model_dir, tmp_path / "m", train[: len(validation)], base)
        assert metrics["gap"] == pytest.approx(gap, abs=2 * rounding)
    card = (tmp_path / "m" / "README.md").read_text()
    assert "motet repro" in card and f"| learning_rate | {params.learning_rate} |" in card
    if params.method in ("lora", "qlora"):
        stored, weights = read_adapter(tmp_path / "m", read_config(model_dir))
        assert stored["peft"]["r"] == params.rank
        adapted = {name.split(".")[-2] for name in weights}
        assert adapted == set(params.targets)
        assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if name.endswith("lora_b"))
        bundle = export_bundle(model_dir, tmp_path / "b", loras={"m": tmp_path / "m"}, merge=True)
        assert Bundle.load(bundle).kinds == ("tail",)
    else:
        first = {"full": 0}.get(params.method, 2)
        layers = {int(name.split(".")[2]) for name in read_tail(tmp_path / "m")[1] if ".layers." in name}
        assert layers == set(range(first, 4))


def test_a_head_of_its_own_is_exported_alone(tiny_model_dir, data, tmp_path):
    model_dir = tiny_model_dir("llama")
    params = TuneParams(**SMALL, head=True)
    tune(model_dir, data, tmp_path / "t", params=params, show_progress=False)
    assert "lm_head.weight" in read_tail(tmp_path / "t")[1]
    bundle = Bundle.load(export_bundle(model_dir, tmp_path / "b", tails={"t": tmp_path / "t"}))
    assert not bundle.config.tied_head
    with pytest.raises(InvalidEnsembleError, match="head of its own"):
        export_bundle(model_dir, tmp_path / "c", tails={"t": tmp_path / "t", "base": None})


@pytest.mark.alone
def test_killed_and_resumed(tiny_model_dir, data, tmp_path):
    """kill -9 after the first of four validations: the rerun trains on and ends with the same figures and weights."""
    settings = {**SMALL, "dropout": 0.1, "epochs": 4, "evaluations": 4}
    common = [str(tiny_model_dir("llama")), data]

    def command(name, pause):
        out, cache = str(tmp_path / name), str(tmp_path / "cache")
        return [sys.executable, "-c", KILLED, *common, out, cache, json.dumps(settings), pause]

    subprocess.run(command("whole", "0"), check=True, capture_output=True)
    victim = subprocess.Popen(command("killed", "0.3"), stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    victim.stdout.readline()
    last = tmp_path / ".killed.run" / "last.ckpt"
    while not last.is_file():
        time.sleep(0.05)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    again = subprocess.run(command("killed", "0"), check=True, capture_output=True, text=True)
    assert len(again.stdout.split()) == 3  # the first validation was not run again
    (whole, expected), (resumed, found) = read_tail(tmp_path / "whole"), read_tail(tmp_path / "killed")
    assert resumed["metrics"] == whole["metrics"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (tmp_path / ".killed.run").exists()


def test_early_stopping_restores_the_best(tiny_model_dir, data, tmp_path):
    params = TuneParams(**{**SMALL, "examples": 8, "learning_rate": 3e-2}, epochs=40, evaluations=20, patience=2)
    metrics = tune(tiny_model_dir("llama"), data, tmp_path / "t", params=params, show_progress=False)["metrics"]
    assert metrics["stopped_early"]
    assert len(metrics["validation_curve"]) < 20
    assert metrics["validation_loss_after"] == pytest.approx(min(v for _, v in metrics["validation_curve"]), abs=1e-5)


def test_a_nan_loss_stops_and_says_where(tiny_model_dir, data, tmp_path):
    params = TuneParams(**{**SMALL, "learning_rate": 1e30}, epochs=4, clip=0.0)
    with pytest.raises(NumericalError, match=r"at batch \d+ of \d+.*lower learning_rate"):
        tune(tiny_model_dir("llama"), data, tmp_path / "t", params=params, show_progress=False)
    assert not (tmp_path / "t").exists()


def test_repro(tiny_model_dir, data, tmp_path):
    tune(tiny_model_dir("llama"), data, tmp_path / "t", params=TuneParams(**SMALL), show_progress=False)
    found = repro(tmp_path / "t", tiny_model_dir("llama"))
    assert found.is_same and found.same_weights
    assert found.changed == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "method must be one of"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"bag": 1.5}, "bag"),
        ({"method": "full", "epsilon": 8.0}, "DP-SGD trains tails and adapters"),
        ({"delta": 0.1}, "without epsilon"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        TuneParams(**settings)


def test_one_example_is_too_few(tiny_model_dir, data, tmp_path):
    with pytest.raises(DataError, match="at least 2"):
        tune(
            tiny_model_dir("llama"),
            data,
            tmp_path / "t",
            params=TuneParams(**{**SMALL, "examples": 1}),
            show_progress=False,
        )


# ---- privacy ---------------------------------------------------------------------------------------------------------


def test_epsilon_by_hand():
    """No subsampling: the RDP of T Gaussian mechanisms is T α / (2 σ²), and ε = min over α of
    RDP + log((α − 1) / α) − (log δ + log α) / (α − 1) (Balle et al. 2020), done here without the library."""
    sigma, steps, delta = 4.0, 10, 1e-5
    orders = torch.tensor([*(1 + x / 10 for x in range(1, 100)), *range(12, 64)], dtype=torch.float64)
    rdp = steps * orders / (2 * sigma**2)
    log_delta = torch.log(torch.tensor(delta, dtype=torch.float64))
    by_hand = rdp + torch.log((orders - 1) / orders) - (log_delta + torch.log(orders)) / (orders - 1)
    assert epsilon_of([(sigma, 1.0, steps)], delta) == pytest.approx(float(by_hand.min()), rel=1e-6)
    assert epsilon_of([(sigma, 1.0, 5)] * 2, delta) == pytest.approx(epsilon_of([(sigma, 1.0, 10)], delta))


def test_the_budget():
    spent = budget(TuneParams(epsilon=8.0, epochs=3, batch_examples=10), 200)
    assert isinstance(spent, PrivacyBudget)
    assert 7.9 < spent.epsilon <= 8.0
    assert spent.epsilon == epsilon_of([(spent.noise_multiplier, spent.sample_rate, spent.steps)], spent.delta)
    assert (spent.steps, spent.sample_rate) == (60, 0.05)
    with pytest.raises(ConfigError, match="1 / N"):
        budget(TuneParams(epsilon=8.0, delta=0.01), 200)


@pytest.mark.parametrize("method", ["tail", "lora"])
def test_private_runs(tiny_model_dir, data, tmp_path, method):
    params = TuneParams(
        **{**SMALL, "learning_rate": 1e-2}, method=method, layers=2, epsilon=8.0, batch_examples=8, epochs=3
    )
    manifest = tune(tiny_model_dir("llama"), data, tmp_path / "p", params=params, show_progress=False)
    assert manifest["privacy"]["epsilon"] <= 8.0
    assert manifest["metrics"]["steps"] == 12
    assert not {"train_loss_after", "gap", "loss_curve"} & set(manifest["metrics"])  # no noise covers them
    assert "not the validation set" in manifest["privacy"]["covers"]
    examples = manifest["data"]["parts"]["validation"]["examples"]
    assert manifest["chosen_by"]["examples"] == examples
    assert manifest["metrics"]["validation_loss_after"] < manifest["metrics"]["validation_loss_before"]
    options = {"tails": {"p": tmp_path / "p"}} if method == "tail" else {"loras": {"p": tmp_path / "p"}}
    bundle = Bundle.load(export_bundle(tiny_model_dir("llama"), tmp_path / "b", **options))
    assert bundle.manifest["members"][0]["provenance"]["privacy"]["delta"] < 1 / 32
    with pytest.raises(ConfigError, match="noise is destroyed"):
        repro(tmp_path / "p", tiny_model_dir("llama"))
