"""Carries a `TrimtabError` through gRPC: a code for the transport, an `ErrorDetail` in the trailing metadata."""

from typing import Protocol

import grpc

from trimtab_protos.errors import (
    DeadlineExceeded,
    ErrorKind,
    Internal,
    InvalidRequest,
    PermissionDenied,
    TrimtabError,
    Unavailable,
    rebuild,
)
from trimtab_protos.errors.v1 import error_pb2

DETAIL_KEY = "trimtab-error-bin"

STATUS_BY_KIND: dict[ErrorKind, grpc.StatusCode] = {
    ErrorKind.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorKind.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorKind.ALREADY_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    ErrorKind.CONFLICT: grpc.StatusCode.ABORTED,
    ErrorKind.NO_CAPACITY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorKind.QUOTA_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorKind.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    ErrorKind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorKind.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    ErrorKind.INTERNAL: grpc.StatusCode.INTERNAL,
}


class FailedCall(Protocol):
    """What `grpc.RpcError` objects of the sync and the aio API share."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> object: ...


def to_detail(error: TrimtabError) -> error_pb2.ErrorDetail:
    """Return the wire form; also what the agent's journal records of a failed command."""
    return error_pb2.ErrorDetail(
        kind=error_pb2.ErrorKind.Value(f"ERROR_KIND_{error.kind.name}"),
        code=error.code,
        message=error.message,
        context={name: value[:500] for name, value in list(error.context.items())[:20]},
    )


def from_detail(detail: error_pb2.ErrorDetail) -> TrimtabError:
    """Return the error a detail describes; a kind from a newer release becomes Internal."""
    name = error_pb2.ErrorKind.Name(detail.kind).removeprefix("ERROR_KIND_")
    kind = ErrorKind[name] if name in ErrorKind.__members__ else ErrorKind.INTERNAL
    return rebuild(kind, detail.code, detail.message, dict(detail.context))


def trailing_metadata(error: TrimtabError) -> tuple[tuple[str, bytes], ...]:
    """Return what a servicer sets before it aborts with `STATUS_BY_KIND[error.kind]`."""
    return ((DETAIL_KEY, to_detail(error).SerializeToString()),)


def from_rpc_error(failed: FailedCall, *, peer: str) -> TrimtabError:
    """Return the typed error of a failed call to `peer`.

    UNAVAILABLE without a detail comes from the transport: for a mutating call the outcome may still be unknown, since the
    connection can break after the peer acted. Callers of mutating verbs therefore re-send under the same key or observe.
    """
    pairs = failed.trailing_metadata() or ()
    for key, value in pairs:  # type: ignore[attr-defined]
        if key == DETAIL_KEY:
            return from_detail(error_pb2.ErrorDetail.FromString(value))
    match failed.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED | grpc.StatusCode.CANCELLED:
            return DeadlineExceeded("rpc-deadline", f"{peer} did not answer in time; the outcome is unknown", peer=peer)
        case grpc.StatusCode.UNAVAILABLE:
            return Unavailable("peer-unreachable", f"{peer} cannot be reached", peer=peer, detail=failed.details() or "")
        case grpc.StatusCode.PERMISSION_DENIED | grpc.StatusCode.UNAUTHENTICATED:
            return PermissionDenied("peer-refused", f"{peer} refused the caller's certificate", peer=peer)
        case grpc.StatusCode.UNIMPLEMENTED:
            return InvalidRequest("verb-unknown", f"{peer} is too old for this verb; upgrade its agent", peer=peer)
        case code:
            return Internal("rpc-failed", f"{peer} failed with {code.name}", peer=peer, detail=failed.details() or "")
