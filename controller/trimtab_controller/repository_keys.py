"""Keys of backup repositories as text: made here, shown once, checked when they come back. Their spelling is the agents' too
(docs/backup-format.md, "Keys"). What a row keeps of one is sealed (`secret_box.py`).
"""

import base64
import binascii
import secrets

from blake3 import blake3

from trimtab_protos.errors import InvalidRequest

_KEY_BYTES, _CHECK_BYTES = 32, 3
_PREFIX = "ttk1-"


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
