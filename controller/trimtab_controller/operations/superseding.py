"""Closes what is under way of a vm so that something may take over from it: failed, unless it has taken effect already."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from trimtab_controller.core.model import Operation
from trimtab_controller.operations.sagas import set_ha
from trimtab_controller.store import operations
from trimtab_controller.store.database import Session


def supersede(session: Session, vm_id: str, *, by: str, now: datetime) -> None:
    """Close the vm's live exclusive operation, if it has one; see `store.operations.supersede` for what it leaves behind."""
    closed = operations.supersede(session, vm_id, by=by, now=now, result_of=_result_of)
    if closed is not None and _result_of(closed) is not None:
        set_ha.tell_changed(session, closed, now=now)


def _result_of(operation: Operation) -> Mapping[str, Any] | None:
    return set_ha.in_force(operation) if operation.kind == set_ha.SAGA.name else None
