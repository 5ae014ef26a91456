"""`GET /v1/doctor`: findings read from rows, on each database."""

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from tests.api.kit import Api
from tests.api.test_plans import place
from trimtab_controller.services import doctor
from trimtab_controller.store import doctor_rows, failover, schema


async def ask(api: Api) -> Any:
    answer = await api.call("fleet-viewer", "GET", "/v1/doctor")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_what_the_rows_say_is_told_ranked_and_with_its_cure(api_on_each: Api) -> None:
    api = api_on_each
    now = api.clock.now()

    def hurt(session: Session) -> None:
        host, node1, node2 = schema.host, api.ids["node1"], api.ids["node2"]
        session.execute(host.update().values(connectivity="up"))
        session.execute(host.update().where(host.c.id == node2).values(connectivity="lost", is_cordoned=True))
        certificates = schema.host_certificate
        for serial, hours in (("01", 1), ("02", 40)):  # the first one was renewed
            values = {"serial": serial, "purpose": "agent", "not_after": now + timedelta(hours=hours), "created_at": now}
            session.execute(certificates.insert().values(host_id=node1, **values))
        values = {"serial": "03", "purpose": "agent", "not_after": now - timedelta(hours=1), "created_at": now}
        session.execute(certificates.insert().values(host_id=node2, **values))
        space = schema.pool_space
        session.execute(space.delete())
        figures = {"capacity_bytes": 1000, "available_bytes": 10}
        session.execute(space.insert().values(pool_id=api.ids["local"], host_id=node1, **figures))

    await api.write(hurt)
    told = await ask(api)
    assert not told["is_healthy"]
    assert [(one["severity"], one["kind"], one["subject"]) for one in told["findings"]] == [
        ("critical", "certificate-expired", "host node2"),
        ("critical", "host-lost", "host node2"),
        ("critical", "pool-full", "pool local on node1"),
        ("notice", "host-cordoned", "host node2"),
    ]
    assert told["findings"][0]["cure"] == "trimtab host token create node2 --rejoin"


async def test_a_vm_with_a_problem_is_told_unless_an_operation_is_at_it(api: Api) -> None:
    await api.make_vm("web1")
    await api.write(lambda session: session.execute(schema.host.update().values(connectivity="up")))
    await api.write(lambda session: session.execute(schema.vm.update().values(problem="its disk is full")))
    assert await ask(api) | {"at": ""} == {"is_healthy": True, "findings": [], "at": ""}
    await api.write(lambda session: session.execute(schema.operation.update().values(state="done")))
    told = await ask(api)
    assert [(one["kind"], one["subject"], one["message"]) for one in told["findings"]] == [
        ("vm-problem", "vm p1/web1", "its disk is full")
    ]
    await api.write(lambda session: session.execute(schema.operation.update().values(state="needs_attention")))
    (parked, _problem) = (await ask(api))["findings"]
    (operation,) = await api.rows(schema.operation)
    assert (parked["kind"], parked["cure"]) == ("operation-needs-attention", f"trimtab op retry {operation['id']}")


async def test_viewers_of_the_fleet_may_ask_and_those_of_a_project_may_not(api: Api) -> None:
    answers = {caller: (await api.call(caller, "GET", "/v1/doctor")).status_code for caller in (*ALLOWED, *REFUSED, "")}
    assert answers == dict.fromkeys(ALLOWED, 200) | dict.fromkeys(REFUSED, 403) | {"": 401}


ALLOWED = ("fleet-viewer", "fleet-operator", "admin")
REFUSED = ("p1-admin", "nobody")


