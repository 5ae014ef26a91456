"""Runs a mutation: the repeat is answered, the work done, the trail written, all in one transaction."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from trimtab_controller.core.model import Actor
from trimtab_controller.store import audit, behind, idempotency
from trimtab_protos.errors import Conflict, TrimtabError


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """What is asked, by whom."""

    actor: Actor
    verb: str
    # For the trail: `projects/p1/vms/web1`.
    resource: str
    project_id: str
    # SHA-256 of route and body; '' where the caller gave no request id, so that no repeat can come.
    fingerprint: str
    is_dry_run: bool
    now: datetime
    # Taken although the database is behind the fleet.
    ends_behind: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A rendered response. `stored_body`: what a repeat gets, where `body` holds a secret that is shown once."""

    status: int
    body: bytes
    stored_body: bytes | None = None
    # The caller nudges after commit.
    has_operation: bool = False
    etag: str = ""


class DryRun(Exception):
    """Carries the answer out of a transaction that must not be committed."""

    def __init__(self, answer: Answer) -> None:
        super().__init__("dry run")
        self.answer = answer


def perform(session: Session, mutation: Mutation, work: Callable[[Session], Answer]) -> Answer:
    """Return the stored answer of a repeat, else do the work and record it.

    Conflict("database-behind") where the database is older than the fleet, Conflict("request-id-reused") where the id came before
    with another request. Raises DryRun instead of returning where nothing may be changed.
    """
    actor = mutation.actor
    if not mutation.ends_behind:
        behind.refuse(session)
    if mutation.fingerprint:
        stored = idempotency.claim(
            session,
            actor=actor.user_id,
            request_id=actor.request_id,
            fingerprint=mutation.fingerprint,
            now=mutation.now,
        )
        if stored is not None:
            if stored.fingerprint != mutation.fingerprint:
                raise Conflict(
                    "request-id-reused",
                    "this request id came before with another request; use a new one",
                    request_id=actor.request_id,
                )
            return Answer(status=stored.status, body=json.dumps(stored.response).encode())
    answer = work(session)
    if mutation.is_dry_run:
        raise DryRun(answer)
    record(session, mutation, outcome="accepted")
    if mutation.fingerprint:
        response = json.loads(answer.stored_body or answer.body or b"null")
        idempotency.answer(session, actor=actor.user_id, request_id=actor.request_id, status=answer.status, response=response)
    return answer


def record(session: Session, mutation: Mutation, *, outcome: str, error: TrimtabError | None = None) -> None:
    """Append to the trail; the error's message is left out, since it may quote what was sent."""
    audit.append(
        session,
        at=mutation.now,
        actor=mutation.actor.name,
        request_id=mutation.actor.request_id,
        project_id=mutation.project_id,
        verb=mutation.verb,
        resource=mutation.resource,
        outcome=outcome,
        cause=error.code if error else "",
    )
