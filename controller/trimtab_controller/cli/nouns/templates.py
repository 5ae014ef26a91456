"""`trimtab template`, `trimtab vm clone`, and many vms of a template at once."""

from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, render, resources
from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.nouns.vm_views import COLUMNS, describe, outcome
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session

TEMPLATE = Resource(
    noun="template",
    collection="templates",
    columns=(
        Column("name", "name"),
        Column("revision", "revision"),
        Column("state", "state"),
        Column("vcpus", "vcpus"),
        Column("memory", "memory_mib", lambda item, _now: humanise.mib(item.get("memory_mib"))),
        Column("disk", "disk_bytes", lambda item, _now: humanise.size(item.get("disk_bytes"))),
        Column("stored", "stored_bytes", lambda item, _now: humanise.size(item.get("stored_bytes"))),
        Column("age", "created_at", lambda item, now: humanise.since(item.get("created_at"), now)),
        Column("image", "image", is_wide=True),
        Column("id", "id", is_wide=True),
    ),
)
_VM = Resource(noun="vm", collection="vms", columns=COLUMNS, describe=describe)
_name = click.argument("name", shell_complete=completion.names_of("templates"))
_revision = click.option(
    "--revision", type=click.IntRange(0), default=0, help="Which revision; the newest unless told otherwise."
)


@click.group()
def template() -> None:
    """Settings of a vm and an image of its disk, to make vms of.

    trimtab vm create --template web --count 20 --name-pattern 'web-{n}'
    """


@template.command("list")
@options.reads
@click.pass_obj
def list_templates(session: Session) -> None:
    """List templates, every revision."""
    items = list(session.client.pages(TEMPLATE.place(session)))
    render.show_list(session, items, TEMPLATE.columns, empty=TEMPLATE.nothing(session))


@template.command("get")
@_name
@_revision
@options.reads
@click.pass_obj
def get_template(session: Session, name: str, revision: int) -> None:
    """Show a template."""
    found: Document = session.client.get(TEMPLATE.place(session, name), {"revision": revision})
    render.show_one(session, found, TEMPLATE.columns)


@template.command("create")
@click.argument("name")
@click.option("--from", "from_vm", metavar="VM", required=True, shell_complete=completion.names_of("vms"), help="The vm.")
@options.runs
@click.pass_obj
def create_template(session: Session, name: str, from_vm: str) -> None:
    """Make a template, or its next revision, of a vm as it is now; the vm runs on.

    trimtab template create web --from web1
    """
    resources.run(
        session,
        "POST",
        TEMPLATE.place(session),
        {"name": name, "from_vm": from_vm},
        reread=lambda: resources.read(session, TEMPLATE, name),
        sentence=lambda item: f"template {name} has revision {item.get('revision', '')}",
        resource=TEMPLATE,
    )


@template.command("delete")
@_name
@_revision
@options.destroys
@options.runs
@click.pass_obj
def delete_template(session: Session, name: str, revision: int) -> None:
    """Remove a revision of a template that no vm stands on."""
    session.confirm(f"Delete template {name}{f', revision {revision}' if revision else ', its newest revision'}?")
    query = {"revision": revision} if revision else None
    place = TEMPLATE.place(session, name)
    resources.run(session, "DELETE", place, query=query, sentence=lambda _item: f"template {name} deleted")


@click.command()
@click.argument("source", metavar="VM", shell_complete=completion.names_of("vms"))
@click.argument("name")
@click.option(
    "--linked", is_flag=True, help="Share the source's disks below what the clone writes: at once, whatever their size."
)
@click.option("--snapshot", metavar="NAME", help="As the source was then; else as it is now.")
@click.option("--start/--no-start", "start", default=True, help="Start it once it is made (default).")
@options.runs
@click.pass_obj
def clone(session: Session, source: str, name: str, linked: bool, snapshot: str | None, start: bool) -> None:
    """Make another vm like this one, which runs on; the clone has an identity of its own.

    trimtab vm clone web1 web2 --linked
    """
    body: dict[str, Any] = {"name": name, "linked": linked, "start": start}
    if snapshot:
        body["snapshot"] = snapshot
    resources.run(
        session,
        "POST",
        _VM.place(session, source, verb="clone"),
        body,
        reread=lambda: resources.read(session, _VM, name),
        sentence=outcome,
        resource=_VM,
    )


def create_from_template(
    session: Session,
    wanted: str,
    *,
    name: str,
    count: int | None,
    name_pattern: str,
    pool: str | None,
    to_host: str | None,
    start: bool,
) -> None:
    """Carry out `trimtab vm create --template`; `wanted` is `web` or `web@3`."""
    if bool(name) == bool(name_pattern):
        raise usage("give either a name or --name-pattern, for example --name-pattern 'web-{n}'")
    if (count or 1) > 1 and not name_pattern:
        raise usage(f"{count} vms need --name-pattern, for example --name-pattern 'web-{{n}}'")
    called, _, revision = wanted.partition("@")
    if revision and not revision.isdigit():
        raise usage(f"--template {wanted}: a revision is a number, for example {called}@2")
    body: dict[str, Any] = {"name_pattern": name or name_pattern, "count": count or 1, "start": start}
    body |= {key: value for key, value in (("pool", pool), ("to_host", to_host)) if value}
    if revision:
        body["revision"] = int(revision)
    made = (
        f"{count} vms made of template {called}" if (count or 1) > 1 else f"vm {name or name_pattern} made of template {called}"
    )
    place = TEMPLATE.place(session, called, verb="create-vms")
    resources.run(session, "POST", place, body, sentence=lambda _item: made)
