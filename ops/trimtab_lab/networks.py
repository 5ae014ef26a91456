"""The lab's networks: two bridges in a namespace of their own (the fabric), one namespace per host, one for ctl.

The bridges are kept off the machine on purpose: there, a firewall that other software set up (FORWARD DROP with bridge
netfilter, as container engines do) would silently eat the traffic between hosts. The machine gets one link, with
address .1, into the lab bridge.

    machine  tl-TAG(.1) ── fabric: br-lab ──┬─ ctl   eth0(.2)            fabric: br-guest ──┬─ ctl   eth1(10.X.1.2)
                                            ├─ node1 eth0(.11)                              ├─ node1 eth1 ─ br-guest
                                            └─ node2 eth0(.12)                              └─ node2 eth1 ─ br-guest
"""

import contextlib
import ipaddress
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from trimtab_lab.commands import batch_ip, mount_points, run, wait_until
from trimtab_lab.errors import LabError
from trimtab_lab.specs import CTL, FIRST_NETWORK, GUEST_BRIDGE, LAST_NETWORK, HostSpec, LabSpec

NAMESPACE_DIRECTORY = Path("/run/netns")
LAB_BRIDGE = "br-lab"
GUEST_LINK_SUFFIX = "g"
"""A member's port on the fabric's guest bridge is called `node1g`, on its lab bridge `node1`."""


def ports_of(member: str, network: str) -> tuple[str, ...]:
    """The fabric's ports of a member; `network` is `control`, `guest` or `all`."""
    match network:
        case "control":
            return (member,)
        case "guest":
            return (member + GUEST_LINK_SUFFIX,)
        case "all":
            return (member, member + GUEST_LINK_SUFFIX)
        case _:
            raise LabError(f"network {network!r}: one of control, guest, all")


@contextlib.contextmanager
def allocation_lock(timeout_s: float = 60.0) -> Iterator[None]:
    """Held by one lab at a time while it chooses addresses or touches /run/netns itself.

    An abstract socket rather than a file: it vanishes with its holder and leaves nothing on the machine.
    """
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    deadline_s = time.monotonic() + timeout_s
    try:
        while True:
            try:
                lock.bind("\0trimtab-lab-allocation")
                break
            except OSError as error:
                if time.monotonic() > deadline_s:
                    raise LabError(f"another lab has held the address lock for {timeout_s:g} s") from error
                time.sleep(0.05)
        yield
    finally:
        lock.close()


def addresses_in_use() -> list[ipaddress.IPv4Network]:
    """Networks that the machine has an address in or a route to, default routes left out."""
    found = []
    for address in json.loads(run(["ip", "-4", "-json", "address"]).stdout):
        for entry in address.get("addr_info", ()):
            found.append(ipaddress.IPv4Network(f"{entry['local']}/{entry['prefixlen']}", strict=False))
    for route in json.loads(run(["ip", "-4", "-json", "route", "show", "table", "all"]).stdout or "[]"):
        if route["dst"] != "default":
            found.append(ipaddress.IPv4Network(route["dst"], strict=False))
    return [network for network in found if network.prefixlen > 0]


def choose_network() -> int:
    """A second octet that nobody on the machine uses; call it and `build_fabric` under `allocation_lock`."""
    used = addresses_in_use()
    for octet in range(FIRST_NETWORK, LAST_NETWORK + 1):
        candidate = ipaddress.IPv4Network(f"10.{octet}.0.0/16")
        if not any(candidate.overlaps(network) for network in used):
            return octet
    raise LabError(f"no free network between 10.{FIRST_NETWORK}.0.0/16 and 10.{LAST_NETWORK}.0.0/16 on this machine")


def namespace_exists(namespace: str) -> bool:
    return (NAMESPACE_DIRECTORY / namespace).exists()


def machine_link_alias(link: str) -> str | None:
    """The owner written on a link of the machine, `None` where there is no such link."""
    file = Path("/sys/class/net") / link / "ifalias"
    return file.read_text().strip() if file.exists() else None


