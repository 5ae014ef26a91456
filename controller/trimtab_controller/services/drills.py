"""Drills: what the loss of a host would do, played by failover's own core on a copy of the fleet. Changes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from trimtab_controller.core.failover import FailoverSettings
from trimtab_controller.core.failover.drill import Assumptions, Drill, lose_host
from trimtab_controller.core.failover.records import Desired, Holder, HostRecord, VmRecord
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.model import Actor, Host
from trimtab_controller.core.planning import Estate
from trimtab_controller.core.planning.domains import HOST
from trimtab_controller.services import survival
from trimtab_controller.store import events, failover, host_guards, hosts, power_cuts
from trimtab_controller.store.database import Session
from trimtab_controller.store.failover import KeptVm
from trimtab_protos.errors import Conflict, InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """One snapshot of what a drill is played on."""

    estate: Estate
    hosts: Mapping[str, HostRecord]
    vms: Mapping[str, KeptVm]
    lost: Host
    has_power: bool

    def is_local(self, vm_id: str) -> bool:
        return vm_id in self.vms and self.vms[vm_id].has_local_disk


def read(session: Session, lost: Host, estate: Estate) -> Inputs:
    """Conflict where the host is not up: then it is no drill."""
    if lost.connectivity is not HostConnectivity.UP:
        raise Conflict(
            "host-not-up", f"{lost.name} is {lost.connectivity.value}: see `trimtab failover get {lost.name}`", host_id=lost.id
        )
    guards, paths = host_guards.read_all(session), failover.fence_paths(session)
    records = {}
    for host in hosts.live(session):
        guard = guards.get(host.id, host_guards.HostGuard())
        own = tuple(path.name for path in paths if path.host_id == host.id)
        records[host.id] = HostRecord(
            id=host.id,
            standing=host.connectivity,
            is_armed=guard.is_armed,
            has_beacon=bool(guard.beacon_pool_id),
            kill_s=guard.kill_ms / 1000,
            power_paths=own,
            is_cordoned=host.is_cordoned,
        )
    has_power = any(path.is_ready for path in paths if path.host_id == lost.id)
    vms = {vm.id: vm for vm in failover.vms_at_home(session, lost.id) if vm.desired_power == "running"}
    return Inputs(estate=estate, hosts=records, vms=vms, lost=lost, has_power=has_power)


def cut_power(session: Session, inputs: Inputs, drill: Drill, *, confirm: str, force: bool, actor: Actor, now: datetime) -> None:
    """Ask the leader to cut the host's power. Conflict where no device is ready, or, without `force`, where a vm would not run again.

    `confirm` must be the host's name: InvalidRequest where it is not.
    """
    lost = inputs.lost
    if confirm != lost.name:
        raise InvalidRequest(
            "confirm-differs", f"confirm: say the name of the host that is to be lost, {lost.name}", field="confirm"
        )
    if not inputs.has_power:
        raise Conflict(
            "fence-path-missing",
            f"{lost.name} has no power device that answered its last test; see `trimtab fence test {lost.name}`",
            host_id=lost.id,
        )
    stays_off = sorted(inputs.vms[one.vm].name for one in drill.outcomes if one.seconds is None and one.vm in inputs.vms)
    if (drill.frozen or stays_off) and not force:
        why = drill.frozen or f"{len(stays_off)} vms would not run again: {', '.join(stays_off[:8])}"
        raise Conflict(
            "drill-would-lose", f"the power of {lost.name} is not cut: {why}; `--force` cuts it all the same", host_id=lost.id
        )
    power_cuts.ask(session, lost.id, asked_by=actor.name, now=now)
    events.append(
        session,
        kind="drill.asked",
        subject_id=lost.id,
        actor=actor.name,
        message=f"{actor.name} asked for {lost.name} to lose its power: a drill",
        now=now,
    )


def host_loss(inputs: Inputs, *, settings: FailoverSettings, assumptions: Assumptions | None = None) -> Drill:
    """Play the loss; takes seconds for a large fleet."""
    lost = inputs.lost
    covered = survival.coverage(inputs.estate, kinds=(HOST,)).domains
    mine = next((one for one in covered if one.proof.domain.value == lost.name), None)
    refusals = {one.vm_id: one.reason for one in (mine.uncovered if mine else ()) if not inputs.is_local(one.vm_id)}
    records = {
        vm.id: VmRecord(
            id=vm.id,
            host=vm.host_id,
            epoch=vm.epoch,
            holders=(Holder(host=vm.host_id, epoch=vm.epoch),),
            desired=Desired.RUNNING if vm.ha == "restart" else Desired.IGNORED,
            is_local=vm.has_local_disk,
            priority=vm.priority,
            start_delay_s=vm.start_delay_s,
            name=vm.name,
            project=vm.project_id,
            group=vm.start_group,
            group_order=vm.start_order,
        )
        for vm in inputs.vms.values()
    }
    return lose_host(
        inputs.hosts,
        records,
        lost.id,
        settings=settings,
        refusals=refusals,
        has_power=inputs.has_power,
        assumptions=assumptions or Assumptions(),
    )
