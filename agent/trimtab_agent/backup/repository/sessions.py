"""Leases: who reads or writes the repository now, so that prune removes nothing from under them. No clock decides safety.

    begin: write the lease ── list the condemnations ── write the lease again, with those seen
    prune: write a condemnation ── list the leases

In this order, either the session sees the condemnation and relies on none of its packs, or prune sees the session and waits until it
ended. A session that stays silent is ended by prune: for a writer it writes `REVOKED` in the place of the manifest, which can be
written only once, so that a writer that wakes up late fails instead of listing a backup whose chunks are gone.
"""

import contextlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from trimtab_agent.backup.repository import errors
from trimtab_agent.backup.repository.blobs import BlobStore
from trimtab_agent.backup.repository.manifests import REVOKED
from trimtab_agent.clock import Clock
from trimtab_protos.errors import AlreadyExists, NotFound, TrimtabError

PREFIX = "sessions/"
PRUNE_LOCK = "locks/prune"
SILENT_AFTER_S = 3600.0
"""A session or pruner that has not renewed for so long is taken for dead. Wrong, it costs a repeated backup, never a good one."""
RENEW_EVERY_S = 300.0


class SessionKind(StrEnum):
    WRITER = "writer"
    READER = "reader"
    PRUNER = "pruner"


@dataclass(frozen=True, slots=True)
class Lease:
    session_id: str
    kind: SessionKind
    holder: str
    """The host's name, for people."""
    manifest: str
    """The name under which a writer will list its backup."""
    beat_ms: int
    seen: Sequence[str] = field(default=())
    """The condemnations that this session knows of."""

    @property
    def name(self) -> str:
        return PREFIX + self.session_id

    def encoded(self) -> bytes:
        return json.dumps(
            {
                "session_id": self.session_id,
                "kind": self.kind.value,
                "holder": self.holder,
                "manifest": self.manifest,
                "beat_ms": self.beat_ms,
                "seen": list(self.seen),
            }
        ).encode()


def decode_lease(content: bytes, name: str) -> Lease:
    try:
        document = json.loads(content)
        return Lease(
            session_id=document["session_id"],
            kind=SessionKind(document["kind"]),
            holder=document["holder"],
            manifest=document["manifest"],
            beat_ms=int(document["beat_ms"]),
            seen=tuple(document["seen"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise errors.damaged(name, "it cannot be parsed") from error


class Session:
    """One lease of this process. Not thread-safe but for `renew`, which any thread may call."""

    def __init__(self, blobs: BlobStore, clock: Clock, lease: Lease) -> None:
        self._blobs = blobs
        self._clock = clock
        self._lease = lease
        self._renewed_s = clock.boottime_s()

    @property
    def id(self) -> str:
        return self._lease.session_id

    def announce(self) -> None:
        """Make the lease visible to prune: the first thing that a session does."""
        self._write()

    def saw(self, condemnations: Sequence[str]) -> None:
        """State which condemnations this session respects."""
        self._lease = replace(self._lease, seen=tuple(condemnations))
        self._write()

    def renew(self) -> None:
        """Show that the session lives; cheap when it was shown lately."""
        if self._clock.boottime_s() - self._renewed_s >= RENEW_EVERY_S:
            self._write()

    def end(self) -> None:
        self._blobs.delete(self._lease.name)

    def _write(self) -> None:
        self._renewed_s = self._clock.boottime_s()
        self._lease = replace(self._lease, beat_ms=self._clock.now_ms())
        self._blobs.put(self._lease.name, self._lease.encoded())


def new_session(blobs: BlobStore, clock: Clock, kind: SessionKind, *, holder: str, manifest: str = "") -> Session:
    session_id = f"{clock.now_ms():012x}-{secrets.token_hex(8)}"
    return Session(blobs, clock, Lease(session_id, kind, holder, manifest, clock.now_ms()))


def live_leases(blobs: BlobStore) -> Sequence[Lease]:
    """Return every lease that is there; one that cannot be parsed counts as a session of which nothing is known."""
    found = []
    for entry in blobs.list(PREFIX):
        try:
            found.append(decode_lease(blobs.get(entry.name), entry.name))
        except NotFound:
            continue  # ended since the listing
    return found


def is_silent(lease: Lease, now_ms: int) -> bool:
    return now_ms - lease.beat_ms > SILENT_AFTER_S * 1000


def end_silent(blobs: BlobStore, lease: Lease) -> None:
    """End a session that is taken for dead, such that it cannot come back and list a backup."""
    if lease.kind is SessionKind.WRITER and lease.manifest:
        with contextlib.suppress(AlreadyExists):  # listed in time, or revoked before
            blobs.put_new(lease.manifest, [REVOKED])
    blobs.delete(lease.name)


class PruneLock:
    """At most one pruner. Taken over only from one that was silent; its holder looks again before each removal."""

    def __init__(self, blobs: BlobStore, clock: Clock, holder: str) -> None:
        self._blobs = blobs
        self._clock = clock
        self._token = Lease(f"{clock.now_ms():012x}-{secrets.token_hex(8)}", SessionKind.PRUNER, holder, "", clock.now_ms())
        self._renewed_s = clock.boottime_s()

    def take(self) -> None:
        """Conflict `prune-is-running` where another holds it."""
        for _attempt in range(2):
            try:
                self._blobs.put_new(PRUNE_LOCK, [self._token.encoded()])
                return
            except AlreadyExists:
                holder = self._holder()
            if holder is not None and not is_silent(holder, self._clock.now_ms()):
                raise errors.prune_busy(holder.holder)
            self._blobs.delete(PRUNE_LOCK)
        raise errors.prune_busy("another host")

    def check(self) -> None:
        """Renew where due. Conflict where the lock was lost: nothing may be removed any more."""
        holder = self._holder()
        if holder is None or holder.session_id != self._token.session_id:
            raise errors.prune_busy(holder.holder if holder else "another host")
        if self._clock.boottime_s() - self._renewed_s >= RENEW_EVERY_S:
            self._renewed_s = self._clock.boottime_s()
            self._token = replace(self._token, beat_ms=self._clock.now_ms())
            self._blobs.put(PRUNE_LOCK, self._token.encoded())

    def release(self) -> None:
        with contextlib.suppress(TrimtabError):  # the work is done; a lock that stays goes silent
            holder = self._holder()
            if holder is not None and holder.session_id == self._token.session_id:
                self._blobs.delete(PRUNE_LOCK)

    def _holder(self) -> Lease | None:
        try:
            return decode_lease(self._blobs.get(PRUNE_LOCK), PRUNE_LOCK)
        except NotFound:
            return None
