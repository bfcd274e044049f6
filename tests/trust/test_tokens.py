"""JSON Web Tokens: only those of the right issuer, for this server, that are signed and in time."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, OctKey, OKPKey, RSAKey
from motet.runtime import errors
from motet.runtime.trust.access import Access
from motet.runtime.trust.identity import Identity, Role
from motet.runtime.trust.keys import KeyFile, add_key
from motet.runtime.trust.tokens import TokenVerifier

KEY = ECKey.generate_key("P-256", {"kid": "one"})
CLAIMS = {"iss": "https://id.example", "aud": "motet", "sub": "ann", "tenant": "acme", "roles": ["infer", "wizard"]}


def write(path, *keys):
    path.write_text(json.dumps({"keys": [key.as_dict(private=False) for key in keys]}))
    return path


@pytest.fixture
def verifier(tmp_path):
    return TokenVerifier(write(tmp_path / "jwks.json", KEY), issuer="https://id.example", audience="motet")


def token(key=KEY, algorithm="ES256", kid="one", without=(), **claims):
    found = {**CLAIMS, "exp": int(time.time()) + 60, **claims}
    found = {name: value for name, value in found.items() if name not in without}
    return jwt.encode({"alg": algorithm, "kid": kid}, found, key, algorithms=[algorithm])


def signed_by_the_public_key():
    """HMAC with what everyone knows: it works where a verifier lets the token choose the algorithm."""
    header, payload = (
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=")
        for part in ({"alg": "HS256", "kid": "one"}, {**CLAIMS, "exp": int(time.time()) + 60})
    )
    body = header + b"." + payload
    signature = hmac.new(KEY.as_pem(private=False), body, hashlib.sha256).digest()
    return (body + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


def test_a_good_token(verifier):
    assert verifier.identify(token()) == Identity("acme", "sub:ann", frozenset({Role.INFER}))


BAD = {
    "expired": lambda: token(exp=int(time.time()) - 60),
    "no end": lambda: token(without=["exp"]),
    "issuer": lambda: token(iss="https://evil.example"),
    "audience": lambda: token(aud="another"),
    "no subject": lambda: token(without=["sub"]),
    "no tenant": lambda: token(without=["tenant"]),
    "tenant": lambda: token(tenant="../etc"),
    "roles": lambda: token(roles="infer"),
    "not yet": lambda: token(nbf=int(time.time()) + 600),
    "another key": lambda: token(ECKey.generate_key("P-256", {"kid": "one"})),
    "unsigned": lambda: ".".join([token().split(".")[0].replace("ES256", "none"), token().split(".")[1], ""]),
    "signed by the public key": signed_by_the_public_key,
    "no token": lambda: "x.y.z",
    "a subject that is no text": lambda: token(sub="a\nb"),
    "a long subject": lambda: token(sub="x" * 201),
    "long": lambda: token(filler="x" * 9000),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tokens(verifier, case):
    with pytest.raises(errors.UnauthenticatedError, match="the token is not valid"):
        verifier.identify(BAD[case]())


@pytest.mark.parametrize(
    ("key", "algorithm"), [(RSAKey.generate_key(2048), "PS256"), (OKPKey.generate_key("Ed25519"), "Ed25519")]
)
def test_other_algorithms(tmp_path, key, algorithm):
    key = type(key).import_key({**key.as_dict(private=True), "kid": "one"})
    verifier = TokenVerifier(write(tmp_path / "jwks.json", key), issuer="https://id.example", audience="motet")
    assert verifier.identify(token(key, algorithm)).subject == "sub:ann"


def test_keys_of_the_provider_change(tmp_path, verifier):
    new = ECKey.generate_key("P-256", {"kid": "two"})
    with pytest.raises(errors.UnauthenticatedError):
        verifier.identify(token(new, kid="two"))
    write(tmp_path / "jwks.json", KEY, new)
    assert verifier.identify(token(new, kid="two")).subject == "sub:ann"


def test_key_sets_that_are_refused(tmp_path):
    path = tmp_path / "jwks.json"
    with pytest.raises(errors.NotFoundError, match="no key set"):
        TokenVerifier(path, issuer="i", audience="a")
    for content, message in (
        ("{", "no JSON Web Key Set"),
        ('{"keys": []}', "empty|no JSON Web Key Set"),
        (json.dumps({"keys": [OctKey.generate_key(256).as_dict()]}), "shared secret"),
        (json.dumps({"keys": [KEY.as_dict(private=True)]}), "private key"),
    ):
        path.write_text(content)
        with pytest.raises(errors.ConfigError, match=message):
            TokenVerifier(path, issuer="i", audience="a")


def test_keys_and_tokens_together(tmp_path, verifier):
    key = add_key(tmp_path / "keys.json", "acme", [Role.ADMIN])
    access = Access(KeyFile(tmp_path / "keys.json"), verifier)
    assert access.identify([f"Bearer {key}"]).roles == {Role.ADMIN}
    assert access.identify([f"bearer {token()}"]).subject == "sub:ann"
    for headers in ([], ["Bearer"], [f"Basic {key}"], [f"Bearer {key}", f"Bearer {key}"], ["Bearer é"]):
        with pytest.raises(errors.UnauthenticatedError):
            access.identify(headers)
    assert Access.open_to_all().identify([]).subject == "anonymous"
