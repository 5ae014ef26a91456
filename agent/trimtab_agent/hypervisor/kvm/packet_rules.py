"""What nftables is told about a guest's packets, made from typed fields. Pure: no nft, no files, no libvirt.

One table of the bridge family, since guests are ports of bridges. Two base chains look a port up by name; each card has a chain of
its own for each direction:

    prerouting  ─▶ map `from` ─▶ from-<tap>: another MAC, address or ARP than its own is dropped; what it opens is remembered
    postrouting ─▶ map `to`   ─▶ to-<tap>:   where it is in a security group: answers and what a rule names pass, the rest is dropped

Connection tracking is not asked: this kernel's bridge family may lack it, and then a rule set is refused as a whole. What a guest
opens is kept in sets whose elements time out instead. TCP is remembered by its first segment and kept by those that follow. UDP that
the guest answers on an open port is not remembered, so that its clients cannot fill the set that its own questions need.

A card that was just received from another host is `grace`: for a while segments in the middle of a TCP connection pass and are
remembered, so that connections which the source had seen begin go on. One that begins never passes by it.
"""

import hashlib
import ipaddress
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab_agent.hypervisor.kvm.identifiers import check_id, check_mac, check_range
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import NicSpec
from trimtab_protos.network_messages import FirewallRule, FirewallSpec

FAMILY, TABLE = "bridge", "trimtab"
TAP_PREFIX = "tn-"
TCP_KEPT_S = 7200
"""As long as Linux lets a TCP connection be silent before it probes it."""
UDP_KEPT_S = 180
FLOWS_MAX = 65536

_OPEN = FirewallSpec(generation=0)
_NO_ADDRESS = str(ipaddress.IPv4Address(0))
_LINK_LOCAL = {"prefix": {"addr": "fe80::", "len": 10}}
_ICMP_ANSWERS = ["echo-reply", "destination-unreachable", "time-exceeded", "parameter-problem"]
_ICMP6_ANSWERS = [
    "echo-reply",
    "destination-unreachable",
    "packet-too-big",
    "time-exceeded",
    "parameter-problem",
    "nd-neighbor-solicit",
    "nd-neighbor-advert",
    "nd-router-advert",
]
_VLAN_TAGS = ["8021q", "8021ad"]

Statement = dict[str, Any]
Command = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestPackets:
    """What is known of one vm's packets on this host."""

    vm_id: str
    nics: tuple[NicSpec, ...] = ()
    firewall: FirewallSpec = _OPEN
    elsewhere: tuple[str, ...] = ()
    """Cards whose network keeps security groups itself; as whom they send is judged here all the same."""


def tap_name(nic_id: str) -> str:
    """Return the name of the card's port on this host; known before the guest starts, and the same on every host."""
    return TAP_PREFIX + hashlib.sha256(check_id(nic_id, "nic_id").encode()).hexdigest()[:10]


def table() -> list[Command]:
    """Return what makes the table and its two base chains, or finds them; cards are not touched."""
    commands: list[Command] = [
        _add("table", {}),
        _add("set", {"name": "grace", "type": "ifname", "flags": ["timeout"]}),
    ]
    for direction, hook, priority, key in (("from", "prerouting", -300, "iifname"), ("to", "postrouting", 300, "oifname")):
        commands += [
            _add("map", {"name": direction, "type": "ifname", "map": "verdict"}),
            _add("chain", {"name": hook, "type": "filter", "hook": hook, "prio": priority, "policy": "accept"}),
            _flush(hook),
            _rule(hook, {"vmap": {"key": {"meta": {"key": key}}, "data": f"@{direction}"}}),
        ]
    return commands


def install(packets: GuestPackets, *, there: Collection[str], grace_s: int = 0) -> list[Command]:
    """Return what puts a vm's rules in place of those that it has; what is remembered of its connections stays.

    `there`: names of the sets of the table. nft 1.0 takes a set that its rules write to for another one the second time.
    """
    commands: list[Command] = []
    for nic in packets.nics:
        tap, firewall = tap_name(nic.nic_id), _OPEN if nic.nic_id in packets.elsewhere else packets.firewall
        commands += [_add("set", flows) for flows in (_flow_set(tap, 4), _flow_set(tap, 6)) if flows["name"] not in there]
        for direction, rules in (
            ("from", _from_guest(_with_siblings(nic, packets), tap, firewall)),
            ("to", _to_guest(nic, tap, firewall)),
        ):
            chain = f"{direction}-{tap}"
            commands += [_add("chain", {"name": chain}), _flush(chain), *(_rule(chain, *each) for each in rules)]
            commands.append(_element("add", direction, [[tap, {"jump": {"target": chain}}]]))
        if grace_s:
            commands += [_element("add", "grace", [tap]), _element("delete", "grace", [tap])]
            commands.append(_element("add", "grace", [{"elem": {"val": tap, "timeout": grace_s}}]))
    return commands


