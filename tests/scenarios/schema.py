"""From a scenario file to a world: builds hosts, vms and rules, and turns each event of the timeline into what happens there."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.scenarios.hosts import Domain, Double, SimHost
from tests.scenarios.invariants import Invariants
from tests.scenarios.process import record_of
from tests.scenarios.world import World
from trimtab_controller.core.failover import FailoverSettings
from trimtab_controller.core.failover import events as happened
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
RUN_ON_S = 400.0
"""How long a run goes on after its last event."""


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


def play(run: Run) -> Run:
    """Run the whole timeline; a Violation is raised at the event that caused it."""
    world, last = run.world, 0.0
    previous: str | float = 0.0
    world.begin()
    for one in run.scenario["timeline"]:
        act = _deferred(run, one)
        t = one["t"]
        if isinstance(t, str) and t.startswith("+"):
            world.on(str(previous), lambda act=act, delay_s=float(t[1:]): world.after(delay_s, act))
        elif isinstance(t, str):
            world.on(t, act)
            previous = t
            last = max(last, 120.0)
        else:
            world.at(float(t), act)
            last = max(last, float(t))
    if any(str(one["t"]).startswith("migrate") for one in run.scenario["timeline"]):
        world.at(30.0, lambda: world.engine.feed(happened.MoveAsked(vm="a", target="h2")))
    end_s = float(run.scenario.get("end_time") or last + run.notes.get("run_on_s", RUN_ON_S))
    world.run_until(end_s)
    run.invariants.at_end(world)
    return run


def _deferred(run: Run, one: Mapping[str, Any]) -> Callable[[], None]:
    return lambda: EVENTS[one["event"]](run, one)


# --- events -------------------------------------------------------------------------------------------------------------------------


def _host(run: Run, one: Mapping[str, Any], key: str = "host") -> SimHost:
    return run.world.hosts[one[key]]


def host_power(run: Run, one: Mapping[str, Any]) -> None:
    host = _host(run, one)
    if one["value"] == "off":
        run.world.faults += 1
        host.cut_power()
        run.world.tell("power_cut", host=host.name)
    elif not host.is_powered or host.goes_down:
        host.boot_up()
    else:
        host.link_is_cut = False
        run.world.engine.feed(happened.SessionOpened(host=host.name, boot_id=host.boot_id, domains=_listed(host)))


def _listed(host: SimHost) -> tuple[tuple[str, int, Seen], ...]:
    return tuple((one.vm, one.epoch, one.seen) for one in host.domains.values())


def host_network(run: Run, one: Mapping[str, Any]) -> None:
    host = _host(run, one)
    host.link_is_cut = one["value"] == "off"
    host.session_is_open = host.session_is_open and not host.link_is_cut
    run.world.faults += 1
    run.world.tell("link_cut" if host.link_is_cut else "link_back", host=host.name)


def host_pause(run: Run, one: Mapping[str, Any]) -> None:
    host, world = _host(run, one), run.world
    world.faults += 1
    host.is_paused = True
    world.tell("host_paused", host=host.name)

    def resume() -> None:
        if not host.is_powered or not host.is_paused:
            return
        # What the warden does first is what matters: it looks before any guest writes again.
        host.is_paused = False
        expired = not host.has_lease(world.now, world.settings.lease_ttl_s)
        if expired and host.warden_is_alive:
            for vm in [one.vm for one in host.domains.values() if one.seen is Seen.RUNNING]:
                world.end_guest(host, vm, "killed_by_warden")
        world.tell("host_resumed", host=host.name, detail=expired)

    world.after(float(one["seconds"]), resume)


def sigstop(run: Run, one: Mapping[str, Any]) -> None:
    run.world.faults += 1
    if one["what"] == "agent":
        _host(run, one).agent_is_stopped = True
    elif one["what"] == "controller":
        run.world.engine.is_frozen = True


def sigcont(run: Run, one: Mapping[str, Any]) -> None:
    if one["what"] == "agent":
        host = _host(run, one)
        host.agent_is_stopped = False
        host.session_is_open = False
        run.world.tell("agent_resumed", host=host.name)
    elif one["what"] == "controller":
        run.world.engine.thaw()


def kill9(run: Run, one: Mapping[str, Any]) -> None:
    world, what = run.world, one["what"]
    world.faults += 1
    if what == "controller":
        world.engine.kill()
    elif what == "control-plane":
        world.engine.kill()
        world.gateway_is_alive = False
    elif what == "agent":
        host = _host(run, one)
        host.agent_is_alive = host.session_is_open = False
        world.tell("agent_killed", host=host.name)
        world.after(2.0, lambda: setattr(host, "agent_is_alive", host.is_powered))  # its unit restarts it


def start_process(run: Run, one: Mapping[str, Any]) -> None:
    run.world.gateway_is_alive = True
    run.world.tell("controller_started")
    run.world.engine.boot()


def link(run: Run, one: Mapping[str, Any]) -> None:
    world, ends = run.world, {one["a"], one["b"]}
    world.faults += 1
    if "controller" not in ends:
        for name in ends & set(world.hosts):
            world.hosts[name].peers_cut |= ends - {name}
        return
    for name in world.hosts if "*" in ends else ends - {"controller"}:
        host = world.hosts[name]
        match one["value"]:
            case "cut":
                host.link_is_cut = True
                host.session_is_open = False
            case "cut_one_way":
                # Our calls are lost; its renewals, which it dials itself, are answered on their own stream.
                host.takes_commands = False
            case "drop_replies":
                host.replies_arrive = False
            case "ok":
                host.link_is_cut, host.takes_commands, host.replies_arrive = False, True, True
        world.tell("link_cut", host=name, detail=one["value"])


def link_flap(run: Run, one: Mapping[str, Any]) -> None:
    name = one["a"] if one["a"] != "controller" else one["b"]
    host, world = run.world.hosts[name], run.world
    world.faults += 1
    t = world.now
    for _time in range(one["times"]):
        world.at(t, lambda: setattr(host, "link_is_cut", True))
        world.at(t + one["down_s"], lambda: setattr(host, "link_is_cut", not host.is_powered))
        t += one["down_s"] + one["up_s"]


def clock_rate(run: Run, one: Mapping[str, Any]) -> None:
    _host(run, one, "who").rate = one["rate"]


def clock_jump(run: Run, one: Mapping[str, Any]) -> None:
    _host(run, one, "who").wall_offset_s += one["seconds"]
    run.world.tell("clock_jumped", host=one["who"])


def power_fence_device(run: Run, one: Mapping[str, Any]) -> None:
    host = _host(run, one)
    if host.power_device != "none":
        host.power_device = one["value"]
        host.power_slow_s = float(one.get("seconds", 40.0))


def storage_access(run: Run, one: Mapping[str, Any]) -> None:
    host, world = _host(run, one), run.world
    world.faults += 1
    host.has_storage = one["value"] != "lost"
    for domain in host.domains.values():
        if not host.has_storage and domain.seen is Seen.RUNNING:
            domain.seen, domain.is_io_error = Seen.PAUSED, True
            world.tell("paused_io_error", domain.vm, host.name)
        elif host.has_storage and domain.is_io_error:
            domain.seen, domain.is_io_error = Seen.RUNNING, False


def guest_crash(run: Run, one: Mapping[str, Any]) -> None:
    """It crashes, and crashes again five seconds after each start."""
    world, left = run.world, [int(one.get("times", 1))]
    world.faults += left[0]

    def crash() -> None:
        places = world.running_on(one["vm"])
        if left[0] <= 0:
            return
        if not places:
            world.after(1.0, crash)
            return
        left[0] -= 1
        world.end_guest(world.hosts[places[0]], one["vm"], "crashed")
        world.after(5.0, crash)

    crash()


def foreign_undefine(run: Run, one: Mapping[str, Any]) -> None:
    run.world.faults += 1
    for name in run.world.running_on(one["vm"]):
        run.world.end_guest(run.world.hosts[name], one["vm"], "vanished")


def force_start_copy(run: Run, one: Mapping[str, Any]) -> None:
    """Somebody starts a second process by hand, past us: the disk's own lock refuses it."""
    world, host = run.world, _host(run, one)
    world.locks_disks = True
    is_held = bool(world.running_on(one["vm"]))
    if not is_held:
        host.domains[one["vm"]] = Domain(one["vm"], 0, Seen.RUNNING)
    world.tell("copy_refused_by_lock" if is_held else "copy_started", one["vm"], host.name)
    copy = happened.Observed(vm=one["vm"], host=host.name, epoch=0, seen=Seen.PAUSED)
    world.after(0.1, lambda: world.engine.feed(copy))


