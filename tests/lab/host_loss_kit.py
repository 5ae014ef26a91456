"""What tests and campaigns of host loss share: a lab whose guests write to a lock-free disk, and what its server saw."""

import itertools
import json
import math
import re
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tests.lab.fleet_kit import Fleet, wait_until
from trimtab_lab import quorum
from trimtab_lab.controlplane import FIRST_METRICS_PORT, METRICS_PORTS, ControlPlane
from trimtab_lab.guest import build_guest_image
from trimtab_lab.hosts import Lab
from trimtab_lab.quorum import Write
from trimtab_lab.replicas import Replicas

GATEWAY_METRICS_PORT = FIRST_METRICS_PORT + 2
LEASE_S, KILL_S = 15.0, 3.0
WORD_OF_A_HOST_S = 4.0
"""A heartbeat, and how long a gateway takes to count it."""
GOAL_MAX_S = 45.0
"""From the cut to the guest counting elsewhere, by lease alone; the median's goal is 25 s."""


def boottime_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(slots=True)
class LossFleet(Fleet):
    """A fleet whose guests write to lock-free disks."""

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(host.name for host in self.lab.spec.hosts())

    def runs_on(self, vm_id: str) -> list[str]:
        """Return the hosts on which a QEMU of this vm really runs, asked of libvirt and not of Trimtab."""
        up = [host for host in self.hosts if self.lab.init_process_id(host) is not None]
        return [host for host in up if f"trimtab-{vm_id}" in self.lab.run(host, ["virsh", "list", "--name"]).stdout.split()]

    def keep(self, name: str, *, to: str, pool: str = "shared", ha: str = "restart") -> str:
        """Create a vm on that host, wait until it counts, and return its id."""
        self.ok("vm", "create", name, "--image", "micro", "--memory", "96MiB", "--pool", pool, "--ha", ha, "--to", to, "--wait")
        vm_id = str(self.vm(name)["id"])
        wait_until(lambda: self.writes(vm_id), f"{name} to count")
        return vm_id

    def writes(self, vm_id: str = "") -> list[Write]:
        return quorum.writes(self.lab.spec.quorum_log, vm_id)

    def home(self, vm_id: str) -> str:
        """Return the host on which the vm counted last, by its disk's server."""
        return self.writes(vm_id)[-1].host

    def double_runs(self) -> list[str]:
        return quorum.judge(self.writes())

    def overlap(self, vm_id: str, home: str, first: Write) -> str:
        """Tell, in words, if the lost home still wrote when the new home's QEMU had opened the disk; '' where it did not.

        The first line elsewhere comes a boot later, which hides most overlaps: a guest that boots for ten seconds starts ten seconds
        too early before two lines ever cross.
        """
        opened_s = self.opened_s(first.connection)
        last = [each for each in self.writes(vm_id) if each.host == home and each.connection != first.connection][-1]
        if last.at_s < opened_s:
            return ""
        return f"{vm_id}: {home} wrote {last.at_s - opened_s:.2f} s after {first.host} had opened its disk"

    def overlaps(self, vm_id: str, after_s: float) -> list[str]:
        """Return, in words, each start of the vm after then whose QEMU had opened the disk while the one before still wrote.

        Two sides of a live migration are one run (one boot): the target has the disk open before the source lets go.
        """
        seen = self.writes(vm_id)
        last: dict[int, Write] = {each.connection: each for each in seen}
        order = [each for index, each in enumerate(seen) if index == 0 or each.connection != seen[index - 1].connection]
        found = []
        for former, first in itertools.pairwise(order):
            until = last[former.connection]
            if first.at_s > after_s and first.boot != former.boot and until.at_s >= (opened_s := self.opened_s(first.connection)):
                found.append(f"{vm_id}: {former.host} wrote {until.at_s - opened_s:.2f} s after {first.host} had opened its disk")
        return found

    def first_elsewhere(self, vm_id: str, lost: str, after_s: float, *, patience_s: float = 90.0) -> Write:
        """Wait for the vm to count on another host than `lost`, and return its first line there."""

        def find() -> Write | None:
            return next((each for each in self.writes(vm_id) if each.at_s > after_s and each.host != lost), None)

        return wait_until(find, f"{vm_id} to count on another host than {lost}", patience_s=patience_s)

    def opened_s(self, connection: int) -> float:
        """Return when a QEMU opened its guest's disk, before the guest booted."""
        for line in self.lab.spec.quorum_log.read_text().splitlines():
            each = json.loads(line)
            if each["what"] == "opened" and each["connection"] == connection:
                return float(each["at_s"])
        raise AssertionError(f"connection {connection} was never opened")

    def event_unix_s(self, kind: str, subject_id: str, *, after_unix_s: float) -> float:
        """Return when the first such event of the subject after then was recorded."""
        found = self.events(kind, after_unix_s=after_unix_s, subject_id=subject_id)
        return min(datetime.fromisoformat(each["at"]).timestamp() for each in found)

    def events(self, kind: str, *, after_unix_s: float, subject_id: str = "") -> list[dict[str, Any]]:
        """Return the events of that kind since then."""
        subject = ("--subject", subject_id) if subject_id else ()
        listed = self.ok("event", "list", "--all-projects", *subject, "--kind", kind, "--limit", "100", "-o", "json").json()
        events = listed["items"] if isinstance(listed, dict) else listed
        return [
            each for each in events if each["kind"] == kind and datetime.fromisoformat(each["at"]).timestamp() >= after_unix_s
        ]

    def vms_on(self, host: str) -> list[str]:
        """Return the names of the vms whose home that host is."""
        listed = self.ok("vm", "list", "-o", "json").json()
        return sorted(one["name"] for one in (listed["items"] if isinstance(listed, dict) else listed) if one.get("host") == host)

    def protection(self, host: str) -> dict[str, Any]:
        return dict(self.host(host)["protection"])

    def qemu_process(self, vm_id: str, host: str) -> tuple[str, str]:
        """Return the number of the vm's QEMU within its host and when it was started: one process, whatever reuses the number."""
        number = self.lab.run(host, ["cat", f"/run/libvirt/qemu/trimtab-{vm_id}.pid"]).stdout.strip()
        return number, self.lab.run(host, ["cat", f"/proc/{number}/stat"]).stdout.rpartition(")")[2].split()[19]

    def warden_log(self, host: str) -> list[str]:
        return self.lab.run(host, ["cat", "/var/log/trimtab/trimtab-warden.log"]).stdout.splitlines()

    def unarmed_hosts(self) -> int:
        """Return how many connected hosts said with their last heartbeat that their warden is not armed."""
        total = 0
        for port in (
            GATEWAY_METRICS_PORT,
            *((GATEWAY_METRICS_PORT + METRICS_PORTS,) if isinstance(self.plane, Replicas) else ()),
        ):
            try:
                text = self._scraped(port)
            except OSError:
                return -1  # it is being started
            found = re.search(r"^trimtab_gateway_hosts_without_warden (\S+)", text, re.MULTILINE)
            if found is None:
                return -1
            total += int(float(found[1]))
        return total

    def _scraped(self, port: int) -> str:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{self.lab.spec.ctl_address}:{port}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    def are_all_up(self) -> bool:
        """Tell whether every host of the lab is heard from; False while nobody answers."""
        listed = self.trimtab("host", "list", "-o", "json")
        return listed.code == 0 and listed.out.count('"up"') >= len(self.hosts)

    def wait_until_armed(self) -> None:
        """Wait until every host is up and its warden armed, longer than gateways take to say so of one that has just come back."""
        since_s = math.inf

        def have_stood() -> bool:
            nonlocal since_s
            since_s = min(since_s, boottime_s()) if self.are_all_up() and self.unarmed_hosts() == 0 else math.inf
            return boottime_s() - since_s > WORD_OF_A_HOST_S

        wait_until(have_stood, "every host to be up and every warden armed")


