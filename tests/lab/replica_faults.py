"""What can be done to a control plane of several replicas on PostgreSQL while hosts are lost, and to two hosts of five at once.

What strikes at a point of a recovery or of a migration is a kind of its own for each point, and comes exactly there: between an act and
its record (`trimtab_lab/stop_points.py`).
"""

from collections.abc import Callable, Mapping
from functools import partial

from tests.lab.fleet_kit import wait_until
from tests.lab.host_faults import Hands, HostFault, Must
from tests.lab.host_loss_kit import LossFleet, boottime_s
from trimtab_lab.replicas import Replicas
from trimtab_lab.stop_points import StopPoints

SEEN_POINTS = ("suspect", "lost")
"""Standings of a host that are waited for."""
RECOVERY_STOPS = {
    "fenced": "host:fenced",
    "recovery-begun": "vm.recover:accept",
    "placed": "vm.recover:place",
    "defined": "vm.recover:define",
    "started": "vm.recover:power_on",
}
"""Points of a recovery, done and not recorded yet: so `recovery-begun` is after `fenced` was recorded, and so on."""
MIGRATION_STOPS = {
    "prepared": "vm.migrate:prepare",
    "copying": "",
    "arrived": "vm.migrate:move",
    "settled": "vm.migrate:settle",
}
"""Points of a migration, likewise; `arrived`: the guest runs on the target, and the record says the source."""
POINT_PATIENCE_S = 90.0
SLOW_MIB_S = "4"
"""So a small guest is on its way for some seconds."""


