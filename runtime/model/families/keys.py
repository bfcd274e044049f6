"""Which keys of config.json are read, and which others a decoder may have.

A key that a family reads is among its `Family.keys`. One that changes nothing a decoder computes is in `NEUTRAL`. Any other
key is refused by name unless it is null: it may change the computation, and the answers would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Collection

from ...errors import UnsupportedModelError, shown
from .family import Json

# How the weights were made and stored, and what programs do with the model. Special token ids are read elsewhere
# (`eos_token_ids`), the others from the tokenizer's files.
NEUTRAL = frozenset(
    [
        "model_type",
        "architectures",
        "auto_map",
        "_name_or_path",
        "name_or_path",
        "transformers_version",
        "unsloth_version",
        "unsloth_fixed",
        "torch_dtype",
        "dtype",
        "use_cache",
        "cache_implementation",
        "quantization_config",
        "compression_config",
        "pretraining_tp",
        "initializer_range",
        "gradient_checkpointing",
        "attention_dropout",
        "classifier_dropout",
        "attention_probs_dropout_prob",
        "hidden_dropout_prob",
        "custom_pipelines",
        "hidden_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "reorder_and_upcast_attn",
        "_attn_implementation",
        "attn_implementation",
        "_commit_hash",
        "_model_name_or_path",
        "bos_token_id",
        "unk_token_id",
        "cls_token_id",
        "mask_token_id",
        "eos_token_id",
        "pad_token_id",
        "_pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "tokenizer_class",
        "task_specific_params",
        "problem_type",
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "prefix",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "return_dict",
        "return_dict_in_generate",
        "torchscript",
        "use_bfloat16",
        "chunk_size_feed_forward",
        "is_decoder",
        "is_llama_config",
        "transformers.js_config",
        "_flash_attn_2_enabled",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "min_length",
        "max_length",
        "num_beams",
        "num_beam_groups",
        "num_return_sequences",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "early_stopping",
        "diversity_penalty",
        "bad_words_ids",
        "begin_suppress_tokens",
        "suppress_tokens",
        "exponential_decay_length_penalty",
        "remove_invalid_values",
        "tf_legacy_loss",
    ]
)

# Keys of other values than these change what is computed. The first value is that of an absent key.
NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "partial_rotary_factor": (1.0,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "lm_head_bias": (False,),
    "n_ctx": (None,),
}

ROPE_KEYS = frozenset({"rope_theta", "rope_type", "type"})
# Kind → its keys that must be there, and those that may be.
_ROPE_KINDS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, {"original_max_position_embeddings"}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor"},
        {
            *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
            *("mscale", "mscale_all_dim", "truncate"),
        },
    ),
    "longrope": (
        {"short_factor", "long_factor"},
        {"original_max_position_embeddings", "factor", "attention_factor"},
    ),
}


def check_keys_read(values: Json, read: Collection[str]) -> None:
    """Raises `UnsupportedModelError` for a key of config.json that is neither read nor known to change nothing."""
    for key, value in values.items():
        if key in read or key in NEUTRAL or value is None or value in NEUTRAL_VALUES.get(key, ()):
            continue
        raise UnsupportedModelError(
            f"config.json has {key}={shown(value)}, which family '{values['model_type']}' does not compute here; remove the "
            "key only if the model was trained without it"
        )


def check_rope(parameters: Json, allowed: Collection[str] = ()) -> None:
    """Raises `UnsupportedModelError` for a kind of rope_parameters or rope_scaling, or a key of it, that is not computed.
    `allowed`: further keys, which the caller reads."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _ROPE_KINDS:
        raise UnsupportedModelError(f"rope scaling {shown(kind)} is not supported; known are {sorted(_ROPE_KINDS)}")
    needed, optional = _ROPE_KINDS[kind]
    known = ROPE_KEYS | needed | optional | set(allowed)
    for key, value in parameters.items():
        if key not in known and value is not None and value not in NEUTRAL_VALUES.get(key, ()):
            raise UnsupportedModelError(f"rope scaling '{kind}' with {key}={shown(value)} is not supported")
    missing = sorted(name for name in needed if parameters.get(name) is None)
    if missing:
        raise UnsupportedModelError(f"rope scaling '{kind}' lacks {missing}")
