"""The seam to storage: named blobs that are written once. A folder, a bucket and the tests' faulty store implement it.

What every implementation promises: a blob appears whole or not at all, is durable before `put_new` returns, and a listing shows
every blob whose writing returned before the listing began.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class BlobEntry:
    name: str
    size_bytes: int


class BlobStore(Protocol):
    """Errors of all verbs: Unavailable (try again), PermissionDenied. May be used from several threads."""

    @property
    def where(self) -> str:
        """For people: the folder or bucket, without secrets."""

    def put_new(self, name: str, parts: Sequence[bytes]) -> None:
        """Write a blob that must not exist. AlreadyExists, NoCapacity. Of two writers of one name exactly one succeeds.

        What is written has a random part, so that no two writers write the same: a bucket tells by that whose a blob is.
        """

    def close(self) -> None:
        """Let go of what is held open; the store may be used again."""

    def put(self, name: str, content: bytes) -> None:
        """Write or overwrite a small blob; only leases are."""

    def get(self, name: str) -> bytes:
        """Return a whole blob. NotFound."""

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        """Return at most `length` bytes, fewer only at the end of the blob. NotFound."""

    def list(self, prefix: str) -> Sequence[BlobEntry]:
        """Return the blobs under a prefix that ends with a slash, in order of their names."""

    def delete(self, name: str) -> None:
        """Remove a blob; one that is not there is no error."""

    def remove_debris(self, older_than_s: float) -> int:
        """Remove what killed writers left half written; return how many. Never a blob."""
