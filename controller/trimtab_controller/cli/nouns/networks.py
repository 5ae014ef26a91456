"""`trimtab network`."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, resources
from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import PairType


def _created(item: Document, now: datetime) -> str:
    return humanise.since(item.get("created_at"), now)


_COLUMNS = (
    Column("name", "name"),
    Column("kind", "kind"),
    Column("bridge", "bridge"),
    Column("vlan", "vlan", lambda item, _now: str(item.get("vlan") or "")),
    Column("mtu", "mtu"),
    Column("subnet", "subnet"),
    Column("subnet6", "subnet6", is_wide=True),
    Column("ipv6", "ipv6", is_wide=True),
    Column("dhcp", "dhcp"),
    Column("router", "router", is_wide=True),
    Column("outer", "outer", lambda item, _now: _outer(item), is_wide=True),
    Column("gateway", "gateway", is_wide=True),
    Column("dns", "dns", lambda item, _now: ",".join(item.get("dns") or ()), is_wide=True),
    Column("project", "project", lambda item, _now: "shared" if item.get("is_shared") else str(item.get("project") or "")),
    Column("id", "id", is_wide=True),
    Column("hosts", "hosts", lambda item, _now: _hosts(item), is_wide=True),
    Column("created", "created_at", _created, is_wide=True),
)
NETWORK = Resource(noun="network", collection="networks", columns=_COLUMNS)
SHARED_NETWORK = Resource(noun="network", collection="networks", columns=_COLUMNS, is_fleet=True)

_name = click.argument("name", shell_complete=completion.names_of("networks"))
_shared = click.option("--shared", "is_shared", is_flag=True, help="One for all projects, instead of this project's.")


def _hosts(item: Document) -> str:
    """Return `node1:ready,node2:failed (no bridge br0)`."""
    return ",".join(
        f"{one.get('host', '')}:{one.get('state') or 'unknown'}" + (f" ({one['problem']})" if one.get("problem") else "")
        for one in item.get("hosts") or []
    )


def _outer(item: Document) -> str:
    """Return `192.0.2.100-192.0.2.199 by 192.0.2.1` of the way out of overlay networks."""
    outer = item.get("outer")
    return f"{outer['first']}-{outer['last']} by {outer['gateway']}" if outer else ""


def _resource(is_shared: bool) -> Resource:
    return SHARED_NETWORK if is_shared else NETWORK


@click.group()
def network() -> None:
    """Networks that nics are on."""


@network.command("list")
@_shared
@options.lists
@click.pass_obj
def list_networks(session: Session, is_shared: bool) -> None:
    """List the project's networks and the shared ones. Filter by name, kind."""
    resources.list_all(session, _resource(is_shared))


@network.command("get")
@_name
@_shared
@options.reads
@click.pass_obj
def get_network(session: Session, name: str, is_shared: bool) -> None:
    """Show a network and which hosts reach it."""
    resources.get_one(session, _resource(is_shared), name)


@network.command("create")
@click.argument("name")
@click.option("--bridge", metavar="BRIDGE", help="An existing bridge of that name on each host.")
@click.option("--bridge-on", "bridges", type=PairType("node1=br0", is_label=False), multiple=True, metavar="HOST=BRIDGE",
              help="Another bridge on this host; repeats.")  # fmt: skip
