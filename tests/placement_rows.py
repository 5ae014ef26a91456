"""Rows for tests and benchmarks of placement that need no agents: hosts that are up, and vms whose requests wait for the leader."""

from datetime import UTC, datetime
from typing import Any

from trimtab_controller.clock import mint
from trimtab_controller.store import hosts, leases, placements, schema
from trimtab_controller.store.database import Database, Session

GIB = 1 << 30
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def found(db: Database, host_count: int, *, vcpus_limit: int = 100_000) -> tuple[int, dict[str, str]]:
    """Insert a project, hosts that are up, a shared pool and a network; return the leader's term and the ids."""
    ids = {kind: mint(kind) for kind in ("proj", "hc", "pool", "net")}

    def work(session: Session) -> int:
        session.execute(schema.project.insert().values(id=ids["proj"], name="default", created_at=NOW))
        hosts.insert_class(session, host_class_id=ids["hc"], name=hosts.DEFAULT_CLASS, now=NOW)
        classes = schema.host_class.update().where(schema.host_class.c.id == ids["hc"])
        session.execute(classes.values(machine="pc-q35-7.2", cpu_model="EPYC"))
        pool = {"name": "nfs", "kind": "dir", "path": "/srv/nfs", "is_shared": True, "settings": {}}
        session.execute(schema.pool.insert().values(id=ids["pool"], sharing_proven_at=NOW, created_at=NOW, **pool))
        space = {"capacity_bytes": 10**7 * GIB, "available_bytes": 10**7 * GIB, "claimed_bytes": 0}
        session.execute(schema.pool_space.insert().values(pool_id=ids["pool"], host_id="", observed_at=NOW, **space))
        for number in range(host_count):
            _host(session, f"host-{number:05}", number, ids, vcpus_limit)
        taken = leases.take(session, leases.ENGINE, owner="bench", seen=None, ttl_ms=10**9, now=NOW)
        assert taken is not None
        return taken.term

    return db.write(work), ids


def _host(session: Session, host_id: str, number: int, ids: dict[str, str], vcpus_limit: int) -> None:
    inventory = {"machines": ["pc-q35-7.2"], "usable_cpu_models": ["EPYC"], "arch": "x86_64", "accelerator": "kvm"}
    session.execute(
        schema.host.insert().values(
            id=host_id,
            name=f"node{number}",
            host_class_id=ids["hc"],
            labels={"zone": f"z{number % 3}"},
            agent_address="",
            migration_address="",
            machine_id=host_id,
            smbios_uuid=host_id,
            connectivity="up",
            connectivity_at=NOW,
            inventory={**_INVENTORY, **inventory},
            inventory_digest=f"digest-{number % 4}-{host_id}",
            vcpus_limit=vcpus_limit,
            memory_limit_mib=10**9,
            created_at=NOW,
        )
    )
    session.execute(schema.pool_host.insert().values(pool_id=ids["pool"], host_id=host_id, state="ready", observed_at=NOW))


_INVENTORY = {
    "hostname": "node",
    "machine_id": "m",
    "smbios_uuid": "u",
    "boot_id": "b",
    "kernel": "6.1",
    "agent_version": "1",
    "libvirt_version": "9",
    "qemu_version": "7.2",
    "cpu_vendor": "AMD",
    "cpu_model": "EPYC",
    "cpus": 64,
    "capabilities": ["host-devices", "numa-tuning"],
    "memory_mib": 256 * 1024,
}


def ask(
    db: Database,
    ids: dict[str, str],
    number: int,
    *,
    vcpus: int,
    memory_mib: int,
    wishes: dict[str, Any] | None = None,
    priority: int = 0,
    group_id: str = "",
) -> str:
    """Queue the request of a new vm; return the vm's id."""
    vm_id = mint("vm")

    def work(session: Session) -> None:
        shape = {"vcpus": vcpus, "memory_mib": memory_mib, "wishes": wishes or {}, "priority": priority}
        _vm(session, ids, vm_id, number, shape)
        if group_id:
            session.execute(schema.vm_group_member.insert().values(vm_group_id=group_id, vm_id=vm_id))

    db.write(work)
    return vm_id


def _vm(session: Session, ids: dict[str, str], vm_id: str, number: int, shape: dict[str, Any]) -> None:
    operation_id = mint("op")
    empty: dict[str, Any] = {"labels": {}, "cpu_features": [], "device_addresses": {}, "seed": {}, "host_selector": {}}
    session.execute(
        schema.vm.insert().values(
            id=vm_id,
            uuid=vm_id[-36:],
            project_id=ids["proj"],
            name=f"vm{number}-{operation_id[-8:]}",
            arch="x86_64",
            vcpus_max=shape["vcpus"],
            memory_max_mib=shape["memory_mib"],
            firmware="bios",
            desired_power="running",
            observed_state="absent",
            observed_addresses=[],
            created_at=NOW,
            **shape,
            **empty,
        )
    )
    session.execute(
        schema.volume.insert().values(
            id=mint("vol"),
            project_id=ids["proj"],
            name=f"{vm_id}-root",
            pool_id=ids["pool"],
            vm_id=vm_id,
            disk_index=0,
            format="qcow2",
            size_bytes=10 * GIB,
            observed_state="absent",
            created_at=NOW,
        )
    )
    session.execute(
        schema.operation.insert().values(
            id=operation_id,
            kind="vm.create",
            saga_version=1,
            project_id=ids["proj"],
            subject_id=vm_id,
            subject_name=f"vm{number}",
            is_exclusive=False,
            state="waiting",
            params={},
            next_run=NOW,
            actor="bench",
            request_id="",
            created_at=NOW,
            updated_at=NOW,
        )
    )
    placements.ask(
        session,
        operation_id=operation_id,
        vm_id=vm_id,
        project_id=ids["proj"],
        kind="create",
        to_host_id="",
        previous_host_id="",
        now=NOW,
    )
