"""Parts of contents in JSON: texts, and images and sounds in base64. There is nothing that the server would have to fetch."""

from __future__ import annotations

import base64
import binascii
from typing import Any, Literal

import msgspec

from ...errors import InvalidRequestError, shown

_KINDS = "data:image/png;base64,…"


class ImageUrl(msgspec.Struct, forbid_unknown_fields=True):
    url: str
    detail: Literal["auto"] | None = None  # the model's processor has one way to see


class InputAudio(msgspec.Struct, forbid_unknown_fields=True):
    data: str  # base64
    format: str  # such as wav


class Part(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    text: str | None = None
    image_url: ImageUrl | None = None
    input_audio: InputAudio | None = None

    @property
    def media_size(self) -> int:
        """Characters of its medium."""
        size = 0 if self.image_url is None else len(self.image_url.url)
        return size if self.input_audio is None else size + len(self.input_audio.data)


class ContentPart(msgspec.Struct, forbid_unknown_fields=True):
    """Of the door of responses."""

    type: Literal["input_text", "output_text", "refusal", "input_image", "input_audio"]
    text: str = ""
    image_url: str | None = None
    detail: Literal["auto"] | None = None
    input_audio: InputAudio | None = None
    refusal: str = ""
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None

    @property
    def media_size(self) -> int:
        """Characters of its medium."""
        size = 0 if self.image_url is None else len(self.image_url)
        return size if self.input_audio is None else size + len(self.input_audio.data)

    def as_in_chat(self) -> Part:
        """Raises `InvalidRequestError`."""
        if (self.type == "input_image") != (self.image_url is not None) or (self.image_url is None and self.detail):
            raise InvalidRequestError(
                "image_url, and perhaps detail, are of a part of type input_image, which has no text",
                field="input.content",
            )
        if (self.type == "input_audio") != (self.input_audio is not None):
            raise InvalidRequestError("input_audio is of a part of type input_audio", field="input.content")
        if self.image_url is None and self.input_audio is None:
            return Part("text", self.text or self.refusal)
        if self.text or self.refusal or self.annotations or self.logprobs:
            raise InvalidRequestError(
                f"a part of type {self.type} has its medium and nothing else", field="input.content"
            )
        if self.image_url is None:
            return Part("input_audio", input_audio=self.input_audio)
        return Part("image_url", image_url=ImageUrl(self.image_url))


def read_part(part: Part) -> dict[str, Any]:
    """As `Conversation` takes it. Raises `InvalidRequestError`."""
    field = "messages.content"
    match part.type, part.text, part.image_url, part.input_audio:
        case "text", str(text), None, None:
            return {"type": "text", "text": text}
        case "image_url", None, ImageUrl(url=url), None:
            content, media_type = read_data_uri(url, field)
            return {"type": "image", "image": content, "media_type": media_type}
        case "input_audio", None, None, InputAudio(data=data, format=kind):
            audio = read_base64(data, "data of input_audio", field)
            return {"type": "audio", "audio": audio, "media_type": f"audio/{kind.lower()}"}
    raise InvalidRequestError(
        "a part of a message's content is {type: text, text}, {type: image_url, image_url: {url}} or {type: input_audio, "
        f"input_audio: {{data, format}}}} here, got type {shown(part.type)}",
        field=field,
    )


def read_data_uri(url: str, field: str) -> tuple[bytes, str]:
    """The bytes of an image, and the media type that the URI says. Raises `InvalidRequestError` for any other URL: a server that
    fetched one would ask for whatever its callers name."""
    scheme, colon, rest = url.partition(":")
    if scheme.lower() != "data" or not colon:
        raise InvalidRequestError(
            f"an image is a data URI ({_KINDS}), and nothing is fetched; got {shown(url)}", field=field
        )
    head, comma, body = rest.partition(",")
    media_type, *parameters = head.lower().split(";")
    if not comma or not media_type.startswith("image/") or parameters[-1:] != ["base64"]:
        raise InvalidRequestError(
            f"an image is a data URI of an image in base64 ({_KINDS}), got {shown(url)}", field=field
        )
    return read_base64(body, "the data URI of an image", field), media_type


def read_base64(text: str, what: str, field: str) -> bytes:
    """Raises `InvalidRequestError`."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequestError(f"{what} is no base64; encode the file's bytes", field=field) from None