def remove(nic_ids: Sequence[str], *, there: Collection[str]) -> list[Command]:
    """Return what takes the cards' rules away, whether they are there or not."""
    commands: list[Command] = []
    for nic_id in nic_ids:
        tap = tap_name(nic_id)
        for direction in ("from", "to"):
            # Added first: nft refuses to delete what is not there, and with it all that goes along.
            chain = f"{direction}-{tap}"
            jump = [[tap, {"jump": {"target": chain}}]]
            commands += [_add("chain", {"name": chain}), _element("add", direction, jump), _element("delete", direction, jump)]
            commands += [_flush(chain), {"delete": {"chain": _ours({"name": chain})}}]
        names = [_flow_set(tap, version)["name"] for version in (4, 6)]
        commands += [{"delete": {"set": _ours({"name": name})}} for name in names if name in there]
        commands += [_element("add", "grace", [tap]), _element("delete", "grace", [tap])]
    return commands


def _with_siblings(nic: NicSpec, packets: GuestPackets) -> NicSpec:
    """Return the card with the addresses of the vm's other cards on its network too: Linux answers for any of them by any of them."""
    if not nic.addresses:
        return nic
    beside = [each for each in packets.nics if each.network_id == nic.network_id]
    return replace(nic, addresses=tuple(sorted({address for each in beside for address in each.addresses})))


# --- from the guest -----------------------------------------------------------------------------------------------------


def _from_guest(nic: NicSpec, tap: str, firewall: FirewallSpec) -> list[list[Statement]]:
    rules = [] if nic.allows_spoofing else _own_only(nic)
    if firewall.is_closed:
        for rule in firewall.rules:
            if rule.protocol in {"udp", "any"}:
                rules.append([_protocol("udp"), *_ports(rule, "udp", "sport"), {"accept": None}])
        for version in (4, 6):
            flow, kept = _flow(version, is_outbound=True), f"@{_flow_set(tap, version)['name']}"
            rules += [
                [_protocol("tcp"), _tcp_flags("==", ["syn", "ack"], "syn"), _remember(flow, kept, TCP_KEPT_S)],
                [_protocol("tcp"), _match(flow, kept), _remember(flow, kept, TCP_KEPT_S)],
                [_protocol("udp"), _remember(flow, kept, UDP_KEPT_S)],
            ]
    return [*rules, [{"accept": None}]]


def _own_only(nic: NicSpec) -> list[list[Statement]]:
    mac, drop = check_mac(nic.mac), {"drop": None}
    rules = [
        [_match(_field("ether", "saddr"), mac, "!="), drop],
        # A tag would hide what follows from the rules below.
        [_match(_field("ether", "type"), {"set": _VLAN_TAGS}), drop],
        [_match(_field("arp", "saddr ether"), mac, "!="), drop],
        # Nobody's guest is the network's DHCP server or router.
        [_match(_field("udp", "sport"), 67), _match(_field("udp", "dport"), 68), drop],
        [_match(_field("udp", "sport"), 547), _match(_field("udp", "dport"), 546), drop],
        [_match(_field("icmpv6", "type"), "nd-router-advert"), drop],
    ]
    if not nic.addresses:
        return rules
    addresses = [_parse_interface(text).ip for text in nic.addresses]
    own4 = [str(address) for address in addresses if address.version == 4]
    own6 = [str(address) for address in addresses if address.version == 6]
    is_asking = [
        _match(_field("ip", "saddr"), _NO_ADDRESS),
        _match(_field("udp", "sport"), 68),
        _match(_field("udp", "dport"), 67),
    ]
    return [
        *rules,
        # Without an address it asks whether its own is free before it takes it.
        [_match(_field("arp", "saddr ip"), {"set": [*own4, _NO_ADDRESS]}, "!="), drop],
        [*is_asking, {"accept": None}],
        [_match(_field("ip", "saddr"), {"set": own4}, "!="), drop] if own4 else [_match(_field("ether", "type"), "ip"), drop],
        [_match(_field("ip6", "saddr"), {"set": [*own6, "::", _LINK_LOCAL]}, "!="), drop],
    ]


# --- to the guest -------------------------------------------------------------------------------------------------------


def _to_guest(nic: NicSpec, tap: str, firewall: FirewallSpec) -> list[list[Statement]]:
    accept: Statement = {"accept": None}
    # Frames of VLANs that the bridge's uplink carries reach all of its ports; they are for the host's VLAN devices.
    tagged = [] if nic.allows_spoofing else [[_match(_field("ether", "type"), {"set": _VLAN_TAGS}), {"drop": None}]]
    if not firewall.is_closed:
        return [*tagged, [accept]]
    later_fragment = {"&": [_field("ip", "frag-off"), 0x1FFF]}
    rules: list[list[Statement]] = [
        *tagged,
        [_match(_field("ether", "type"), "arp"), accept],
        # They carry no port, and are of no use to anybody without the first one.
        [_match(later_fragment, 0, "!="), accept],
        [_match(_field("icmp", "type"), {"set": _ICMP_ANSWERS}), accept],
        [_match(_field("icmpv6", "type"), {"set": _ICMP6_ANSWERS}), accept],
        [_match(_field("udp", "sport"), 67), _match(_field("udp", "dport"), 68), accept],
        [_match(_field("udp", "sport"), 547), _match(_field("udp", "dport"), 546), accept],
    ]
    for version in (4, 6):
        flow, kept = _flow(version, is_outbound=False), f"@{_flow_set(tap, version)['name']}"
        is_received = _match({"meta": {"key": "oifname"}}, "@grace")
        is_under_way = _tcp_flags("!=", ["syn", "ack"], "syn")
        to_it = _match(_field("ether", "daddr"), check_mac(nic.mac))
        rules += [
            # A segment that opens a connection is never an answer: else whoever was answered once could open one.
            [_protocol("tcp"), is_under_way, _match(flow, kept), accept],
            [_protocol("udp"), _match(flow, kept), accept],
            [is_received, to_it, _protocol("tcp"), is_under_way, _remember(flow, kept, TCP_KEPT_S), accept],
        ]
    rules += [[*statements, accept] for rule in firewall.rules for statements in _statements(rule)]
    return [*rules, [{"counter": {"packets": 0, "bytes": 0}}, {"drop": None}]]