def host_maintenance(run: Run, one: Mapping[str, Any]) -> None:
    run.world.engine.feed(happened.MaintenanceAsked(host=one["host"], is_on=one["value"] == "on"))


def host_shutdown(run: Run, one: Mapping[str, Any]) -> None:
    run.world.faults += 1
    policy = run.scenario["cluster"].get("host_shutdown_policy", "conditional")
    is_reboot = one["event"] == "host_reboot"
    run.world.engine.feed(happened.ShutdownAsked(host=one["host"], is_reboot=is_reboot, policy=policy))


def vm_desired_state(run: Run, one: Mapping[str, Any]) -> None:
    run.world.engine.feed(happened.Wished(vm=one["vm"], desired=DESIRED[one["value"]]))


def vm_move(run: Run, one: Mapping[str, Any]) -> None:
    is_live = one["event"] == "vm_live_migrate"
    run.world.engine.feed(happened.MoveAsked(vm=one["vm"], target=one["target"], is_live=is_live))


def vm_stop(run: Run, one: Mapping[str, Any]) -> None:
    run.world.engine.feed(happened.StopAsked(vm=one["vm"], timeout_s=float(one.get("timeout_s", 60))))


def vm_remove(run: Run, one: Mapping[str, Any]) -> None:
    run.notes.setdefault("removed", set()).add(one["vm"])
    run.world.unmanaged.add(one["vm"])
    run.world.engine.feed(happened.Wished(vm=one["vm"], desired=Desired.IGNORED))


