"""An opened repository: its identity, its keys, and what is in it now. Writers, readers and upkeep are functions over it."""

import json
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from blake3 import blake3

from trimtab_agent.backup.repository import chunk_index, errors
from trimtab_agent.backup.repository.blobs import BlobStore
from trimtab_agent.backup.repository.chunk_index import ChunkIndex, Location, decode_index
from trimtab_agent.backup.repository.keys import PREFIX as KEYS_PREFIX
from trimtab_agent.backup.repository.keys import (
    Keyring,
    RepositoryKey,
    load_keyring,
    store_keyring,
)
from trimtab_agent.backup.repository.manifests import PREFIX as BACKUPS_PREFIX
from trimtab_agent.backup.repository.manifests import (
    REVOKED,
    Manifest,
    decode_manifest,
    manifest_name,
)
from trimtab_agent.backup.repository.packs import PREFIX as PACKS_PREFIX
from trimtab_agent.backup.repository.packs import PackReader
from trimtab_agent.backup.repository.sealing import ID_BYTES, Identifier, Kind, open_object, seal_object
from trimtab_agent.clock import Clock
from trimtab_protos.errors import AlreadyExists, NotFound, TrimtabError

CONFIG = "config.json"
CONDEMNED_PREFIX = "condemned/"
DAMAGED_PREFIX = "damaged/"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class RepositoryConfig:
    """What a repository is; written once."""

    format: int
    repository_id: str
    fleet_id: str
    project_id: str
    """Whose vms are kept in it; empty for all of the fleet."""
    created_ms: int


@dataclass(frozen=True, slots=True)
class Listing:
    manifests: Sequence[Manifest]
    """Oldest first."""
    unreadable: Mapping[str, TrimtabError]
    """By the name of the blob."""