def _statements(rule: FirewallRule) -> list[list[Statement]]:
    source: list[Statement] = []
    version = 0
    if rule.source:
        network = _parse_network(rule.source)
        version = network.version
        family = "ip" if version == 4 else "ip6"
        prefix = {"prefix": {"addr": str(network.network_address), "len": network.prefixlen}}
        source = [_match(_field(family, "saddr"), prefix)]
    match rule.protocol:
        case "any":
            return [source or [_match(_field("ether", "type"), {"set": ["ip", "ip6"]})]]
        case "tcp" | "udp":
            return [[*source, _protocol(rule.protocol), *_ports(rule, rule.protocol, "dport")]]
        case "icmp":
            kinds = [kind for kind, of in (("icmp", 4), ("ipv6-icmp", 6)) if version in {0, of}]
            return [[*source, _protocol(kind)] for kind in kinds]
    raise InvalidRequest(
        "firewall-protocol", f"protocol {rule.protocol[:20]!r} must be tcp, udp, icmp or any", field="rules.protocol"
    )


def _ports(rule: FirewallRule, protocol: str, side: str) -> list[Statement]:
    if not rule.first_port:
        return []
    first = check_range(rule.first_port, "rules.first_port", low=1, high=65535)
    last = check_range(rule.last_port, "rules.last_port", low=first, high=65535)
    return [_match(_field(protocol, side), first if first == last else {"range": [first, last]})]


# --- words of nft ---------------------------------------------------------------------------------------------------------


def _flow_set(tap: str, version: int) -> dict[str, Any]:
    types = [f"ipv{version}_addr", "inet_proto", "inet_service", "inet_service"]
    return {"name": f"{tap}-{version}", "type": types, "flags": ["timeout"], "size": FLOWS_MAX}


def _flow(version: int, *, is_outbound: bool) -> Statement:
    """Return the words of a connection, alike in both directions: peer, protocol, the peer's port, the guest's."""
    peer, peer_port, own_port = ("daddr", "dport", "sport") if is_outbound else ("saddr", "sport", "dport")
    family = "ip" if version == 4 else "ip6"
    words = [_field(family, peer), {"meta": {"key": "l4proto"}}, _field("th", peer_port), _field("th", own_port)]
    return {"concat": words}


def _remember(flow: Statement, kept: str, timeout_s: int) -> Statement:
    return {"set": {"op": "update", "elem": {"elem": {"val": flow, "timeout": timeout_s}}, "set": kept}}


def _tcp_flags(operator: str, mask: list[str], value: str) -> Statement:
    return _match({"&": [_field("tcp", "flags"), mask]}, value, operator)


def _protocol(name: str) -> Statement:
    return _match({"meta": {"key": "l4proto"}}, name)


def _field(protocol: str, field: str) -> Statement:
    return {"payload": {"protocol": protocol, "field": field}}


def _match(left: Any, right: Any, operator: str = "==") -> Statement:
    return {"match": {"op": operator, "left": left, "right": right}}


def _ours(fields: dict[str, Any]) -> dict[str, Any]:
    return {"family": FAMILY, "table": TABLE, **fields}


def _add(what: str, fields: dict[str, Any]) -> Command:
    return {"add": {what: {"family": FAMILY, "name": TABLE} if what == "table" else _ours(fields)}}


def _flush(chain: str) -> Command:
    return {"flush": {"chain": _ours({"name": chain})}}


def _rule(chain: str, *statements: Statement) -> Command:
    return {"add": {"rule": _ours({"chain": chain, "expr": list(statements)})}}


def _element(verb: str, name: str, elements: list[Any]) -> Command:
    return {verb: {"element": _ours({"name": name, "elem": elements})}}


def _parse_interface(text: str) -> ipaddress.IPv4Interface | ipaddress.IPv6Interface:
    try:
        return ipaddress.ip_interface(text)
    except ValueError as error:
        message = f"address {text[:50]!r} must be an address with prefix length, such as 10.0.0.5/24"
        raise InvalidRequest("nic-address", message, field="addresses") from error


def _parse_network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        message = f"source {text[:50]!r} must be a network such as 10.0.0.0/8"
        raise InvalidRequest("firewall-source", message, field="rules.source") from error
