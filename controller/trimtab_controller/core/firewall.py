"""Security groups: what may reach the vms that are in them. Pure.

A rule is written `tcp/443`, `udp/1000-2000`, `icmp` or `any`, each with `@10.0.0.0/8` behind it where only some may. A vm in at least
one group is closed: what no rule of its groups names does not reach it. What it opens itself is answered in any case.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

RULES_MAX = 64
"""Of one group: each is a rule in the kernel of every host that runs one of its vms."""
GROUPS_MAX = 8
"""Of one vm."""
PROTOCOLS = ("tcp", "udp", "icmp", "any")
_RULE = re.compile(r"(?P<protocol>[a-z]+)(/(?P<first>[0-9]{1,5})(-(?P<last>[0-9]{1,5}))?)?(@(?P<source>[0-9A-Fa-f.:/]+))?")


@dataclass(frozen=True, slots=True, order=True)
class Rule:
    """Ports 0 to 0 are all; source '' is anywhere."""

    protocol: str
    first_port: int = 0
    last_port: int = 0
    source: str = ""

    def __str__(self) -> str:
        ports = f"/{self.first_port}" if self.first_port else ""
        ports += f"-{self.last_port}" if self.last_port != self.first_port else ""
        return f"{self.protocol}{ports}" + (f"@{self.source}" if self.source else "")


def parse_rule(text: str) -> Rule | str:
    """Return the rule, or why the text is none."""
    found = _RULE.fullmatch(text)
    if found is None:
        return "must look like tcp/443, udp/1000-2000@10.0.0.0/8, icmp or any"
    protocol, source = found["protocol"], found["source"] or ""
    if protocol not in PROTOCOLS:
        return f"protocol {protocol} must be one of {', '.join(PROTOCOLS)}"
    first = int(found["first"] or 0)
    last = int(found["last"] or first)
    if found["first"] and protocol not in {"tcp", "udp"}:
        return f"{protocol} has no ports; leave /{found['first']} out"
    if found["first"] and not 1 <= first <= last <= 65535:
        return f"ports {first} to {last} must be 1 to 65535, the lower one first"
    if source:
        try:
            source = str(ipaddress.ip_network(source))
        except ValueError as error:
            return f"{error}; write the source as 10.0.0.0/8"
    return Rule(protocol, first, last, source)


def union(groups: Iterable[Iterable[Rule]]) -> tuple[Rule, ...]:
    """Return what the groups let through together, in an order that does not depend on theirs."""
    return tuple(sorted({rule for rules in groups for rule in rules}))
