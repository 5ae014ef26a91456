"""Blobs in an S3 bucket through obstore. A put is atomic there; `If-None-Match: *` makes it fail where the name is taken."""

from collections.abc import Sequence
from datetime import timedelta

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import S3Store

from trimtab_agent.backup.repository import errors
from trimtab_agent.backup.repository.blobs import BlobEntry
from trimtab_protos.errors import NotFound, TrimtabError

_TIMEOUT = timedelta(seconds=120)
"""Of one request: a pack of 16 MiB over a line of 2 Mbit/s."""

# A missing object comes as Python's own error from some verbs and as obstore's from others.
_MISSING = (NotFoundError, FileNotFoundError)
_FAILURES = (BaseError, OSError)


class BucketBlobs:
    """A bucket, or what lies under a prefix of it. Retries of one request are obstore's; nothing above repeats them."""

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        region: str = "us-east-1",
        endpoint: str | None = None,
        access_key_id: str | None = None,
        secret_access_key: str | None = None,
        allow_http: bool = False,
        retries: int = 5,
    ) -> None:
        self._where = f"s3://{bucket}/{prefix}".rstrip("/")
        # Without keys those of the host's environment count; obstore refuses a None.
        given = {"endpoint": endpoint, "access_key_id": access_key_id, "secret_access_key": secret_access_key}
        self._store = S3Store(
            bucket,
            prefix=prefix or None,
            region=region,
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
            virtual_hosted_style_request=endpoint is None,
            client_options={"allow_http": allow_http, "timeout": _TIMEOUT},
            retry_config={"max_retries": retries},
        )

    @property
    def where(self) -> str:
        return self._where

    def put_new(self, name: str, parts: Sequence[bytes]) -> None:
        content = b"".join(parts)
        try:
            # One request: S3 has no condition on a multipart upload's parts.
            obstore.put(self._store, name, content, mode="create", use_multipart=False)
        except AlreadyExistsError as error:
            # obstore repeats a request whose answer was lost, and then finds what it wrote itself: no other writes the same bytes.
            if not self._holds(name, content):
                raise errors.blob_exists(name) from error
        except _FAILURES as error:
            raise _translated(error, name) from error

    def put(self, name: str, content: bytes) -> None:
        try:
            obstore.put(self._store, name, content, use_multipart=False)
        except _FAILURES as error:
            raise _translated(error, name) from error

    def get(self, name: str) -> bytes:
        try:
            return obstore.get(self._store, name).bytes().to_bytes()
        except _FAILURES as error:
            raise _translated(error, name) from error

    def _holds(self, name: str, content: bytes) -> bool:
        try:
            return self.get(name) == content
        except NotFound:
            return False

    def close(self) -> None:
        """Nothing is held open between requests."""

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        if length == 0:
            return b""
        try:
            return obstore.get_range(self._store, name, start=offset, length=length).to_bytes()
        except _FAILURES as error:
            raise _translated(error, name) from error

    def list(self, prefix: str) -> Sequence[BlobEntry]:
        try:
            found = [
                BlobEntry(meta["path"], meta["size"]) for batch in obstore.list(self._store, prefix.rstrip("/")) for meta in batch
            ]
        except _FAILURES as error:
            raise _translated(error, prefix) from error
        return sorted(found, key=lambda blob: blob.name)

    def delete(self, name: str) -> None:
        try:
            obstore.delete(self._store, name)
        except _MISSING:
            return
        except _FAILURES as error:
            raise _translated(error, name) from error

    def remove_debris(self, older_than_s: float) -> int:  # noqa: ARG002 - a put leaves nothing half written
        return 0


def _translated(error: Exception, name: str) -> TrimtabError:
    detail = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    match error:
        case NotFoundError() | FileNotFoundError():
            return errors.blob_missing(name)
        case PermissionDeniedError() | UnauthenticatedError():
            return errors.repository_refused(name, detail)
        case _ if "QuotaExceeded" in str(error) or "InsufficientStorage" in str(error) or "StorageFull" in str(error):
            return errors.repository_full(name, detail)
        case _:
            return errors.repository_unreachable(name, detail)
