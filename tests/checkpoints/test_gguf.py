"""Changed GGUF files: each gives the logits of the model that it was written from, or is refused by name."""

from __future__ import annotations

import tempfile

import gguf
import numpy as np
import pytest
import torch
from helpers.compare import relative_error
from helpers.gguf_files import OWN_KEYS, File, make_model
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.gguf import convert_gguf
from motet.runtime.checkpoints.huggingface import eos_token_ids
from motet.runtime.errors import MotetError
from safetensors.torch import load_file, save_file

LIMIT = 1e-4  # of the logits, in units of their deviation
TEXT = [[256, *range(40, 100)]]


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
    "qwen3moe": ("qwen3_moe", nothing, None),
    "gemma": ("gemma", nothing, None),
    "gemma2": ("gemma2", nothing, None),
    "gemma2 of other caps": (
        "gemma2",
        keys(attn_logit_softcapping=2.0, final_logit_softcapping=11.0, attention__sliding_window=9),
        "equal to the changed model",
    ),
    "gemma2 by a period": ("gemma2", keys(attention__sliding_window_pattern=2), None),
    "gemma2 without a pattern": ("gemma2", keys(attention__sliding_window_pattern=None), None),
    "gemma2 of 27B": ("gemma2 of 27B", nothing, None),
    "gemma3": ("gemma3_text", nothing, None),
    "gemma3 by a period": ("gemma3_text", keys(attention__sliding_window_pattern=3), None),
    "gemma3 with a cap": ("gemma3_text", keys(final_logit_softcapping=7.0), "equal to the changed model"),
    "gemma3 in 8 bits": ("gemma3_text", as_type(Q8), None),
    "phi3": ("phi3", nothing, None),
    "phi3 without a window": ("phi3", keys(attention__sliding_window=0), "equal to the changed model"),
    "phi3 with factors": ("phi3-long", nothing, None),
    "phi3 in 8 bits": ("phi3", as_type(Q8), None),
    "gptneox": ("gpt_neox", nothing, None),
    "gptneox, one after the other": ("gpt_neox", keys(use_parallel_residual=False), "equal to the changed model"),
    "gptneox in 8 bits": ("gpt_neox", as_type(Q8), None),
    "falcon": ("falcon", nothing, None),
    "falcon without a base": ("falcon", keys(rope__freq_base=None), None),
    "falcon of 40B": ("falcon of 40B", nothing, None),
    "falcon of 40B in 8 bits": ("falcon of 40B", as_type(Q8), None),
    "falcon 2": ("falcon 2", nothing, None),
    "falcon 2 without a base": ("falcon 2", keys(rope__freq_base=None), "a Falcon 2 without rope.freq_base"),
    "falcon with biases": ("falcon-new", nothing, "weights that its family does not use"),
    "falcon of another layout": ("falcon", keys(tensor_data_layout="bloom"), "another tensor_data_layout"),
    "gptneox without its kind of residual": (
        "gpt_neox",
        keys(use_parallel_residual=None),
        "use_parallel_residual=None",
    ),
    "more channels rotate than there are": ("gpt_neox", keys(rope__dimension_count=64), "a head has 32 channels"),
    "qkv of another size": (
        "gpt_neox",
        tensors(lambda t: t.update({"blk.1.attn_qkv.weight": t["blk.1.attn_qkv.weight"][:-1]})),
        "has 191 rows for 2 heads of 32 channels",
    ),
    "gemma with a head": (
        "gemma",
        tensors(lambda t: t.update({"output.weight": t["token_embd.weight"]})),
        "holds the tensor 'output.weight'",
    ),
    "gemma2 without windows": ("gemma2", keys(attention__sliding_window=0), "gemma2 has layers with a window"),
    "gemma2 of another base": ("gemma2", keys(rope__freq_base_swa=5.0), "another rope.freq_base_swa"),
    "a pattern of too few": ("gemma2", keys(attention__sliding_window_pattern=[True]), "a bool for each of 4 layers"),
    "a pattern in words": ("gemma3_text", keys(attention__sliding_window_pattern="6"), "a bool for each of 4 layers"),
    "a cap in words": ("gemma2", keys(attn_logit_softcapping="1"), "must be a finite number of at least 0"),
    "a window in words": ("gemma3_text", keys(attention__sliding_window="1"), "a whole number of at least 0"),
    "many layers of gemma": ("gemma2", keys(block_count=2**31 - 1), "tensors of 4 layers, and block_count is"),
    "phi3 with one kind of factors": (
        "phi3-long",
        tensors(lambda t: t.pop("rope_factors_long.weight")),
        "a part of longrope",
    ),
    "phi3 with a scale and no factors": ("phi3", keys(rope__scaling__attn_factor=1.2), "a part of longrope"),
    "phi3 by name, and no factors": ("phi3", keys(rope__scaling__type="longrope"), "a part of longrope"),
    "longrope elsewhere": ("llama", keys(rope__scaling__type="longrope"), "rope scaling of type 'longrope'"),
    "phi3 with linear scaling": (
        "phi3",
        keys(rope__scaling__type="linear", rope__scaling__factor=2.0),
        "rope scaling of type 'linear'",
    ),
    "phi3 with a factor of 0": ("phi3-long", spoil("rope_factors_short.weight", 0), "a row of numbers above 0"),
    "phi3 with too few factors": (
        "phi3-long",
        tensors(lambda t: t.update({"rope_factors_short.weight": np.ones(3, np.float32)})),
        "3 short factors; 8 channels rotate",
    ),
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
        lambda file: setattr(file, "architecture", "mamba"),
        "has the architecture 'mamba'",
    ),
}


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("name", TABLE)
def test_a_changed_file_is_the_model_or_refused(models_dir, tmp_path, name):
    family, change, words = TABLE[name]
    model = make_model(models_dir, family)
    file = File(model)
    change(file)
    file.write(tmp_path / "m.gguf")
    if words not in (None, "equal to the changed model"):
        with pytest.raises(MotetError, match=words):
            read(tmp_path)
        return
    decoder = read(tmp_path)
    expected = written_model(model, file)
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
    config, own = model.config, File(model_dir).keys
    changed = {key: value for key, value in file.keys.items() if value != own.get(key) and value is not None}
    if "rope.freq_base" in changed:
        config.rope_parameters = {"rope_type": "default", "rope_theta": changed["rope.freq_base"]}
    if changed.get("rope.scaling.type") == "linear":
        config.rope_parameters |= {"rope_type": "linear", "factor": changed["rope.scaling.factor"]}
    if "rope_freqs.weight" in file.tensors:
        own = dict.fromkeys(("short_factor", "long_factor"), file.tensors["rope_freqs.weight"].tolist())
        scaling = {"rope_type": "longrope", "attention_factor": 1.0, "original_max_position_embeddings": 512, **own}
        config.rope_parameters |= scaling
    for key, name in OWN_KEYS.items():
        if key in changed:
            setattr(config, name, changed[key] or (None if name == "sliding_window" else changed[key]))
    state = load_file(model_dir / "model.safetensors")
    reference = File(model_dir)
    for name, tensor in state.items():  # values that were rounded to a type's grid, in the directory's arrangement
        kind = next(iter(file.types.values()), None)
        if kind is not None and tensor.ndim == 2:  # rows may stand in another order, their values stay
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
