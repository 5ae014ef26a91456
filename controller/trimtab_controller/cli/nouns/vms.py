"""`trimtab vm`: machines. How they are shown: `vm_views.py`; the making of one: `vm_create.py`."""

from collections.abc import Callable, Sequence
from typing import Any

import click

from trimtab_controller.cli import completion, options, resources
from trimtab_controller.cli.errors import CommandFailed, usage
from trimtab_controller.cli.nouns import secgroups
from trimtab_controller.cli.nouns.snapshots import snapshot
from trimtab_controller.cli.nouns.templates import clone
from trimtab_controller.cli.nouns.vm_adoption import adopt, diff, reconcile, release
from trimtab_controller.cli.nouns.vm_changes import attach, cdrom, detach, resize, set_ha, set_resources
from trimtab_controller.cli.nouns.vm_create import create
from trimtab_controller.cli.nouns.vm_import import import_vm
from trimtab_controller.cli.nouns.vm_sessions import console, ssh
from trimtab_controller.cli.nouns.vm_views import COLUMNS, describe, outcome, show_decision
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import BALLOON, DurationType, PairType

VM = Resource(
    noun="vm",
    collection="vms",
    columns=COLUMNS,
    describe=describe,
    is_streamed=True,
    has_basic_view=True,
    filter_paths={
        "name": "name",
        "host": "host",
        "state": "observed.state",
        "desired": "desired.power",
        "image": "image",
        "arch": "shape.arch",
    },
)

_name = click.argument("name", shell_complete=completion.names_of("vms"))
_GRACE = DurationType(maximum="1d", example="60s")


@click.group()
def vm() -> None:
    """Virtual machines."""


vm.add_command(create)
vm.add_command(import_vm)
vm.add_command(adopt)
vm.add_command(release)
vm.add_command(diff)
vm.add_command(reconcile)
vm.add_command(resize)
vm.add_command(attach)
vm.add_command(detach)
vm.add_command(cdrom)
vm.add_command(snapshot)
vm.add_command(clone)
vm.add_command(console)
vm.add_command(ssh)


@vm.command("list")
@options.lists
@click.option("--deleted", is_flag=True, help="Also those that `undelete` can bring back.")
@click.pass_obj
def list_vms(session: Session, deleted: bool) -> None:
    """List vms.

    Filter by name, host, state, desired, image, arch, network.
    """
    resources.list_all(session, VM, {"show_deleted": True} if deleted else None)


@vm.command("get")
@_name
@options.reads
@click.pass_obj
def get_vm(session: Session, name: str) -> None:
    """Show a vm with its disks, nics and what runs for it."""
    resources.get_one(session, VM, name)


@vm.command("update")
@_name
@click.option("--label", "labels", type=PairType("tier=web"), multiple=True, help="Set a label; repeats.")
@click.option("--unset-label", "unset", multiple=True, metavar="KEY", help="Remove a label; repeats.")
@click.option("--drain-policy", type=click.Choice(["migrate", "restart", "wait"]),
              help="What a drain may do: move it live (default), also stop and start it, or leave it to you.")  # fmt: skip
@click.option("--backup-policy", metavar="NAME", shell_complete=completion.names_of("backup-policies"),
              help="Back it up by this policy; '' takes it off.")  # fmt: skip
@click.option("--secgroup", "groups", multiple=True, metavar="NAME", shell_complete=completion.names_of("secgroups"),
              help="Into these security groups and no others; repeats.")  # fmt: skip
@click.option("--no-secgroups", is_flag=True, help="Out of every security group: anything may reach it.")
@click.option("--balloon-min", type=BALLOON, metavar="SIZE",
              help="Its balloon may leave it so little while its host is short of memory; 0 takes the balloon away.")  # fmt: skip
@click.option("--cpu-class", type=click.Choice(["low", "normal", "high", "none"]), help="Its share of a busy host's cpus.")
@click.option("--ha", type=click.Choice(["restart", "none"]), help="Whether it restarts elsewhere when its host dies.")
@click.option("--priority", type=click.IntRange(-1000, 1000), help="Higher ones restart first.")
@click.option("--start-delay", "start_delay_s", type=DurationType(maximum="1d", example="30s"),
              help="Restart it so long after its host was proven off, in a start group after those before it.")  # fmt: skip
