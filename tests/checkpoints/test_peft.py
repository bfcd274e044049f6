"""PEFT's adapter format: adapters that PEFT wrote compute here what they compute there, and the other way round; what
cannot be used is refused by name. The oracle is PEFT itself, on transformers' models."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from helpers.compare import relative_error
from motet.export.bundle_writer import export_bundle
from motet.export.parity import HeldOut, read_parity
from motet.finetune.params import TuneParams
from motet.finetune.search.answers import member_decoder
from motet.finetune.training.train import tune
from motet.runtime.api.config import EngineConfig
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import checkpoint_digest, read_config, read_weights
from motet.runtime.checkpoints.members.adapter import (
    attach,
    is_separable,
    merge,
    random_adapter,
    read_adapter,
    write_adapter,
)
from motet.runtime.errors import BundleError, ConfigError, InvalidEnsembleError, NotFoundError, UnsupportedModelError
from motet.runtime.model.bundle import Bundle
from safetensors.torch import load_file, save_file

ROWS = torch.arange(60)[None] * 5 % 256
LLAMA = ["q_proj", "v_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "mlp.c_fc", "mlp.c_proj"]
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LIMIT = 2e-5  # of logits: what is left is W + B A rounded to float32


def hf_logits(model):
    """In float64: what float32 adds is rounding that depends on the CPU."""
    with torch.no_grad():
        return model.double().eval()(ROWS).logits


def load_base(model_dir):
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def foreign(model_dir, out, **settings):
    """An adapter that PEFT writes, with random numbers wherever PEFT trains; PEFT's logits of base and adapter as it
    loads them."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", init_lora_weights=settings.pop("init_lora_weights", False), **settings
    )
    model = peft.get_peft_model(load_base(model_dir), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(out)
    loaded = peft.PeftModel.from_pretrained(load_base(model_dir), out)
    return out, hf_logits(loaded)


def own_logits(model_dir, tensors, *, merged):
    config, base = read_config(model_dir), read_weights(model_dir)
    with torch.no_grad():
        if not merged:
            return attach(Decoder.from_weights(config, base), tensors).double()(ROWS)
        weights = {**base, **merge(base, tensors)}
        return Decoder.from_weights(replace(config, tied_head="lm_head.weight" not in weights), weights).double()(ROWS)


SEPARABLE = {
    "plain": ("llama", {"target_modules": LLAMA, "r": 4, "lora_alpha": 16}),
    "rslora": ("llama", {"target_modules": LLAMA, "r": 4, "lora_alpha": 16, "use_rslora": True}),
    "patterns": (
        "qwen3",
        {
            "target_modules": LLAMA,
            "rank_pattern": {"v_proj": 2, r"layers\.[13]\.mlp\.up_proj": 6},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 40, "down_proj": 1},
        },
    ),
    "regex": ("llama", {"target_modules": r".*\.[02]\.self_attn\.(q|k)_proj", "r": 3}),
    "some layers": ("qwen2", {"target_modules": LLAMA, "layers_to_transform": [1, 3], "layers_pattern": "layers"}),
    "all linear": ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "gpt2": ("gpt2", {"target_modules": GPT2, "r": 4, "fan_in_fan_out": True}),
    "neox": ("gpt_neox", {"target_modules": ["query_key_value", "dense", "dense_4h_to_h"], "r": 4}),
    "falcon": ("falcon-new", {"target_modules": ["query_key_value", "dense_h_to_4h"], "r": 3}),
    "gpt2 patterns": ("gpt2", {"target_modules": GPT2, "rank_pattern": {"c_attn": 5}, "layers_to_transform": [0, 2]}),
}
MERGED = {
    "dora": ("llama", {"target_modules": LLAMA, "use_dora": True, "r": 4, "lora_alpha": 12}),
    "dora gpt2": ("gpt2", {"target_modules": GPT2, "use_dora": True, "use_rslora": True}),
    "all biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "dora neox": ("gpt_neox", {"target_modules": ["query_key_value"], "use_dora": True}),
    "biases falcon": ("falcon-new", {"target_modules": ["query_key_value"], "bias": "all"}),
    "biases gpt2": ("gpt2", {"target_modules": GPT2, "bias": "lora_only"}),
    "whole modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["down_proj", "input_layernorm"]}),
    "whole modules gpt2": ("gpt2", {"target_modules": ["c_fc"], "modules_to_save": ["c_attn", "ln_f"]}),
    "head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "update of the head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "update of an untied head": ("llama-untied", {"target_modules": ["q_proj", "lm_head"], "use_dora": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SEPARABLE)
def test_an_adapter_of_peft_beside_the_base_and_merged(tiny_model_dir, tmp_path, case):
    family, settings = SEPARABLE[case]
    model_dir = tiny_model_dir(family)
    path, expected = foreign(model_dir, tmp_path / "a", **settings)
    _, tensors = read_adapter(path, read_config(model_dir))
    assert is_separable(tensors)
    assert relative_error(hf_logits(load_base(model_dir)), expected) > 0.1
    for merged in (False, True):
        assert relative_error(own_logits(model_dir, tensors, merged=merged), expected) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("case", MERGED)
def test_an_adapter_of_peft_that_must_be_merged(tiny_model_dir, tmp_path, case):
    family, settings = MERGED[case]
    model_dir = tiny_model_dir(family)
    path, expected = foreign(model_dir, tmp_path / "a", **settings)
    _, tensors = read_adapter(path, read_config(model_dir))
    assert relative_error(own_logits(model_dir, tensors, merged=True), expected) < LIMIT
    assert relative_error(hf_logits(load_base(model_dir)), expected) > 0.1
    with pytest.raises(ConfigError, match="--merge"):
        export_bundle(model_dir, tmp_path / "b", loras={"x": path}, bits=32, graphs=False)


@pytest.mark.slow
def test_adapters_of_peft_are_exported(tiny_model_dir, tmp_path, tokenizer, caplog):
    """Apart, merged, fused: the bundle's members are what PEFT's files say, and that the base is unknown is said."""
    model_dir = tiny_model_dir("gpt2")
    plain, _ = foreign(model_dir, tmp_path / "plain", target_modules=GPT2, r=4)
    dora, _ = foreign(model_dir, tmp_path / "dora", target_modules=GPT2, use_dora=True)
    text = HeldOut([tokenizer.encode("a text of a few bytes, twice")], EngineConfig(backend="onnx", threads=2))
    options = {"bits": 32, "held_out": text, "merge": True}
    with caplog.at_level(logging.WARNING):
        path = export_bundle(model_dir, tmp_path / "b", loras={"p": plain, "d": dora}, **options)
    assert all(abs(member.kl) < 1e-5 and member.top1 == 1.0 for member in read_parity(path).members)
    assert sum("cannot be verified" in message for message in caplog.messages) == 2
    bundle = Bundle.load(export_bundle(model_dir, tmp_path / "c", loras={"p": plain}, bits=32, graphs=False))
    assert bundle.kinds == ("adapter",)
    assert bundle.manifest["members"][0]["provenance"]["base"] == {"name": str(model_dir), "digest": None}
    stored = load_file(tmp_path / "c" / "model.safetensors")
    assert stored["members.p.model.layers.0.self_attn.qkv_proj.lora_a"].shape == (4, 64)  # q, k and v share A

    class Bench:
        config, base = read_config(model_dir), read_weights(model_dir)

    for adapter in (plain, dora):
        expected = hf_logits(peft.PeftModel.from_pretrained(load_base(model_dir), adapter))
        with torch.no_grad():
            assert relative_error(member_decoder(Bench, adapter).double()(ROWS), expected) < LIMIT


def test_an_own_head_is_exported_alone(tiny_model_dir, tmp_path):
    model_dir = tiny_model_dir("llama")
    path, _ = foreign(model_dir, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    with pytest.raises(InvalidEnsembleError, match="head of its own"):
        export_bundle(model_dir, tmp_path / "b", tails={"base": None}, loras={"x": path}, merge=True, graphs=False)
    bundle = export_bundle(model_dir, tmp_path / "b", loras={"x": path}, merge=True, graphs=False)
    assert not Bundle.load(bundle).config.tied_head


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_peft_loads_what_tune_writes(tiny_model_dir, tmp_path, family):
    """The logits of PEFT over transformers' model with the adapter of `motet tune` are ours."""
    data = tmp_path / "data.jsonl"
    lines = (json.dumps({"prompt": f"say {i}", "completion": f"the answer is {i % 3}"}) for i in range(60))
    data.write_text("\n".join(lines))
    model_dir, out = tiny_model_dir(family), tmp_path / "m"
    targets = ("q_proj", "down_proj") if family == "llama" else ("q_proj", "v_proj", "down_proj")
    params = TuneParams(
        method="lora", targets=targets, rank=3, alpha=5.0, layers=3, examples=16, validation_examples=4, max_length=100,
        learning_rate=2e-2,
    )  # fmt: skip
    tune(model_dir, str(data), out, params=params, use_cache=False, show_progress=False)
    expected = hf_logits(peft.PeftModel.from_pretrained(load_base(model_dir), out))
    manifest, tensors = read_adapter(out, read_config(model_dir))
    assert relative_error(own_logits(model_dir, tensors, merged=False), expected) < LIMIT
    assert relative_error(hf_logits(load_base(model_dir)), expected) > 0.1
    assert manifest["base"]["digest"] == checkpoint_digest(model_dir)
    settings = json.loads((out / CONFIG).read_text())
    assert settings["layers_to_transform"] == [1, 2, 3]
    assert settings["lora_alpha"] == 5.0
    found = {"llama": {}, "gpt2": {"c_attn": 6}, "gpt_neox": {"query_key_value": 6}}[
        family
    ]  # q and v, with a rank of 3 each
    assert settings["rank_pattern"] == found


@pytest.mark.parametrize("how", ["target_modules", "modules_to_save"])
def test_the_head_by_its_old_name(tiny_model_dir, tmp_path, how):
    """transformers 4 called GPT-NeoX's head embed_out, and so do adapters that were made with it."""
    model_dir, out = tiny_model_dir("gpt_neox"), tmp_path / "a"
    targets = ["query_key_value", "lm_head"] if how == "target_modules" else ["query_key_value"]
    saved = {} if how == "target_modules" else {"modules_to_save": ["lm_head"]}
    _, expected = foreign(model_dir, out, target_modules=targets, **saved)
    text = (out / CONFIG).read_text()
    (out / CONFIG).write_text(text.replace("lm_head", "embed_out"))
    tensors = load_file(out / WEIGHTS)
    renamed = {name.replace("lm_head", "embed_out"): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, out / WEIGHTS)
    assert (
        relative_error(own_logits(model_dir, read_adapter(out, read_config(model_dir))[1], merged=True), expected)
        < LIMIT
    )
    save_file({name: tensor.clone() for name, tensor in (renamed | tensors).items()}, out / WEIGHTS)
    with pytest.raises(BundleError, match="embed_out and lm_head"):
        read_adapter(out, read_config(model_dir))


# ---- used or refused -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tiny_model_dir, tmp_path_factory):
    return foreign(tiny_model_dir("llama"), tmp_path_factory.mktemp("peft") / "a", target_modules=["q_proj"])[0]


REFUSED = {
    "IA3": ({"peft_type": "IA3"}, UnsupportedModelError, "IA3"),
    "prefix": ({"peft_type": "PREFIX_TUNING"}, UnsupportedModelError, "PREFIX_TUNING"),
    "task": ({"task_type": "SEQ_CLS"}, UnsupportedModelError, "SEQ_CLS"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, UnsupportedModelError, "pissa_niter_4"),
    "tokens": ({"trainable_token_indices": [1]}, UnsupportedModelError, "trainable_token_indices"),
    "replication": ({"layer_replication": [[0, 2]]}, UnsupportedModelError, "layer_replication"),
    "bias of B": ({"lora_bias": True}, UnsupportedModelError, "lora_bias"),
    "a new option": ({"use_magic": {"x": 1}}, UnsupportedModelError, "use_magic"),
    "rank": ({"r": 4}, BundleError, "rank 8"),
    "no rank": ({"r": None}, BundleError, "whole ranks"),
    "targets": ({"target_modules": ["q_proj", "k_proj"]}, BundleError, "without tensors"),
    "other targets": ({"target_modules": ["k_proj"]}, BundleError, "no targets"),
    "layers": ({"layers_to_transform": 1}, BundleError, "no targets"),
    "saved": ({"modules_to_save": ["lm_head"]}, BundleError, "lm_head"),
    "dora": ({"use_dora": True}, BundleError, "magnitude"),
    "a wrong type": ({"rank_pattern": ["q_proj"]}, BundleError, "wrong type"),
    "no expression": ({"target_modules": "("}, BundleError, "regular expression"),
    "a word": ({"use_rslora": "no"}, BundleError, "use_rslora"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_setting_is_used_or_refused(tiny_model_dir, tmp_path, plain, case):
    change, error, message = REFUSED[case]
    path = shutil.copytree(plain, tmp_path / "a")
    settings = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(settings | change))
    with pytest.raises(error, match=message):
        read_adapter(path, read_config(tiny_model_dir("llama")))


MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
EXTRA = {
    "an embedding": ("base_model.model.model.embed_tokens.lora_embedding_A", (8, 320), UnsupportedModelError, "embed"),
    "another module": ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", (8, 64), UnsupportedModelError, "9"),
    "a prefix": ("model.layers.0.self_attn.q_proj.lora_A.weight", (8, 64), BundleError, "base_model"),
    "magnitudes": (f"{MODULE}.lora_magnitude_vector", (64,), BundleError, "use_dora"),
    "a cube": (f"{MODULE}.lora_A.weight", (8, 64, 1), BundleError, "2 dimensions"),
    "a bias": (f"{MODULE}.base_layer.bias", (64,), BundleError, "the base has none"),
    "a new embedding": ("base_model.model.model.embed_tokens.weight", (320, 64), UnsupportedModelError, "embed_tokens"),
    "a longer embedding": ("base_model.model.model.embed_tokens.weight", (330, 64), BundleError, "embed_tokens"),
    "a wrong base": (f"{MODULE}.lora_B.weight", (96, 8), BundleError, "the base has a weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", EXTRA)
def test_a_tensor_is_used_or_refused(tiny_model_dir, tmp_path, plain, case):
    name, shape, error, message = EXTRA[case]
    path = shutil.copytree(plain, tmp_path / "a")
    save_file({**load_file(path / WEIGHTS), name: torch.ones(shape)}, path / WEIGHTS)
    for merged in (True, False):
        with pytest.raises(error, match=message):
            export_bundle(tiny_model_dir("llama"), tmp_path / "b", loras={"x": path}, merge=merged)


def test_an_embedding_that_equals_the_base_is_no_change(tiny_model_dir, tmp_path, plain):
    """PEFT saves the embedding where the vocabulary might have been changed."""
    model_dir, path = tiny_model_dir("llama"), shutil.copytree(plain, tmp_path / "a")
    same = {"base_model.model.model.embed_tokens.weight": read_weights(model_dir)["model.embed_tokens.weight"]}
    save_file({**load_file(path / WEIGHTS), **same}, path / WEIGHTS)
    bundle = Bundle.load(export_bundle(model_dir, tmp_path / "b", loras={"x": path}, graphs=False))
    assert bundle.kinds == ("adapter",)


def test_what_is_no_adapter(tiny_model_dir, tmp_path, plain):
    config = read_config(tiny_model_dir("llama"))
    path = shutil.copytree(plain, tmp_path / "a")
    tensors = load_file(path / WEIGHTS)
    tensors[f"{MODULE}.lora_A.weight"][0, 0] = torch.nan
    save_file(tensors, path / WEIGHTS)
    with pytest.raises(BundleError, match="NaN"):
        read_adapter(path, config)
    (path / WEIGHTS).rename(path / "adapter_model.bin")
    with pytest.raises(NotFoundError, match="no pickle"):
        read_adapter(path, config)
    base = {"name": "tiny", "digest": checkpoint_digest(tiny_model_dir("llama"))}
    own = random_adapter(Decoder.from_dir(tiny_model_dir("llama")), ("q_proj",), 2, seed=0, scale=0.1)
    write_adapter(tmp_path / "own", config, own, {"base": base})
    settings = json.loads((tmp_path / "own" / CONFIG).read_text())
    (tmp_path / "own" / CONFIG).write_text(json.dumps(settings | {"lora_alpha": 99}))
    with pytest.raises(BundleError, match=r"not the one that adapter\.json records"):
        read_adapter(tmp_path / "own", config)
