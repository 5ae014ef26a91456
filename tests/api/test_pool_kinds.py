"""Pools of block storage and encrypted volumes over HTTP: what each kind takes, what is refused by which name, what is never shown."""

from typing import Any

import pytest

from tests.api.kit import Api
from trimtab_controller.store import schema

VOLUMES = "/v1/projects/p1/volumes"
TARGET = "iqn.2026-01.example:san"
SAN = {"name": "san", "kind": "iscsi", "portal": "10.0.0.5:3260", "target": TARGET}


async def ready(api: Api, name: str) -> None:
    """Say of a pool what its operation would."""

    def work(session: Any) -> None:
        table = schema.pool
        session.execute(table.update().where(table.c.name == name).values(sharing_proven_at=api.clock.now()))

    await api.write(work)


async def test_a_pool_of_luns_says_what_lies_behind_it_and_keeps_its_password_sealed(api_on_each: Api) -> None:
    api = api_on_each
    asked = {**SAN, "chap_user": "fleet", "secret": "chap-that-nobody-reads"}
    made = await api.call("admin", "POST", "/v1/pools", json=asked)
    assert made.status_code == 202, made.text
    assert "chap-that-nobody-reads" not in made.text
    shown = (await api.call("fleet-viewer", "GET", "/v1/pools/san")).json()
    assert (shown["kind"], shown["is_shared"], shown["source"]) == ("iscsi", True, f"10.0.0.5:3260 {TARGET}")
    (sealed,) = await api.rows(schema.pool_secret)
    assert "chap-that-nobody-reads" not in str(sealed)
    again = await api.call("admin", "POST", "/v1/pools", json={**SAN, "name": "san2"})
    assert again.json()["code"] == "pool-path-taken"


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({**SAN, "target": ""}, "target-missing", "target"),
        ({**SAN, "chap_user": "fleet"}, "secret-missing", "secret"),
        ({**SAN, "secret": "word"}, "chap-user-missing", "chap_user"),
        ({**SAN, "path": "/srv/x"}, "path-not-taken", "path"),
        ({**SAN, "server": "nas"}, "server-not-taken", "server"),
        ({**SAN, "is_default": True}, "default-needs-files", "is_default"),
        ({"name": "fast", "kind": "dir"}, "path-missing", "path"),
        ({"name": "fast", "kind": "dir", "path": "/srv/f", "portal": "10.0.0.5"}, "portal-not-taken", "portal"),
        ({"name": "thin", "kind": "lvm_thin", "thin_pool": "t"}, "volume-group-missing", "volume_group"),
        ({"name": "ceph", "kind": "rbd", "ceph_pool": "vms", "ceph_user": "u", "secret": "k"}, "monitors-missing", "monitors"),
    ],
)
async def test_a_field_that_is_missing_or_another_kinds_is_named(api: Api, body: dict[str, Any], code: str, field: str) -> None:
    refused = await api.call("admin", "POST", "/v1/pools", json=body)
    assert (refused.status_code, refused.json()["code"]) == (400, code), refused.text
    assert refused.json()["context"]["field"] == field
    assert await api.rows(schema.pool_secret) == []


async def test_a_volume_is_a_lun_that_no_other_is(api_on_each: Api) -> None:
    api = api_on_each
    await api.equip()
    await api.call("admin", "POST", "/v1/pools", json=SAN)
    await ready(api, "san")
    body = {"name": "data1", "pool": "san", "lun": 1, "size_bytes": 1 << 30}
    made = await api.call("p1-operator", "POST", VOLUMES, json=body)
    assert made.status_code == 202, made.text
    volume = made.json()["volume"]
    assert (volume["lun"], volume["format"], volume["is_encrypted"]) == (1, "raw", False)
    for change, code in (
        ({"name": "data2"}, "lun-taken"),
        ({"name": "data2", "lun": None}, "lun-missing"),
        ({"name": "data2", "lun": 2, "image": "debian"}, "pool-without-files"),
        ({"name": "data2", "lun": 2, "is_encrypted": True}, "pool-without-files"),
        ({"name": "data2", "lun": 2, "format": "qcow2"}, "pool-without-files"),
        ({"name": "data2", "pool": "local"}, "lun-not-taken"),
    ):
        refused = await api.call("p1-operator", "POST", VOLUMES, json={**body, **change})
        assert refused.json()["code"] == code, refused.text


async def test_images_and_new_vms_go_to_pools_of_files_only(api: Api) -> None:
    await api.equip()
    await api.call("admin", "POST", "/v1/pools", json=SAN)
    body = {"name": "web9", "image": "debian", "memory_mib": 128, "pool": "san"}
    refused = await api.call("p1-operator", "POST", "/v1/projects/p1/vms", json=body)
    assert (refused.status_code, refused.json()["code"]) == (400, "pool-without-files"), refused.text


async def test_an_encrypted_volume_has_a_sealed_key_that_nobody_is_shown(api_on_each: Api) -> None:
    api = api_on_each
    await api.equip()
    made = await api.call("p1-operator", "POST", VOLUMES, json={"name": "vault", "size_bytes": 1 << 30, "is_encrypted": True})
    assert made.status_code == 202, made.text
    assert made.json()["volume"]["is_encrypted"] is True
    (kept,) = await api.rows(schema.volume_key)
    assert kept["volume_id"] == made.json()["volume"]["id"]
    shown = await api.call("p1-viewer", "GET", f"{VOLUMES}/vault")
    assert kept["sealed_key"] not in shown.text
    vm = {"name": "web1", "image": "debian", "memory_mib": 128, "encrypted": True}
    created = await api.call("p1-operator", "POST", "/v1/projects/p1/vms", json=vm)
    assert created.status_code == 202, created.text
    assert len(await api.rows(schema.volume_key)) == 2


async def test_a_vm_with_an_encrypted_disk_takes_no_backup_policy_and_no_snapshot(api: Api) -> None:
    await api.equip()
    vm = {"name": "web1", "image": "debian", "memory_mib": 128, "encrypted": True}
    await api.call("p1-operator", "POST", "/v1/projects/p1/vms", json=vm)
    refused = await api.call("p1-operator", "POST", "/v1/projects/p1/vms/web1/snapshots", json={"name": "before"})
    assert (refused.status_code, refused.json()["code"]) == (409, "volume-encrypted"), refused.text
