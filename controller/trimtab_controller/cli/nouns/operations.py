"""`trimtab op` and `trimtab event`: what is being done, and what happened."""

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, render, resources, waiting
from trimtab_controller.cli.errors import CommandFailed, from_operation
from trimtab_controller.cli.paths import Query
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.resources import NEWEST, Resource
from trimtab_controller.cli.session import Session


def _created(item: Document, now: datetime) -> str:
    return humanise.since(item.get("created_at"), now)


def _took(item: Document, now: datetime) -> str:
    begun, ended = humanise.instant(item.get("created_at")), humanise.instant(item.get("ended_at"))
    return humanise.duration(((ended or now) - begun).total_seconds()) if begun else ""


def _doing(item: Document, _now: datetime) -> str:
    """Return what an operation does now, or why it failed."""
    error: Mapping[str, Any] = item.get("error") or {}
    if error:
        return f"{error.get('message', '')} [{error.get('code', '')}]"
    if waiting.has_ended(item):
        return ""
    progress: Mapping[str, Any] = item.get("progress") or {}
    waits = f"waiting for {item['waiting_for']}" if item.get("waiting_for") and not progress else ""
    parts = [str(progress.get("phase") or item.get("step") or ""), waits, *waiting.transfer_parts(progress)]
    return "  ".join(part for part in parts if part)


# The most that the API gives at once.
EVENT_PAGE = 1000


def describe_operation(item: Document) -> None:
    """Print an operation and its journal."""
    moment = render.now()
    error: Mapping[str, Any] = item.get("error") or {}
    render.pairs(
        [
            ("id", str(item.get("id", ""))),
            ("kind", str(item.get("kind", ""))),
            ("subject", f"{render.at(item, 'subject.name') or ''} ({render.at(item, 'subject.id') or ''})"),
            ("project", str(item.get("project") or "(fleet)")),
            ("state", str(item.get("state", "unknown"))),
            ("doing", "" if waiting.has_ended(item) else humanise.plain(_doing(item, moment))),
            ("cancel", "asked for" if item.get("is_cancel_requested") else ""),
            ("error", humanise.plain(f"{error.get('message', '')} [{error.get('code', '')}]") if error else ""),
            ("result", humanise.plain(render.as_text(item.get("result")))),
            ("actor", str(item.get("actor", ""))),
            ("request", str(item.get("request_id", ""))),
            ("created", f"{item.get('created_at', '')} ({_created(item, moment)})"),
            ("ended", str(item.get("ended_at") or "")),
            ("took", _took(item, moment)),
        ]
    )
    steps = item.get("steps") or []
    if steps:
        render.heading("steps")
        rows = [
            [
                str(step.get("step", "")),
                str(step.get("direction", "")),
                str(step.get("outcome", "")),
                str(step.get("at", "")),
                humanise.plain((step.get("error") or {}).get("message", "")),
            ]
            for step in steps
        ]
        render.table(["STEP", "DIRECTION", "OUTCOME", "AT", "ERROR"], rows)


OPERATION_COLUMNS = (
    Column("id", "id"),
    Column("kind", "kind"),
    Column("subject", "subject.name"),
    Column("state", "state"),
    Column("created", "created_at", _created),
    Column("took", "ended_at", _took),
    Column("project", "project", is_wide=True),
    Column("actor", "actor", is_wide=True),
    Column("request", "request_id", is_wide=True),
    Column("doing", "step", _doing),
)
OPERATION = Resource(noun="operation", collection="operations", columns=OPERATION_COLUMNS, describe=describe_operation)
FLEET_OPERATION = Resource(
    noun="operation",
    collection="operations",
    columns=OPERATION_COLUMNS,
    is_fleet=True,
    describe=describe_operation,
)
_EVENT_COLUMNS = (
    Column("seq", "seq"),
    Column("at", "at"),
    Column("kind", "kind"),
    Column("subject", "subject.name", lambda item, _now: _subject(item)),
    Column("actor", "actor"),
    Column("project", "project", is_wide=True),
    Column("operation", "operation_id", is_wide=True),
    Column("message", "message"),
)
EVENT = Resource(noun="event", collection="events", columns=_EVENT_COLUMNS, is_streamed=True)
FLEET_EVENT = Resource(noun="event", collection="events", columns=_EVENT_COLUMNS, is_fleet=True, is_streamed=True)

_all = click.option("--all-projects", "-A", "is_everywhere", is_flag=True, help="Of the whole fleet.")
_identifier = click.argument("identifier", metavar="OPERATION", shell_complete=completion.names_of("operations"))


@click.group()
def op() -> None:
    """Operations: durable work."""


@op.command("list")
@_all
@click.option("--live", is_flag=True, help="Only those that have not ended.")
@options.reads
@options.filtered
@options.limited
@options.watched
@click.pass_obj
def list_operations(session: Session, is_everywhere: bool, live: bool) -> None:
    """List operations, the newest first. Filter by kind, state, subject, actor, done."""
    query = {"filter": "done=false" if live else None}
    resources.list_all(session, FLEET_OPERATION if is_everywhere else OPERATION, query, newest=True)


@op.command("get")
@_identifier
@options.reads
@click.pass_obj
def get_operation(session: Session, identifier: str) -> None:
    """Show an operation with each step that was done or undone."""
    resources.get_one(session, FLEET_OPERATION, identifier)


