"""What is wrong on the ways between hosts, with its cure. Pure: hosts look, this judges.

Every pair is looked at from both ends, since a firewall, a certificate or an MTU may be wrong on one of them only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trimtab_protos.network_messages import PeerFinding

PEERS_MAX = 16
"""Others that each host looks at: beyond so many hosts a ring of neighbours is looked at instead of all pairs."""
RATE_BYTES = 8 << 20
SLOW_BYTES_S = 12_500_000
"""100 Mbit/s. A guest with 4 GiB of memory that writes little then takes six minutes to move."""
SKEW_MS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """`seen_by` met it on its way to `peer`; names."""

    seen_by: str
    peer: str
    kind: str
    message: str
    cure: str


def ring(host_ids: Sequence[str], turn: int) -> Mapping[str, str]:
    """Return whom each host looks at in this turn (from 0 on): each is looked at by one other, so that no link carries two transfers."""
    ordered = sorted(host_ids)
    return {host_id: ordered[(i + turn + 1) % len(ordered)] for i, host_id in enumerate(ordered)}


def turns(host_count: int) -> int:
    """Return how many turns there are."""
    return max(0, min(host_count - 1, PEERS_MAX))


def judge(finding: PeerFinding, *, seen_by: str, peer: str, address: str) -> tuple[Problem, ...]:
    """Return what is wrong with one way. `address`: where migrations arrive at the peer."""
    found: list[tuple[str, str, str]] = []
    if finding.agent_problem:
        cure = f"on {peer}: systemctl status trimtab-agent, and let {seen_by} reach its port"
        found.append(("agent", f"its agent: {finding.agent_problem}", cure))
    if finding.libvirt_problem:
        cure = (
            f"on {peer}: `ss -ltn sport = :16514` and its firewall; a certificate is renewed by `systemctl restart trimtab-agent`"
        )
        found.append(("libvirt", f"libvirt: {finding.libvirt_problem}", cure))
    if finding.migration_problem:
        cure = f"on {peer}: let {seen_by} reach tcp ports 49152 to 49215 of {address}"
        found.append(("migration-ports", f"migrations would not arrive: {finding.migration_problem}", cure))
    if finding.mtu and finding.mtu_passed < finding.mtu:
        largest = f"{finding.mtu_passed} bytes do" if finding.mtu_passed else "nor do small ones (ICMP may be filtered)"
        cure = f"give {seen_by}, {peer} and every switch between them one MTU; on {seen_by}: ip route get {address}"
        found.append(("mtu", f"packets of {finding.mtu} bytes do not pass uncut, {largest}", cure))
    if 0 < finding.rate_bytes_s < SLOW_BYTES_S:
        cure = f"on both: ethtool LINK shows the speed that was agreed on, `ip -s link` what was lost; on {seen_by}: ip route get {address}"
        found.append(("rate", f"{finding.rate_bytes_s / 1e6:.1f} MB/s only", cure))
    if finding.has_clock and abs(finding.clock_ahead_ms) >= SKEW_MS:
        side = "ahead of" if finding.clock_ahead_ms > 0 else "behind"
        message = f"its clock is {abs(finding.clock_ahead_ms) / 1000:.1f} s {side} that of {seen_by}"
        found.append(("clock", message, f"on {seen_by} and {peer}: timedatectl set-ntp true"))
    return tuple(Problem(seen_by=seen_by, peer=peer, kind=kind, message=message, cure=cure) for kind, message, cure in found)
