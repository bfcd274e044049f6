"""`TokenVerifier`: JSON Web Tokens of an identity provider, checked with the public keys of a JWKS file (RFC 7519, 7517).

Nothing is fetched: whoever runs the server puts the provider's key set into the file, which is read again when it changes.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, MissingPackageError, NotFoundError, UnauthenticatedError
from .identity import Identity, Role
from .keys import check_tenant
from .watched import Watched

if TYPE_CHECKING:
    from joserfc.jwk import KeySet

log = logging.getLogger("motet.trust")
# Signatures by a private key only: with HMAC whoever can check a token can also make one.
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519", "EdDSA"]
_LEEWAY_S = 30
_MAX_TOKEN_BYTES = 8192
_MAX_SUBJECT = 200
_NO_TOKEN = "the token is not valid for this server; get a new one from the identity provider"


class TokenVerifier:
    """Thread-safe. A token must be signed by a key of the set, unexpired, from `issuer` and for `audience`, and have the
    claims `sub` and `tenant`. Its claim `roles` lists the caller's roles; names that are no roles here are another
    service's. Raises `NotFoundError`, `ConfigError`, `MissingPackageError` at construction."""

    def __init__(self, jwks: Path, *, issuer: str, audience: str) -> None:
        try:
            from joserfc import jwt
        except ImportError as error:
            raise MissingPackageError(
                f"tokens need joserfc ({error}); install it with `pip install 'motet[auth]'`"
            ) from error
        if not jwks.exists():
            raise NotFoundError(f"there is no key set '{jwks}'; save the identity provider's JWKS document there")
        self._keys = Watched([jwks], lambda: _read(jwks), "JWKS")
        self._claims = jwt.JWTClaimsRegistry(
            leeway=_LEEWAY_S,
            exp={"essential": True},
            iss={"essential": True, "value": issuer},
            aud={"essential": True, "value": audience},
            sub={"essential": True},
            tenant={"essential": True},
        )

    def identify(self, text: str) -> Identity:
        """Whose token this is. Raises `UnauthenticatedError`; the log has the reason."""
        from joserfc import jwt
        from joserfc.errors import JoseError

        if len(text) > _MAX_TOKEN_BYTES:
            raise UnauthenticatedError(_NO_TOKEN)
        try:
            claims: dict[str, Any] = jwt.decode(text, self._keys.value, algorithms=ALGORITHMS).claims
            self._claims.validate(claims)
            roles = claims.get("roles", [])
            if not isinstance(roles, list):
                raise ValueError("the claim roles is no list")
            subject = claims["sub"]
            if not isinstance(subject, str) or not subject.isprintable() or len(subject) > _MAX_SUBJECT:
                raise ValueError(f"the claim sub must be printable text of at most {_MAX_SUBJECT} characters")
            found = frozenset(set(Role) & set(map(str, roles)))
            return Identity(check_tenant(claims["tenant"]), f"sub:{subject}", found)
        except (JoseError, ValueError, KeyError, TypeError) as error:
            log.warning("a token was refused: %s", error)
            raise UnauthenticatedError(_NO_TOKEN) from None


def _read(path: Path) -> KeySet:
    from joserfc.errors import JoseError
    from joserfc.jwk import KeySet

    try:
        keys = KeySet.import_key_set(json.loads(path.read_text(encoding="utf-8")))
    except (JoseError, ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"'{path}' is no JSON Web Key Set: {error}") from None
    if not keys.keys:
        raise ConfigError(f"the key set '{path}' is empty")
    for key in keys.keys:
        if key.key_type == "oct":
            raise ConfigError(f"the key set '{path}' holds a shared secret; only public keys are allowed")
        if key.is_private:
            raise ConfigError(f"the key set '{path}' holds a private key; a server needs the public keys alone")
    return keys
