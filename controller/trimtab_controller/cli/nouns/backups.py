"""`trimtab backup`: repositories, policies, backups, and how well vms are protected."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, render, resources
from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.nouns.backup_export import export
from trimtab_controller.cli.nouns.backup_instants import instant
from trimtab_controller.cli.nouns.backup_keys import (
    confirm,
    follow_repo,
    keep_key,
    key_file_option,
    read_key,
    repo_name,
    require_new,
    rotate_key,
)
from trimtab_controller.cli.nouns.backup_views import BACKUP, POLICY, REPO, STATUS
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import DurationType, PairType

_policy_name = click.argument("name", shell_complete=completion.names_of("backup-policies"))
_backup_id = click.argument("backup_id", metavar="BACKUP", shell_complete=completion.names_of("backups"))


@click.group()
def backup() -> None:
    """Backups: repositories, policies, and what is proven of them."""


backup.add_command(export)
backup.add_command(instant)


# --- repositories --------------------------------------------------------------------------------------------------------------


@backup.group()
def repo() -> None:
    """Where backups are kept: a folder, also on NFS, or a bucket."""


repo.add_command(confirm)
repo.add_command(rotate_key)


@repo.command("list")
@options.lists
@click.pass_obj
def list_repos(session: Session) -> None:
    """List repositories. Filter by name, state."""
    resources.list_all(session, REPO)


@repo.command("get")
@repo_name
@options.reads
@click.pass_obj
def get_repo(session: Session, name: str) -> None:
    """Show a repository with what is in it."""
    resources.get_one(session, REPO, name)


@repo.command("create")
@click.argument("name")
@click.option("--url", required=True, metavar="URL", help="file:///srv/backup or s3://bucket/prefix.")
@click.option("--host", metavar="HOST", shell_complete=completion.names_of("hosts"), help="The folder is on this host only.")
@click.option("--of-project", "of_project", metavar="NAME", help="It keeps vms of this project only.")
@click.option("--endpoint", metavar="URL", help="Of a bucket elsewhere than at AWS.")
@click.option("--region", metavar="NAME", help="Of a bucket.")
@click.option("--access-key-id", metavar="ID", help="Of a bucket.")
@click.option("--secret-file", type=click.File("r"), metavar="FILE", help="Holds the bucket's secret access key.")
@click.option("--allow-http", is_flag=True, help="The endpoint has no TLS.")
@click.option("--fleet-id", metavar="ID", help="With --existing: of the fleet that made it, which is gone.")
@click.option("--existing", is_flag=True, help="It is there already; --key-file holds its key.")
@key_file_option
@options.runs
@click.pass_obj
def create_repo(session: Session, /, name: str, key_file: Path | None, existing: bool, **given: Any) -> None:
    """Make a repository. It is not finished before its key is saved: without it nobody can ever restore.

    \b
    trimtab backup repo create main --url file:///srv/backup --key-file main.key
    trimtab backup repo create main --url file:///srv/backup        (shows the key, asks for it)
    """
    body = _repo_body(name, given)
    if not existing:
        require_new(key_file)
    if existing:
        body["key"] = read_key(key_file)
    answer = resources.change(session, "POST", REPO.place(session), body)
    if session.is_dry_run:
        resources.show_dry_run(session, answer, f"backup repository {name}")
        return
    if not existing:
        key = keep_key(str(answer["key"]), key_file)
        answer = resources.change(session, "POST", REPO.place(session, name, verb="confirm"), {"key": key})
    follow_repo(session, name, answer)


@repo.command("rebuild")
@repo_name
@options.runs
@click.pass_obj
def rebuild_repo(session: Session, name: str) -> None:
    """List its backups anew from the repository and its key alone."""
    resources.run(
        session,
        "POST",
        REPO.place(session, name, verb="rebuild"),
        reread=lambda: resources.read(session, REPO, name),
        sentence=lambda item: f"repository {name} lists {item.get('backups')} backups",
        resource=REPO,
    )


@repo.command("replicate")
@repo_name
@click.option("--to", required=True, metavar="NAME", shell_complete=completion.names_of("backup-repos"), help="The other one.")
@click.option("--bandwidth", type=click.IntRange(0, 1_000_000), metavar="MIB/S", help="Read a second at most.")
@options.runs
@click.pass_obj
def replicate_repo(session: Session, name: str, to: str, bandwidth: int | None) -> None:
    """Copy what another repository does not list yet into it, under its own key. A run that broke off is gone on with.

    \b
    trimtab backup repo replicate main --to second
    """
    resources.run(
        session,
        "POST",
        REPO.place(session, name, verb="replicate"),
        {"to": to, **({"bandwidth_mib_s": bandwidth} if bandwidth else {})},
        sentence=lambda item: (
            f"{to} has what {name} lists; {humanise.size((item.get('result') or {}).get('read_bytes'))} were read"
        ),
    )


@repo.command("delete")
@repo_name
@options.destroys
@options.changes
@click.pass_obj
def delete_repo(session: Session, name: str) -> None:
    """Forget a repository; it stays where it lies, for who has its key."""
    session.confirm(f"Forget backup repository {name} and the list of what is in it?")
    answer = resources.change(session, "DELETE", REPO.place(session, name))
    resources.show_changed(session, REPO, answer, f"backup repository {name} is forgotten; its folder or bucket was not touched")


def _repo_body(name: str, given: dict[str, Any]) -> dict[str, Any]:
    secret = given.pop("secret_file")
    body = {"name": name, **{key: value for key, value in given.items() if value}}
    if "of_project" in body:
        body["project"] = body.pop("of_project")
    if secret is not None:
        body["secret_access_key"] = secret.read().strip()
    return body


# --- policies ------------------------------------------------------------------------------------------------------------------


@backup.group()
def policy() -> None:
    """When vms are backed up, and for how long backups stay."""


@policy.command("list")
@options.lists
@click.pass_obj
def list_policies(session: Session) -> None:
    """List the project's policies. Filter by name, repo."""
    resources.list_all(session, POLICY)


