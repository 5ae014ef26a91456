"""What the nouns have in common: where a collection lives, how it is listed, read, changed and watched."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab_controller.cli import humanise, render
from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.paths import Query, join
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.session import Session

# What people see of collections that grow for ever.
NEWEST = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    noun: str
    collection: str
    columns: Sequence[Column]
    # Outside of projects.
    is_fleet: bool = False
    describe: Callable[[Document], None] | None = None
    # Its changes can be had as a stream; where each filter of the API is in the document, since a stream is not filtered.
    is_streamed: bool = False
    filter_paths: Mapping[str, str] = field(default_factory=dict)
    # The API has a short form of each for lists (`view=basic`), which holds all that the columns show.
    has_basic_view: bool = False

    def place(self, session: Session, *segments: str, verb: str = "") -> str:
        """Return the path of the collection or, with a name, of one of it, with its custom verb."""
        base = (self.collection,) if self.is_fleet else ("projects", session.project, self.collection)
        return join(*base, *segments) + (f":{verb}" if verb else "")

    def nothing(self, session: Session) -> str:
        """Return what an empty list says."""
        nouns = self.collection.replace("-", " ")
        scope = "" if self.is_fleet else f" in project {session.project}"
        chosen = " of that kind" if session.selector or session.filters else ""
        return f"no {nouns}{scope}{chosen}"


def list_query(session: Session, more: Query | None = None) -> dict[str, str | int | bool | None]:
    """Return a list's query from the options that every list has, and those of its own (`filters` are merged)."""
    query: dict[str, str | int | bool | None] = dict(more or {})
    filters = [f"{key}={value}" for key, value in session.filters]
    if query.get("filter"):
        filters.insert(0, str(query["filter"]))
    query["filter"] = ",".join(filters) or None
    query["selector"] = ",".join(f"{key}={value}" for key, value in session.selector) or None
    wanted = f"{session.order_by[1:]} desc" if session.order_by.startswith("-") else session.order_by
    query["order_by"] = wanted or query.get("order_by")
    return query


def list_all(session: Session, resource: Resource, more: Query | None = None, *, place: str = "", newest: bool = False) -> None:
    """Print a collection; with `--watch` go on with its changes.

    `newest`: one that only grows and begins with the newest; people get the last few unless they ask for more.
    """
    path = place or resource.place(session)
    query = list_query(session, more)
    is_cut = newest and session.limit is None and (session.is_watching or not session.is_machine_output)
    if is_cut:
        session.limit = NEWEST
    if session.is_watching:
        from trimtab_controller.cli import watching

        watching.watch(session, resource, path, query)
        return
    if resource.has_basic_view and not session.is_machine_output and _are_known(session, resource):
        query["view"] = "basic"
    items = session.client.pages(path, query, limit=session.limit)
    count = render.show_list(session, items, resource.columns, empty=resource.nothing(session))
    if is_cut and count == NEWEST:
        render.say(f"the newest {NEWEST}; --limit shows more")


def _are_known(session: Session, resource: Resource) -> bool:
    """Tell whether the columns asked for are the resource's own, and no paths into the whole document."""
    return {column.name for column in resource.columns}.issuperset(session.columns)


def read(session: Session, resource: Resource, name: str) -> Document:
    found: Document = session.client.get(resource.place(session, name))
    return found


def get_one(session: Session, resource: Resource, name: str) -> None:
    render.show_one(session, read(session, resource, name), resource.columns, resource.describe)


def change(session: Session, method: str, path: str, body: Mapping[str, Any] | None = None, *, query: Query | None = None) -> Any:
    """Send a mutation with what `changes` offers: dry run, request id, etag."""
    full: dict[str, str | int | bool | None] = dict(query or {})
    if session.is_dry_run:
        full["validate_only"] = True
    return session.client.send(method, path, body, query=full or None, request_id=session.request_id, if_match=session.if_match)


def show_changed(session: Session, resource: Resource, answer: Any, sentence: str) -> None:
    """Print the outcome of a mutation that is over when it is answered: the sentence, or the resource where that was asked for."""
    if session.is_dry_run:
        show_dry_run(session, answer, sentence)
    elif (session.output in {"table", "wide"} and not session.columns) or not answer:
        _show_sentence(session, sentence)
    else:
        render.show_one(session, answer, resource.columns, resource.describe)


def show_dry_run(session: Session, answer: Any, sentence: str) -> None:
    if session.is_machine_output:
        _write_machine(session, answer if answer is not None else {})
        return
    host = answer.get("would_be_placed_on") if isinstance(answer, Mapping) else ""
    placed = f" and placed on {host}" if host else ""
    render.write_line(f"dry run, nothing was changed: it would be accepted ({sentence}){placed}")
    if host and answer.get("placement_summary"):
        render.write_line(humanise.plain(answer["placement_summary"]))


def run(
    session: Session,
    method: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    *,
    query: Query | None = None,
    sentence: Callable[[Document], str],
    reread: Callable[[], Document] | None = None,
    resource: Resource | None = None,
) -> None:
    """Start an operation, wait for it unless told otherwise, and print the outcome.

    `reread` reads the subject afterwards, None where it is gone; `sentence` says to people what came out of it, from the subject
    or else the operation.
    """
    answer = change(session, method, path, body, query=query)
    follow(session, answer, sentence=sentence, reread=reread, resource=resource)


def follow(
    session: Session,
    answer: Any,
    *,
    sentence: Callable[[Document], str],
    reread: Callable[[], Document] | None = None,
    resource: Resource | None = None,
) -> None:
    """Carry an accepted operation to its end, as `run` does."""
    operation = (answer or {}).get("operation")
    if session.is_dry_run:
        show_dry_run(session, answer, (operation or {}).get("kind", "") or "valid")
        return
    if not operation:
        _finish(session, answer or {}, sentence, resource)
        return
    if not session.is_waiting:
        if session.is_machine_output:
            _write_machine(session, operation)
        else:
            render.write_line(str(operation["id"]))
        return
    from trimtab_controller.cli import waiting

    ended = waiting.until_done(session, operation)
    _finish(session, reread() if reread is not None else ended, sentence, resource if reread is not None else None)


def _finish(session: Session, document: Document, sentence: Callable[[Document], str], resource: Resource | None) -> None:
    if session.output in {"table", "wide"} and not session.columns:
        render.write_line(sentence(document))
    elif resource is not None:
        render.show_one(session, document, resource.columns, resource.describe)
    elif session.is_machine_output:
        _write_machine(session, document)
    else:
        render.write_line(render.name_of(document))


def _show_sentence(session: Session, sentence: str) -> None:
    if session.is_machine_output:
        _write_machine(session, {})
    elif session.output != "name":
        render.write_line(sentence)


def _write_machine(session: Session, document: Any) -> None:
    if session.output == "json":
        render.write_json(document)
    else:
        render.write_yaml(document)


def label_changes(labels: Sequence[tuple[str, str]], unset: Sequence[str]) -> dict[str, str | None]:
    """Return what a PATCH says about labels: a value sets, null removes, others stay."""
    if not labels and not unset:
        raise usage("nothing to change: give --label key=value or --unset-label key")
    return {**dict(labels), **dict.fromkeys(unset)}
