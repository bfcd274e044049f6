"""Tiny random Qwen2-Audio and Voxtral models, and sounds."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from motet.runtime.api.config import EngineConfig
from motet.runtime.encoders.sounds import SoundKind
from motet.runtime.model.encoders.audio import AudioEncoder, AudioProcessor, WhisperConfig

from .media import OneKind
from .models import write_tokenizer

RATE = 16000
SECONDS = 2  # that a tower hears at once
POSITIONS = SECONDS * RATE // 320
TOKENS = {
    "qwen2_audio": ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"),
    "voxtral": ("[BEGIN_AUDIO]", "[AUDIO]", "[INST]"),
}
_CONTENT = {
    "qwen2_audio": "Audio: <|audio_bos|><|AUDIO|><|audio_eos|>\\n",
    "voxtral": "[BEGIN_AUDIO][AUDIO]",
}
TEMPLATE = (
    "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{% if m.content is string %}}{{{{ m.content }}}}{{% else %}}"
    "{{% for p in m.content %}}{{% if p.type == 'audio' %}}{{{{ '{content}' }}}}{{% else %}}{{{{ p.text }}}}{{% endif %}}"
    "{{% endfor %}}{{% endif %}}<|im_end|>\n{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
CONFIG = {"threads": 1, "kv_dtype": "bf16", "backend": "cpu", "max_audio_seconds": 6, "max_audio_bytes": 2**20}
EXTRACTOR = {
    "chunk_length": SECONDS,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 16,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": SECONDS * RATE,
    "nb_max_frames": 2 * POSITIONS,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
    "sampling_rate": RATE,
}


def write_sound_model(path: Path, family: str = "qwen2_audio", seed: int = 0, **changes: object) -> Path:
    """A tiny random model directory whose tower hears 2 seconds at once. `changes`: of the extractor's settings."""
    import tokenizers
    import torch
    import transformers

    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    text = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "eos_token_id": 258,
        "bos_token_id": 256,
        "pad_token_id": 258,
    }
    audio = {"num_mel_bins": EXTRACTOR["feature_size"], "max_source_positions": POSITIONS}
    if family == "qwen2_audio":
        audio |= {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
        text |= {"model_type": "qwen2"}
        config = transformers.Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=260)
        model = transformers.Qwen2AudioForConditionalGeneration(config)
    else:
        audio |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        text |= {"model_type": "llama", "head_dim": 16}
        config = transformers.VoxtralConfig(audio_config=audio, text_config=text, audio_token_id=260)
        model = transformers.VoxtralForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(path)
    write_tokenizer(path)
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens(list(TOKENS[family]))
    assert tokenizer.token_to_id(TOKENS[family][1]) == 260
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(TEMPLATE.format(content=_CONTENT[family]))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "preprocessor_config.json").write_text(json.dumps(EXTRACTOR | changes))
    return path


def extractor(path: Path):
    """Transformers' own."""
    import transformers

    return transformers.WhisperFeatureExtractor.from_pretrained(path)


def reference_inputs(path: Path, family: str, turns, sounds):
    """What transformers' model gets of messages with these sounds. Voxtral's processor needs another tokenizer, so its steps are
    taken here: whole pieces, each with its tokens."""
    import torch
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    template, token = (path / "chat_template.jinja").read_text(), TOKENS[family][1]
    plain = [{**t, "content": [{k: v for k, v in p.items() if k != "audio"} for p in t["content"]]} for t in turns]
    rendered = tokenizer.apply_chat_template(plain, chat_template=template, tokenize=False, add_generation_prompt=True)
    own = extractor(path)
    if family == "qwen2_audio":
        processor = transformers.Qwen2AudioProcessor(own, tokenizer, chat_template=template)
        return dict(processor(text=rendered, audio=sounds, sampling_rate=RATE, return_tensors="pt"))
    options = {"sampling_rate": RATE, "truncation": False, "padding": True, "pad_to_multiple_of": SECONDS * RATE}
    features = []
    for sound in sounds:
        found = own(sound, return_tensors="pt", **options)["input_features"]
        pieces = found.reshape(own.feature_size, -1, 2 * POSITIONS).transpose(0, 1)
        features.append(pieces)
        rendered = rendered.replace(token, "\0" * (len(pieces) * POSITIONS // 4), 1)
    ids = tokenizer(rendered.replace("\0", token), return_tensors="pt", add_special_tokens=False)
    return {**ids, "input_features": torch.cat(features)}


def sound_kind(seconds=6, most_bytes=2**20, **changes):
    tower = WhisperConfig(32, 48, 2, 4, 16, POSITIONS)
    own = {"pad": "none", "pooling": "average", "pool": 2, "projector": "linear", "projector_size": None, **changes}
    encoder = AudioEncoder(
        tower,
        AudioProcessor(RATE, 400, 160),
        **own,
        projector_bias=True,
        output_size=64,
        token="<a>",
        token_id=3,
        around=(),
        max_seconds=100.0,
    )
    return SoundKind(encoder, EngineConfig(max_audio_seconds=seconds, max_audio_bytes=most_bytes))


def sound_decoder(seconds=6):
    return OneKind(sound_kind(seconds))


def tone(seconds: float, seed: int = 0, rate: int = RATE, channels: int = 1):
    """A random melody, [frames] or [frames, channels], float32."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    notes = [
        np.sin(2 * np.pi * random.uniform(80, 3000) * time + random.uniform(0, 6)) * random.uniform(0.02, 0.3)
        for _ in range(4)
    ]
    swell = 0.6 + 0.4 * np.sin(2 * np.pi * random.uniform(0.5, 3) * time)
    found = (sum(notes) * swell + random.normal(size=len(time)) * 0.003).astype(np.float32)
    return found if channels == 1 else np.stack([np.roll(found, 7 * c) for c in range(channels)], 1)


def filed(samples, kind: str = "WAV", rate: int = RATE, subtype: str | None = None) -> bytes:
    """A sound as a file; a WAV has floats, so that nothing is rounded."""
    import soundfile

    content = io.BytesIO()
    soundfile.write(content, samples, rate, format=kind, subtype=subtype or ("FLOAT" if kind == "WAV" else None))
    return content.getvalue()


def audio(content):
    return {"type": "audio", "audio": content}


def sounds(count, seed=0):
    return [tone(0.3 + 0.37 * (i + 1) * (seed + 1) % 1.6, seed=10 * seed + i) for i in range(count)]
