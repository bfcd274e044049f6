"""The torch page against transformers, for every family; and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from helpers.compare import relative_error
from helpers.models import EXPERTS, FAMILIES, WINDOW
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import eos_token_ids, read_config, read_weights
from motet.runtime.errors import BundleError, ConfigError, NotFoundError, UnsupportedModelError
from motet.runtime.model.config import DecoderConfig
from motet.runtime.model.families import decoder_config
from motet.runtime.model.layout import decoder_layout

# What is left is transformers' rotary angles, which are float32: 1.1e-5 for the real model.
LIMIT = 3e-5


def error_against_transformers(model_dir, token_ids) -> float:
    """Both sides compute in float64: in float32 the difference is rounding, and how much of it depends on the CPU."""
    values = json.loads((model_dir / "config.json").read_text())
    # The grouped products of experts have no float64.
    own = {"experts_implementation": "eager"} if values["model_type"] in EXPERTS else {}
    reference = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64, **own).eval()
    with torch.no_grad():
        expected = reference(token_ids).logits
        found = Decoder.from_dir(model_dir).double()(token_ids)
    return relative_error(found, expected)


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_parity_with_transformers(tiny_model_dir, family):
    token_ids = torch.randint(0, 320, (2, 65), generator=torch.Generator().manual_seed(1))
    assert error_against_transformers(tiny_model_dir(family), token_ids) <= LIMIT


def test_parity_on_the_real_model(real_model_dir):
    token_ids = torch.randint(0, 49152, (1, 96), generator=torch.Generator().manual_seed(1))
    assert error_against_transformers(real_model_dir, token_ids) <= LIMIT


def test_llama3_rope_scaling(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    values = json.loads(path.read_text())
    values["rope_parameters"] = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    path.write_text(json.dumps(values))
    assert error_against_transformers(tmp_path / "m", torch.arange(100)[None]) <= LIMIT


def test_trunk_and_tail_are_the_whole(tiny_model_dir):
    decoder = Decoder.from_dir(tiny_model_dir("qwen3"))
    token_ids = torch.arange(30)[None]
    with torch.no_grad():
        hidden = decoder.run_layers(decoder.embed(token_ids), 0, 3)
        logits = decoder.head(decoder.norm(decoder.run_layers(hidden, 3, 4)))
        assert torch.equal(logits, decoder(token_ids))


def test_configuration(tiny_model_dir):
    config = read_config(tiny_model_dir("qwen3"))
    assert (config.family, config.qk_norm, config.num_kv_heads, config.head_size) == ("qwen3", "head", 2, 16)
    assert read_config(tiny_model_dir("qwen2")).qkv_bias
    windows = {"llama": [None] * 4, "mistral": [WINDOW] * 4, "qwen2-window": [None, None, WINDOW, WINDOW]}
    for family, expected in windows.items():
        layers = decoder_layout(read_config(tiny_model_dir(family))).layers
        assert [layer.window for layer in layers] == expected
    assert eos_token_ids(tiny_model_dir("llama"), None) == (258,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model family 'mamba' is not supported"),
        ({"hidden_act": "relu"}, "hidden_act"),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 2,
                "layer_types": ["chunked_attention", "full_attention"] * 2,
            },
            "layer_types",
        ),
    ],
)
def test_unsupported_models(tiny_model_dir, change, message):
    values = json.loads((tiny_model_dir("llama") / "config.json").read_text())
    with pytest.raises(UnsupportedModelError, match=message):
        decoder_config(values | change)


def test_long_contexts_by_an_older_name(tiny_model_dir):
    values = json.loads((tiny_model_dir("phi3-long") / "config.json").read_text())
    older = values | {"rope_parameters": values["rope_parameters"] | {"rope_type": "su"}}
    assert decoder_config(older) == decoder_config(values)
    assert decoder_config(values).max_position_embeddings == 512, "the context of short texts"


def test_the_context_of_yarn(tiny_model_dir):
    """The factor says how long texts may be, whether the length is written or not; qwen3's heads are 128 where that is not."""
    values = json.loads((tiny_model_dir("qwen2-yarn") / "config.json").read_text())
    own = values["rope_parameters"] | {"factor": 4.0, "original_max_position_embeddings": 512}
    for length in (512, 2048):
        written = values | {"rope_parameters": own, "max_position_embeddings": length}
        assert decoder_config(written).max_position_embeddings == 2048
    del own["original_max_position_embeddings"]
    assert decoder_config(values | {"rope_parameters": own}).max_position_embeddings == 512
    values = json.loads((tiny_model_dir("qwen3") / "config.json").read_text())
    del values["head_dim"]
    assert decoder_config(values).head_size == transformers.Qwen3Config().head_dim


def test_windows(tiny_model_dir):
    values = json.loads((tiny_model_dir("mistral") / "config.json").read_text())
    for window in (0, -1, 2.5, True, 2**31, "8"):
        with pytest.raises(ConfigError, match=f"sliding_window must be an integer in 1…2147483647 .* got {window!r}"):
            decoder_config(values | {"sliding_window": window})
    with pytest.raises(ConfigError, match="window_layers must be a list of layers in 0…3"):
        DecoderConfig.from_dict(decoder_config(values).to_dict() | {"window_layers": [-1]})
    assert decoder_config(values | {"sliding_window": None}).sliding_window is None
    del values["sliding_window"]  # the default is transformers'
    assert decoder_config(values).sliding_window == transformers.MistralConfig().sliding_window


def test_damaged_and_missing_weights(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BundleError, match="torn"):
        read_weights(tmp_path / "m")
    weights.unlink()
    with pytest.raises(NotFoundError):
        read_weights(tmp_path / "m")
