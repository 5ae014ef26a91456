"""The invariants of the safety argument, checked after every event of the world. I14 (tenants) is the API's and is checked there."""

from tests.scenarios.world import World
from trimtab_controller.core.failover.draft import Draft
from trimtab_controller.core.failover.homes import enemies_on, rank
from trimtab_controller.core.failover.records import Desired, Phase, Seen
from trimtab_controller.core.lifecycle import HostConnectivity

OPEN_FOR_S = 400.0
"""I4: nothing stays in between for longer, in a world whose slowest part takes 90 s."""


class Violation(AssertionError):
    """An invariant does not hold."""


def _demand(is_true: bool, invariant: str, message: str, world: World) -> None:
    if not is_true:
        raise Violation(f"{invariant} at {world.now:.2f} s: {message}")


class Invariants:
    """Checks what moved since the last event; cheap enough to run after each one."""

    def __init__(self, *, born: frozenset[str]) -> None:
        self._born = set(born)
        self._logged = 0
        self._audited = 0
        self._standing: dict[str, str] = {}
        self.starts: dict[str, int] = {}

    def __call__(self, world: World) -> None:
        self.one_writer(world)
        self.starts_are_covered(world)
        self.shown_is_proven(world)
        self.nothing_is_lost(world)
        self.every_change_is_audited(world)
        self.one_recovery_per_fault(world)

    def one_writer(self, world: World) -> None:
        """I1: at any instant at most one process has write access to a vm's disk."""
        seen: dict[str, str] = {}
        for name, host in world.hosts.items():
            for vm in host.writers():
                _demand(vm not in seen, "I1", f"{vm} runs on {seen.get(vm)} and on {name}", world)
                seen[vm] = name

    def starts_are_covered(self, world: World) -> None:
        """I2: lease, epoch, assignment at every start; I6: no start of a deleted vm; I11: no start against a strict rule."""
        fresh, self._logged = world.log[self._logged :], len(world.log)
        for one in fresh:
            if one.what != "started":
                continue
            self.starts[one.subject] = self.starts.get(one.subject, 0) + 1
            host = world.hosts[one.host]
            _demand(host.has_lease(world.now, world.settings.lease_ttl_s), "I2", f"{one.subject} started without a lease", world)
            _demand(one.subject not in world.engine.state.tombstones, "I6", f"deleted {one.subject} started", world)
            vm = world.engine.state.vms.get(one.subject)
            if vm is None or not world.engine.is_alive:
                continue
            _demand(one.detail >= vm.epoch, "I2", f"{vm.id} started at epoch {one.detail} < {vm.epoch}", world)
            draft = Draft(world.engine.state, world.now)
            _demand(rank(draft, vm, one.host) is not None, "I11", f"{vm.id} on {one.host} against a strict rule", world)
            enemies = [other for other in enemies_on(draft, vm, one.host) if world.running_on(other) == [one.host]]
            _demand(not enemies, "I11", f"{vm.id} joined {enemies} on {one.host}", world)

    def shown_is_proven(self, world: World) -> None:
        """I3: what is shown is a proven fact: a host that is fenced runs nothing, and fenced follows lost follows suspect."""
        for host in world.engine.state.hosts.values():
            is_proven = host.standing is not HostConnectivity.FENCED or host.proof is not None
            _demand(is_proven, "I3", f"{host.id} is fenced without proof", world)
        for vm in world.engine.state.vms.values():
            home = world.engine.state.hosts.get(vm.host)
            is_gone = home is not None and home.standing is HostConnectivity.FENCED
            _demand(not (is_gone and vm.seen is Seen.RUNNING), "I3", f"{vm.id} is shown running on a fenced host", world)

    def nothing_is_lost(self, world: World) -> None:
        """I6, I7: every vm is in the inventory or has a tombstone, never both; what is not ours is never touched."""
        present, buried = set(world.engine.state.vms), world.engine.state.tombstones
        _demand(not (present & buried), "I6", f"{present & buried} came back", world)
        missing = self._born - present - buried
        _demand(not missing, "I7", f"{missing} are lost", world)
        self._born |= present

    def every_change_is_audited(self, world: World) -> None:
        """I13: the recorded standings are those of the state, in order, without a gap."""
        order = ["new", "up", "suspect", "lost", "fenced"]
        if len(world.engine.audit) < self._audited:  # the database lost its tail
            self._audited = len(world.engine.audit)
        for _at, host, standing in world.engine.audit[self._audited :]:
            _demand(host in world.engine.state.hosts, "I13", f"a record about unknown host {host}", world)
            steps = order.index(standing) - order.index(self._standing.get(host, "new"))
            _demand(steps <= 1, "I3", f"{host} went from {self._standing.get(host)} to {standing}", world)
            self._standing[host] = standing
        self._audited = len(world.engine.audit)
        recorded = {host: standing for _at, host, standing in world.engine.audit}
        if world.engine.is_alive and not world.engine.is_frozen:
            for name, host in world.engine.state.hosts.items():
                if host.standing is not HostConnectivity.NEW:
                    _demand(recorded.get(name) == host.standing.value, "I13", f"{name}: {host.standing.value} unrecorded", world)

    def one_recovery_per_fault(self, world: World) -> None:
        """I12: one fault causes at most one recovery of a vm."""
        for vm in world.engine.state.vms.values():
            _demand(vm.recoveries <= world.faults + 1, "I12", f"{vm.id} recovered {vm.recoveries} times", world)

    def at_end(self, world: World) -> None:
        """I4: nothing is in between for ever; I8: no domain without an owner; I10: every accepted wish is still on record."""
        for deed in world.engine.deeds:
            if deed.is_done or not world.engine.is_alive:
                continue
            is_waiting_for_silence = not world.hosts[deed.host].hears_controller
            is_old = world.now - deed.began_s > OPEN_FOR_S
            _demand(not is_old or is_waiting_for_silence, "I4", f"{deed.kind} of {deed.vm} does not end", world)
        for vm in world.engine.state.vms.values():
            is_between = vm.phase in {Phase.STARTING, Phase.STOPPING, Phase.MOVING} and world.now - vm.since_s > OPEN_FOR_S
            hosts = [world.hosts[holder.host] for holder in vm.holders if holder.host in world.hosts]
            can_end = world.engine.is_alive and all(host.hears_controller for host in hosts)
            _demand(not (is_between and can_end), "I4", f"{vm.id} stays {vm.phase.value}", world)
            is_waiting = vm.phase is Phase.RECOVERING and vm.desired is Desired.RUNNING
            _demand(not is_waiting or bool(vm.why), "I4", f"{vm.id} waits and does not say why", world)
        for host in world.hosts.values():
            for domain in host.domains.values():
                record = world.engine.state.vms.get(domain.vm)
                owners = set() if record is None else {holder.host for holder in record.holders}
                is_orphan = domain.vm not in world.unmanaged and host.name not in owners and domain.seen is Seen.RUNNING
                _demand(not is_orphan or not host.hears_controller, "I8", f"{domain.vm} is an orphan on {host.name}", world)
