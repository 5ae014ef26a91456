"""The doctor over REST: what a fleet's rows come out as, and who may ask."""

from datetime import timedelta
from typing import Any

from tests.api.kit import Api
from tests.api.test_plans import place
from trimtab_controller.services import doctor
from trimtab_controller.store import certificates, failover, schema


async def found(api: Api, **wanted: Any) -> list[dict[str, Any]]:
    """Return the findings with these values."""
    answer = await api.call("fleet-viewer", "GET", "/v1/doctor")
    assert answer.status_code == 200, answer.text
    return [one for one in answer.json()["items"] if all(one[key] == value for key, value in wanted.items())]


async def test_the_fleets_viewers_may_ask_and_a_projects_may_not(api: Api) -> None:
    for caller in ("fleet-viewer", "fleet-operator", "admin"):
        assert (await api.call(caller, "GET", "/v1/doctor")).status_code == 200
    for caller in ("p1-admin", "nobody"):
        assert (await api.call(caller, "GET", "/v1/doctor")).status_code == 403
    assert (await api.call("", "GET", "/v1/doctor")).status_code == 401


async def test_what_hurts_is_ranked_and_names_its_cure(api_on_each: Api) -> None:
    api = api_on_each
    now = api.clock.now()
    await api.equip()
    await place(api, "db", "node1", ha="restart", problem="its domain is paused: no space", machine="pc-q35-9.9")
    since = now - timedelta(hours=2)
    lost = schema.host.update().where(schema.host.c.name == "node2").values(connectivity="lost", connectivity_at=since)
    space = schema.pool_space.update().where(schema.pool_space.c.host_id == api.ids["node1"])

    def hurt(session: Any) -> None:
        session.execute(lost)
        session.execute(space.values(available_bytes=1 << 30))
        failover.set_control(session, now=now, is_paused=True)
        certificates.record(
            session, serial="1", host_id=api.ids["node1"], purpose="agent", not_after=now - timedelta(hours=1), now=now
        )

    await api.write(hurt)
    answer = (await api.call("fleet-viewer", "GET", "/v1/doctor")).json()
    assert answer["is_well"] is False
    assert answer["total"] == len(answer["items"])
    by_kind = {one["kind"]: one for one in answer["items"]}
    severities = [one["severity"] for one in answer["items"]]
    assert severities == sorted(severities, key=("severe", "warning", "notice").index)
    severe = {one["kind"] for one in answer["items"] if one["severity"] == "severe"}
    assert severe >= {"host-lost", "pool-full", "failover-paused", "certificate-expired", "host-unprotected", "host-lost-machine"}
    assert by_kind["host-lost"]["subject"] == "host node2"
    assert by_kind["host-lost"]["since"].startswith(since.isoformat()[:19])
    assert by_kind["vm-problem"] == {
        "severity": "warning",
        "kind": "vm-problem",
        "subject": "vm p1/db",
        "what": "its domain is paused: no space",
        "since": None,
        "cure": "trimtab vm get db -p p1",
    }
    assert by_kind["not-covered"]["subject"] == "host node1", "node2 is lost: nobody takes db"
    assert all(one["cure"] for one in answer["items"])
    again = (await api.call("fleet-viewer", "GET", "/v1/doctor")).json()
    assert again["items"] == answer["items"]


async def test_a_fleet_in_order_is_well(api: Api) -> None:
    await api.equip()
    answer = (await api.call("fleet-viewer", "GET", "/v1/doctor")).json()
    assert answer["is_well"] is True
    assert {one["kind"] for one in answer["items"]} == {"fence-missing"}
    assert answer["counts"] == [{"severity": "notice", "kind": "fence-missing", "count": 2}]


async def test_only_snapshots_that_are_kept_count(api: Api) -> None:
    vm = await place(api, "db", "node1")
    made = api.clock.now() - timedelta(days=40)
    base = {"vm_id": vm["id"], "volumes": [], "created_at": made}

    def keep(session: Any) -> None:
        columns = schema.snapshot.c
        for identifier, more in (("snap-a", {}), ("snap-b", {"is_temporary": True}), ("snap-c", {"deleted_at": made})):
            values = {"id": identifier, "name": identifier, **base, **more}
            session.execute(schema.snapshot.insert().values({key: value for key, value in values.items() if key in columns}))

    await api.write(keep)
    (one,) = await found(api, kind="snapshot-old")
    assert (one["subject"], one["severity"]) == ("vm p1/db", "warning")
    assert one["what"] == "its snapshot snap-a is 40 days old"


async def test_the_number_of_queries_is_the_same_for_any_fleet(api: Api) -> None:
    from sqlalchemy import event

    def queries(session: Any) -> int:
        seen: list[str] = []
        connection = session.connection()
        event.listen(connection, "before_cursor_execute", lambda *given: seen.append(given[2]))
        doctor.read(session, now=api.clock.now())
        return len(seen)

    await api.equip()
    # The first reading also fetches inventories, which are kept by digest afterwards.
    await api.db.read(queries)
    few = await api.db.read(queries)
    for i in range(6):
        await api.make_vm(f"vm{i}")
    many = await api.db.read(queries)
    assert few == many <= 20


def test_clock_skews_come_from_what_gateways_wrote() -> None:
    states = {"host-1": {"skew_ms": -700}, "host-2": {"skew_ms": 0}, "host-3": {}}
    assert doctor.skews_of(states) == {"host-1": -700}
