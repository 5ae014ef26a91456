"""Lists: pages, order, filters, selectors, and a number of queries that does not grow."""

from typing import Any

import pytest
import sqlalchemy as sa

from tests.api.kit import Api

VMS = "/v1/projects/p1/vms"


async def every_page(api: Api, path: str, **params: Any) -> list[list[str]]:
    pages = []
    while True:
        answer = await api.call("admin", "GET", path, params=params)
        assert answer.status_code == 200, answer.text
        pages.append([one["name"] for one in answer.json()["items"]])
        token = answer.json()["next_page_token"]
        if not token:
            return pages
        params["page_token"] = token


async def some_vms(api: Api, count: int) -> None:
    for i in range(count):
        await api.make_vm(f"web{i:02d}", labels={"parity": str(i % 2)})
        api.clock.turn(seconds=1)


@pytest.mark.parametrize("order_by", ["", "name desc", "created_at", "created_at desc"])
async def test_pages_show_everything_once_in_order(api_on_each: Api, order_by: str) -> None:
    api = api_on_each
    await some_vms(api, 7)
    pages = await every_page(api, VMS, page_size=3, order_by=order_by)
    assert [len(page) for page in pages] == [3, 3, 1]
    shown = [name for page in pages for name in page]
    assert shown == sorted(shown, reverse=order_by.endswith("desc"))
    assert len(set(shown)) == 7


async def test_the_basic_view_shows_of_each_vm_the_same_as_the_whole(api_on_each: Api) -> None:
    api = api_on_each
    declared = await api.make_vm("declared", networks=[{"network": "default", "ip": "10.20.0.5"}], labels={"tier": "web"})
    seen = await api.make_vm("seen")
    at = api.clock.now()
    await api.set_vm(
        seen["id"],
        host_id=api.ids["node1"],
        observed_host_id=api.ids["node1"],
        observed_state="running",
        observed_addresses=["10.20.0.77"],
        observed_at=at,
        problem="a disk is full",
        hand_changes=["vcpus"],
    )
    api.clock.turn(seconds=3)
    first = await parts_like_wholes(api)
    assert [one["id"] for one in first] == [declared["id"], seen["id"]]
    assert all(part["operation"]["id"] for part in first), "the one that is under way is shown"
    await api.end_operations()
    assert [part["operation"] for part in await parts_like_wholes(api)] == [None, None]
    api.clock.turn(seconds=4)
    assert [part["observed"]["age_s"] for part in await parts_like_wholes(api)] == [7.0, 7.0]
    await api.set_vm(declared["id"], labels={"tier": "db"}, observed_state="crashed", observed_addresses=["10.20.0.5"])
    await api.set_vm(seen["id"], host_id=api.ids["node2"], observed_at=api.clock.now())
    last = await parts_like_wholes(api)
    assert [(part["host"], part["labels"]) for part in last] == [("", {"tier": "db"}), ("node2", {})]


async def parts_like_wholes(api: Api) -> list[dict[str, Any]]:
    """Return the basic view of each vm, which is the same as of its whole."""
    wholes = (await api.call("p1-viewer", "GET", VMS)).json()["items"]
    parts: list[dict[str, Any]] = (await api.call("p1-viewer", "GET", VMS, params={"view": "basic"})).json()["items"]
    for part, whole in zip(parts, wholes, strict=True):
        nics = [nic["addresses"] for nic in whole["nics"] if nic["addresses"] and not whole["observed"]["addresses"]]
        assert [one["addresses"] for one in part["nics"]] == nics
        others = {key: value for key, value in part.items() if key != "nics"}
        assert others == _part_of(whole, others)
    return parts


def _part_of(whole: Any, part: Any) -> Any:
    """Return what `whole` has of the fields of `part`."""
    return {key: _part_of(whole[key], value) if isinstance(value, dict) else whole[key] for key, value in part.items()}


async def test_a_page_is_not_upset_by_what_comes_and_goes(api: Api) -> None:
    await some_vms(api, 4)
    first = (await api.call("p1-viewer", "GET", VMS, params={"page_size": 2})).json()
    await api.make_vm("aaa")
    rest = {"page_size": 2, "page_token": first["next_page_token"]}
    second = (await api.call("p1-viewer", "GET", VMS, params=rest)).json()
    assert [one["name"] for one in second["items"]] == ["web02", "web03"]


