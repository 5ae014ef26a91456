"""VLANs on an operator's bridge: a VLAN device on the bridge itself, and a bridge of ours over it that guests are ports of.

    br0 ── eth0 (tagged frames) ;  tv-<hash> = VLAN 20 of br0 ──▶ tt-<hash> ◀── guests, untagged

libvirt 9 can hand a tag to Open vSwitch only; and on a bridge of its own a guest's packets are judged as on every other one. The
operator's bridge is not changed: it gets a device on top, which goes with the network.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from trimtab_agent.hypervisor.kvm.identifiers import check_interface, check_range
from trimtab_protos.errors import Conflict

IP_TIMEOUT_S = 5.0
_DEVICE_PREFIX, _BRIDGE_PREFIX = "tv-", "tt-"


def device_of(own_bridge: str) -> str:
    """Return the name of the VLAN device under our bridge."""
    return _DEVICE_PREFIX + own_bridge.removeprefix(_BRIDGE_PREFIX)


def making(own_bridge: str, *, base: str, vlan: int, mtu: int) -> list[list[str]]:
    """Return the arguments of `ip` that make the two devices, in order."""
    device = device_of(check_interface(own_bridge, "bridge"))
    tag = str(check_range(vlan, "vlan", low=1, high=4094))
    return [
        ["link", "add", "link", check_interface(base, "bridge"), "name", device, "mtu", str(mtu), "type", "vlan", "id", tag],
        ["link", "add", "name", own_bridge, "mtu", str(mtu), "type", "bridge", "stp_state", "0", "forward_delay", "0"],
        ["link", "set", "dev", device, "master", own_bridge, "up"],
        ["link", "set", "dev", own_bridge, "up"],
    ]


def ensure(name: str, own_bridge: str, *, base: str, vlan: int, mtu: int, sys_net: Path) -> None:
    """Make what is missing. Conflict (`vlan-not-supported`) says why this host cannot; then nothing stays behind."""
    commands = making(own_bridge, base=base, vlan=vlan, mtu=mtu)
    for device, command in zip((device_of(own_bridge), own_bridge), commands[:2], strict=True):
        if (sys_net / device).exists():
            continue
        problem = _ip(command)
        if problem:
            remove(own_bridge, sys_net=sys_net)
            raise Conflict(
                "vlan-not-supported",
                f"network {name}: this host makes no VLAN {vlan} on bridge {base} ({problem}); map a bridge per VLAN: "
                f"`trimtab network create --bridge-on HOST=BRIDGE`",
                bridge=base,
            )
    for command in commands[2:]:
        problem = _ip(command)
        if problem:
            raise Conflict("vlan-not-supported", f"network {name}: VLAN {vlan} on bridge {base}: {problem}", bridge=base)


def remove(own_bridge: str, *, sys_net: Path) -> None:
    """Take both devices away; absent ones are fine."""
    for device in (own_bridge, device_of(own_bridge)):
        if (sys_net / device).exists():
            _ip(["link", "del", "dev", device])


def _ip(arguments: Sequence[str]) -> str:
    """Run `ip` and return what it complained of, '' where it did it."""
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=IP_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else " ".join(done.stderr.split())[:200] or f"ip ended with {done.returncode}"