@op.command("explain")
@_identifier
@options.reads
@click.pass_obj
def explain(session: Session, identifier: str) -> None:
    """Say why an operation placed its vm as it did, or why no host fitted."""
    from trimtab_controller.cli.nouns.vm_views import show_decision

    answer = session.client.get(FLEET_OPERATION.place(session, identifier, verb="explain"))
    decision = answer.get("placement") if isinstance(answer, dict) else answer
    if decision is None:
        render.say(f"{identifier} placed nothing")
        if session.is_machine_output:
            render.show_one(session, answer, OPERATION_COLUMNS)
        return
    show_decision(session, decision, str(decision.get("vm") or identifier))


@op.command("wait")
@_identifier
@options.waits
@options.reads
@click.pass_obj
def wait(session: Session, identifier: str) -> None:
    """Wait for an operation's end; the exit code is that of its outcome."""
    operation = resources.read(session, FLEET_OPERATION, identifier)
    ended = waiting.until_ended(session, operation)
    if ended.get("state") != "done":
        raise from_operation(ended)
    if session.output in {"table", "wide"} and not session.columns:
        render.write_line(f"{ended['id']} is done: {ended.get('kind', '')} {render.at(ended, 'subject.name') or ''}".rstrip())
    else:
        render.show_one(session, ended, OPERATION_COLUMNS)


@op.command("cancel")
@_identifier
@options.runs
@click.pass_obj
def cancel(session: Session, identifier: str) -> None:
    """End an operation and undo what it did; past the point of no return it goes on to its end."""
    answer = resources.change(session, "POST", FLEET_OPERATION.place(session, identifier, verb="cancel"))
    operation = _operation_of(answer)
    if session.is_dry_run or not session.is_waiting:
        resources.show_changed(session, FLEET_OPERATION, operation, f"{identifier}: cancel asked for")
        return
    ended = waiting.until_ended(session, operation)
    state = str(ended.get("state"))
    if state not in {"cancelled", "done"}:
        raise from_operation(ended)
    outcome = "cancelled, everything is undone" if state == "cancelled" else "done: it was past the point where it can be undone"
    resources.show_changed(session, FLEET_OPERATION, ended, f"{identifier} is {outcome}")


@op.command("retry")
@_identifier
@options.runs
@click.pass_obj
def retry(session: Session, identifier: str) -> None:
    """Let an operation that needs attention go on."""
    answer = resources.change(session, "POST", FLEET_OPERATION.place(session, identifier, verb="retry"))
    operation = _operation_of(answer)
    if session.is_dry_run or not session.is_waiting:
        resources.show_changed(session, FLEET_OPERATION, operation, f"{identifier} goes on")
        return
    # What the answer says may be the state before the retry took effect; the wait asks anew.
    ended = waiting.until_done(session, {**operation, "done": False, "state": "running"})
    resources.show_changed(session, FLEET_OPERATION, ended, f"{identifier} is done")


def _operation_of(answer: Mapping[str, Any]) -> Document:
    found: Document = answer.get("operation", answer)
    return found


@click.group()
def event() -> None:
    """Events: what happened."""


@event.command("list")
@_all
@click.option("--after", type=click.IntRange(min=0), metavar="SEQ", help="What came after this event.")
@click.option("--subject", metavar="NAME-OR-ID", help="Only about this one.")
@click.option("--kind", metavar="KIND", help="Only of kinds that begin so, for example vm.")
@options.reads
@options.limited
@options.watched
@click.pass_obj
def list_events(session: Session, is_everywhere: bool, after: int | None, subject: str | None, kind: str | None) -> None:
    """List the newest events, or with --after all that came after; with --watch each that comes from now on."""
    resource = FLEET_EVENT if is_everywhere else EVENT
    query: dict[str, str | int | bool | None] = {"after": after, "subject": subject, "kind": kind}
    if session.is_watching:
        from trimtab_controller.cli import watching

        watching.watch_events(session, resource, query)
        return
    items = _event_pages(session, resource.place(session), query)
    render.show_list(session, items, resource.columns, empty=resource.nothing(session))


@event.command("get")
@click.argument("seq", type=click.IntRange(min=1))
@_all
@options.reads
@click.pass_obj
def get_event(session: Session, seq: int, is_everywhere: bool) -> None:
    """Show one event by its number."""
    resource = FLEET_EVENT if is_everywhere else EVENT
    found = next(iter(session.client.get(resource.place(session), {"after": seq - 1, "page_size": 1})["items"]), None)
    if found is None or found.get("seq") != seq:
        raise CommandFailed(f"there is no event {seq} here", code="event-not-found", kind="not_found", hint="trimtab event list")
    render.show_one(session, found, resource.columns)


def _event_pages(session: Session, path: str, query: Query) -> Iterator[Document]:
    """Yield the newest events, or from `after` on all there are: the number of the last one leads to the next page."""
    left = session.limit or (NEWEST if query.get("after") is None else None)
    position = query.get("after")
    while left is None or left > 0:
        size = min(left or EVENT_PAGE, EVENT_PAGE)
        answer = session.client.get(path, {**query, "after": position, "page_size": size})
        items = answer["items"][:size]
        yield from items
        if not items or not answer.get("next_page_token"):
            return
        position = items[-1]["seq"]
        left = None if left is None else left - len(items)


def _subject(item: Document) -> str:
    name, identifier = render.at(item, "subject.name"), render.at(item, "subject.id")
    return str(name or identifier or "")