@click.option("--nat", "is_nat", is_flag=True, help="A network of each host's own, behind its address.")
@click.option("--isolated", "is_isolated", is_flag=True, help="A network of each host's own, without a way out.")
@click.option("--overlay", "is_overlay", is_flag=True, help="One across hosts, by OVN.")
@click.option("--vlan", type=click.IntRange(1, 4094), help="Tag frames on the bridge.")
@click.option("--mtu", type=click.IntRange(576, 65535), help="Largest packet; 1500 unless told otherwise, 1442 on an overlay.")
@click.option("--subnet", metavar="CIDR", help="For example 10.20.0.0/24.")
@click.option("--subnet6", metavar="CIDR", help="Of an overlay, beside --subnet: a /64, for example fd00:20::/64.")
@click.option(
    "--ipv6", type=click.Choice(["slaac", "dhcp"]), help="Guests make their addresses in --subnet6 (slaac, the default), or ask."
)
@click.option("--dhcp/--no-dhcp", "has_dhcp", default=None, help="Answer DHCP (nat, isolated and overlay).")
@click.option("--router", metavar="NAME", help="Let overlay networks that name the same one reach each other.")
@click.option("--outer", "is_outer", is_flag=True, help="The way out of overlay networks, which no vm is on itself.")
@click.option("--gateway", metavar="ADDRESS", help="The router of its LAN: of --outer, or of --bridge with --subnet.")
@click.option(
    "--dns", multiple=True, metavar="ADDRESS", help="A DNS server of the LAN, of --bridge with --subnet; repeats, up to 3."
)
@click.option("--range", "outer_range", metavar="FIRST-LAST", help="Its addresses for routers and floating ones, of --outer.")
@_shared
@options.runs
@click.pass_obj
def create(
    session: Session,
    name: str,
    bridge: str | None,
    bridges: Sequence[tuple[str, str]],
    is_nat: bool,
    is_isolated: bool,
    is_overlay: bool,
    vlan: int | None,
    mtu: int | None,
    subnet: str | None,
    subnet6: str | None,
    ipv6: str | None,
    has_dhcp: bool | None,
    router: str | None,
    is_outer: bool,
    gateway: str | None,
    dns: Sequence[str],
    outer_range: str | None,
    is_shared: bool,
) -> None:
    """Create a network on existing bridges, one of each host's own (--nat, --isolated), or one across hosts (--overlay)."""
    kinds = {"bridge": bool(bridge or bridges), "nat": is_nat, "isolated": is_isolated, "overlay": is_overlay}
    if sum(kinds.values()) != 1:
        raise usage("give one of --bridge (or --bridge-on), --nat, --isolated and --overlay, for example --bridge br0")
    if gateway and not is_outer and not subnet:
        raise usage("--gateway goes with --subnet, which it is in, for example --subnet 192.0.2.0/24 --gateway 192.0.2.1")
    body: dict[str, Any] = {"name": name, "kind": next(kind for kind, is_it in kinds.items() if is_it)}
    optional = {
        "bridge": bridge,
        "bridges": dict(bridges) or None,
        "vlan": vlan,
        "mtu": mtu,
        "subnet": subnet,
        "subnet6": subnet6,
        "ipv6": ipv6,
        "dhcp": has_dhcp,
        "router": router,
        "outer": _given_outer(is_outer, gateway, outer_range),
        "gateway": None if is_outer else gateway,
        "dns": list(dns) or None,
    }
    body.update({key: value for key, value in optional.items() if value is not None})
    resource = _resource(is_shared)
    resources.run(
        session,
        "POST",
        resource.place(session),
        body,
        reread=lambda: resources.read(session, resource, name),
        sentence=lambda _: f"network {name} is ready",
        resource=resource,
    )


def _given_outer(is_outer: bool, gateway: str | None, outer_range: str | None) -> dict[str, str] | None:
    first, _, last = (outer_range or "").partition("-")
    if not is_outer and not outer_range:
        return None
    if not (is_outer and gateway and first and last):
        raise usage("--outer, --gateway and --range go together, for example --gateway 192.0.2.1 --range 192.0.2.100-192.0.2.199")
    return {"gateway": gateway, "first": first, "last": last}


@network.command("delete")
@_name
@_shared
@options.destroys
@options.runs
@click.pass_obj
def delete(session: Session, name: str, is_shared: bool) -> None:
    """Delete a network that no nic is on; bridges that were there before stay."""
    session.confirm(f"Delete network {name}?")
    path = _resource(is_shared).place(session, name)
    resources.run(session, "DELETE", path, sentence=lambda _: f"network {name} deleted")
