"""An encoder of images: a vision tower of SigLIP's layout (Zhai et al. 2023) with pixel shuffle (Shi et al. 2016, backwards:
several patches become one row), as Idefics3 has it (Laurençon et al. 2024), or of EfficientNet-Lite0's; a projector; and how
images become its input.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from ...api.config import check_keys
from ...errors import ConfigError, shown
from .checks import check_placeholder, check_projector, check_sizes, check_tower, is_number
from .efficientnet import EfficientNetConfig

AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"
_SIZES = (
    *("hidden_size", "intermediate_size", "num_layers", "num_heads", "patch_size", "image_size", "shuffle"),
    "output_size",
)
FILTERS = range(6)  # of resizing, as Pillow numbers them
MAX_EDGE = 4096  # a resized image has no longer one (transformers' MAX_IMAGE_SIZE)
RESAMPLER_HEADS = 4  # of attention
MOST_ROWS = 2**16  # of a tile
MOST_TILES = 16  # in a row or column
_MOST_SIDE = 4096


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Sizes are counts of elements, edges are in pixels. `image_size`: edge of the square that the table of positions was made
    for. `shuffle`: so many patches in each direction become one row. `output_size`: hidden size of the text model. Raises
    `ConfigError` for a value of the wrong type or out of its range."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    image_size: int
    norm_eps: float
    shuffle: int
    output_size: int

    def __post_init__(self) -> None:
        check_sizes(self, _SIZES, "the vision tower")
        check_tower(self, "the vision tower")
        if self.patch_size > self.image_size:
            raise ConfigError(f"a patch ({self.patch_size}) is larger than the image ({self.image_size})")

    @property
    def side(self) -> int:
        """Positions in each direction of the table of positions."""
        return self.image_size // self.patch_size

    @property
    def unit(self) -> int:
        """Pixels in each direction that become one row."""
        return self.patch_size * self.shuffle

    @property
    def width(self) -> int:
        """Of what the projector gets."""
        return self.hidden_size * self.shuffle**2


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """How an image becomes tiles, squares of `tile_size` pixels.

    `longest_edge`: it is resized to this longest edge first; None: it is not. `splits`: it is cut into tiles, after which
    comes the whole image as one tile; otherwise that is all. `resample`: Pillow's number of the filter. `rescale`: the factor
    of the pixels' values; None: none. `mean`, `std`: of the three channels; None: not normalised. Raises `ConfigError`.
    """

    tile_size: int
    longest_edge: int | None
    splits: bool
    resample: int
    rescale: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None

    def __post_init__(self) -> None:
        if type(self.tile_size) is not int or not 1 <= self.tile_size <= _MOST_SIDE:
            raise ConfigError(f"tile_size must be an integer in 1…{_MOST_SIDE}, got {shown(self.tile_size)}")
        edge = self.longest_edge
        if edge is not None and (type(edge) is not int or not 1 <= edge <= MAX_EDGE):
            raise ConfigError(f"longest_edge must be null or an integer in 1…{MAX_EDGE}, got {shown(edge)}")
        if not isinstance(self.splits, bool):
            raise ConfigError(f"splits must be true or false, got {shown(self.splits)}")
        if self.splits and (edge is None or self.most_tiles > MOST_TILES):
            raise ConfigError(
                f"images that are cut into tiles must have a longest_edge of at most {MOST_TILES} tiles of {self.tile_size} "
                f"pixels, got {shown(edge)}"
            )
        if type(self.resample) is not int or self.resample not in FILTERS:
            raise ConfigError(f"resample must be a number of a filter in 0…5, got {shown(self.resample)}")
        if self.rescale is not None and not (is_number(self.rescale) and self.rescale > 0):
            raise ConfigError(f"rescale must be null or a number above 0, got {shown(self.rescale)}")
        if (self.mean is None) != (self.std is None):
            raise ConfigError("mean and std belong together; give both or none")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is None:
                continue
            if not isinstance(values, list | tuple) or len(values) != 3 or not all(map(is_number, values)):
                raise ConfigError(f"{name} must be three numbers, got {shown(values)}")
            object.__setattr__(self, name, tuple(values))
        if self.std is not None and min(self.std) <= 0:
            raise ConfigError(f"std must be three numbers above 0, got {shown(self.std)}")

    @property
    def most_tiles(self) -> int:
        """In a row or column of an image; 0: images are not cut."""
        return -(-self.longest_edge // self.tile_size) if self.splits and self.longest_edge is not None else 0

    @property
    def digest(self) -> bytes:
        """SHA-256 of the settings: images that are processed in another way have other rows."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).digest()


