"""Durable work and its trace."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trimtab_controller.core.lifecycle import OperationState
from trimtab_protos.errors import ErrorKind, TrimtabError, rebuild
from trimtab_protos.messages import Direction


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationError:
    """A `TrimtabError` as recorded."""

    kind: ErrorKind
    code: str
    message: str
    context: Mapping[str, str]

    @classmethod
    def of(cls, error: TrimtabError) -> "OperationError":
        return cls(kind=error.kind, code=error.code, message=error.message, context=dict(error.context))

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "OperationError":
        return cls(
            kind=ErrorKind(document["kind"]),
            code=document["code"],
            message=document["message"],
            context=dict(document.get("context", {})),
        )

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind.value, "code": self.code, "message": self.message, "context": dict(self.context)}

    def as_exception(self) -> TrimtabError:
        return rebuild(self.kind, self.code, self.message, self.context)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    id: str
    kind: str
    saga_version: int
    project_id: str
    subject_id: str
    subject_name: str
    is_exclusive: bool
    state: OperationState
    params: Mapping[str, Any]
    priority: int
    driver: str
    turn: int
    next_run: datetime
    attempts: int
    step: str
    is_cancel_requested: bool
    deadline: datetime | None
    waiting_for: str
    progress: Mapping[str, Any] | None
    error: OperationError | None
    result: Mapping[str, Any] | None
    actor: str
    request_id: str
    created_at: datetime
    updated_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalEntry:
    """The recorded outcome of one step in one direction."""

    position: int
    step: str
    direction: Direction
    has_succeeded: bool
    turn: int
    result: Mapping[str, Any]
    error: OperationError | None
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    seq: int
    at: datetime
    kind: str
    project_id: str
    subject_id: str
    operation_id: str
    actor: str
    message: str
    context: Mapping[str, Any]
