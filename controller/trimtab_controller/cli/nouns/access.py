"""`trimtab user`, `token`, `whoami` and `audit`: who may what, and who did what."""

from datetime import datetime
from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, render, resources
from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.paths import join
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import DurationType, MomentType

_DAY_S = 86400
_ROLES = ("viewer", "operator", "admin")


def _created(item: Document, now: datetime) -> str:
    return humanise.since(item.get("created_at"), now)


USER = Resource(
    noun="user",
    collection="users",
    is_fleet=True,
    columns=(
        Column("name", "name"),
        Column("kind", "kind"),
        Column("roles", "roles"),
        Column("disabled", "is_disabled", is_wide=True),
        Column("created", "created_at", _created),
        Column("id", "id", is_wide=True),
    ),
)
TOKEN = Resource(
    noun="token",
    collection="tokens",
    is_fleet=True,
    columns=(
        Column("id", "id"),
        Column("name", "name"),
        Column("expires", "expires_at", lambda item, now: humanise.since(item.get("expires_at"), now) or "never"),
        Column("last_used", "last_used_at", lambda item, now: humanise.since(item.get("last_used_at"), now) or "never"),
        Column("created", "created_at", _created),
        Column("expired", "is_expired", is_wide=True),
    ),
)
AUDIT = Resource(
    noun="entry",
    collection="audit",
    is_fleet=True,
    columns=(
        Column("at", "at"),
        Column("actor", "actor"),
        Column("verb", "verb"),
        Column("outcome", "outcome"),
        Column("cause", "cause"),
        Column("seq", "seq", is_wide=True),
        Column("project", "project", is_wide=True),
        Column("request", "request_id", is_wide=True),
        Column("resource", "resource"),
    ),
)

_user_name = click.argument("name", shell_complete=completion.names_of("users"))
_of_user = click.option("--user", "user_name", metavar="NAME", shell_complete=completion.names_of("users"), help="Else your own.")


@click.group()
def user() -> None:
    """Users and service accounts."""


@user.command("list")
@options.lists
@click.pass_obj
def list_users(session: Session) -> None:
    """List users with their roles by project; `*` is the fleet. Filter by name, kind."""
    resources.list_all(session, USER)


@user.command("get")
@_user_name
@options.reads
@click.pass_obj
def get_user(session: Session, name: str) -> None:
    """Show a user."""
    resources.get_one(session, USER, name)


@user.command("create")
@click.argument("name")
@click.option("--service", "is_service", is_flag=True, help="A service account: for a program, not for a person.")
@options.changes
@click.pass_obj
def create_user(session: Session, name: str, is_service: bool) -> None:
    """Create a user, who may do nothing until a role is granted."""
    body = {"name": name, "kind": "service" if is_service else "user"}
    answer = resources.change(session, "POST", USER.place(session), body)
    sentence = f"user {name} created; next: trimtab user grant {name} operator -p PROJECT; trimtab token create --user {name}"
    resources.show_changed(session, USER, answer, sentence)


@user.command("delete")
@_user_name
@options.destroys
@options.changes
@click.pass_obj
def delete_user(session: Session, name: str) -> None:
    """Delete a user; their tokens end at once."""
    session.confirm(f"Delete user {name}?")
    answer = resources.change(session, "DELETE", USER.place(session, name))
    resources.show_changed(session, USER, answer, f"user {name} deleted")


_fleet = click.option("--fleet", "is_fleet", is_flag=True, help="On the whole fleet instead of the project.")


@user.command("grant")
@_user_name
@click.argument("role", type=click.Choice(_ROLES))
@_fleet
@options.changes
@click.pass_obj
def grant(session: Session, name: str, role: str, is_fleet: bool) -> None:
    """Give a user a role in the project (-p) or on the fleet; it replaces the one held there."""
    place = "*" if is_fleet else session.project
    answer = resources.change(session, "PUT", join("users", name, "roles", place), {"role": role})
    resources.show_changed(session, USER, answer, f"{name} is {role} {_where(place)}")


@user.command("revoke")
@_user_name
@_fleet
@options.destroys
@options.changes
@click.pass_obj
def revoke(session: Session, name: str, is_fleet: bool) -> None:
    """Take a user's role in the project (-p) or on the fleet."""
    place = "*" if is_fleet else session.project
    session.confirm(f"Take the role of {name} {_where(place)}?")
    answer = resources.change(session, "DELETE", join("users", name, "roles", place))
    resources.show_changed(session, USER, answer, f"{name} has no role {_where(place)}")


