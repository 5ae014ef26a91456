"""`--watch`: the list as it is, then a line per change. By the API's stream where there is one, else by asking again."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from trimtab_controller.cli import render, resources, sse
from trimtab_controller.cli.client import Client
from trimtab_controller.cli.errors import CommandFailed
from trimtab_controller.cli.paths import Query
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session

_ROUND_S = 2.0
# What differs from one reading to the next although nothing happened.
_VOLATILE = frozenset({"age_s", "at", "etag", "updated_at", "last_used_at"})
_ROW_WIDTHS_LEAST = 8


class Printer:
    """Prints each resource when it is new or differs from what was printed of it before."""

    def __init__(self, session: Session, columns: list[Column]) -> None:
        self._session = session
        self._columns = columns
        self._seen: dict[str, Any] = {}
        self._widths: list[int] = []

    def show_first(self, items: list[Document]) -> None:
        for item in items:
            self._seen[_identity(item)] = essence(item)
        if self._session.output in {"table", "wide"}:
            moment = render.now()
            rows = [[column.text(item, moment) for column in self._columns] for item in items]
            titles = [column.title for column in self._columns]
            least = [max(len(title), _ROW_WIDTHS_LEAST) for title in titles]
            self._widths = [max([least[index], *(len(row[index]) for row in rows)]) for index in range(len(titles))]
            render.write_line(render.row_text(titles, self._widths))
            for row in rows:
                render.write_line(render.row_text(row, self._widths, is_coloured=render.has_colour()))
        else:
            for item in items:
                self._print(item)

    def show(self, item: Document) -> None:
        kept = essence(item)
        if self._seen.get(_identity(item)) != kept:
            self._seen[_identity(item)] = kept
            self._print(item)

    def knows(self, item: Document) -> bool:
        return _identity(item) in self._seen

    def forget_missing(self, present: list[Document]) -> None:
        """Say which resources are gone."""
        names = {_identity(item) for item in present}
        for gone in [name for name in self._seen if name not in names]:
            before = self._seen.pop(gone)
            render.say(f"{render.name_of(before)} is gone")

    def _print(self, item: Document) -> None:
        match self._session.output:
            case "json":
                render.write_json_line(item)
            case "yaml":
                render.write_yaml(item, explicit_start=True)
            case "name":
                render.write_line(render.name_of(item))
            case _:
                moment = render.now()
                row = [column.text(item, moment) for column in self._columns]
                render.write_line(render.row_text(row, self._widths, is_coloured=render.has_colour()))


def watch(session: Session, resource: Resource, path: str, query: Query) -> None:
    """Print until the user stops it."""
    if resource.is_streamed:
        _watch_stream(session, resource, path, query)
        return
    printer = Printer(session, render.chosen_columns(session, resource.columns))
    printer.show_first(list(session.client.pages(path, query, limit=session.limit)))
    while True:
        time.sleep(_ROUND_S)
        try:
            items = list(session.client.pages(path, query, limit=session.limit))
        except CommandFailed as error:
            if error.kind not in {"unavailable", "deadline_exceeded", "rate_limited"}:
                raise
            render.say(f"{error.message}; asking again")
            continue
        if session.limit is None:  # else it may only have moved beyond the limit
            printer.forget_missing(items)
        for item in items:
            printer.show(item)


def _watch_stream(session: Session, resource: Resource, path: str, query: Query) -> None:
    """Print what the stream lists up to its first bookmark, then each change."""
    printer = Printer(session, render.chosen_columns(session, resource.columns))
    listed: dict[str, Document] | None = {}
    for event in stream(session, path, {**query, "watch": True}):
        item = resource_of(event)
        if listed is not None:
            if item is not None:
                listed[_identity(item)] = item
            elif event.kind == "bookmark":
                printer.show_first(list(listed.values()))
                listed = None
        elif item is not None and (printer.knows(item) or _is_wanted(session, resource, item)):
            printer.show(item)


def _is_wanted(session: Session, resource: Resource, item: Document) -> bool:
    """Tell whether a change is about what was asked for; what was shown once is shown on, so that its leaving is seen."""
    labels = item.get("labels") or {}
    filters = [(resource.filter_paths[key], value) for key, value in session.filters if key in resource.filter_paths]
    return all(labels.get(key) == value for key, value in session.selector) and all(
        render.as_text(render.at(item, path)) == value for path, value in filters
    )


def watch_events(session: Session, resource: Resource, query: Query) -> None:
    """Print events as they come: those after `after`, else those from now on."""
    printer = Printer(session, render.chosen_columns(session, resource.columns))
    printer.show_first([])
    shown = 0
    for event in stream(session, resource.place(session), resources.list_query(session, query)):
        item = resource_of(event)
        if item is None or int(item.get("seq") or 0) <= shown:
            continue
        shown = int(item.get("seq") or 0)
        printer.show(item)
        if session.limit is not None:
            session.limit -= 1
            if session.limit <= 0:
                return


def stream(session: Session, path: str, query: Query) -> Iterator[sse.ServerEvent]:
    """Yield a stream's events over every break; where the position is too old, begin anew (the server lists first)."""
    client: Client = session.connect()

    def broken(error: CommandFailed | None) -> None:
        render.say(f"{error.message if error else 'the stream ended'}; resuming")

    while True:
        try:
            yield from sse.follow(_opener(client, path, query), on_break=broken)
        except CommandFailed as error:
            if error.code != "events-expired":
                raise
            render.say("events between were dropped by the server; listing anew")
            query = {key: value for key, value in query.items() if key != "after"}


def _opener(client: Client, path: str, query: Query) -> Callable[[str], Iterator[sse.ServerEvent]]:
    return lambda last_id: client.stream(path, query, last_event_id=last_id)


def resource_of(event: sse.ServerEvent) -> Document | None:
    """Return the resource that an event carries; None for a bookmark, which only moves the position."""
    if event.kind == "bookmark":
        return None
    document = event.document()
    return document if isinstance(document, Mapping) and ("id" in document or "seq" in document) else None


def essence(item: Any) -> Any:
    """Return a document without what changes by itself."""
    if isinstance(item, Mapping):
        return {key: essence(value) for key, value in item.items() if key not in _VOLATILE}
    if isinstance(item, list):
        return [essence(value) for value in item]
    return item


def _identity(item: Document) -> str:
    return str(item.get("id") or item.get("seq") or item.get("name"))
