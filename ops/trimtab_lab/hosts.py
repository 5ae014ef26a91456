"""The lab as an object: real libvirt hosts in namespaces on one machine, and the faults that can be done to them.

    lab = Lab.named("demo")          # state in /var/lib/trimtab-lab/demo, or where TRIMTAB_LAB_DIR says
    lab.up(hosts=3)                  # idempotent; boots crashed hosts again
    lab.run("node1", ["virsh", "list", "--all"])
    lab.crash("node2"); lab.boot("node2"); lab.cut("node3"); lab.heal("node3")
    lab.down()                       # leaves nothing

States of a host: absent ─boot→ up ─crash→ crashed ─boot→ up. `cut` and `frozen` are conditions of a host that is up. Every
verb is safe to repeat. The truth about what runs is the machine's (control groups, namespaces), never the lab's memory, so
another process may use the same lab at the same time; `up` and `down` exclude each other by a lock file.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from trimtab_lab import ceph, cgroups, hostfiles, networks, open_vswitch, ovn, storage
from trimtab_lab.commands import own_programs, run, wait_until, write_atomically
from trimtab_lab.ctl import ENTER_GROUP, create_ctl_groups, ctl_command
from trimtab_lab.errors import LabError
from trimtab_lab.hostinit import ENVIRONMENT
from trimtab_lab.specs import (
    CTL,
    DEFAULT_STATE_ROOT,
    MAX_HOSTS,
    PLANE_GROUP,
    STORAGE_GROUP,
    HostSpec,
    LabSpec,
    default_state_directory,
    validate_name,
)

BOOT_TIMEOUT_S = 60.0
"""A host is up in about a second on an idle machine; eight labs that boot at once on two cores need this."""

OVERLAY_LINK_MTU = 9000
"""Of the hosts' links with OVN: what a guest's 1500 bytes and their tunnel take, and more."""

LIBVIRT_DAEMONS = ("virtlogd", "virtlockd", "libvirtd")


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    name: str
    state: str
    process_id: int | None
    """As the machine counts; `None` when it does not run."""
    starts: int


@dataclass(frozen=True, slots=True)
class HostStatus:
    name: str
    address: str
    state: str
    """`up`, `starting`, `crashed` (or never booted)."""
    is_frozen: bool
    cut_networks: tuple[str, ...]
    init_process_id: int | None
    services: tuple[ServiceStatus, ...]
    limits: dict[str, str]


class Lab:
    """One lab. Use `Lab.named`; the constructor does no I/O."""

    def __init__(self, spec: LabSpec, *, agent_command: Sequence[str] | None = None) -> None:
        self.spec = spec
        self.agent_command = list(agent_command or [str(own_programs() / "trimtab-agent")])

    @classmethod
    def named(cls, name: str = "default", *, state_directory: Path | None = None) -> "Lab":
        """The lab of that name as recorded, or a new one (network 0) that `up` will bring into being."""
        directory = (state_directory or default_state_directory(validate_name(name))).resolve()
        record = directory / "lab.json"
        if record.exists():
            spec = LabSpec.from_json(record.read_text())
            # `default` stands for "whatever lives there" when only the directory was given.
            if name not in (spec.name, "default"):
                raise LabError(f"{directory} holds lab {spec.name}, not {name}")
            return cls(replace(spec, state_directory=directory))
        return cls(LabSpec(name=name, state_directory=directory, network=0, host_count=0))

    # -- the whole lab -------------------------------------------------------------------------------------------

    def up(self, *, hosts: int, has_lock_free_disk: bool = False) -> None:
        """Brings up that many hosts, all at once; those that run are left alone, crashed ones boot. Never shrinks.

        `has_lock_free_disk`: see quorum.py; decided at the first call, and no host can be added to such a lab.
        """
        if not 1 <= hosts <= MAX_HOSTS:
            raise LabError(f"hosts {hosts}: 1 to {MAX_HOSTS}, for example 3")
        if os.geteuid() != 0:
            raise LabError("the lab makes namespaces, mounts and bridges: run it as root")
        self.spec.state_directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        with self._exclusively():
            self._choose_addresses(hosts, has_lock_free_disk=has_lock_free_disk)
            create_ctl_groups(self.spec)
            storage.mount_shared(self.spec)
            if self.spec.has_lock_free_disk:
                storage.serve_lock_free_disks(self.spec)
            self._boot_all([host for host in self.spec.hosts() if self.init_process_id(host.name) is None])

    def down(self, *, keep_state: bool = False) -> None:
        """Ends everything and removes what the lab made, disks and logs too unless `keep_state`. Idempotent."""
        if not self.is_recorded:
            return
        with self._exclusively():
            for host in self.spec.hosts():
                cgroups.kill_all(host.cgroup, first=self.init_process_id(host.name))
            for group in (PLANE_GROUP, STORAGE_GROUP):
                cgroups.kill_all(self.spec.cgroup(group))
            storage.unmount_shared(self.spec)
            networks.remove_fabric(self.spec)
            for member in (PLANE_GROUP, STORAGE_GROUP, *(host.name for host in self.spec.hosts())):
                cgroups.remove(self.spec.cgroup(member))
            if not keep_state:
                self._remove_state()

    @property
    def is_recorded(self) -> bool:
        return (self.spec.state_directory / "lab.json").exists()

    def status(self) -> tuple[HostStatus, ...]:
        return tuple(self._host_status(host) for host in self.spec.hosts())

    # -- faults --------------------------------------------------------------------------------------------------

    def crash(self, name: str) -> None:
        """Cuts the power: peers hear nothing more, not even a closed connection; guests and daemons are gone."""
        host = self.spec.host(name)
        networks.unplug(self.spec, name)
        cgroups.kill_all(host.cgroup, first=self.init_process_id(name))

    def boot(self, name: str) -> None:
        """Power on; a host that is up is left alone. Definitions, disks and the join survive, running guests do not."""
        host = self.spec.host(name)
        with self._exclusively():
            if self.init_process_id(name) is None:
                self._boot_all([host])

    def cut(self, member: str, *, network: str = "control") -> None:
        """Takes the cable out of a host or of ctl; `network` is `control`, `guest` or `all`."""
        self._check_plugged(member)
        networks.set_ports(self.spec, member, network=network, is_up=False)

    def heal(self, member: str, *, network: str = "all") -> None:
        self._check_plugged(member)
        networks.set_ports(self.spec, member, network=network, is_up=True)

    def freeze(self, name: str, *, everything: bool = False) -> None:
        """Stops the agent's processes, or everything the host runs, guests included, until `thaw`."""
        if everything:
            self._running_init(name)
            cgroups.set_frozen(self.spec.host(name).cgroup, frozen=True)
        else:
            self.signal_service(name, "trimtab-agent", signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        cgroups.set_frozen(self.spec.host(name).cgroup, frozen=False)
        for service in self._host_status(self.spec.host(name)).services:
            if service.process_id is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(service.process_id, signal.SIGCONT)

    def hang_storage(self, *, is_hung: bool = True) -> None:
        """Lets the shared storage answer nobody any more, as a server that hangs; or again."""
        storage.hang(self.spec, is_hung=is_hung)

    def signal_service(self, name: str, service: str, number: signal.Signals) -> int:
        """Sends a signal to the main process of `libvirtd`, `trimtab-agent`, ... and returns its pid on the machine."""
        process_id = self.service_process_id(name, service)
        if process_id is None:
            raise LabError(f"{service} does not run on {name}")
        os.kill(process_id, number)
        return process_id

    # -- inside hosts --------------------------------------------------------------------------------------------

    def run(
        self, member: str, argv: Sequence[str], *, check: bool = True, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command inside a host (it dies with the host) or in ctl's network."""
        return run(self.command(member, argv), check=check, timeout_s=timeout_s, environment=self.environment(member))

    def environment(self, member: str) -> dict[str, str]:
        """Commands inside a host see the host's environment, those in ctl that of whoever runs the lab."""
        if member == CTL:
            return dict(os.environ)
        return {**ENVIRONMENT, "TERM": os.environ.get("TERM", "dumb")}

    def command(self, member: str, argv: Sequence[str]) -> list[str]:
        """The command on the machine that runs `argv` inside that host, or in ctl's network namespace."""
        if member == CTL:
            return ctl_command(self.spec, argv)
        host = self.spec.host(member)
        if cgroups.is_frozen(host.cgroup):
            # A process that enters a frozen group cannot even be killed until the thaw.
            raise LabError(f"{member} is frozen; `trimtab-lab thaw {member}` lets it go on")
        groups = [str(path) for path in cgroups.directories(host.cgroup).values()]
        if cgroups.is_unified():
            groups = [f"{groups[0]}/init"]
        enter = ["nsenter", f"--target={self._running_init(member)}", "-m", "-u", "-i", "-n", "-p", "-C", "--"]
        return ["sh", "-c", ENTER_GROUP, "sh", *groups, "--", *enter, *argv]

    def init_process_id(self, name: str) -> int | None:
        """The host's process 1 as the machine counts, `None` while the host is off."""
        host = self.spec.host(name)
        try:
            process_id = int((host.directory / "init.pid").read_text())
        except (FileNotFoundError, ValueError):
            return None
        # A pid may have been given to another process since; the group and the inner number cannot lie.
        if process_id in cgroups.process_ids(host.cgroup) and _inner_process_id(process_id) == 1:
            return process_id
        return None

    def service_process_id(self, name: str, service: str) -> int | None:
        """The main process of a daemon of that host, as the machine counts."""
        for each in self._host_status(self.spec.host(name)).services:
            if each.name == service:
                return each.process_id
        raise LabError(f"hosts run no service {service!r}")

    def libvirt_uri(self, name: str) -> str:
        """Opens that host's libvirt from the machine, without network or certificates."""
        return f"qemu+unix:///system?socket={file_of(self._running_init(name), 'run/libvirt/libvirt-sock')}"

    def nbd_disk(self, name: str, *, size_mib: int) -> storage.NbdDisk:
        """A disk without locks, served from ctl: two hosts can write to it at once. Idempotent."""
        return storage.nbd_disk(self.spec, name, size_mib=size_mib)

    def open_vswitch(self, name: str, *, mtu: int = 1500) -> None:
        """Lets the host run Open vSwitch in user space, with bridge br0 in the guests' network. Idempotent; again after a crash."""
        open_vswitch.install(self.spec.host(name), partial(self.run, name), mtu=mtu)

    def overlay(self, names: Sequence[str]) -> str:
        """Lets OVN run: databases in ctl, an ovn-controller on each of these hosts. Returns its northbound database. Idempotent."""
        ovn.start_central(self.spec)  # also what brings it back after `ovn.lose_northbound`
        for name in names:
            ovn.install(self.spec.host(name), partial(self.run, name))
        return ovn.northbound(self.spec)

    def overlay_settings(self) -> dict[str, str]:
        """Lets every host have Open vSwitch and OVN; returns what tells a controller of it. Idempotent; again after a crash."""
        names = [host.name for host in self.spec.hosts()]
        for name in names:
            self.open_vswitch(name, mtu=OVERLAY_LINK_MTU)
        return {"TRIMTAB_OVN_NORTHBOUND": self.overlay(names)}

    def ceph(self) -> ceph.Cluster:
        """A Ceph cluster of one node in ctl. Idempotent."""
        return ceph.start(self.spec)

    # -- inner workings ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        with (self.spec.state_directory / "lab.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _choose_addresses(self, hosts: int, *, has_lock_free_disk: bool) -> None:
        record = self.spec.state_directory / "lab.json"
        if not record.exists() and any(each.name != "lab.lock" for each in self.spec.state_directory.iterdir()):
            raise LabError(f"{self.spec.state_directory} is not empty and holds no lab; choose another --state-dir")
        with networks.allocation_lock():
            network = self.spec.network or networks.choose_network()
            is_new = not record.exists()
            self.spec = replace(
                self.spec,
                network=network,
                host_count=max(hosts, self.spec.host_count),
                has_lock_free_disk=has_lock_free_disk if is_new else self.spec.has_lock_free_disk,
            )
            write_atomically(record, self.spec.to_json())
            networks.build_fabric(self.spec)

    def _boot_all(self, hosts: Sequence[HostSpec]) -> None:
        for host in hosts:
            boot_spec = hostfiles.prepare(host, agent_command=self.agent_command)
            # What a crash of the lab itself may have left running half-way.
            cgroups.kill_all(host.cgroup)
            networks.build_host(host)
            cgroups.create(host.cgroup)
            for leftover in ("services.json", "control.sock"):
                (host.init_directory / leftover).unlink(missing_ok=True)
            with (host.directory / "boot.log").open("ab") as log:
                subprocess.run(
                    [sys.executable, "-m", "trimtab_lab.hostinit", str(boot_spec)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    check=False,
                    timeout=30,
                )
        for host in hosts:
            self._await_boot(host)

    def _await_boot(self, host: HostSpec) -> None:
        def is_settled() -> bool:
            return self.init_process_id(host.name) is None or _libvirt_is_settled(host)

        settled = wait_until(is_settled, timeout_s=BOOT_TIMEOUT_S, interval_s=0.05)
        if not settled or self.init_process_id(host.name) is None:
            last_lines = "\n".join((host.directory / "boot.log").read_text().splitlines()[-5:])
            raise LabError(f"{host.name} did not boot; see {host.directory}/boot.log and var/log/trimtab: {last_lines}")

    def _running_init(self, name: str) -> int:
        process_id = self.init_process_id(name)
        if process_id is None:
            raise LabError(f"{name} is not up; `trimtab-lab boot {name}` boots it")
        return process_id

    def _check_plugged(self, member: str) -> None:
        if member != CTL:
            self._running_init(member)

    def _host_status(self, host: HostSpec) -> HostStatus:
        init_process_id = self.init_process_id(host.name)
        record = _recorded_services(host) if init_process_id is not None else {}
        outer = _outer_process_ids(host.cgroup) if record else {}
        services = tuple(
            ServiceStatus(name=name, state=each["state"], process_id=outer.get(each["pid"]), starts=each["starts"])
            for name, each in record.get("services", {}).items()
        )
        is_ready = any(each.name == "libvirtd" and each.state == "running" for each in services)
        return HostStatus(
            name=host.name,
            address=host.address,
            state="crashed" if init_process_id is None else "up" if is_ready else "starting",
            is_frozen=cgroups.is_frozen(host.cgroup),
            cut_networks=networks.cut_networks(self.spec, host.name),
            init_process_id=init_process_id,
            services=services,
            limits=record.get("limits", {}),
        )

    def _remove_state(self) -> None:
        """Removes what the lab made, by name: a wrong --state-dir must never cost somebody their files."""
        directory = self.spec.state_directory
        for path in (
            *(host.directory for host in self.spec.hosts()),
            *(directory / name for name in ("shared", "shared.backing", "nbd", "ovn", "log", "run", "controller", "images")),
        ):
            if path.is_dir():
                if any(os.path.ismount(each) for each in (path, path / "root")):
                    raise LabError(f"{path} is still mounted")
                shutil.rmtree(path)
        for name in ("lab.json", "lab.lock"):
            (directory / name).unlink(missing_ok=True)
        for empty in (directory, DEFAULT_STATE_ROOT):
            with contextlib.suppress(OSError):
                empty.rmdir()


def file_of(process_id: int, path: str) -> Path:
    """A file as the processes of a host see it, reached from the machine through one of them; `path` without its leading slash."""
    return Path("/", "proc", str(process_id), "root", path)


def _recorded_services(host: HostSpec) -> dict[str, Any]:
    try:
        recorded: dict[str, Any] = json.loads((host.init_directory / "services.json").read_text())
    except FileNotFoundError:
        return {}
    return recorded


def _libvirt_is_settled(host: HostSpec) -> bool:
    """Whether each daemon serves, or was stopped on purpose before the crash and stays so."""
    services = _recorded_services(host).get("services", {})
    return bool(services) and all(services[name]["state"] in ("running", "stopped") for name in LIBVIRT_DAEMONS)


def _inner_process_id(process_id: int) -> int | None:
    """The number of a process within its own pid namespace."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return None


def _outer_process_ids(cgroup: str) -> dict[int | None, int]:
    return {_inner_process_id(outer): outer for outer in cgroups.process_ids(cgroup)}
