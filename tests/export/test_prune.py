"""A pruned model is the original without what was removed, an ordinary directory that transformers reads, or refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from helpers.compare import relative_error
from helpers.models import EXPERTS, FAMILIES, write_model
from motet.cli import main
from motet.export.prune.cut import Cut
from motet.export.prune.masks import masked
from motet.export.prune.params import PruneParams
from motet.export.prune.prune import prune, write_pruned
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import checkpoint_digest, open_weights, read_config, read_weights
from motet.runtime.checkpoints.pruned import RECORD, origins_of, read_record
from motet.runtime.errors import (
    BundleError,
    ConfigError,
    DataError,
    NotFoundError,
    NumericalError,
    UnsupportedModelError,
)
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow  # each family is written, cut and read by transformers
LIMIT = 1e-5
ANGLES = 3e-5  # transformers computes the rotary angles in float32, and the rest in float64 here
TOKENS = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(1))
CHUNKS = TOKENS.tolist()
FIXED_HEADS = ("gpt2", "gpt_neox", "falcon", "falcon-new", "olmo2", "olmoe")


def logits(model_dir, layers=None, change=lambda _weights: None):
    """Of the decoder in torch with some of the layers, and with changed weights."""
    config, weights = read_config(model_dir), read_weights(model_dir)
    change(weights)
    decoder = Decoder.from_weights(config, weights)
    with torch.no_grad():
        hidden = decoder.embed(TOKENS)
        for layer in range(config.num_layers) if layers is None else layers:
            hidden = decoder.run_layers(hidden, layer, layer + 1)
        return decoder.head(decoder.norm(hidden))


def check(out, expected):
    """The directory's logits are these, here and in transformers."""
    assert relative_error(logits(out), expected) <= LIMIT
    family = json.loads((out / "config.json").read_text())["model_type"]
    own = {"experts_implementation": "eager"} if family in EXPERTS else {}
    reference = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64, **own).eval()
    with torch.no_grad():
        assert relative_error(reference(TOKENS).logits, Decoder.from_dir(out).double()(TOKENS)) <= ANGLES


@pytest.mark.parametrize("kept", [(0, 2), (1, 2, 3)])
@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_a_model_without_layers(tiny_model_dir, tmp_path, family, kept):
    model = tiny_model_dir(family)
    with open_weights(model) as weights:
        record = write_pruned(model, tmp_path / "out", weights, Cut(kept), {})
    check(tmp_path / "out", logits(model, kept))
    assert record["layers"]["removed"] == [i for i in range(4) if i not in kept]
    assert record["parameters"]["after"] < record["parameters"]["before"]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in (*FIXED_HEADS, "phi3-long")])
def test_a_model_without_heads_is_one_whose_heads_add_nothing(tiny_model_dir, tmp_path, family):
    model, config = tiny_model_dir(family), read_config(tiny_model_dir(family))
    record = prune(model, tmp_path / "out", PruneParams(heads=1), chunks=CHUNKS)

    def silence(weights):
        for layer, kept in record["heads"].items():
            out = weights[f"model.layers.{layer}.self_attn.o_proj.weight"]
            heads = out.unflatten(1, (config.num_kv_heads, -1))
            heads[:, [head for head in range(config.num_kv_heads) if head not in kept]] = 0

    check(tmp_path / "out", logits(model, change=silence))
    assert read_config(tmp_path / "out").num_heads == config.num_heads // 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_channels_is_one_whose_channels_add_nothing(tiny_model_dir, tmp_path, family):
    model = tiny_model_dir(family)
    record = prune(model, tmp_path / "out", PruneParams(channels=64), chunks=CHUNKS)

    def silence(weights):
        for layer, kept in record["channels"].items():
            down = weights[f"model.layers.{layer}.mlp.down_proj.weight"]
            down[:, [channel for channel in range(down.shape[1]) if channel not in kept]] = 0

    check(tmp_path / "out", logits(model, change=silence))
    width, before = read_config(tmp_path / "out").intermediate_size, read_config(model).intermediate_size
    assert width == before - 64


def test_the_least_important_ones_are_removed(tiny_model_dir, tmp_path):
    """A layer that adds nothing, a head and channels that add nothing: removing them changes nothing."""
    model = tmp_path / "m"
    write_model(model, "llama", seed=3)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
    tensors["model.layers.1.mlp.down_proj.weight"].zero_()
    for layer in (0, 2, 3):
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"][:, 32:] = 0  # the second head of keys and values
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"][:, ::2] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    params = PruneParams(layers=1, heads=1, channels=64)
    record = prune(model, tmp_path / "out", params, chunks=CHUNKS, calibration="random tokens")
    assert record["layers"]["removed"] == [1]
    assert record["measured"]["block_influence"][0][1] == pytest.approx(0, abs=1e-12)
    assert record["calibration"] == {"text": "random tokens", "tokens": 100}
    check(tmp_path / "out", logits(model))


