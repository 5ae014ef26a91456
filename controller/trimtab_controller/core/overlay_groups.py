"""Security groups on overlay networks, as OVN's northbound database shall hold them. Pure.

    group ─▶ Port_Group of its members' cards ─┬─ ACL for each rule: what it lets through, and the answers to it
                                               └─ ACL beneath: the rest is dropped
    cards of vms that move ─▶ Port_Group: segments in the middle of a TCP connection pass, and are tracked from then on

A card in several groups takes what any of them allows, since every rule stands above every drop. Answers to what a guest opened itself,
DHCP, DNS and neighbour discovery are let through by OVN. Its connection tracking is of one host: where a vm arrives, nothing is known of
what it has open, and a connection on which the guest only listens would end. Hence the last group, which nobody stays in for long;
what begins a connection never passes by it.
"""

import hashlib
import ipaddress
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from trimtab_controller.core.firewall import Rule
from trimtab_controller.core.overlay import OverlayCard, Row, Table

MOVED_GRACE_S = 120
"""After a vm has moved; as long as at a card (`packet_rules` of the agents)."""
_DROP, _ALLOW, _UNDER_WAY = "1000", "1001", "1002"
_TRACKED = "allow-related"


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlayGroup:
    group_id: str
    rules: tuple[Rule, ...]
    vm_ids: tuple[str, ...]


def group_rows(groups: Sequence[OverlayGroup], cards: Sequence[OverlayCard], *, moving: Collection[str] = ()) -> tuple[Row, ...]:
    """Return the rows of groups that have cards here. `moving`: vms that move, or arrived a short while ago."""
    by_vm: dict[str, list[str]] = {}
    for card in cards:
        by_vm.setdefault(card.vm_id, []).append(card.nic_id)
    rows: list[Row] = []
    for group in sorted(groups, key=lambda one: one.group_id):
        ports = sorted({nic_id for vm_id in group.vm_ids for nic_id in by_vm.get(vm_id, ())})
        if ports:
            rows += _group(group.group_id, ports, [*((_match(rule), _ALLOW) for rule in group.rules), ("ip", _DROP)])
    closed = {vm_id for group in groups for vm_id in group.vm_ids}
    moved = sorted({nic_id for vm_id in closed & set(moving) for nic_id in by_vm.get(vm_id, ())})
    if moved:
        rows += _group("moved", moved, [("tcp && tcp.flags == 0/2", _UNDER_WAY)])
    return tuple(rows)


def group_name(group_id: str) -> str:
    """Return the name by which a match refers to a group: of letters, digits and underscores."""
    return "tt_" + group_id.replace("-", "_")


def _group(group_id: str, ports: Sequence[str], rules: Sequence[tuple[str, str]]) -> list[Row]:
    name = group_name(group_id)
    acls = {
        f"acl-{group_id}-{hashlib.sha256(f'{priority} {match}'.encode()).hexdigest()[:12]}": (match, priority)
        for match, priority in rules
    }
    return [
        *(
            Row(
                table=Table.RULE,
                key=key,
                columns={
                    "direction": "to-lport",
                    "priority": priority,
                    "match": f"outport == @{name} && {match}",
                    "action": "drop" if priority == _DROP else _TRACKED,
                },
            )
            for key, (match, priority) in sorted(acls.items())
        ),
        Row(
            table=Table.GROUP,
            key=group_id,
            columns={"name": name},
            references={"ports": tuple(ports), "acls": tuple(sorted(acls))},
        ),
    ]


def _match(rule: Rule) -> str:
    """Return the rule in OVN's words."""
    words = []
    version = ipaddress.ip_network(rule.source).version if rule.source else 0
    if version:
        family = "ip4" if version == 4 else "ip6"
        words.append(f"{family}.src == {rule.source}")
    match rule.protocol:
        case "tcp" | "udp":
            words.append(rule.protocol)
            if rule.first_port:
                words.append(_ports(rule))
        case "icmp":
            words.append({4: "icmp4", 6: "icmp6"}.get(version, "(icmp4 || icmp6)"))
        case _:
            words.append("ip")
    return " && ".join(words)


def _ports(rule: Rule) -> str:
    field = f"{rule.protocol}.dst"
    if rule.first_port == rule.last_port:
        return f"{field} == {rule.first_port}"
    return f"{rule.first_port} <= {field} <= {rule.last_port}"
