"""`Access`: from what a caller shows to its identity."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..errors import UnauthenticatedError
from .identity import Identity, anonymous
from .keys import SUBJECT, KeyFile, is_key
from .tokens import TokenVerifier

log = logging.getLogger("motet.trust")


class Access:
    """How a server knows its callers: by keys, by tokens, or by both. Thread-safe."""

    def __init__(
        self, keys: KeyFile | None = None, tokens: TokenVerifier | None = None, *, anonymous: Identity | None = None
    ) -> None:
        """`anonymous`: who every caller is, in a server without keys and tokens."""
        assert (anonymous is None) != (keys is None and tokens is None), "callers are anonymous, or are asked"
        self._keys, self._tokens, self._anonymous = keys, tokens, anonymous

    @classmethod
    def open_to_all(cls, *, may_drain: bool = False) -> Access:
        """No authentication: for a server that only this machine reaches."""
        return cls(anonymous=anonymous(may_drain=may_drain))

    def identify(self, authorization: Sequence[str]) -> Identity:
        """The caller of a request with these `authorization` headers. Raises `UnauthenticatedError`."""
        if self._anonymous is not None:
            return self._anonymous
        if len(authorization) != 1:
            raise UnauthenticatedError(
                "this server asks who you are: send one header `authorization: Bearer KEY` with a key of `motet keys add`"
            )
        scheme, _, credentials = authorization[0].partition(" ")
        if scheme.lower() != "bearer" or not credentials.isascii():
            raise UnauthenticatedError("the authorization header must be `Bearer KEY`")
        if self._keys is not None and (self._tokens is None or is_key(credentials)):
            return self._keys.identify(credentials)
        assert self._tokens is not None
        return self._tokens.identify(credentials)

    def check(self, who: Identity) -> None:
        """Raises `UnauthenticatedError` if an identity of earlier may not act any more, because its key was revoked. (A token
        holds until it expires, and what it has begun goes on.)"""
        if self._anonymous is None and who.subject.startswith(SUBJECT):
            if self._keys is None:
                raise UnauthenticatedError("this server takes no keys any more; ask again with a token")
            self._keys.check(who.subject.removeprefix(SUBJECT))
