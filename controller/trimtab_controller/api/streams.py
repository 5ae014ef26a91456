"""Server-sent events: what a watcher missed from SQL, then what the tailer hands out, for as long as they may see it.

    id: 1042
    event: vm.created
    data: {...}

`event: gap` says that the watcher was too slow; what follows comes from SQL and nothing is lost. `event: bookmark` carries only an
id to come back with. A comment each 15 s keeps proxies from closing the line; then the caller's right is checked again.
"""

import json
from collections.abc import AsyncIterator, Sequence

import structlog
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from trimtab_controller.api.render import dump
from trimtab_controller.api.resources.events import render_event
from trimtab_controller.api.resources.vms import render_vm
from trimtab_controller.api.runtime import Runtime
from trimtab_controller.api.security import Requires, declaration_of
from trimtab_controller.api.tailer import Interest, Subscription
from trimtab_controller.core.ids import kind_of
from trimtab_controller.core.model import Event
from trimtab_controller.services import events_view, vm_views
from trimtab_controller.services.authorise import Access
from trimtab_controller.store import events, keyset
from trimtab_protos.errors import TrimtabError, Unavailable

log = structlog.get_logger(__name__)

CATCH_UP_BATCH = 500
VM_BATCH = 200
COMMENT = b": heartbeat\n\n"


async def watch_events(request: Request, runtime: Runtime, access: Access, interest: Interest, after: int | None) -> Response:
    """Stream events after a number (None: from now on). Conflict `events-expired` where they are no longer kept."""
    _admit(runtime)
    start = await _start(runtime, after)
    return _stream(_events(_Watch(request, runtime, access), interest, start))


async def watch_vms(request: Request, runtime: Runtime, access: Access, page: keyset.Page) -> Response:
    """Stream every vm of the project, a bookmark, then each vm again when it changes; `Last-Event-ID` skips the list."""
    _admit(runtime)
    given = request.headers.get("last-event-id", "")
    after = int(given) if given.isascii() and given.isdecimal() and len(given) <= 16 else None
    start = await _start(runtime, after)
    return _stream(_vms(_Watch(request, runtime, access), page, start, is_resumed=after is not None))


class _Watch:
    """One watcher: whose, and whether they may still see."""

    def __init__(self, request: Request, runtime: Runtime, access: Access) -> None:
        self.request, self.runtime, self.access = request, runtime, access
        declared = declaration_of(request.scope["route"])
        assert declared is not None
        self._declared: Requires = declared

    async def may_go_on(self) -> bool:
        """Ask again: tokens end and roles change while a stream lasts."""
        try:
            await self._declared.enter(self.request, self.runtime)
        except Unavailable:
            return True
        except TrimtabError as error:
            log.info("watch ended", actor=self.access.actor.name, error=error.code)
            return False
        return True


async def _events(watch: _Watch, interest: Interest, last: int) -> AsyncIterator[bytes]:
    runtime = watch.runtime
    with runtime.tailer.subscribe(interest) as subscription:
        await runtime.tailer.ready()
        is_behind = True
        while True:
            if is_behind or subscription.has_gap:
                if subscription.has_gap:
                    yield _message("gap", b"{}", seq=last)
                subscription.begin_again()
                async for found in _missed(runtime, interest, last):
                    yield await _rendered(runtime, found)
                    last = found[-1].seq
                is_behind = False
            fresh = [event for event in await _take(subscription, runtime) if event.seq > last]
            if fresh:
                yield await _rendered(runtime, fresh)
                last = fresh[-1].seq
            elif not subscription.has_gap:
                yield COMMENT
                if not await watch.may_go_on():
                    return


async def _vms(watch: _Watch, page: keyset.Page, last: int, *, is_resumed: bool) -> AsyncIterator[bytes]:
    runtime, project_id = watch.runtime, watch.access.project_id
    interest = Interest(project_ids=[project_id])
    with runtime.tailer.subscribe(interest) as subscription:
        await runtime.tailer.ready()
        if not is_resumed:
            async for block in _every_vm(watch, page):
                yield block
            yield _message("bookmark", b"{}", seq=last)
        is_behind = is_resumed
        while True:
            if subscription.has_gap:
                yield _message("gap", b"{}", seq=last)
                is_behind = True
            if is_behind:
                subscription.begin_again()
                async for found in _missed(runtime, interest, last):
                    yield await _changed_vms(watch, found)
                    last = found[-1].seq
                is_behind = False
            fresh = [event for event in await _take(subscription, runtime) if event.seq > last]
            if fresh:
                last = fresh[-1].seq
                yield await _changed_vms(watch, fresh)
            elif not subscription.has_gap:
                yield COMMENT
                if not await watch.may_go_on():
                    return


