"""`trimtab backup repo rotate-key` and `confirm`; and how a repository's key is kept, given back and read."""

from pathlib import Path
from typing import Any

import click

from trimtab_controller.cli import completion, options, render, resources
from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.nouns.backup_views import REPO
from trimtab_controller.cli.session import Session

repo_name = click.argument("name", shell_complete=completion.names_of("backup-repos"))
key_file_option = click.option(
    "--key-file", type=click.Path(path_type=Path), metavar="FILE", help="Where the repository's key is kept, or `-` to type it."
)


@click.command("confirm")
@repo_name
@key_file_option
@options.runs
@click.pass_obj
def confirm(session: Session, name: str, key_file: Path | None) -> None:
    """Give back a repository's key, where `create` or `rotate-key` was not finished."""
    is_rotation = bool(resources.read(session, REPO, name).get("next_key_id"))
    verb = "confirm-key" if is_rotation else "confirm"
    answer = resources.change(session, "POST", REPO.place(session, name, verb=verb), {"key": read_key(key_file)})
    follow_repo(session, name, answer)


@click.command("rotate-key")
@repo_name
@key_file_option
@options.runs
@click.pass_obj
def rotate_key(session: Session, name: str, key_file: Path | None) -> None:
    """Lock a repository with another key. Backups stay readable; the old key opens it no longer, and new backups have a new data key.

    \b
    trimtab backup repo rotate-key main --key-file main-2.key
    trimtab backup repo rotate-key main                           (shows the key, asks for it)
    """
    require_new(key_file)
    answer = resources.change(session, "POST", REPO.place(session, name, verb="rotate-key"))
    if session.is_dry_run:
        resources.show_dry_run(session, answer, f"another key of backup repository {name}")
        return
    key = keep_key(str(answer["key"]), key_file)
    answer = resources.change(session, "POST", REPO.place(session, name, verb="confirm-key"), {"key": key})
    resources.follow(
        session,
        answer,
        reread=lambda: resources.read(session, REPO, name),
        sentence=lambda item: f"backup repository {name} is locked with the key {item.get('key_id')}; keep the old one no longer",
        resource=REPO,
    )


def require_new(key_file: Path | None) -> None:
    if key_file is not None and key_file.exists():
        raise usage(f"{key_file} exists and may hold another key; name a file that does not")


def keep_key(key: str, key_file: Path | None) -> str:
    """Save the key where that was asked for, and give back what was saved; else show it and have it typed."""
    if key_file is not None and str(key_file) != "-":
        with key_file.open("x") as file:
            key_file.chmod(0o600)
            file.write(key + "\n")
        render.say(f"the key is in {key_file}: keep a copy where a fire in this room does not reach it")
        return key_file.read_text().strip()
    render.say("this is the repository's key. It is shown once; without it no backup can ever be restored:")
    render.say(f"\n    {key}\n")
    typed: str = click.prompt("save it, then paste it from where you saved it", err=True)
    return typed


def read_key(key_file: Path | None) -> str:
    if key_file is None or str(key_file) == "-":
        typed: str = click.prompt("the repository's key", hide_input=True, err=True)
        return typed
    return key_file.read_text().strip()


def follow_repo(session: Session, name: str, answer: Any) -> None:
    resources.follow(
        session,
        answer,
        reread=lambda: resources.read(session, REPO, name),
        sentence=lambda item: f"backup repository {name} is {item.get('state')}",
        resource=REPO,
    )
