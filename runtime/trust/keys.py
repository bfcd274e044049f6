"""`KeyFile`: bearer keys of a server, as a file that holds their digests and not the keys.

A key has 256 random bits, so one SHA-256 of it is as hard to invert as a slow password hash. A tenant may have several keys,
so one can be replaced without a pause: add the new one, move the clients, revoke the old one. A running server reads the
file again when it has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, NotFoundError, UnauthenticatedError, UnavailableError, shown
from .identity import Identity, Role
from .watched import Watched

log = logging.getLogger("motet.trust")
PREFIX = "motet"
_KEY = re.compile(rf"{PREFIX}-([0-9a-f]{{12}})-[A-Za-z0-9_-]{{43}}")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NO_KEY = "the key is not valid; ask the operator of this server for one (motet keys add)"


@dataclass(frozen=True, slots=True)
class Key:
    """What is stored of a key. Times are in seconds since 1970."""

    id: str  # part of the key, not secret
    tenant: str
    roles: tuple[Role, ...]
    sha256: str  # of the whole key, in hexadecimal
    created: float
    expires: float | None = None
    revoked: float | None = None

    @classmethod
    def from_dict(cls, values: Any) -> Key:
        """Raises `ConfigError`."""
        try:
            roles = tuple(Role(role) for role in values["roles"])
            key = cls(**{**values, "roles": roles})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"an entry of the key file is damaged ({error}); remove it, or restore the file"
            ) from None
        if not re.fullmatch(r"[0-9a-f]{64}", str(key.sha256)) or not roles:
            raise ConfigError(f"key {shown(key.id)} of the key file has no SHA-256 or no role; remove the entry")
        return replace(key, tenant=check_tenant(key.tenant))


def check_tenant(name: object) -> str:
    """A tenant's name. Raises `ConfigError`."""
    if not isinstance(name, str) or not _TENANT.fullmatch(name):
        raise ConfigError(
            f"a tenant's name must be 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit, got {shown(name)}"
        )
    return name


SUBJECT = "key:"  # what the subject of a key's identity begins with


class KeyFile:
    """The keys of a server. Thread-safe. Raises `NotFoundError`, `ConfigError` at construction."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = Watched([path], lambda: {key.id: key for key in read_keys(path)}, "keys")

    def identify(self, text: str) -> Identity:
        """Whose key this is. Raises `UnauthenticatedError`; its text is the same for every reason, the log has more."""
        found = _KEY.fullmatch(text)
        key = self._file.value.get(found[1]) if found else None
        digest = hashlib.sha256(text.encode()).hexdigest()
        equal = hmac.compare_digest(digest, key.sha256 if key is not None else "0" * 64)
        if key is None or not equal:
            raise UnauthenticatedError(_NO_KEY)
        now = time.time()
        if key.revoked is not None or (key.expires is not None and now >= key.expires):
            log.warning("key %s of tenant %s is %s", key.id, key.tenant, "revoked" if key.revoked else "expired")
            raise UnauthenticatedError(_NO_KEY)
        return Identity(key.tenant, f"{SUBJECT}{key.id}", frozenset(key.roles))

    def check(self, key_id: str) -> None:
        """Raises `UnauthenticatedError` if there is no such key any more, or it is revoked. An expired one may end what it has
        begun."""
        key = self._file.value.get(key_id)
        if key is None or key.revoked is not None:
            raise UnauthenticatedError(
                f"the key {shown(key_id)} that asked for this is {'not known here' if key is None else 'revoked'}; "
                "ask again with another one"
            )


def is_key(text: str) -> bool:
    return text.startswith(f"{PREFIX}-")


def read_keys(path: Path) -> list[Key]:
    """Raises `NotFoundError`, `ConfigError` (the file is damaged)."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"there is no key file '{path}'; make one with `motet keys add`") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"the key file '{path}' cannot be read: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("keys"), list):
        raise ConfigError(f"the key file '{path}' must hold an object with a list 'keys'")
    keys = [Key.from_dict(value) for value in values["keys"]]
    if len({key.id for key in keys}) < len(keys):
        raise ConfigError(f"two keys of the key file '{path}' have one id")
    return keys


def add_key(path: Path, tenant: str, roles: Iterable[Role], *, lifetime_s: float | None = None) -> str:
    """Add a key to the file, which is made if there is none, and return the key; it is stored nowhere. Raises
    `ConfigError`, `UnavailableError`."""
    now, key_id = time.time(), secrets.token_hex(6)
    text = f"{PREFIX}-{key_id}-{secrets.token_urlsafe(32)}"
    chosen = tuple(sorted(set(roles)))
    if not chosen:
        raise ConfigError(f"a key needs a role: {', '.join(Role)}")
    expires = None if lifetime_s is None else now + lifetime_s
    digest = hashlib.sha256(text.encode()).hexdigest()
    key = Key(key_id, check_tenant(tenant), chosen, digest, now, expires)
    with _locked(path):
        write_keys(path, [*(read_keys(path) if path.exists() else []), key])
    return text


def revoke_key(path: Path, key_id: str) -> None:
    """Raises `NotFoundError` (no such key), `ConfigError`, `UnavailableError`."""
    if not path.exists():
        raise NotFoundError(f"there is no key file '{path}'; make one with `motet keys add`")
    with _locked(path):
        _revoke(path, key_id)


def _revoke(path: Path, key_id: str) -> None:
    keys = read_keys(path)
    if key_id not in {key.id for key in keys}:
        raise NotFoundError(f"the key file '{path}' has no key {shown(key_id)}; `motet keys list` shows them")
    write_keys(path, [replace(k, revoked=k.revoked or time.time()) if k.id == key_id else k for k in keys])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Nobody else changes the file meanwhile: a key that was just revoked must not come back."""
    try:
        lock = open(path.with_name(f"{path.name}.lock"), "ab")  # noqa: SIM115 - the `with` below closes it
    except OSError as error:
        raise UnavailableError(f"the key file '{path}' cannot be written: {error}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_keys(path: Path, keys: Iterable[Key]) -> None:
    """Replace the file at once; a new one is readable by its owner alone, an old one keeps its owner and mode. Raises
    `UnavailableError`."""
    text = json.dumps({"keys": [asdict(key) for key in keys]}, indent=1) + "\n"
    new = path.with_name(f"{path.name}.new")
    try:
        new.unlink(missing_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            if path.exists():
                old = path.stat()
                os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode))
                if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(file.fileno(), old.st_uid, old.st_gid)
        new.replace(path)
    except OSError as error:
        raise UnavailableError(f"the key file '{path}' cannot be written: {error}") from None