@dataclass(frozen=True, slots=True)
class ImageEncoder:
    """An encoder of images. `token`, `token_id`: the placeholder, in the template's text and as a row of the prompt.
    `layout`: "tiles", whose places in the image stand between their rows as Idefics3 writes them; or "rows": placeholders
    alone, of one tile. `projector`: "linear"; "mlp" (linear, GELU, linear) with `projector_size` units; or "resampler" of
    that size, which makes `queries` rows of a tile. Both are None otherwise. `projector_bias`: whether it has biases, as a
    resampler has. Raises `ConfigError` if these do not fit together."""

    vision: VisionConfig | EfficientNetConfig
    processor: ImageProcessor
    token: str
    token_id: int
    layout: Literal["tiles", "rows"] = "tiles"
    projector: Literal["linear", "mlp", "resampler"] = "linear"
    projector_size: int | None = None
    projector_bias: bool = False
    queries: int | None = None

    def __post_init__(self) -> None:
        check_placeholder(self.token, self.token_id, "an image")
        unit, edge = self.vision.unit, self.processor.tile_size
        if edge % unit:
            raise ConfigError(f"tiles of {edge} pixels are no multiple of {unit} pixels, which become one row")
        if self.layout not in ("tiles", "rows"):
            raise ConfigError(f"layout of an image must be tiles or rows, got {shown(self.layout)}")
        if self.layout == "rows" and self.processor.splits:
            raise ConfigError("rows alone do not say which tile they are of; set splits to false, or layout to tiles")
        if self.places > MOST_ROWS:
            raise ConfigError(
                f"a tile has at most {MOST_ROWS} places, {edge} pixels in units of {unit} make {self.places}"
            )
        check_projector(self, ("linear", "mlp", "resampler"))
        if (self.projector == "resampler") != (self.queries is not None):
            raise ConfigError("queries are of a projector resampler, which must have them; null with others")
        if self.queries is not None:
            check_sizes(self, ("queries",), "the resampler")
            if not self.projector_bias or (self.projector_size or 0) % RESAMPLER_HEADS:
                raise ConfigError(
                    f"a resampler has biases, and a projector_size that is a multiple of {RESAMPLER_HEADS}, got "
                    f"{shown(self.projector_size)}"
                )

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """What stands for an image in a prompt, which no text may write."""
        if self.layout == "rows":
            return (self.token,)
        places = range(1, self.processor.most_tiles + 1)
        return (self.token, AROUND, WHOLE, *(place(row, column) for row in places for column in places))

    @property
    def needed_tokens(self) -> tuple[str, ...]:
        """Those of the `control_tokens`, beside the placeholder, that the tokenizer must have."""
        return () if self.layout == "rows" else (AROUND,)

    @property
    def num_layers(self) -> int:
        """Of the tower, if that is a transformer."""
        return self.vision.num_layers if isinstance(self.vision, VisionConfig) else 0

    @property
    def output_size(self) -> int:
        """Of a row: the hidden size of the text model."""
        return self.vision.output_size

    def expansion(self, rows: int, columns: int) -> str:
        """The text that the prompt has for an image: of tiles in `rows` and `columns`, after which comes the whole image; 0 and
        0: the whole image alone."""
        run = self.token * self.rows_per_tile
        if self.layout == "rows":
            return run
        whole = f"{AROUND}{WHOLE}{run}{AROUND}"
        if not rows:
            return whole
        lines = ("".join(f"{AROUND}{place(r, c)}{run}" for c in range(1, columns + 1)) for r in range(1, rows + 1))
        return "\n".join(lines) + f"\n\n{whole}"

    @property
    def places(self) -> int:
        """Of a tile, each of which has features."""
        return (self.processor.tile_size // self.vision.unit) ** 2

    @property
    def rows_per_tile(self) -> int:
        return self.places if self.queries is None else self.queries

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ImageEncoder:
        """Raises `ConfigError` for unknown keys, `TypeError` for missing ones."""
        check_keys(cls, values)
        tower = EfficientNetConfig if "tower" in values["vision"] else VisionConfig
        for name, kind in (("vision", tower), ("processor", ImageProcessor)):
            check_keys(kind, values[name])
        parts = {"vision": tower(**values["vision"]), "processor": ImageProcessor(**values["processor"])}
        return cls(**(values | parts))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def place(row: int, column: int) -> str:
    """The token before a tile's placeholders; rows and columns count from 1."""
    return f"<row_{row}_col_{column}>"
