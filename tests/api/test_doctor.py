"""`GET /v1/doctor`: findings read from rows, on each database."""

from datetime import timedelta
from typing import Any

from sqlalchemy.orm import Session

from tests.api.kit import Api
from trimtab_controller.store import schema


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