@policy.command("get")
@_policy_name
@options.reads
@click.pass_obj
def get_policy(session: Session, name: str) -> None:
    """Show a policy and the vms that have it."""
    resources.get_one(session, POLICY, name)


_COUNT = click.IntRange(0, 10_000)
_TCP_PORT = click.IntRange(1, 65535)


@policy.command("create")
@click.argument("name")
@click.option("--schedule", required=True, metavar="CRON", help='Minute, hour, day, month, weekday: "0 2 * * *".')
@click.option("--zone", metavar="ZONE", help="Of the schedule; UTC unless told otherwise.")
@click.option("--jitter", "jitter_s", type=DurationType(maximum="1d", example="10m"), help="Each vm begins up to so much later.")
@click.option("--repo", metavar="NAME", shell_complete=completion.names_of("backup-repos"), help="Where to; else the only one.")
@click.option("--keep-last", type=_COUNT, help="So many of the newest stay.")
@click.option("--keep-hourly", type=_COUNT, help="The newest of so many hours stays.")
@click.option("--keep-daily", type=_COUNT, help="The newest of so many days stays.")
@click.option("--keep-weekly", type=_COUNT, help="The newest of so many weeks stays.")
@click.option("--keep-monthly", type=_COUNT, help="The newest of so many months stays.")
@click.option("--keep-yearly", type=_COUNT, help="The newest of so many years stays; without any --keep all stay.")
@click.option("--verify", type=click.Choice(["none", "read", "boot"]), help="What is done after each backup.")
@click.option("--verify-pattern", metavar="REGEX", help="With --verify boot: what the serial port shows.")
@click.option("--verify-tcp", type=_TCP_PORT, metavar="PORT", help="With --verify boot: where the guest answers, on no network.")
@click.option("--needs-filesystem", is_flag=True, default=None, help="Fail where the guest's file systems were not frozen.")
@click.option(
    "--needs-application", is_flag=True, default=None, help="Fail where the hook in the guest did not hold its applications."
)
@click.option("--bandwidth", "bandwidth_mib_s", type=click.IntRange(0, 1_000_000), metavar="MIB/S", help="Read a second at most.")
@click.option("--together", "is_together", is_flag=True, help="All its vms at one instant, also across hosts.")
@click.option(
    "--recover-lost", "recovers_lost", is_flag=True, help="Bring a vm whose disks are lost with its host back by itself."
)
@click.option(
    "--max-age", "max_age_s", type=DurationType(maximum="3650d", example="26h"), help="Tell when the last good is older."
)
@options.changes
@click.pass_obj
def create_policy(session: Session, /, name: str, **given: Any) -> None:
    """Make a policy; `trimtab vm update VM --backup-policy NAME` gives it to a vm.

    \b
    trimtab backup policy create nightly --schedule "0 2 * * *" --keep-daily 7 --keep-weekly 4 --repo main --verify read
    trimtab backup policy create proven --schedule "0 3 * * *" --keep-daily 7 --verify boot --verify-tcp 22
    """
    body = {"name": name, **{key: value for key, value in given.items() if value is not None}}
    answer = resources.change(session, "POST", POLICY.place(session), body)
    resources.show_changed(session, POLICY, answer, f"backup policy {name} is made; give it to vms with --backup-policy {name}")


