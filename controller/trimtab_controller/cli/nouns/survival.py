"""`trimtab failover` and `trimtab capacity`: what would be left, and what still fits."""

from collections.abc import Sequence
from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, render
from trimtab_controller.cli.errors import CommandFailed, ExitCode
from trimtab_controller.cli.paths import join
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import PairType, SizeType

_MEMORY = SizeType(in_mib=True, minimum="16MiB", maximum="16TiB", example="16GiB")


_FIGURES = (
    Column("name", "name"),
    Column("hosts", "host_count", lambda item, _now: f"{item.get('open_count')}/{item.get('host_count')}"),
    Column("vms", "vm_count"),
    Column("vcpus_free", "vcpus_free", lambda item, _now: f"{item.get('vcpus_free')}/{item.get('vcpus_limit')}"),
    Column("memory_free", "memory_free_mib", lambda item, _now: _of(item, "memory_free_mib", "memory_limit_mib")),
    Column("used_cores", "used_millis", lambda item, _now: f"{float(item.get('used_millis') or 0) / 1000:.1f}"),
    Column("stranded", "stranded_vcpus", lambda item, _now: _stranded(item)),
    Column("largest", "largest_by_memory", lambda item, _now: _largest(item)),
)


def _of(item: Document, part: str, whole: str) -> str:
    return f"{humanise.mib(item.get(part))}/{humanise.mib(item.get(whole))}"


def _stranded(item: Document) -> str:
    return f"{item.get('stranded_vcpus')} vcpus, {humanise.mib(item.get('stranded_memory_mib'))}"


def _largest(item: Document) -> str:
    shape: Any = item.get("largest_by_memory") or {}
    return f"{shape.get('vcpus')} vcpus with {humanise.mib(shape.get('memory_mib'))}"


@click.group()
def failover() -> None:
    """What survives the loss of hosts, racks, zones."""


@failover.command("check")
@click.option(
    "--by", "kinds", multiple=True, metavar="KIND", help="host, pool or a label's key; repeats. Default: host, rack, zone."
)
@click.option(
    "-l", "--selector", "labels", type=PairType("rack=r2"), multiple=True, help="Only the domain of this label; repeats."
)
@click.option("--vms", "by_vm", is_flag=True, help="Every vm that runs: covered or not, and why.")
@options.reads
@click.pass_obj
def check(session: Session, kinds: Sequence[str], labels: Sequence[tuple[str, str]], by_vm: bool) -> None:
    """Tell which vms the rest of the fleet could not restart, and why. Exit code 3 where there are some."""
    given = {"by": ",".join(kinds), "selector": ",".join(f"{key}={value}" for key, value in labels)}
    given |= {"vms": "true"} if by_vm else {}
    found: Document = session.client.get(join("failover-coverage"), {key: value for key, value in given.items() if value} or None)
    if session.is_machine_output:
        render.show_one(session, found, ())
    else:
        _tell(found)
    if not found.get("is_covered"):
        lost = sorted({one["vm"] for domain in found.get("domains") or [] for one in domain.get("uncovered") or []})
        raise CommandFailed(
            f"{len(lost)} vms would not come back: {', '.join(lost[:8])}{', …' if len(lost) > 8 else ''}",
            code="not-covered",
            hint="trimtab capacity get",
            exit_with=ExitCode.CHECK_FAILED,
        )


def _tell(found: Document) -> None:
    domains = found.get("domains") or []
    for one in found.get("vms") or []:
        render.write_line(f"{one['vm']}: {'not covered' if one['coverage'] == 'uncovered' else one['coverage']}: {one['reason']}")
    for domain in domains if not found.get("vms") else ():
        for one in domain.get("uncovered") or []:
            render.write_line(f"{domain['kind']} {domain['name']}: {one['vm']}: {one['reason']}")
    for one in found.get("local_vms") or []:
        render.write_line(f"host {one['host']}: {one['vm']} has disks on it alone: {_left_of(one)}")
    covered = sum(1 for domain in domains if domain.get("is_covered"))
    unprotected = max((int(domain.get("unprotected_count") or 0) for domain in domains), default=0)
    aside = f"; up to {unprotected} vms of one domain have no high availability" if unprotected else ""
    render.write_line(f"{covered} of {len(domains)} failure domains are covered{aside}")


def _left_of(one: Document) -> str:
    """Say what is left of a vm on local disks once its host is lost."""
    why = humanise.plain(one.get("why") or "")
    if one.get("comes_back"):
        return why
    if one.get("backup") is None:
        return f"all of it would be lost, there is no whole backup of it; {why}"
    age = humanise.since(one.get("backup_at"), render.now())
    return f"it would not come back by itself: {why}; its last whole backup is {one['backup']}, {age}"


@click.group()
def capacity() -> None:
    """What there is, what is left, and what fits."""


@capacity.command("get")
@click.option("--by", metavar="LABEL", help="One line for each value of this label, for example zone.")
@options.reads
@click.pass_obj
def get_capacity(session: Session, by: str | None) -> None:
    """Show what is free, used and stranded, and the largest plain vm that still fits.

    A plain vm tolerates no taint, is of no project that has hosts of its own, asks for nothing special, and has a disk on any pool
    that is ready on its host and not full. Ask `trimtab vm create --dry-run` about any other.
    """
    found: Document = session.client.get(join("capacity"), {"by": by} if by else None)
    render.show_list(session, found.get("items") or [], _FIGURES, empty="the fleet has no hosts")


@capacity.command("fit")
@click.option("--vcpus", type=click.IntRange(1, 1024), required=True, help="Of one vm.")
@click.option("--memory", "memory_mib", type=_MEMORY, required=True, help="Of one vm, for example 16GiB.")
@click.option("--without", multiple=True, metavar="HOST", shell_complete=completion.names_of("hosts"),
              help="As if this host were gone and its vms restarted elsewhere; repeats.")  # fmt: skip
@click.option("--add", multiple=True, metavar="NxCORESc/MEMORY", help="As if there were more hosts, for example 2x64c/256GiB.")
@click.option("--keep-free", is_flag=True, help="Keep so much free that any one host may be lost.")
@click.option("-l", "--host-selector", "labels", type=PairType("zone=z1"), multiple=True, help="Only on hosts with this label.")
@options.reads
@click.pass_obj
def fit(
    session: Session,
    vcpus: int,
    memory_mib: int,
    without: Sequence[str],
    add: Sequence[str],
    keep_free: bool,
    labels: Sequence[tuple[str, str]],
) -> None:
    """Tell how many more vms of a shape fit. Exit code 7 where none does."""
    body: dict[str, Any] = {"vcpus": vcpus, "memory_mib": memory_mib}
    optional = {"without": list(without), "add": list(add), "keep_free_hosts": int(keep_free), "host_selector": dict(labels)}
    found: Document = session.client.send(
        "POST", join("capacity") + ":fit", body | {key: value for key, value in optional.items() if value}
    )
    if session.is_machine_output:
        render.show_one(session, found, ())
    else:
        least = "at least " if found.get("is_capped") else ""
        render.write_line(f"{least}{found['count']} more vms of {vcpus} vcpus and {humanise.mib(memory_mib)} fit")
        if found.get("largest_by_memory"):
            render.write_line(f"the largest that fits: {_largest(found)}")
        for name in found.get("homeless") or []:
            render.write_line(f"vm {name} would have no place")
    if not found["count"]:
        raise CommandFailed(str(found.get("refusal") or "none fits"), code="no-host-fits", kind="no_capacity")
