"""Cards on overlay networks: ports of OVN's integration bridge, one for each card.

    guest ─▶ tt-<hash of the card> ◀── tv-<hash> ══ tw-<hash>, iface-id = the card ─ br-int (Open vSwitch) ── Geneve ── other hosts

OVN knows a card by its port's iface-id and the switches, addresses and names by its northbound database, which the controller keeps.
A bridge of ours lies between, as it does for a VLAN: packet rules judge the guest there, and what it has open goes on when it moves.
During a live migration both hosts have such a port; the controller says in OVN which one is served.
"""

import json
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path

import structlog

from trimtab_agent.hypervisor.kvm import open_vswitch
from trimtab_agent.hypervisor.kvm.identifiers import check_interface
from trimtab_protos.errors import Conflict, Unavailable
from trimtab_protos.messages import NetworkSpec, NicSpec

log = structlog.get_logger(__name__)

INTEGRATION_BRIDGE = "br-int"
TUNNEL_OVERHEAD = 58
"""Bytes of Geneve with OVN's option, UDP, IPv4 and Ethernet in front of a guest's packet."""
_ANSWER_WITHIN_S = 5.0
_MAPPINGS_KEY = "ovn-bridge-mappings"
_MAPPINGS = threading.Lock()
"""Held from reading OVN's mappings of this host until they are written: two networks may come at once."""


def chassis() -> str:
    """Return OVN's name of this host; '' where none of it is set up."""
    try:
        told = open_vswitch.settings()
    except Unavailable as error:
        log.warning("OVN's settings cannot be read", error=error.message)
        return ""
    return told.get("system-id", "") if told.get("ovn-remote") else ""


def check(network: NetworkSpec, *, sys_net: Path) -> None:
    """Make sure that this host can carry an overlay network. Conflict says what is missing."""
    told = _require_ovn(network.name)
    mtu = _mtu_of_address(told["ovn-encap-ip"], sys_net)
    if mtu and mtu < network.mtu + TUNNEL_OVERHEAD:
        raise Conflict(
            "overlay-mtu-too-small",
            f"network {network.name} wants MTU {network.mtu}; the link of {told['ovn-encap-ip']} has {mtu}, "
            f"which leaves {mtu - TUNNEL_OVERHEAD} inside of a tunnel",
            mtu=mtu,
        )


def _require_ovn(name: str) -> Mapping[str, str]:
    """Return OVN's settings of this host. Conflict where it is not set up, or not connected."""
    told = open_vswitch.settings()
    missing = [name for name in ("system-id", "ovn-remote", "ovn-encap-ip", "ovn-encap-type") if not told.get(name)]
    if missing:
        raise Conflict(
            "overlay-not-set-up",
            f"network {name}: Open vSwitch of this host lacks {', '.join(missing)} for OVN: "
            f"`ovs-vsctl set open . external_ids:{missing[0]}=...`, and start ovn-controller",
        )
    problem = _connection_problem()
    if problem:
        raise Conflict(
            "overlay-not-connected",
            f"network {name}: ovn-controller of this host has no southbound database at {told['ovn-remote']}: {problem}",
        )
    return told


def ensure_way_out(network: NetworkSpec, *, sys_net: Path) -> None:
    """Let OVN get to the operator's bridge under the network's id, tagged or not. Conflict says why it cannot."""
    _require_ovn(network.name)
    bridge = check_interface(network.bridge, "bridge")
    switch = open_vswitch.find(bridge)
    if switch is None:
        raise Conflict(
            "bridge-missing",
            f"network {network.name}: this host has no Open vSwitch bridge {bridge}, which the way out of overlay networks takes",
            bridge=bridge,
        )
    if network.vlan:
        switch.refuse_unreachable(network.name, network.vlan)
    mtu = open_vswitch.mtu_of(switch, sys_net)
    if mtu < network.mtu:
        message = f"network {network.name} wants MTU {network.mtu}; bridge {bridge} has {mtu}"
        raise Conflict("bridge-mtu-too-small", message, bridge=bridge, mtu=mtu)
    _change_mappings({network.network_id: bridge})


def remove_way_out(network_id: str) -> None:
    """Take a network's way out away; nothing where there is none."""
    _change_mappings({network_id: ""})


def with_mappings(text: str, changes: Mapping[str, str]) -> str:
    """Return OVN's `name:bridge,...` with these among them, '' for one that goes; those of others stay as they are."""
    pairs = [pair for pair in text.split(",") if pair and pair.partition(":")[0] not in changes]
    return ",".join([*pairs, *(f"{name}:{bridge}" for name, bridge in sorted(changes.items()) if bridge)])


def _change_mappings(changes: Mapping[str, str]) -> None:
    with _MAPPINGS:
        told = open_vswitch.settings().get(_MAPPINGS_KEY, "")
        wanted = with_mappings(told, changes)
        if wanted == told:
            return
        if wanted:
            open_vswitch.change(["set", "Open_vSwitch", ".", f'external_ids:{_MAPPINGS_KEY}="{wanted}"'])
        else:
            open_vswitch.change(["remove", "Open_vSwitch", ".", "external_ids", _MAPPINGS_KEY])


def ensure_ports(vm_id: str, cards: Mapping[str, tuple[NicSpec, NetworkSpec]], *, sys_net: Path) -> None:
    """Make the ports of a vm's cards, by our bridge of each; those of cards that it no longer has go."""
    for own in set(open_vswitch.own_bridges_of(vm_id)) - set(cards):
        open_vswitch.remove(own, sys_net=sys_net)
    if not cards:
        return
    switch = open_vswitch.find(INTEGRATION_BRIDGE)
    if switch is None:
        raise Conflict("overlay-not-connected", f"this host has no {INTEGRATION_BRIDGE}: ovn-controller does not run")
    for own, (nic, network) in cards.items():
        port = open_vswitch.access_port_of(own)
        words = ["set", "Interface", port, f"external_ids:iface-id={nic.nic_id}", f"external_ids:{open_vswitch.OWNER}={vm_id}"]
        open_vswitch.ensure(network.name, own, switch, words, mtu=network.mtu, sys_net=sys_net)


def drop_ports(vm_id: str, *, sys_net: Path = Path("/sys/class/net")) -> None:
    """Take the ports of a vm that is not on this host any more away."""
    for own in open_vswitch.own_bridges_of(vm_id):
        open_vswitch.remove(own, sys_net=sys_net)


def _connection_problem() -> str:
    command = ["ovn-appctl", "-t", "ovn-controller", "connection-status"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_WITHIN_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = " ".join((done.stdout if done.returncode == 0 else done.stderr).split())[:200]
    return "" if said == "connected" else said or "it does not answer"


def _mtu_of_address(address: str, sys_net: Path) -> int:
    """Return the MTU of the link that has the address; 0 where none has."""
    done = subprocess.run(["ip", "-json", "address"], capture_output=True, text=True, timeout=_ANSWER_WITHIN_S, check=False)
    for link in json.loads(done.stdout or "[]"):
        if any(one.get("local") == address for one in link.get("addr_info", ())):
            return int((sys_net / str(link["ifname"]) / "mtu").read_text())
    return 0