@policy.command("delete")
@_policy_name
@options.destroys
@options.changes
@click.pass_obj
def delete_policy(session: Session, name: str) -> None:
    """Remove a policy that no vm has; what it made stays."""
    session.confirm(f"Delete backup policy {name} of project {session.project}?")
    answer = resources.change(session, "DELETE", POLICY.place(session, name))
    resources.show_changed(session, POLICY, answer, f"backup policy {name} deleted")


# --- backups -------------------------------------------------------------------------------------------------------------------


@backup.command()
@click.argument("vm", shell_complete=completion.names_of("vms"))
@click.option(
    "--repo", metavar="NAME", shell_complete=completion.names_of("backup-repos"), help="Else the policy's, or the only one."
)
@click.option("--bandwidth", "bandwidth_mib_s", type=click.IntRange(0, 1_000_000), metavar="MIB/S", help="Read a second at most.")
@click.option("--needs-filesystem", is_flag=True, default=None, help="Fail where the guest's file systems were not frozen.")
@click.option(
    "--needs-application", is_flag=True, default=None, help="Fail where the hook in the guest did not hold its applications."
)
@options.runs
@click.pass_obj
def run(session: Session, /, vm: str, **given: Any) -> None:
    """Back a vm up now, running or stopped."""
    body = {"vm": vm, **{key: value for key, value in given.items() if value is not None}}
    answer = resources.change(session, "POST", BACKUP.place(session), body)
    made = str(((answer or {}).get("backup") or {}).get("id", ""))
    resources.follow(session, answer, reread=lambda: resources.read(session, BACKUP, made), sentence=_made, resource=BACKUP)


def _made(item: Any) -> str:
    read, stored = humanise.size(item.get("read_bytes")), humanise.size(item.get("stored_bytes"))
    less = f"; {item['downgrade']}" if item.get("downgrade") else ""
    return f"{item.get('id')}: {item.get('consistency')}-consistent, {read} read, {stored} stored{less}"


@backup.command("list")
@click.option("--vm", metavar="NAME", shell_complete=completion.names_of("vms"), help="Of this vm, deleted ones too.")
@options.lists
@click.pass_obj
def list_backups(session: Session, vm: str | None) -> None:
    """List backups, newest first. Filter by vm, repo, state."""
    resources.list_all(session, BACKUP, {"filter": f"vm={vm}"} if vm else None)


@backup.command("get")
@_backup_id
@options.reads
@click.pass_obj
def get_backup(session: Session, backup_id: str) -> None:
    """Show a backup with what is proven of it and how old that is."""
    resources.get_one(session, BACKUP, backup_id)


