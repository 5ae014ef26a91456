"""What can be done to a control plane of several replicas on PostgreSQL while hosts are lost, and to two hosts of five at once.

Faults that come at a point of a recovery or of a migration take the next point each time they are inflicted.
"""

from collections.abc import Callable, Mapping
from itertools import cycle

from tests.lab.fleet_kit import wait_until
from tests.lab.host_faults import HostFault, Must
from tests.lab.host_loss_kit import LossFleet
from trimtab_lab.replicas import Replicas

RECOVERY_POINTS = ("suspect", "lost", "fenced", "starting")
MIGRATION_STEPS = ("place", "prepare", "move", "switch", "leave_source")
POINT_PATIENCE_S = 90.0


class ReplicaFaults:
    """The faults of one fleet; `told` says which points were struck, and whose acts were refused."""

    def __init__(self, fleet: LossFleet, plane: Replicas) -> None:
        self._fleet, self._lab, self._plane = fleet, fleet.lab, plane
        self._points, self._steps, self._sides = cycle(RECOVERY_POINTS), cycle(MIGRATION_STEPS), cycle(("source", "target"))
        self._struck, self._log_length = "", 0
        self.told: list[str] = []

    def all(self) -> Mapping[str, HostFault]:
        stays = Must.STAY
        return {
            "gateway-cut-from-sql": HostFault(self._at_gateway(self._plane.cut_from_database), self._heal_gateway, stays),
            "gateway-killed": HostFault(self._at_gateway(self._plane.kill), self._start_again, stays),
            "gateway-frozen": HostFault(self._at_gateway(self._plane.freeze_one), self._thaw_struck, stays),
            "database-restarted": HostFault(lambda _host: self._plane.restart_database(), lambda _host: None, stays),
            "database-restarted-mid-recovery": HostFault(self._restart_database_mid_recovery, self._lab.boot, Must.MOVE_LATE),
            "leader-killed-mid-recovery": HostFault(self.kill_leader, self._start_again_and_boot, Must.MOVE_LATE),
            "leader-frozen-mid-recovery": HostFault(self.freeze_leader, self.thaw_leader, Must.MOVE_LATE),
            "two-hosts-off": HostFault(self._crash_two, self._boot_two, Must.MOVE_LATE, takes=self.two),
            "migration-at-each-step": HostFault(self._crash_at_step, self._boot_two, Must.RUN, takes=self.two),
        }

    # --- gateways and the database -----------------------------------------------------------------------------------------------

    def gateway_of(self, host: str) -> str:
        """Return the process that has the host's session."""
        gateway_id = self._plane.query(f"SELECT gateway_id FROM host WHERE name = '{host}'").strip()
        return next(name for name in ("gateway1", "gateway2") if gateway_id in self._plane.log_of(name))

    def _at_gateway(self, strike: Callable[[str], None]) -> Callable[[str], None]:
        def inflict(host: str) -> None:
            self._struck = self.gateway_of(host)
            strike(self._struck)

        return inflict

    def _heal_gateway(self, _host: str) -> None:
        self._plane.heal_database(self._struck)

    def _thaw_struck(self, _host: str) -> None:
        self._plane.thaw_one(self._struck)

    def _start_again(self, _host: str) -> None:
        self._plane.start_missing()

    def _restart_database_mid_recovery(self, host: str) -> None:
        self._lab.crash(host)
        self._reach(host, next(self._points))
        self._plane.restart_database()

    # --- leaders -----------------------------------------------------------------------------------------------------------------

    def _reach(self, host: str, point: str) -> None:
        """Wait until the host's recovery is there, or further."""
        rank = RECOVERY_POINTS.index(point)

        def has_reached() -> bool:
            standing = self._plane.query(f"SELECT connectivity FROM host WHERE name = '{host}'").strip()
            begun = self._plane.query("SELECT count(*) FROM operation WHERE kind = 'vm.recover' AND ended_at IS NULL").strip()
            reached = 3 if standing == "fenced" and begun != "0" else {"suspect": 0, "lost": 1, "fenced": 2}.get(standing, -1)
            return reached >= rank

        wait_until(has_reached, f"the recovery of {host} to be {point}", patience_s=POINT_PATIENCE_S)

    def _strike_leader(self, host: str, strike: Callable[[str], None], word: str, point: str = "") -> None:
        point = point or next(self._points)
        wait_until(self._plane.leader, "an engine to lead")
        self._lab.crash(host)
        self._reach(host, point)
        self._struck = wait_until(self._plane.leader, "an engine to lead")
        self._log_length = len(self._plane.log_of(self._struck))
        strike(self._struck)
        self.told.append(f"{word} leader at {point}")

    def kill_leader(self, host: str, point: str = "") -> None:
        self._strike_leader(host, self._plane.kill, "killed", point)

    def freeze_leader(self, host: str, point: str = "") -> None:
        self._strike_leader(host, self._plane.freeze_one, "frozen", point)

    def thaw_leader(self, host: str) -> None:
        """The old leader comes back to itself in the middle of what it was doing; it may do none of it."""
        self._plane.thaw_one(self._struck)
        stale = wait_until(self.stale_word, f"{self._struck} to notice that it does not lead any more")
        self.told.append(f"refused: {stale}")
        self._lab.boot(host)

    def stale_word(self) -> str:
        """Return what the struck engine logged of its end as the leader since it was struck; '' while it has not."""
        lines = self._plane.log_of(self._struck)[self._log_length :].splitlines()
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
        wait_until(self._is_frozen, "failover to freeze", patience_s=POINT_PATIENCE_S)
        for name in self.two(host):
            self._fleet.ok("failover", "release", name, "--reason", "their rack lost its power", "--yes")

    def _is_frozen(self) -> bool:
        return bool(self._fleet.ok("failover", "status", "-o", "json").json()["frozen"])

    def _boot_two(self, host: str) -> None:
        for name in self.two(host):
            self._lab.boot(name)

    def _crash_at_step(self, host: str) -> None:
        """A guest of the host is on its way when its source or its target loses its power, at each step of the way in turn."""
        step, side = next(self._steps), next(self._sides)
        target = self.two(host)[1]
        listed = self._fleet.ok("vm", "list", "-o", "json").json()
        vms = [one for one in (listed["items"] if isinstance(listed, dict) else listed) if one.get("host") == host]
        operation_id = self._fleet.begin("vm", "migrate", vms[0]["name"], "--to", target)
        order = f"SELECT step, ended_at IS NOT NULL FROM operation WHERE id = '{operation_id}'"
        seen: list[str] = []

        def is_there() -> bool:
            now, _, has_ended = self._plane.query(order).strip().partition("|")
            seen.append(now)
            return now == step or has_ended == "t"

        # Steps are shorter than half a second; so this looks faster than other waits do.
        while not is_there():
            continue
        self._lab.crash(host if side == "source" else target)
        self.told.append(f"crashed the {side} of a migration at {seen[-1] or 'accepted'}")
