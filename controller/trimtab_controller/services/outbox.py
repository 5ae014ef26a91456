"""Records a batch of what a host must not lose, item by item: one that cannot be taken does not hold back the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog
from sqlalchemy.exc import IntegrityError

from trimtab_controller.services import job_updates, observations
from trimtab_controller.services.job_updates import JobUpdate
from trimtab_controller.store.database import Session
from trimtab_protos.errors import TrimtabError
from trimtab_protos.messages import DomainObservation

log = structlog.get_logger(__name__)

Item = JobUpdate | DomainObservation


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of a batch. `has_woken`: an operation is due, so the caller nudges after commit."""

    has_woken: bool
    taken: tuple[Item, ...]
    refused: tuple[Item, ...]


def record(session: Session, host_id: str, items: Sequence[Item], now: datetime) -> Recorded:
    """Record the items in order. A refused one is logged and dropped: it would come again for ever."""
    has_woken = False
    taken: list[Item] = []
    refused: list[Item] = []
    for item in items:
        try:
            with session.begin_nested():
                if isinstance(item, JobUpdate):
                    has_woken |= job_updates.record(session, host_id, item, now)
                else:
                    observations.record(session, host_id, item, now)
        except (TrimtabError, IntegrityError) as error:
            log.warning("outbox item refused", host_id=host_id, kind=type(item).__name__, error=str(error)[:300])
            refused.append(item)
        else:
            taken.append(item)
    return Recorded(has_woken, tuple(taken), tuple(refused))
