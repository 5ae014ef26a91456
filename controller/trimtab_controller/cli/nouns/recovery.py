"""`trimtab recovery plan`: which vms come back from a repository, in which order, and whether they would."""

from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, render, resources
from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import PairType


def _groups(item: Document) -> str:
    return " → ".join(f"{one['name']} ({len(one['vms'])})" for one in item.get("groups") or [])


def _last(item: Document) -> str:
    run = item.get("last_run")
    return f"{run['mode']}: {run['state']}" if run else "never run"


def _describe(item: Document) -> None:
    render.pairs(
        [
            ("id", str(item.get("id", ""))),
            ("name", str(item.get("name", ""))),
            ("repository", str(item.get("repo", ""))),
            ("networks", ", ".join(f"{one}={other}" for one, other in (item.get("networks") or {}).items())),
            ("pools", ", ".join(f"{one}={other}" for one, other in (item.get("pools") or {}).items())),
            ("last run", _last(item)),
        ]
    )
    render.heading("groups")
    rows = [[str(one["name"]), ", ".join(one["vms"]), f"{one['delay_s']}s", _awaited(one)] for one in item.get("groups") or []]
    render.table(["GROUP", "VMS", "AFTER", "AWAITS"], rows)
    if item.get("last_run"):
        _show_run(item["last_run"])


def _awaited(group: Document) -> str:
    shown = str(group["pattern"] or group["awaits"])
    return f"{shown}; tcp {group['tcp']} in tests" if group.get("tcp") else shown


def _show_run(run: Document) -> None:
    render.heading(f"run ({run.get('mode')}): {run.get('state')}" + (f": {run['problem']}" if run.get("problem") else ""))
    rows = [
        [
            str(group["name"]),
            str(one["vm"]),
            str(one["outcome"]),
            str(one["backup"]),
            humanise.duration(one["loss_window_s"]) if one["backup"] else "",
            f"{one['recovery_ms'] / 1000:.1f}s" if one["recovery_ms"] else "",
            humanise.plain(one["problem"]),
        ]
        for group in run.get("groups") or []
        for one in group["vms"]
    ]
    render.table(["GROUP", "VM", "OUTCOME", "BACKUP", "WOULD LOSE", "TOOK", "PROBLEM"], rows)


PLAN = Resource(
    noun="recovery plan",
    collection="recovery-plans",
    columns=(
        Column("name", "name"),
        Column("groups", "groups", lambda item, _now: _groups(item)),
        Column("repo", "repo"),
        Column("last run", "last_run", lambda item, _now: _last(item)),
        Column("id", "id", is_wide=True),
    ),
    describe=_describe,
)
_name = click.argument("name", shell_complete=completion.names_of("recovery-plans"))
_mode = click.option(
    "--mode", type=click.Choice(["test", "real"]), default="test", show_default=True, help="Boot tests, or for real."
)

_repo = click.option("--repo", metavar="NAME", shell_complete=completion.names_of("backup-repos"), help="Else the only one.")
_networks = click.option(
    "--network", "networks", type=PairType("lan=lan2"), multiple=True, help="Network in the backups = one here; repeats."
)
_pools = click.option(
    "--pool", "pools", type=PairType("local=fast"), multiple=True, help="Pool in the backups = one here; repeats."
)


@click.group()
def recovery() -> None:
    """Disaster recovery: plans of what comes back from a repository."""


@recovery.group()
def plan() -> None:
    """Ordered groups of vms that come back from a repository, also on another fleet."""


@plan.command("list")
@options.lists
@click.pass_obj
def list_plans(session: Session) -> None:
    """List the project's recovery plans. Filter by name, repo."""
    resources.list_all(session, PLAN)


@plan.command("get")
@_name
@options.reads
@click.pass_obj
def get_plan(session: Session, name: str) -> None:
    """Show a plan and its last run."""
    resources.get_one(session, PLAN, name)


