"""`trimtab router`."""

from collections.abc import Sequence
from datetime import datetime

import click

from trimtab_controller.cli import completion, humanise, options, render, resources
from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session


def _created(item: Document, now: datetime) -> str:
    return humanise.since(item.get("created_at"), now)


def describe(item: Document) -> None:
    """Print a router, what is behind it, and who has which of its addresses."""
    outer = f"{item['outer_address']} on {item['outer']}" if item.get("outer") else "none"
    render.pairs(
        [
            ("name", str(item.get("name", ""))),
            ("id", str(item.get("id", ""))),
            ("project", str(item.get("project", ""))),
            ("networks", ", ".join(item.get("networks") or []) or "none"),
            ("outer side", outer),
            ("gateways", ", ".join(item.get("gateways") or [])),
            ("version", f"{item.get('version', '')} (etag {item.get('etag', '')})"),
            ("created", f"{item.get('created_at', '')} ({_created(item, render.now())})"),
        ]
    )
    held = item.get("addresses") or []
    if held:
        render.heading("addresses")
        render.table(
            ["ADDRESS", "NETWORK", "HOLDER"], [[str(one["address"]), str(one["network"]), _holder(item, one)] for one in held]
        )


def _holder(item: Document, held: Document) -> str:
    if not held.get("vm"):
        return f"router {item.get('name', '')}"
    return f"vm {held['vm']} ({held.get('inner') or 'no address'})" + (
        ", deleted: leads nowhere" if held.get("is_vm_deleted") else ""
    )


ROUTER = Resource(
    noun="router",
    collection="routers",
    describe=describe,
    columns=(
        Column("name", "name"),
        Column("networks", "networks", lambda item, _now: ",".join(item.get("networks") or [])),
        Column("outer", "outer"),
        Column("outer-address", "outer_address"),
        Column("gateways", "gateways", lambda item, _now: ",".join(item.get("gateways") or [])),
        Column("id", "id", is_wide=True),
        Column("created", "created_at", _created, is_wide=True),
    ),
)

_name = click.argument("name", shell_complete=completion.names_of("routers"))
_network = click.option("--network", required=True, metavar="NETWORK", help="An overlay network of the project.")
_address = click.option(
    "--outer-address", metavar="ADDRESS", help="Its address there; the lowest free one of the network's range."
)


@click.group()
def router() -> None:
    """What lets overlay networks reach each other and, with an outer side, the outside."""


@router.command("list")
@options.lists
@click.pass_obj
def list_routers(session: Session) -> None:
    """List the project's routers. Filter by name."""
    resources.list_all(session, ROUTER)


@router.command("get")
@_name
@options.reads
@click.pass_obj
def get_router(session: Session, name: str) -> None:
    """Show a router, what is behind it, who has which of its addresses, and which hosts may carry its outer side."""
    resources.get_one(session, ROUTER, name)


@router.command("create")
@click.argument("name")
@click.option("--network", "networks", multiple=True, metavar="NETWORK", help="An overlay network to put behind it; repeats.")
@click.option("--outer", metavar="NETWORK", help="The network of its outer side (`network create --outer`).")
@_address
@options.changes
@click.pass_obj
def create(session: Session, name: str, networks: Sequence[str], outer: str | None, outer_address: str | None) -> None:
    """Create a router.

    trimtab router create edge --network lab1 --outer lan
    """
    if outer_address and not outer:
        raise usage("--outer-address goes with --outer NETWORK")
    body = {"name": name, "networks": list(networks), "outer": outer or "", "outer_address": outer_address or ""}
    answer = resources.change(session, "POST", ROUTER.place(session), body)
    way = f", its outer address is {answer['outer_address']}" if answer and answer.get("outer_address") else ""
    resources.show_changed(session, ROUTER, answer, f"router {name} created{way}")


@router.command("update")
@_name
@click.option("--outer", metavar="NETWORK", help="The network of its outer side.")
@_address
@click.option("--no-outer", is_flag=True, help="Take its outer side away.")
@options.changes
@click.pass_obj
def update(session: Session, name: str, outer: str | None, outer_address: str | None, no_outer: bool) -> None:
    """Give a router an outer side, another one, or none."""
    if bool(outer) == no_outer or (no_outer and outer_address):
        raise usage("give --outer NETWORK (with --outer-address ADDRESS) or --no-outer")
    body = {"outer": outer or "", "outer_address": outer_address or ""}
    answer = resources.change(session, "PATCH", ROUTER.place(session, name), body)
    said = f"has its outer side on {outer}" if outer else "has no outer side"
    resources.show_changed(session, ROUTER, answer, f"router {name} {said}")


@router.command("attach")
@_name
@_network
@options.changes
@click.pass_obj
def attach(session: Session, name: str, network: str) -> None:
    """Put an overlay network behind a router; its guests learn of it when they next ask for their address."""
    answer = resources.change(session, "POST", ROUTER.place(session, name, verb="attach"), {"network": network})
    resources.show_changed(session, ROUTER, answer, f"network {network} is behind router {name}")


@router.command("detach")
@_name
@_network
@options.changes
@click.pass_obj
def detach(session: Session, name: str, network: str) -> None:
    """Take a network away from a router."""
    answer = resources.change(session, "POST", ROUTER.place(session, name, verb="detach"), {"network": network})
    resources.show_changed(session, ROUTER, answer, f"network {network} is not behind router {name} any more")


@router.command("delete")
@_name
@options.destroys
@options.changes
@click.pass_obj
def delete(session: Session, name: str) -> None:
    """Delete a router that no network is behind."""
    session.confirm(f"Delete router {name}?")
    answer = resources.change(session, "DELETE", ROUTER.place(session, name))
    resources.show_changed(session, ROUTER, answer, f"router {name} deleted")