def test_greedy_measures_again(tiny_model_dir, tmp_path):
    once = prune(tiny_model_dir("qwen3"), tmp_path / "a", PruneParams(layers=2), chunks=CHUNKS)
    again = prune(tiny_model_dir("qwen3"), tmp_path / "b", PruneParams(layers=2, greedy=True), chunks=CHUNKS)
    assert len(once["measured"]["block_influence"]) == 1
    first, second = again["measured"]["block_influence"]
    gone = again["layers"]["removed"]
    assert len(second) == 3 and min(first, key=first.get) in gone and min(second, key=second.get) in gone


def test_a_share_is_the_fewest_layers_that_have_it(tiny_model_dir, tmp_path):
    for share, removed in ((0.25, 1), (0.26, 2), (0.75, 3)):
        record = prune(tiny_model_dir("llama"), tmp_path / "out", PruneParams(share=share), chunks=CHUNKS)
        assert len(record["layers"]["removed"]) == removed  # of four layers of one size


def test_types_and_layers_of_windows_stay(tiny_model_dir, tmp_path):
    model = tmp_path / "m"
    write_model(model, "gemma3_text")
    half = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(half, model / "model.safetensors", metadata={"format": "pt"})
    before = read_config(model)
    with open_weights(model) as weights:
        write_pruned(model, tmp_path / "out", weights, Cut((1, 2)), {})
    stored, after = load_file(tmp_path / "out" / "model.safetensors"), read_config(tmp_path / "out")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for name, tensor in stored.items():
        old = name.replace("layers.1.", "layers.2.").replace("layers.0.", "layers.1.") if "layers." in name else name
        assert torch.equal(tensor, half[old]), name
    assert before.window_layers == (0, 1, 3) and after.window_layers == (0,)


def test_a_pruned_model_knows_all_its_origins(tiny_model_dir, tmp_path):
    model = tiny_model_dir("llama")
    prune(model, tmp_path / "a", PruneParams(layers=1), chunks=CHUNKS)
    prune(tmp_path / "a", tmp_path / "b", PruneParams(layers=1), chunks=CHUNKS)
    found = [origin.digest for origin in origins_of(read_record(tmp_path / "b"))]
    assert found == [checkpoint_digest(tmp_path / "a"), checkpoint_digest(model)]


@pytest.mark.parametrize(
    ("family", "params", "error", "said"),
    [
        ("llama", {}, ConfigError, "nothing is removed"),
        ("llama", {"layers": 0}, ConfigError, "1…3"),
        ("llama", {"layers": 4}, ConfigError, "1…3"),
        ("llama", {"share": 0.0}, ConfigError, "above 0"),
        ("llama", {"share": 1.0}, ConfigError, "below 1"),
        ("llama", {"share": float("nan")}, ConfigError, "above 0"),
        ("llama", {"share": 0.8}, ConfigError, "one must stay"),
        ("llama", {"heads": 0}, ConfigError, "1…1"),
        ("llama", {"heads": 2}, ConfigError, "1…1"),
        ("phi3-long", {"heads": 1}, ConfigError, "one head"),
        ("llama", {"channels": 128}, ConfigError, "multiple of 64"),
        ("llama", {"channels": 32}, ConfigError, "multiple of 64"),
        ("llama", {"channels": -64}, ConfigError, "multiple of 64"),
        *(
            (family, {"heads": 1}, UnsupportedModelError, "no head_dim")
            for family in ("gpt2", "gpt_neox", "falcon-new")
        ),
        *((family, {"heads": 1}, UnsupportedModelError, "norms all heads") for family in ("olmo2", "olmoe")),
        ("qwen3_moe", {"channels": 64}, UnsupportedModelError, "experts"),
    ],
)
def test_refused(tiny_model_dir, tmp_path, family, params, error, said):
    with pytest.raises(error, match=said):
        prune(tiny_model_dir(family), tmp_path / "out", PruneParams(**params), chunks=CHUNKS)
    assert not list(tmp_path.iterdir())


