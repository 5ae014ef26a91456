"""Keys of backup repositories: made here, shown once, and kept sealed with a secret that is in a file and never in the database.

    fleet secret (a file, 0600, the same on every node of the controller) ── seals ──► wrapped_key, wrapped_secret (rows)

Who has a copy of the database alone can open no repository; who lost the file opens each with the key that was saved when it was
created. The text of a key is the agents' (docs/backup-format.md, "Keys").
"""

import base64
import binascii
import hashlib
import os
import secrets
from pathlib import Path

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from trimtab_protos.errors import InvalidRequest, Unavailable

SECRET_BYTES = 32
_NONCE_BYTES = 12
_KEY_BYTES, _CHECK_BYTES = 32, 3
_PREFIX = "ttk1-"


class Vault:
    """Seals and opens with the secret in `path`, which is made on first use. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def fleet_id(self) -> str:
        """Names this fleet in the repositories that it makes, without telling the secret."""
        return f"fleet-{hashlib.sha256(b'trimtab fleet id v1|' + self._secret()).hexdigest()[:20]}"

    def seal(self, text: str, *, owner: str) -> str:
        """Return the text sealed for the row `owner`; it opens in no other."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return base64.b64encode(nonce + AESGCM(self._secret()).encrypt(nonce, text.encode(), owner.encode())).decode()

    def open(self, sealed: str, *, owner: str) -> str:
        """Return what was sealed. Unavailable `fleet-secret-wrong` where this node has another secret."""
        content = base64.b64decode(sealed)
        try:
            return AESGCM(self._secret()).decrypt(content[:_NONCE_BYTES], content[_NONCE_BYTES:], owner.encode()).decode()
        except InvalidTag as error:
            raise Unavailable(
                "fleet-secret-wrong",
                f"{self._path} is not the secret that the keys of the backup repositories were sealed with; copy it from another "
                "node of the controller, or create the repository's row anew with the key that was saved: "
                "`trimtab backup repo create NAME --url URL --key-file FILE`",
            ) from error

    def _secret(self) -> bytes:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            content = self._make()
        if len(content) != SECRET_BYTES:
            raise Unavailable("fleet-secret-damaged", f"{self._path} has {len(content)} of {SECRET_BYTES} bytes; restore it")
        return content

    def _make(self) -> bytes:
        """Write a new secret whole or not at all: of several processes that come at once one's stays."""
        aside = self._path.with_name(f".{self._path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            os.write(descriptor, secrets.token_bytes(SECRET_BYTES))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        try:
            os.link(aside, self._path)
        except FileExistsError:
            pass  # another process was faster: its secret is the fleet's
        finally:
            aside.unlink()
        return self._path.read_bytes()


def new_key() -> str:
    """Return the text of a fresh repository key."""
    return _text(secrets.token_bytes(_KEY_BYTES))


def parse_key(text: str) -> str:
    """Return the key's one spelling. InvalidRequest `repository-key-malformed` says what is wrong with it."""
    compact = "".join(text.split()).lower()
    if not compact.startswith(_PREFIX):
        raise _malformed(f"it does not begin with {_PREFIX}")
    letters = compact[len(_PREFIX) :].replace("-", "").upper()
    try:
        decoded = base64.b32decode(letters + "=" * (-len(letters) % 8))
    except (binascii.Error, ValueError) as error:
        raise _malformed("it has a letter that no key has") from error
    if len(decoded) != _KEY_BYTES + _CHECK_BYTES:
        raise _malformed(f"it has {len(letters)} letters of 56")
    if _text(decoded[:_KEY_BYTES]) != _spelled(decoded):
        raise _malformed("a letter was mistyped: its check does not match")
    return _spelled(decoded)


def key_id(text: str) -> str:
    """Return what names the key without telling it, as the repository itself spells it."""
    letters = text[len(_PREFIX) :].replace("-", "").upper()
    secret = base64.b32decode(letters)[:_KEY_BYTES]
    return blake3(secret, derive_key_context="trimtab backup key id v1").hexdigest(length=8)


def _text(secret: bytes) -> str:
    check = blake3(secret, derive_key_context="trimtab backup key check v1").digest(length=_CHECK_BYTES)
    return _spelled(secret + check)


def _spelled(content: bytes) -> str:
    letters = base64.b32encode(content).decode().lower()
    return _PREFIX + "-".join(letters[i : i + 8] for i in range(0, len(letters), 8))


def _malformed(why: str) -> InvalidRequest:
    return InvalidRequest("repository-key-malformed", f"this is no repository key: {why}; it looks like ttk1-…", field="key")
