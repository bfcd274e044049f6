"""Changes of a model directory, and what a changed one must do: have the logits of transformers, or be refused by name."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import transformers
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.errors import MotetError
from safetensors.torch import load_file, save_file

from helpers.compare import relative_error

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


def check_row(model_dir, path, change, words):
    """A copy of the model directory at `path`, changed: it has the logits of transformers, or with `words` it is refused with
    them."""
    shutil.copytree(model_dir, path)
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
