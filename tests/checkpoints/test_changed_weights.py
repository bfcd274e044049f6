"""Changed weights, values of a wrong type, and ends of text: each is what transformers makes of it, or is refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.changed_model import (
    EMBEDDING,
    HEAD,
    K,
    Q,
    both,
    cast,
    check_row,
    config,
    keep,
    pickled,
    put,
    rope,
    stale_index,
    truncated,
    weights,
)
from motet.runtime.checkpoints.huggingface import eos_token_ids
from motet.runtime.errors import BundleError, MotetError
from motet.runtime.text.tokenizer import Tokenizer

# name → (family, change, None if the logits are those of transformers, else words of the refusal)
TABLE = {
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
    check_row(tiny_model_dir(family), tmp_path / "model", change, words)


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
