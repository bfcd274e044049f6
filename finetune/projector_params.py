"""`ProjectorParams`: what the encoders that a projector is trained for are like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..runtime.api.config import described
from ..runtime.errors import ConfigError

# Tokens that stand for media where none is named, the first that a tokenizer has: those that models have for media, then those
# that are reserved, or of use in code alone.
PLACEHOLDERS = {
    "image": ("<image>", "<|image|>", "<|image_pad|>", "<image_soft_token>", "<|vision_pad|>"),
    "audio": ("<audio>", "<|audio|>", "<|AUDIO|>", "<|audio_pad|>", "<audio_soft_token>", "[AUDIO]"),
}
RESERVED = (
    *(
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<unused0>",
        "<unused1>",
        "<reserved_0>",
        "<reserved_1>",
    ),
    *("<|extra_0|>", "<|extra_1|>", "<jupyter_script>", "<empty_output>", "<gh_stars>", "<|fim_pad|>", "<fim_pad>"),
)


@dataclass(frozen=True, slots=True)
class ProjectorParams:
    """Raises `ConfigError` at construction if a value is not possible."""

    pool: int | None = described(
        None,
        "projector: So many frames of a sound become one row, or places of an image in each direction; default: 4 frames, 2 "
        "patches of SigLIP, 1 place of EfficientNet.",
    )
    placeholder: str | None = described(
        None,
        "projector: Token of the model that stands for a row; default: the first of a list that its tokenizer has.",
    )
    projector: Literal["mlp", "linear", "resampler"] | None = described(
        None,
        "projector: mlp (linear, GELU, linear), linear, or for images resampler (so many rows of a whole image, which attend to "
        "its places); default: mlp, of EfficientNet resampler.",
    )
    queries: int | None = described(None, "projector: Rows that a resampler makes of an image; default: 16.")
    spell_epochs: int | None = described(
        None,
        "projector: Epochs before the others in which the rows learn to spell the answer, without the model (CTC): for answers "
        "that say what is heard or seen. They are quick; with --epochs 0 they are all. Default: none.",
    )

    def __post_init__(self) -> None:
        if self.pool is not None and self.pool < 1:
            raise ConfigError(f"pool must be at least 1, got {self.pool}")
        if self.projector not in (None, "mlp", "linear", "resampler"):
            raise ConfigError(f"projector must be mlp, linear or resampler, got '{self.projector}'")
        if self.queries is not None and self.queries < 1:
            raise ConfigError(f"queries must be at least 1, got {self.queries}")
        if self.spell_epochs is not None and self.spell_epochs < 1:
            raise ConfigError(f"spell_epochs must be at least 1, got {self.spell_epochs}")
        if self.placeholder == "":
            raise ConfigError("placeholder must be a token of the model, got ''")
