"""How machines become hosts: tokens, the checks of a join, admission, and what a lapsed host must prove to keep its id.

Certificates are signed between two transactions: `assess` says for which host id, then the caller signs, then `admit` checks
everything again and commits; certificates of a refused admission were handed to nobody and are worth nothing, since gateways
accept only serials that `admit` recorded.
"""

import hashlib
import hmac
import ipaddress
import re
import secrets
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509

from trimtab_controller import pki
from trimtab_controller.clock import mint
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.model import Actor, Host
from trimtab_controller.store import audit, behind, certificates, events, host_reports, host_tokens, hosts
from trimtab_controller.store.database import Session
from trimtab_controller.store.host_tokens import HostToken
from trimtab_protos.errors import AlreadyExists, Conflict, InvalidRequest, NotFound, PermissionDenied, TrimtabError

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_MACHINE_ID = re.compile(r"[0-9a-f]{32}")
_AGENT_ADDRESS = re.compile(r"(\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<four>[0-9.]+)):(?P<port>[0-9]{1,5})")
TOKEN_LIFE = timedelta(minutes=15)
CLOCK_SKEW_MAX_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinPlace:
    """Where machines join: what a paste line has to say besides the token."""

    api_url: str
    ca_fingerprint: str
    token_life: timedelta = TOKEN_LIFE


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedHostToken:
    """A token with its secret, which is shown once."""

    id: str
    secret: str
    """`jt-<id>.<secret>`."""
    command: str
    """One line for a root shell on the new host."""
    expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What a machine says of itself when it joins; mirrors `controller.v1.HostFacts`."""

    name: str
    machine_id: str
    smbios_uuid: str
    agent_version: str
    agent_address: str
    migration_address: str
    sent_unix_ms: int
    previous_host_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """What stands against a join, and as which host the machine would be admitted (None: a new one)."""

    refusals: tuple[TrimtabError, ...]
    token: HostToken | None = None
    returning: Host | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedPair:
    """Certificates for one host, signed and not yet recorded."""

    agent: pki.IssuedCertificate
    libvirt: pki.IssuedCertificate


# --- tokens --------------------------------------------------------------------------------------------------------------


def create_token(
    session: Session, name: str, actor: Actor, now: datetime, *, place: JoinPlace, is_rejoin: bool = False
) -> IssuedHostToken:
    """Make a one-use token bound to a host name and return it with its paste line.

    AlreadyExists where a live host has the name, unless `is_rejoin`, which re-admits exactly that host; then NotFound without one.
    """
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            "host-name-invalid", "name: 1 to 63 of a-z, 0-9 and '-', a letter or digit at both ends, as in node4", field="name"
        )
    holder = hosts.find(session, name)
    # A host that never opened a session may have lost the answer to its join: it may try again under its name.
    if holder is not None and not is_rejoin and holder.connectivity is not HostConnectivity.NEW:
        raise AlreadyExists(
            "host-exists", f"host {name} is a member already; `trimtab host token create {name} --rejoin` re-admits it", name=name
        )
    if holder is None and is_rejoin:
        raise NotFound("host-not-found", f"no host {name} to re-admit", name=name)
    token_id, secret = mint("join"), secrets.token_urlsafe(32)
    token = host_tokens.insert(
        session,
        token_id=token_id,
        name=name,
        secret_sha256=_sha256(secret),
        host_id=holder.id if holder and is_rejoin else None,
        expires_at=now + place.token_life,
        created_by=actor.name,
        now=now,
    )
    shown = f"jt-{token_id.removeprefix('join-')}.{secret}"
    command = f"trimtab-agent join {place.api_url} --token {shown} --ca-fingerprint {place.ca_fingerprint}"
    return IssuedHostToken(id=token_id, secret=shown, command=command, expires_at=token.expires_at)


def _verify_token(session: Session, secret: str, now: datetime) -> HostToken:
    token_id, _, given = secret.removeprefix("jt-").partition(".")
    token = host_tokens.find(session, f"join-{token_id}") if len(token_id) <= 32 else None
    if token is None or not hmac.compare_digest(token.secret_sha256, _sha256(given)):
        raise PermissionDenied("host-token-refused", "the token is unknown; make one with `trimtab host token create NAME`")
    if token.used_at is not None:
        raise PermissionDenied("host-token-used", "the token was used already; each serves one join", name=token.name)
    if token.expires_at <= now:
        raise PermissionDenied("host-token-expired", f"the token expired at {token.expires_at:%H:%M:%S} UTC", name=token.name)
    return token


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- the checks of a join ------------------------------------------------------------------------------------------------


def assess(
    session: Session, token_secret: str, facts: HostFacts, now: datetime, *, skew_max_s: float = CLOCK_SKEW_MAX_S
) -> Assessment:
    """Return every reason against the join; a wrong token is the only one that a stranger learns."""
    try:
        token = _verify_token(session, token_secret, now)
    except PermissionDenied as refused:
        return Assessment(refusals=(refused,))
    refusals = _wrong_facts(token, facts)
    skew_s = facts.sent_unix_ms / 1000 - now.timestamp()
    if abs(skew_s) > skew_max_s:
        refusals.append(
            Conflict(
                "clock-skew",
                f"the host's clock is {abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} the controller's; "
                f"at most {skew_max_s:g} s: let both follow one time source, then retry",
                skew_s=f"{skew_s:.3f}",
            )
        )
    returning = None
    if not refusals:
        try:
            returning = _returning_host(session, token, facts)
        except TrimtabError as refused:
            refusals.append(refused)
    taken = hosts.holders(session, name=token.name, machine_id=facts.machine_id, smbios_uuid=facts.smbios_uuid)
    for what, holder in taken.items():
        if returning is None or holder.id != returning.id:
            refusals.append(_taken(what, holder))
    own_id = returning.id if returning else ""
    if not refusals and not host_reports.is_own_address(session, own_id, facts.migration_address):
        refusals.append(
            AlreadyExists(
                "host-migration-address-taken",
                f"another host has the migration address {facts.migration_address}; give this one its own",
                field="migration_address",
            )
        )
    return Assessment(refusals=tuple(refusals), token=token, returning=returning)


def _taken(what: str, holder: Host) -> TrimtabError:
    advice = {
        "name": "choose another name",
        "machine_id": "it looks like a clone; give it one of its own: `rm /etc/machine-id; systemd-machine-id-setup`",
        "smbios_uuid": "it looks like a clone; give it one of its own in its firmware or hypervisor",
    }[what]
    label = {"name": "name", "machine_id": "machine-id", "smbios_uuid": "SMBIOS UUID"}[what]
    return AlreadyExists(
        f"host-{what.replace('_', '-')}-taken", f"host {holder.name} has this {label} already; {advice}", field=what
    )


def _wrong_facts(token: HostToken, facts: HostFacts) -> list[TrimtabError]:
    wrong: list[TrimtabError] = []
    if facts.name and facts.name != token.name:
        wrong.append(PermissionDenied("host-token-name", f"the token is for host {token.name}, not {facts.name}", field="name"))
    if not _MACHINE_ID.fullmatch(facts.machine_id):
        wrong.append(_malformed("machine_id", "32 hexadecimal digits, as /etc/machine-id has them"))
    try:
        uuid.UUID(facts.smbios_uuid)
    except ValueError:
        wrong.append(_malformed("smbios_uuid", "a UUID, as in /sys/class/dmi/id/product_uuid"))
    address = _AGENT_ADDRESS.fullmatch(facts.agent_address)
    if address is None or not _is_usable_ip(address["six"] or address["four"]) or not 1 <= int(address["port"]) <= 65535:
        wrong.append(_malformed("agent_address", "ADDRESS:PORT with an IP address, as in 192.0.2.11:8446"))
    if not _is_usable_ip(facts.migration_address):
        wrong.append(_malformed("migration_address", "an IP address of this host that the others reach, as in 192.0.2.11"))
    return wrong


def _malformed(field: str, expected: str) -> TrimtabError:
    return InvalidRequest("host-fact-malformed", f"{field}: expected {expected}", field=field)


def _is_usable_ip(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_unspecified or address.is_multicast)


def _returning_host(session: Session, token: HostToken, facts: HostFacts) -> Host | None:
    """Return the member that this machine says to be; its proof is checked by `verify_rejoin`."""
    named = hosts.find(session, token.name)
    if facts.previous_host_id:
        try:
            previous = hosts.get(session, facts.previous_host_id)
        except NotFound:
            raise PermissionDenied(
                "host-id-foreign",
                f"this machine holds the identity {facts.previous_host_id} of another fleet; "
                "leave that one first (`trimtab-agent leave`)",
                host_id=facts.previous_host_id[:40],
            ) from None
        if named is None or named.id != previous.id:
            raise Conflict(
                "host-identity-conflict",
                f"this machine was {previous.name} ({previous.id}), which the token for {token.name} does not re-admit; "
                "drop its old identity first (`trimtab-agent leave`)",
                host_id=previous.id,
            )
        return previous
    if token.host_id is not None:
        raise PermissionDenied(
            "rejoin-proof-missing",
            f"the token re-admits {token.name}, but this machine has lost the key that proves it; "
            f"remove the host (`trimtab host remove {token.name}`), then join it anew",
            host_id=token.host_id,
        )
    is_retry = (
        named is not None
        and named.connectivity is HostConnectivity.NEW
        and (named.machine_id, named.smbios_uuid) == (facts.machine_id, facts.smbios_uuid)
    )
    return named if is_retry else None


def verify_rejoin(
    authorities: Sequence[x509.Certificate], host_id: str, certificate_pem: str, proof: bytes, *, token: str, agent_csr_pem: str
) -> str:
    """Return the serial of the certificate, expired or not, with which the machine proved to be `host_id`; else PermissionDenied."""
    certificate = pki.load_certificate(certificate_pem, field="previous_certificate_pem")
    pki.verify_signed_by(authorities, certificate)
    if pki.dns_names(certificate) != [host_id]:
        raise PermissionDenied("rejoin-proof-wrong", "the previous certificate is another host's", host_id=host_id)
    pki.verify_rejoin_proof(certificate, proof, token=token, agent_csr_pem=agent_csr_pem)
    return pki.serial_of(certificate)


# --- admission -----------------------------------------------------------------------------------------------------------


def admit(
    session: Session,
    token_secret: str,
    facts: HostFacts,
    signed: SignedPair,
    now: datetime,
    *,
    host_id: str,
    proven_serial: str = "",
    skew_max_s: float = CLOCK_SKEW_MAX_S,
) -> Host:
    """Use the token up and make the machine the host `host_id`, for which `signed` was made. Raises the first refusal.

    `proven_serial`: of the certificate that a machine with a previous identity proved to hold.
    """
    assessment = assess(session, token_secret, facts, now, skew_max_s=skew_max_s)
    if assessment.refusals:
        raise assessment.refusals[0]
    behind.refuse(session)
    token, returning = assessment.token, assessment.returning
    assert token is not None
    if (returning.id if returning else host_id) != host_id:
        raise Conflict("join-raced", "another join under this name came first; retry")
    if returning is not None and facts.previous_host_id:
        _check_proven_certificate(session, proven_serial, host_id)
    if not host_tokens.use_up(session, token.id, host_id=host_id, now=now):
        raise PermissionDenied("host-token-used", "the token was used already; each serves one join", name=token.name)
    if returning is None:
        _insert_host(session, host_id, token, facts, now)
    else:
        _readmit(session, returning, facts, now)
    record_certificates(session, host_id, signed, now)
    host_reports.map_everything(session, host_id)
    events.append(
        session,
        kind="host.rejoined" if returning else "host.joined",
        subject_id=host_id,
        actor=token.created_by,
        message=f"{token.name} {'rejoined' if returning else 'joined'} the fleet",
        context={"token_id": token.id, "agent_address": facts.agent_address, "agent_version": facts.agent_version[:40]},
        now=now,
    )
    note_join(session, assessment, facts, now)
    return hosts.get(session, host_id)


def note_join(session: Session, assessment: Assessment, facts: HostFacts, now: datetime) -> None:
    """Write a join that was accepted, or refused to a machine with a good token, into the audit trail.

    Strangers without a token are only counted: they could fill the trail.
    """
    if assessment.token is None:
        return
    refused = assessment.refusals[0] if assessment.refusals else None
    audit.append(
        session,
        at=now,
        actor=assessment.token.created_by,
        request_id=assessment.token.id,
        project_id="",
        verb="host.join",
        resource=f"host/{assessment.token.name}",
        outcome="denied" if refused else "accepted",
        cause=refused.code if refused else "",
        context={"agent_address": facts.agent_address, "machine_id": facts.machine_id},
    )


def _check_proven_certificate(session: Session, serial: str, host_id: str) -> None:
    known = certificates.get(session, serial)
    if known is None or known.host_id != host_id or known.purpose != pki.Purpose.AGENT or known.revoked_at is not None:
        raise PermissionDenied("rejoin-proof-wrong", "the previous certificate was revoked or is not known", host_id=host_id)


def _insert_host(session: Session, host_id: str, token: HostToken, facts: HostFacts, now: datetime) -> None:
    host_class = hosts.find_class(session, hosts.DEFAULT_CLASS)
    assert host_class is not None, "init made it, and it cannot be deleted"
    hosts.insert(
        session,
        host_id=host_id,
        name=token.name,
        host_class_id=host_class.id,
        agent_address=facts.agent_address,
        migration_address=facts.migration_address,
        machine_id=facts.machine_id,
        smbios_uuid=facts.smbios_uuid,
        now=now,
    )


def _readmit(session: Session, host: Host, facts: HostFacts, now: datetime) -> None:
    """Renew a member: its old certificates die, its vms and claims stay; SQL learns of the rest when it opens a session."""
    certificates.revoke_all_of(session, host.id, now=now)
    behind.believe(session, host.id, now=now)
    hosts.update(
        session,
        host.id,
        agent_address=facts.agent_address,
        migration_address=facts.migration_address,
        machine_id=facts.machine_id,
        smbios_uuid=facts.smbios_uuid,
    )


def record_certificates(session: Session, host_id: str, signed: SignedPair, now: datetime) -> None:
    """Record both serials; only then may the certificates be handed out."""
    for purpose, issued in ((pki.Purpose.AGENT, signed.agent), (pki.Purpose.LIBVIRT, signed.libvirt)):
        certificates.record(session, serial=issued.serial, host_id=host_id, purpose=purpose, not_after=issued.not_after, now=now)


def sign_pair(
    authority: pki.SigningAuthority,
    host_id: str,
    *,
    agent_csr_pem: str,
    libvirt_csr_pem: str,
    migration_address: str,
    now: datetime,
    life: timedelta,
) -> SignedPair:
    """Return both certificates of a host; InvalidRequest names the request that is wrong. No I/O."""
    return SignedPair(
        agent=authority.sign_agent(agent_csr_pem, host_id, now=now, life=life),
        libvirt=authority.sign_libvirt(libvirt_csr_pem, host_id, migration_address, now=now, life=life),
    )


# --- service discovery ---------------------------------------------------------------------------------------------------


def discovery_targets(
    fleet: Sequence[Host], *, controller_targets: Mapping[str, str], agent_metrics_port: int = 9107
) -> list[dict[str, object]]:
    """Return Prometheus' http_sd document: every agent by address, and this node's processes (`controller_targets`: name to ADDRESS:PORT)."""
    groups: list[dict[str, object]] = [
        {"targets": [target], "labels": {"job": "trimtab-controller", "process": process}}
        for process, target in sorted(controller_targets.items())
    ]
    for host in fleet:
        address = host.agent_address.rpartition(":")[0]
        groups.append(
            {
                "targets": [f"{address}:{agent_metrics_port}"],
                "labels": {"job": "trimtab-agent", "host": host.name, "host_id": host.id},
            }
        )
    return groups