def vm_add(run: Run, one: Mapping[str, Any]) -> None:
    vm = VmRecord(id=one["vm"], desired=DESIRED[one["desired"]], host=one["host"], epoch=1)
    if one.get("already_running"):
        vm = replace(vm, holders=(Holder(host=one["host"], epoch=1),), seen=Seen.RUNNING)
        run.world.hosts[one["host"]].domains[one["vm"]] = Domain(one["vm"], 1, Seen.RUNNING)
    elif vm.desired is Desired.RUNNING:
        vm = replace(vm, phase=Phase.RECOVERING, why="waits for a home")
    run.world.engine.feed(happened.Added(vm=vm))


def vm_moved(run: Run, one: Mapping[str, Any]) -> None:
    for name in run.world.running_on(one["vm"]):
        domain = run.world.hosts[name].domains.pop(one["vm"])
        run.world.hosts[one["target"]].domains[one["vm"]] = domain


def leftover_lock(run: Run, one: Mapping[str, Any]) -> None:
    run.world.locked_vms.add(one["vm"])


def submit(run: Run, one: Mapping[str, Any]) -> None:
    if one["op"] == "delete":
        run.world.engine.feed(happened.Wished(vm=one["vm"], desired=Desired.DELETED))
    run.notes.setdefault("submitted", []).append(one)


def db(run: Run, one: Mapping[str, Any]) -> None:
    run.world.faults += 1
    if one["value"] == "failover_lose_last_s":
        from tests.scenarios.tail import lose_tail

        lose_tail(run, float(one["seconds"]))


def state_store(run: Run, one: Mapping[str, Any]) -> None:
    """One member of the reference's store fails; here the store is one, and the engine waits for it."""
    run.world.has_sql = one["value"] == "ok"
    run.world.faults += 1


def upgrade(run: Run, one: Mapping[str, Any]) -> None:
    world = run.world
    if one["what"] == "controller":
        world.engine.kill()
        world.after(5.0, world.engine.boot)
        return
    for index, host in enumerate(world.hosts.values()):
        world.after(20.0 * index, lambda host=host: _upgrade_agent(run, host))


