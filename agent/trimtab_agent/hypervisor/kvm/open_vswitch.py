"""Open vSwitch bridges of the operator's, and the one access port by which a network's guests are on each.

    br0 (Open vSwitch) ── eth1 (tagged frames) ;  access port tw-<hash>, tag 20 ══ tv-<hash> ─▶ tt-<hash> ◀── guests, untagged

Guests are not ports of Open vSwitch itself: nftables never sees what its user-space datapath moves, and its own flows would be
written into a table that is the operator's. On a bridge of ours a guest's packets are judged as on every other one, and its hardware
is the same whichever switch a host has, so that it migrates between hosts of both kinds. The operator's bridge gets one port for each
network, which goes with it.
"""

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab_agent.hypervisor.kvm.identifiers import check_interface, check_range
from trimtab_protos.errors import Conflict, Unavailable

ACCESS_PREFIX = "tw-"
OWNER = "trimtab-owner"
"""In `external_ids` of a port that is made for one vm: which."""
_DEVICE_PREFIX, _BRIDGE_PREFIX = "tv-", "tt-"
_DATABASE = Path("/run/openvswitch/db.sock")
_ANSWER_WITHIN_S = 5
_GUEST_PREFIXES = ("tn-", "vnet", "tap", "macvtap")
_LINK_TYPES = frozenset({"", "system", "dpdk"})
_READ = (
    ("--columns=name,ports,datapath_type", "list", "Bridge"),
    ("--columns=_uuid,name,tag,trunks,interfaces", "list", "Port"),
    ("--columns=_uuid,name,type", "list", "Interface"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    name: str
    tag: int | None = None
    """Access VLAN; None: a trunk."""
    trunks: tuple[int, ...] = ()
    """Of a trunk: what it carries; empty: all."""
    interfaces: tuple[str, ...] = ()
    """More than one of a bond."""
    is_virtual: bool = False
    """A device of the bridge's own, a patch or a tunnel: no link of the host's."""

    def carries(self, vlan: int) -> bool:
        return self.tag == vlan if self.tag is not None else not self.trunks or vlan in self.trunks


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """A bridge of Open vSwitch's."""

    name: str
    is_user_space: bool
    """Its datapath is `netdev`, which takes frames as the kernel holds them: without checksums that hardware would have added."""
    ports: tuple[Port, ...] = ()
    """Without guests' own, ours and the bridge's own device."""

    @property
    def links(self) -> tuple[str, ...]:
        """Names of the devices by which it reaches others."""
        return tuple(sorted(name for port in self.ports if not port.is_virtual for name in port.interfaces))

    def refuse_unreachable(self, network: str, vlan: int) -> None:
        """Raise Conflict where frames of the VLAN would end at this host. A bridge without links reaches what is inside it only."""
        trunks = [port for port in self.ports if not port.is_virtual]
        if not trunks or any(port.carries(vlan) for port in trunks):
            return
        told = ", ".join(f"{port.name} {f'tag {port.tag}' if port.tag is not None else _listed(port.trunks)}" for port in trunks)
        wide = next((port.name for port in trunks if port.tag is None), "")
        cure = (
            f"`ovs-vsctl add port {wide} trunks {vlan}`"
            if wide
            else f"a port that is a trunk, `ovs-vsctl clear port {trunks[0].name} tag`,"
        )
        raise Conflict(
            "vlan-unreachable",
            f"network {network}: no port of bridge {self.name} carries VLAN {vlan} ({told}); {cure} on this host lets it through",
            bridge=self.name,
            vlan=vlan,
        )


def is_present() -> bool:
    return _DATABASE.exists() and shutil.which("ovs-vsctl") is not None


def find(bridge: str) -> Switch | None:
    """Return the bridge of that name where Open vSwitch runs here and has it."""
    return next((each for each in read() if each.name == bridge), None)


def settings() -> dict[str, str]:
    """Return the `external_ids` of this host's Open vSwitch, OVN's settings among them; none where it does not run."""
    if not is_present():
        return {}
    (row,) = _rows(_vsctl(["--format=json", "--columns=external_ids", "list", "Open_vSwitch"]))
    return dict(row["external_ids"])


def change(words: Sequence[str]) -> None:
    """Carry out one `ovs-vsctl`. Unavailable where Open vSwitch does not do it."""
    _vsctl(words)


def own_bridges_of(owner: str) -> tuple[str, ...]:
    """Return our bridges whose ports were made for this owner."""
    if not is_present():
        return ()
    found = _rows(_vsctl(["--format=json", "--columns=name", "find", "Interface", f"external_ids:{OWNER}={owner}"]))
    return tuple(sorted(_BRIDGE_PREFIX + str(row["name"]).removeprefix(ACCESS_PREFIX) for row in found))


def read() -> tuple[Switch, ...]:
    """Return every bridge, in order of name; none where Open vSwitch does not run. Unavailable: it does not answer."""
    if not is_present():
        return ()
    words = ["--format=json", *(word for part in _READ for word in ("--", *part))]
    return parse_switches(_vsctl(words))


def parse_switches(text: str) -> tuple[Switch, ...]:
    """Return the bridges that ovs-vsctl's three tables tell of: one JSON document a line."""
    bridges, ports, interfaces = (_rows(line) for line in text.splitlines() if line.strip())
    types = {str(each["_uuid"]): (str(each["name"]), str(each["type"])) for each in interfaces}
    by_id = {str(each["_uuid"]): _port(each, types) for each in ports}
    found = []
    for bridge in bridges:
        name = str(bridge["name"])
        own = sorted((by_id[str(each)] for each in _many(bridge["ports"])), key=lambda port: port.name)
        found.append(
            Switch(
                name=name,
                is_user_space=bridge["datapath_type"] == "netdev",
                ports=tuple(
                    port for port in own if port.name != name and not port.name.startswith((ACCESS_PREFIX, *_GUEST_PREFIXES))
                ),
            )
        )
    return tuple(sorted(found, key=lambda switch: switch.name))


def mtu_of(switch: Switch, sys_net: Path) -> int:
    """Return the largest packet that all of its links take; that of the bridge's own device where there is none."""
    sizes = [size for name in switch.links if (size := _mtu(sys_net / name))]
    return min(sizes, default=_mtu(sys_net / switch.name))


def device_of(own_bridge: str) -> str:
    """Return the name of the device that ties our bridge to the operator's: as a VLAN device is called on a Linux bridge."""
    return _DEVICE_PREFIX + own_bridge.removeprefix(_BRIDGE_PREFIX)


def access_port_of(own_bridge: str) -> str:
    """Return the name of the port on the operator's bridge."""
    return ACCESS_PREFIX + own_bridge.removeprefix(_BRIDGE_PREFIX)


def access(own_bridge: str, vlan: int) -> list[str]:
    """Return what makes the port one of that VLAN, as ovs-vsctl's words."""
    return ["set", "Port", access_port_of(own_bridge), f"tag={check_range(vlan, 'vlan', low=1, high=4094)}"]


def making(own_bridge: str, switch: Switch, settings: Sequence[str], *, mtu: int, link_mtu: int) -> list[list[str]]:
    """Return the commands that make our bridge and its port on the other, in order; `settings` are of that port. `link_mtu` is not
    smaller than what the operator's links take: Open vSwitch lowers its bridge's own device to the smallest of its ports."""
    own, device, port = check_interface(own_bridge, "bridge"), device_of(own_bridge), access_port_of(own_bridge)
    size = str(link_mtu)
    commands = [
        ["ip", "link", "add", "name", own, "mtu", str(mtu), "type", "bridge", "stp_state", "0", "forward_delay", "0"],
        ["ip", "link", "add", "name", device, "mtu", size, "type", "veth", "peer", "name", port, "mtu", size],
    ]
    if switch.is_user_space:
        commands.append(["ethtool", "-K", device, "tx", "off"])
    return [
        *commands,
        ["ip", "link", "set", "dev", device, "master", own, "up"],
        ["ip", "link", "set", "dev", own, "up"],
        ["ip", "link", "set", "dev", port, "up"],
        ["ovs-vsctl", _timeout(), "--may-exist", "add-port", switch.name, port, "--", *settings],
    ]


def ensure(name: str, own_bridge: str, switch: Switch, settings: Sequence[str], *, mtu: int, sys_net: Path) -> None:
    """Make what is missing. Conflict (`switch-port-refused`) says why this host cannot; what was not there before does not stay."""
    made = {own_bridge: (sys_net / own_bridge).exists(), device_of(own_bridge): (sys_net / device_of(own_bridge)).exists()}
    link_mtu = max(mtu, mtu_of(switch, sys_net))
    for command in making(own_bridge, switch, settings, mtu=mtu, link_mtu=link_mtu):
        if command[:3] == ["ip", "link", "add"] and made[command[4]]:
            continue
        problem = _try(command)
        if problem:
            if not made[own_bridge]:
                # Guests may be on one that was there: they keep what they have while Open vSwitch restarts.
                remove(own_bridge, sys_net=sys_net)
            raise Conflict(
                "switch-port-refused",
                f"network {name}: this host makes no port on Open vSwitch bridge {switch.name}: {problem}",
                bridge=switch.name,
            )


def remove(own_bridge: str, *, sys_net: Path) -> None:
    """Take the access port and both devices away; absent ones are fine."""
    port = access_port_of(own_bridge)
    if is_present():
        _vsctl(["--if-exists", "del-port", port])
    for device in (own_bridge, device_of(own_bridge)):
        if (sys_net / device).exists():
            _try(["ip", "link", "del", "dev", device])


def _port(row: dict[str, Any], types: dict[str, tuple[str, str]]) -> Port:
    behind = [types[str(each)] for each in _many(row["interfaces"])]
    tags = _many(row["tag"])
    return Port(
        name=str(row["name"]),
        tag=int(tags[0]) if tags else None,
        trunks=tuple(sorted(int(each) for each in _many(row["trunks"]))),
        interfaces=tuple(name for name, _kind in behind),
        is_virtual=all(kind not in _LINK_TYPES for _name, kind in behind),
    )


def _rows(line: str) -> list[dict[str, Any]]:
    document = json.loads(line)
    return [
        {heading: _plain(value) for heading, value in zip(document["headings"], row, strict=True)} for row in document["data"]
    ]


def _plain(value: Any) -> Any:
    """Return a value of OVSDB as Python has it: ["uuid", x] is x, ["set", [...]] a list; a set of one is the element itself."""
    match value:
        case ["uuid", identifier]:
            return identifier
        case ["set", list(elements)]:
            return [_plain(each) for each in elements]
        case ["map", list(pairs)]:
            return {str(name): _plain(each) for name, each in pairs}
    return value


def _many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _listed(vlans: Sequence[int]) -> str:
    return "trunks " + ",".join(str(vlan) for vlan in vlans)


def _mtu(link: Path) -> int:
    try:
        return int((link / "mtu").read_text())
    except (OSError, ValueError):
        return 0


def _timeout() -> str:
    return f"--timeout={_ANSWER_WITHIN_S}"


def _vsctl(arguments: Sequence[str]) -> str:
    done = _run(["ovs-vsctl", _timeout(), *arguments])
    if done.returncode:
        raise Unavailable(
            "open-vswitch-silent", f"Open vSwitch of this host does not answer: {' '.join(done.stderr.split())[:200]}"
        )
    return done.stdout


def _try(command: Sequence[str]) -> str:
    """Run a command and return what it complained of, '' where it did it."""
    done = _run(command)
    return "" if done.returncode == 0 else " ".join(done.stderr.split())[:200] or f"{command[0]} ended with {done.returncode}"


def _run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_WITHIN_S + 1, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
