"""Changed model directories: each gives the logits of transformers, or is refused by name; none is silently different."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import transformers
from helpers.compare import relative_error
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import eos_token_ids
from motet.runtime.errors import BundleError, MotetError
from motet.runtime.text.tokenizer import Tokenizer
from safetensors.torch import load_file, save_file

LIMIT = 1e-4  # of the logits, in units of their deviation
TEXT = [[256, *range(40, 100)]]


def config(**changes):
    """config.json with other values; None removes a key."""

    def change(path):
        file = path / "config.json"
        values = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return change


def rope(**parameters):
    """Rotary parameters as transformers 4 writes them (`rope_scaling`), instead of those of transformers 5."""
    return config(rope_parameters=None, rope_theta=5000.0, rope_scaling=parameters or None)


def weights(edit, shards=None):
    """The stored tensors after `edit(tensors)`. `shards`: in files of their own by an index, which it may change."""

    def change(path):
        tensors = load_file(path / "model.safetensors")
        edit(tensors)
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        if shards is None:
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
            return
        (path / "model.safetensors").unlink()
        places = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(tensors))}
        for file in set(places.values()):
            held = {name: tensors[name] for name, place in places.items() if place == file}
            save_file(held, path / file, metadata={"format": "pt"})
        shards(path, places, tensors)
        index = {"metadata": {}, "weight_map": places}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def both(*changes):
    def change(path):
        for one in changes:
            one(path)

    return change


def keep(*_args):
    """No change."""


def null(*names):
    """config.json with null as these values."""

    def change(path):
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict.fromkeys(names)))

    return change


def untie(tensors):
    """A head of its own."""
    tensors[HEAD] = tensors[EMBEDDING] * 0.7 + 0.1


def cast(dtype):
    return weights(lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))


def with_biases(module):
    """A bias for each weight of the module."""
    name = re.compile(rf"\.{re.escape(module)}.*weight$")

    def edit(tensors):
        for weight in [key for key in tensors if name.search(key)]:
            tensors[weight.replace("weight", "bias")] = torch.linspace(-1, 1, len(tensors[weight]))

    return weights(edit)


def put(name, value):
    def edit(tensors):
        tensors[name][0, 0] = value

    return weights(edit)


Q, K, EMBEDDING, HEAD = (
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
)
ORIGINAL = {"original_max_position_embeddings": 128}
YARN = {"original_max_position_embeddings": 64, "attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def stale_index(path):
    """A single file beside the index of an older, sharded copy."""
    single = (path / "model.safetensors").read_bytes()
    weights(lambda t: t[Q].mul_(2), shards=keep)(path)
    (path / "model.safetensors").write_bytes(single)


def pickled(path):
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def truncated(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


# name → (family, change, None if the logits are those of transformers, else words of the refusal)
TABLE = {
    # ---- settings ----
    "phi3 without a window": ("phi3", config(sliding_window=None), None),
    "phi3 of long contexts": (
        "phi3",
        both(rope(type="longrope", short_factor=[1.5] * 8, long_factor=[2.0] * 8), config(**ORIGINAL)),
        None,
    ),
    "phi3 with too few factors": (
        "phi3",
        both(rope(type="longrope", short_factor=[1.5] * 4, long_factor=[2.0] * 4), config(**ORIGINAL)),
        "has 4 short factors; 8 channels rotate",
    ),
    "phi3 scaled linearly": ("phi3", rope(type="linear", factor=2.0), "phi3 has longrope"),
    "phi3 that rotates a part": (
        "phi3",
        config(partial_rotary_factor=0.5, rope_parameters=None, rope_theta=5000.0),
        None,
    ),
    "phi3 that rotates a part as a parameter": (
        "phi3",
        config(rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}),
        None,
    ),
    "phi3 of an original length": ("phi3", config(original_max_position_embeddings=64), None),
    "smollm3 whose every second layer does not rotate": ("smollm3", config(no_rope_layers=[1, 0, 1, 0]), None),
    "smollm3 whose layers all rotate": ("smollm3", config(no_rope_layers=[1, 1, 1, 1]), None),
    "smollm3 by its interval": ("smollm3", config(no_rope_layers=None, no_rope_layer_interval=3), None),
    "smollm3 with another pattern": ("smollm3", config(no_rope_layers=[0, 1, 1, 0]), None),
    "smollm3 with a pattern of other numbers": ("smollm3", config(no_rope_layers=[2, 1]), "no_rope_layers="),
    "smollm3 with a window": (
        "smollm3",
        config(use_sliding_window=True, sliding_window=8, layer_types=None),
        None,
    ),
    "smollm3 with a window that is off": ("smollm3", config(use_sliding_window=False, sliding_window=8), None),
    "smollm3 with layers of windows": (
        "smollm3",
        config(layer_types=["full_attention", "sliding_attention"] * 2, use_sliding_window=True, sliding_window=8),
        None,
    ),
    "smollm3 with layers of windows without one": (
        "smollm3",
        config(layer_types=["full_attention", "sliding_attention"] * 2),
        "without use_sliding_window",
    ),
    "smollm3 without a base of its positions": ("smollm3", config(rope_parameters=None), None),
    "smollm3 with biases": ("smollm3", both(config(attention_bias=True), with_biases("self_attn.")), None),
    "rope of transformers 4": ("llama", rope(), None),
    "rope linear": ("llama", rope(type="linear", factor=3.0), None),
    "rope llama3": ("llama", rope(rope_type="llama3", **LLAMA3), None),
    "rope llama3 as parameters": (
        "qwen2",
        config(rope_parameters={"rope_type": "llama3", "rope_theta": 5000.0, **LLAMA3}),
        None,
    ),
    "rope dynamic": ("llama", rope(type="dynamic", factor=2.0), None),
    "rope yarn": ("qwen3", rope(rope_type="yarn", factor=4.0), None),
    "rope yarn of long texts": (
        "qwen3",
        rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=512),
        None,
    ),
    "rope yarn with its settings": ("qwen3", rope(rope_type="yarn", factor=8.0, **YARN), None),
    "rope yarn with scales": ("llama", rope(rope_type="yarn", factor=8.0, mscale=0.7, mscale_all_dim=0.4), None),
    "rope yarn without rounding": ("llama", rope(rope_type="yarn", factor=8.0, truncate=False), None),
    "rope of an unknown kind": ("llama", rope(rope_type="xpos", factor=2.0), "rope scaling 'xpos' is not supported"),
    "rope longrope": (
        "llama",
        rope(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8, factor=2.0),
        None,
    ),
    "rope llama3 without a factor": ("llama", rope(rope_type="llama3", factor=4.0), "'llama3' lacks"),
    "rope with another key": ("llama", rope(rope_type="linear", factor=2.0, beta_fast=32), "with beta_fast=32"),
    "rope by layer type": (
        "qwen3",
        config(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}),
        "with full_attention=",
    ),
    "both forms of rope": (
        "llama",
        config(rope_scaling={"type": "linear", "factor": 2.0}),
        "both rope_parameters and rope_scaling",
    ),
    "partial rotary": ("llama", config(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    "interleaved rotary": ("llama", config(rope_interleaved=True), "rope_interleaved=True"),
    "no key-value heads": ("llama", config(num_key_value_heads=None), "do not fit its config.json"),
    "no norm epsilon": ("llama", config(rms_norm_eps=None), "lacks or misstates 'rms_norm_eps'"),
    "another norm epsilon": ("qwen2", config(rms_norm_eps=0.01), None),
    "no activation": ("llama", config(hidden_act=None), None),
    "another activation": ("llama", config(hidden_act="gelu"), "hidden_act='gelu' is not supported"),
    "biases that are not stored": ("llama", config(attention_bias=True), "missing"),
    "biases of attention": ("llama", both(config(attention_bias=True), with_biases("self_attn.")), None),
    "biases of the mlp": ("llama", both(config(mlp_bias=True), with_biases("mlp.")), None),
    "a bias setting that the family lacks": ("qwen2", config(mlp_bias=True), "mlp_bias=True"),
    "attention bias of mistral": ("mistral", config(attention_bias=True), "attention_bias=True"),
    "soft cap": ("llama", config(final_logit_softcapping=30.0), "final_logit_softcapping=30.0"),
    "a soft cap that is off": ("llama", config(final_logit_softcapping=None), None),
    "scales": ("llama", config(embedding_multiplier=12.0), "embedding_multiplier=12.0"),
    "a key of nobody": ("qwen3", config(use_value_residual=True), "use_value_residual=True"),
    "experts": ("llama", config(num_local_experts=8), "num_local_experts=8"),
    "another window": ("mistral", config(sliding_window=7), None),
    "no window": ("qwen2-window", config(use_sliding_window=False, layer_types=None), None),
    "a window in other layers": (
        "qwen2-window",
        config(layer_types=["sliding_attention", "full_attention"] * 2),
        None,
    ),
    "layers of another kind": (
        "qwen2-window",
        config(layer_types=["chunked_attention", "full_attention"] * 2),
        "layer_types=",
    ),
    "too few kinds of layers": ("gemma2", config(layer_types=["full_attention"]), "layer_types="),
    "gemma by its old activation": ("gemma", config(hidden_act="gelu"), None),
    "gemma without an activation": ("gemma", config(hidden_act=None), None),
    "gemma with another activation": ("gemma", config(hidden_act="silu"), "hidden_act='silu'"),
    "gemma with biases": ("gemma", both(config(attention_bias=True), with_biases("self_attn.")), None),
    "gemma that looks ahead": ("gemma", config(use_bidirectional_attention=True), "use_bidirectional_attention"),
    "gemma untied": ("gemma", both(config(tie_word_embeddings=False), weights(untie)), None),
    "gemma with biases of its MLP": ("gemma", both(config(mlp_bias=True), with_biases("mlp.")), "mlp_bias=True"),
    "gemma2 without soft caps": (
        "gemma2",
        null("attn_logit_softcapping", "final_logit_softcapping"),
        None,
    ),
    "gemma2 by default": (
        "gemma2",
        config(attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=None),
        None,
    ),
    "gemma2 with all windows": ("gemma2", config(layer_types=["sliding_attention"] * 4), None),
    "gemma2 without windows": ("gemma2", config(layer_types=["full_attention"] * 4), None),
    "gemma2 by its pattern": ("gemma2", config(layer_types=None), None),
    "gemma2 with another window": ("gemma2", config(sliding_window=7), None),
    "gemma2 with the exact activation": ("gemma2", config(hidden_activation="gelu"), "hidden_activation='gelu'"),
    "gemma2 with its activation twice": ("gemma2", config(hidden_act="gelu_pytorch_tanh"), None),
    "gemma2 with the window twice": ("gemma2", config(sliding_window_size=24), None),
    "gemma2 with two windows": ("gemma2", config(sliding_window_size=25), "sliding_window_size=25"),
    "gemma2 with windows of nothing": ("gemma2", null("sliding_window"), "sliding_window=null"),
    "gemma3 by an inner pattern": (
        "gemma3_text",
        config(layer_types=None, sliding_window_pattern=None, _sliding_window_pattern=3),
        "_sliding_window_pattern=3",
    ),
    "gemma3 of transformers 4, scaled by an older key": (
        "gemma3_text",
        config(rope_parameters=None, rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 8.0}),
        "reads `rope_type` only",
    ),
    "gemma2 with another activation": ("gemma2", config(hidden_activation="silu"), "hidden_activation='silu'"),
    "gemma2 with a soft cap below zero": ("gemma2", config(final_logit_softcapping=-1.0), "logit_softcap must be"),
    "gemma3 of transformers 4": (
        "gemma3_text",
        config(rope_parameters=None, rope_theta=5000.0, rope_local_base_freq=300.0, layer_types=None),
        None,
    ),
    "gemma3 of transformers 4, scaled": (
        "gemma3_text",
        config(rope_parameters=None, rope_theta=5000.0, rope_scaling={"rope_type": "linear", "factor": 8.0}),
        None,
    ),
    "gemma3 by its pattern": ("gemma3_text", config(layer_types=None, sliding_window_pattern=2), None),
    "gemma3 with a soft cap of logits": ("gemma3_text", config(final_logit_softcapping=2.0), None),
    "gemma3 with one of scores": (
        "gemma3_text",
        config(attn_logit_softcapping=2.0),
        "attn_logit_softcapping is not supported",
    ),
    "gemma3 with a scaled window": (
        "gemma3_text",
        config(
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            }
        ),
        "in the layers with a window",
    ),
    "gemma3 with pictures": ("gemma3_text", config(model_type="gemma3"), "model family 'gemma3'"),
    "granite without factors": (
        "granite",
        config(embedding_multiplier=None, attention_multiplier=None, residual_multiplier=None, logits_scaling=None),
        None,
    ),
    "granite with biases": (
        "granite",
        both(config(attention_bias=True, mlp_bias=True), both(with_biases("self_attn."), with_biases("mlp."))),
        None,
    ),
    "granite of zero": ("granite", config(embedding_multiplier=0.0), "embedding_scale must be"),
    "granite that divides by zero": ("granite", config(logits_scaling=0.0), "lacks or misstates"),
    "olmo2 with biases of attention": (
        "olmo2",
        both(
            config(attention_bias=True),
            with_biases("self_attn.q_proj"),
            with_biases("self_attn.k_proj"),
            with_biases("self_attn.v_proj"),
            with_biases("self_attn.o_proj"),
        ),
        None,
    ),
    "olmo2 with a window": ("olmo2", config(sliding_window=8), "sliding_window=8"),
    "olmoe that clips": ("olmoe", config(clip_qkv=8.0), "clip_qkv=8.0"),
    "olmoe whose shares sum to one": ("olmoe", config(norm_topk_prob=True), None),
    "olmoe with one expert a token": ("olmoe", config(num_experts_per_tok=1), None),
    "olmoe with all experts": ("olmoe", config(num_experts_per_tok=6), None),
    "olmoe with more experts a token than there are": (
        "olmoe",
        config(num_experts_per_tok=7),
        "experts_per_token must be an integer in 1…6",
    ),
    "olmoe with too few experts": ("olmoe", config(num_experts=5), "do not fit its config.json"),
    "olmoe without a number of experts": ("olmoe", config(num_experts=None), "lacks or misstates 'num_experts'"),
    "qwen3_moe without dense layers": ("qwen3_moe", config(mlp_only_layers=[]), "do not fit its config.json"),
    "qwen3_moe with two numbers of experts": (
        "qwen3_moe",
        config(num_experts=6, num_local_experts=5),
        "must have one number of experts",
    ),
    "qwen3_moe by an older name": ("qwen3_moe", config(num_experts=5, num_local_experts=None), None),
    "qwen3_moe whose shares do not sum to one": ("qwen3_moe", config(norm_topk_prob=False), None),
    "qwen3_moe with a window": ("qwen3_moe", config(use_sliding_window=True, sliding_window=8), "use_sliding_window"),
    "qwen3_moe by its step": ("qwen3_moe", config(decoder_sparse_step=0), "decoder_sparse_step=0"),
    "a window in a family without": ("llama", config(sliding_window=7), "sliding_window=7"),
    "unknown family": ("llama", config(model_type="cohere"), "model family 'cohere'"),
    "gpt2 attention by layer": (
        "gpt2",
        config(scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx",
    ),
    "gpt2 unscaled attention": ("gpt2", config(scale_attn_weights=False), "scale_attn_weights=False"),
    "gpt2 relu": ("gpt2", config(activation_function="relu"), "activation_function='relu'"),
    "gpt2 cross attention": ("gpt2", config(add_cross_attention=True), "add_cross_attention=True"),
    "gpt2 upcast": ("gpt2", config(reorder_and_upcast_attn=True), None),
    "gpt2 width": ("gpt2", config(n_inner=100), "do not fit its config.json"),
    "neox with the approximate activation": ("gpt_neox", config(hidden_act="gelu_new"), None),
    "neox relu": ("gpt_neox", config(hidden_act="relu"), "hidden_act='relu'"),
    "neox layer by layer": ("gpt_neox", config(use_parallel_residual=False), None),
    "neox as transformers 4 writes it": (
        "gpt_neox",
        config(rope_parameters=None, rotary_pct=0.25, rotary_emb_base=5000),
        None,
    ),
    "neox without rotary keys": ("gpt_neox", config(rope_parameters=None, rotary_pct=None), None),
    "neox that rotates by another name": ("gpt_neox", config(partial_rotary_factor=0.25), "partial_rotary_factor=0.25"),
    "neox that rotates three channels": (
        "gpt_neox",
        config(rope_parameters=None, rotary_pct=0.1),
        "rotary_size must be even",
    ),
    "neox with fewer heads of keys": ("gpt_neox", config(num_key_value_heads=1), "num_key_value_heads=1"),
    "neox without biases of attention": (
        "gpt_neox",
        config(attention_bias=False),
        "weights that its family does not use",
    ),
    "neox with another theta": ("gpt_neox", config(rope_theta=500.0), "rope_theta=500.0"),
    "neox with the buffers of old files": (
        "gpt_neox",
        weights(
            lambda t: t.update(
                {f"gpt_neox.layers.0.attention.{name}": torch.ones(1) for name in ("bias", "masked_bias")}
            )
        ),
        None,
    ),
    "neox with yarn": (
        "gpt_neox",
        config(
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "partial_rotary_factor": 0.5,
                "factor": 2.0,
                "original_max_position_embeddings": 256,
            }
        ),
        None,
    ),
    "neox with two parts that rotate": ("gpt_neox", config(rotary_pct=0.25), "rotary_pct and partial_rotary_factor"),
    "neox with a part in words": (
        "gpt_neox",
        config(rope_parameters=None, rotary_pct="0.25"),
        "must be a number above 0 and at most 1, got '0.25'",
    ),
    "neox with a part that is no number": (
        "gpt_neox",
        config(rope_parameters=None, rotary_pct=float("nan")),
        "must be a number above 0 and at most 1",
    ),
    "neox with the head of transformers 5": (
        "gpt_neox",
        weights(lambda t: t.update({"lm_head.weight": t.pop("embed_out.weight")})),
        None,
    ),
    "neox's buffers in llama": (
        "llama",
        weights(lambda t: t.update({"model.layers.0.attention.bias": torch.ones(1)})),
        "weights that its family does not use",
    ),
    "gpt2's buffers": ("gpt2", weights(lambda t: t.update({"transformer.h.0.attn.masked_bias": torch.ones(1)})), None),
    "falcon with yarn and no context": (
        "falcon",
        config(
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        ),
        None,
    ),
    "falcon with a flag in words": ("falcon", config(new_decoder_architecture="no"), "new_decoder_architecture='no'"),
    "falcon of all heads with few": ("falcon", config(multi_query=False, num_kv_heads=2), "num_kv_heads=2"),
    "falcon with another factor": ("falcon", config(ff_factor=4), "ff_factor=4"),
    "falcon with its factor": ("falcon", config(ff_factor=2), None),
    "falcon by its old positions": ("falcon", config(alibi=True), "alibi=True"),
    "falcon layer by layer": ("falcon", config(parallel_attn=False), "missing"),
    "falcon with all heads of keys": ("falcon", config(multi_query=False), "shapes"),
    "falcon with two norms": ("falcon", config(num_ln_in_parallel_attn=2), "no Falcon has it"),
    "falcon with three norms": ("falcon-new", config(num_ln_in_parallel_attn=3), "no Falcon has it"),
    "new falcon with one norm": (
        "falcon-new",
        config(num_ln_in_parallel_attn=1),
        "weights that its family does not use",
    ),
    "new falcon that is not parallel": ("falcon-new", config(parallel_attn=False), "no Falcon has it"),
    "new falcon with one head of keys": ("falcon-new", config(num_kv_heads=1), "shapes"),
    "falcon without an epsilon": ("falcon", config(layer_norm_epsilon=None), "lacks or misstates"),
    "falcon with another width": ("falcon", config(ffn_hidden_size=None), "shapes"),
    "falcon with theta": ("falcon", config(rope_parameters=None, rope_theta=700.0), None),
    "falcon relu": ("falcon", config(activation="relu"), "activation='relu'"),
    "falcon with a scaling": ("falcon", rope(type="linear", factor=2.0), None),
    # ---- values of other types, or out of range ----
    "no heads": ("llama", config(num_attention_heads=0), "num_heads must be an integer in 1"),
    "no heads and no head size": ("llama", config(num_attention_heads=0, head_dim=None), "lacks or misstates"),
    "heads in words": ("llama", config(num_attention_heads="4"), "num_heads must be an integer .*, got '4'"),
    "epsilon in words": ("llama", config(rms_norm_eps="x"), "norm_eps must be a finite number above 0, got 'x'"),
    "theta in words": ("llama", config(rope_parameters=None, rope_theta="x"), "rope_theta must be a finite number"),
    "rope as a list": ("llama", config(rope_parameters=[1]), "lacks or misstates"),
    "a factor of 0": ("llama", rope(type="linear", factor=0.0), "factor must be a finite number above 0, got 0.0"),
    "a flag in words": ("llama", config(tie_word_embeddings="false"), "tied_head must be true or false, got 'false'"),
    "uneven groups of heads": ("llama", config(num_key_value_heads=3), "must be a multiple of num_kv_heads"),
    "odd heads": ("llama", config(head_dim=15), "head_size must be even"),
    # ---- weights ----
    "float16": ("llama", cast(torch.float16), None),
    "bfloat16": ("gpt2", cast(torch.bfloat16), None),
    "float8": ("llama", cast(torch.float8_e4m3fn), "is F8_E4M3"),
    "integers": ("llama", cast(torch.int8), "is I8"),
    "missing": ("llama", weights(lambda t: t.pop(Q)), r"missing \['model.layers.1.self_attn.q_proj.weight'\]"),
    "missing norm": ("qwen3", weights(lambda t: t.pop("model.layers.0.self_attn.q_norm.weight")), "missing"),
    "extra": (
        "llama",
        weights(lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(64)})),
        "weights that its family does not use",
    ),
    "extra layer": (
        "llama",
        weights(lambda t: t.update({name.replace(".3.", ".4."): t[name] for name in list(t) if ".3." in name})),
        "weights that its family does not use",
    ),
    "extra in gpt2": (
        "gpt2",
        weights(lambda t: t.update({"transformer.h.0.ln_cross_attn.weight": torch.ones(64)})),
        "which no gpt2 decoder has",
    ),
    "buffers": (
        "llama",
        weights(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})),
        None,
    ),
    "wrong shape": ("llama", weights(lambda t: t.update({K: t[K][:16]})), "shapes"),
    "twice": (
        "gpt2",
        weights(lambda t: t.update({"wte.weight": t["transformer.wte.weight"] * 2})),
        "stores 'model.embed_tokens.weight' twice",
    ),
    "nan": ("llama", put(Q, float("nan")), "holds NaN or infinite values"),
    "infinite": ("gpt2", put("transformer.h.1.mlp.c_fc.weight", float("inf")), "holds NaN or infinite values"),
    "infinite in float16": (
        "llama",
        both(cast(torch.float16), put(EMBEDDING, float("-inf"))),
        "holds NaN or infinite values",
    ),
    "tied, and the same head": ("llama", weights(lambda t: t.update({HEAD: t[EMBEDDING].clone()})), None),
    "tied, and another head": (
        "llama",
        weights(lambda t: t.update({HEAD: t[EMBEDDING].flip(0)})),
        "a different head is stored",
    ),
    "a head and no embedding": (
        "llama",
        weights(lambda t: t.update({HEAD: t.pop(EMBEDDING)})),
        r"missing \['model.embed_tokens.weight'\]",
    ),
    "untied without a head": ("llama", config(tie_word_embeddings=False), r"missing \['lm_head.weight'\]"),
    "untied with a head": (
        "llama",
        both(config(tie_word_embeddings=False), weights(lambda t: t.update({HEAD: t[EMBEDDING].flip(0)}))),
        None,
    ),
    "shards": ("llama", weights(keep, shards=keep), None),
    "a shard is gone": (
        "llama",
        weights(keep, shards=lambda path, *_: (path / "model-00002-of-00002.safetensors").unlink()),
        "model-00002-of-00002.safetensors' does not exist",
    ),
    "a tensor that only the index has": (
        "llama",
        weights(
            keep, shards=lambda path, places, _: places.update({"model.extra": "model-00001-of-00002.safetensors"})
        ),
        "do not hold the same tensors",
    ),
    "a tensor that the index lacks": (
        "llama",
        weights(keep, shards=lambda path, places, _: places.pop(Q)),
        "do not hold the same tensors",
    ),
    "an index of another directory": (
        "llama",
        weights(keep, shards=lambda path, places, _: places.update({Q: "../model.safetensors"})),
        "outside of the model's directory",
    ),
    "a file beside an older index": ("llama", stale_index, "delete the older of the two"),
    "pickled": ("llama", pickled, "only safetensors are read"),
    "torn": ("llama", truncated, "torn or damaged"),
    "quantised by another method": (
        "llama",
        config(quantization_config={"quant_method": "quip", "bits": 4}),
        "quantised by 'quip' are not supported",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_changed_directory_is_transformers_or_refused(tiny_model_dir, tmp_path, name):
    family, change, words = TABLE[name]
    path = shutil.copytree(tiny_model_dir(family), tmp_path / "model")
    change(path)
    if words is not None:
        with pytest.raises(MotetError, match=words):
            Decoder.from_dir(path)
        return
    with torch.no_grad():
        found = Decoder.from_dir(path).double()(torch.tensor(TEXT))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        )
        assert relative_error(found, theirs(torch.tensor(TEXT)).logits) < LIMIT


@pytest.mark.parametrize(
    ("generation", "in_config", "tokenizer", "expected"),
    [
        (None, None, None, ()),
        (258, 258, "<|im_end|>", (258,)),
        (None, 256, "<|im_end|>", (256, 258)),
        ([256], None, "<|im_end|>", (256, 258)),
        ([258, 256], 257, None, (258, 256, 257)),
        (None, None, "<|nowhere|>", ()),
    ],
)
def test_ends_of_text_are_the_union_of_what_the_files_say(
    tiny_model_dir, tmp_path, generation, in_config, tokenizer, expected
):
    path = shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    config(eos_token_id=in_config)(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokenizer}))
    assert eos_token_ids(path, Tokenizer.from_dir(path).eos_token_id) == expected


@pytest.mark.parametrize("value", [320, -1, "258", [258, 1.5]])
def test_an_end_of_text_outside_of_the_vocabulary_is_refused(tiny_model_dir, tmp_path, value):
    path = shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(MotetError, match=r"eos_token_id .*; an id is an integer in 0…319"):
        eos_token_ids(path, None)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tiny_model_dir):
    tokenizer = Tokenizer.from_dir(tiny_model_dir("llama"))
    tokenizer.check_ids(259)
    with pytest.raises(BundleError, match=r"gives '<\|im_end\|>' the id 258, and the model has 258 embeddings"):
        tokenizer.check_ids(258)
