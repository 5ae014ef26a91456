"""From a scenario file to a world: builds hosts, vms and rules. What happens there is `timeline.py`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.scenarios.hosts import Double, SimHost
from tests.scenarios.invariants import Invariants
from tests.scenarios.process import record_of
from tests.scenarios.world import World
from trimtab_controller.core.failover import FailoverSettings
from trimtab_controller.core.failover.records import (
    ApartRule,
    Desired,
    Hold,
    Holder,
    HostRule,
    Phase,
    Rule,
    Seen,
    TogetherRule,
    VmRecord,
)
from trimtab_controller.core.lifecycle import HostConnectivity

DESIRED = {
    "started": Desired.RUNNING,
    "stopped": Desired.STOPPED,
    "disabled": Desired.DISABLED,
    "unmanaged": Desired.IGNORED,
    "ignored": Desired.IGNORED,
}


@dataclass
class Run:
    """One played scenario: the file, the world after it, and what was watched on the way."""

    scenario: Mapping[str, Any]
    world: World
    invariants: Invariants
    variant: str = "as-written"
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def core(self) -> Any:
        return self.world.engine.state


def load(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def build(scenario: Mapping[str, Any], *, settings: FailoverSettings | None = None, variant: str = "as-written") -> Run:
    """Return the world at t=0. `variant` overrides what the file leaves open: power devices, beacons, wardens."""
    cluster = scenario["cluster"]
    world = World(settings or settings_of(cluster), seed=int(scenario.get("seed", 0)))
    is_lease_only = variant in {"lease-alone", "unarmed"} or (variant == "as-written" and "lease" not in cluster)
    for name, facts in cluster["hosts"].items():
        host = SimHost(name=name, cpus=facts.get("cpus", 0))
        # The reference fills hosts beyond their memory: its cases bind no capacity.
        host.memory_bytes = 0 if "placement" in cluster else facts.get("mem_bytes", 0)
        host.is_powered = bool(facts.get("powered", True))
        host.has_beacon = bool(cluster.get("beacon")) or variant == "beacon"
        host.warden_is_alive = not variant.startswith("unarmed") and bool(facts.get("warden", True))
        host.power_device = "none" if is_lease_only else facts.get("power_fence", "none")
        world.hosts[name] = host
        world.engine.state = replace(world.engine.state, hosts={**world.engine.state.hosts, name: record_of(host)})
    vms = {name: _vm(world, name, facts, cluster) for name, facts in scenario["vms"].items()}
    rules = tuple(rule for one in scenario["rules"] if (rule := _rule(one, scenario)) is not None)
    world.engine.state = replace(world.engine.state, vms=vms, rules=rules)
    _initial_state(world, scenario.get("initial_controller_state", {}))
    invariants = Invariants(born=frozenset(vms))
    world.checks.append(invariants)
    return Run(scenario, world, invariants, variant)


def settings_of(cluster: Mapping[str, Any]) -> FailoverSettings:
    lease = cluster.get("lease", {})
    defaults = FailoverSettings()
    renew_s = lease.get("renew_every_s", defaults.renew_every_s)
    return FailoverSettings(
        lease_ttl_s=lease.get("lease_ttl_s", defaults.lease_ttl_s),
        renew_every_s=renew_s,
        rate_error=lease.get("max_clock_rate_error", defaults.rate_error),
        kill_s=lease.get("self_kill_margin_s", defaults.kill_s),
        extra_s=lease.get("controller_wait_extra_s", defaults.extra_s),
        suspect_after_s=2 * renew_s,
        lost_after_s=3 * renew_s + 0.5,
    )


def _vm(world: World, name: str, facts: Mapping[str, Any], cluster: Mapping[str, Any]) -> VmRecord:
    double = facts.get("double")
    if double:
        world.doubles[name] = Double(
            start_failures=double["start_failures_before_success"],
            migrate_failures=double["migrate_failures_before_success"],
            stop_fails=double["stop_fails"],
            only_on_host=double.get("only_on_host") or "",
        )
    desired = DESIRED[facts["desired"]]
    is_off = desired in {Desired.DISABLED, Desired.STOPPED}
    home = facts["host"]
    return VmRecord(
        id=name,
        desired=desired,
        is_local=facts.get("storage", cluster.get("storage")) == "local",
        priority=facts.get("priority", 0),
        group=facts.get("group", ""),
        group_order=facts.get("group_order", 0),
        start_delay_s=facts.get("start_delay_s", 0.0),
        memory_bytes=facts.get("mem_bytes", facts.get("configured", {}).get("mem_bytes", 0)),
        host=home,
        epoch=1,
        # It ran here last; only the host's own word or a fence says that it does not now. A stopped one keeps its disks' home.
        holders=() if desired is Desired.DISABLED else (Holder(host=home, epoch=1),),
        seen=Seen.STOPPED if is_off else Seen.UNKNOWN,
        max_restart=facts.get("max_restart", 1),
        max_relocate=facts.get("max_relocate", 1),
        has_failback=facts.get("failback", True),
    )


def _rule(one: Mapping[str, Any], scenario: Mapping[str, Any]) -> Rule | None:
    kind = one["kind"]
    if kind == "vm-vm":
        members = frozenset(one["vms"])
        return TogetherRule(vms=members) if one["affinity"] == "keep-together" else ApartRule(vms=members)
    if kind == "vm-host":
        hosts = {host["host"]: host.get("priority", 0) for host in one["hosts"]}
        return HostRule(vms=frozenset(one["vms"]), hosts=hosts, is_strict=bool(one.get("strict")))
    return None


def _initial_state(world: World, initial: Mapping[str, Any]) -> None:
    vms = dict(world.engine.state.vms)
    for name, facts in initial.get("vm_status", {}).items():
        if name not in vms:
            continue
        vm = replace(vms[name], host=facts.get("node", vms[name].host))
        match facts["state"]:
            case "error":
                vm = replace(vm, phase=Phase.NEEDS_ATTENTION, holders=(), seen=Seen.UNKNOWN, why="it was in error before")
            case "recovery":
                vm = replace(vm, phase=Phase.RECOVERING, holders=(), why="waits for a home")
            case "stopped":
                vm = replace(vm, holders=())
        vms[name] = vm
    hosts = dict(world.engine.state.hosts)
    for name, status in initial.get("host_status", {}).items():
        if status == "maintenance" and name in hosts:
            hosts[name] = replace(hosts[name], hold=Hold.HELD, standing=HostConnectivity.NEW)
    world.engine.state = replace(world.engine.state, vms=vms, hosts=hosts)
