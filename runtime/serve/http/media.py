"""Images in JSON: data URIs, and nothing that the server would have to fetch."""

from __future__ import annotations

import base64
import binascii

from ...errors import InvalidRequestError, shown

_KINDS = "data:image/png;base64,…"


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
    try:
        return base64.b64decode(body, validate=True), media_type
    except (binascii.Error, ValueError):
        raise InvalidRequestError(
            "the data URI of an image is no base64; encode the file's bytes", field=field
        ) from None
