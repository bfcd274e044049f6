"""The members of a pruned trunk: each says what it said without the layers, heads, channels and tokens that are removed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.compare import relative_error
from helpers.models import make_adapter, make_tail
from motet.cli import main
from motet.export.prune.params import PruneParams
from motet.export.prune.prune import prune
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import checkpoint_digest, read_config, read_weights
from motet.runtime.checkpoints.members.adapter import read_adapter
from motet.runtime.checkpoints.members.registry import format_at
from motet.runtime.checkpoints.pruned import RECORD, check_output, origins_of, read_record
from motet.runtime.errors import BundleError, ConfigError, UnsupportedModelError
from motet.runtime.model.bundle import Bundle

pytestmark = pytest.mark.slow
TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(2))
CHUNKS = TOKENS.tolist()


def logits(model_dir, member, tokens=TOKENS, layers=None, change=lambda _weights: None):
    config, weights = read_config(model_dir), read_weights(model_dir)
    form = format_at(member)
    weights |= form.merged(weights, form.read(member, config)[1])
    change(weights)
    decoder = Decoder.from_weights(config, weights)
    with torch.no_grad():
        hidden = decoder.embed(tokens)
        for layer in range(config.num_layers) if layers is None else layers:
            hidden = decoder.run_layers(hidden, layer, layer + 1)
        return decoder.head(decoder.norm(hidden))


@pytest.fixture(scope="module")
def members(tiny_model_dir, tmp_path_factory):
    root, model = tmp_path_factory.mktemp("members"), tiny_model_dir("llama")
    tail = make_tail(model, root / "t", "t", 1, 0.3)
    return model, tail, make_adapter(model, root / "x", 2)


def test_layers(members, tmp_path):
    model, tail, adapter = members
    record = prune(
        model, tmp_path / "out", PruneParams(layers=1), chunks=CHUNKS, tails={"t": tail}, loras={"x": adapter}
    )
    kept = record["layers"]["kept"]
    assert kept[-2:] == [2, 3]  # the tail's
    for name, before in (("t", tail), ("x", adapter)):
        after = tmp_path / "out" / "members" / name
        assert relative_error(logits(tmp_path / "out", after), logits(model, before, layers=kept)) <= 1e-5
        manifest = format_at(after).read_manifest(after)
        assert manifest["base"] == {"name": "out", "digest": checkpoint_digest(tmp_path / "out")}
        assert manifest["pruned_from"]["digest"] == checkpoint_digest(model)
    assert json.loads((tmp_path / "out" / "members" / "t" / "tail.json").read_text())["split_layer"] == 1


def test_layers_of_tails_are_removed_when_asked(members, tmp_path):
    model, tail, _ = members
    with pytest.raises(ConfigError, match="layers of tails"):
        prune(model, tmp_path / "out", PruneParams(layers=3), chunks=CHUNKS, tails={"t": tail})
    with pytest.raises(ConfigError, match="'t' would be removed"):  # the last layers of a random model change least
        prune(model, tmp_path / "out", PruneParams(layers=2, from_tails=True), chunks=CHUNKS, tails={"t": tail})
    record = prune(model, tmp_path / "out", PruneParams(layers=1, from_tails=True), chunks=CHUNKS, tails={"t": tail})
    kept = record["layers"]["kept"]
    assert kept == [0, 1, 2]
    found = logits(tmp_path / "out", tmp_path / "out" / "members" / "t")
    assert relative_error(found, logits(model, tail, layers=kept)) <= 1e-5


def test_heads_and_channels_of_an_adapter(members, tmp_path):
    model, _, adapter = members
    record = prune(model, tmp_path / "out", PruneParams(heads=1, channels=64), chunks=CHUNKS, loras={"x": adapter})

    def silence(weights):
        for layer in range(4):
            heads = weights[f"model.layers.{layer}.self_attn.o_proj.weight"].unflatten(1, (2, -1))
            heads[:, [head for head in (0, 1) if head not in record["heads"][str(layer)]]] = 0
            down = weights[f"model.layers.{layer}.mlp.down_proj.weight"]
            down[:, [channel for channel in range(128) if channel not in record["channels"][str(layer)]]] = 0

    found = logits(tmp_path / "out", tmp_path / "out" / "members" / "x")
    assert relative_error(found, logits(model, adapter, change=silence)) <= 1e-5


def test_tokens(members, tmp_path):
    model, tail, adapter = members
    (tmp_path / "corpus.txt").write_text("to be or not")
    prune(
        model,
        tmp_path / "out",
        PruneParams(),
        vocabulary=[tmp_path / "corpus.txt"],
        tails={"t": tail},
        loras={"x": adapter},
    )
    kept = torch.tensor(origins_of(read_record(tmp_path / "out"))[0].tokens)
    ids = torch.arange(100)[None]
    for name, before in (("t", tail), ("x", adapter)):
        found = logits(tmp_path / "out", tmp_path / "out" / "members" / name, ids)
        assert relative_error(found, logits(model, before, kept[ids])[..., kept]) <= 1e-5


def test_the_ensemble_is_exported(members, tmp_path, monkeypatch):
    model, tail, adapter = members
    text = tmp_path / "text.txt"
    text.write_text("All members share a trunk.\n" * 4)
    for arguments in (
        [
            "prune",
            model,
            tmp_path / "out",
            "--layers",
            "1",
            "--text",
            text,
            "--tail",
            f"t={tail}",
            "--lora",
            f"x={adapter}",
        ],
        ["export", tmp_path / "out", tmp_path / "b", "--tail", f"t={tmp_path}/out/members/t"]
        + ["--lora", f"x={tmp_path}/out/members/x", "--no-graphs", "--no-parity"],
    ):
        monkeypatch.setattr("sys.argv", ["motet", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
    assert Bundle.load(tmp_path / "b").config.num_layers == 3


def test_refused(members, tiny_model_dir, tmp_path):
    model, tail, adapter = members
    other = make_tail(tiny_model_dir("qwen2"), tmp_path / "o", "o", 1, 0.3)
    for params, tails, loras, error, said in (
        (PruneParams(heads=1), {"t": tail}, {}, UnsupportedModelError, "tail 't'"),
        (PruneParams(channels=64), {"t": tail}, {}, UnsupportedModelError, "tail 't'"),
        (PruneParams(layers=1), {"t": other}, {}, BundleError, "another|trained on"),
        (PruneParams(layers=1), {"t": adapter}, {}, ConfigError, "is an adapter"),
        (PruneParams(layers=1), {"a": tail}, {"a": adapter}, ConfigError, "two members"),
        (PruneParams(layers=1), {"a/b": tail}, {}, ConfigError, "a/b"),
        (PruneParams(layers=1), {"..": tail}, {}, ConfigError, "name"),
        (PruneParams(layers=1, from_tails=True), {}, {"x": adapter}, ConfigError, "from_tails"),
        (PruneParams(heads=1, from_tails=True), {}, {}, ConfigError, "from_tails"),
    ):
        with pytest.raises(error, match=said):
            prune(model, tmp_path / "out", params, chunks=CHUNKS, tails=tails, loras=loras)
    assert not (tmp_path / "out").exists()
    # An adapter of the last layer alone, which is removed.
    alone = make_adapter(model, tmp_path / "last", 3, layers=1)
    with pytest.raises(ConfigError, match="'last' would be removed"):
        prune(model, tmp_path / "out", PruneParams(layers=3), chunks=CHUNKS, loras={"last": alone})
    assert not (tmp_path / "out").exists()


def test_tensors_of_an_adapter_have_the_new_numbers(members, tmp_path):
    model, _, _ = members
    adapter = make_adapter(model, tmp_path / "x", 5, targets=("q_proj",), layers=2)
    record = prune(model, tmp_path / "out", PruneParams(layers=1), chunks=CHUNKS, loras={"x": adapter})
    tensors = read_adapter(tmp_path / "out" / "members" / "x", read_config(tmp_path / "out"))[1]
    left = [index for index, layer in enumerate(record["layers"]["kept"]) if layer >= 2]
    assert sorted({int(name.split(".")[2]) for name in tensors}) == left


def test_members_and_healed_models_are_not_replaced(members, tmp_path):
    model, tail, _ = members
    out, params = tmp_path / "out", PruneParams(layers=1)
    prune(model, out, params, chunks=CHUNKS)
    prune(model, out, params, chunks=CHUNKS, tails={"t": tail})  # nothing is lost
    with pytest.raises(ConfigError, match="has members, which would be lost"):
        prune(model, out, params, chunks=CHUNKS, tails={"t": tail})
    shutil.rmtree(out / "members")
    with pytest.raises(ConfigError, match="a pruned model that is not healed"):
        check_output(out, healed=True)
    record = json.loads((out / RECORD).read_text()) | {"healed": {}}
    (out / RECORD).write_text(json.dumps(record))
    check_output(out, healed=True)
    with pytest.raises(ConfigError, match="is a healed model"):
        prune(model, out, params, chunks=CHUNKS)