class Repository:
    """Use `create_repository` or `open_repository`. Thread-safe."""

    def __init__(
        self,
        blobs: BlobStore,
        config: RepositoryConfig,
        key: RepositoryKey,
        keyring: Keyring,
        *,
        clock: Clock,
        index_path: Path | None,
        holder: str,
        is_read_only: bool,
    ) -> None:
        self.blobs = blobs
        self.config = config
        self.clock = clock
        self.holder = holder
        self.is_read_only = is_read_only
        self.index = ChunkIndex(index_path)
        self.unreadable_indexes: Sequence[str] = ()
        self.has_gaps = False
        """Whether chunks of listed backups may be missing, damaged or about to go: then a base is not taken on trust."""
        self.key = key
        self._adopt(keyring)
        self._damage: set[tuple[bytes, str]] = set()

    # What is in it

    def refresh(self) -> Sequence[str]:
        """Read anew what is there; return the condemnations that were seen. A session calls it after it announced itself."""
        # Condemnations before index files: docs/backup-format.md, "Order of reading".
        condemned = self.condemnations()
        self._refresh_keys()
        is_index_whole = self._refresh_index()
        packs = {entry.name for entry in self.blobs.list(PACKS_PREFIX)}
        lost = [pack for pack in self.index.packs() if pack not in packs]
        self.index.set_condemned([pack for names in condemned.values() for pack in names])
        damaged = self.known_damage()
        # With what was found and is not written down yet: whoever judges right after must not take it for whole.
        noted = [*(pair for pairs in damaged.values() for pair in pairs), *self._damage]
        self.index.set_damaged(noted, lost_packs=lost)
        self.has_gaps = bool(condemned or damaged or lost or not is_index_whole)
        return sorted(condemned)

    def condemnations(self) -> Mapping[str, Sequence[str]]:
        """Return each condemnation with the packs that prune is about to remove."""
        return {name: json.loads(content) for name, content in self._objects(CONDEMNED_PREFIX, Kind.CONDEMNED, is_lenient=False)}

    def known_damage(self) -> Mapping[str, Sequence[tuple[bytes, str]]]:
        """Return what readers and verifications found damaged, by the blob that says so."""
        return {
            name: [(bytes.fromhex(id), pack) for id, pack in json.loads(content)]
            for name, content in self._objects(DAMAGED_PREFIX, Kind.DAMAGE, is_lenient=True)
        }

    def list_backups(self, vm_id: str = "") -> Listing:
        """Return every backup that is listed, or those of one vm. Needs nothing but the repository and its key."""
        manifests: list[Manifest] = []
        unreadable: dict[str, TrimtabError] = {}
        for entry in self.blobs.list(f"{BACKUPS_PREFIX}{vm_id}/" if vm_id else BACKUPS_PREFIX):
            try:
                manifest = self._manifest(entry.name)
            except NotFound:
                continue  # removed since the listing, or revoked
            except TrimtabError as error:
                if error.retryable:
                    raise  # storage that fails for now is no damage
                unreadable[entry.name] = error
                continue
            manifests.append(manifest)
        return Listing(sorted(manifests, key=lambda found: (found.created_ms, found.backup_id)), unreadable)

    def manifest(self, vm_id: str, backup_id: str) -> Manifest:
        """Return one backup's manifest. NotFound, Conflict where it is damaged."""
        try:
            return self._manifest(manifest_name(vm_id, backup_id))
        except NotFound as error:
            raise errors.backup_missing(backup_id) from error

    def forget(self, vm_id: str, backup_id: str) -> None:
        """Take a backup off the list; its chunks go with the next prune. Idempotent."""
        self.require_writable()
        self.blobs.delete(manifest_name(vm_id, backup_id))

    # Records

    def read(self, kind: Kind, id: bytes) -> bytes:
        """Return a record's content from any whole copy. Conflict `chunk-damaged` or `chunk-missing` where there is none."""
        try:
            return self._read_any(kind, id)
        except TrimtabError as error:
            if not errors.is_damage(error):
                raise
        # Prune may have moved it, and a rotation may have added the key that it needs, since the index was read.
        self.refresh()
        return self._read_any(kind, id)

    def read_page(self, id: bytes) -> Sequence[bytes]:
        content = self.read(Kind.PAGE, id)
        return [content[at : at + ID_BYTES] for at in range(0, len(content), ID_BYTES)]

    def report_damage(self, id: bytes, pack: str) -> None:
        """Remember that a copy is not what was written; `store_damage` makes it known to the others."""
        self._damage.add((id, pack))
        self.index.add_damaged([(id, pack)])

    def store_damage(self) -> None:
        """Write down what was found damaged since the last call, so that the next backup repairs it."""
        found = set(self._damage)
        if not found or self.is_read_only:
            return
        self.has_gaps = True
        content = json.dumps([[id.hex(), pack] for id, pack in sorted(found)]).encode()
        self.put_object(Kind.DAMAGE, DAMAGED_PREFIX + self.new_name(), content)
        self._damage -= found  # what cannot be written stays known here

    def put_object(self, kind: Kind, name: str, content: bytes) -> None:
        self.blobs.put_new(name, [seal_object(self.keyring, self.identifier, kind, name, content)])

    def new_name(self) -> str:
        return f"{self.clock.now_ms():012x}-{secrets.token_hex(8)}"

    # Keys

    def require_writable(self) -> None:
        if self.is_read_only:
            raise errors.read_only()

    def close(self) -> None:
        """Let go of what is held open: a pack that is pruned elsewhere keeps its room for as long as somebody has it open."""
        self.index.close()
        self.blobs.close()

    def _adopt(self, keyring: Keyring) -> None:
        self.keyring = keyring
        self.identifier = Identifier(keyring)
        self.packs = PackReader(self.blobs, keyring, self.identifier)

    def _refresh_keys(self) -> None:
        newest = max((entry.name for entry in self.blobs.list(KEYS_PREFIX)), default="")
        if newest.removeprefix(KEYS_PREFIX).split("-")[0] != f"{self.keyring.generation:08}":
            self._adopt(load_keyring(self.blobs, self.config.repository_id, self.key))

    def _refresh_index(self) -> bool:
        """Take in the index files that are new; tell whether all could be read."""
        names = {entry.name for entry in self.blobs.list(chunk_index.PREFIX)}
        known = self.index.index_files()
        self.index.forget_index_files(known - names)
        unreadable = []
        for name in sorted(names - known):
            try:
                content = open_object(self.keyring, self.identifier, Kind.INDEX, name, self.blobs.get(name))
                for pack in decode_index(content, name):
                    self.index.add_pack(name, pack)
            except TrimtabError as error:
                if error.retryable:
                    raise
                if not isinstance(error, NotFound):  # gone: prune replaced it, and its successor is read with the next refresh
                    unreadable.append(name)
        self.unreadable_indexes = unreadable
        return not unreadable

    def _read_any(self, kind: Kind, id: bytes) -> bytes:
        problem: TrimtabError = errors.chunk_missing(id)
        for place in self.index.places(id):
            if place.entry.kind is not kind:
                continue
            try:
                return self.packs.read(place.pack, place.entry)
            except TrimtabError as error:
                if not errors.is_damage(error):
                    raise
                if not isinstance(error, NotFound):
                    problem = error
                self.note_failure(place, error)
        raise problem

    def note_failure(self, place: Location, error: TrimtabError) -> None:
        """Record the damage of one copy; a pack that prune took away is none."""
        if not isinstance(error, NotFound):
            self.report_damage(place.entry.id, place.pack)

    def _manifest(self, name: str) -> Manifest:
        blob = self.blobs.get(name)
        if blob == REVOKED:
            raise errors.blob_missing(name)
        manifest = decode_manifest(open_object(self.keyring, self.identifier, Kind.MANIFEST, name, blob), name)
        if manifest.subject.fleet_id != self.config.fleet_id:
            raise errors.damaged(name, f"it names the fleet {manifest.subject.fleet_id}")
        return manifest

    def _objects(self, prefix: str, kind: Kind, *, is_lenient: bool) -> Iterator[tuple[str, bytes]]:
        for entry in self.blobs.list(prefix):
            try:
                yield entry.name, open_object(self.keyring, self.identifier, kind, entry.name, self.blobs.get(entry.name))
            except NotFound:
                continue
            except TrimtabError as error:
                if error.retryable or not is_lenient:
                    raise


