"""Power devices of hosts as operators configure and see them: secrets go in and never come out again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol

from trimtab_controller.core.model import Actor, Host
from trimtab_controller.core.model.failover import FencePathRow
from trimtab_controller.fencing import FencePath, check_path
from trimtab_controller.store import events, failover, lookup, schema
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict, InvalidRequest

PATHS_MAX = 8
# Options that say where the device is: a secret that was given for one place is not carried over to another.
_WHERE = ("ip", "ipport", "plug", "username", "systems_uri", "redfish_uri")


class Seals(Protocol):
    """What keeps secrets; see `secret_box.py`."""

    @property
    def fleet_id(self) -> str: ...

    def seal(self, secret: str, *, place: str) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceView:
    """A power device with its host's name."""

    path: FencePathRow
    host_name: str


def place_of(host_id: str, name: str) -> str:
    """Return what a device's secret is bound to."""
    return f"fence path {name} of {host_id}"


def configure(
    session: Session, host: Host, paths: Sequence[FencePath], *, box: Seals, actor: Actor, now: datetime
) -> tuple[FenceView, ...]:
    """Replace a host's power devices, in order of use. InvalidRequest names the field.

    A device that is given without a secret keeps the one it had, as long as it is the same device in the same place.
    """
    names = [path.name for path in paths]
    if len(names) != len(set(names)):
        raise InvalidRequest("fence-path-twice", "name: two power devices of one host need two names", field="name")
    if len(paths) > PATHS_MAX:
        raise InvalidRequest("fence-paths-many", f"paths: at most {PATHS_MAX} power devices per host", field="paths")
    for path in paths:
        check_path(path)
    present = {path.name: path for path in failover.fence_paths(session, host.id)}
    rows = [
        {
            "name": path.name,
            "agent": path.agent,
            "options": dict(path.options),
            "secret_file": path.secret_file,
            "secret": box.seal(path.secret, place=place_of(host.id, path.name)) or _kept(present.get(path.name), path),
        }
        for path in paths
    ]
    failover.set_fence_paths(session, host.id, rows, now=now)
    shown = ", ".join(f"{path.name} ({path.agent})" for path in paths) or "none"
    _tell(
        session, "host.fence_configured", host, f"{actor.name} configured the power devices of {host.name}: {shown}", actor, now
    )
    return of_host(session, host)


def _kept(before: FencePathRow | None, path: FencePath) -> str:
    if before is None or path.secret_file or before.agent != path.agent:
        return ""
    is_same_place = all(before.options.get(name) == path.options.get(name) for name in _WHERE)
    return before.secret if is_same_place else ""


def of_host(session: Session, host: Host) -> tuple[FenceView, ...]:
    return tuple(FenceView(path=path, host_name=host.name) for path in failover.fence_paths(session, host.id))


def would_be_killed(session: Session, host: Host) -> tuple[str, ...]:
    """Return the names of the vms that the host's warden kills when its lease ends: those that may start elsewhere."""
    kept = failover.vms_at_home(session, host.id)
    return tuple(sorted(vm.name for vm in kept if vm.ha == "restart" and not vm.has_local_disk))


def everywhere(session: Session) -> tuple[FenceView, ...]:
    """Return the power devices of all hosts, by host and order of use."""
    found = failover.fence_paths(session)
    names = lookup.names(session, schema.host, {path.host_id for path in found})
    views = [FenceView(path=path, host_name=names.get(path.host_id, "")) for path in found]
    return tuple(sorted(views, key=lambda view: (view.host_name, view.path.position)))


def ask_for_test(session: Session, host: Host | None, *, now: datetime) -> tuple[FenceView, ...]:
    """Have the leader ask the devices for their status; None: of all hosts. It never switches anything."""
    if host is not None and not failover.fence_paths(session, host.id):
        raise Conflict(
            "fence-not-configured",
            f"{host.name} has no power device; give it one with `trimtab fence config {host.name} --agent ...`",
            host_id=host.id,
        )
    failover.want_tests(session, host.id if host else "", now=now)
    return of_host(session, host) if host else everywhere(session)


def opened(row: FencePathRow, open_secret: Callable[[str, str], str]) -> FencePath:
    """Return the device as it is called. `open_secret`: sealed secret, place -> secret; Conflict where it does not open."""
    path = FencePath(name=row.name, agent=row.agent, options=row.options, secret_file=row.secret_file)
    return replace(path, secret=open_secret(row.secret, place_of(row.host_id, row.name))) if row.secret else path


def _tell(session: Session, kind: str, host: Host, message: str, actor: Actor, now: datetime) -> None:
    events.append(session, kind=kind, subject_id=host.id, actor=actor.name, message=message, now=now)
