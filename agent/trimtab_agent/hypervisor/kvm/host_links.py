"""The host's bridges, from sysfs and from Open vSwitch. Guests' own ports are left out, so that a guest's start does not look like a
change of the host."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from trimtab_agent.hypervisor.kvm import open_vswitch
from trimtab_agent.hypervisor.kvm.networks import OWN_BRIDGE_PREFIX
from trimtab_agent.hypervisor.kvm.open_vswitch import Switch
from trimtab_agent.hypervisor.kvm.packet_rules import TAP_PREFIX
from trimtab_protos.errors import Unavailable
from trimtab_protos.network_messages import Bridge

log = structlog.get_logger(__name__)

GUEST_PORT_PREFIXES = (TAP_PREFIX, "vnet", "tap", "macvtap", "veth")
"""Of guests and of containers, which come and go: no way out of the host."""


def read_bridges(sys_net: Path = Path("/sys/class/net"), switches: Sequence[Switch] = ()) -> tuple[Bridge, ...]:
    """Return every bridge, in order of name. One without ports of the host's own counts as having carrier: it reaches what is inside."""
    linux = [_bridge(link) for link in sys_net.iterdir() if (link / "bridge").is_dir()]
    return tuple(sorted([*linux, *(_switch(each, sys_net) for each in switches)], key=lambda bridge: bridge.name))


def look_again(known: Sequence[Bridge], sys_net: Path = Path("/sys/class/net")) -> tuple[Bridge, ...]:
    """Return these bridges with the carrier that they have now, from sysfs alone: called at every heartbeat.

    Ports of Open vSwitch's are those that were read last. A bridge that is gone stays as it was: the next inventory tells. One whose
    links are gone with their devices has lost its carrier, and goes on naming them.
    """
    return tuple(_look_again(bridge, sys_net) for bridge in known)


def _look_again(bridge: Bridge, sys_net: Path) -> Bridge:
    if bridge.is_open_vswitch:
        carriers = [has_carrier(sys_net / name) for name in bridge.ports]
        return replace(bridge, has_carrier=any(carriers) or not carriers)
    try:
        now = _bridge(sys_net / bridge.name)
    except OSError:
        return bridge
    if have_vanished(bridge, now, sys_net):
        return replace(bridge, has_carrier=False)
    # Other changes are the inventory's to tell: ports come and go with containers.
    return bridge if now.has_carrier == bridge.has_carrier else now


def have_vanished(before: Bridge, now: Bridge, sys_net: Path) -> bool:
    """Tell whether a bridge lost its last links because the devices themselves are gone: a card that died, a driver that let go.

    A device that is still there and in the bridge no more was taken out of it by somebody.
    """
    return bool(before.ports) and not now.ports and not any((sys_net / name).exists() for name in before.ports)


def read_switches() -> tuple[Switch, ...]:
    """Return Open vSwitch's bridges; none where it does not answer, which its networks then say."""
    try:
        return open_vswitch.read()
    except Unavailable as error:
        log.warning("bridges of Open vSwitch cannot be read", error=error.message)
        return ()


def _switch(switch: Switch, sys_net: Path) -> Bridge:
    carriers = [has_carrier(sys_net / name) for name in switch.links]
    return Bridge(
        name=switch.name,
        mtu=open_vswitch.mtu_of(switch, sys_net),
        has_carrier=any(carriers) or not carriers,
        ports=switch.links,
        is_open_vswitch=True,
    )


def _bridge(link: Path) -> Bridge:
    ports = tuple(sorted(port.name for port in (link / "brif").iterdir() if not port.name.startswith(GUEST_PORT_PREFIXES)))
    carriers = [has_carrier(link.parent / port) for port in ports]
    return Bridge(
        name=link.name,
        mtu=int((link / "mtu").read_text()),
        has_carrier=any(carriers) or not carriers,
        ports=ports,
        is_ours=link.name.startswith(OWN_BRIDGE_PREFIX),
    )


def has_carrier(link: Path) -> bool:
    """Tell whether a link has carrier; one that is administratively down (reading fails with EINVAL) or gone has none."""
    with contextlib.suppress(OSError):
        return (link / "carrier").read_text().strip() == "1"
    return False
