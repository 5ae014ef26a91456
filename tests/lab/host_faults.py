"""What can be done to a host, to the controllers or to what both need, with what ends it and what must follow.

Shared by the campaign (`tests/soak/host_loss.py`) and the lab tests.
"""

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from tests.lab.fleet_kit import wait_until
from tests.lab.host_loss_kit import LEASE_S, LossFleet, boottime_s
from trimtab_lab import cgroups
from trimtab_lab.power import PASSWORD, USER, Fault, PowerDevices
from trimtab_lab.specs import CTL, PLANE_GROUP, STORAGE_GROUP


class Must(Enum):
    """What must become of the host's kept guests."""

    MOVE = auto()
    """Each counts on on another host, within the goal."""
    MOVE_LATE = auto()
    """The same, but what went wrong besides takes time."""
    LAND = auto()
    """Each counts on on a host that was not lost, with nothing left to do, before the one that was lost is back."""
    STAY = auto()
    """Each counts on where it was: a fault that is no death moves nobody."""
    RUN = auto()
    """Each counts on somewhere, in one place."""


@dataclass(frozen=True, slots=True)
class HostFault:
    inflict: Callable[[str], None]
    end: Callable[[str], None]
    must: Must
    must_with_beacon: Must | None = None
    """Where the hosts renew on shared storage too; None: the same."""
    takes: Callable[[str], tuple[str, ...]] = lambda host: (host,)
    """The hosts that the fault strikes, of the one that was chosen."""
    keeps_migrated: bool = False
    """The guest that was on its way (`Hands.migrated`) goes on as it is: the side that was lost no longer had it, or not yet."""


def all_faults(fleet: LossFleet, hands: "Hands") -> Mapping[str, HostFault]:
    lab = fleet.lab

    def with_warden(number: signal.Signals) -> Callable[[str], None]:
        def inflict(host: str) -> None:
            lab.signal_service(host, "trimtab-warden", number)
            lab.cut(host)

        return inflict

    def both_frozen(host: str) -> None:
        lab.signal_service(host, "trimtab-warden", signal.SIGSTOP)
        lab.freeze(host)

    def killed_agent(host: str) -> None:
        lab.cut(host)
        lab.signal_service(host, "trimtab-agent", signal.SIGKILL)

    def thaw_and_heal(host: str) -> None:
        lab.thaw(host)
        lab.heal(host)

    stays = Must.STAY
    return {
        "power": HostFault(lab.crash, lab.boot, Must.MOVE),
        "link": HostFault(lab.cut, lab.heal, Must.MOVE, stays),
        "one-way-cut": HostFault(hands.cut_one_way, hands.heal_one_way, Must.MOVE, stays),
        "frozen-agent": HostFault(hands.freeze_agent, hands.await_another_agent, Must.MOVE, stays),
        "both-frozen": HostFault(both_frozen, lab.thaw, Must.MOVE, stays),
        "link-and-frozen-warden": HostFault(with_warden(signal.SIGSTOP), thaw_and_heal, Must.MOVE, stays),
        "link-and-killed-warden": HostFault(with_warden(signal.SIGKILL), lab.heal, Must.MOVE, stays),
        "link-and-killed-agent": HostFault(killed_agent, lab.heal, Must.MOVE, Must.RUN),
        "killed-libvirtd": HostFault(hands.kill_libvirtd, lambda _host: None, stays),
        "link-and-killed-libvirtd": HostFault(hands.cut_and_kill_libvirtd, lab.heal, Must.MOVE, stays),
        "power-and-killed-libvirtd-elsewhere": HostFault(hands.crash_and_kill_libvirtd_elsewhere, lab.boot, Must.MOVE_LATE),
        "controller-killed-mid-recovery": HostFault(hands.crash_and_kill_controller, lab.boot, Must.MOVE_LATE),
        "redis-down": HostFault(hands.crash_without_redis, hands.redis_again, Must.MOVE),
        "storage-hung": HostFault(hands.hang_storage, lambda _host: None, stays),
        "power-while-storage-hung": HostFault(hands.crash_while_storage_hangs, lab.boot, Must.MOVE_LATE),
        "device-works": HostFault(hands.with_device(Fault.NONE), hands.without_device, Must.MOVE, stays),
        "device-dead": HostFault(hands.with_device(Fault.DEAD), hands.without_device, Must.MOVE_LATE, stays),
        "device-slow": HostFault(hands.with_device(Fault.SLOW), hands.without_device, Must.MOVE_LATE, stays),
        "device-lying": HostFault(hands.with_device(Fault.LYING), hands.without_device, Must.MOVE_LATE, stays),
        "device-says-off": HostFault(hands.with_false_device, hands.without_device, Must.MOVE_LATE, stays),
        "frozen-warden": HostFault(hands.freeze_warden, lab.thaw, stays),
        "all-hosts-silent": HostFault(hands.cut_controllers, hands.heal_controllers, Must.RUN, stays, takes=hands.everybody),
        "all-hosts-off": HostFault(hands.crash_all, hands.boot_all, Must.RUN, takes=hands.everybody),
        "all-hosts-and-controllers-off": HostFault(
            hands.crash_everything, hands.boot_everything, Must.RUN, takes=hands.everybody
        ),
        "returns-before-it-is-fenced": HostFault(hands.crash_and_return, lab.boot, Must.RUN),
        "returns-mid-recovery": HostFault(hands.crash_and_return_in_recovery, lab.boot, Must.MOVE_LATE),
        "migration-in-flight": HostFault(hands.crash_while_migrating, lab.boot, Must.RUN),
    }


