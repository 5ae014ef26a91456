"""What a lab is: its names, addresses and paths. Pure: nothing here touches the machine.

Names on the machine derive from a tag of six characters (three of the lab's name, three of a hash of name and state
directory), since a network interface's name has room for 15. The hosts of a lab sit in 10.X.0.0/24 and its guests in
10.X.1.0/24, with X between 77 and 109 chosen when the lab is first brought up.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab_lab.errors import LabError

DEFAULT_STATE_ROOT = Path("/var/lib/trimtab-lab")
FIRST_NETWORK = 77
LAST_NETWORK = 109
MAX_HOSTS = 200
CTL = "ctl"
"""The member of a lab in which the control plane runs: a network namespace, not a host."""

STORAGE_GROUP = "ctl"
PLANE_GROUP = "plane"
"""Control groups of what runs outside hosts: storage servers, and the control plane, which can be killed or frozen alone."""

SHARED_DIRECTORY = "/srv/trimtab-shared"
LOCAL_DIRECTORY = "/srv/trimtab-local"
GUEST_BRIDGE = "br-guest"


def default_state_directory(name: str) -> Path:
    chosen = os.environ.get("TRIMTAB_LAB_DIR")
    return Path(chosen) if chosen else DEFAULT_STATE_ROOT / name


def validate_name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,39}", name):
        raise LabError(f"lab name {name!r}: 1 to 40 of a-z, 0-9 and '-', a letter first, as in 'demo-2'")
    return name


@dataclass(frozen=True, slots=True)
class LabSpec:
    """One lab as recorded in its state directory."""

    name: str
    state_directory: Path
    network: int
    """Second octet of the lab's addresses."""
    host_count: int
    has_lock_free_disk: bool = False
    """See quorum.py; decided at the first `up`."""

    @property
    def tag(self) -> str:
        digest = hashlib.sha256(f"{self.name}\0{self.state_directory}".encode()).hexdigest()
        return re.sub("[^a-z0-9]", "", self.name)[:3] + digest[:3]

    @property
    def prefix(self) -> str:
        """Start of every name the lab makes on the machine (namespaces, cgroups), and the name of its link."""
        return f"tl-{self.tag}"

    @property
    def machine_link(self) -> str:
        return self.prefix

    @property
    def fabric_namespace(self) -> str:
        return f"{self.prefix}-fabric"

    @property
    def machine_address(self) -> str:
        return f"10.{self.network}.0.1"

    @property
    def ctl_address(self) -> str:
        return f"10.{self.network}.0.2"

    @property
    def ctl_guest_address(self) -> str:
        """The control plane's foot in the guests' network, from which tests reach guests."""
        return f"{self.guest_prefix}.2"

    @property
    def subnet(self) -> str:
        return f"10.{self.network}.0.0/24"

    @property
    def guest_prefix(self) -> str:
        """What the guests' addresses start with, without the last dot."""
        return f"10.{self.network}.1"

    @property
    def guest_subnet(self) -> str:
        return f"{self.guest_prefix}.0/24"

    @property
    def controller_url(self) -> str:
        return f"https://{self.ctl_address}:8443"

    @property
    def shared_mount(self) -> Path:
        return self.state_directory / "shared"

    @property
    def quorum_log(self) -> Path:
        """Every write to the guests' lock-free disks, in order."""
        return self.state_directory / "log" / "quorum.jsonl"

    @property
    def log_directory(self) -> Path:
        return self.state_directory / "log"

    @property
    def controller_directory(self) -> Path:
        return self.state_directory / "controller"

    def namespace(self, member: str) -> str:
        return f"{self.prefix}-{member}"

    def cgroup(self, member: str) -> str:
        return f"{self.prefix}-{member}"

    def hosts(self) -> tuple["HostSpec", ...]:
        return tuple(HostSpec(lab=self, number=number) for number in range(1, self.host_count + 1))

    def host(self, name: str) -> "HostSpec":
        for host in self.hosts():
            if host.name == name:
                return host
        raise LabError(f"lab {self.name} has no host {name!r}; it has node1 to node{self.host_count}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "LabSpec":
        fields = json.loads(text)
        return cls(
            name=fields["name"],
            state_directory=Path(fields["state_directory"]),
            network=int(fields["network"]),
            host_count=int(fields["host_count"]),
            has_lock_free_disk=bool(fields.get("has_lock_free_disk", False)),
        )


@dataclass(frozen=True, slots=True)
class HostSpec:
    """One host of a lab."""

    lab: LabSpec
    number: int

    @property
    def name(self) -> str:
        return f"node{self.number}"

    @property
    def address(self) -> str:
        return f"10.{self.lab.network}.0.{10 + self.number}"

    @property
    def migration_address(self) -> str:
        """Where guests arrive: on the same cable, in a network of its own."""
        return f"10.{self.lab.network}.2.{10 + self.number}"

    @property
    def namespace(self) -> str:
        return self.lab.namespace(self.name)

    @property
    def cgroup(self) -> str:
        return self.lab.cgroup(self.name)

    @property
    def directory(self) -> Path:
        """What the host keeps over a crash: its /etc, /var/lib/libvirt, /var/lib/trimtab, logs and local storage."""
        return self.lab.state_directory / self.name

    @property
    def init_directory(self) -> Path:
        """Seen inside the host as /run/trimtab-lab: the init's socket, its record of services, the systemctl."""
        return self.directory / "init"

    def path_on_machine(self, inside: str) -> Path:
        """Where a persistent directory of the host (`/etc`, `/var/lib/libvirt`, ...) lies on the machine."""
        return self.directory / inside.lstrip("/")

    def hardware_address(self, link: int) -> str:
        """A stable MAC: peers keep stale neighbour entries for a host that comes back with another one."""
        return f"02:54:{self.lab.network:02x}:{link:02x}:{self.number >> 8:02x}:{self.number & 255:02x}"