def test_refused_together(tiny_model_dir, tmp_path):
    with pytest.raises(ConfigError, match="one of them"):
        PruneParams(layers=1, share=0.5)
    with pytest.raises(ConfigError, match="greedy"):
        PruneParams(heads=1, greedy=True)
    with pytest.raises(DataError, match="no calibration text"):
        prune(tiny_model_dir("llama"), tmp_path / "out", PruneParams(layers=1), chunks=[[]])


def test_the_model_is_never_replaced(tiny_model_dir, tmp_path):
    prune(tiny_model_dir("llama"), tmp_path / "a", PruneParams(layers=1), chunks=CHUNKS)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    before = checkpoint_digest(tmp_path / "a")
    for out in (tmp_path / "a", tmp_path / "link"):
        with pytest.raises(ConfigError, match="would replace it"):
            prune(tmp_path / "a", out, PruneParams(layers=1), chunks=CHUNKS)
    write_model(tmp_path / "a" / "inner", "llama")
    with pytest.raises(ConfigError, match="would replace it"):
        prune(tmp_path / "a" / "inner", tmp_path / "a", PruneParams(layers=1), chunks=CHUNKS)
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="not a pruned model"):
        prune(tmp_path / "a", tmp_path / "other", PruneParams(layers=1), chunks=CHUNKS)
    assert checkpoint_digest(tmp_path / "a") == before


def test_nothing_half_written(tmp_path):
    """A number that the stored type cannot hold ends it in the middle; so does a model that is damaged."""
    model = tmp_path / "m"
    write_model(model, "llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = 3.3e38  # bfloat16 rounds it to infinity when the rest is cut
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"].double()}, model / "model.safetensors")
    prune(model, tmp_path / "out", PruneParams(layers=1), chunks=CHUNKS)
    before = checkpoint_digest(tmp_path / "out")
    tensors["model.layers.0.mlp.down_proj.weight"][:] = 3e38
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(NumericalError, match="layer"):
        prune(model, tmp_path / "out", PruneParams(layers=1), chunks=CHUNKS)
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-1000])
    with pytest.raises(BundleError):
        prune(model, tmp_path / "out", PruneParams(layers=1), chunks=CHUNKS)
    assert checkpoint_digest(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 9}', '{"format": 1, "origins": [{"name": "a"}]}'])
def test_a_damaged_record_is_refused(tiny_model_dir, tmp_path, content):
    prune(tiny_model_dir("llama"), tmp_path / "a", PruneParams(layers=1), chunks=CHUNKS)
    (tmp_path / "a" / RECORD).write_text(content)
    with pytest.raises(BundleError, match="damaged"):
        prune(tmp_path / "a", tmp_path / "b", PruneParams(layers=1), chunks=CHUNKS)
    with pytest.raises(NotFoundError, match="motet prune"):
        read_record(tiny_model_dir("llama"))


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["motet", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_the_command(tiny_model_dir, tmp_path, monkeypatch, capsys):
    model, text = tiny_model_dir("llama"), tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 5)
    out = tmp_path / "out"
    assert command(monkeypatch, "prune", model, out, "--layers", 2, "--text", text, "--tokens", 100) == 0
    assert "removed layers" in capsys.readouterr().out
    assert read_record(out)["calibration"] == {"text": "text.txt", "tokens": 100}
    assert command(monkeypatch, "prune", model, out, "--share", "nan", "--text", text) == 2
    text.write_text("")
    assert command(monkeypatch, "prune", model, out, "--layers", 2, "--text", text) == 2
    assert "too few" in capsys.readouterr().err


def test_a_quantised_model_becomes_a_plain_one(tiny_model_dir, tmp_path):
    """FP8, widened to the type that config.json names."""
    model = tmp_path / "m"
    write_model(model, "qwen3")
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((model / "config.json").read_text())
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None, "fmt": "e4m3"}
    (model / "config.json").write_text(json.dumps(values | {"quantization_config": settings}))
    record = prune(model, tmp_path / "out", PruneParams(layers=1), chunks=CHUNKS)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    check(tmp_path / "out", logits(model, record["layers"]["kept"]))


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (6, 12), (1, 3)])
def test_masks_keep_the_largest_of_their_neighbours(kept, of):
    generator = torch.Generator().manual_seed(0)
    weight, rms = torch.randn(5, 12, generator=generator), torch.rand(12, generator=generator)
    found = masked(weight, rms, kept, of)
    for row in range(5):
        for first in range(0, 12, of):
            columns = range(first, first + of)
            best = sorted(columns, key=lambda c: -abs(float(weight[row, c] * rms[c])))[:kept]
            assert {c for c in columns if found[row, c] != 0} == set(best)
    assert torch.equal(found[found != 0], weight[found != 0])