def _where(place: str) -> str:
    return "on the fleet" if place == "*" else f"in project {place}"


@click.group()
def token() -> None:
    """Tokens that users log in with."""


@token.command("list")
@_of_user
@options.reads
@options.limited
@click.pass_obj
def list_tokens(session: Session, user_name: str | None) -> None:
    """List a user's tokens; their secrets are stored nowhere."""
    resources.list_all(session, TOKEN, place=join("users", user_name or _own_name(session), "tokens"))


@token.command("create")
@_of_user
@click.option("--name", "token_name", default="cli", show_default=True, help="What it is for.")
@click.option(
    "--expires",
    type=DurationType(minimum="1d", maximum="400d", example="90d"),
    help="Its life in whole days; 90d unless told otherwise.",
)
@options.changes
@click.pass_obj
def create_token(session: Session, user_name: str | None, token_name: str, expires: int | None) -> None:
    """Create a token; its secret is printed once and can never be shown again."""
    body: dict[str, Any] = {"name": token_name}
    if expires is not None:
        if expires % _DAY_S:
            raise usage("--expires: whole days only, for example 90d")
        body["expires_in_days"] = expires // _DAY_S
    answer = resources.change(session, "POST", join("users", user_name or _own_name(session), "tokens"), body)
    if session.is_dry_run:
        resources.show_dry_run(session, answer, "token.create")
    elif session.is_machine_output:
        render.show_one(session, answer, TOKEN.columns)
    else:
        remaining = humanise.since(render.at(answer, "token.expires_at"), render.now())
        render.say(f"shown once; it expires {remaining or 'never'}")
        render.write_line(str(answer.get("secret") or ""))


@token.command("revoke")
@click.argument("token_id", metavar="TOKEN-ID")
@_of_user
@options.destroys
@options.changes
@click.pass_obj
def revoke_token(session: Session, token_id: str, user_name: str | None) -> None:
    """End a token at once."""
    session.confirm(f"Revoke token {token_id}?")
    answer = resources.change(session, "DELETE", join("users", user_name or _own_name(session), "tokens", token_id))
    resources.show_changed(session, TOKEN, answer, f"token {token_id} revoked")


def _own_name(session: Session) -> str:
    return str(session.client.get(join("whoami"))["name"])


@click.command()
@options.reads
@click.pass_obj
def whoami(session: Session) -> None:
    """Say as whom you are logged in, where, and with which roles."""
    found = session.client.get(join("whoami"))
    columns = (
        Column("name", "name"),
        Column("kind", "user.kind"),
        Column("roles", "user.roles"),
        Column("token", "token.name"),
        Column("expires", "token.expires_at", lambda item, now: humanise.since(render.at(item, "token.expires_at"), now)),
        Column("id", "user.id"),
    )
    render.show_one(session, found, columns)
    if session.output in {"table", "wide"}:
        render.say(f"at {session.context.url}, project {session.project}")


@click.group()
def audit() -> None:
    """What was asked for, by whom, and what came of it."""


@audit.command("list")
@click.option("--actor", metavar="NAME", help="Who asked.")
@click.option("--verb", metavar="VERB", help="For example vm.delete.")
@click.option("--resource", metavar="PATH", help="For example projects/default/vms/web1.")
@click.option("--outcome", metavar="OUTCOME", help="For example denied.")
@click.option("--since", type=MomentType(), metavar="WHEN", help="For example 2h, or 2026-11-20T02:00Z.")
@click.option("--until", type=MomentType(), metavar="WHEN", help="As --since.")
@options.reads
@options.filtered
@options.limited
@click.pass_obj
def list_audit(
    session: Session,
    actor: str | None,
    verb: str | None,
    resource: str | None,
    outcome: str | None,
    since: str | None,
    until: str | None,
) -> None:
    """List the audit trail, the newest first: every mutation and every denial."""
    named = {"actor": actor, "verb": verb, "resource": resource, "outcome": outcome}
    wanted = ",".join(f"{key}={value}" for key, value in named.items() if value is not None)
    resources.list_all(session, AUDIT, {"filter": wanted or None, "since": since, "until": until}, newest=True)
