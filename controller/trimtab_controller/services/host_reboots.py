"""Restarting a host: held and emptied first, or with `force` emptied by stopping what is left."""

from datetime import datetime

from sqlalchemy.orm import Session

from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.model import Actor, Host, Operation
from trimtab_controller.operations.accept import accept
from trimtab_controller.services import plans as plan_service
from trimtab_controller.store import host_reboots, plans, reach
from trimtab_protos.errors import Conflict


def reboot(session: Session, host: Host, *, force: bool, actor: Actor, now: datetime) -> Operation:
    """Accept the restart of a host, and hold it. Conflict where it is not up.

    A hold that an operator began stays; one that begins here ends with the operation. Without `force` its vms are moved away first,
    and one that cannot be ends the operation; with it they are stopped, and started again afterwards.
    """
    if host.connectivity is not HostConnectivity.UP:
        raise Conflict(
            "host-not-up", f"host {host.name} is {host.connectivity.value}: it cannot be told to restart", host=host.name
        )
    is_held, drain_id = bool(plans.maintenance_of(session, [host.id])), ""
    if not is_held and not force and host_reboots.guests_of(session, host.id):
        _view, drain = plan_service.begin_maintenance(session, host, actor=actor, now=now)
        drain_id = drain.id
    elif not is_held:
        was_cordoned = reach.set_cordon(session, host.id, is_cordoned=True)
        plans.hold_host(session, host.id, plan_id="", was_cordoned=was_cordoned, created_by=actor.name, now=now)
    return accept(
        session,
        "host.reboot",
        subject_id=host.id,
        subject_name=host.name,
        project_id="",
        params={"host_id": host.id, "force": force, "ends_hold": not is_held, "drain_operation_id": drain_id},
        actor=actor,
        now=now,
    )