async def _missed(runtime: Runtime, interest: Interest, last: int) -> AsyncIterator[Sequence[Event]]:
    """Yield, in batches, what SQL has after `last` for this interest and the tailer does not hand out."""
    until = await runtime.settled_events.newest()
    while True:
        position = last

        def read(session: Session, position: int = position) -> tuple[Event, ...]:
            return events.page_after(
                session,
                position,
                until=until,
                limit=CATCH_UP_BATCH,
                project_ids=interest.project_ids,
                subject_id=interest.subject_id,
                kind_prefix=interest.kind_prefix,
            )

        found = await runtime.context.db.read(read)
        if found:
            last = found[-1].seq
            yield found
        if len(found) < CATCH_UP_BATCH:
            return


async def _every_vm(watch: _Watch, page: keyset.Page) -> AsyncIterator[bytes]:
    runtime, after = watch.runtime, None
    while True:
        part = keyset.Page(limit=VM_BATCH, after=after, filters=page.filters, labels=page.labels)
        found, after = await runtime.context.db.read(
            lambda session, part=part: vm_views.page(  # type: ignore[misc]
                session, part, project_id=watch.access.project_id, with_deleted=False
            )
        )
        yield _vm_messages(watch, found, seq=None)
        if after is None:
            return


async def _changed_vms(watch: _Watch, found: Sequence[Event]) -> bytes:
    """Return each vm that the events are about, once, as it is now; a bookmark where they are about none."""
    ids = list(dict.fromkeys(event.subject_id for event in found if kind_of(event.subject_id) == "vm"))
    seq = found[-1].seq
    if not ids:
        return _message("bookmark", b"{}", seq=seq)
    views = await watch.runtime.context.db.read(lambda session: vm_views.by_ids(session, ids, project_id=watch.access.project_id))
    return _vm_messages(watch, views, seq=seq)


def _vm_messages(watch: _Watch, views: Sequence[vm_views.VmView], *, seq: int | None) -> bytes:
    now, heard = watch.runtime.context.clock.now(), watch.runtime.context.heard()
    blocks = []
    for i, view in enumerate(views):
        # Only the last of a batch moves the watcher on: who breaks off in between gets the whole batch again.
        is_last = i == len(views) - 1
        kind = "deleted" if view.vm.deleted_at is not None else "vm"
        blocks.append(_message(kind, dump(render_vm(view, now=now, heard=heard)), seq=seq if is_last else None))
    return b"".join(blocks)


async def _rendered(runtime: Runtime, found: Sequence[Event]) -> bytes:
    names = await runtime.context.db.read(lambda session: events_view.names_of(session, found))
    return b"".join(_message(event.kind, dump(render_event(event, names)), seq=event.seq) for event in found)


async def _take(subscription: Subscription, runtime: Runtime) -> list[Event]:
    return await subscription.take(runtime.context.settings.sse_heartbeat_s)


def _message(kind: str, content: bytes, *, seq: int | None) -> bytes:
    head = b"" if seq is None else f"id: {seq}\n".encode()
    return head + f"event: {kind}\n".encode() + b"data: " + content + b"\n\n"


async def _start(runtime: Runtime, after: int | None) -> int:
    if after is None:
        return await runtime.settled_events.newest()
    await runtime.context.db.read(lambda session: events_view.check_kept(session, after))
    return after


def _admit(runtime: Runtime) -> None:
    most = runtime.context.settings.max_watchers
    if runtime.tailer.watchers >= most:
        raise Unavailable("too-many-watchers", f"{most} watchers are connected already; try again later, or poll")


def _stream(blocks: AsyncIterator[bytes]) -> Response:
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_guarded(blocks), media_type="text/event-stream", headers=headers)


async def _guarded(blocks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """End the stream with an `error` message where SQL is gone: the client comes back with its last id."""
    try:
        async for block in blocks:
            if block:
                yield block
    except TrimtabError as error:
        content = json.dumps({"code": error.code, "kind": error.kind.value, "detail": error.message})
        yield _message("error", content.encode(), seq=None)
