"""Changed GGUF files: each gives the logits of the model that it was written from, or is refused by name."""

from __future__ import annotations

import json
import re
import tempfile

import gguf
import numpy as np
import pytest
import torch
from helpers.compare import relative_error
from helpers.models import VOCAB_SIZE
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.gguf import convert_gguf
from motet.runtime.checkpoints.huggingface import eos_token_ids
from motet.runtime.errors import MotetError
from safetensors.torch import load_file, save_file

LIMIT = 1e-4  # of the logits, in units of their deviation
TEXT = [[256, *range(40, 100)]]
MODULES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm", "ln_2": "ffn_norm",
    "post_attention_layernorm of olmo2": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate": "ffn_gate_inp",
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


OWN_KEYS = {
    "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling", "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size",
}  # fmt: skip


class File:
    """What is written: keys and tensors of a model directory, as llama.cpp's converter names and arranges them."""

    def __init__(self, model_dir):
        config = json.loads((model_dir / "config.json").read_text())
        self.architecture = config["model_type"].replace("_moe", "moe")
        is_gpt2 = self.architecture == "gpt2"
        layers, heads = (
            config[key] for key in (("n_layer", "n_head") if is_gpt2 else ("num_hidden_layers", "num_attention_heads"))
        )
        self.keys = {"block_count": layers, "attention.head_count": heads}
        if is_gpt2:
            self.keys |= {"context_length": 512, "embedding_length": 64, "feed_forward_length": 256}
            self.keys |= {"attention.layer_norm_epsilon": config["layer_norm_epsilon"]}
        else:
            kv_heads, size = config["num_key_value_heads"], config["head_dim"]
            self.keys |= {"context_length": 512, "embedding_length": 64}
            self.keys |= {"feed_forward_length": config["intermediate_size"]}
            self.keys |= {
                "attention.head_count_kv": kv_heads,
                "attention.key_length": size,
                "attention.value_length": size,
            }
            self.keys |= {"attention.layer_norm_rms_epsilon": config["rms_norm_eps"], "rope.dimension_count": size}
            self.keys |= {"rope.freq_base": config["rope_parameters"]["rope_theta"]}
            self.keys |= {key: config[name] for key, name in OWN_KEYS.items() if name in config}
        self.others = {"general.name": "tiny", "general.file_type": 0}
        self.others |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.eos_token_id": 258,
        }
        self.others |= {"tokenizer.ggml.tokens": [f"t{i}" for i in range(VOCAB_SIZE)]}
        self.tensors, stacks = {}, {}
        for name, tensor in load_file(model_dir / "model.safetensors").items():
            module, _, kind = name.removeprefix("transformer.").rpartition(".")
            parts = module.removeprefix("model.layers.").removeprefix("h.").split(".", 1)
            values = tensor.numpy()
            expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)_proj", parts[-1])
            if expert:
                stacks.setdefault(f"blk.{parts[0]}.ffn_{expert[2]}_exps.weight", {})[int(expert[1])] = values
                continue
            inside = f"{parts[1]} of {self.architecture}" if parts[0].isdigit() else ""
            known = f"blk.{parts[0]}.{MODULES.get(inside, MODULES.get(parts[-1]))}" if inside else MODULES[module]
            if is_gpt2 and values.ndim == 2 and parts[0].isdigit():
                values = values.T
            if self.architecture in ("llama", "granite", "smollm3") and known.endswith(("attn_q", "attn_k")):
                count = heads if known.endswith("q") else kv_heads
                values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            self.tensors[f"{known}.{kind}"] = np.ascontiguousarray(values)
        self.tensors |= {name: np.stack([stack[i] for i in sorted(stack)]) for name, stack in stacks.items()}
        self.types = {}

    def write(self, path):
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in (*((f"{self.architecture}.{k}", v) for k, v in self.keys.items()), *self.others.items()):
            if value is None:
                continue
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add.get(type(value), writer.add_array)(key, value)
        for name, values in self.tensors.items():
            kind = self.types.get(name)
            if kind is None:
                writer.add_tensor(name, values)
            else:
                writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def keys(**changes):
    return lambda file: file.keys.update({key.replace("__", "."): value for key, value in changes.items()})


def others(changes):
    return lambda file: file.others.update(changes)


def tensors(edit):
    return lambda file: edit(file.tensors)


def spoil(name, value):
    def edit(file):
        file.tensors[name] = file.tensors[name].copy()
        file.tensors[name][0] = value

    return edit


def nothing(file):
    pass


def as_type(kind):
    def change(file):
        file.types = {name: kind for name, values in file.tensors.items() if values.ndim >= 2}
        for name in file.types:  # what can be written is on the type's grid: then nothing is rounded
            file.tensors[name] = gguf.dequantize(gguf.quantize(file.tensors[name], kind), kind)

    return change


FACTORS = np.array([1, 1, 1.5, 2, 3, 4, 8, 8], np.float32)
Q8, BF16, F16 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.F16

