"""`trimtab floating`."""

from datetime import datetime

import click

from trimtab_controller.cli import completion, humanise, options, resources
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session


def _created(item: Document, now: datetime) -> str:
    return humanise.since(item.get("created_at"), now)


def _vm(item: Document, _now: datetime) -> str:
    return str(item.get("vm") or "") + (" (deleted)" if item.get("is_vm_deleted") else "")


FLOATING = Resource(
    noun="floating",
    collection="floating-addresses",
    columns=(
        Column("address", "name"),
        Column("network", "network"),
        Column("vm", "vm", _vm),
        Column("inner", "address"),
        Column("nic", "nic", is_wide=True),
        Column("id", "id", is_wide=True),
        Column("created", "created_at", _created, is_wide=True),
    ),
)

_address = click.argument("address", shell_complete=completion.names_of("floating-addresses"))


@click.group()
def floating() -> None:
    """Addresses of an outer network that lead to vms on overlay networks, wherever those are."""


@floating.command("list")
@options.lists
@click.pass_obj
def list_floating(session: Session) -> None:
    """List the project's floating addresses. Filter by name."""
    resources.list_all(session, FLOATING)


@floating.command("get")
@_address
@options.reads
@click.pass_obj
def get_floating(session: Session, address: str) -> None:
    """Show a floating address and whom it leads to."""
    resources.get_one(session, FLOATING, address)


@floating.command("create")
@click.option("--network", required=True, metavar="NETWORK", help="The outer network (`network create --outer`).")
@click.option("--address", metavar="ADDRESS", help="This one; otherwise the lowest free one of the network's range.")
@options.changes
@click.pass_obj
def create(session: Session, network: str, address: str | None) -> None:
    """Take an address; `trimtab floating attach ADDRESS --vm NAME` has it lead to a vm."""
    answer = resources.change(session, "POST", FLOATING.place(session), {"network": network, "address": address or ""})
    taken = (answer or {}).get("name", address or "")
    resources.show_changed(session, FLOATING, answer, f"floating address {taken} of network {network} is yours")


@floating.command("attach")
@_address
@click.option("--vm", required=True, metavar="VM[/NIC]", help="The vm; NIC by id, MAC or index.")
@options.changes
@click.pass_obj
def attach(session: Session, address: str, vm: str) -> None:
    """Have an address lead to a vm: to its first nic that a router leads to, or to the one named."""
    name, _, nic = vm.partition("/")
    body = {"vm": name, "nic": nic}
    answer = resources.change(session, "POST", FLOATING.place(session, address, verb="attach"), body)
    inner = f" ({answer['address']})" if answer and answer.get("address") else ""
    resources.show_changed(session, FLOATING, answer, f"{address} leads to vm {name}{inner}")


@floating.command("detach")
@_address
@options.changes
@click.pass_obj
def detach(session: Session, address: str) -> None:
    """Have an address lead to nobody; it stays yours."""
    answer = resources.change(session, "POST", FLOATING.place(session, address, verb="detach"))
    resources.show_changed(session, FLOATING, answer, f"{address} leads to nobody")


@floating.command("delete")
@_address
@options.destroys
@options.changes
@click.pass_obj
def delete(session: Session, address: str) -> None:
    """Give an address back that leads to nobody."""
    session.confirm(f"Give floating address {address} back?")
    answer = resources.change(session, "DELETE", FLOATING.place(session, address))
    resources.show_changed(session, FLOATING, answer, f"floating address {address} given back")