class ReplicaFaults:
    """The faults of one fleet; `told` says which points were struck, and whose acts were refused."""

    def __init__(self, fleet: LossFleet, plane: Replicas, hands: Hands) -> None:
        self._fleet, self._lab, self._plane, self._hands = fleet, fleet.lab, plane, hands
        self._points = StopPoints(plane)
        self._struck: set[str] = set()
        self._leader, self._log_length = "", 0
        self.told: list[str] = []

    def all(self) -> Mapping[str, HostFault]:
        stays, late = Must.STAY, Must.MOVE_LATE
        faults = {
            "gateway-cut-from-sql": HostFault(self._at_gateway(self._plane.cut_from_database), self._heal_gateway, stays),
            "gateway-killed": HostFault(self._at_gateway(self._plane.kill), self._start_again, stays),
            "gateway-frozen": HostFault(self._at_gateway(self._plane.freeze_one), self._thaw_struck, stays),
            "power-and-gateway-cut-from-sql": HostFault(
                self._crash_with_gateway(self._plane.cut_from_database), self._heal_gateway_and_boot, late
            ),
            "power-and-gateway-frozen": HostFault(
                self._crash_with_gateway(self._plane.freeze_one), self._thaw_struck_and_boot, late
            ),
            "database-restarted": HostFault(lambda _host: self._plane.restart_database(), lambda _host: None, stays),
            "two-hosts-off": HostFault(self._crash_two, self._boot_two, late, takes=self.two),
            "second-host-off-later": HostFault(self._crash_one_then_another, self._boot_two, late, takes=self.two),
        }
        for point in ("lost", "started"):
            faults[f"database-restarted-at-{point}"] = HostFault(partial(self._restart_database_at, point), self._lab.boot, late)
        for point in (*SEEN_POINTS, *RECOVERY_STOPS):
            faults[f"leader-killed-at-{point}"] = HostFault(
                partial(self.kill_leader, point=point), self._start_again_and_boot, late
            )
            faults[f"leader-frozen-at-{point}"] = HostFault(partial(self.freeze_leader, point=point), self.thaw_leader, late)
        for point in MIGRATION_STOPS:
            for side in ("source", "target"):
                # Once the guest runs on the target, the loss of the source is no reason to start it anew; nor is a target that dies first.
                keeps = (side == "source") == (point in {"arrived", "settled"})
                faults[f"{side}-off-as-migration-{point}"] = HostFault(
                    partial(self._crash_in_migration, point, side),
                    self._boot_two,
                    Must.LAND,
                    takes=self.two,
                    keeps_migrated=keeps,
                )
        return faults

    # --- gateways and the database -----------------------------------------------------------------------------------------------

    def gateway_of(self, host: str) -> str:
        """Return the process that has the host's session."""
        gateway_id = self._plane.query(f"SELECT gateway_id FROM host WHERE name = '{host}'").strip()
        return next(name for name in ("gateway1", "gateway2") if gateway_id in self._plane.log_of(name))

    def _at_gateway(self, strike: Callable[[str], None]) -> Callable[[str], None]:
        def inflict(host: str) -> None:
            name = self.gateway_of(host)
            self._struck = {name}
            strike(name)

        return inflict

    def _crash_with_gateway(self, strike: Callable[[str], None]) -> Callable[[str], None]:
        """The host dies, and the gateway that could say when it renewed last cannot say it."""

        def inflict(host: str) -> None:
            self._at_gateway(strike)(host)
            self._lab.crash(host)

        return inflict

    def _heal_gateway(self, _host: str) -> None:
        for name in self._struck:
            self._plane.heal_database(name)

    def _heal_gateway_and_boot(self, host: str) -> None:
        self._heal_gateway(host)
        self._lab.boot(host)

    def _thaw_struck(self, _host: str) -> None:
        for name in self._struck:
            self._plane.thaw_one(name)

    def _thaw_struck_and_boot(self, host: str) -> None:
        self._thaw_struck(host)
        self._lab.boot(host)

    def _start_again(self, _host: str) -> None:
        self._plane.start_missing()

    def _restart_database_at(self, point: str, host: str) -> None:
        self._at_point(host, point, lambda _where: self._plane.restart_database())

    # --- leaders -----------------------------------------------------------------------------------------------------------------

    def _at_point(self, host: str, point: str, strike: Callable[[set[str]], None]) -> None:
        """Take the host's power and strike when its recovery is there; `strike` is told who stands there besides the leader."""
        if point in SEEN_POINTS:
            self._lab.crash(host)
            self._reach(host, point)
            strike(set())
            return
        with self._points.held(RECOVERY_STOPS[point]):
            self._lab.crash(host)
            strike(self._points.wait(timeout_s=POINT_PATIENCE_S))

    def _reach(self, host: str, point: str) -> None:
        """Wait until the host's recovery is there, or further."""
        further = {"suspect": "suspect lost fenced", "lost": "lost fenced"}[point].split()

        def has_reached() -> bool:
            return self._plane.query(f"SELECT connectivity FROM host WHERE name = '{host}'").strip() in further

        wait_until(has_reached, f"the recovery of {host} to be {point}", patience_s=POINT_PATIENCE_S)

    def _strike_leader(self, host: str, point: str, strike: Callable[[str], None], word: str) -> None:
        def now(where: set[str]) -> None:
            self._leader = wait_until(self._plane.leader, "an engine to lead")
            self._log_length = len(self._plane.log_of(self._leader))
            # What stands at the point may be a worker, which drives as well.
            self._struck = {self._leader, *where}
            for name in self._struck:
                strike(name)
            self.told.append(f"{word} {' and '.join(sorted(one.rstrip('12') for one in self._struck))} at {point}")

        self._struck, self._leader = set(), ""
        wait_until(self._plane.leader, "an engine to lead")
        self._at_point(host, point, now)

    def kill_leader(self, host: str, *, point: str) -> None:
        self._strike_leader(host, point, self._plane.kill, "killed")

    def freeze_leader(self, host: str, *, point: str) -> None:
        self._strike_leader(host, point, self._plane.freeze_one, "frozen")

    def thaw_leader(self, host: str) -> None:
        """The old leader comes back to itself in the middle of what it was doing; it may do none of it."""
        for name in self._struck:
            self._plane.thaw_one(name)
        self._lab.boot(host)
        if self._leader:
            stale = wait_until(self.stale_word, f"{self._leader} to notice that it does not lead any more")
            self.told.append(f"refused: {stale}")

    def stale_word(self) -> str:
        """Return what the struck engine logged of its end as the leader since it was struck; '' while it has not."""
        lines = self._plane.log_of(self._leader)[self._log_length :].splitlines()
        return next((line[:300] for line in lines if "not leading any more" in line or "not-leader" in line), "")

    def _start_again_and_boot(self, host: str) -> None:
        self._plane.start_missing()
        self._lab.boot(host)

    # --- two hosts ---------------------------------------------------------------------------------------------------------------

    def two(self, host: str) -> tuple[str, ...]:
        names = self._fleet.hosts
        return host, names[(names.index(host) + 1) % len(names)]

    def _crash_two(self, host: str) -> None:
        """More hosts than may be lost at once: failover freezes, until an operator says that the hosts are really off."""
        for name in self.two(host):
            self._lab.crash(name)
        self._hands.hold_frozen(self.two(host))
        for name in self.two(host):
            self._release(name)

    def _crash_one_then_another(self, host: str) -> None:
        """While the guests of the first are on their way back the second dies: it waits for an operator, and they do not."""
        first, second = self.two(host)
        self._lab.crash(first)
        wait_until(lambda: self._fenced(first), f"{first} to be fenced", patience_s=POINT_PATIENCE_S)
        self._lab.crash(second)
        self._hands.hold_frozen((second,))
        self._release(second)

    def _fenced(self, host: str) -> bool:
        return self._plane.query(f"SELECT connectivity FROM host WHERE name = '{host}'").strip() == "fenced"

    def _release(self, host: str) -> None:
        self._fleet.ok("failover", "release", host, "--reason", "its rack lost its power", "--yes")
        self.told.append("released by an operator while failover was frozen")

    def _boot_two(self, host: str) -> None:
        for name in self.two(host):
            self._lab.boot(name)

    def _crash_in_migration(self, point: str, side: str, host: str) -> None:
        """A guest of the host is on its way when its source or its target loses its power."""
        source, target = self.two(host)
        victim = source if side == "source" else target
        name = self._fleet.vms_on(source)[0]
        self._hands.migrated = name
        order = ("vm", "migrate", name, "--to", target)
        if not MIGRATION_STOPS[point]:
            operation_id = self._fleet.begin(*order, "--bandwidth", SLOW_MIB_S)
            self._wait_until_copying(operation_id, source, name)
            self._lab.crash(victim)
        else:
            with self._points.held(MIGRATION_STOPS[point]):
                self._fleet.begin(*order)
                self._points.wait(timeout_s=POINT_PATIENCE_S)
                self._lab.crash(victim)
        self.told.append(f"crashed the {side} of a migration at {point}")

    def _wait_until_copying(self, operation_id: str, source: str, name: str) -> None:
        vm_id = self._fleet.vm(name)["id"]

        def is_copying() -> bool:
            state = self._lab.run(source, ["virsh", "domjobinfo", f"trimtab-{vm_id}"], check=False).stdout
            return "Unbounded" in state or bool(self._fleet.operation(operation_id)["done"])

        began_s = boottime_s()
        wait_until(is_copying, f"the migration of {name} to copy", patience_s=POINT_PATIENCE_S)
        assert not self._fleet.operation(operation_id)["done"], f"{name} arrived within {boottime_s() - began_s:.0f} s"
