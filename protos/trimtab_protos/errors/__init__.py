"""The ten kinds of error that cross a boundary of Trimtab, shared by controller and agent.

A caller acts by class and shows `message`; programs compare `code`. Translation happens once per edge: `status.py` for gRPC,
`api/problems.py` for REST, `hypervisor/kvm/errors.py` for libvirt. Standard library only, so that pure code may raise them.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import ClassVar


class ErrorKind(StrEnum):
    """Mirrors `errors.v1.ErrorKind`; new kinds only when a caller would act differently."""

    INVALID_REQUEST = "invalid_request"
    NOT_FOUND = "not_found"
    ALREADY_EXISTS = "already_exists"
    CONFLICT = "conflict"
    NO_CAPACITY = "no_capacity"
    QUOTA_EXCEEDED = "quota_exceeded"
    PERMISSION_DENIED = "permission_denied"
    UNAVAILABLE = "unavailable"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    INTERNAL = "internal"


class TrimtabError(Exception):
    """Base of everything that is told to a caller.

    `code` is stable kebab-case, `message` one sentence safe for users (it names the field, the constraint and, where there is
    one, the next command), `context` bounded facts for logs and clients, never secrets.
    """

    kind: ClassVar[ErrorKind] = ErrorKind.INTERNAL
    retryable: ClassVar[bool] = False

    def __init__(self, code: str, message: str, **context: object) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.context: Mapping[str, str] = {name: str(value) for name, value in context.items()}

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


class InvalidRequest(TrimtabError):
    """The request can never succeed as it is."""

    kind = ErrorKind.INVALID_REQUEST


class NotFound(TrimtabError):
    """No such object, or none that the caller may see."""

    kind = ErrorKind.NOT_FOUND


class AlreadyExists(TrimtabError):
    """The name or id is taken by another object."""

    kind = ErrorKind.ALREADY_EXISTS


class Conflict(TrimtabError):
    """The object's state, generation, turn or epoch forbids it now; read again, then decide."""

    kind = ErrorKind.CONFLICT


class NoCapacity(TrimtabError):
    """No host fits; the reasons per host are in the operation's explanation."""

    kind = ErrorKind.NO_CAPACITY


class QuotaExceeded(TrimtabError):
    """The project's quota forbids it."""

    kind = ErrorKind.QUOTA_EXCEEDED


class PermissionDenied(TrimtabError):
    """The caller is known and may not."""

    kind = ErrorKind.PERMISSION_DENIED


class Unavailable(TrimtabError):
    """A part that is needed does not answer; nothing was done by this call; retry later."""

    kind = ErrorKind.UNAVAILABLE
    retryable = True


class DeadlineExceeded(TrimtabError):
    """The outcome is unknown: observe, then decide; never resend blindly."""

    kind = ErrorKind.DEADLINE_EXCEEDED
    retryable = True


class Internal(TrimtabError):
    """A defect of ours or an answer that cannot be; the log has the rest."""

    kind = ErrorKind.INTERNAL


CLASS_BY_KIND: Mapping[ErrorKind, type[TrimtabError]] = {
    error_class.kind: error_class
    for error_class in (
        InvalidRequest,
        NotFound,
        AlreadyExists,
        Conflict,
        NoCapacity,
        QuotaExceeded,
        PermissionDenied,
        Unavailable,
        DeadlineExceeded,
        Internal,
    )
}


def rebuild(kind: ErrorKind, code: str, message: str, context: Mapping[str, str] | None = None) -> TrimtabError:
    """Return the error that was recorded or received as these fields."""
    return CLASS_BY_KIND[kind](code, message, **dict(context or {}))
