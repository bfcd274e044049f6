"""From `motet fuse` to `motet export --fusion`: the bundle says which data chose the checkpoints and the mix."""

from __future__ import annotations

import hashlib
import json
import sys

import pytest
from motet.cli import main
from motet.finetune.params import TuneParams
from motet.finetune.search.fuse import fuse
from motet.finetune.search.params import FuseParams
from motet.finetune.training.train import Workbench, tune
from motet.runtime.api.request import Space
from motet.runtime.errors import BundleError
from motet.runtime.model.bundle import Bundle

pytestmark = pytest.mark.slow  # it trains


@pytest.fixture(scope="module")
def fusion(tiny_model_dir, tmp_path_factory):
    """(model, data, directory of a fusion of a tail and an adapter)."""
    root, model = tmp_path_factory.mktemp("fusion"), tiny_model_dir("llama")
    records = ({"prompt": f"say {i}", "completion": f"the answer is {i % 3}"} for i in range(60))
    data = root / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    common = {"examples": 16, "validation_examples": 3, "max_length": 100, "learning_rate": 1e-2}
    for name, method in (("t", "tail"), ("x", "lora")):
        params = TuneParams(method=method, **common)
        tune(model, str(data), root / name, params=params, use_cache=False, show_progress=False)
    bench = Workbench(model, str(data), None)
    params = FuseParams(validation_examples=4, test_examples=6, max_length=100, with_base=False, folds=2)
    fuse(bench, {"t": root / "t", "x": root / "x"}, root / "fused", params)
    return model, data, root / "fused"


def export(monkeypatch, *arguments):
    monkeypatch.setattr(
        sys, "argv", ["motet", "export", *map(str, arguments), "--no-parity", "--no-graphs", "--bits", "32"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def expected_choice(model, data, count):
    bench = Workbench(model, str(data), None)
    items = bench.load(TuneParams(max_length=100), {"validation": count}).parts["validation"]
    digest = hashlib.sha256("".join(repr(i.encoded.token_ids) for i in items).encode()).hexdigest()
    return {
        "data": "data.jsonl",
        "data_digest": bench.dataset.digest,
        "split": "validation",
        "examples": count,
        "examples_digest": digest,
        "private": False,
    }


def test_a_bundle_says_what_chose_its_checkpoints_and_its_mix(fusion, tmp_path, monkeypatch, capsys):
    model, data, fused = fusion
    assert export(monkeypatch, model, tmp_path / "b", "--fusion", fused) == 0, capsys.readouterr().err
    bundle = Bundle.load(tmp_path / "b")
    written = json.loads((fused / "fusion.json").read_text())
    assert {m.name: m.mix for m in bundle.default_ensemble.members} == pytest.approx(written["mix"])
    assert str(bundle.default_ensemble.space) == written["space"]
    assert bundle.manifest["provenance"]["mix_chosen_by"] == expected_choice(model, data, 4)
    for member in bundle.manifest["members"]:
        assert member["provenance"]["chosen_by"] == expected_choice(model, data, 3)
    sentence = "validation examples of `data.jsonl`"
    for card in (fused / "README.md", fused.parent / "t" / "README.md"):
        assert sentence in card.read_text()
        assert "No privacy budget covers them" in card.read_text()


def test_temperatures_travel_from_the_fusion_to_the_bundle(fusion, tmp_path, monkeypatch, capsys):
    model, data, fused = fusion
    plain = json.loads((fused / "fusion.json").read_text())
    assert plain["temperatures"] == {}
    assert "against_no_temperatures" not in plain["report"]
    params = FuseParams(Space.PROBS, validation_examples=4, test_examples=6, max_length=100, folds=2, temperatures=True)
    members = {name: fused.parent / name for name in ("t", "x")}
    written = fuse(Workbench(model, str(data), None), members, tmp_path / "f", params)
    report, temperatures = written["report"], written["temperatures"]
    assert temperatures, "none was fitted: nothing is tested"
    assert set(temperatures) <= set(written["mix"])
    for split in ("validation", "validation_nested", "test"):
        assert report["fitted"][split] != report["without_temperatures"][split]
    assert report["fitted"]["validation"] < report["without_temperatures"]["validation"]
    change = report["against_no_temperatures"]["examples"]["change"]
    assert change == pytest.approx(report["fitted"]["test"] / report["without_temperatures"]["test"] - 1)
    card = (tmp_path / "f" / "README.md").read_text()
    assert ", ".join(f"{name} {temperatures.get(name, 1.0):.3f}" for name in written["mix"]) in card
    assert f"| fitted mix, without temperatures | {report['without_temperatures']['validation']:.4f} |" in card
    assert export(monkeypatch, model, tmp_path / "b", "--fusion", tmp_path / "f") == 0, capsys.readouterr().err
    found = {m.name: m.temperature for m in Bundle.load(tmp_path / "b").default_ensemble.members}
    assert found == {name: temperatures.get(name, 1.0) for name in written["mix"]}
    others = ",".join(f"{other}={written['mix'][other]!r}@2.5" for other in written["mix"])
    tails = [text for other in written["mix"] for text in _member_options(other, members)]
    assert export(monkeypatch, model, tmp_path / "c", *tails, "--mix", others) == 0, capsys.readouterr().err
    assert {m.temperature for m in Bundle.load(tmp_path / "c").default_ensemble.members} == {2.5}
    manifest = json.loads((tmp_path / "b" / "motet.json").read_text())
    next(member for member in manifest["members"] if member["mix"])["temperature"] = 0
    (tmp_path / "b" / "motet.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="the temperature of member"):
        Bundle.load(tmp_path / "b")


def _member_options(name, members):
    if name == "base":
        return ["--tail", "base"]
    return ["--tail" if name == "t" else "--lora", f"{name}={members[name]}"]


def test_a_fusion_is_used_whole_or_refused(fusion, tiny_model_dir, tmp_path, monkeypatch, capsys):
    model, _, fused = fusion

    def refused(*arguments):
        assert export(monkeypatch, *arguments) == 2
        return capsys.readouterr().err

    assert "its own members" in refused(model, tmp_path / "b", "--fusion", fused, "--mix", "t=1")
    assert "its own members" in refused(model, tmp_path / "b", "--fusion", fused, "--space", "probs")
    assert "another base" in refused(tiny_model_dir("qwen2"), tmp_path / "b", "--fusion", fused)
    assert "no fusion" in refused(model, tmp_path / "b", "--fusion", tmp_path)
    assert "two members are called 't'" in refused(model, tmp_path / "b", "--tail", "t=x", "--tail", "t=y")


def test_a_member_that_has_changed_is_another_member(fusion, tmp_path, monkeypatch, capsys):
    model, _, fused = fusion
    written = json.loads((fused / "fusion.json").read_text())
    name = next(iter(written["mix"]))
    written["weights"][name] = "0" * 64
    (tmp_path / "fusion.json").write_text(json.dumps(written))
    assert export(monkeypatch, model, tmp_path / "b", "--fusion", tmp_path) == 2
    assert f"the member '{name}'" in capsys.readouterr().err