@backup.command()
@_backup_id
@click.option("--boot", is_flag=True, help="Restore it to a vm without a network and wait for its guest to come up.")
@click.option("--boot-pattern", metavar="REGEX", help="What its serial port shows.")
@click.option("--boot-tcp", type=_TCP_PORT, metavar="PORT", help="Where it answers; of neither, its guest agent has to.")
@click.option("--boot-timeout", "boot_timeout_s", type=DurationType(maximum="1h", example="5m"), help="How long it may take.")
@options.runs
@click.pass_obj
def verify(
    session: Session, backup_id: str, boot: bool, boot_pattern: str | None, boot_tcp: int | None, boot_timeout_s: int | None
) -> None:
    """Read everything that a backup needs and check it; with --boot see it come up.

    \b
    trimtab backup verify bk-… --boot --boot-pattern "login:"
    trimtab backup verify bk-… --boot --boot-tcp 22
    """
    wish = {"boot": boot or None, "boot_pattern": boot_pattern, "boot_tcp": boot_tcp, "boot_timeout_s": boot_timeout_s}
    resources.run(
        session,
        "POST",
        BACKUP.place(session, backup_id, verb="verify"),
        {key: value for key, value in wish.items() if value is not None},
        reread=lambda: resources.read(session, BACKUP, backup_id),
        sentence=lambda item: (
            f"{item.get('id')} is {item.get('state')}, {item.get('level')}{': ' + item['problem'] if item.get('problem') else ''}"
        ),
        resource=BACKUP,
    )


@backup.command()
@_backup_id
@click.option("--as", "name", metavar="NAME", help="The new vm's name.")
@click.option(
    "--replace", metavar="VM", shell_complete=completion.names_of("vms"), help="Take this stopped vm back to it instead."
)
@click.option("--to", "to_host", metavar="HOST", shell_complete=completion.names_of("hosts"), help="On this host, or not at all.")
@click.option("--pool", "pools", type=PairType("local=fast"), multiple=True, help="Its pool there = a pool here; repeats.")
@click.option("--network", "networks", type=PairType("lan=lan2"), multiple=True, help="Its network there = one here; repeats.")
@click.option("--cpu-model", metavar="MODEL", help="`auto` for hosts with other hardware; else as it was.")
@click.option("--no-start", is_flag=True, help="Leave it stopped.")
@click.option("--instant", is_flag=True, help="It runs on the backup at once; its disks are filled while it does.")
@click.option("--bandwidth", type=click.IntRange(0, 1_000_000), metavar="MIB/S", help="With --instant: fill so fast at most.")
@options.destroys
@options.runs
@click.pass_obj
def restore(
    session: Session,
    backup_id: str,
    name: str | None,
    replace: str | None,
    to_host: str | None,
    pools: Sequence[tuple[str, str]],
    networks: Sequence[tuple[str, str]],
    cpu_model: str | None,
    no_start: bool,
    instant: bool,
    bandwidth: int | None,
) -> None:
    """Make a new vm of a backup, with an identity of its own, or take a stopped vm back to it.

    \b
    trimtab backup restore bk-… --as db2 --to node3 [--instant]
    trimtab backup restore bk-… --replace db --yes
    """
    if (name is None) == (replace is None):
        raise usage("give --as NAME for a new vm, or --replace VM for the one that was backed up")
    if replace is not None:
        session.confirm(f"Replace the disks of vm {replace} by those of {backup_id}? What is on them now is lost.")
        resources.run(
            session,
            "POST",
            BACKUP.place(session, backup_id, verb="replace"),
            {"vm": replace},
            sentence=lambda _: f"vm {replace} is as it was in {backup_id}; start it with `trimtab vm start {replace}`",
        )
        return
    body: dict[str, Any] = {"name": name}
    body |= {key: value for key, value in {"to_host": to_host, "cpu_model": cpu_model}.items() if value}
    body |= {key: dict(pairs) for key, pairs in {"pools": pools, "networks": networks}.items() if pairs}
    if no_start:
        body["start"] = False
    if instant:
        body |= {"instant": True, **({"bandwidth_mib_s": bandwidth} if bandwidth else {})}
    resources.run(
        session,
        "POST",
        BACKUP.place(session, backup_id, verb="restore"),
        body,
        sentence=lambda _: (
            f"vm {name} runs on {backup_id}; its disks are filled meanwhile: `trimtab op list --filter kind=vm.fill`"
            if instant
            else f"vm {name} is restored from {backup_id}; see it with `trimtab vm get {name}`"
        ),
    )


