"""The host's bridges, from sysfs. Guests' own ports are left out, so that a guest's start does not look like a change of the host."""

import contextlib
from pathlib import Path

from trimtab_agent.hypervisor.kvm.networks import OWN_BRIDGE_PREFIX
from trimtab_agent.hypervisor.kvm.packet_rules import TAP_PREFIX
from trimtab_protos.messages import Bridge

GUEST_PORT_PREFIXES = (TAP_PREFIX, "vnet", "tap", "macvtap")


def read_bridges(sys_net: Path = Path("/sys/class/net")) -> tuple[Bridge, ...]:
    """Return every bridge, in order of name. One without ports of the host's own counts as having carrier: it reaches what is inside."""
    return tuple(_bridge(link) for link in sorted(sys_net.iterdir()) if (link / "bridge").is_dir())


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
