"""The repositories that this host was given access to, in memory only: a key on this host's disk would be a key in the clear."""

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from trimtab_agent.backup.repository.blobs import BlobStore
from trimtab_agent.backup.repository.bucket import BucketBlobs
from trimtab_agent.backup.repository.folder import FolderBlobs
from trimtab_agent.backup.repository.keys import RepositoryKey
from trimtab_agent.backup.repository.repository import Repository, RepositoryConfig, create_repository, open_repository
from trimtab_agent.backup.repository.rotation import Rotated, rotate
from trimtab_agent.clock import Clock
from trimtab_protos.errors import InvalidRequest, NotFound, PermissionDenied, Unavailable

FORBIDDEN_TREES = ("/proc", "/sys", "/dev", "/etc", "/boot", "/usr", "/bin", "/sbin", "/lib", "/lib64", "/run")


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """All that is needed to use a repository."""

    url: str
    """file:///folder or s3://bucket/prefix."""
    key: str = field(repr=False)
    fleet_id: str
    project_id: str = ""
    endpoint: str = ""
    region: str = ""
    access_key_id: str = ""
    secret_access_key: str = field(default="", repr=False)
    allow_http: bool = False


class Repositories:
    """By the controller's id. Thread-safe; every job opens its own, with its own view of the index."""

    def __init__(self, clock: Clock, *, holder: str) -> None:
        self._clock = clock
        self._holder = holder
        self._lock = threading.Lock()
        self._known: dict[str, Access] = {}

    def grant(self, name: str, access: Access, *, create: bool) -> RepositoryConfig:
        """Remember the access once it was seen to work; make the repository first where asked. Idempotent."""
        key = RepositoryKey.parse(access.key)
        blobs = blobs_of(access)
        if create:
            if isinstance(blobs, FolderBlobs):
                _make_folder(access)
            try:
                self._open(access, blobs)
            except NotFound:
                create_repository(blobs, key, fleet_id=access.fleet_id, project_id=access.project_id, clock=self._clock)
        config = self._open(access, blobs)
        with self._lock:
            self._known[name] = access
        return config

    def rotate(self, name: str, access: Access, new_key: str) -> tuple[RepositoryConfig, Rotated]:
        """Lock the repository with another key and remember the access with it. Idempotent: one that broke off is finished."""
        blobs, new = blobs_of(access), replace(access, key=RepositoryKey.parse(new_key).text)
        try:
            config = self._open(access, blobs)
        except PermissionDenied:
            config = self._open(new, blobs)
        old_key, key = RepositoryKey.parse(access.key), RepositoryKey.parse(new.key)
        rotated = rotate(blobs, config.repository_id, old=old_key, new=key)
        return self.grant(name, new, create=False), rotated

    def open(self, name: str) -> Repository:
        """Return the repository, opened. Unavailable `repository-not-open` where the agent was restarted since it was granted."""
        access = self.access(name)
        return open_repository(
            blobs_of(access),
            RepositoryKey.parse(access.key),
            fleet_id=access.fleet_id,
            clock=self._clock,
            holder=self._holder,
        )

    def access(self, name: str) -> Access:
        """Return what was granted. Unavailable `repository-not-open` where the agent was restarted since."""
        with self._lock:
            access = self._known.get(name)
        if access is None:
            raise Unavailable(
                "repository-not-open", "this host has no key of the repository now; open it again, then start the job again"
            )
        return access

    def _open(self, access: Access, blobs: BlobStore) -> RepositoryConfig:
        repository = open_repository(
            blobs, RepositoryKey.parse(access.key), fleet_id=access.fleet_id, clock=self._clock, holder=self._holder
        )
        repository.close()
        return repository.config


def blobs_of(access: Access) -> BlobStore:
    """Return the storage that an address names. InvalidRequest says what an address looks like."""
    parts = urlsplit(access.url)
    match parts.scheme:
        case "file" if parts.netloc == "":
            return FolderBlobs(_folder(access.url))
        case "s3" if parts.netloc:
            return BucketBlobs(
                parts.netloc,
                parts.path.strip("/"),
                region=access.region or "us-east-1",
                endpoint=access.endpoint or None,
                access_key_id=access.access_key_id or None,
                secret_access_key=access.secret_access_key or None,
                allow_http=access.allow_http,
            )
        case _:
            raise InvalidRequest(
                "repository-url-malformed",
                "the address of a repository is file:///folder (also on NFS) or s3://bucket/prefix",
                field="url",
            )


def _folder(url: str) -> Path:
    path = Path(unquote(urlsplit(url).path))
    is_forbidden = any(path == Path(tree) or Path(tree) in path.parents for tree in FORBIDDEN_TREES)
    if not path.is_absolute() or len(path.parts) < 2 or ".." in path.parts or is_forbidden:
        raise InvalidRequest(
            "repository-url-malformed", f"{path} is no folder for a repository; take one such as /srv/backup", field="url"
        )
    return path


def _make_folder(access: Access) -> None:
    folder = _folder(access.url)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(
            "repository-folder-missing", f"{folder} cannot be made: {error.strerror}; mount or make its parent first", field="url"
        ) from error
