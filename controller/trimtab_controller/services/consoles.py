"""Who may sit at a guest's console, and for how long: a token that opens one session, and what ends the session.

A token is good for one minute and one use, for one vm where it was placed then, one kind of console, and the API token that asked for
it. The session goes on only while that API token, its user's role and the vm's place are what they were.
"""

import hmac
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.lifecycle import DesiredPower, ObservedState
from trimtab_controller.core.model import Actor, Role, Vm
from trimtab_controller.services.authorise import Access, Unauthenticated, secret_hash
from trimtab_controller.services.mutations import Mutation, record
from trimtab_controller.store import claims, consoles, identity, vms
from trimtab_controller.store.consoles import Console
from trimtab_protos.console_messages import ConsoleKind
from trimtab_protos.errors import Conflict, TrimtabError

TOKEN_LIFETIME = timedelta(seconds=60)
TOKEN_PREFIX = "con-"  # noqa: S105 - kind of the id that the token begins with


@dataclass(frozen=True, slots=True)
class NewConsole:
    console: Console
    # Shown once.
    token: str


@dataclass(frozen=True, slots=True)
class Seat:
    """An opened session and the vm whose console it is."""

    console: Console
    vm: Vm
    # For the trail: `projects/p1/vms/web1`.
    resource: str


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a session ended; `code` is stable, `sentence` for who sat there."""

    code: str
    sentence: str


def create(session: Session, vm: Vm, access: Access, *, kind: ConsoleKind, now: datetime) -> NewConsole:
    """Return a token for one session. Conflict where the vm does not run anywhere."""
    if not vm.host_id or vm.observed_state in {ObservedState.STOPPED, ObservedState.ABSENT}:
        raise Conflict(
            "vm-not-running", f"vm {vm.name} does not run, so nobody is at its console; start it: `trimtab vm start {vm.name}`"
        )
    secret = secrets.token_urlsafe(32)
    console = consoles.insert(
        session,
        console_id=mint("con"),
        vm=(vm.id, vm.project_id, vm.host_id, vm.epoch),
        token_id=access.token_id,
        actor=access.actor.name,
        kind=kind,
        secret_sha256=secret_hash(secret),
        expires_at=now + TOKEN_LIFETIME,
        now=now,
    )
    return NewConsole(console, f"{console.id}.{secret}")


def enter(session: Session, token: str, *, request_id: str, now: datetime) -> Seat:
    """Use the token up and return the seat. Unauthenticated where it opens nothing (any more), with the reason.

    Conflict(`vm-moved`): the vm was placed anew since; ask for another token.
    """
    identifier, _, secret = token.partition(".")
    console = consoles.find(session, identifier) if identifier.startswith(TOKEN_PREFIX) and len(token) < 200 else None
    # Compare even where there is no such token, so that the answer takes as long.
    expected = console.secret_sha256 if console else secret_hash("")
    if not hmac.compare_digest(expected, secret_hash(secret)) or console is None:
        raise Unauthenticated("console-token-unknown", "the console's token is not known; ask for one by `vm console`")
    if console.opened_at is not None:
        raise Unauthenticated("console-token-used", "the console's token was used already; each opens one session")
    if not consoles.use_up(session, console.id, now=now):
        raise Unauthenticated("console-token-expired", "the console's token has expired; it is good for one minute")
    vm = vms.get(session, console.vm_id)
    ending = standing(session, console, now=now)
    if ending is None and vm.epoch != console.epoch:
        ending = Ending("vm-moved", f"vm {vm.name} was placed anew since the token was made; ask for another one")
    if ending is not None:
        raise _refusal(ending)
    seat = Seat(console, vm, _resource(session, vm))
    _trail(session, seat, verb="console.open", request_id=request_id, now=now)
    return seat


def standing(session: Session, console: Console, *, now: datetime) -> Ending | None:
    """Return why the session may not go on; None where it may."""
    credential = identity.find_credential(session, console.token_id)
    if credential is None or credential.user.disabled_at is not None:
        return Ending("user-gone", f"user {console.actor} is there no more")
    token = credential.token
    if token.revoked_at is not None or (token.expires_at is not None and token.expires_at <= now):
        return Ending("token-ended", "the token with which this console was opened was revoked or has expired")
    if not Actor(name=console.actor, roles=dict(credential.roles)).may(Role.OPERATOR, console.project_id):
        return Ending("role-missing", f"{console.actor} is no operator of the vm's project any more")
    vm = vms.get(session, console.vm_id)
    if vm.deleted_at is not None:
        return Ending("vm-deleted", f"vm {vm.name} was deleted")
    if vm.host_id and vm.host_id != console.host_id:
        return Ending("vm-moved", f"vm {vm.name} has moved to another host; open its console again")
    return None


def after_end(session: Session, console: Console, *, now: datetime) -> Ending | None:
    """Return why the guest's side closed the console, None while the records do not say yet."""
    ending = standing(session, console, now=now)
    if ending is not None:
        return ending
    vm = vms.get(session, console.vm_id)
    if not vm.host_id or vm.desired_power is DesiredPower.STOPPED or vm.observed_state is ObservedState.STOPPED:
        return Ending("vm-stopped", f"vm {vm.name} was stopped")
    if claims.migration_of(session, vm.id) is not None:
        return Ending("vm-moved", f"vm {vm.name} is moving to another host; open its console again")
    return None


def leave(session: Session, seat: Seat, ending: Ending, *, request_id: str, now: datetime) -> None:
    """Put the end of a session on record."""
    consoles.close(session, seat.console.id, cause=ending.code, now=now)
    _trail(session, seat, verb="console.close", request_id=request_id, now=now)


def _refusal(ending: Ending) -> TrimtabError:
    kind = Conflict if ending.code.startswith("vm-") else Unauthenticated
    return kind(ending.code, ending.sentence)


def _resource(session: Session, vm: Vm) -> str:
    project = identity.find_project(session, vm.project_id)
    return f"projects/{project.name if project else vm.project_id}/vms/{vm.name}"


def _trail(session: Session, seat: Seat, *, verb: str, request_id: str, now: datetime) -> None:
    mutation = Mutation(
        actor=Actor(name=seat.console.actor, request_id=request_id),
        verb=verb,
        resource=seat.resource,
        project_id=seat.console.project_id,
        fingerprint="",
        is_dry_run=False,
        now=now,
    )
    record(session, mutation, outcome="accepted")