@click.option("--start-group", metavar="NAME", help="After a loss vms of one start group start in order; '' takes it out.")
@click.option("--start-order", type=click.IntRange(0, 1000), help="It starts once all kept ones of lower order in its group run.")
@click.option("--no-start-group", is_flag=True, help="Out of its start group.")
@click.option("--no-drivers-iso", is_flag=True, help="Take the drive with drivers away, at its next start.")
@options.runs
@click.pass_obj
def update(
    session: Session,
    name: str,
    labels: Sequence[tuple[str, str]],
    unset: Sequence[str],
    drain_policy: str | None,
    backup_policy: str | None,
    groups: Sequence[str],
    no_secgroups: bool,
    balloon_min: int | None,
    cpu_class: str | None,
    ha: str | None,
    priority: int | None,
    start_delay_s: int | None,
    start_group: str | None,
    start_order: int | None,
    no_start_group: bool,
    no_drivers_iso: bool,
) -> None:
    """Change a vm's labels, what a drain may do with it, the policy that backs it up, what may reach it, what it gets of its host,
    what becomes of it when its host dies.

    \b
    trimtab vm update db --ha restart --priority 10 --start-delay 30s
    trimtab vm update web1 --start-group shop --start-order 2
    """
    body: dict[str, Any] = _given({"drain_policy": drain_policy, "backup_policy": backup_policy})
    if no_drivers_iso:
        body["drivers_iso"] = ""
    if no_start_group and (start_group or start_order is not None):
        raise usage("give either --start-group and --start-order or --no-start-group")
    survival = {"ha": ha, "priority": priority, "start_delay_s": start_delay_s}
    survival |= {"start_group": "" if no_start_group else start_group, "start_order": start_order}
    if _given(survival):
        if body or labels or unset or groups or no_secgroups or balloon_min is not None or cpu_class is not None:
            options_of_it = "--ha, --priority, --start-delay, --start-group and --start-order"
            raise usage(f"what becomes of a vm without its host changes by itself; give {options_of_it} alone")
        set_ha(session, name, _given(survival))
        return
    if balloon_min is not None or cpu_class is not None:
        if body or labels or unset or groups or no_secgroups:
            raise usage("what a vm gets of its host changes by itself, in an operation; give --balloon-min and --cpu-class alone")
        set_resources(session, name, balloon_min=balloon_min, cpu_class=cpu_class)
        return
    if groups or no_secgroups:
        if body or labels or unset or (groups and no_secgroups):
            raise usage("security groups change by themselves, in an operation; give --secgroup or --no-secgroups alone")
        secgroups.set_for_vm(session, name, groups)
        return
    if labels or unset or not body:
        body["labels"] = resources.label_changes(labels, unset)
    answer = resources.change(session, "PATCH", VM.place(session, name), body)
    what = " and ".join(key.replace("_", " ") for key in sorted(body))
    resources.show_changed(session, VM, answer, f"vm {name}: {what} changed")


@vm.command()
@_name
@click.option("--to", "to_host", metavar="HOST", shell_complete=completion.names_of("hosts"), help="On this host, or not at all.")
@options.runs
@click.pass_obj
def start(session: Session, name: str, to_host: str | None) -> None:
    """Place a stopped vm and start it."""
    _run(session, name, "start", _given({"to_host": to_host}))


@vm.command()
@_name
@click.option("--force", is_flag=True, help="Cut its power at once; what it has not written is lost.")
@click.option("--grace", type=_GRACE, help="How long the guest may take to shut down before its power is cut.")
@options.runs
@click.pass_obj
def stop(session: Session, name: str, force: bool, grace: int | None) -> None:
    """Shut a vm down: gracefully, then by force."""
    _run(session, name, "stop", _given({"force": force or None, "timeout_s": grace}))


@vm.command()
@_name
@click.option("--force", is_flag=True, help="Reset it; what it has not written is lost.")
@options.runs
@click.pass_obj
def reboot(session: Session, name: str, force: bool) -> None:
    """Restart the guest in place."""
    _run(session, name, "reboot", _given({"force": force or None}))


