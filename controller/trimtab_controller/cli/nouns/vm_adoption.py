"""`trimtab vm adopt`, `release` and `diff`: domains of others, and what was changed by hand."""

from collections.abc import Sequence
from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, render, resources
from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.nouns.vm_views import COLUMNS, describe
from trimtab_controller.cli.render import Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import PairType

_VM = Resource(noun="vm", collection="vms", columns=COLUMNS, describe=describe)
_ACCEPTED = "Take over what it runs with: vcpus, memory, limits of a disk, a card that came, a card or disk that is gone."
_name = click.argument("name", shell_complete=completion.names_of("vms"))


@click.command()
@click.argument("domain", metavar="HOST/DOMAIN")
@click.option("--name", metavar="NAME", help="What the vm is called; the domain's name by default.")
@click.option("--network", "networks", type=PairType("virbr0=lan"), multiple=True,
              help="Which network a bridge or libvirt network is; repeats.")  # fmt: skip
@options.runs
@click.pass_obj
def adopt(session: Session, domain: str, name: str | None, networks: Sequence[tuple[str, str]]) -> None:
    """Take a libvirt domain under control while it runs.

    The guest notices nothing. --dry-run lists what becomes of it, what its own definition keeps until its next stop, and what refuses.

    trimtab vm adopt node1/legacy-db --dry-run
    """
    host, _, domain_name = domain.partition("/")
    if not host or not domain_name:
        raise usage("name the host and its domain, for example node1/legacy-db")
    body: dict[str, Any] = {"host": host, "domain": domain_name}
    body |= {key: value for key, value in (("name", name), ("networks", dict(networks))) if value}
    path = _VM.place(session, verb="adopt")
    answer = resources.change(session, "POST", path, body)
    if session.is_dry_run and not session.is_machine_output:
        _show_plan(answer["adoption"])
        return
    what = f"vm {name or domain_name} was adopted from domain {domain_name} of host {host}"
    resources.follow(session, answer, sentence=lambda _vm: what, resource=_VM)


@click.command()
@_name
@click.option("--autostart", is_flag=True, help="Let libvirt start it when its host boots.")
@options.runs
@click.pass_obj
def release(session: Session, name: str, autostart: bool) -> None:
    """Make a vm a plain libvirt domain, which goes on running; its files stay."""
    body = {"autostart": True} if autostart else None
    path = _VM.place(session, name, verb="release")
    resources.run(session, "POST", path, body, sentence=lambda _operation: f"vm {name} is a plain libvirt domain now")


@click.command()
@_name
@options.reads
@click.pass_obj
def diff(session: Session, name: str) -> None:
    """Show what of a vm's domain is not as it shall be: changes made by hand."""
    found = session.client.get(_VM.place(session, name, verb="diff"))
    if session.is_machine_output:
        render.write_json(found)
        return
    if found["is_original_in_force"]:
        render.say(f"vm {name} keeps the definition it was adopted with until its next stop")
    if not found["is_drifted"]:
        render.write_line(f"vm {name} is as it shall be")
    for one in found["differences"]:
        words = [
            f"shall be {one['desired'] or 'absent'}",
            f"runs with {one['live'] or 'none'}",
            f"stored {one['stored'] or 'none'}",
        ]
        render.write_line(f"{humanise.plain(one['field'])}: {', '.join(humanise.plain(word) for word in words)}")


@click.command()
@_name
@click.option(
    "--accept",
    "mode",
    flag_value="accept",
    help=_ACCEPTED,
)
@click.option("--revert", "mode", flag_value="revert", help="Put back what the vm shall be; what cannot live, at its next stop.")
@options.runs
@click.pass_obj
def reconcile(session: Session, name: str, mode: str | None) -> None:
    """Settle what somebody changed by hand; `trimtab vm diff` shows it."""
    if mode is None:
        raise usage("give either --accept or --revert")
    path = _VM.place(session, name, verb="reconcile")
    resources.run(session, "POST", path, {"mode": mode}, sentence=lambda ended: _reconciled(name, ended))


def _reconciled(name: str, ended: Document) -> str:
    left = (ended.get("result") or {}).get("left") or []
    return f"vm {name} is reconciled" + (f"; at its next stop: {humanise.plain('; '.join(left))}" if left else "")


def _show_plan(adoption: dict[str, Any]) -> None:
    shape = f"{adoption['vcpus']} vcpus, {adoption['memory_mib']} MiB, {adoption['firmware']}, {adoption['cpu_model']}"
    lines = [
        f"dry run, nothing was changed: domain {adoption['domain']} of host {adoption['host']} is {adoption['state']}",
        shape,
    ]
    lines += [f"volume: {disk['target']} {disk['path']} in pool {disk['pool']}" for disk in adoption["disks"]]
    lines += [f"card: {nic['mac']} {nic['model']} on network {nic['network']}" for nic in adoption["nics"]]
    lines += [f"kept until its next stop, gone after it: {part}" for part in adoption["kept"]]
    lines += [f"after its next stop: {change}" for change in adoption["changes_at_next_stop"]]
    lines += [f"refused: {one['message']}" for one in adoption["refusals"]] or ["it can be adopted"]
    for line in lines:
        render.write_line(humanise.plain(line))