@backup.command("restore-volume")
@_backup_id
@click.argument("disk")
@click.option("--as", "name", metavar="NAME", required=True, help="The new volume's name.")
@click.option(
    "--pool", metavar="NAME", shell_complete=completion.names_of("pools"), help="Where it lives; else the default pool."
)
@options.runs
@click.pass_obj
def restore_volume(session: Session, backup_id: str, disk: str, name: str, pool: str | None) -> None:
    """Make a volume of one disk of a backup.

    \b
    trimtab backup restore-volume bk-… vdb --as db-data-of-monday
    """
    body = {"name": name, "disk": disk, **({"pool": pool} if pool else {})}
    resources.run(
        session,
        "POST",
        BACKUP.place(session, backup_id, verb="restore-volume"),
        body,
        sentence=lambda _: f"volume {name} is {disk} of {backup_id}; `trimtab vm attach` gives it to a vm",
    )


@backup.command("hold")
@_backup_id
@click.option("--until", type=click.DateTime(["%Y-%m-%d"]), help="No prune and no policy takes it before this day (UTC).")
@click.option("--release", is_flag=True, help="Let it go again.")
@options.changes
@click.pass_obj
def hold_backup(session: Session, backup_id: str, until: datetime | None, release: bool) -> None:
    """Keep a backup whatever its policy says, for a court or an audit.

    \b
    trimtab backup hold bk-… --until 2027-12-31
    """
    if (until is None) is not release:
        raise usage("give --until DAY, or --release to let it go again")
    at = until.replace(tzinfo=UTC).isoformat() if until is not None else None
    answer = resources.change(session, "POST", BACKUP.place(session, backup_id, verb="hold"), {"until": at})
    said = f"backup {backup_id} is held until {until:%Y-%m-%d}" if until is not None else f"backup {backup_id} is held no more"
    resources.show_changed(session, BACKUP, answer, said)


@backup.command("delete")
@_backup_id
@options.destroys
@options.runs
@click.pass_obj
def delete_backup(session: Session, backup_id: str) -> None:
    """Take a backup off the list; what only it needs goes with the next prune."""
    session.confirm(f"Delete backup {backup_id}?")
    resources.run(session, "DELETE", BACKUP.place(session, backup_id), sentence=lambda _: f"backup {backup_id} deleted")


@backup.command()
@click.option("--repo", metavar="NAME", shell_complete=completion.names_of("backup-repos"), help="Else the only one.")
@options.runs
@click.pass_obj
def prune(session: Session, repo: str | None) -> None:
    """Remove what no listed backup needs; with --dry-run only count it."""
    name = repo or _only_repo(session)
    body = {"dry_run": True} if session.is_dry_run else {}
    # The dry run is an operation of its own: only the repository knows what would go.
    session.is_dry_run, was_dry = False, session.is_dry_run
    resources.run(
        session,
        "POST",
        REPO.place(session, name, verb="prune"),
        body,
        sentence=lambda item: _pruned(item.get("result") or {}, is_dry=was_dry),
    )


def _only_repo(session: Session) -> str:
    found = [str(one["name"]) for one in session.client.pages(REPO.place(session), {}, limit=2)]
    if len(found) != 1:
        raise usage("give --repo NAME; `trimtab backup repo list` shows them")
    return found[0]


def _pruned(result: Any, *, is_dry: bool) -> str:
    sizes = {what: humanise.size(result.get(f"{what}_bytes")) for what in ("removed", "condemned", "kept")}
    if is_dry:
        return f"dry run: {sizes['condemned']} would be condemned, {sizes['removed']} removed, {sizes['kept']} kept"
    return f"{sizes['removed']} removed, {sizes['condemned']} go with a later prune, {sizes['kept']} kept"


@backup.command("status")
@options.reads
@click.pass_obj
def show_status(session: Session) -> None:
    """Show of each vm what would be lost now and what was proven of its backups."""
    items = list(session.client.pages(STATUS.place(session), {}, limit=None))
    render.show_list(session, items, STATUS.columns, empty=STATUS.nothing(session))
