"""A tiny model that repeats a colour's name, random towers, and pictures of one colour or sounds of one tone each: what
projectors are trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from .models import write_model

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 50, 230), "white": (235, 235, 235)}
QUESTION = "which colour?"
PLACEHOLDERS = ("<image>", "<audio>")
TRAINING = {
    "method": "projector",
    "examples": 200,
    "validation_examples": 32,
    "epochs": 12,
    "learning_rate": 3e-3,
    "batch_tokens": 512,
    "evaluations": 3,
}


def write_base(path: Path, steps: int = 150) -> Path:
    """A tiny Llama with tokens for media, trained to repeat the last word of a question. Deterministic."""
    import tokenizers
    import torch
    from motet.runtime.checkpoints.decoder import Decoder
    from motet.runtime.checkpoints.huggingface import read_config, read_weights
    from motet.runtime.text.tokenizer import Tokenizer
    from safetensors.torch import save_file

    write_model(path, "llama")
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens(list(PLACEHOLDERS))
    tokenizer.save(str(path / "tokenizer.json"))
    own, random = Tokenizer.from_dir(path), np.random.default_rng(0)
    decoder = Decoder.from_weights(read_config(path), read_weights(path))
    decoder.requires_grad_(True)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = torch.zeros(())
        for word in random.choice([*COLOURS], 4, replace=False):
            prompt = own.encode_chat([{"role": "user", "content": f"{word}\n{QUESTION}"}])
            ids = torch.tensor([[*prompt, *own.encode(word, add_special_tokens=False), 258]])
            logits = decoder(ids[:, :-1])[0, len(prompt) - 1 :]
            loss = loss + torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :]) / 4
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    weights = {name: tensor.detach().contiguous() for name, tensor in decoder.state_dict().items()}
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def write_siglip(path: Path, seed: int = 0, edge: int = 24, patch: int = 8) -> Path:
    """A tiny random SigLIP vision tower, as transformers saves it."""
    import torch
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, image_size=edge, patch_size=patch))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.15))
    model.save_pretrained(path)
    settings = {"image_processor_type": "SiglipImageProcessor", "size": {"height": edge, "width": edge}}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


def write_pictures(folder: Path, each: int = 12, seed: int = 0) -> list[tuple[str, str]]:
    """(file, colour's name): noisy pictures, none like another."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    random, found = np.random.default_rng(seed), []
    for index in range(each):
        for name, colour in COLOURS.items():
            noise = random.normal(0, 12, (20, 28, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            file = f"{name}-{index}.png"
            Image.fromarray(pixels).save(folder / file)
            found.append((file, name))
    return found


def write_whisper(path: Path, seed: int = 0) -> Path:
    """A tiny random Whisper that hears two seconds at once, as transformers saves it."""
    import torch
    import transformers

    from .sounds import EXTRACTOR, POSITIONS

    torch.manual_seed(seed)
    sizes = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_layers": 1}
    model = transformers.WhisperModel(
        transformers.WhisperConfig(
            d_model=32,
            num_mel_bins=EXTRACTOR["feature_size"],
            max_source_positions=POSITIONS,
            decoder_attention_heads=4,
            decoder_ffn_dim=8,
            vocab_size=60,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
            **sizes,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(EXTRACTOR))
    return path


def write_tones(folder: Path, each: int = 10, seed: int = 0) -> list[tuple[str, str]]:
    """(file, colour's name): noisy tones of half a second or more, a pitch for each colour."""
    import soundfile

    folder.mkdir(parents=True, exist_ok=True)
    random, found = np.random.default_rng(seed), []
    for index in range(each):
        for name, pitch in zip(COLOURS, (200, 600, 1800, 5000), strict=True):
            seconds = np.arange(int(random.integers(8000, 12000))) / 16000
            tone = 0.3 * np.sin(2 * np.pi * pitch * seconds) + random.normal(0, 0.01, len(seconds))
            file = f"{name}-{index}.wav"
            soundfile.write(folder / file, tone, 16000)
            found.append((file, name))
    return found


def write_records(path: Path, files: list[tuple[str, str]], folder: str = "", medium: str = "image") -> str:
    records = [
        {medium: f"{folder}{file}", "prompt": QUESTION, "completion": name, "id": f"the {file}"} for file, name in files
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def train_on_pictures(
    folder: Path,
    out: str,
    params: object = None,
    projector: object = None,
    data: str = "data.jsonl",
    encoders: object = None,
    **options: object,
) -> dict[str, object]:
    """The manifest of a model in `folder` whose projector was trained, by default anew for the tower there, on its records."""
    from motet.finetune.params import TuneParams
    from motet.finetune.projector_params import ProjectorParams
    from motet.finetune.training.trunk_cache import TrunkCache
    from motet.finetune.training.tune_projector import tune_projector

    return tune_projector(
        folder / "base",
        str(folder / data),
        folder / out,
        encoders={"image": folder / "tower"} if encoders is None else encoders,
        params=params or TuneParams(**TRAINING),
        projector=projector or ProjectorParams(pool=3),
        cache=TrunkCache(folder / "cache"),
        show_progress=False,
        **options,
    )
