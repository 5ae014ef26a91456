"""Keeps secrets (passwords of power devices, keys of backup repositories) in rows that are of no use to who reads only the database.

AES-256-GCM under a key that is a file of the controllers alone (`<data-dir>/pki/secrets.key`, 0600; with several nodes it is copied
like the rest of that directory). Each secret is bound to its place: moved to another row it does not open.
"""

import base64
import hashlib
import os
import secrets
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from trimtab_protos.errors import Conflict, Unavailable

FILE_NAME = "secrets.key"
_KEY_BYTES, _NONCE_BYTES = 32, 12


class SecretBox:
    """Thread-safe; the key is read at each use, so that one that was copied here is taken up without a restart."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME

    @property
    def fleet_id(self) -> str:
        """Names this fleet in the repositories that it makes, without telling the key."""
        return f"fleet-{hashlib.sha256(b'trimtab fleet id v1|' + self._key(may_make=True)).hexdigest()[:20]}"

    def seal(self, secret: str, *, place: str) -> str:
        """Return the secret as it may lie in a row; '' stays ''. The first call makes the key."""
        if not secret:
            return ""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = AESGCM(self._key(may_make=True)).encrypt(nonce, secret.encode(), place.encode())
        return base64.b64encode(nonce + sealed).decode()

    def open(self, sealed: str, *, place: str) -> str:
        """Return the secret. Conflict (`secret-unreadable`) where this node has not the key with which it was sealed."""
        if not sealed:
            return ""
        try:
            content = base64.b64decode(sealed, validate=True)
            key = self._key(may_make=False)
            return AESGCM(key).decrypt(content[:_NONCE_BYTES], content[_NONCE_BYTES:], place.encode()).decode()
        except (OSError, ValueError, InvalidTag) as error:
            raise Conflict(
                "secret-unreadable",
                f"the secret of {place} does not open with {self._path.name} of this node; copy that file from the node that has it, "
                "or give the secret again: `trimtab fence config`, `trimtab backup repo create NAME --url URL --key-file FILE` (the key of a "
                "volume is in no other place)",
            ) from error

    def _key(self, *, may_make: bool) -> bytes:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            if not may_make:
                raise
            content = self._make()
        if len(content) != _KEY_BYTES:
            raise Unavailable("secrets-key-damaged", f"{self._path} has {len(content)} of {_KEY_BYTES} bytes; restore it")
        return content

    def _make(self) -> bytes:
        """Write a new key whole or not at all: of several who come at once one wins, and all use the winner's."""
        aside = self._path.with_name(f".{FILE_NAME}.{secrets.token_hex(8)}")
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(AESGCM.generate_key(8 * _KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, self._path)
        except FileExistsError:
            pass
        finally:
            aside.unlink()
        return self._path.read_bytes()
