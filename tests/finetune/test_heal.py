"""A pruned model that learns from the unpruned one: its loss, what it trains, what is written, what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from helpers.compare import relative_error
from motet.cli import main
from motet.export.prune.params import PruneParams
from motet.export.prune.prune import prune
from motet.finetune.data.batches import Item, make_batch
from motet.finetune.heal_params import HealParams
from motet.finetune.params import TuneParams
from motet.finetune.training.heal import Healer, heal
from motet.finetune.training.loop import TuneModule
from motet.finetune.training.teacher import Teacher
from motet.finetune.training.train import Workbench
from motet.finetune.training.trunk_cache import TrunkCache
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import checkpoint_digest, read_config, read_weights
from motet.runtime.checkpoints.members.registry import format_at
from motet.runtime.checkpoints.pruned import origins_of, read_record
from motet.runtime.errors import BundleError, ConfigError, NotFoundError
from motet.runtime.model.layout import decoder_layout

pytestmark = pytest.mark.slow  # it trains

COMMON = {
    "examples": 24,
    "validation_examples": 3,
    "max_length": 100,
    "epochs": 2,
    "batch_tokens": 128,
    "learning_rate": 1e-2,
}
TOKENS = torch.randint(0, 200, (1, 40), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def pruned(tiny_model_dir, tmp_path_factory):
    """(the model, a pruned one, data)."""
    root, model = tmp_path_factory.mktemp("heal"), tiny_model_dir("llama-untied")
    (root / "corpus.txt").write_text("abcdefghijklmnopqrstuvwxyz 0123456789")
    prune(model, root / "p", PruneParams(layers=1), chunks=[list(range(60))], vocabulary=[root / "corpus.txt"])
    data = root / "data.jsonl"
    records = ({"prompt": f"say {i}", "completion": f"the answer is {i % 3}"} for i in range(80))
    data.write_text("\n".join(map(json.dumps, records)))
    return model, root / "p", data


def params(method="tail", layers=1, **changes):
    return HealParams(base=TuneParams(method=method, layers=layers, **COMMON), test_examples=6, **changes)


def logits(model_dir, tokens=TOKENS):
    with torch.no_grad():
        return Decoder.from_dir(model_dir)(tokens)


@pytest.mark.parametrize("every_token", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_the_loss_is_its_definition(pruned, tmp_path, every_token, cached):
    model, small, data = pruned
    cache = TrunkCache(tmp_path / "cache") if cached else None
    bench = Workbench(small, str(data), cache)
    tuned = params().base.fitted(512)
    items = bench.load(tuned, {"train": 5}).parts["train"]
    teacher = Teacher(model, small, cache)
    if cached:
        states = teacher.states([item.encoded for item in items])
        items = [Item(item.encoded, item.hidden, rows) for item, rows in zip(items, states)]
    settings = params(share=0.7, hidden=0.5, every_token=every_token)
    learner = Healer(bench.config, bench.base, tuned).prepare(settings, teacher).train()
    found = float(learner.loss(make_batch(items)).detach())

    kept = torch.tensor(origins_of(read_record(small))[0].tokens)
    whole, whole_student = Decoder.from_dir(model), Decoder.from_dir(small)
    nll, kl, far, size, count = 0.0, 0.0, 0.0, 0.0, 0
    for item in items:
        ids = torch.tensor([item.encoded.token_ids])
        first = 1 if every_token else item.encoded.answer
        with torch.no_grad():
            mine, theirs = (
                decoder.run_layers(decoder.embed(tokens), 0, decoder.config.num_layers)[0, first - 1 : -1]
                for decoder, tokens in ((whole_student, ids), (whole, kept[ids]))
            )
            student = whole_student.head(whole_student.norm(mine)).log_softmax(-1)
            expected = whole.head(whole.norm(theirs))[:, kept].log_softmax(-1)
        nll -= float(student.gather(1, ids[0, first:, None]).sum())
        kl += float((expected.exp() * (expected - student)).sum())
        far += float((mine - theirs).square().sum())
        size += float(theirs.square().sum())
        count += ids.shape[1] - first
    # The teacher's states, and what the cache has of the student's trunk, are bfloat16.
    assert found == pytest.approx(0.3 * nll / count + 0.7 * kl / count + 0.5 * far / size, rel=2e-2)


@pytest.mark.parametrize(
    ("method", "layers", "norms"), [("tail", 1, False), ("tail", 1, True), ("lora", None, False), ("lora", 2, True)]
)
def test_a_model_learns_from_its_teacher(pruned, tmp_path, method, layers, norms):
    model, small, data = pruned
    bench = Workbench(small, str(data), TrunkCache(tmp_path / "cache"))
    settings = params(method, layers, norms=norms, share=1.0)
    manifest = heal(bench, model, tmp_path / "out", settings)
    curve = manifest["metrics"]["loss_curve"]  # of the divergence alone
    assert sum(curve[-6:]) < 0.9 * sum(curve[:6])
    before, after = read_weights(small), read_weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layout = decoder_layout(bench.config)
    if norms:
        assert changed >= layout.norm_tensors
    last = (f"model.layers.{bench.config.num_layers - 1}.", "model.norm.")
    if method == "tail":
        assert all(name.startswith(last) or (norms and name in layout.norm_tensors) for name in changed)
    else:
        assert {name.split(".")[-2] for name in changed if name not in layout.norm_tensors} == {"q_proj", "v_proj"}
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert relative_error(reference(TOKENS).logits, logits(tmp_path / "out")) <= 3e-5
    record = read_record(tmp_path / "out")
    assert [origin.digest for origin in origins_of(record)] == [checkpoint_digest(small), checkpoint_digest(model)]
    test = record["healed"]["healed"]["test"]
    assert test == manifest["healed"]["test"] and set(test) == {"teacher", "pruned", "healed"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]


@pytest.mark.parametrize("method", ["tail", "lora"])
def test_a_member_of_the_pruned_model(pruned, tmp_path, method):
    model, small, data = pruned
    bench = Workbench(small, str(data), TrunkCache(tmp_path / "cache"))
    heal(bench, model, tmp_path / "m", params(method), as_member=True)
    heal(bench, model, tmp_path / "whole", params(method))
    manifest, own = format_at(tmp_path / "m").read(tmp_path / "m", bench.config)
    assert manifest["base"]["digest"] == checkpoint_digest(small) and "healed" in manifest
    whole, merged = read_weights(tmp_path / "whole"), format_at(tmp_path / "m").merged(read_weights(small), own)
    for name, tensor in merged.items():
        assert torch.allclose(tensor, whole[name], atol=1e-6), name


def test_a_killed_run_goes_on(pruned, tmp_path, monkeypatch):
    model, small, data = pruned
    heal(Workbench(small, str(data), None), model, tmp_path / "a", params())
    step = TuneModule.training_step

    def dies(self, batch, index):
        if len(self.losses) == 3:
            raise KeyboardInterrupt
        return step(self, batch, index)

    monkeypatch.setattr(TuneModule, "training_step", dies)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        heal(Workbench(small, str(data), None), model, tmp_path / "b", params())
    assert not (tmp_path / "b").exists()
    monkeypatch.setattr(TuneModule, "training_step", step)
    heal(Workbench(small, str(data), None), model, tmp_path / "b", params())
    first, second = read_weights(tmp_path / "a"), read_weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_healed_model_is_healed_again(pruned, tmp_path):
    model, small, data = pruned
    heal(Workbench(small, str(data), None), model, tmp_path / "a", params())
    heal(Workbench(tmp_path / "a", str(data), None), model, tmp_path / "b", params())
    assert len(origins_of(read_record(tmp_path / "b"))) == 3


def test_refused(pruned, tiny_model_dir, tmp_path):
    model, small, data = pruned
    bench = Workbench(small, str(data), None)
    with pytest.raises(BundleError, match="does not come from"):
        heal(bench, tiny_model_dir("llama"), tmp_path / "out", params())
    with pytest.raises(NotFoundError, match="motet prune"):
        heal(Workbench(model, str(data), None), model, tmp_path / "out", params())
    with pytest.raises(ConfigError, match="norms"):
        heal(bench, model, tmp_path / "out", params(norms=True), as_member=True)
    for out in (small, model):
        with pytest.raises(ConfigError, match="would replace it"):
            heal(bench, model, out, params())
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="not a pruned model"):
        heal(bench, model, tmp_path / "other", params())
    for changes, said in (
        ({"share": 0.0}, "share"),
        ({"share": float("nan")}, "share"),
        ({"hidden": -1.0}, "hidden"),
        ({"norms": True, "base": TuneParams(method="full")}, "norms"),
        ({"base": TuneParams(epsilon=1.0)}, "private"),
        ({"base": TuneParams(head=True)}, "head"),
        ({"test_examples": 0}, "test_examples"),
    ):
        with pytest.raises(ConfigError, match=said):
            HealParams(**changes)
    shutil.copytree(small, tmp_path / "odd")
    record = json.loads((tmp_path / "odd" / "motet-prune.json").read_text())
    record["origins"][0]["tokens"][0] = 10**6
    (tmp_path / "odd" / "motet-prune.json").write_text(json.dumps(record))
    with pytest.raises(BundleError, match="does not fit"):
        heal(Workbench(tmp_path / "odd", str(data), None), model, tmp_path / "out", params())
    assert not (tmp_path / "out").exists()


def test_the_command(pruned, tmp_path, monkeypatch, capsys):
    model, small, data = pruned
    common = ["--examples", "8", "--validation-examples", "2", "--max-length", "100", "--test-examples", "2"]
    arguments = ["heal", small, "--teacher", model, "--data", data, "--out", tmp_path / "out", "--no-cache", *common]
    monkeypatch.setattr("sys.argv", ["motet", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "healed" in capsys.readouterr().out
    assert read_config(tmp_path / "out") == read_config(small)


def test_what_heals_writes_what_it_measures():
    with pytest.raises(ConfigError, match="use lora"):
        HealParams(base=TuneParams(method="qlora"))