@plan.command("create")
@click.argument("name")
@click.option(
    "--group", "groups", multiple=True, metavar="NAME=VM,VM", type=PairType("data=db1,db2"), help="In their order; repeats."
)
@click.option(
    "--file", "file", type=click.File("r"), metavar="FILE", help="Groups as YAML, with delay_s, awaits, pattern, tcp, timeout_s."
)
@_repo
@click.option("--awaits", type=click.Choice(["started", "agent"]), help="Of groups given by --group: what counts as back.")
@click.option(
    "--tcp",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    help="Of groups given by --group: where a boot test is answered; a real run does not ask.",
)
@_networks
@_pools
@options.changes
@click.pass_obj
def create_plan(
    session: Session, /, name: str, groups: Any, file: Any, awaits: str | None, tcp: int | None, **given: Any
) -> None:
    """Write a plan down. Each group begins once the one before shows what is awaited of it.

    \b
    trimtab recovery plan create site --group data=db1,db2 --group front=web1,web2 --awaits agent --network lan=lan2
    """
    if bool(groups) == (file is not None):
        raise usage("give groups by --group, or all of them by --file")
    shown = {key: value for key, value in (("awaits", awaits), ("tcp", tcp)) if value}
    if shown and file is not None:
        raise usage(f"--{next(iter(shown))} is of groups given by --group; of {file.name} each group says its own")
    wanted = [{"name": key, "vms": vms.split(","), **shown} for key, vms in groups]
    if file is not None:
        import yaml  # here alone, since every other command starts faster without it

        wanted = yaml.safe_load(file)
        if not isinstance(wanted, list):
            raise usage(f"{file.name} holds no list of groups: `- {{name: data, vms: [db1], awaits: agent}}`")
    body: dict[str, Any] = {"name": name, "groups": wanted, "networks": dict(given["networks"]), "pools": dict(given["pools"])}
    if given["repo"]:
        body["repo"] = given["repo"]
    answer = resources.change(session, "POST", PLAN.place(session), body)
    resources.show_changed(session, PLAN, answer, f"recovery plan {name} is made; `trimtab recovery plan run {name}` tests it")


@plan.command("import")
@click.argument("name")
@_repo
@_networks
@_pools
@options.changes
@click.pass_obj
def import_plan(session: Session, /, name: str, repo: str | None, networks: Any, pools: Any) -> None:
    """Write a plan down as the repository's newest backup that knows it says it: where the database that had it is gone.

    \b
    trimtab recovery plan import site --repo found --network lan=lan2
    """
    body: dict[str, Any] = {"name": name, "networks": dict(networks), "pools": dict(pools)}
    if repo:
        body["repo"] = repo
    answer = resources.change(session, "POST", PLAN.place(session, verb="import"), body)
    resources.show_changed(
        session, PLAN, answer, f"recovery plan {name} is taken over; `trimtab recovery plan run {name} --dry-run` looks at it"
    )


@plan.command("run")
@_name
@_mode
@options.destroys
@options.runs
@click.pass_obj
def run_plan(session: Session, name: str, mode: str) -> None:
    """Test whether a plan's vms come up from their backups, or bring them back. `--dry-run` shows what would come, and what is lost.

    \b
    trimtab recovery plan run site --mode real --dry-run
    """
    if session.is_dry_run:
        found = session.client.get(f"{PLAN.place(session, name)}/preview", {"mode": mode})
        render.show_one(session, found, (), _show_run)
        return
    if mode == "real":
        session.confirm(f"Bring the vms of recovery plan {name} back, in project {session.project}?")
    resources.run(
        session,
        "POST",
        PLAN.place(session, name, verb="run"),
        {"mode": mode},
        sentence=lambda item: _sentence(name, item.get("result") or {}),
    )


def _sentence(name: str, result: Document) -> str:
    why = f": {result['problem']}" if result.get("problem") else ""
    lost = humanise.duration(result.get("loss_window_s") or 0)
    return (
        f"plan {name} ({result.get('mode')}) is {result.get('state')}: {result.get('back')} vms came back in "
        f"{(result.get('took_ms') or 0) / 1000:.0f} s with at most {lost} lost, {result.get('present')} were here, "
        f"{result.get('missing')} are missing{why}"
    )


@plan.command("delete")
@_name
@options.destroys
@options.changes
@click.pass_obj
def delete_plan(session: Session, name: str) -> None:
    """Remove a plan; what it brought back stays."""
    session.confirm(f"Delete recovery plan {name} of project {session.project}?")
    answer = resources.change(session, "DELETE", PLAN.place(session, name))
    resources.show_changed(session, PLAN, answer, f"recovery plan {name} deleted")