def owner_alias(lab: LabSpec) -> str:
    return f"trimtab-lab {lab.name} {lab.state_directory}"[:255]


def build_fabric(lab: LabSpec) -> None:
    """The bridges, the machine's link and the namespace of ctl; idempotent."""
    alias = machine_link_alias(lab.machine_link)
    if alias is not None and alias != owner_alias(lab):
        raise LabError(f"link {lab.machine_link} exists and belongs to {alias or 'somebody else'!r}; choose another name")
    if alias is not None and namespace_exists(lab.fabric_namespace) and namespace_exists(lab.namespace(CTL)):
        return
    remove_namespaces(lab, [lab.fabric_namespace, lab.namespace(CTL)])
    batch_ip([f"netns add {lab.fabric_namespace}", f"netns add {lab.namespace(CTL)}"])
    _quiet_ipv6(lab.fabric_namespace)
    _forward_unfiltered(lab.fabric_namespace)
    batch_ip(
        [
            "link set lo up",
            f"link add {LAB_BRIDGE} type bridge forward_delay 0 mcast_snooping 0",
            f"link add {GUEST_BRIDGE} type bridge forward_delay 0 mcast_snooping 0",
            f"link set {LAB_BRIDGE} up",
            f"link set {GUEST_BRIDGE} up",
        ],
        namespace=lab.fabric_namespace,
    )
    batch_ip([f"link add {lab.machine_link} type veth peer name machine netns {lab.fabric_namespace}"])
    Path(f"/sys/class/net/{lab.machine_link}/ifalias").write_text(owner_alias(lab))
    _plug(lab, "machine", LAB_BRIDGE)
    batch_ip(
        [
            f"address add {lab.machine_address}/24 dev {lab.machine_link}",
            f"link set {lab.machine_link} up",
        ]
    )
    _connect(lab, CTL, addresses=(f"02:54:{lab.network:02x}:00:ff:02", f"02:54:{lab.network:02x}:01:ff:02"))
    batch_ip(
        [
            f"address add {lab.ctl_address}/24 dev eth0",
            f"address add {lab.ctl_guest_address}/24 dev eth1",
        ],
        namespace=lab.namespace(CTL),
    )


def build_host(host: HostSpec) -> None:
    """A fresh namespace for one host, as after power on: what its last life left there is gone. Not idempotent."""
    remove_host(host)
    batch_ip([f"netns add {host.namespace}"])
    _quiet_ipv6(host.namespace)
    _connect(host.lab, host.name, addresses=(host.hardware_address(0), host.hardware_address(1)))
    batch_ip(
        [
            f"address add {host.address}/24 dev eth0",
            f"address add {host.migration_address}/24 dev eth0",
            f"link add {GUEST_BRIDGE} address {host.hardware_address(2)} type bridge forward_delay 0 mcast_snooping 0",
            f"link set eth1 master {GUEST_BRIDGE}",
            f"link set {GUEST_BRIDGE} up",
        ],
        namespace=host.namespace,
    )


def remove_host(host: HostSpec) -> None:
    """Pulls the host's cables and drops its namespace; idempotent."""
    unplug(host.lab, host.name)
    remove_namespaces(host.lab, [host.namespace])


def unplug(lab: LabSpec, member: str) -> None:
    """Removes the member's ports from the fabric at once; the member's end of the cable goes with them."""
    if namespace_exists(lab.fabric_namespace):
        for port in ports_of(member, "all"):
            run(["ip", "-n", lab.fabric_namespace, "link", "delete", port], check=False)


def set_ports(lab: LabSpec, member: str, *, network: str, is_up: bool) -> None:
    """`cut` and `heal`: the fabric's side goes down, so that the member sees its carrier lost as with a real cable."""
    state = "up" if is_up else "down"
    batch_ip([f"link set {port} {state}" for port in ports_of(member, network)], namespace=lab.fabric_namespace)


