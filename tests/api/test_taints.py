"""Taints of hosts, what operators count there, and what vms wish for, from the API to the rows that the scheduler reads."""

import sqlalchemy as sa

from tests.api.kit import Api
from trimtab_controller.store import schema


async def test_taints_are_merged_by_key_and_resources_counted(api: Api) -> None:
    async with api.as_("admin") as client:
        wish = {"taints": {"gpu": {"value": "a100"}, "old": {"effect": "avoid"}}, "resources": {"licence": 2}}
        changed = await client.patch("/v1/hosts/node1", json=wish)
        assert changed.status_code == 200, changed.text
        again = await client.patch("/v1/hosts/node1", json={"taints": {"old": None}})
        assert again.json()["taints"] == [{"key": "gpu", "value": "a100", "effect": "refuse"}]
        wrong = await client.patch("/v1/hosts/node1", json={"taints": {"gpu": {"effect": "maybe"}}})
        assert wrong.status_code == 400
    counted = await api.db.read(lambda session: session.execute(sa.select(schema.host_stock)).all())
    assert [(row.resource, row.capacity, row.claimed) for row in counted] == [("resource:licence", 2, 0)]
