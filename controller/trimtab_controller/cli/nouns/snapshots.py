"""`trimtab vm snapshot`: a vm as it was at an instant; the tree of them, and going back."""

from typing import Any

import click

from trimtab_controller.cli import humanise, options, render, resources
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session

SNAPSHOT = Resource(
    noun="snapshot",
    collection="vms",
    columns=(
        Column("name", "name", lambda item, _now: f"{'* ' if item.get('is_current') else ''}{item.get('name', '')}"),
        Column("parent", "parent"),
        Column("state", "state"),
        Column("consistency", "consistency"),
        Column("memory", "has_memory"),
        Column("clones", "clones"),
        Column("age", "created_at", lambda item, now: humanise.since(item.get("created_at"), now)),
        Column("id", "id", is_wide=True),
        Column("note", "note", is_wide=True),
    ),
)
_vm = click.argument("vm_name", metavar="VM")
_name = click.argument("name")


@click.group()
def snapshot() -> None:
    """A vm's disks, and its memory, as they were at an instant."""


@snapshot.command("list")
@_vm
@options.reads
@click.pass_obj
def list_snapshots(session: Session, vm_name: str) -> None:
    """List a vm's snapshots, each after the one that it began from; * is where the vm is."""
    items = list(session.client.pages(SNAPSHOT.place(session, vm_name, "snapshots")))
    render.show_list(session, items, SNAPSHOT.columns, empty=f"vm {vm_name} has no snapshots")


@snapshot.command("get")
@_vm
@_name
@options.reads
@click.pass_obj
def get_snapshot(session: Session, vm_name: str, name: str) -> None:
    """Show one snapshot."""
    found: Document = session.client.get(SNAPSHOT.place(session, vm_name, "snapshots", name))
    render.show_one(session, found, SNAPSHOT.columns)


@snapshot.command("create")
@_vm
@_name
@click.option("--memory", "has_memory", is_flag=True, help="Keep what the guest is doing as well: going back resumes it there.")
@options.runs
@click.pass_obj
def create_snapshot(session: Session, vm_name: str, name: str, has_memory: bool) -> None:
    """Keep a vm as it is now; it runs on.

    The guest's agent freezes its file systems for the instant; without one the disks are as after a power cut, and it says so.

    trimtab vm snapshot create web1 before-upgrade
    """
    body: dict[str, Any] = {"name": name, "has_memory": has_memory}
    place = SNAPSHOT.place(session, vm_name, "snapshots")
    resources.run(
        session,
        "POST",
        place,
        body,
        reread=lambda: dict(session.client.get(SNAPSHOT.place(session, vm_name, "snapshots", name))),
        sentence=_made,
        resource=SNAPSHOT,
    )


@snapshot.command("revert")
@_vm
@_name
@click.option("--disk-only", is_flag=True, help="Leave the kept memory aside: the guest boots.")
@options.destroys
@options.runs
@click.pass_obj
def revert_snapshot(session: Session, vm_name: str, name: str, disk_only: bool) -> None:
    """Let a vm go back to a snapshot: what it wrote since is given up.

    trimtab vm snapshot revert web1 before-upgrade
    """
    session.confirm(f"Let vm {vm_name} go back to {name}? What it wrote since its last snapshot is lost.")
    place = SNAPSHOT.place(session, vm_name, "snapshots", name, verb="revert")
    resources.run(session, "POST", place, {"disk_only": disk_only}, sentence=lambda _item: f"vm {vm_name} is back at {name}")


@snapshot.command("delete")
@_vm
@_name
@options.destroys
@options.runs
@click.pass_obj
def delete_snapshot(session: Session, vm_name: str, name: str) -> None:
    """Give a snapshot up; the vm runs on, and stays as it is.

    trimtab vm snapshot delete web1 before-upgrade
    """
    session.confirm(f"Delete snapshot {name} of vm {vm_name}?")
    place = SNAPSHOT.place(session, vm_name, "snapshots", name)
    resources.run(session, "DELETE", place, sentence=lambda _item: f"snapshot {name} of vm {vm_name} deleted")


def _made(item: Document) -> str:
    note = f": {humanise.plain(str(item['note']))}" if item.get("note") else ""
    return (
        f"snapshot {item.get('name', '')} of vm {item.get('vm', '')} made, {_MEANING.get(str(item.get('consistency')), '')}{note}"
    )


_MEANING = {
    "crash": "crash-consistent (as after a power cut)",
    "filesystem": "with its file systems frozen",
    "memory": "with its memory",
    "stopped": "of a vm that was off",
}
