"""Open vSwitch on lab hosts: in user space (datapath `netdev`), since the kernel need not have its module.

    fabric's br-guest ── eth1 ─ br-guest (Linux) ═ ovs1 ── ovs0 ─ br0 (Open vSwitch, its own address in the guests' network)

Every host has daemons and a database of its own; both come back with it after a crash, the links by calling `install` again. The
fabric's Linux bridges pass tagged frames on as they are.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from trimtab_lab.commands import batch_ip, wait_until
from trimtab_lab.errors import LabError
from trimtab_lab.networks import GUEST_LINK_SUFFIX
from trimtab_lab.specs import GUEST_BRIDGE, HostSpec

BRIDGE = "br0"
UPLINK = "ovs0"
_INNER_END = "ovs1"
DATABASE = Path("/etc/openvswitch/conf.db")
SOCKET = Path("/run/openvswitch/db.sock")
_SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"

Inside = Callable[[Sequence[str]], object]


def database_command() -> list[str]:
    SOCKET.parent.mkdir(exist_ok=True)
    return ["/usr/sbin/ovsdb-server", str(DATABASE), f"--remote=punix:{SOCKET}", "--pidfile", "--no-chdir"]


def switch_command() -> list[str]:
    return ["/usr/sbin/ovs-vswitchd", f"unix:{SOCKET}", "--pidfile", "--no-chdir"]


def address_of(host: HostSpec) -> str:
    """Where tunnels of the host's end: an address of br0's own in the guests' network."""
    return f"{host.lab.guest_prefix}.{200 + host.number}"


def install(host: HostSpec, inside: Inside, *, mtu: int) -> None:
    """Start Open vSwitch on a host that is up, with bridge br0 in the guests' network. Idempotent; every link takes `mtu`."""
    if not Path("/usr/sbin/ovs-vswitchd").exists():
        raise LabError("Open vSwitch is not installed; `ops/bootstrap.sh` brings it")
    inside(["sh", "-ec", f"mkdir -p {DATABASE.parent}; [ -e {DATABASE} ] || ovsdb-tool create {DATABASE} {_SCHEMA}"])
    inside(["systemctl", "start", "ovsdb-server", "ovs-vswitchd"])
    database_file = host.path_on_machine(str(DATABASE))
    if not wait_until(lambda: _answers(inside), timeout_s=20, interval_s=0.1):
        raise LabError(f"Open vSwitch of {host.name} does not answer; its database is {database_file}")
    batch_ip([f"link set {host.name}{GUEST_LINK_SUFFIX} mtu {mtu}"], namespace=host.lab.fabric_namespace)
    inside(["sh", "-ec", _LINKS.format(mtu=mtu, bridge=GUEST_BRIDGE, uplink=UPLINK, inner=_INNER_END)])
    vsctl = ["ovs-vsctl", "--timeout=20"]
    inside([*vsctl, "--may-exist", "add-br", BRIDGE, "--", "set", "Bridge", BRIDGE, "datapath_type=netdev"])
    inside([*vsctl, "--may-exist", "add-port", BRIDGE, UPLINK])
    inside(["ip", "address", "replace", f"{address_of(host)}/24", "dev", BRIDGE])
    inside(["ip", "link", "set", BRIDGE, "up"])


_LINKS = """
ip link set eth1 mtu {mtu}
[ -e /sys/class/net/{uplink} ] || ip link add {uplink} mtu {mtu} type veth peer name {inner} mtu {mtu}
ip link set {bridge} mtu {mtu}
ethtool -K {uplink} tx off >/dev/null
ethtool -K {inner} tx off >/dev/null
ip link set {inner} master {bridge} up
ip link set {uplink} up
"""


def _answers(inside: Inside) -> bool:
    try:
        inside(["ovs-vsctl", "--timeout=2", "--no-wait", "init"])
        inside(["ovs-appctl", "-t", "ovs-vswitchd", "version"])
    except LabError:
        return False
    return True
