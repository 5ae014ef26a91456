"""The files of a host that outlive a crash: its /etc, its state directories, its identity.

A host starts as a fresh Debian with libvirt-daemon-system: /etc is a copy of the machine's without anything of the
machine's own libvirt or Trimtab, plus what namespaces need. TLS is left to the agent's join.
"""

import contextlib
import json
import shlex
import shutil
import sys
import uuid
from dataclasses import asdict
from pathlib import Path

from trimtab_lab import cgroups, quorum
from trimtab_lab.commands import write_atomically
from trimtab_lab.hostinit import BootSpec
from trimtab_lab.networks import NAMESPACE_DIRECTORY
from trimtab_lab.specs import LOCAL_DIRECTORY, SHARED_DIRECTORY, HostSpec

OWN_DIRECTORIES = (
    "/etc",
    "/var/lib/libvirt",
    "/var/cache/libvirt",
    "/var/log/libvirt",
    "/var/lib/trimtab",
    "/var/log/trimtab",
    "/var/tmp",
    LOCAL_DIRECTORY,
)
LEFT_OUT_OF_ETC = ("pki", "trimtab", "ssl/private", "letsencrypt", "openvswitch", "ovn", "shadow-", "gshadow-")
"""Of the machine's /etc: never copied, since a host must not start with the machine's keys or its join."""

LIBVIRTD_CONFIGURATION = """\
# What a lab host needs on top of libvirt's defaults. The agent's join adds TLS below.
auth_unix_ro = "none"
auth_unix_rw = "none"
host_uuid = "{host_uuid}"
keepalive_interval = 1
keepalive_count = 3
log_level = 3
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"""
QEMU_CONFIGURATION = """\
# What QEMU needs inside namespaces on a shared kernel. The agent's join adds migration and TLS settings below.
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
stdio_handler = "logd"
max_core = 0
keepalive_interval = 1
keepalive_count = 3
"""
SYSTEMCTL = """\
#!/bin/sh
exec {python} -m trimtab_lab.systemctl "$@"
"""


def prepare(host: HostSpec, *, agent_command: list[str]) -> Path:
    """Makes what is missing of the host's directories and returns the path of its boot spec; idempotent."""
    for inside in OWN_DIRECTORIES[1:]:
        host.path_on_machine(inside).mkdir(parents=True, exist_ok=True)
    host.path_on_machine("/var/tmp").chmod(0o1777)
    for inside in ("images", "qemu", "boot", "dnsmasq", "swtpm"):
        (host.path_on_machine("/var/lib/libvirt") / inside).mkdir(exist_ok=True)
    (host.path_on_machine("/var/log/libvirt") / "qemu").mkdir(exist_ok=True)
    (host.directory / "root").mkdir(exist_ok=True)
    (host.init_directory / "bin").mkdir(parents=True, exist_ok=True)
    command = host.init_directory / "bin" / "systemctl"
    write_atomically(command, SYSTEMCTL.format(python=shlex.quote(sys.executable)), mode=0o755)
    agent = host.init_directory / "bin" / "trimtab-agent"
    write_atomically(agent, f'#!/bin/sh\nexec {shlex.join(agent_command)} "$@"\n', mode=0o755)
    if not (host.directory / "identity.json").exists():
        identity = {"host_uuid": str(uuid.uuid4()), "machine_id": uuid.uuid4().hex}
        _make_etc(host, identity)
        # Written last: it says that the copy of /etc is whole.
        write_atomically(host.directory / "identity.json", json.dumps(identity) + "\n")
    _write_names(host)
    return _write_boot_spec(host, agent_command)


def identity_of(host: HostSpec) -> dict[str, str]:
    identity: dict[str, str] = json.loads((host.directory / "identity.json").read_text())
    return identity


def _make_etc(host: HostSpec, identity: dict[str, str]) -> None:
    etc = host.path_on_machine("/etc")
    if etc.exists():
        shutil.rmtree(etc)

    def left_out(directory: str, names: list[str]) -> set[str]:
        relative = Path(directory).relative_to("/etc")
        return {name for name in names if str(relative / name) in LEFT_OUT_OF_ETC}

    shutil.copytree("/etc", etc, symlinks=True, ignore=left_out, ignore_dangling_symlinks=True)
    etc.chmod(0o755)
    libvirt = etc / "libvirt"
    for left_by_machine in ("qemu", "storage", "secrets", "hooks", "nwfilter-binding"):
        shutil.rmtree(libvirt / left_by_machine, ignore_errors=True)
    networks = libvirt / "qemu" / "networks"
    networks.mkdir(parents=True)
    default_network = Path("/usr/share/libvirt/networks/default.xml")
    if default_network.exists():
        shutil.copy(default_network, networks / "default.xml")
    (libvirt / "libvirtd.conf").write_text(LIBVIRTD_CONFIGURATION.format(**identity))
    (libvirt / "qemu.conf").write_text(QEMU_CONFIGURATION)
    with contextlib.suppress(FileNotFoundError):
        (etc / "machine-id").unlink()
    (etc / "machine-id").write_text(identity["machine_id"] + "\n")
    (etc / "hostname").write_text(host.name + "\n")
    with contextlib.suppress(FileNotFoundError):
        (etc / "resolv.conf").unlink()
    (etc / "resolv.conf").write_text("# a lab host has no name service\n")


def _write_names(host: HostSpec) -> None:
    lab = host.lab
    lines = ["127.0.0.1 localhost", f"{lab.ctl_address} ctl", f"{lab.machine_address} machine"]
    lines += [f"{each.address} {each.name}" for each in lab.hosts()]
    (host.path_on_machine("/etc") / "hosts").write_text("\n".join(lines) + "\n")


def _write_boot_spec(host: HostSpec, agent_command: list[str]) -> Path:

    binds = {inside: str(host.path_on_machine(inside)) for inside in OWN_DIRECTORIES}
    binds[SHARED_DIRECTORY] = str(host.lab.shared_mount)
    binds["/run/trimtab-lab"] = str(host.init_directory)
    if host.lab.has_lock_free_disk:
        wrapper = host.init_directory / "bin" / "qemu-system-x86_64"
        write_atomically(wrapper, quorum.qemu_wrapper(), mode=0o755)
        binds[quorum.REAL_QEMU_IN_HOST] = quorum.QEMU
        binds[quorum.QEMU] = str(wrapper)
    if Path("/usr/bin/systemctl").exists():
        binds["/usr/bin/systemctl"] = str(host.init_directory / "bin" / "systemctl")
    spec = BootSpec(
        name=host.name,
        network_namespace=str(NAMESPACE_DIRECTORY / host.namespace),
        cgroup_directories={name: str(path) for name, path in cgroups.directories(host.cgroup).items()},
        root=str(host.directory / "root"),
        binds=binds,
        smbios_uuid=identity_of(host)["host_uuid"],
        agent_command=agent_command,
        process_id_file=str(host.directory / "init.pid"),
    )
    path = host.directory / "boot.json"
    write_atomically(path, json.dumps(asdict(spec), indent=1) + "\n")
    return path
