"""What an administrator does to a node's files: `init`, `token reset`, `ca rotate`, `migrate`."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from trimtab_controller import config, wiring
from trimtab_controller.clock import Clock
from trimtab_controller.config import Settings
from trimtab_controller.pki import FleetPki
from trimtab_controller.services import identity, restored
from trimtab_controller.services.hosts import JoinPlace
from trimtab_controller.services.restored import Restored
from trimtab_controller.store import certificates, hosts, leases, migrate
from trimtab_controller.store.database import Database
from trimtab_protos.errors import Conflict


@dataclass(frozen=True, slots=True)
class Founded:
    """What `init` made."""

    settings: Settings
    ca_fingerprint: str


def found(settings: Settings, clock: Clock, written: Mapping[str, Any]) -> Founded:
    """Make the data directory, CA, certificate, database, first administrator and settings file; Conflict where there is one.

    The settings file comes last: a directory without it is not founded, and a cut `init` can be run again after `rm -r`.
    """
    directory = settings.data_dir
    if directory.exists() and any(directory.iterdir()):
        raise Conflict(
            "data-dir-in-use", f"{directory} is not empty; a fleet is founded once. Choose another --data-dir or empty this one"
        )
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    settings.uploads_dir.mkdir(mode=0o700)
    _ = settings.redis_socket  # refuses a directory whose name is too long now, not at the first start
    pki = FleetPki(settings.pki_dir)
    authority = pki.create(now=clock.now())
    ensure_certificate(settings, clock)
    migrate.upgrade(settings.effective_database_url)
    reset_token(settings, clock)
    config.write_file(settings, **written)
    return Founded(settings, authority.fingerprint)


def ensure_certificate(settings: Settings, clock: Clock) -> bool:
    """Make or renew this node's certificate where it is time; True where it changed."""
    life = timedelta(days=settings.controller_certificate_days)
    return FleetPki(settings.pki_dir).ensure_controller_certificate(settings.advertise, now=clock.now(), life=life)


def reset_token(settings: Settings, clock: Clock) -> Path:
    """Give the administrator a fresh token, ending the older ones, and write it to the token file; return its path."""
    database = Database(settings.effective_database_url, pool_size=1)
    try:
        secret = database.write(lambda session: identity.bootstrap_admin(session, clock.now()))
    finally:
        database.close()
    path = settings.admin_token_path
    temporary = path.with_suffix(".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret + "\n")
    temporary.replace(path)
    return path


def require_founded(settings: Settings) -> None:
    """Raise Conflict where `init` has not run, or the database is older than this release."""
    if not settings.file.exists():
        raise Conflict(
            "not-founded",
            f"{settings.data_dir} holds no fleet; found one with `trimtab-controller init --data-dir {settings.data_dir} "
            "--advertise ADDRESS`",
        )


def require_schema(settings: Settings) -> None:
    """Raise Conflict where the database is older than this release; a newer one is fine during a rolling upgrade."""
    present = migrate.current(settings.effective_database_url)
    if present < migrate.head():
        raise Conflict(
            "database-old", f"the database is at revision {present or 'none'}; bring it up with `trimtab-controller migrate`"
        )


def join_place(settings: Settings) -> JoinPlace:
    """Return what a paste line says besides its token; read anew each time, since the CA may be rotated."""
    return JoinPlace(
        api_url=settings.api_urls[0],
        ca_fingerprint=FleetPki(settings.pki_dir).signing().fingerprint,
        token_life=timedelta(minutes=settings.host_token_minutes),
    )


# --- a database from the past ------------------------------------------------------------------------------------------------


def recover(settings: Settings, clock: Clock, *, is_applied: bool) -> Restored:
    """Ask every host what it holds and return how the database differs; with `is_applied` bring the database up to it.

    Conflict while an engine leads: it would act on the past while we read. Failover stays paused until an operator resumes it.
    """
    db = wiring.build_database(settings)
    agents = wiring.build_agents(settings, db)
    try:
        _refuse_a_leader(db, settings)
        found = db.read(hosts.live)
        seen, silent = restored.ask_hosts(found, agents.list_domains)
        what = db.read(lambda session: restored.find(session, seen, silent))
        if is_applied:
            db.write(lambda session: restored.apply(session, what, now=clock.now()))
    finally:
        agents.close()
        db.close()
    return what


def _refuse_a_leader(db: Database, settings: Settings) -> None:
    before = db.read(lambda session: leases.read(session, leases.ENGINE))
    if before is None or not before.owner:
        return
    time.sleep(settings.lease_renew_s + 1)  # the longest that a living leader goes without a beat
    after = db.read(lambda session: leases.read(session, leases.ENGINE))
    if after is not None and after.beat != before.beat:
        raise Conflict("engine-leads", f"{after.owner} leads; stop every controller before this one recovers")


# --- rotation of the CA ----------------------------------------------------------------------------------------------------


def begin_rotation(settings: Settings, clock: Clock) -> str:
    """Add a new CA to what everybody trusts; return its fingerprint."""
    return FleetPki(settings.pki_dir).begin_rotation(now=clock.now()).fingerprint


def advance_rotation(settings: Settings, clock: Clock) -> str:
    """Go on to the next stage and return it: `switched` or `none` (ended). Conflict names the hosts that have not renewed."""
    pki = FleetPki(settings.pki_dir)
    stage = pki.rotation_stage()
    if stage == "none":
        raise Conflict("ca-rotation-not-begun", "no rotation is under way; begin with `trimtab-controller ca rotate begin`")
    behind = _hosts_behind(settings, clock, since=_bundle_changed_at(pki))
    if behind:
        shown = ", ".join(behind[:10]) + (f" and {len(behind) - 10} more" if len(behind) > 10 else "")
        raise Conflict(
            "ca-rotation-waits",
            f"{len(behind)} hosts have not renewed since the last stage: {shown}; "
            "connected hosts do within a minute. Bring the others back, or remove them, then run this again",
            hosts=len(behind),
        )
    if stage == "begun":
        pki.switch_rotation()
    else:
        pki.end_rotation()
    ensure_certificate(settings, clock)
    return pki.rotation_stage()


def _bundle_changed_at(pki: FleetPki) -> datetime:
    """A file restored later only makes us wait for more renewals."""
    return datetime.fromtimestamp((pki.directory / "ca.pem").stat().st_mtime, UTC)


def _hosts_behind(settings: Settings, clock: Clock, *, since: datetime) -> list[str]:
    """Return the live hosts, by name, with a certificate in force that is older than `since`. Lapsed ones must rejoin anyway."""
    database = Database(settings.effective_database_url, pool_size=1)
    try:
        in_force = database.read(lambda session: certificates.in_force(session, clock.now()))
        late = {one.host_id for one in in_force if one.created_at <= since}
        return [host.name for host in database.read(lambda session: hosts.live(session, sorted(late)))]
    finally:
        database.close()
