"""Images of a program's messages: paths and Pillow's images become the bytes of files, which the server takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from ..api.limits import MAX_MEDIA_BYTES
from ..api.prompt import Conversation, Prompt
from ..errors import InvalidRequestError, NotFoundError, shown

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


def with_files(prompt: Prompt) -> Prompt:
    """The prompt with the bytes of each image in place of a path (`pathlib.Path`) or an image of Pillow, which becomes a PNG.
    Raises `NotFoundError` for a file that does not exist, `InvalidRequestError` for one that is too large or cannot be read. What
    else is wrong with a prompt is found when it is checked."""
    if isinstance(prompt, Conversation):
        return prompt  # it was checked when it was made: its images are bytes
    if isinstance(prompt, str) or not isinstance(prompt, list | tuple):
        return prompt
    return [_message(message) if isinstance(message, Mapping) else message for message in prompt]


def _message(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    return {**message, "content": list(map(_part, content))} if isinstance(content, list | tuple) else message


def _part(part: Any) -> Any:
    return {**part, "image": image_bytes(part["image"])} if isinstance(part, Mapping) and "image" in part else part


def image_bytes(image: Any) -> Any:
    """The bytes of an image's file. A text stays what it is, and is refused later: it might be a URL as well as a path."""
    if isinstance(image, os.PathLike):
        return read_image(Path(image))
    if not isinstance(image, bytes) and hasattr(image, "save") and hasattr(image, "getbands"):
        return _png(image)
    return image


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


def read_image(path: Path) -> bytes:
    """The bytes of a file. Raises `NotFoundError`, `InvalidRequestError`."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_MEDIA_BYTES + 1)
    except FileNotFoundError:
        raise NotFoundError(f"there is no image '{path}'") from None
    except OSError as error:
        raise InvalidRequestError(
            f"the image '{path}' cannot be read: {error.strerror or error}", field="messages.content"
        ) from None
    if len(content) > MAX_MEDIA_BYTES:
        raise InvalidRequestError(
            f"the image {shown(str(path))} has more than {MAX_MEDIA_BYTES} bytes; scale it down, or compress it",
            field="messages.content",
        )
    return content