async def test_what_further_concerns_look_at_is_read_from_rows(api_on_each: Api) -> None:
    api = api_on_each
    await api.equip()
    await place(api, "db", "node1", ha="restart", machine="pc-q35-9.9")
    made, deleted = api.clock.now() - timedelta(days=40), api.clock.now()
    (vm,) = await api.rows(schema.vm)

    def hurt(session: Session) -> None:
        failover.set_control(session, now=made, is_paused=True, frozen="2 of 2 hosts are lost")
        snapshots = (("s1", {}), ("s2", {}), ("s3", {"is_temporary": True}), ("s4", {"deleted_at": deleted}))
        for name, more in snapshots:
            values = {"id": name, "name": name, "vm_id": vm["id"], "volumes": [], "created_at": made} | more
            session.execute(schema.snapshot.insert().values(values))
        network, reach, host = schema.network, schema.network_host, schema.host
        bridged = {"kind": "bridge", "bridge": "br0", "name": "lan"}
        session.execute(network.update().where(network.c.id == api.ids["default"]).values(**bridged))
        broken = reach.update().where(reach.c.host_id == api.ids["node2"], reach.c.network_id == api.ids["default"])
        session.execute(broken.values(state="failed", problem="no carrier", bridge="br7"))
        for name, bridge, mtu in (("node1", "br0", 1500), ("node2", "br7", 9000)):
            inventory = session.execute(sa.select(host.c.inventory).where(host.c.name == name)).scalar_one()
            told = {**inventory, "bridges": [{"name": bridge, "mtu": mtu}]}
            session.execute(host.update().where(host.c.name == name).values(inventory=told))
        session.execute(host.update().where(host.c.name == "node2").values(unmanaged_memory_mib=2000))

    await api.write(hurt)
    told = {(one["kind"], one["subject"]): one for one in (await ask(api))["findings"]}
    assert {key for key in told if key[0] not in {"vm-uncovered", "vm-drift"}} == {
        ("failover-paused", "failover"),
        ("failover-frozen", "failover"),
        ("host-unprotected", "host node1"),
        ("host-lost-machine", "host node1"),
        ("vms-bound-by-machine", "host node1"),
        ("mtu-mismatch", "network lan"),
        ("network-unusable", "network lan"),
        ("snapshot-old", "vm p1/db"),
        ("unmanaged-above-reserve", "host node2"),
    }
    assert "its snapshot s1, the oldest of 2, is 40 days old" in told["snapshot-old", "vm p1/db"]["message"]
    assert told["snapshot-old", "vm p1/db"]["since"].startswith(made.isoformat()[:19])
    assert "node1 1500, node2 9000" in told["mtu-mismatch", "network lan"]["message"]


@pytest.mark.parametrize(
    ("features", "listed", "lists_all", "told"),
    [
        (["-vmx", "?svm"], ["aes"], True, False),
        (["vmx"], ["aes"], True, True),
        (["-svm", "vmx"], ["aes", "vmx"], True, False),
        # An older agent lists what its host has beyond its model alone: nothing follows from what is not there.
        (["vmx"], ["aes"], False, False),
    ],
)
async def test_only_required_features_that_a_host_lists_no_longer_are_lost(
    api: Api, features: list[str], listed: list[str], lists_all: bool, told: bool
) -> None:
    await api.equip()
    await place(api, "db", "node1", cpu_features=features)
    more = {"cpu_features": listed, "capabilities": ["all-cpu-features"] if lists_all else []}

    def tell(session: Session) -> None:
        host = schema.host
        for row in session.execute(sa.select(host.c.id, host.c.inventory).where(host.c.name.in_(["node1", "node2"]))).all():
            session.execute(host.update().where(host.c.id == row.id).values(inventory={**row.inventory, **more}))

    await api.write(tell)
    kinds = {one["kind"] for one in (await ask(api))["findings"]}
    assert kinds & {"host-lost-cpu-features", "vms-bound-by-cpu-features"} == (
        {"host-lost-cpu-features", "vms-bound-by-cpu-features"} if told else set()
    )


async def test_the_number_of_queries_is_the_same_for_any_fleet(api: Api) -> None:
    def queries(session: Session) -> int:
        seen: list[str] = []
        sa.event.listen(session.connection(), "before_cursor_execute", lambda *given: seen.append(given[2]))
        doctor_rows.read(session, api.clock.now())
        return len(seen)

    await api.equip()
    await api.db.read(queries)  # from the second time on, statements that are asked before each mutation go past the listener
    few = await api.db.read(queries)
    for i in range(6):
        await api.make_vm(f"vm{i}")
    assert few == await api.db.read(queries) <= 20


async def test_clocks_are_judged_by_what_gateways_wrote(api: Api) -> None:
    states = {api.ids["node1"]: {"skew_ms": -700}, api.ids["node2"]: {}}
    patient = await api.db.read(lambda session: doctor.read(session, now=api.clock.now(), host_states=states))
    assert {one.name: one.skew_ms for one in patient.rows.hosts} == {"node1": -700, "node2": 0}
