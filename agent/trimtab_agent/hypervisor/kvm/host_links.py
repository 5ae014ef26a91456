"""The host's bridges, from sysfs and from Open vSwitch. Guests' own ports are left out, so that a guest's start does not look like a
change of the host."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import structlog

from trimtab_agent.hypervisor.kvm import open_vswitch
from trimtab_agent.hypervisor.kvm.networks import OWN_BRIDGE_PREFIX
from trimtab_agent.hypervisor.kvm.open_vswitch import Switch
from trimtab_agent.hypervisor.kvm.packet_rules import TAP_PREFIX
from trimtab_protos.errors import Unavailable
from trimtab_protos.network_messages import Bridge

log = structlog.get_logger(__name__)

GUEST_PORT_PREFIXES = (TAP_PREFIX, "vnet", "tap", "macvtap")


def read_bridges(sys_net: Path = Path("/sys/class/net"), switches: Sequence[Switch] = ()) -> tuple[Bridge, ...]:
    """Return every bridge, in order of name. One without ports of the host's own counts as having carrier: it reaches what is inside."""
    linux = [_bridge(link) for link in sys_net.iterdir() if (link / "bridge").is_dir()]
    return tuple(sorted([*linux, *(_switch(each, sys_net) for each in switches)], key=lambda bridge: bridge.name))


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