async def test_a_token_serves_only_its_own_list(api: Api) -> None:
    await some_vms(api, 3)
    token = (await api.call("p1-viewer", "GET", VMS, params={"page_size": 1})).json()["next_page_token"]
    for params in ({"filter": "state=running"}, {"order_by": "name desc"}, {"selector": "a=b"}):
        answer = await api.call("p1-viewer", "GET", VMS, params={"page_token": token, **params})
        assert (answer.status_code, answer.json()["code"]) == (400, "page-token")
    elsewhere = await api.call("p1-viewer", "GET", "/v1/projects/p1/volumes", params={"page_token": token})
    assert elsewhere.json()["code"] == "page-token"


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ({"selector": "parity=1"}, ["web01"]),
        ({"filter": "host=node1"}, ["web00"]),
        ({"filter": "state=running,host=node1"}, ["web00"]),
        ({"filter": "state=running", "selector": "parity=1"}, []),
        ({"filter": "image=debian,network=default"}, []),
        ({"filter": "desired=running"}, ["web00", "web01", "web02"]),
        ({"filter": "name=web02"}, ["web02"]),
    ],
)
async def test_filters_and_selectors(api_on_each: Api, params: dict[str, str], names: list[str]) -> None:
    api = api_on_each
    await some_vms(api, 3)
    first = (await api.call("p1-viewer", "GET", f"{VMS}/web00")).json()
    await api.set_vm(first["id"], host_id=api.ids["node1"], observed_state="running")
    answer = await api.call("p1-viewer", "GET", VMS, params=params)
    assert [one["name"] for one in answer.json()["items"]] == names, answer.text


@pytest.mark.parametrize(
    "path",
    [
        VMS,
        "/v1/projects/p1/volumes",
        "/v1/projects/p1/images",
        "/v1/projects/p1/networks",
        "/v1/operations",
        "/v1/projects/p1/operations",
        "/v1/users",
        "/v1/projects",
        "/v1/pools",
        "/v1/hosts",
        "/v1/events",
    ],
)
async def test_a_list_takes_the_same_number_of_queries_for_few_and_for_many(api: Api, path: str) -> None:
    statements: list[str] = []

    def note(statement: str) -> None:
        # Beside it the spool is swept and the tail of the events is looked at.
        is_beside = any(text in statement for text in ("upload", "max(event.seq)", "event.seq >"))
        if statement.startswith("SELECT") and not is_beside:
            statements.append(statement)

    def look(connection: Any, *_rest: Any) -> None:
        connection.set_trace_callback(note)  # of the driver: prepared statements do not pass by SQLAlchemy

    nic = [{"network": "default"}]
    for i in range(8):
        await api.make_vm(f"web{i}", networks=nic)
    await api.call("admin", "GET", path)  # the use of the token is noted, inventories are read
    engine = api.db._database.engine
    engine.dispose()
    sa.event.listen(engine, "connect", look)
    await api.call("admin", "GET", path, params={"page_size": 5})
    for_few = len(statements)
    statements.clear()
    await api.call("admin", "GET", path, params={"page_size": 100})
    assert len(statements) == for_few, statements
    assert 2 <= for_few <= 14


async def test_operations_are_filtered_and_newest_first(api: Api) -> None:
    await some_vms(api, 3)
    await api.end_operations()
    await api.call("p1-operator", "POST", f"{VMS}/web01:stop")
    live = (await api.call("p1-viewer", "GET", "/v1/projects/p1/operations", params={"done": "false"})).json()["items"]
    assert [(one["kind"], one["subject"]["name"]) for one in live] == [("vm.stop", "web01")]
    of_one = {"filter": "kind=vm.create", "subject": "web02"}
    created = (await api.call("p1-viewer", "GET", "/v1/operations", params=of_one)).json()["items"]
    assert [one["subject"]["name"] for one in created] == ["web02"]
    everything = (await api.call("p1-viewer", "GET", "/v1/operations")).json()["items"]
    assert [one["id"] for one in everything] == sorted((one["id"] for one in everything), reverse=True)
    first = await api.call("p1-viewer", "GET", "/v1/operations", params={"page_size": 3})
    rest = {"page_size": 3, "page_token": first.json()["next_page_token"]}
    assert len((await api.call("p1-viewer", "GET", "/v1/operations", params=rest)).json()["items"]) == 1