# name → (family, change, None if the logits are those of the written tensors, else words of the refusal)
TABLE = {
    "llama": ("llama", nothing, None),
    "llama, untied": ("llama-untied", nothing, None),
    "qwen2": ("qwen2", nothing, None),
    "qwen3": ("qwen3", nothing, None),
    "gpt2": ("gpt2", nothing, None),
    "granite": ("granite", nothing, None),
    "granite of other scales": ("granite", keys(embedding_scale=5.0, logit_scale=3.0), "equal to the changed model"),
    "olmo2": ("olmo2", nothing, None),
    "smollm3": ("smollm3", nothing, None),
    "olmoe": ("olmoe", nothing, None),
    "too few experts": (
        "olmoe",
        tensors(lambda t: t.update({"blk.1.ffn_up_exps.weight": t["blk.1.ffn_up_exps.weight"][:5]})),
        "missing",
    ),
    "experts in 8 bits": ("olmoe", as_type(Q8), None),
    "shared experts": ("olmoe", keys(expert_shared_count=1), "expert_shared_count=1"),
    "8 bits": ("llama", as_type(Q8), None),
    "bfloat16": ("qwen2", as_type(BF16), None),
    "float16": ("gpt2", as_type(F16), None),
    "without optional keys": ("llama", keys(attention__key_length=None, attention__value_length=None), None),
    "as many key-value heads": ("gpt2", keys(attention__head_count_kv=4), None),
    "key-value heads left out": ("llama", keys(attention__head_count_kv=None), "shapes"),
    "no heads": ("llama", keys(attention__head_count=0), "attention.head_count=0; it must be a whole number above 0"),
    "heads in words": ("llama", keys(attention__head_count="4"), "head_count='4'; it must be a whole number"),
    "epsilon in words": ("llama", keys(attention__layer_norm_rms_epsilon="x"), "must be a number above 0"),
    "a factor of 0": ("llama", keys(rope__scaling__type="linear", rope__scaling__factor=0.0), "finite number above 0"),
    "another base": ("llama", keys(rope__freq_base=777.0), "equal to the changed model"),
    "linear scaling": (
        "llama",
        keys(rope__scaling__type="linear", rope__scaling__factor=4.0),
        "equal to the changed model",
    ),
    "no scaling by name": ("qwen2", keys(rope__scaling__type="none"), None),
    "yarn": ("llama", keys(rope__scaling__type="yarn", rope__scaling__factor=4.0), "rope scaling of type 'yarn'"),
    "a scale without a type": ("llama", keys(rope__scaling__factor=4.0), "rope.scaling.factor=4.0"),
    "factors of frequencies": (
        "llama",
        tensors(lambda t: t.update({"rope_freqs.weight": FACTORS})),
        "equal to the changed model",
    ),
    "too few factors": (
        "llama",
        tensors(lambda t: t.update({"rope_freqs.weight": FACTORS[:4]})),
        "one factor above 0 for each pair",
    ),
    "factors and a scaling": (
        "llama",
        lambda file: (
            file.keys.update({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
            file.tensors.update({"rope_freqs.weight": FACTORS}),
        ),
        "without another scaling",
    ),
    "factors in another architecture": (
        "qwen2",
        tensors(lambda t: t.update({"rope_freqs.weight": FACTORS})),
        "'rope_freqs.weight'",
    ),
    "partial rotary": ("llama", keys(rope__dimension_count=8), "rope.dimension_count=8"),
    "values of another size": ("qwen3", keys(attention__value_length=32), "attention.value_length=32"),
    "window": ("llama", keys(attention__sliding_window=64), "attention.sliding_window=64"),
    "experts": ("llama", keys(expert_count=4), "expert_count=4"),
    "logit scale": ("llama", keys(logit_scale=0.1), "logit_scale"),
    "no experts": ("llama", keys(expert_count=0), None),
    "a head that is half": ("llama", keys(attention__head_count=4.5), "it must be a whole number"),
    "keys that change nothing": (
        "llama",
        others({"tokenizer.ggml.add_sep_token": False, "tokenizer.ggml.fim_pre_token_id": 5}),
        None,
    ),
    "an end that is no token": ("llama", others({"tokenizer.ggml.eot_token_id": 900}), "eot_token_id=900"),
    "heads by layer": (
        "llama",
        keys(attention__head_count_kv=[2, 2, 2, 2]),
        "another num_key_value_heads for each layer",
    ),
    "fewer layers": ("llama", keys(block_count=3), "tensors of 4 layers, and block_count is 3"),
    "more layers": ("llama", keys(block_count=2**31 - 1), "tensors of 4 layers, and block_count is 2147483647"),
    "no epsilon": ("llama", keys(attention__layer_norm_rms_epsilon=None), "lacks the keys"),
    "attention bias": (
        "llama",
        tensors(lambda t: t.update({"blk.0.attn_q.bias": np.ones(64, np.float32)})),
        "weights that its family does not use",
    ),
    "missing bias": ("qwen2", tensors(lambda t: t.pop("blk.2.attn_k.bias")), "missing"),
    "missing tensor": ("llama", tensors(lambda t: t.pop("blk.1.ffn_up.weight")), "missing"),
    "missing embedding": (
        "llama",
        tensors(lambda t: t.pop("token_embd.weight")),
        "lacks the tensor 'token_embd.weight'",
    ),
    "unknown tensor": (
        "llama",
        tensors(lambda t: t.update({"blk.0.ffn_gate_inp.weight": np.ones((4, 64), np.float32)})),
        "'blk.0.ffn_gate_inp.weight'",
    ),
    "wrong shape": (
        "llama",
        tensors(lambda t: t.update({"blk.0.attn_v.weight": np.ones((16, 64), np.float32)})),
        "shapes",
    ),
    "nan": ("llama", spoil("blk.1.ffn_down.weight", np.nan), "holds NaN or infinite values"),
    "infinite": ("gpt2", spoil("position_embd.weight", np.inf), "holds NaN or infinite values"),
    "first of a split": ("llama", others({"split.count": 3, "split.no": 0}), "one of 3 parts of a split model"),
    "a split of one": ("llama", others({"split.count": 1, "split.no": 0, "split.tensors.count": 40}), None),
    "another key": ("llama", others({"adapter.type": "lora"}), "the key 'adapter.type'"),
    "another tokenizer key": (
        "llama",
        others({"tokenizer.ggml.precompiled_charsmap": [1, 2]}),
        "the key 'tokenizer.ggml.precompiled_charsmap'",
    ),
    "another way to cut words": (
        "llama",
        others({"tokenizer.ggml.pre": "deepseek-llm"}),
        "cuts words by 'deepseek-llm'",
    ),
    "more tokens than rows": (
        "llama",
        others({"tokenizer.ggml.tokens": [f"t{i}" for i in range(400)]}),
        "an embedding of 320 tokens, a vocabulary of 400",
    ),
    "another vocabulary": ("llama", keys(vocab_size=300), "states 300"),
    "another architecture": (
        "llama",
        lambda file: setattr(file, "architecture", "gemma2"),
        "has the architecture 'gemma2'",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_changed_file_is_the_model_or_refused(tiny_model_dir, tmp_path, name):
    family, change, words = TABLE[name]
    file = File(tiny_model_dir(family))
    change(file)
    file.write(tmp_path / "m.gguf")
    if words not in (None, "equal to the changed model"):
        with pytest.raises(MotetError, match=words):
            read(tmp_path)
        return
    decoder = read(tmp_path)
    expected = written_model(tiny_model_dir(family), file)
    with torch.no_grad():
        assert relative_error(decoder.double()(torch.tensor(TEXT)), expected(torch.tensor(TEXT)).logits) < LIMIT
    assert eos_token_ids(tmp_path, None) == (258,)


def read(path):
    convert_gguf(path / "m.gguf", path)
    return Decoder.from_dir(path)


def written_model(model_dir, file):
    """transformers' model of the directory, with the tensors and the rotary settings of the file."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = model.config
    if "rope.freq_base" in file.keys:
        config.rope_parameters = {"rope_type": "default", "rope_theta": file.keys["rope.freq_base"]}
    if file.keys.get("rope.scaling.type") == "linear":
        config.rope_parameters |= {"rope_type": "linear", "factor": file.keys["rope.scaling.factor"]}
    if "rope_freqs.weight" in file.tensors:
        own = dict.fromkeys(("short_factor", "long_factor"), file.tensors["rope_freqs.weight"].tolist())
        scaling = {"rope_type": "longrope", "attention_factor": 1.0, "original_max_position_embeddings": 512, **own}
        config.rope_parameters |= scaling
    for key, name in OWN_KEYS.items():
        if key in file.keys:
            setattr(config, name, file.keys[key])
    state = load_file(model_dir / "model.safetensors")
    reference = File(model_dir)
    for name, tensor in state.items():  # values that were rounded to a type's grid, in the directory's arrangement
        kind = next(iter(file.types.values()), None)
        if kind is not None and tensor.ndim == 2:
            module = name.removeprefix("transformer.").rpartition(".")[0]
            stored = tensor.T if reference.architecture == "gpt2" and module.startswith("h.") else tensor
            rounded = torch.from_numpy(gguf.dequantize(gguf.quantize(stored.contiguous().numpy(), kind), kind))
            state[name] = rounded.T.contiguous() if stored is not tensor else rounded
    with tempfile.TemporaryDirectory() as folder:  # from a directory, where transformers knows the names of experts
        config.save_pretrained(folder)
        save_file(state, f"{folder}/model.safetensors", metadata={"format": "pt"})
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("size", [4, 100, 5000])
def test_a_torn_file(tiny_model_dir, tmp_path, size):
    File(tiny_model_dir("llama")).write(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:size])
    with pytest.raises(MotetError, match="cannot be read as GGUF"):
        convert_gguf(tmp_path / "m.gguf", tmp_path)
