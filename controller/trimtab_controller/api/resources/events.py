"""Events as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trimtab_controller.api.resources.common import Subject
from trimtab_controller.core.model import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class EventResource:
    seq: int
    at: datetime
    kind: str
    # '' for the fleet's own.
    project: str
    # The name is '' where the subject is gone.
    subject: Subject
    # '' where no operation did it.
    operation_id: str
    actor: str
    message: str
    context: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class EventPage:
    items: tuple[EventResource, ...]
    # '' where the newest is among them.
    next_page_token: str
    # Highest number shown: ask for what comes after it.
    last_seq: int


def render_event(event: Event, names: Mapping[str, str]) -> EventResource:
    return EventResource(
        seq=event.seq,
        at=event.at,
        kind=event.kind,
        project=names.get(event.project_id, ""),
        subject=Subject(id=event.subject_id, name=names.get(event.subject_id, "")),
        operation_id=event.operation_id,
        actor=event.actor,
        message=event.message,
        context=dict(event.context),
    )
