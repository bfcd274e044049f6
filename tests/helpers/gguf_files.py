"""GGUF files of model directories: keys and tensors as llama.cpp's converter names and arranges them, written independently of
Motet's reader."""

from __future__ import annotations

import json
import re

import gguf
import numpy as np
from safetensors.torch import load_file

from helpers.models import VOCAB_SIZE, write_model

MODULES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "post_attention_layernorm of olmo2": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm",
    "post_attention_layernorm of gemma2": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_attention_layernorm of gemma3": "post_attention_norm",
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm", "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
    "embed_in": "token_embd", "embed_out": "output", "final_layer_norm": "output_norm",
    "word_embeddings": "token_embd", "ln_mlp": "attn_norm", "ln_attn": "attn_norm_2",
    **{f"{name}.query_key_value": "attn_qkv" for name in ("attention", "self_attention")},
    **{f"{name}.dense": "attn_output" for name in ("attention", "self_attention")},
    "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down",
}  # fmt: skip
OWN_KEYS = {
    "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling", "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size",
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window", "use_parallel_residual": "use_parallel_residual",
}  # fmt: skip
ARCHITECTURES = {"qwen3_moe": "qwen3moe", "gemma3_text": "gemma3", "gpt_neox": "gptneox"}
PERMUTED = ("llama", "granite", "smollm3")
# name → (family of helpers.models, other values of config.json): models as llama.cpp can have them
MODELS = {
    "falcon of 40B": ("falcon-new", {"bias": False}),
    "falcon 2": ("falcon-new", {"bias": False, "num_ln_in_parallel_attn": 1}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16}),  # the size of a head, which no file has
    "gemma2 of 27B": (
        "gemma2",
        {
            "num_hidden_layers": 46,
            "head_dim": 32,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 23,
        },
    ),
    "gemma3_text": ("gemma3_text", {"query_pre_attn_scalar": 16}),
    "olmo2 untied": ("olmo2", {"tie_word_embeddings": False}),
    "olmoe untied": ("olmoe", {"tie_word_embeddings": False, "num_key_value_heads": 16}),
    "phi3 without a window": ("phi3", {"sliding_window": None}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": []}),
}
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_model(root, name, **options):
    """The directory of a model of `MODELS`, or of a family, made once below `root`."""
    family, changes = MODELS.get(name, (name, {}))
    path = root / name.replace(" ", "-")
    return path if path.exists() else write_model(path, family, **{**changes, **options})


