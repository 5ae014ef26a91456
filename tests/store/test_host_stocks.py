"""What agents report becomes what vms can be given: huge pages by cell, devices that were set aside; ordinary memory without them."""

from dataclasses import replace

import pytest
import sqlalchemy as sa

from tests.api.kit import INVENTORY
from tests.placement_rows import NOW, ask, found
from trimtab_controller.store import claims, host_reports, hosts, schema
from trimtab_controller.store.database import Database
from trimtab_protos.messages import NumaCell, PciDevice

HOST = "host-00000"
GPU = PciDevice(address="0000:41:00.0", vendor_id="0x10de", product_id="0x20b0", class_id="0x030200", driver="vfio-pci")
NIC = replace(GPU, address="0000:01:00.0", vendor_id="0x8086", product_id="0x1572", driver="i40e")
PAGES = "cell:0:pages:1048576"


def report(database: Database, *, pages: int, devices: int) -> None:
    told = replace(
        INVENTORY,
        memory_mib=65_536,
        numa_cells=(NumaCell(index=0, memory_mib=65_536, huge_pages={1 << 20: pages}),),
        pci_devices=(NIC, *(replace(GPU, address=f"0000:4{n}:00.0") for n in range(devices))),
        digest=f"{pages}-{devices}",
    )
    database.write(lambda session: host_reports.store_inventory(session, HOST, told, now=NOW))


def stocks(database: Database) -> dict[str, tuple[int, int]]:
    table = schema.host_stock
    rows = database.read(lambda session: session.execute(sa.select(table).where(table.c.host_id == HOST)).all())
    return {row.resource: (row.capacity, row.claimed) for row in rows}


def test_huge_pages_and_devices_set_aside_are_counted_and_a_nic_of_the_host_is_not(database: Database) -> None:
    found(database, 1)
    report(database, pages=16, devices=2)
    each = {f"pci:10de-20b0:0000:4{number}:00.0": (1, 0) for number in range(2)}
    assert stocks(database) == {PAGES: (16, 0), "device:10de-20b0": (2, 0)} | each
    host = database.read(lambda session: hosts.get(session, HOST))
    assert host.memory_limit_mib == 65_536 - 16 * 1024 - 1024, "pages and the reserve are no ordinary memory"
    report(database, pages=0, devices=3)
    assert stocks(database)["device:10de-20b0"] == (3, 0)
    assert PAGES not in stocks(database)


def test_what_a_vm_holds_does_not_vanish_with_a_report(database: Database) -> None:
    _, ids = found(database, 1)
    report(database, pages=16, devices=2)
    vm_id = ask(database, ids, 1, vcpus=1, memory_mib=64)
    held = {PAGES: 8, "device:10de-20b0": 1}
    database.write(lambda session: claims.take_stock(session, vm_id=vm_id, host_id=HOST, amounts=held))
    report(database, pages=4, devices=0)
    assert stocks(database) == {PAGES: (8, 8), "device:10de-20b0": (1, 1)}
    for resource in held:
        with pytest.raises(claims.ClaimRefused):
            database.write(
                lambda session, one=resource: claims.take_stock(session, vm_id=vm_id, host_id=HOST, amounts={one: 1})  # type: ignore[misc]
            )


def test_each_device_is_given_once_and_comes_back_with_the_claim(database: Database) -> None:
    _, ids = found(database, 1)
    report(database, pages=0, devices=3)
    vm_ids = [ask(database, ids, number, vcpus=1, memory_mib=64) for number in range(3)]

    def take(vm_id: str, count: int) -> None:
        database.write(lambda session: claims.take_devices(session, vm_id=vm_id, host_id=HOST, kind="10de-20b0", count=count))

    take(vm_ids[0], 2)
    with pytest.raises(claims.ClaimRefused):
        take(vm_ids[1], 2)
    take(vm_ids[2], 1)
    held = database.read(lambda session: session.execute(sa.select(schema.claim_stock)).all())
    assert len({row.resource for row in held}) == 3
    assert {row.vm_id for row in held} == {vm_ids[0], vm_ids[2]}