def _upgrade_agent(run: Run, host: SimHost) -> None:
    """The warden's successor arms before its predecessor leaves; the agent's session is away for three seconds."""
    host.agent_is_alive = host.session_is_open = False
    host.capabilities |= {"fast-restore"}
    run.world.after(3.0, lambda: setattr(host, "agent_is_alive", host.is_powered))


def agent_join(run: Run, one: Mapping[str, Any]) -> None:
    from tests.scenarios.durable import second_host_with_the_same_identity

    run.notes["join"] = second_host_with_the_same_identity()


def agent_restart(run: Run, one: Mapping[str, Any]) -> None:
    kill9(run, {**one, "what": "agent"})


def confirm_off(run: Run, one: Mapping[str, Any]) -> None:
    run.world.engine.feed(happened.ConfirmedOff(host=one["host"], by="user:alice", reason=one.get("reason", "")))


def failover_pause(run: Run, one: Mapping[str, Any]) -> None:
    run.world.engine.feed(happened.PauseAsked(is_on=one["value"] == "on"))


def failover_release(run: Run, one: Mapping[str, Any]) -> None:
    run.world.engine.feed(happened.ReleaseAsked(host=one["host"]))


def warden(run: Run, one: Mapping[str, Any]) -> None:
    run.world.faults += 1
    _host(run, one).warden_is_alive = one["value"] == "on"


def uplink(run: Run, one: Mapping[str, Any]) -> None:
    _host(run, one).has_uplink = one["value"] == "on"


def corrupt(run: Run, one: Mapping[str, Any]) -> None:
    if one["what"] == "image":
        run.world.engine.feed(happened.MarkedCorrupt(vm=one["vm"]))
    run.notes["corrupt"] = one


def nothing(run: Run, one: Mapping[str, Any]) -> None:
    """Time passes, or it concerns a part that this world does not have."""


def skip_cycles(run: Run, one: Mapping[str, Any]) -> None:
    run.world.engine.is_frozen = True
    run.world.after(20.0 * one["count"], run.world.engine.thaw)


def controller_process(run: Run, one: Mapping[str, Any]) -> None:
    if one["value"] == "stop":
        run.world.engine.kill()
        run.world.after(5.0, run.world.engine.boot)  # a standby takes the lease


EVENTS: dict[str, Callable[[Run, Mapping[str, Any]], None]] = {
    "host_power": host_power,
    "host_network": host_network,
    "host_pause": host_pause,
    "sigstop": sigstop,
    "sigcont": sigcont,
    "kill9": kill9,
    "start": start_process,
    "link": link,
    "link_flap": link_flap,
    "clock_rate": clock_rate,
    "clock_jump": clock_jump,
    "power_fence_device": power_fence_device,
    "storage_access": storage_access,
    "guest_crash": guest_crash,
    "foreign_undefine": foreign_undefine,
    "force_start_copy": force_start_copy,
    "host_maintenance": host_maintenance,
    "host_shutdown": host_shutdown,
    "host_reboot": host_shutdown,
    "vm_desired_state": vm_desired_state,
    "vm_live_migrate": vm_move,
    "vm_cold_move": vm_move,
    "vm_stop": vm_stop,
    "vm_remove_from_ha": vm_remove,
    "vm_add": vm_add,
    "vm_moved_behind_our_back": vm_moved,
    "vm_leftover_lock": leftover_lock,
    "submit": submit,
    "db": db,
    "state_store": state_store,
    "upgrade": upgrade,
    "agent_join": agent_join,
    "agent_restart": agent_restart,
    "skip_cycles": skip_cycles,
    "controller_process": controller_process,
    "wait": nothing,
    "queue": nothing,
    "corrupt": corrupt,
    "host_software_version": nothing,
    "vm_live_load": nothing,
    "vm_configured_size": nothing,
    "confirm_off": confirm_off,
    "failover_pause": failover_pause,
    "failover_release": failover_release,
    "warden": warden,
    "uplink": uplink,
}
