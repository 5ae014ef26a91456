"""What a gateway commits about a host: the start of its session, its renewals of certificates, and whether it is heard from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from trimtab_controller import pki
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.model import Host
from trimtab_controller.services import behind, observations
from trimtab_controller.services.hosts import SignedPair, record_certificates
from trimtab_controller.store import behind as behind_store
from trimtab_controller.store import certificates, events, host_guards, host_reports, hosts, leases, reach
from trimtab_controller.store.database import Session
from trimtab_controller.store.host_guards import HostGuard
from trimtab_protos.errors import PermissionDenied
from trimtab_protos.messages import DomainObservation, Inventory, NetworkSpec, PoolSpec

_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """A Hello with what the peer's certificate said. `inventory` None: the hypervisor does not answer, so `domains` say nothing."""

    host_id: str
    certificate_serial: str
    gateway_id: str
    incarnation: str
    boot_id: str
    agent_address: str
    inventory: Inventory | None
    domains: Sequence[DomainObservation]
    lease_number: int = 0
    """The highest that was ever given to the host, as far as its agent knows."""
    database_mark: int = 0
    certificate_dates: tuple[datetime, datetime] | None = None
    """Of the peer's certificate: not before, not after. None: not known, so that it has to be on record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What the agent is welcomed with."""

    lease_number: int
    name: str
    pools: tuple[PoolSpec, ...]
    networks: tuple[NetworkSpec, ...]
    guard: HostGuard = field(default_factory=HostGuard)
    """What the host's lease was last counted on for."""
    database_mark: int = 0


def open_session(session: Session, opening: Opening, now: datetime) -> Opened:
    """Commit a host's new session before it is welcomed: incarnation, inventory, every domain. PermissionDenied, NotFound."""
    before = _admit(session, opening, now)
    if behind_store.state(session).is_in_force:
        # A loss of yesterday, which nobody ends while the leader stands still. Nobody starts anything on the strength of it either.
        leases.lift_revocation(session, opening.host_id)
    number, was = hosts.open_session(
        session,
        opening.host_id,
        incarnation=opening.incarnation[:64],
        boot_id=opening.boot_id[:64],
        agent_address=opening.agent_address[:200],
        gateway_id=opening.gateway_id,
        held_lease_number=opening.lease_number,
        now=now,
    )
    if was is not HostConnectivity.UP:
        _note(session, before, HostConnectivity.UP, was=was, now=now)
    if before.boot_id and before.boot_id != opening.boot_id:
        events.append(
            session,
            kind="host.booted",
            subject_id=before.id,
            message=f"{before.name} was booted since it was last heard from",
            context={"boot_id": opening.boot_id[:64]},
            now=now,
        )
    elif before.incarnation and before.incarnation != opening.incarnation:
        events.append(
            session,
            kind="host.agent_restored",
            subject_id=before.id,
            message=f"the agent of {before.name} lost its journal and began anew from what libvirt has; commands of before are refused",
            context={"incarnation": opening.incarnation[:64], "was": before.incarnation},
            now=now,
        )
    if opening.inventory is not None:
        host_reports.store_inventory(session, opening.host_id, opening.inventory, now=now)
    observations.record_all(session, opening.host_id, opening.domains, now, is_complete=opening.inventory is not None)
    guard, pools = host_guards.read(session, opening.host_id), host_reports.pool_specs_of(session, opening.host_id)
    is_behind = behind_store.state(session).is_in_force  # what its domains say may have proven it just now
    if is_behind:
        # What was deleted or changed since would be made again. But its beacon goes on where it renewed.
        pools = tuple(one for one in pools if one.pool_id == guard.beacon_pool_id)
    if opening.inventory is not None:
        reach.ask_again(session, opening.host_id, of_everything=is_behind)
    return Opened(
        lease_number=number,
        name=before.name,
        pools=pools,
        networks=() if is_behind else host_reports.network_specs_of(session, opening.host_id),
        guard=guard,
        database_mark=behind_store.mark(session),
    )