@vm.command()
@_name
@options.runs
@click.pass_obj
def pause(session: Session, name: str) -> None:
    """Stop a vm's CPUs; its memory stays."""
    _run(session, name, "pause", {})


@vm.command()
@_name
@options.runs
@click.pass_obj
def resume(session: Session, name: str) -> None:
    """Let a paused vm go on."""
    _run(session, name, "resume", {})


@vm.command()
@_name
@click.option(
    "--to",
    "to_host",
    metavar="HOST",
    shell_complete=completion.names_of("hosts"),
    help="The target; else the scheduler's choice.",
)
@click.option("--bandwidth", "bandwidth_mib_s", type=click.IntRange(1, 1_000_000), metavar="MIB/S", help="Use this much at most.")
@click.option("--auto-converge", is_flag=True, help="Slow the guest down where it writes faster than it can be copied.")
@click.option(
    "--allow-postcopy", is_flag=True, help="Switch over before all is copied if needed: a failure then loses its memory."
)
@click.option(
    "--give-up-after", type=DurationType(maximum="7d", example="30m"), help="Cancel the migration then; the vm stays where it is."
)
@options.runs
@click.pass_obj
def migrate(
    session: Session,
    name: str,
    to_host: str | None,
    bandwidth_mib_s: int | None,
    auto_converge: bool,
    allow_postcopy: bool,
    give_up_after: int | None,
) -> None:
    """Move a running vm to another host without stopping it."""
    body = {
        "to_host": to_host,
        "bandwidth_mib_s": bandwidth_mib_s,
        "auto_converge": auto_converge or None,
        "allow_postcopy": allow_postcopy or None,
        "timeout_s": give_up_after,
    }
    _run(session, name, "migrate", _given(body))


@vm.command()
@_name
@options.destroys
@options.runs
@click.pass_obj
def delete(session: Session, name: str) -> None:
    """Stop and delete a vm with its disks; `undelete` brings it back while it is kept."""
    session.confirm(f"Delete vm {name} of project {session.project}?")
    resources.run(
        session,
        "DELETE",
        VM.place(session, name),
        sentence=lambda _operation: f"vm {name} deleted; while it is kept: trimtab vm undelete {name}",
    )


@vm.command()
@click.argument("name")
@options.runs
@click.pass_obj
def undelete(session: Session, name: str) -> None:
    """Bring a deleted vm back, stopped."""
    _run(session, name, "undelete", {})


@vm.command()
@click.argument("name")
@options.destroys
@options.runs
@click.pass_obj
def purge(session: Session, name: str) -> None:
    """Remove a deleted vm and its disks for good, before its 24 h are over.

    trimtab vm purge web1
    """
    session.confirm(f"Remove the disks of deleted vm {name} of project {session.project} for good?")
    sentence = f"vm {name} and its disks are gone"
    resources.run(session, "POST", VM.place(session, name, verb="purge"), {}, sentence=lambda _operation: sentence)


@vm.command()
@_name
@click.option(
    "--why-not", "why_not", metavar="HOST", shell_complete=completion.names_of("hosts"), help="Only: why not this host?"
)
@options.reads
@click.pass_obj
def explain(session: Session, name: str, why_not: str | None) -> None:
    """Say why a vm is where it is, and why not elsewhere."""
    decision = session.client.get(VM.place(session, name, verb="explain"), {"why_not": why_not} if why_not else None)
    show_decision(session, decision, name, why_not=why_not or "")


def _run(session: Session, name: str, verb: str, body: dict[str, Any]) -> None:
    _with_hint(
        name,
        lambda: resources.run(
            session,
            "POST",
            VM.place(session, name, verb=verb),
            body,
            reread=lambda: resources.read(session, VM, name),
            sentence=outcome,
            resource=VM,
        ),
    )


def _with_hint(name: str, work: Callable[[], None]) -> None:
    """Run, and where no host fits point at the reasons."""
    try:
        work()
    except CommandFailed as error:
        if error.kind == "no_capacity" and (not error.hint or error.hint.startswith("trimtab op get")):
            error.hint = f"trimtab op explain {error.operation_id}" if error.operation_id else f"trimtab vm explain {name}"
        raise


def _given(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if value is not None}
