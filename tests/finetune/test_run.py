"""A run is what it says: its gradient is the full batch's, its key its content, its progress lines, and no stray library."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from motet.finetune.data.batches import Item
from motet.finetune.data.encode import Encoded
from motet.finetune.params import NearDuplicates, TuneParams
from motet.finetune.search.params import SearchParams, SearchSpace
from motet.finetune.training import progress as progress_module
from motet.finetune.training.loop import LAST, TuneModule, Watch, fit, open_work
from motet.finetune.training.methods import Learner
from motet.finetune.training.progress import Progress
from motet.finetune.training.train import Workbench, run, work_dir
from motet.openmp import wait_passively
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import read_config, read_weights
from motet.runtime.errors import ConfigError

SMALL = TuneParams(examples=32, validation_examples=8, max_length=100, batch_tokens=256, epochs=2)
RECORDS = [{"prompt": f"say {i}", "completion": f"the answer is {i % 3}", "source": f"d{i}"} for i in range(60)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return str(path)


# ---- the gradient ----------------------------------------------------------------------------------------------------


class Steps(TuneModule):
    """Records the gradient of each optimiser step. With a learning rate of 0 the weights stay."""

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        gradient = torch.cat([p.grad.flatten() for p in self.learner.trained().values()])
        self.__dict__.setdefault("gradients", []).append(gradient.clone())


def oracle_gradient(model_dir, items, l1=0.0):
    """Of the mean negative log-likelihood of all answer tokens of `items`, each run alone through the whole model."""
    decoder = Decoder.from_weights(read_config(model_dir), read_weights(model_dir))
    for parameter in decoder.parameters():
        parameter.requires_grad_(True)
    losses = []
    for item in items:
        tokens = torch.tensor(item.encoded.token_ids)
        logprobs = decoder(tokens[None, :-1])[0].log_softmax(-1)
        losses += [-logprobs[i - 1, tokens[i]] for i in item.encoded.targets]
    torch.stack(losses).mean().backward()
    names = [n for n, _ in decoder.named_parameters() if n.startswith(("model.layers.", "model.norm."))]
    return torch.cat([decoder.get_parameter(name).grad.flatten() for name in names])


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2, 3, 8])
def test_a_window_has_the_gradient_of_its_tokens(tiny_model_dir, tmp_path, accumulate):
    """Answers of 2 to 40 tokens, an earlier turn too, five batches: also the last window, with fewer batches, is the mean
    over its tokens, as if it were one batch."""
    model_dir = tiny_model_dir("llama")
    params = replace(
        SMALL, method="full", accumulate=accumulate, learning_rate=1e-30, clip=0.0, warmup=0.0, weight_decay=0.0
    )
    lengths = [(30, 28), (45, 5), (12, 10), (50, 25), (9, 3), (33, 20), (7, 4)]
    tokens = itertools.count(3)
    items = [Item(Encoded(tuple(next(tokens) % 256 for _ in range(n)), answer, str(n))) for n, answer in lengths]
    items.append(Item(Encoded(tuple(range(40, 80)), 37, "two turns", (range(5, 20),))))
    segment = [[0, 1], [2], [3], [4, 7], [5, 6]]
    learner = Learner(read_config(model_dir), read_weights(model_dir), params)
    module = Steps(learner, [segment], items, tmp_path)
    fit(module, items[:2], 1, Watch())
    windows = [[*itertools.chain(*segment[i : i + accumulate])] for i in range(0, len(segment), accumulate)]
    assert len(module.gradients) == len(windows)
    for found, window in zip(module.gradients, windows):
        expected = oracle_gradient(model_dir, [items[i] for i in window])
        assert float((found - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.slow
def test_the_l1_term_of_a_window_counts_once(tiny_model_dir, tmp_path):
    """An adapter's A is drawn at random, so its L1 gradient is the sign of A; the batch has B = 0, which hides the rest."""
    params = replace(SMALL, method="lora", accumulate=2, learning_rate=1e-30, clip=0.0, warmup=0.0, l1=0.5)
    items = [Item(Encoded(tuple(range(10, 10 + n)), answer, str(n))) for n, answer in ((30, 28), (45, 5), (12, 10))]
    model_dir = tiny_model_dir("llama")
    module = Steps(Learner(read_config(model_dir), read_weights(model_dir), params), [[[0], [1], [2]]], items, tmp_path)
    fit(module, items, 1, Watch())
    for gradient in module.gradients:
        parts = torch.split(gradient, [p.numel() for p in module.learner.trained().values()])
        for (name, weight), part in zip(module.learner.trained().items(), parts):
            if "lora_A" in name:
                assert torch.allclose(part, 0.5 * weight.detach().sign().flatten(), atol=1e-5)


