"""The doctor's checks: what is found, how badly, with which cure; and that a healthy fleet is left in peace."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from trimtab_controller.core.doctor import CHECKS, examine
from trimtab_controller.core.doctor.model import (
    CertificateFacts,
    FenceFacts,
    FleetFacts,
    HostFacts,
    OperationFacts,
    PoolFacts,
    Severity,
    UncoveredFacts,
    VmFacts,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
GIB = 1 << 30


def host(name: str = "node1", **changes: Any) -> HostFacts:
    facts = HostFacts(
        id=f"host-{name}",
        name=name,
        connectivity="up",
        connectivity_at=NOW,
        is_cordoned=False,
        is_in_maintenance=False,
        memory_limit_mib=8192,
        memory_claimed_mib=4096,
        unmanaged_memory_mib=0,
        qemu_version="7.2.22",
        cpu_models=frozenset({"Nehalem", "Skylake-Server"}),
        certificates=(CertificateFacts(purpose="agent", not_after=NOW + timedelta(hours=48)),),
        fences=(FenceFacts(name="bmc", tested_at=NOW - timedelta(days=1), test_power="on", test_message=""),),
    )
    return replace(facts, **changes)


def vm(**changes: Any) -> VmFacts:
    facts = VmFacts(
        project="p1",
        name="web1",
        host_id="host-node1",
        cpu_model="Nehalem",
        desired_power="running",
        observed_state="running",
        problem="",
        is_busy=False,
        is_adjusted_at_next_stop=False,
    )
    return replace(facts, **changes)


def pool(**changes: Any) -> PoolFacts:
    facts = PoolFacts(
        name="fast", host="node1", capacity_bytes=100 * GIB, available_bytes=50 * GIB, reserve_permille=50, problem=""
    )
    return replace(facts, **changes)


HEALTHY = FleetFacts(now=NOW, hosts=(host(), host("node2")), pools=(pool(),), vms=(vm(),))


def test_a_healthy_fleet_is_left_in_peace() -> None:
    assert examine(HEALTHY) == ()


@pytest.mark.parametrize(
    ("change", "severity", "kind"),
    [
        ({"connectivity": "suspect"}, Severity.WARNING, "host-suspect"),
        ({"connectivity": "lost"}, Severity.CRITICAL, "host-lost"),
        ({"connectivity": "fenced"}, Severity.CRITICAL, "host-fenced"),
        ({"connectivity": "new"}, Severity.NOTICE, "host-never-connected"),
        ({"is_cordoned": True}, Severity.NOTICE, "host-cordoned"),
        ({"unmanaged_memory_mib": 4097}, Severity.WARNING, "unmanaged-memory"),
        ({"qemu_version": "7.2.9"}, Severity.NOTICE, "qemu-older"),
        ({"qemu_build": "7.2.22", "guest_qemus": (("web1", "7.2.17"),)}, Severity.NOTICE, "guest-qemu-other"),
        ({"certificates": (CertificateFacts(purpose="agent", not_after=NOW),)}, Severity.CRITICAL, "certificate-expired"),
        (
            {"certificates": (CertificateFacts(purpose="libvirt", not_after=NOW + timedelta(hours=8)),)},
            Severity.WARNING,
            "certificate-expiring",
        ),
        ({"fences": (FenceFacts(name="b", tested_at=None, test_power="", test_message=""),)}, Severity.WARNING, "fence-untested"),
        (
            {"fences": (FenceFacts(name="b", tested_at=NOW, test_power="", test_message="x"),)},
            Severity.CRITICAL,
            "fence-untested",
        ),
        (
            {"fences": (FenceFacts(name="b", tested_at=NOW, test_power="unknown", test_message="timed out"),)},
            Severity.CRITICAL,
            "fence-untested",
        ),
        (
            {"fences": (FenceFacts(name="b", tested_at=NOW - timedelta(days=8), test_power="on", test_message=""),)},
            Severity.NOTICE,
            "fence-untested",
        ),
    ],
)
def test_each_trouble_of_a_host_is_found_once_and_by_its_name(change: dict[str, Any], severity: Severity, kind: str) -> None:
    # The vm is elsewhere, so that nothing is said of where it could move.
    fleet = replace(HEALTHY, hosts=(host(**change), host("node2"), host("node3")), vms=(vm(host_id="host-node2"),))
    assert [(one.severity, one.kind, one.subject) for one in examine(fleet)] == [(severity, kind, "host node1")]


def test_a_host_with_vms_to_restart_that_nothing_can_prove_off_is_named() -> None:
    kept = replace(HEALTHY, hosts=(host(fences=()), host("node2")), vms=(vm(is_kept=True), vm(name="web2", is_kept=True)))
    (found,) = examine(kept)
    assert (found.severity, found.kind, found.subject) == (Severity.CRITICAL, "host-unprotected", "host node1")
    assert "2 of its vms" in found.message
    assert "fence config node1" in found.cure
    armed = replace(kept, hosts=(host(fences=(), is_warden_armed=True), host("node2")))
    with_device, not_kept = replace(kept, hosts=HEALTHY.hosts), replace(kept, vms=(vm(), vm(name="web2")))
    told = [[(one.severity, one.kind) for one in examine(fleet)] for fleet in (armed, with_device, not_kept)]
    # With one way to prove it off the other one is only worth a notice.
    assert told == [[(Severity.NOTICE, "fence-missing")], [(Severity.NOTICE, "warden-not-armed")], []]


def test_memory_that_is_not_ours_but_was_never_promised_hurts_nobody() -> None:
    assert examine(replace(HEALTHY, hosts=(host(unmanaged_memory_mib=4096), host("node2")))) == ()


def test_a_host_in_maintenance_is_cordoned_on_purpose() -> None:
    fleet = replace(HEALTHY, hosts=(host(is_cordoned=True, is_in_maintenance=True), host("node2")), vms=())
    assert examine(fleet) == ()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"available_bytes": 21 * GIB}, []),
        ({"available_bytes": 20 * GIB}, [(Severity.NOTICE, "pool-filling")]),
        ({"available_bytes": 10 * GIB}, [(Severity.WARNING, "pool-filling")]),
        ({"available_bytes": 6 * GIB}, [(Severity.WARNING, "pool-filling")]),
        ({"available_bytes": 5 * GIB}, [(Severity.WARNING, "pool-full")]),
        ({"available_bytes": 2 * GIB}, [(Severity.CRITICAL, "pool-full")]),
        ({"available_bytes": 2 * GIB, "reserve_permille": 0}, [(Severity.CRITICAL, "pool-full")]),
        ({"available_bytes": 3 * GIB, "reserve_permille": 0}, [(Severity.WARNING, "pool-filling")]),
        ({"capacity_bytes": 0, "available_bytes": 0}, []),  # never observed
        ({"capacity_bytes": 0, "problem": "nas is away"}, [(Severity.CRITICAL, "pool-unusable")]),
    ],
)
def test_a_pool_is_told_of_at_its_reserve_and_before_guests_are_paused(change: dict[str, Any], found: list[Any]) -> None:
    assert [(one.severity, one.kind) for one in examine(replace(HEALTHY, pools=(pool(**change),)))] == found


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({"problem": "its disk is full"}, ["vm-problem"]),
        ({"problem": "its disk is full", "is_busy": True}, []),
        ({"observed_state": "stopped"}, ["vm-drift"]),
        ({"observed_state": "unknown"}, []),
        ({"desired_power": "stopped", "observed_state": "absent"}, []),
        ({"desired_power": "stopped"}, ["vm-drift"]),
        ({"desired_power": "paused", "observed_state": "paused"}, []),
        ({"is_adjusted_at_next_stop": True}, ["vm-waits-for-stop"]),
        ({"cpu_model": "Icelake-Server"}, ["host-lost-cpu-model", "vm-cannot-move"]),
        ({"cpu_model": "Icelake-Server", "observed_state": "stopped", "desired_power": "stopped"}, []),
        ({"cpu_model": ""}, []),
        ({"host_id": ""}, []),
    ],
)
def test_what_is_said_of_a_vm(change: dict[str, Any], kinds: list[str]) -> None:
    assert [one.kind for one in examine(replace(HEALTHY, vms=(vm(**change),)))] == kinds


def test_a_vm_whose_model_only_its_own_host_has_cannot_move() -> None:
    hosts = (host(), host("node2", cpu_models=frozenset({"Skylake-Server"})))
    (found,) = examine(replace(HEALTHY, hosts=hosts))
    assert (found.kind, found.subject, found.cure) == ("vm-cannot-move", "vm p1/web1", "trimtab vm explain web1 --project p1")
    # A third host that has it, closed, is of no help; a host that has not told its models is not blamed.
    closed = host("node3", is_cordoned=True, is_in_maintenance=True)
    assert [one.kind for one in examine(replace(HEALTHY, hosts=(*hosts, closed)))] == ["vm-cannot-move"]
    untold = host("node3", cpu_models=frozenset())
    assert examine(replace(HEALTHY, hosts=(*hosts, untold))) == ()


def test_an_uncovered_vm_is_told_with_the_domain_that_takes_it() -> None:
    lost = UncoveredFacts(vm="db1", domain="rack r2", reason="no host has 64 GiB")
    (found,) = examine(replace(HEALTHY, uncovered=(lost,)))
    assert found.message == "would not come back after the loss of rack r2: no host has 64 GiB"


def test_an_operation_that_nobody_drives_is_critical() -> None:
    (found,) = examine(replace(HEALTHY, parked_operations=(OperationFacts(id="op-1", kind="migrate_vm"),)))
    assert (found.severity, found.subject) == (Severity.CRITICAL, "operation op-1")


def test_the_worst_comes_first_and_every_finding_names_a_command() -> None:
    fleet = replace(
        HEALTHY,
        hosts=(host(is_cordoned=True), host("node2", connectivity="lost", qemu_version="6.0.0")),
        pools=(pool(available_bytes=4 * GIB),),
        vms=(vm(problem="x", is_adjusted_at_next_stop=True),),
    )
    found = examine(fleet)
    ranks = [list(Severity).index(one.severity) for one in found]
    assert ranks == sorted(ranks)
    assert (found[0].kind, len(found)) == ("host-lost", 6)
    assert all(one.cure.startswith("trimtab ") for one in found)


def test_checks_are_a_list_that_others_may_choose_from() -> None:
    fleet = replace(HEALTHY, vms=(vm(problem="x"),))
    assert examine(fleet, ()) == ()
    assert len(CHECKS) == len(set(CHECKS))