class Hands:
    """The faults that take more than a call of the lab's."""

    def __init__(self, fleet: LossFleet, devices: PowerDevices) -> None:
        self._fleet, self._lab, self._devices = fleet, fleet.lab, devices
        self._frozen_agent: int | None = None
        self._struck_unix_s = 0.0
        self.migrated = ""
        """The guest that was on its way when the latest fault struck."""

    def cut_one_way(self, host: str) -> None:
        """What the host sends to the controllers is lost; what they send arrives."""
        self._lab.run(host, ["iptables", "-I", "OUTPUT", "-d", self._lab.spec.ctl_address, "-j", "DROP"])

    def heal_one_way(self, host: str) -> None:
        self._lab.run(host, ["iptables", "-D", "OUTPUT", "-d", self._lab.spec.ctl_address, "-j", "DROP"])

    def freeze_agent(self, host: str) -> None:
        self._frozen_agent = self._lab.service_process_id(host, "trimtab-agent")
        self._lab.freeze(host)

    def await_another_agent(self, host: str) -> None:
        """Nobody thaws it: its supervisor's watchdog kills it and starts another."""

        def is_replaced() -> bool:
            return self._lab.service_process_id(host, "trimtab-agent") not in {None, self._frozen_agent}

        wait_until(is_replaced, f"the frozen agent of {host} to be started anew", patience_s=90)

    def freeze_warden(self, host: str) -> None:
        self._lab.signal_service(host, "trimtab-warden", signal.SIGSTOP)

    def everybody(self, _host: str) -> tuple[str, ...]:
        return self._fleet.hosts

    def cut_controllers(self, _host: str) -> None:
        """Every host is silent at once, for longer than a lease: the fault is the controllers', and nobody is recovered."""
        at_s, self._struck_unix_s = boottime_s(), time.time()
        self._lab.cut(CTL)
        wait_until(lambda: boottime_s() - at_s > 2 * LEASE_S, "every lease to end")

    def heal_controllers(self, _host: str) -> None:
        self._lab.heal(CTL)
        self._check_nobody_was_fenced()

    def crash_all(self, _host: str) -> None:
        """The power of the whole room is gone for longer than a lease."""
        at_s, self._struck_unix_s = boottime_s(), time.time()
        for host in self._fleet.hosts:
            self._lab.crash(host)
        wait_until(lambda: boottime_s() - at_s > 2 * LEASE_S, "every lease to end")

    def boot_all(self, _host: str) -> None:
        for host in self._fleet.hosts:
            self._lab.boot(host)
        self._check_nobody_was_fenced()

    def crash_everything(self, host: str) -> None:
        self._fleet.plane.crash()
        self.crash_all(host)

    def boot_everything(self, _host: str) -> None:
        """The controllers are up first, and find nobody."""
        self._fleet.plane.start()
        for host in self._fleet.hosts:
            self._lab.boot(host)

    def _check_nobody_was_fenced(self) -> None:
        """The breaker froze failover while everybody was lost, and no host was fenced."""
        frozen = self._fleet.events("alarm.failover-frozen", after_unix_s=self._struck_unix_s)
        assert frozen, "failover was not frozen although every host was lost at once"
        fenced = self._fleet.events("failover.fenced", after_unix_s=self._struck_unix_s)
        assert not fenced, f"false failover: {fenced[0]['message']}"

    def hold_frozen(self, hosts: Sequence[str]) -> None:
        """Wait for failover to freeze, and see that none of these hosts is fenced although their leases have long ended."""
        wait_until(self.is_frozen, "failover to freeze", patience_s=90)
        at_s = boottime_s()
        wait_until(lambda: boottime_s() - at_s > LEASE_S, "every lease to end")
        for host in hosts:
            assert self._fleet.host(host)["connectivity"] == "lost", (
                f"false failover: {host} was fenced while failover was frozen"
            )

    def is_frozen(self) -> bool:
        return bool(self._fleet.ok("failover", "status", "-o", "json").json()["frozen"])

    def kill_libvirtd(self, host: str) -> None:
        self._lab.signal_service(host, "libvirtd", signal.SIGKILL)

    def cut_and_kill_libvirtd(self, host: str) -> None:
        self._lab.cut(host)
        self.kill_libvirtd(host)

    def crash_and_kill_libvirtd_elsewhere(self, host: str) -> None:
        """Those who are to take the guests lose their libvirtd at the moment of the recovery."""
        self._lab.crash(host)
        self._fleet.wait_for_host(host, "fenced")
        for survivor in self._fleet.hosts:
            if survivor != host:
                self.kill_libvirtd(survivor)

    def crash_while_storage_hangs(self, host: str) -> None:
        """The disks are as unreachable for everybody else, and so are the slots: nothing can be proven, nor started, for a while."""
        self._lab.hang_storage()
        try:
            self._lab.crash(host)
            at_s = boottime_s()
            wait_until(lambda: boottime_s() - at_s > 2 * LEASE_S, "more than a lease to pass")
        finally:
            self._lab.hang_storage(is_hung=False)

    def crash_and_kill_controller(self, host: str) -> None:
        """Every process of the controller dies once the host's recovery is under way, and starts again."""
        self._lab.crash(host)
        self._fleet.wait_for_host(host, "lost")
        self._fleet.plane.crash()
        self._fleet.plane.start()

    def _redis(self) -> list[int]:
        found = [each for group in (PLANE_GROUP, STORAGE_GROUP) for each in cgroups.process_ids(self._lab.spec.cgroup(group))]
        return [one for one in found if b"redis-server" in Path(f"/proc/{one}/cmdline").read_bytes()]

    def crash_without_redis(self, host: str) -> None:
        for process_id in self._redis():
            os.kill(process_id, signal.SIGSTOP)
        self._lab.crash(host)

    def redis_again(self, host: str) -> None:
        for process_id in self._redis():
            os.kill(process_id, signal.SIGCONT)
        self._lab.boot(host)

    def hang_storage(self, _host: str) -> None:
        """For longer than a lease; the guests wait for their disks meanwhile, as on any storage that hangs."""
        at_s = boottime_s()
        self._lab.hang_storage()
        try:
            wait_until(lambda: boottime_s() - at_s > 1.5 * LEASE_S, "more than a lease to pass")
        finally:
            self._lab.hang_storage(is_hung=False)

    def with_device(self, fault: Fault) -> Callable[[str], None]:
        """The host has a power device that was ready; it has that fault when the host's link is cut."""

        def inflict(host: str) -> None:
            self.give_device(host)
            self._devices.fault(host, fault)
            self._lab.cut(host)

        return inflict

    def with_false_device(self, host: str) -> None:
        """The device says "off" of a host that runs. Its test has found that out before the link is cut: it is not believed."""
        self.give_device(host)
        self._devices.fault(host, Fault.FALSE)
        self._fleet.trimtab("fence", "test", host)
        wait_until(lambda: not self._is_ready(host), f"the device of {host} to be found false")
        self._lab.cut(host)

    def give_device(self, host: str) -> None:
        secret = self._lab.spec.state_directory / "device.pass"
        secret.write_text(PASSWORD + "\n")
        options = self._devices.options(host)
        self._devices.fault(host, Fault.NONE)
        self._fleet.ok(
            "fence", "config", host, "--agent", "fence_redfish", "--address", options["ip"], "--port", options["ipport"],
            "--user", USER, "--secret-file", str(secret), "--option", f"systems_uri={options['systems_uri']}",
            "--option", "ssl_insecure=1",
        )  # fmt: skip
        wait_until(lambda: self._is_ready(host), f"the device of {host} to be ready")

    def _is_ready(self, host: str) -> bool:
        paths = self._fleet.protection(host)["fence_paths"]
        return bool(paths) and all(one["is_ready"] for one in paths)

    def without_device(self, host: str) -> None:
        self._devices.fault(host, Fault.NONE)
        for one in self._fleet.protection(host)["fence_paths"]:
            self._fleet.ok("fence", "remove", host, one["name"], "--yes")
        if self._lab.init_process_id(host) is None:
            self._lab.boot(host)
        else:
            self._lab.heal(host)

    def crash_and_return(self, host: str) -> None:
        """The host is back before its guests run elsewhere, or just after."""
        at_s = boottime_s()
        self._lab.crash(host)
        wait_until(lambda: boottime_s() - at_s > 14, "most of its lease to pass")
        self._lab.boot(host)

    def crash_and_return_in_recovery(self, host: str) -> None:
        """The host is back while its guests start elsewhere: it was proven off, and has nothing to start any more."""
        self._lab.crash(host)

        def has_begun() -> bool:
            newest = self._fleet.read("/v1/operations?page_size=20")["items"]
            return any(one["kind"] == "vm.recover" and not one["done"] for one in newest)

        wait_until(has_begun, "a recovery to begin", patience_s=90)
        self._lab.boot(host)

    def crash_while_migrating(self, host: str) -> None:
        for name in self._fleet.vms_on(host):
            self._fleet.begin("vm", "migrate", name)
        self._lab.crash(host)
