"""Media of a program's messages: paths, Pillow's images and arrays of samples become the bytes of files, which the server
takes."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..api.limits import MAX_MEDIA_BYTES
from ..api.prompt import Conversation, Prompt
from ..errors import InvalidRequestError, NotFoundError, shown

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


def with_files(prompt: Prompt) -> Prompt:
    """The prompt with the bytes of files in place of paths (`pathlib.Path`), of images of Pillow, which become PNGs, and of
    (samples, samples a second), which become WAVs. Raises `NotFoundError` for a file that does not exist, `InvalidRequestError`
    for one that is too large or cannot be read, and for other arrays. What else is wrong with a prompt is found when it is
    checked."""
    if isinstance(prompt, Conversation):
        return prompt  # it was checked when it was made: its media are bytes
    if isinstance(prompt, str) or not isinstance(prompt, list | tuple):
        return prompt
    return [_message(message) if isinstance(message, Mapping) else message for message in prompt]


def _message(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    return {**message, "content": list(map(_part, content))} if isinstance(content, list | tuple) else message


def _part(part: Any) -> Any:
    if isinstance(part, Mapping) and "image" in part:
        return {**part, "image": image_bytes(part["image"])}
    if isinstance(part, Mapping) and "audio" in part:
        return {**part, "audio": audio_bytes(part["audio"])}
    return part


def image_bytes(image: Any) -> Any:
    """The bytes of an image's file. A text stays what it is, and is refused later: it might be a URL as well as a path."""
    if isinstance(image, os.PathLike):
        return read_file(Path(image), "image")
    if not isinstance(image, bytes) and hasattr(image, "save") and hasattr(image, "getbands"):
        return _png(image)
    return image


def audio_bytes(audio: Any) -> Any:
    """The bytes of a sound's file. A text stays what it is, and is refused later."""
    if isinstance(audio, os.PathLike):
        return read_file(Path(audio), "sound")
    if isinstance(audio, tuple) and len(audio) == 2:
        return _wav(*audio)
    return audio


def _wav(samples: Any, rate: Any) -> bytes:
    """A WAV of float32, or of int16 where the samples are. Raises `InvalidRequestError` for other arrays."""
    values = np.asarray(samples)
    if values.dtype != np.int16 and values.dtype.kind != "f":
        raise InvalidRequestError(
            f"samples are floats in -1…1 or int16, got {values.dtype}; scale and convert them", field="messages.content"
        )
    if values.ndim not in (1, 2) or not values.size or type(rate) is not int or not 0 < rate < 2**31:
        raise InvalidRequestError(
            f"a sound is (samples [frames] or [frames, channels], samples a second), got shape {list(values.shape)} and "
            f"{shown(rate)}",
            field="messages.content",
        )
    kind, own = (1, "<i2") if values.dtype == np.int16 else (3, "<f4")  # PCM, floats
    content = np.ascontiguousarray(values, own).tobytes()
    if len(content) > MAX_MEDIA_BYTES:
        raise _too_large("the array of samples")
    channels, width = 1 if values.ndim == 1 else values.shape[1], np.dtype(own).itemsize
    if channels * width >= 2**16 or rate * channels * width >= 2**32:
        raise InvalidRequestError(f"a WAV has no room for {channels} channels", field="messages.content")
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * channels * width, channels * width, 8 * width)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def _png(image: Any) -> bytes:
    """An image of Pillow as a PNG, turned as its EXIF says, which a PNG would not keep, in RGB if a PNG cannot hold its mode."""
    from PIL import ImageOps  # whoever has such an image has Pillow

    if image.mode[0] in "IF":  # the server refuses them: how they are to be scaled is not known
        raise InvalidRequestError(
            f"an image of mode {shown(image.mode)} has more than 8 bits a channel; scale its values, and convert it to L or RGB",
            field="messages.content",
        )
    content = BytesIO()
    try:
        found = ImageOps.exif_transpose(image)
        if found.mode not in _PNG_MODES:
            found = found.convert("RGBA" if found.mode in ("PA", "RGBa") else "RGB")
        found.save(content, "PNG")
    except (OSError, ValueError, SyntaxError) as error:  # a file that is cut off is found out only here
        raise InvalidRequestError(
            f"the image of mode {shown(image.mode)} cannot be written as a PNG: {error}; convert it to RGB",
            field="messages.content",
        ) from None
    return content.getvalue()


def read_file(path: Path, what: str) -> bytes:
    """The bytes of a file. `what` it is, in words. Raises `NotFoundError`, `InvalidRequestError`."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_MEDIA_BYTES + 1)
    except FileNotFoundError:
        raise NotFoundError(f"there is no {what} '{path}'") from None
    except OSError as error:
        raise InvalidRequestError(
            f"the {what} '{path}' cannot be read: {error.strerror or error}", field="messages.content"
        ) from None
    if len(content) > MAX_MEDIA_BYTES:
        raise _too_large(f"the {what} {shown(str(path))}")
    return content


def _too_large(what: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{what} has more than {MAX_MEDIA_BYTES} bytes; make it smaller, or compress it", field="messages.content"
    )
