"""The digest of a decision's inputs: equal where they are equal, another one where anything is that a decision may turn on."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.placement import (
    CellSnapshot,
    FleetSnapshot,
    GroupSnapshot,
    HostSnapshot,
    NetworkReach,
    PlacementRequest,
    PoolSnapshot,
    Stock,
    Taint,
    explain,
)
from trimtab_controller.core.placement.journal import InputDigest

MakeHost = Callable[..., HostSnapshot]
MakeRequest = Callable[..., PlacementRequest]
MakePool = Callable[..., PoolSnapshot]

CHANGES: dict[str, Any] = {
    "name": "node7",
    "host_id": "host-other",
    "vcpus_limit": 15,
    "memory_limit_mib": 15000,
    "vcpus_claimed": 1,
    "memory_claimed_mib": 1,
    "unmanaged_vcpus": 1,
    "unmanaged_memory_mib": 1,
    "memory_reserve_mib": 2048,
    "labels": {"zone": "b"},
    "host_class": "gold",
    "class_cpu_model": "qemu64",
    "class_machine": "pc-q35-7.1",
    "is_cordoned": True,
    "connectivity": HostConnectivity.LOST,
    "arch": "aarch64",
    "accelerator": "tcg",
    "usable_cpu_models": frozenset({"EPYC"}),
    "cpu_features": frozenset({"aes"}),
    "machines": frozenset({"pc-q35-7.2"}),
    "qemu_series": (7, 2),
    "has_uefi": False,
    "capabilities": frozenset({"tpm"}),
    "pools": {"pool-local": False, "pool-nfs": True},
    "networks": {"net-1": NetworkReach(False, 1500)},
    "image_ids": frozenset({"img-1"}),
    "taints": frozenset({Taint("gpu")}),
    "exclusive_project_id": "proj-2",
    "cells": (CellSnapshot(cell=0, cpus_limit=2),),
    "devices": {"gpu": Stock(1)},
    "resources": {"licence": Stock(1)},
    "can_be_proven_off": False,
    "generation": 5,
}


def digest(fleet: FleetSnapshot, *requests: PlacementRequest) -> str:
    """Return the digest of the last of these decisions of one batch."""
    digests = InputDigest(fleet)
    return [digests.next(explain(fleet, request).as_json()) for request in requests][-1]


@pytest.mark.parametrize("changed", [field.name for field in fields(HostSnapshot)])
def test_whatever_is_known_of_a_host_is_in_the_digest(changed: str, make_host: MakeHost, make_request: MakeRequest) -> None:
    before, after = make_host("node1"), make_host("node1")
    request = make_request()
    assert digest(FleetSnapshot.of([before]), request) == digest(FleetSnapshot.of([after]), request)
    other = HostSnapshot(**{field.name: getattr(before, field.name) for field in fields(before)} | {changed: CHANGES[changed]})
    assert digest(FleetSnapshot.of([before]), request) != digest(FleetSnapshot.of([other]), request)


def test_pools_and_members_of_groups_are_in_the_digest(
    make_host: MakeHost, make_request: MakeRequest, local_pool: MakePool, shared_pool: MakePool
) -> None:
    hosts, request = [make_host("node1"), make_host("node2")], make_request()
    fleets = [
        FleetSnapshot.of(hosts, [local_pool(node1=5, node2=5), shared_pool(5)]),
        FleetSnapshot.of(hosts, [local_pool(node1=5, node2=6), shared_pool(5)]),
        FleetSnapshot.of(hosts, [local_pool(node1=5, node2=5), shared_pool(6)]),
        FleetSnapshot.of(hosts, [local_pool(node1=5, node2=5), shared_pool(5, is_sharing_proven=False)]),
        FleetSnapshot.of(hosts, [local_pool(node1=5, node2=5)]),
        *(
            FleetSnapshot.of(
                hosts,
                [local_pool(node1=5, node2=5), shared_pool(5)],
                groups=[GroupSnapshot(group_id="grp-1", members={"vm-9": f"host-{name}"})],
            )
            for name in ("node1", "node2")
        ),
    ]
    assert len({digest(fleet, request) for fleet in fleets}) == len(fleets)


def test_order_of_hosts_and_sets_makes_no_other_digest(make_host: MakeHost, make_request: MakeRequest) -> None:
    names = [f"model-{number}" for number in range(50)]
    hosts = [
        [make_host(name, usable_cpu_models=frozenset(models), labels=dict(labels)) for name in order]
        for order, models, labels in (
            (("node1", "node2"), names, (("a", "1"), ("b", "2"))),
            (("node2", "node1"), names[::-1], (("b", "2"), ("a", "1"))),
        )
    ]
    request = make_request()
    assert digest(FleetSnapshot.of(hosts[0]), request) == digest(FleetSnapshot.of(hosts[1]), request)


def test_the_request_and_what_was_decided_before_it_are_in_the_digest(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet = FleetSnapshot.of([make_host("node1")])
    first, bigger, last = make_request(), make_request(vcpus=3), make_request(request_id="op-2")
    assert len({digest(fleet, last), digest(fleet, first, last), digest(fleet, bigger, last)}) == 3
    assert digest(fleet, first, last) == digest(fleet, first, last)
