"""Plays a scenario: each event of its timeline becomes what happens in the world."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tests.scenarios.hosts import Domain, SimHost
from tests.scenarios.schema import DESIRED, Run
from trimtab_controller.core.failover import events as happened
from trimtab_controller.core.failover.records import (
    Desired,
    Holder,
    Phase,
    Seen,
    VmRecord,
)

RUN_ON_S = 400.0
"""How long a run goes on after its last event."""


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
