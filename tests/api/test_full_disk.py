"""A full disk on the controller: what can be read is read, what would change something says why not and what to do."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.api.kit import running_api
from tests.unit.controller_rpc.test_full_disk import fill_up
from trimtab_controller.store import schema
from trimtab_controller.store.database import Database

VMS = "/v1/projects/p1/vms"
VM = {"name": "web1", "image": "debian", "memory_mib": 512}


async def test_a_full_disk_refuses_mutations_with_a_next_command_and_answers_reads(
    tiny_url: str, tiny_disk: Path, tmp_path: Path
) -> None:
    async with running_api(tiny_url, tmp_path, disk_keep_free_bytes=16 << 20) as api:
        assert (await api.call("p1-operator", "POST", VMS, json=VM)).status_code == 202
        filler = fill_up(tiny_disk)
        refused = await api.call("p1-operator", "POST", VMS, json=VM | {"name": "web2"})
        assert (refused.status_code, refused.json()["code"], refused.json()["kind"]) == (507, "database-full", "unavailable")
        assert refused.json()["context"]["next"] == "trimtab-controller check"
        assert "0 MiB are free" in refused.json()["detail"]
        shown = await api.call("p1-viewer", "GET", VMS)
        assert [one["name"] for one in shown.json()["items"]] == ["web1"]
        filler.unlink()
        assert (await api.call("p1-operator", "POST", VMS, json=VM | {"name": "web2"})).status_code == 202
        assert len(await api.rows(schema.vm)) == 2


@pytest.mark.postgres
async def test_where_postgresql_has_used_what_was_kept_for_leases_mutations_wait_and_reads_do_not(
    postgres_url: str, tmp_path: Path
) -> None:
    async with running_api(postgres_url, tmp_path) as api:
        assert (await api.call("p1-operator", "POST", VMS, json=VM)).status_code == 202
        spent = Database(postgres_url)
        spent.write(lambda session: session.execute(sa.text("ALTER TABLE ballast RENAME TO used")))
        refused = await api.call("p1-operator", "POST", VMS, json=VM | {"name": "web2"})
        assert (refused.status_code, refused.json()["code"]) == (507, "database-full")
        shown = await api.call("p1-viewer", "GET", VMS)
        assert [one["name"] for one in shown.json()["items"]] == ["web1"]
        spent.write(lambda session: session.execute(sa.text("ALTER TABLE used RENAME TO ballast")))
        spent.close()
        assert (await api.call("p1-operator", "POST", VMS, json=VM | {"name": "web2"})).status_code == 202