def cut_networks(lab: LabSpec, member: str) -> tuple[str, ...]:
    """Which of the member's networks are cut: of `control`, `guest`."""
    shown = run(["ip", "-n", lab.fabric_namespace, "-json", "link"], check=False)
    links = {link["ifname"]: link for link in json.loads(shown.stdout or "[]")}
    return tuple(
        network
        for network in ("control", "guest")
        for port in ports_of(member, network)
        if port in links and "UP" not in links[port]["flags"]
    )


def remove_namespaces(lab: LabSpec, namespaces: list[str]) -> None:
    """Drops namespaces of this lab; what still runs in one keeps it alive unseen, so kill first. Idempotent."""
    for namespace in namespaces:
        if not namespace.startswith(lab.prefix + "-"):
            raise LabError(f"namespace {namespace} is not of lab {lab.name}")
        if namespace_exists(namespace):
            run(["ip", "netns", "delete", namespace])


def remove_fabric(lab: LabSpec) -> None:
    """Removes everything the lab put on the machine's network; idempotent."""
    if machine_link_alias(lab.machine_link) == owner_alias(lab):
        run(["ip", "link", "delete", lab.machine_link], check=False)
    remaining = [each.name for each in namespaces_of(lab)]
    remove_namespaces(lab, remaining)
    if not wait_until(lambda: machine_link_alias(lab.machine_link) is None, timeout_s=10):
        raise LabError(f"link {lab.machine_link} does not go away")
    with allocation_lock():
        _remove_empty_namespace_directory()


def namespaces_of(lab: LabSpec) -> list[Path]:
    if not NAMESPACE_DIRECTORY.is_dir():
        return []
    return sorted(each for each in NAMESPACE_DIRECTORY.iterdir() if each.name.startswith(lab.prefix + "-"))


def _remove_empty_namespace_directory() -> None:
    """iproute2 leaves /run/netns mounted on itself after the last namespace; it makes it anew when it needs it."""
    if NAMESPACE_DIRECTORY.is_dir() and not any(NAMESPACE_DIRECTORY.iterdir()):
        while NAMESPACE_DIRECTORY in mount_points():
            if run(["umount", str(NAMESPACE_DIRECTORY)], check=False).returncode != 0:
                return
        with contextlib.suppress(OSError):
            NAMESPACE_DIRECTORY.rmdir()


def _connect(lab: LabSpec, member: str, *, addresses: tuple[str, str]) -> None:
    """Two cables from the member's namespace into the fabric: eth0 to the lab bridge, eth1 to the guest bridge."""
    namespace = lab.namespace(member)
    control, guest = ports_of(member, "all")
    batch_ip(
        [
            f"link add {control} netns {lab.fabric_namespace} type veth peer name eth0 address {addresses[0]} netns {namespace}",
            f"link add {guest} netns {lab.fabric_namespace} type veth peer name eth1 address {addresses[1]} netns {namespace}",
        ]
    )
    _plug(lab, control, LAB_BRIDGE)
    _plug(lab, guest, GUEST_BRIDGE)
    batch_ip(["link set lo up", "link set eth0 up", "link set eth1 up"], namespace=namespace)


def _plug(lab: LabSpec, port: str, bridge: str) -> None:
    batch_ip([f"link set {port} master {bridge}", f"link set {port} up"], namespace=lab.fabric_namespace)


def _quiet_ipv6(namespace: str) -> None:
    """Without this every new link sends router solicitations and does duplicate detection over the lab's bridges."""
    _set_in_namespace(namespace, "net/ipv6/conf/default/disable_ipv6", "1")


def _forward_unfiltered(namespace: str) -> None:
    for family in ("iptables", "ip6tables", "arptables"):
        _set_in_namespace(namespace, f"net/bridge/bridge-nf-call-{family}", "0")


def _set_in_namespace(namespace: str, setting: str, value: str) -> None:
    """Network settings of /proc/sys belong to the namespace of whoever writes; one that the kernel lacks is skipped."""
    script = '[ ! -e "/proc/sys/$1" ] || printf %s "$2" > "/proc/sys/$1"'
    run(["ip", "netns", "exec", namespace, "sh", "-c", script, "sh", setting, value])