def create_repository(blobs: BlobStore, key: RepositoryKey, *, fleet_id: str, project_id: str, clock: Clock) -> RepositoryConfig:
    """Make an empty place a repository. AlreadyExists where it is one; idempotent after a creation that broke off."""
    keyring = Keyring.new()
    config = RepositoryConfig(FORMAT, f"repo-{secrets.token_hex(8)}", fleet_id, project_id, clock.now_ms())
    if not blobs.list(KEYS_PREFIX):
        blobs.delete(CONFIG)  # of a creation that broke off: without a keyring it opens nothing
    try:
        blobs.put_new(CONFIG, [_encode_config(config, keyring)])
    except AlreadyExists as error:
        raise errors.repository_exists(blobs.where) from error
    store_keyring(blobs, config.repository_id, key, keyring)
    return config


def open_repository(
    blobs: BlobStore,
    key: RepositoryKey,
    *,
    fleet_id: str | None,
    clock: Clock,
    index_path: Path | None = None,
    holder: str = "",
) -> Repository:
    """Return the repository at this place. With `fleet_id` None it is opened for reading, whatever fleet it belongs to.

    `index_path` is where this host keeps its view between sessions, one file for one process; None keeps none.
    NotFound, PermissionDenied with a wrong key or of another fleet, Conflict where it is damaged.
    """
    config, seal = _decode_config(blobs)
    keyring = load_keyring(blobs, config.repository_id, key)
    if seal != _config_seal(config, keyring):
        raise errors.damaged(CONFIG, "its content has changed since the repository was created")
    if fleet_id is not None and config.fleet_id != fleet_id:
        raise errors.of_another_fleet(found=config.fleet_id, given=fleet_id)

    def build() -> Repository:
        return Repository(
            blobs, config, key, keyring, clock=clock, index_path=index_path, holder=holder, is_read_only=fleet_id is None
        )

    repository = _with_fresh_index(build, index_path)
    repository.index.forget_sessions()
    repository.refresh()
    return repository


def _with_fresh_index(build: Callable[[], Repository], index_path: Path | None) -> Repository:
    try:
        return build()
    except sqlite3.DatabaseError:
        if index_path is None:
            raise
        index_path.unlink()  # derived: whatever is wrong with it, a new one is right
        return build()


def _encode_config(config: RepositoryConfig, keyring: Keyring) -> bytes:
    return json.dumps({**asdict(config), "seal": _config_seal(config, keyring)}, indent=1).encode()


def _config_seal(config: RepositoryConfig, keyring: Keyring) -> str:
    canonical = json.dumps(asdict(config), sort_keys=True, separators=(",", ":"))
    return blake3(canonical.encode(), key=keyring.id_key).hexdigest()


def _decode_config(blobs: BlobStore) -> tuple[RepositoryConfig, str]:
    try:
        document = json.loads(blobs.get(CONFIG))
        seal = str(document.pop("seal"))
        if document["format"] != FORMAT:
            raise errors.format_unknown("the repository", document["format"])
        return RepositoryConfig(**document), seal
    except NotFound as error:
        raise errors.not_a_repository(blobs.where) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.damaged(CONFIG, "it cannot be parsed") from error