def _admit(session: Session, opening: Opening, now: datetime) -> Host:
    """Return the host as it was; notice where it knows more than the database. PermissionDenied, InvalidRequest.

    A database of yesterday has not recorded the certificates that were given since. A host with one of those is let in, while the
    database is behind or where it was issued before the last recovery: TLS has verified that the fleet signed it for this host, and
    without a session its lease, and with it its guests, would end.
    """
    if not hosts.is_live(session, opening.host_id):
        check_certificate(session, opening.host_id, opening.certificate_serial)
    found = hosts.get(session, opening.host_id)
    behind.notice_hello(session, found, lease_number=opening.lease_number, mark=opening.database_mark, now=now)
    if opening.certificate_dates is not None and certificates.get(session, opening.certificate_serial) is None:
        not_before, not_after = opening.certificate_dates
        if behind_store.state(session).is_in_force or not_before <= (behind_store.recovered_at(session) or _NEVER):
            _record_lost(session, found, opening.certificate_serial, not_after, now)
    check_certificate(session, opening.host_id, opening.certificate_serial)
    return found


def _record_lost(session: Session, host: Host, serial: str, not_after: datetime, now: datetime) -> None:
    certificates.record(session, serial=serial, host_id=host.id, purpose=pki.Purpose.AGENT, not_after=not_after, now=now)
    events.append(
        session,
        kind="host.certificate_recorded",
        subject_id=host.id,
        message=f"{host.name} has a certificate that was given after the database was saved; it is on record again",
        context={"serial": serial},
        now=now,
    )


def check_certificate(session: Session, host_id: str, serial: str) -> None:
    """Raise PermissionDenied unless the serial is one that this fleet gave to this host and did not revoke."""
    known = certificates.get(session, serial)
    if known is None or known.host_id != host_id or known.purpose != pki.Purpose.AGENT:
        raise PermissionDenied("certificate-unknown", "this certificate was not given to this host", host_id=host_id)
    if known.revoked_at is not None:
        raise PermissionDenied("certificate-revoked", "this host's certificate was revoked; join it again", host_id=host_id)


def record_renewal(session: Session, host_id: str, serial: str, signed: SignedPair, now: datetime) -> None:
    """Record a member's fresh certificates; the old ones stay good until they expire, since sessions still use them."""
    check_certificate(session, host_id, serial)
    if not hosts.is_live(session, host_id):
        raise PermissionDenied("host-removed", "this host is no member of the fleet any more", host_id=host_id)
    record_certificates(session, host_id, signed, now)


_EARLIER = {
    HostConnectivity.UP: (HostConnectivity.SUSPECT, HostConnectivity.LOST),
    HostConnectivity.SUSPECT: (HostConnectivity.UP, HostConnectivity.NEW),
    HostConnectivity.LOST: (HostConnectivity.SUSPECT,),
}
"""Which transitions a gateway may write; a fenced host comes back only through a new session."""


def change_connectivity(session: Session, host_id: str, to: HostConnectivity, *, lease_number: int, now: datetime) -> bool:
    """Write what the session of `lease_number` sees; False where a newer session or the engine knows better."""
    host = hosts.get(session, host_id)
    if not hosts.change_connectivity(session, host_id, lease_number=lease_number, allowed_from=_EARLIER[to], to=to, now=now):
        return False
    _note(session, host, to, was=host.connectivity, now=now)
    return True


def _note(session: Session, host: Host, to: HostConnectivity, *, was: HostConnectivity, now: datetime) -> None:
    said = {
        HostConnectivity.UP: "is heard from",
        HostConnectivity.SUSPECT: "has not been heard from for a lease's length",
        HostConnectivity.LOST: "stays silent; its guests may still run",
    }[to]
    events.append(
        session,
        kind=f"host.{to.value}",
        subject_id=host.id,
        message=f"{host.name} {said}",
        context={"was": was.value},
        now=now,
    )
