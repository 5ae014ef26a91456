"""Who may read a repository: one key outside of it, and a keyring inside that only this key opens.

The repository key is never stored in the repository. The keyring holds the key of chunk ids, which never changes (else nothing
would be found again), and data keys by version: new records use the newest, older ones stay for reading. Changing the repository
key or adding a data key writes the next generation of the keyring; the newest generation is the one that counts. Each is written
twice, since without a keyring nothing can be read.
"""

import base64
import binascii
import contextlib
import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from trimtab_agent.backup.repository import errors
from trimtab_agent.backup.repository.blobs import BlobStore
from trimtab_protos.errors import AlreadyExists, Conflict, NotFound

KEY_BYTES = 32
PREFIX = "keys/"
_TEXT_PREFIX = "ttk1-"
_CHECK_BYTES = 3
_COPIES = ("a", "b")
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class RepositoryKey:
    """The key that an operator keeps: whoever has it and the repository can restore everything."""

    secret: bytes = field(repr=False)

    @staticmethod
    def new() -> "RepositoryKey":
        return RepositoryKey(secrets.token_bytes(KEY_BYTES))

    @staticmethod
    def parse(text: str) -> "RepositoryKey":
        """Return the key of its text form; blanks, dashes and case do not matter. InvalidRequest where a letter is wrong."""
        compact = "".join(text.split()).lower()
        if not compact.startswith(_TEXT_PREFIX):
            raise errors.key_malformed(f"it does not begin with {_TEXT_PREFIX}")
        letters = compact[len(_TEXT_PREFIX) :].replace("-", "").upper()
        try:
            decoded = base64.b32decode(letters + "=" * (-len(letters) % 8))
        except (binascii.Error, ValueError) as error:
            raise errors.key_malformed("it has a letter that no key has") from error
        if len(decoded) != KEY_BYTES + _CHECK_BYTES:
            raise errors.key_malformed(f"it has {len(letters)} letters of 56")
        secret = decoded[:KEY_BYTES]
        if decoded[KEY_BYTES:] != _check(secret):
            raise errors.key_malformed("a letter was mistyped: its check does not match")
        return RepositoryKey(secret)

    @property
    def text(self) -> str:
        letters = base64.b32encode(self.secret + _check(self.secret)).decode().lower()
        return _TEXT_PREFIX + "-".join(letters[i : i + 8] for i in range(0, len(letters), 8))

    @property
    def id(self) -> str:
        """Names the key without telling it."""
        return blake3(self.secret, derive_key_context="trimtab backup key id v1").hexdigest(length=8)


@dataclass(frozen=True, slots=True)
class Keyring:
    """What the repository key opens."""

    generation: int
    id_key: bytes = field(repr=False)
    data_keys: Mapping[int, bytes] = field(repr=False)

    @staticmethod
    def new() -> "Keyring":
        return Keyring(1, secrets.token_bytes(KEY_BYTES), {1: secrets.token_bytes(KEY_BYTES)})

    @property
    def newest_version(self) -> int:
        return max(self.data_keys)

    def data_key(self, version: int) -> bytes:
        """Return a data key. Conflict where the keyring has no such version: it was opened before the key was added."""
        if version not in self.data_keys:
            raise errors.damaged(f"the keyring of generation {self.generation}", f"it has no data key of version {version}")
        return self.data_keys[version]

    def with_new_data_key(self) -> "Keyring":
        added = {**self.data_keys, self.newest_version + 1: secrets.token_bytes(KEY_BYTES)}
        return Keyring(self.generation + 1, self.id_key, added)

    def without(self, versions: Collection[int]) -> "Keyring":
        """Return the next generation, which opens nothing that is sealed with these versions."""
        kept = {version: data_key for version, data_key in self.data_keys.items() if version not in versions}
        return Keyring(self.generation + 1, self.id_key, kept)


