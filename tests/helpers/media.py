"""Tiny random Idefics3 models, their processor as transformers has it, and images."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
from motet.runtime.api.config import EngineConfig
from motet.runtime.encoders.decoding import MediaDecoder
from motet.runtime.encoders.images import ImageKind
from motet.runtime.model.encoders.image import ImageEncoder, ImageProcessor, VisionConfig

from .models import write_tokenizer

TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SIDE = 4  # most rows and columns of tiles
TOKENS = (
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{r}_col_{c}>" for r in range(1, SIDE + 1) for c in range(1, SIDE + 1)),
)
VOCAB = 320
PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Idefics3ImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "max_image_size": {"longest_edge": 24},
    "processor_class": "Idefics3Processor",
    "resample": 1,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 72},
}


GREEDY = {"temperature": 0.0, "ignore_eos": True}
CONFIG = {"threads": 1, "kv_dtype": "bf16", "backend": "cpu", "max_image_pixels": 10**6, "max_image_bytes": 2**20}


def write_image_model(
    path: Path, seed: int = 0, *, model_type: str = "idefics3", image_size: int = 24, patch: int = 4, **changes: object
) -> Path:
    """A tiny random model directory whose encoder sees tiles of 24 pixels: 6 x 6 patches, 9 rows. `changes`: of the
    preprocessor's settings."""
    import tokenizers
    import torch
    import transformers

    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    text = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        eos_token_id=258,
        bos_token_id=256,
        pad_token_id=258,
    )
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    kind = {"idefics3": transformers.Idefics3Config, "smolvlm": transformers.SmolVLMConfig}[model_type]
    config = kind(
        text_config=text.to_dict(),
        vision_config={**sizes, "image_size": image_size, "patch_size": patch},
        image_token_id=260,
        scale_factor=2,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(path)
    write_tokenizer(path)
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens(list(TOKENS[:3]))
    tokenizer.add_tokens(list(TOKENS[3:]))
    assert tokenizer.token_to_id("<image>") == 260
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end_of_utterance>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 261}))
    (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | changes))
    tile = (PREPROCESSOR | changes)["max_image_size"]["longest_edge"]  # type: ignore[index]
    rows = {"image_seq_len": (tile // patch // 2) ** 2, "processor_class": "Idefics3Processor"}
    (path / "processor_config.json").write_text(json.dumps(rows))
    return path


def reference_processor(path: Path):
    """Transformers' processor, on Pillow."""
    import transformers
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    own = json.loads((path / "preprocessor_config.json").read_text())
    images = Idefics3ImageProcessorPil(**{k: v for k, v in own.items() if not k.endswith(("_type", "_class"))})
    rows = json.loads((path / "processor_config.json").read_text())["image_seq_len"]
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    template = (path / "chat_template.jinja").read_text()
    return transformers.Idefics3Processor(images, tokenizer, image_seq_len=rows, chat_template=template)


SETTINGS = ImageProcessor(24, 72, True, 1, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class OneKind:
    """A `MediaDecoder` of one kind of files."""

    def __init__(self, kind):
        self.own, self.kind = MediaDecoder([kind]), kind

    def look(self, content, media_type=""):
        return self.own.look(self.kind, content, media_type)

    def decode(self, content):
        return self.own.decode(self.kind, content)

    def close(self):
        self.own.close()

    @property
    def process(self):
        return self.own._process


def image_kind(most_pixels, encoder=None):
    """By default of tiles of 24 pixels."""
    vision = VisionConfig(48, 80, 2, 4, 4, 24, 1e-6, 2, 64)
    own = encoder or ImageEncoder(vision, SETTINGS, "<image>", 260)
    return ImageKind(own, EngineConfig(max_image_pixels=most_pixels))


def image_decoder(most_pixels, encoder=None):
    return OneKind(image_kind(most_pixels, encoder))


def picture(width: int, height: int, seed: int = 0):
    """A smooth random image, RGB."""
    from PIL import Image

    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (5, 7, 3), np.uint8), "RGB")
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind: str = "PNG", **options: object) -> bytes:
    """An image as a file."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def image(content):
    return {"type": "image", "image": content}


def text(value):
    return {"type": "text", "text": value}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def pictures(count, seed=0):
    return [picture(29 + 31 * (i + seed), 17 + 53 * (i + seed) % 111, seed=10 * seed + i) for i in range(count)]


def question(images):
    return user(*(part for index, one in enumerate(images) for part in (image(one), text(f" no {index} "))))


def uri(content, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