def use_beacons(fleet: LossFleet) -> None:
    """Let the hosts be as a join makes them that says nothing of fencing: armed while their beacons renew."""
    for host in fleet.hosts:
        script = """sed -i 's/^beacon = false/beacon = true/; s/^lease_fencing = .*/lease_fencing = "auto"/' /var/lib/trimtab/agent.toml
        systemctl restart trimtab-agent"""
        fleet.sh(host, script)
    wait_until(lambda: all(fleet.protection(host)["beacon_age_s"] is not None for host in fleet.hosts), "every beacon to renew")
    fleet.wait_until_armed()


def build(lab: Lab, *, settings: dict[str, str] | None = None, hosts: int = 3, is_replicated: bool = False) -> LossFleet:
    """Bring up hosts with wardens, a shared pool that is lock-free for guests, a local one, and the guest's image."""
    lab.up(hosts=hosts, has_lock_free_disk=True)
    plane = Replicas(lab, settings=settings) if is_replicated else ControlPlane(lab, settings=settings)
    plane.start()
    plane.join_hosts(lease_fencing=True, beacon=False)
    fleet = LossFleet(lab, plane)
    wait_until(fleet.are_all_up, "every host to be up")
    fleet.ok("pool", "create", "shared", "--path", "/srv/trimtab-shared", "--shared")
    fleet.ok("pool", "create", "local", "--path", "/srv/trimtab-local")
    fleet.ok("image", "import", "micro", str(build_guest_image().qcow2), "--pool", "shared", "--wait")
    fleet.wait_until_armed()
    return fleet


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One loss of a host with a real guest on it, in seconds; `total_s` from the cut to the guest's first line elsewhere."""

    kind: str
    detect_s: float
    """Until the host was called lost."""
    fence_s: float
    """From there until its lease had surely ended."""
    place_s: float
    """From there until the new host's QEMU opened the guest's disk."""
    boot_s: float
    """From there until the guest's first line."""
    bare_boot_s: float
    """The same part of the same guest's ordinary start before the loss."""

    @property
    def total_s(self) -> float:
        return self.detect_s + self.fence_s + self.place_s + self.boot_s


def measure(fleet: LossFleet, vm_id: str, kind: str, inflict: Callable[[str], None]) -> Loss:
    """Lose the vm's home by `inflict` and return where the time went. The caller brings the host back."""
    home = fleet.home(vm_id)
    host_id = str(fleet.host(home)["id"])
    bare_s = boot_s(fleet, vm_id)
    unix_to_boottime_s = boottime_s() - time.time()
    at_s = boottime_s()
    inflict(home)
    first = fleet.first_elsewhere(vm_id, home, at_s)
    opened_s = fleet.opened_s(first.connection)
    lost_s, fenced_s = (
        fleet.event_unix_s(f"failover.{what}", host_id, after_unix_s=at_s - unix_to_boottime_s) + unix_to_boottime_s
        for what in ("lost", "fenced")
    )
    return Loss(
        kind=kind,
        detect_s=lost_s - at_s,
        fence_s=fenced_s - lost_s,
        place_s=opened_s - fenced_s,
        boot_s=first.at_s - opened_s,
        bare_boot_s=bare_s,
    )


def boot_s(fleet: LossFleet, vm_id: str) -> float:
    """Return the boot time of the vm's present run: from its QEMU opening the disk to its first line."""
    connection = fleet.writes(vm_id)[-1].connection
    first = next(each for each in fleet.writes(vm_id) if each.connection == connection)
    return first.at_s - fleet.opened_s(connection)