def store_keyring(blobs: BlobStore, repository_id: str, key: RepositoryKey, keyring: Keyring) -> None:
    """Write one generation, both copies. Conflict where another process wrote this generation first."""
    for name in _names(keyring):
        try:
            blobs.put_new(name, [_sealed(repository_id, key, keyring)])
        except AlreadyExists as error:
            raise Conflict(
                "keyring-changed-meanwhile", "another process changed the keys of this repository; try again", blob=name
            ) from error


def complete_keyring(blobs: BlobStore, repository_id: str, key: RepositoryKey, keyring: Keyring) -> None:
    """Write the copies of this generation that are missing, since its writer died between them."""
    present = {entry.name for entry in blobs.list(PREFIX)}
    for name in _names(keyring):
        if name not in present:
            with contextlib.suppress(AlreadyExists):
                blobs.put_new(name, [_sealed(repository_id, key, keyring)])


def load_keyring(blobs: BlobStore, repository_id: str, key: RepositoryKey) -> Keyring:
    """Return the newest keyring. PermissionDenied with a wrong key, Conflict where both copies are damaged."""
    names = [entry.name for entry in blobs.list(PREFIX)]
    if not names:
        raise errors.damaged("the repository", "it has no keyring")
    newest = max(name.removeprefix(PREFIX).split("-")[0] for name in names)
    problem: Exception | None = None
    for name in (name for name in names if name.removeprefix(PREFIX).startswith(newest)):
        try:
            return _opened(repository_id, key, blobs.get(name))
        except (Conflict, NotFound) as error:
            problem = error
    raise errors.damaged("the keyring", f"no copy of generation {int(newest)} can be read") from problem


def delete_older_keyrings(blobs: BlobStore, keyring: Keyring) -> None:
    """Remove earlier generations, so that the key that opened them opens nothing any more."""
    for entry in blobs.list(PREFIX):
        if int(entry.name.removeprefix(PREFIX).split("-")[0]) < keyring.generation:
            blobs.delete(entry.name)


def _names(keyring: Keyring) -> list[str]:
    return [f"{PREFIX}{keyring.generation:08}-{copy}.json" for copy in _COPIES]


def _sealed(repository_id: str, key: RepositoryKey, keyring: Keyring) -> bytes:
    content = {
        "id_key": keyring.id_key.hex(),
        "data_keys": {str(version): data_key.hex() for version, data_key in keyring.data_keys.items()},
    }
    nonce = secrets.token_bytes(12)
    bound = _bound(repository_id, keyring.generation, key.id)
    sealed = AESGCM(key.secret).encrypt(nonce, json.dumps(content).encode(), bound)
    document = {
        "format": _FORMAT,
        "generation": keyring.generation,
        "key_id": key.id,
        "nonce": nonce.hex(),
        "sealed": sealed.hex(),
    }
    return json.dumps(document, indent=1).encode()


def _opened(repository_id: str, key: RepositoryKey, content: bytes) -> Keyring:
    try:
        document = json.loads(content)
        version, wanted, generation = document["format"], str(document["key_id"]), int(document["generation"])
        nonce, sealed = bytes.fromhex(document["nonce"]), bytes.fromhex(document["sealed"])
    except (ValueError, KeyError, TypeError) as error:
        raise errors.damaged("a keyring", "it cannot be parsed") from error
    if version != _FORMAT:
        raise errors.format_unknown("the keyring", version)
    try:
        opened = json.loads(AESGCM(key.secret).decrypt(nonce, sealed, _bound(repository_id, generation, wanted)))
    except InvalidTag as error:
        if wanted != key.id:
            raise errors.key_wrong(given=key.id, wanted=wanted) from error
        raise errors.damaged("a keyring", "its seal is broken") from error
    return Keyring(
        generation,
        bytes.fromhex(opened["id_key"]),
        {int(number): bytes.fromhex(data_key) for number, data_key in opened["data_keys"].items()},
    )


def _bound(repository_id: str, generation: int, key_id: str) -> bytes:
    return f"trimtab-keyring|1|{repository_id}|{generation}|{key_id}".encode()


def _check(secret: bytes) -> bytes:
    return blake3(secret, derive_key_context="trimtab backup key check v1").digest(length=_CHECK_BYTES)
