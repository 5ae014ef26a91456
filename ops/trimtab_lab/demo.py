"""`make demo`: the main job, before the user's eyes, through nothing but the command line that they will use themselves."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab_lab import quorum
from trimtab_lab.controlplane import ControlPlane
from trimtab_lab.demo_backup import show_backup
from trimtab_lab.errors import LabError
from trimtab_lab.guest import build_guest_image
from trimtab_lab.hosts import Lab

HOSTS = 3
GUESTS = ("web1", "web2", "web3", "web4", "db1", "db2")
# db1 lives on a local disk, which a live migration has to copy; the others on storage that all hosts see.
LOCAL_GUEST, SHARED_GUEST = "db1", "web1"
BACKED_UP_GUEST = "db2"
KEPT_GUESTS = ("web1", "web3", "web4")
"""Created with `--ha restart`: they go on elsewhere when their host dies."""
TICK = re.compile(r"tick (\d+) uptime ([\d.]+)")
BOOT_TIMEOUT_S = 300.0
POLL_S = 1.0


@dataclass(slots=True)
class Demo:
    """One run. Every command is printed as typed, with its output, so that it can be repeated by hand."""

    lab: Lab
    plane: ControlPlane
    figures: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        self.say("Three real libvirt hosts and the control plane start (namespaces on this machine; guests run under TCG or KVM)")
        self.lab.up(hosts=HOSTS, has_lock_free_disk=True)
        if not self.lab.spec.has_lock_free_disk:
            raise LabError("the demo of an older release is still up; end it with `make down`, then try again")
        self.plane.start()
        self.plane.join_hosts(lease_fencing=True, beacon=False)  # by the lease alone a lost host is proven off soonest
        self.wait_for_hosts()
        self.trimtab("host", "list")
        self.prepare()
        self.create_guests()
        self.migrate(SHARED_GUEST, "on shared storage: only memory moves")
        self.migrate(LOCAL_GUEST, "on a local disk: the disk is copied along")
        self.stop_start_delete()
        show_backup(self, BACKED_UP_GUEST, key_file=self.lab.spec.state_directory / "controller" / "backup-main.key")
        self.lose_a_host()
        self.show_metrics()
        self.farewell()

    def prepare(self) -> None:
        self.say("Storage, a network and an image")
        self.trimtab("pool", "create", "shared", "--path", "/srv/trimtab-shared", "--shared", "--default")
        self.trimtab("pool", "create", "local", "--path", "/srv/trimtab-local")
        self.trimtab("network", "create", "default", "--bridge", "br-guest")
        image = build_guest_image().qcow2
        self.trimtab("image", "import", "micro", str(image), "--pool", "shared", "--wait")

    def create_guests(self) -> None:
        self.say(f"{len(GUESTS)} guests are placed and boot; each with the reason for its place")
        for index, name in enumerate(GUESTS, start=11):
            address = f"{self.lab.spec.guest_prefix}.{index}/24"
            pool = "local" if name == LOCAL_GUEST else "shared"
            self.trimtab(
                "vm", "create", name, "--image", "micro", "--vcpus", "1", "--memory", "96MiB",
                "--pool", pool, "--network", f"default,ip={address}", *(("--ha", "restart") if name in KEPT_GUESTS else ()),
                "--no-wait",
            )  # fmt: skip
        for name in GUESTS:
            self.wait_for_vm(name)
        for name in GUESTS:
            self.trimtab("vm", "explain", name)
        for name in GUESTS:
            self.wait_for_ticks(name, at_least=1)
        self.trimtab("vm", "list")

    def migrate(self, name: str, what: str) -> None:
        self.say(f"{name} moves to another host without stopping ({what})")
        before, up_s = self.wait_for_ticks(name, at_least=2), self.uptime_s(name)
        self.trimtab("vm", "migrate", name, "--wait")
        after, later_up_s = self.wait_for_ticks(name, at_least=before + 3), self.uptime_s(name)
        self.trimtab("vm", "list", "-o", "wide")
        if later_up_s <= up_s:  # its counter is on its disk and says nothing of that
            said = self.trimtab("vm", "console", name, "--log", quiet=True).splitlines()[-20:]
            raise LabError(
                f"{name} was up for {up_s:.1f} s before the move and is for {later_up_s:.1f} s after it: it restarted. Its console:\n"
                + "\n".join(said)
            )
        self.say(
            f"{name} counted {before} before and {after} after the move, up for {up_s:.1f} s and then {later_up_s:.1f} s: it never "
            "restarted"
        )

    def stop_start_delete(self) -> None:
        name = GUESTS[1]
        self.say(f"{name} is stopped, started (its counter goes on from its disk), deleted")
        counted = self.wait_for_ticks(name, at_least=1)
        self.trimtab("vm", "stop", name, "--wait")
        self.trimtab("vm", "start", name, "--wait")
        self.wait_for_ticks(name, at_least=counted + 1)
        self.trimtab("vm", "delete", name, "--yes", "--wait")
        self.trimtab("vm", "list")

    def lose_a_host(self) -> None:
        """Cut the power of a host and show its kept guests counting on elsewhere, by the expiry of its lease alone."""
        home = self.home_of(KEPT_GUESTS[0])
        kept = [name for name in KEPT_GUESTS if self.home_of(name) == home]
        self.wait_for_wardens()
        self.say(f"The power of {home} is cut; {', '.join(kept)} shall go on elsewhere, with no power device: by its lease alone")
        counted = {name: self.wait_for_ticks(name, at_least=1) for name in kept}
        vm_ids = {name: self.vm(name)["id"] for name in kept}
        cut_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        print(f"$ trimtab-lab crash {home}", flush=True)
        self.lab.crash(home)
        for name in kept:
            first = self.wait_for_writer(vm_ids[name], home, cut_s)
            self.figures[name] = f"{first.at_s - cut_s:.1f} s"
            print(
                f"    {name} counts on at {first.host}: {first.counter} (it had said {counted[name]} before the cut), "
                f"{self.figures[name]} after the cut",
                flush=True,
            )
        wrong = quorum.judge(quorum.writes(self.lab.spec.quorum_log))
        if wrong:
            raise LabError(f"a guest ran twice: {wrong[0]}")
        self.trimtab("vm", "list", "-o", "wide")
        self.trimtab("host", "list")
        seconds = ", ".join(f"{name} {took}" for name, took in self.figures.items())
        self.say(
            f"From the cut to counting elsewhere: {seconds}; one writer to each disk at any time, by the log of their server"
        )
        print(f"$ trimtab-lab boot {home}", flush=True)
        self.lab.boot(home)
        self.wait_for_hosts()
        self.trimtab("host", "list")

    def home_of(self, name: str) -> str:
        """Return the name of the host that the guest's disk was last written from."""
        return quorum.writes(self.lab.spec.quorum_log, str(self.vm(name)["id"]))[-1].host

    def vm(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.trimtab("vm", "get", name, "-o", "json", quiet=True)))

    def wait_for_wardens(self) -> None:
        """Wait until every host has said that its warden is armed: only then its lease alone is enough."""
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while not re.search(r"^trimtab_gateway_hosts_without_warden 0", self.plane.scrape(), re.MULTILINE):
            if time.monotonic() > deadline:
                raise LabError("a host's warden is not armed; see /var/log/trimtab/trimtab-warden.log inside it")
            time.sleep(POLL_S)

    def wait_for_writer(self, vm_id: str, lost: str, after_s: float) -> quorum.Write:
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while True:
            for each in quorum.writes(self.lab.spec.quorum_log, vm_id):
                if each.at_s > after_s and each.host != lost:
                    return each
            if time.monotonic() > deadline:
                raise LabError(f"{vm_id} does not count elsewhere; see `trimtab event list`")
            time.sleep(POLL_S / 4)

    def show_metrics(self) -> None:
        self.say("Three figures from the metrics, as Prometheus would scrape them")
        shown = self.plane.scrape()
        for name in ("trimtab_hosts", "trimtab_vms", "trimtab_operations_ended_total"):
            for line in [line for line in shown.splitlines() if line.startswith(name + "{")]:
                if not line.endswith(" 0.0"):
                    print("   ", line)

    def farewell(self) -> None:
        self.say("The fleet stays up. In your shell:")
        print(self.plane.shell_environment())
        print(f"""
    trimtab vm list; trimtab vm explain web1 --why-not node3; trimtab event list --watch
    API and its documentation: {self.plane.url}/docs
    metrics: {self.plane.metrics_url}
    everything ends with: make down""")

    # --- tools -----------------------------------------------------------------------------------------------------------

    def say(self, sentence: str) -> None:
        print(f"\n\033[1m== {sentence}\033[0m" if sys.stdout.isatty() else f"\n== {sentence}", flush=True)

    def trimtab(self, *arguments: str, quiet: bool = False) -> str:
        """Run the CLI as a user would; a failure ends the demo with what the user would have seen."""
        if not quiet:
            print("$ trimtab " + " ".join(arguments), flush=True)
        program = str(Path(sys.executable).with_name("trimtab"))
        finished = subprocess.run(
            [program, *arguments],
            env=os.environ | self.plane.cli_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if quiet else None,
            text=True,
            check=False,
            timeout=600,
        )
        if not quiet:
            print(finished.stdout, end="", flush=True)
        if finished.returncode != 0:
            raise LabError(f"`trimtab {' '.join(arguments)}` ended with {finished.returncode}: {finished.stderr or ''}")
        return finished.stdout

    def wait_for_hosts(self) -> None:
        """Wait until every host has opened its session and told what it has."""
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while not self.are_hosts_known():
            if time.monotonic() > deadline:
                raise LabError("not every host came up; see `trimtab host list`")
            time.sleep(POLL_S)

    def are_hosts_known(self) -> bool:
        hosts = json.loads(self.trimtab("host", "list", "-o", "json", quiet=True))
        return len([host for host in hosts if host["connectivity"] == "up" and host["memory_mib"]["limit"]]) >= HOSTS

    def wait_for_vm(self, name: str) -> None:
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while '"state": "running"' not in self.trimtab("vm", "get", name, "-o", "json", quiet=True):
            if time.monotonic() > deadline:
                raise LabError(f"{name} does not run after {BOOT_TIMEOUT_S:.0f} s; see `trimtab vm get {name}`")
            time.sleep(POLL_S)

    def wait_for_ticks(self, name: str, *, at_least: int) -> int:
        """Return the guest's newest counter once it has reached `at_least`."""
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        print(f"    {name}: its counter is read off its serial port until it reaches {at_least} ...", flush=True)
        while True:
            counted = self.ticks(name)
            if counted and counted[-1] >= at_least:
                print(f"    {name} counts: {counted[-1]}", flush=True)
                return counted[-1]
            if time.monotonic() > deadline:
                raise LabError(f"{name} does not count on after {BOOT_TIMEOUT_S:.0f} s; see `trimtab vm console {name} --log`")
            time.sleep(POLL_S)

    def first_tick(self, name: str) -> int:
        """Return what the guest, which counts, said first of all that its console's log still has."""
        return self.ticks(name)[0]

    def ticks(self, name: str) -> list[int]:
        return [int(counter) for counter, _uptime in self.said(name)]

    def uptime_s(self, name: str) -> float:
        """Return for how long the guest, which counts, said last that its kernel is up."""
        return float(self.said(name)[-1][1])

    def said(self, name: str) -> list[tuple[str, str]]:
        """Return all (counter, uptime) that the guest's console's log still has, without a line that is being written."""
        log = self.trimtab("vm", "console", name, "--log", quiet=True)
        return TICK.findall(log[: log.rfind("\n") + 1])


def run_demo(lab: Lab) -> None:
    Demo(lab, ControlPlane(lab)).run()