class File:
    """What is written: `keys` of the architecture, `others`, `tensors` by name, `types` of tensors that are not float32."""

    def __init__(self, model_dir):
        self.config = config = json.loads((model_dir / "config.json").read_text())
        self.architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
        self.is_gpt2 = self.architecture == "gpt2"
        names = ("n_layer", "n_head", "n_embd") if self.is_gpt2 else _NAMES
        layers, self.heads, self.hidden = (config[key] for key in names)
        self.kv_heads = config.get("num_key_value_heads", self.heads)
        if self.architecture == "falcon":
            self.kv_heads = config["num_kv_heads"] if config["new_decoder_architecture"] else 1
        self.keys = {"block_count": layers, "attention.head_count": self.heads, "embedding_length": self.hidden}
        self.keys |= {"context_length": config.get("max_position_embeddings", 512)}
        self.keys |= self._layer_norm_keys() if "rms_norm_eps" not in config else self._rms_norm_keys()
        self.keys |= {key: config[name] for key, name in OWN_KEYS.items() if config.get(name) is not None}
        if "num_local_experts" in config:
            self.keys["expert_count"] = config["num_local_experts"]
        self.others = {"general.name": "tiny", "general.file_type": 0}
        self.others |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
        self.others |= {"tokenizer.ggml.eos_token_id": 258, "tokenizer.ggml.bos_token_id": 256}
        self.others |= {"tokenizer.ggml.tokens": tokens(), "tokenizer.ggml.merges": ["a b", "ab c", "Ġ a"]}
        self.tensors, stacks = {}, {}
        for name, tensor in load_file(model_dir / "model.safetensors").items():
            module, _, kind = re.sub(r"^(transformer|gpt_neox)\.", "", name).rpartition(".")
            parts = re.sub(r"^(model\.layers|layers|h)\.", "", module).split(".", 1)
            expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)_proj", parts[-1])
            if expert:
                stacks.setdefault(f"blk.{parts[0]}.ffn_{expert[2]}_exps.weight", {})[int(expert[1])] = tensor.numpy()
                continue
            inside = f"{parts[1]} of {self.architecture}" if parts[0].isdigit() else ""
            known = f"blk.{parts[0]}.{MODULES.get(inside, MODULES.get(parts[-1]))}" if inside else MODULES[module]
            self.tensors[f"{known}.{kind}"] = np.ascontiguousarray(self._arranged(known, tensor.numpy()))
        self.tensors |= {name: np.stack([stack[i] for i in sorted(stack)]) for name, stack in stacks.items()}
        self.tensors |= self._factors()
        self.types = {}

    def _layer_norm_keys(self):
        config, size = self.config, self.hidden // self.heads
        if self.is_gpt2:
            own = {"context_length": 512, "feed_forward_length": config.get("n_inner") or 4 * self.hidden}
        elif self.architecture == "falcon":
            own = {"feed_forward_length": config["ffn_hidden_size"], "attention.head_count_kv": self.kv_heads}
            own |= {"tensor_data_layout": "jploski", "rope.freq_base": config["rope_parameters"]["rope_theta"]}
        else:
            part = config["rope_parameters"]["partial_rotary_factor"]
            own = {"feed_forward_length": config["intermediate_size"], "rope.dimension_count": int(size * part)}
        return own | {"attention.layer_norm_epsilon": config.get("layer_norm_eps", config.get("layer_norm_epsilon"))}

    def _rms_norm_keys(self):
        config = self.config
        size = config.get("head_dim") or self.hidden // self.heads
        rope = config["rope_parameters"]
        full = rope.get("full_attention", rope)
        own = {"feed_forward_length": config["intermediate_size"], "attention.head_count_kv": self.kv_heads}
        own |= {"attention.key_length": size, "attention.value_length": size}
        own |= {"attention.layer_norm_rms_epsilon": config["rms_norm_eps"], "rope.freq_base": full["rope_theta"]}
        own["rope.dimension_count"] = int(size * full.get("partial_rotary_factor", 1.0))
        if full["rope_type"] == "linear":
            own |= {"rope.scaling.type": "linear", "rope.scaling.factor": full["factor"]}
        if "sliding_attention" in rope:
            own["rope.freq_base_swa"] = rope["sliding_attention"]["rope_theta"]
        if self.architecture in ("gemma2", "gemma3"):
            own["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config["layer_types"]]
        if self.architecture == "phi3":
            own["rope.scaling.original_context_length"] = config["original_max_position_embeddings"]
            own["attention.sliding_window"] = 0
        return own

    def _factors(self):
        rope = self.config.get("rope_parameters") or {}
        if rope.get("rope_type") != "longrope":
            return {}
        whole, original = self.config["max_position_embeddings"], self.config["original_max_position_embeddings"]
        self.keys["rope.scaling.attn_factor"] = float(np.sqrt(1 + np.log(whole / original) / np.log(original)))
        return {
            f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32) for kind in ("short", "long")
        }

    def _arranged(self, name, values):
        if self.is_gpt2 and values.ndim == 2 and name.startswith("blk."):
            return values.T
        if self.architecture in PERMUTED and name.endswith(("attn_q", "attn_k")):
            count = self.heads if name.endswith("q") else self.kv_heads
            return values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if self.architecture in ("gptneox", "falcon") and name.endswith("attn_qkv"):
            groups = self.heads if self.architecture == "gptneox" else self.kv_heads
            own = values.reshape(groups, self.heads // groups + 2, self.hidden // self.heads, *values.shape[1:])
            parts = own[:, :-2], own[:, -2:-1], own[:, -1:]
            return np.concatenate([part.reshape(-1, *values.shape[1:]) for part in parts])
        if self.architecture.startswith("gemma") and name.endswith("norm"):
            return values + 1
        return values

    def write(self, path):
        keys = {f"{self.architecture}.{key}": value for key, value in self.keys.items()}
        write_file(path, self.architecture, keys | self.others, self.tensors, self.types)


_NAMES = ("num_hidden_layers", "num_attention_heads", "hidden_size")


def tokens():
    """A byte-level vocabulary with three merges and three special tokens."""
    from tokenizers import pre_tokenizers

    known = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *_SPECIAL, "ab", "abc", "Ġa"]
    return [*known, *(f"[unused{i}]" for i in range(len(known), VOCAB_SIZE))]


def write_file(path, architecture, metadata, tensors=(), types=()):
    """A GGUF file of `metadata`, without those that are None, and `tensors`, in float32 or rounded to `types`."""
    writer = gguf.GGUFWriter(path, architecture)
    tensors, types = dict(tensors), dict(types)
    for key, value in metadata.items():
        if value is None or key.startswith("GGUF.") or key == "general.architecture":
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for name, values in tensors.items():
        kind = types.get(name)
        if kind is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
