"""Events: pages, and streams that resume, tell of gaps, and end with the right to see them."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.api.kit import Api, Stream, running_api
from trimtab_controller.store import events, schema

P1 = "/v1/projects/p1/events"


async def tell(api: Api, count: int = 1, *, project: str = "p1", kind: str = "vm.changed", subject: str = "vm-x") -> None:
    def work(session: Any) -> None:
        for i in range(count):
            events.append(
                session, kind=kind, subject_id=subject, message=f"{i}", project_id=api.ids[project], now=api.clock.now()
            )

    await api.write(work)


async def newest(api: Api) -> int:
    _oldest, seq = await api.db.read(events.bounds)
    return seq


async def next_of_kind(stream: Stream, kind: str) -> Any:
    while True:
        message = await stream.message()
        if message.event == kind:
            return message


async def test_pages_follow_each_other_without_gap_or_repeat(api_on_each: Api) -> None:
    api = api_on_each
    before = await newest(api)
    await tell(api, 5)
    await tell(api, 3, project="p2")
    await tell(api, 2)
    seen: list[int] = []
    after = before
    while True:
        page = (await api.call("p1-viewer", "GET", P1, params={"after": after, "page_size": 3})).json()
        seen += [one["seq"] for one in page["items"]]
        after = page["last_seq"]
        if not page["next_page_token"]:
            break
    assert len(seen) == 7
    assert seen == sorted(set(seen))


async def test_without_a_number_the_newest_are_shown(api: Api) -> None:
    await tell(api, 5)
    page = (await api.call("p1-viewer", "GET", P1, params={"page_size": 2})).json()
    assert [one["message"] for one in page["items"]] == ["3", "4"]


async def test_an_event_names_its_subject(api: Api) -> None:
    vm = await api.make_vm("web1")
    page = (await api.call("p1-viewer", "GET", P1, params={"subject": "web1"})).json()
    assert [one["subject"] for one in page["items"]] == [{"id": vm["id"], "name": "web1"}]
    assert page["items"][0]["project"] == "p1"
    kinds = (await api.call("p1-viewer", "GET", P1, params={"kind": "operation."})).json()
    assert {one["kind"] for one in kinds["items"]} == {"operation.accepted"}


@pytest.mark.parametrize("kind", ["alarm.failover-frozen", "alarm.fence-not-ready", "host.fence_ready", "alarm."])
async def test_events_of_every_kind_can_be_asked_for(api: Api, kind: str) -> None:
    await tell(api, 1, kind=kind)
    await tell(api, 1, kind="vm.changed")
    answer = await api.call("p1-viewer", "GET", P1, params={"kind": kind})
    assert answer.status_code == 200, answer.text
    assert [one["kind"] for one in answer.json()["items"]] == [kind]


async def test_events_past_the_retention_say_relist(api: Api) -> None:
    await tell(api, 5)
    last = await newest(api)
    table = schema.event
    await api.write(lambda session: session.execute(table.delete().where(table.c.seq < last)))
    answer = await api.call("p1-viewer", "GET", P1, params={"after": 1})
    assert (answer.status_code, answer.json()["code"]) == (410, "events-expired")
    async with api.stream("p1-viewer", P1, accept="text/event-stream", **{"last-event-id": "1"}) as stream:
        assert await stream.block() is None
        assert stream.status == 410


async def test_a_watcher_sees_what_comes_and_only_what_it_may(api_on_each: Api) -> None:
    api = api_on_each
    async with api.stream("p1-viewer", P1, accept="text/event-stream") as stream:
        assert await stream.block() is not None  # a heartbeat: it is following
        assert stream.headers["content-type"].startswith("text/event-stream")
        await tell(api, 1, project="p2")
        await tell(api, 2)
        first, second = await stream.message(), await stream.message()
    assert [first.event, second.event] == ["vm.changed", "vm.changed"]
    assert first.content["project"] == "p1"
    assert int(second.id) == int(first.id) + 1 == second.content["seq"]


async def test_a_watcher_that_comes_back_misses_nothing(api_on_each: Api) -> None:
    api = api_on_each
    await tell(api, 3)
    async with api.stream("p1-viewer", f"{P1}?after=0&kind=vm.", accept="text/event-stream") as stream:
        seen = [int((await stream.message()).id)]
    await tell(api, 700)  # more than one batch of the catch-up
    async with api.stream("p1-viewer", P1, accept="text/event-stream", **{"last-event-id": str(seen[0])}) as stream:
        seen += [int((await stream.message()).id) for _ in range(702)]
        await tell(api, 1)
        seen.append(int((await stream.message()).id))
    assert seen == list(range(seen[0], seen[0] + 704))


async def test_many_watchers_all_see_every_event_in_order(api: Api) -> None:
    async def watch(name: str) -> list[str]:
        async with api.stream(name, f"{P1}?kind=vm.", accept="text/event-stream") as stream:
            await stream.block()
            ready.release()
            return [(await stream.message()).id for _ in range(50)]

    ready = asyncio.Semaphore(0)
    tasks = [asyncio.create_task(watch("p1-viewer")) for _ in range(20)]
    for _ in tasks:
        await asyncio.wait_for(ready.acquire(), 10)
    for _ in range(10):
        await tell(api, 5)
    seen = await asyncio.wait_for(asyncio.gather(*tasks), 20)
    assert len({tuple(one) for one in seen}) == 1
    assert len(set(seen[0])) == 50


async def test_a_slow_watcher_is_told_of_a_gap_and_reads_on_from_sql(api: Api) -> None:
    async with api.stream("p1-viewer", f"{P1}?kind=vm.", accept="text/event-stream") as stream:
        await stream.block()
        await tell(api, 1)
        first = int((await stream.message()).id)
        stream.reads.clear()
        for _ in range(4):
            await tell(api, 400)  # beyond what a watcher's queue holds
        tailer = api.app.state.runtime.tailer
        last = await newest(api)
        async with asyncio.timeout(10):
            while tailer.position != last:
                await asyncio.sleep(0.01)
        stream.reads.set()
        seen, kinds = [first], []
        while len(seen) < 1601:
            message = await stream.message()
            kinds.append(message.event)
            if message.event != "gap":
                seen.append(int(message.id))
    assert "gap" in kinds
    assert seen == list(range(first, first + 1601))


async def test_a_stream_ends_when_the_token_does(api: Api) -> None:
    async with api.stream("p1-viewer", P1, accept="text/event-stream") as stream:
        assert await stream.block() is not None
        (token,) = (await api.call("p1-viewer", "GET", "/v1/users/p1-viewer/tokens")).json()["items"]
        await api.call("admin", "DELETE", f"/v1/users/p1-viewer/tokens/{token['id']}")
        async with asyncio.timeout(10):
            while await stream.block() is not None:
                pass
    assert stream.status == 200


async def test_watching_vms_lists_them_then_tells_of_each_change(api: Api) -> None:
    vm = await api.make_vm("web1")
    async with api.stream("p1-viewer", "/v1/projects/p1/vms?watch=true") as stream:
        first = await stream.message()
        assert (first.event, first.content["name"]) == ("vm", "web1")
        bookmark = await stream.message()
        assert bookmark.event == "bookmark"
        await api.call("p1-operator", "PATCH", "/v1/projects/p1/vms/web1", json={"labels": {"a": "b"}})
        changed = await next_of_kind(stream, "vm")
        assert changed.content["labels"] == {"a": "b"}
    await api.make_vm("web2", caller="p2-operator")
    await api.make_vm("web3")
    await api.set_vm(vm["id"], deleted_at=api.clock.now())
    await tell(api, 1, subject=vm["id"], kind="vm.deleted")
    headers = {"last-event-id": changed.id}
    async with api.stream("p1-viewer", "/v1/projects/p1/vms?watch=true", **headers) as stream:
        seen = {(await stream.message()).content["name"], (await stream.message()).content["name"]}
    assert seen == {"web1", "web3"}


async def test_wait_returns_when_the_operation_ends(api: Api) -> None:
    operation_id = (await api.make_vm("web1"))["operation"]["id"]
    path = f"/v1/operations/{operation_id}:wait"
    early = await api.call("p1-viewer", "GET", path, params={"timeout_s": 0})
    assert early.json()["done"] is False
    waiting = asyncio.create_task(api.call("p1-viewer", "GET", path, params={"timeout_s": 30}))
    cancelled = await api.call("p1-operator", "POST", f"/v1/operations/{operation_id}:cancel")
    assert cancelled.json()["operation"]["is_cancel_requested"]
    await api.end_operations()
    await tell(api, 1, kind="operation.done")
    answer = await asyncio.wait_for(waiting, 10)
    assert (answer.json()["done"], answer.json()["state"]) == (True, "done")
    ended = await api.call("p1-operator", "POST", f"/v1/operations/{operation_id}:cancel")
    assert (ended.status_code, ended.json()["code"]) == (409, "operation-ended")
    retried = await api.call("p1-operator", "POST", f"/v1/operations/{operation_id}:retry")
    assert retried.json()["code"] == "operation-not-stuck"


async def test_no_more_watchers_than_allowed(sqlite_url: str, tmp_path: Path) -> None:
    watching = {"accept": "text/event-stream"}
    async with running_api(sqlite_url, tmp_path, max_watchers=1) as api, api.stream("p1-viewer", P1, **watching) as stream:
        assert await stream.block() is not None
        async with api.stream("p1-viewer", P1, **watching) as second:
            assert await second.block() is None
            assert second.status == 503
