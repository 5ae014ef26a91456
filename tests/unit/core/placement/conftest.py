"""Factories of valid objects; a test states only what it is about."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from trimtab_controller.core.placement import (
    HostSnapshot,
    NetworkReach,
    PlacementKind,
    PlacementRequest,
    PoolPlace,
    PoolSnapshot,
)

GIB = 1 << 30

A_HOST = HostSnapshot(
    host_id="host-node1",
    name="node1",
    vcpus_limit=16,
    memory_limit_mib=15872,
    memory_reserve_mib=1024,
    labels={"zone": "a"},
    host_class="default",
    class_cpu_model="EPYC",
    class_machine="pc-q35-7.2",
    arch="x86_64",
    accelerator="kvm",
    usable_cpu_models=frozenset({"EPYC", "qemu64"}),
    cpu_features=frozenset({"aes", "avx2"}),
    machines=frozenset({"pc-q35-7.2", "pc-q35-7.1"}),
    has_uefi=True,
    pools={"pool-local": True, "pool-nfs": True},
    networks={"net-1": NetworkReach(True, 1500)},
)

A_REQUEST = PlacementRequest(
    request_id="op-1",
    vm_id="vm-1",
    vm_name="web1",
    project_id="proj-1",
    kind=PlacementKind.CREATE,
    vcpus=2,
    memory_mib=2048,
)


@pytest.fixture
def make_host() -> Callable[..., HostSnapshot]:
    """A host named `name` that any plain request fits, changed by the keywords."""

    def make(name: str = "node1", **changes: Any) -> HostSnapshot:
        return replace(A_HOST, host_id=f"host-{name}", name=name, **changes)

    return make


@pytest.fixture
def make_request() -> Callable[..., PlacementRequest]:
    def make(**changes: Any) -> PlacementRequest:
        return replace(A_REQUEST, **changes)

    return make


@pytest.fixture
def local_pool() -> Callable[..., PoolSnapshot]:
    """The local pool `local` with these free GiB by host name, of 100."""

    def make(**free_gib: int) -> PoolSnapshot:
        places = {f"host-{name}": PoolPlace(100 * GIB, 100 * GIB, (100 - free) * GIB) for name, free in free_gib.items()}
        return PoolSnapshot(pool_id="pool-local", name="local", is_shared=False, places=places)

    return make


@pytest.fixture
def shared_pool() -> Callable[..., PoolSnapshot]:
    def make(free_gib: int = 100, **changes: Any) -> PoolSnapshot:
        place = PoolPlace(100 * GIB, 100 * GIB, (100 - free_gib) * GIB)
        return replace(PoolSnapshot(pool_id="pool-nfs", name="nfs", is_shared=True, places={"": place}), **changes)

    return make