# ---- resuming --------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def killed_run(model_dir, data, out, near_duplicates=NearDuplicates.DROP):
    """Train until the second of four validations."""

    def validated(step, loss):
        seen.append(step)
        if len(seen) == 2:
            raise Killed

    seen: list[int] = []
    bench = Workbench(model_dir, data, None, near_duplicates)
    with pytest.raises(Killed):
        run(bench, out, replace(SMALL, evaluations=4), name="x", watch=Watch(validated=validated))
    assert (work_dir(out) / LAST).is_file()


def first_validation(model_dir, data, out, near_duplicates=NearDuplicates.DROP, **changes):
    """Batches that were done at the first validation of a run at `out`: more than a quarter of all if it was resumed."""
    steps: list[int] = []
    bench = Workbench(model_dir, data, None, near_duplicates)
    params = replace(SMALL, evaluations=4, **changes)
    metrics = run(bench, out, params, name="x", watch=Watch(validated=lambda step, _: steps.append(step)))["metrics"]
    return steps[0] / metrics["steps"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", ["nothing", "template", "tokenizer", "end of turn", "source", "order", "seed", "loss"]
)
def test_only_the_same_run_is_resumed(tiny_model_dir, data, tmp_path, change):
    model_dir = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama"), model_dir)
    out = tmp_path / "out"
    killed_run(model_dir, data, out)
    changes = {"seed": {"seed": 1}, "loss": {"loss": "all"}}.get(change, {})
    path = tmp_path / "data.jsonl"
    if change == "template":
        template = model_dir / "chat_template.jinja"
        template.write_text("{{ '' }}" + template.read_text().replace("assistant\n", "assistant: "))
    elif change == "tokenizer":
        text = json.loads((model_dir / "tokenizer.json").read_text())
        vocabulary = text["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (model_dir / "tokenizer.json").write_text(json.dumps(text))
    elif change == "end of turn":
        (model_dir / "chat_template.jinja").write_text(
            (model_dir / "chat_template.jinja").read_text().replace("<|im_end|>", "<|endoftext|>")
        )
    elif change == "source":  # other documents: examples change sides
        path.write_text("".join(json.dumps({**r, "source": f"e{i}"}) + "\n" for i, r in enumerate(RECORDS)))
    elif change == "order":
        path.write_text("".join(json.dumps(record) + "\n" for record in reversed(RECORDS)))
    resumed = first_validation(model_dir, data, out, **changes) > 0.3
    assert resumed == (change == "nothing")


def test_a_directory_of_another_run_is_emptied(tmp_path):
    work = tmp_path / "work"
    assert not open_work(work, {"seed": 0})
    for name in (LAST, "secret"):
        (work / name).write_text("x")
    assert open_work(work, {"seed": 0}) and (work / "secret").is_file()
    assert not open_work(work, {"seed": 1})  # another run must not draw its noise from the same secret
    assert sorted(file.name for file in work.iterdir()) == ["key.json"]


# ---- what a user sees ------------------------------------------------------------------------------------------------


def command(model_dir, data, out, *options):
    run_cli = "import sys\nfrom motet.cli import app\nfrom motet.openmp import wait_passively\nwait_passively()\n"
    code = f"{run_cli}app(sys.argv[1:], standalone_mode=False)\nprint(*sys.modules)"
    small = ["--examples", "32", "--validation-examples", "8", "--max-length", "100", "--evaluations", "2"]
    call = [sys.executable, "-c", code, "tune", str(model_dir), "--data", data, "--out", str(out), *small, *options]
    environment = {**os.environ, "MOTET_HOME": str(out.parent / "home")}
    return subprocess.run(call, check=True, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_stderr_has_progress_and_nothing_else(tiny_model_dir, data, tmp_path, method):
    found = command(tiny_model_dir("llama"), data, tmp_path / "m", "--method", method)
    assert ("bitsandbytes" in found.stdout.split()) == (method == "qlora")
    lines = found.stderr.splitlines()
    assert [line for line in lines if not line.startswith("motet: m: ")] == []
    assert sum("validation loss" in line for line in lines) == 2


def test_lines_of_progress(monkeypatch, capfd):
    """40 batches of 100 tokens, ten seconds each: a line every 30 s with the speed and the time that is left."""
    now = itertools.count(0, 10)
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: float(next(now)))
    with Progress() as progress:
        watch = progress.training("m", [100] * 40)
        for step in range(31, 41):  # resumed after 30 batches
            watch.stepped(step, 2.5)
        watch.validated(40, 2.25)
    err = capfd.readouterr().err.splitlines()
    assert err[0] == "motet: m: 40 batches, 4000 tokens"
    assert err[1] == "motet: m: 33/40 batches, loss 2.500, 10 tokens/s, 70 s left"
    assert err[-1] == "motet: m: 40/40 batches, validation loss 2.250"
    assert len(err) == 5


def test_a_users_wait_policy_stays():
    environment: dict[str, str] = {}
    wait_passively(environment)
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        chosen = {name: "ACTIVE"}
        wait_passively(chosen)
        assert chosen == {name: "ACTIVE"}


@pytest.mark.parametrize(
    "settings",
    [
        {"epsilon": 8.0, "accumulate": 2},
        {"batch_examples": 4},
        {"epsilon": 8.0, "batch_examples": 0},
        {"loss": "some"},
        {"rank": 4},
        {"targets": ("q_proj",)},
        {"method": "lora", "head": True},
    ],
)
def test_options_are_used_or_refused(settings):
    with pytest.raises(ConfigError, match=next(reversed(settings))):
        TuneParams(**settings)


def test_a_search_has_choices_of_layers_for_tails_and_adapters():
    with pytest.raises(ConfigError, match="rank is a choice for adapters"):
        SearchParams(TuneParams(method="tail"), SearchSpace(rank=(4,)))
    assert SearchSpace().layers_of("tail", 3) == (1, 2)
    assert SearchSpace().layers_of("lora", 30) == (10,)
    assert SearchSpace().layers_of("lora", 4) == (4,)
    assert SearchSpace(layers=(2, 8)).layers_of("lora", 4) == (2,)
    with pytest.raises(ConfigError, match=r"layers \(8,\) are more than the model's 4"):
        SearchSpace(layers=(8,)).layers_of("lora", 4)


def test_what_a_search_minimises_is_said():
    with pytest.raises(ConfigError, match="objective must be trial or ensemble, got 'mix'"):
        SearchParams(objective="mix")
    with pytest.raises(ConfigError, match="members is the size of the objective ensemble's mix"):
        SearchParams(members=3)
    with pytest.raises(ConfigError, match="cost must be a number of at least 0"):
        SearchParams(cost=-1.0)
    with pytest.raises(ConfigError, match="cost is a price of layers, and these do not vary"):
        SearchParams(cost=0.1, space=SearchSpace(layers=(2,)))
    with pytest.raises(ConfigError, match="its choices of layers from its space, got layers 5 in base"):
        SearchParams(TuneParams(method="lora", layers=5))
    assert [SearchParams(objective=o).prunes for o in ("trial", "ensemble")] == [True, False]
    assert SearchParams(objective="ensemble", members=3, prune=True).prunes
