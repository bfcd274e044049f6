"""A fused ensemble into one student: its loss, its report, what it is refused for, and that a run resumes."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from motet.cli import main
from motet.finetune.data.batches import make_batch
from motet.finetune.params import TuneParams
from motet.finetune.search.answers import head_of
from motet.finetune.search.distil import Student, _taught, distil, log_distribution
from motet.finetune.search.fuse import fuse
from motet.finetune.search.params import DistilParams, FuseParams
from motet.finetune.training.loop import TuneModule
from motet.finetune.training.train import Workbench, tune
from motet.finetune.training.trunk_cache import TrunkCache
from motet.runtime.api.request import Space
from motet.runtime.checkpoints.members.registry import format_at
from motet.runtime.errors import BundleError, ConfigError

pytestmark = pytest.mark.slow  # it trains

COMMON = {"examples": 24, "validation_examples": 3, "max_length": 100, "epochs": 2}


@pytest.fixture(scope="module")
def fusion(tiny_model_dir, tmp_path_factory):
    """(model, data, directory of a fusion of two tails and an adapter of two layers)."""
    root, model = tmp_path_factory.mktemp("distil"), tiny_model_dir("llama")
    records = ({"prompt": f"say {i}", "completion": f"the answer is {i % 3}"} for i in range(80))
    data = root / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    members = {}
    for seed, (name, method) in enumerate((("t", "tail"), ("u", "tail"), ("x", "lora"))):
        params = TuneParams(method=method, layers=2, learning_rate=1e-2, bag=0.6, seed=seed, **COMMON)
        members[name] = root / name
        tune(model, str(data), root / name, params=params, use_cache=False, show_progress=False)
    bench = Workbench(model, str(data), None)
    params = FuseParams(validation_examples=4, test_examples=6, max_length=100, with_base=False, folds=2, max_members=2)
    fuse(bench, members, root / "fused", params)
    return model, data, root / "fused"


def student_params(**changes):
    base = TuneParams(method="tail", layers=1, learning_rate=1e-2, batch_tokens=128, **COMMON)
    return DistilParams(base=base, test_examples=6, **changes)


@pytest.mark.parametrize("method", ["tail", "lora"])
def test_a_student_is_a_member_that_learns_from_the_ensemble(fusion, tmp_path, method):
    model, data, fused = fusion
    bench = Workbench(model, str(data), TrunkCache(tmp_path / "cache"))
    base = TuneParams(method=method, layers=2, learning_rate=1e-2, **COMMON)
    manifest = distil(bench, fused, tmp_path / "s", DistilParams(base=base, share=1.0, test_examples=6))
    found = manifest["distilled"]
    losses = found["test"]
    assert losses["ensemble"] < losses["base"] and losses["student"] < losses["base"]
    gain = losses["best_single"] - losses["ensemble"]
    kept = (losses["best_single"] - losses["student"]) / gain if gain > 0 else None
    assert found["share_kept"] == (None if kept is None else pytest.approx(kept))
    assert found["fusion"]["mix"] == json.loads((fused / "fusion.json").read_text())["mix"]
    form = format_at(tmp_path / "s")
    assert form.read_manifest(tmp_path / "s")["distilled"] == found
    assert form.kind.methods[0] == method


@pytest.mark.parametrize("space", list(Space))
def test_the_loss_is_the_divergence_from_the_mix(fusion, space):
    """Against the mix computed with numpy, of a batch of two examples."""
    model, data, _ = fusion
    bench = Workbench(model, str(data), None)
    rng = np.random.default_rng(0)
    items = bench.load(TuneParams(**COMMON), {"train": 2}).parts["train"]
    count = sum(item.encoded.num_targets for item in items)
    states = torch.tensor(rng.standard_normal((2, count, bench.config.hidden_size)), dtype=torch.bfloat16)
    learner = Student(bench.config, bench.base, TuneParams(layers=1))
    learner.share, learner.space, learner.mix = 0.75, space, torch.tensor([0.3, 0.7])
    learner.teacher_head = head_of(bench)
    batch = make_batch(_taught(items, states))
    with torch.no_grad():
        wanted = batch.targets >= 0
        logits = learner.decoder.head(learner._states(batch)[wanted]).double().numpy()
        loss = float(learner.train().loss(batch))
        plain = float(learner.eval().loss(batch))

    def log_softmax(x):
        return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))

    rows = states.double().numpy() @ learner.teacher_head.double().numpy().T
    if space is Space.LOGITS:
        teacher = log_softmax(0.3 * rows[0] + 0.7 * rows[1])
    else:
        teacher = np.log(0.3 * np.exp(log_softmax(rows[0])) + 0.7 * np.exp(log_softmax(rows[1])))
    student = log_softmax(logits)
    divergence = (np.exp(teacher) * (teacher - student)).sum(-1).mean()
    data_loss = -student[np.arange(count), batch.targets[wanted].numpy()].mean()
    assert plain == pytest.approx(data_loss, rel=1e-5)
    assert loss == pytest.approx(0.25 * data_loss + 0.75 * divergence, rel=1e-4)
    direct = log_distribution(states, learner.mix, space, learner.teacher_head)
    assert np.abs(direct.numpy() - teacher).max() < 1e-4


def test_a_run_that_was_killed_ends_with_the_same_student(fusion, tmp_path, monkeypatch):
    model, data, fused = fusion
    bench = Workbench(model, str(data), TrunkCache(tmp_path / "cache"))
    whole = distil(bench, fused, tmp_path / "whole", student_params(), name="s")
    step, count = TuneModule.training_step, []

    def killed(module, batch, index):
        count.append(index)
        if len(count) == 4:
            raise RuntimeError("killed")
        return step(module, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(TuneModule, "training_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            distil(bench, fused, tmp_path / "killed", student_params(), name="s")
    assert (tmp_path / ".killed.run").is_dir()
    again = distil(bench, fused, tmp_path / "killed", student_params(), name="s")
    assert again["distilled"] == whole["distilled"]
    assert again["metrics"]["loss_curve"] == whole["metrics"]["loss_curve"]


def test_what_no_student_can_be(fusion, tiny_model_dir, tmp_path):
    _, data, fused = fusion
    for changes in ({"epsilon": 8.0}, {"augmentation": "span-mask"}, {"head": True}, {"loss": "all"}):
        with pytest.raises(ConfigError, match="a student"):
            DistilParams(base=TuneParams(**changes))
    with pytest.raises(ConfigError, match="share must be above 0 and at most 1, got 0"):
        DistilParams(share=0.0)
    with pytest.raises(BundleError, match="another base or data set"):
        distil(Workbench(tiny_model_dir("qwen2"), str(data), None), fused, tmp_path / "s", student_params())


def test_the_command_says_what_is_kept(fusion, tmp_path, monkeypatch, capsys):
    model, data, fused = fusion
    words = f"distil {model} --data {data} --fusion {fused} --out {tmp_path / 's'} --cache {tmp_path / 'c'} --layers 1 --epochs 1"
    sizes = "--examples 24 --validation-examples 3 --test-examples 6 --max-length 100"
    monkeypatch.setattr(sys, "argv", ["motet", *words.split(), *sizes.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    assert ended.value.code == 0, shown.err
    said = shown.out.splitlines()[-1]
    assert "it costs what one member costs" in said and ("gain kept" in said or "gained nothing" in said)
    assert [line.split()[0] for line in shown.out.splitlines()[:4]] == ["base", "best_single", "ensemble", "student"]
