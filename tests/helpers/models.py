"""Tiny random models of every family, a byte-level tokenizer, and tails and adapters for them."""

from __future__ import annotations

import json
from pathlib import Path

VOCAB_SIZE = 320
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = (
    *("llama", "llama-untied", "mistral", "qwen2", "qwen2-window", "qwen2-yarn", "qwen3", "phi3", "phi3-long"),
    *("smollm3", "granite", "olmo2", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "falcon", "falcon-new"),
)
EXPERTS = ("olmoe", "qwen3_moe")  # which the cpu and torch backends compute
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1000.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2, 1.4, 2.0, 3.0, 4.0, 6.0],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
}
WINDOW = 24  # positions that a row of mistral and of qwen2-window's later layers sees


def write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer: ids 0…255 are bytes, then the special tokens."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))


def tiny_config(family: str) -> object:
    """A transformers configuration: 4 layers, hidden 64, vocabulary 320."""
    import transformers

    if family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=VOCAB_SIZE, n_embd=64, n_layer=4, n_head=4, n_positions=512, eos_token_id=258, bos_token_id=256
        )
    sizes: dict[str, object] = {"hidden_size": 64, "num_hidden_layers": 4, "max_position_embeddings": 512}
    ids = {"vocab_size": VOCAB_SIZE, "eos_token_id": 258, "bos_token_id": 256}
    if family == "gpt_neox":
        own_sizes = {"num_attention_heads": 2, "intermediate_size": 128, "rotary_pct": 0.5}
        return transformers.GPTNeoXConfig(**sizes, **ids, **own_sizes)
    if family.startswith("falcon"):
        new = family == "falcon-new"
        kind_of = {"new_decoder_architecture": new, "num_kv_heads": 2 if new else None, "bias": new}
        return transformers.FalconConfig(**sizes, **ids, **kind_of, num_attention_heads=4, ffn_hidden_size=128)
    name, _, kind = family.partition("-")
    cls = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "phi3": transformers.Phi3Config,
        "smollm3": transformers.SmolLM3Config,
        "granite": transformers.GraniteConfig,
        "olmo2": transformers.Olmo2Config,
        "gemma": transformers.GemmaConfig,
        "gemma2": transformers.Gemma2Config,
        "gemma3_text": transformers.Gemma3TextConfig,
        "olmoe": transformers.OlmoeConfig,
        "qwen3_moe": transformers.Qwen3MoeConfig,
    }["qwen3_moe" if family == "qwen3_moe" else name]
    own: dict[str, object] = {
        "mistral": {"sliding_window": WINDOW},
        "phi3": {"sliding_window": WINDOW},
        "qwen2-window": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2},
        "qwen2-yarn": {"rope_parameters": YARN},
        "phi3-long": {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "rope_parameters": LONGROPE,
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 512,
        },
        "granite": {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.35,
            "logits_scaling": 2.5,
        },
        "olmoe": {"intermediate_size": 64, "num_experts": 6, "num_experts_per_tok": 2},
        "qwen3_moe": {
            "moe_intermediate_size": 96,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
        "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0},
        "gemma3_text": {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 20,
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
            },
        },
    }.get(family, {})
    common: dict[str, object] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": kind != "untied",
        "eos_token_id": 258,
        "bos_token_id": 256,
        "pad_token_id": 258 if name in ("phi3", "smollm3", "olmo2", "olmoe") else None,
    }
    return cls(**(common | own))


_WIDTHS = (
    *("hidden_size", "n_embd", "intermediate_size", "ffn_hidden_size", "moe_intermediate_size"),
    *("num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads"),
)


def write_model(path: Path, family: str, seed: int = 0, width: int = 1, **changes: object) -> Path:
    """A tiny random model directory. Norms and biases are random too, around their usual 1 and 0, which
    would hide mistakes. `width`: how many times as many channels and heads. `changes`: other values of config.json."""
    import torch
    import transformers

    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = tiny_config(family)
    wider = {n: width * own for n in _WIDTHS if isinstance(own := config.__dict__.get(n), int)}
    config.update(wider | changes)  # type: ignore[attr-defined]
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.15 / width**0.5)
    model.save_pretrained(path)
    write_tokenizer(path)
    return path


def make_tail(model_dir, out, name, seed, scale):
    """A tail of two layers: the base's, perturbed, so that members disagree as fine-tuned ones do."""
    import torch
    from motet.runtime.checkpoints.huggingface import checkpoint_digest, read_config, read_weights
    from motet.runtime.checkpoints.members.tail import write_tail

    config = read_config(model_dir)
    split = config.num_layers - 2
    generator = torch.Generator().manual_seed(seed)
    names = tuple(f"model.layers.{i}." for i in range(split, config.num_layers)) + ("model.norm.",)
    weights = {}
    for key, tensor in read_weights(model_dir).items():
        if key.startswith(names):
            weights[key] = tensor + scale * tensor.std().nan_to_num(0.1) * torch.randn(
                tensor.shape, generator=generator
            )
    base = {"name": model_dir.name, "digest": checkpoint_digest(model_dir)}
    write_tail(out, {"name": name, "split_layer": split, "base": base}, weights)
    return out


def make_adapter(model_dir, out, seed, targets=None, rank=4, layers=None):
    """A random adapter over these projections of the last `layers`; None: over all."""
    from motet.runtime.checkpoints.decoder import Decoder
    from motet.runtime.checkpoints.huggingface import checkpoint_digest
    from motet.runtime.checkpoints.members.adapter import random_adapter, write_adapter

    decoder = Decoder.from_dir(model_dir)
    adapter = random_adapter(decoder, targets, rank, seed=seed, scale=0.05)
    first = 0 if layers is None else decoder.config.num_layers - layers
    adapter = {name: tensor for name, tensor in adapter.items() if int(name.split(".")[2]) >= first}
    base = {"name": model_dir.name, "digest": checkpoint_digest(model_dir)}
    write_adapter(out, decoder.config, adapter, {"base": base})
    return out
