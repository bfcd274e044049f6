"""Signatures of bundles, in the format of OpenSSF's model signing (a Sigstore bundle with an in-toto statement).

`sign` writes `model.sig` into the bundle, which the package's own command verifies too:

    model_signing verify key BUNDLE --signature BUNDLE/model.sig --public_key KEY.pem

A signature covers each file of the directory but itself. Keys are of elliptic curves (P-256, P-384, P-521), alone or with a
chain of certificates. Nothing is asked of the network: Sigstore's keyless signatures are not offered.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import BundleError, ConfigError, MissingPackageError, NotFoundError
from .bundle import Bundle

SIGNATURE = "model.sig"
_LARGEST = 1 << 22  # bytes of a signature: about 20,000 files
_PREDICATE = "https://model_signing/signature/v1.0"


def sign(bundle: Path, private_key: Path, certificate: Path | None = None, chain: Sequence[Path] = ()) -> Path:
    """Sign all files of a bundle, once they are checked; returns the signature's path. `private_key`: PEM, not encrypted.
    `certificate`: the key's, PEM, which goes into the signature with the `chain` of those above it.

    Raises what `Bundle.load` raises, `NotFoundError` (a key or certificate is missing), `ConfigError` (it cannot be used),
    `MissingPackageError`.
    """
    if chain and certificate is None:
        raise ConfigError("a chain is of the authorities above a certificate; give the certificate too")
    hashing, signing, _ = _package()
    for file in (private_key, *([certificate] if certificate is not None else []), *chain):
        _check_file(file)
    Bundle.load(bundle)
    config = signing.Config()
    try:
        if certificate is None:
            config.use_elliptic_key_signer(private_key=private_key)
        else:
            config.use_certificate_signer(
                private_key=private_key, signing_certificate=certificate, certificate_chain=chain
            )
    except Exception as error:  # of the package and those that it uses
        raise ConfigError(
            f"'{private_key}' cannot sign ({_line(error)}); a private key is of the curve P-256, P-384 or P-521, in PEM, not "
            "encrypted, and the certificate, if there is one, is of this key"
        ) from error
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False))
    out = bundle / SIGNATURE
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / SIGNATURE
        try:
            config.sign(bundle, made)
        except ValueError as error:
            raise BundleError(f"'{bundle}' cannot be signed: {_line(error)}") from error
        work = bundle / f".{SIGNATURE}-{secrets.token_hex(4)}"
        try:
            work.write_bytes(made.read_bytes())
            os.replace(work, out)
        finally:
            work.unlink(missing_ok=True)
    return out


def verify(bundle: Path, key: Path | None = None, authorities: Path | None = None) -> None:
    """Check that a bundle has a signature of the public `key` (PEM), or of a certificate that one of the `authorities` (PEM)
    vouches for, and that its files are those that were signed: none changed, none missing, none added.

    A certificate is judged by the time at which it began to hold, so one that has expired since still counts.
    Raises `BundleError` if it is not so, `NotFoundError` (there is no bundle or no key), `ConfigError` (the key cannot be used),
    `MissingPackageError`.
    """
    if (key is None) == (authorities is None):
        raise ConfigError("a signature is verified by a public key or by certificate authorities; give one of the two")
    _, _, verifying = _package()
    config = verifying.Config()
    trusted = key or authorities
    assert trusted is not None
    _check_file(trusted)
    try:
        if key is not None:
            config.use_elliptic_key_verifier(public_key=key)
        else:
            config.use_certificate_verifier(certificate_chain=[trusted])
    except Exception as error:
        raise ConfigError(
            f"'{trusted}' cannot verify signatures ({_line(error)}); it must be "
            + ("a public key of the curve P-256, P-384 or P-521, in PEM" if key is not None else "certificates in PEM")
        ) from error
    if not bundle.is_dir():
        raise NotFoundError(f"no bundle at '{bundle}'; `motet export` makes one")
    content = _read(bundle / SIGNATURE)
    with tempfile.TemporaryDirectory() as folder:  # what is verified and what is read below are the same bytes
        copy = Path(folder) / SIGNATURE
        copy.write_bytes(content)
        _checked(bundle, lambda: config.verify(bundle, copy))
    signed = _checked(bundle, lambda: _names(content))
    found = {str(Path(folder, name).relative_to(bundle)) for folder, _, names in os.walk(bundle) for name in names} - {
        SIGNATURE
    }
    if found != signed:  # whatever paths the signature would have ignored
        wrong = sorted(found - signed) or sorted(signed - found)
        what = "has files that are not signed" if found - signed else "lacks files that were signed"
        raise BundleError(f"the bundle at '{bundle}' {what}: {wrong[:5]}; copy it again, or sign it again")


def _checked(bundle: Path, check: Callable[[], Any]) -> Any:
    """What `check` returns; whatever the packages raise over a signature is a `BundleError`."""
    from cryptography.exceptions import InvalidSignature

    try:
        return check()
    except InvalidSignature as error:
        raise BundleError(
            f"the signature of the bundle at '{bundle}' is not of the trusted key, or was changed; get the bundle again"
        ) from error
    except Exception as error:
        raise BundleError(
            f"the signature of the bundle at '{bundle}' does not hold: {_line(error)}; get the bundle again, or have it signed "
            "again"
        ) from error


def _names(content: bytes) -> set[str]:
    """The files that a signature covers. Raises all kinds of errors for what is no signature."""
    statement = json.loads(base64.b64decode(json.loads(content)["dsseEnvelope"]["payload"], validate=True))
    predicate = statement["predicate"]
    if statement["predicateType"] != _PREDICATE or predicate["serialization"]["method"] != "files":
        raise ValueError(f"it covers no list of files ({_PREDICATE})")
    return {str(resource["name"]) for resource in predicate["resources"]}


def _read(file: Path) -> bytes:
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise BundleError(f"'{file}' is a link or no plain file; copy the bundle (cp -RL), then sign it")
    try:
        with open(file, "rb") as opened:
            content = opened.read(_LARGEST + 1)
    except FileNotFoundError:
        raise BundleError(
            f"the bundle at '{file.parent}' is not signed ({SIGNATURE} is missing), and the settings ask for a signature; "
            "`motet sign` makes one"
        ) from None
    if len(content) > _LARGEST:
        raise BundleError(f"'{file}' is no signature: one has at most {_LARGEST} bytes; sign the bundle again")
    return content


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise NotFoundError(f"there is no file '{file}' with a key or certificate")


def _package() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise MissingPackageError(
            f"signatures need the package model-signing ({error}); install it with `pip install 'motet[signing]'`"
        ) from error
    return hashing, signing, verifying


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "…"
