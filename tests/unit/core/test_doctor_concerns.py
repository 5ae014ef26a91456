"""The doctor's further concerns: each fires where it should, is silent close to that, and equal fleets are ranked equally."""

import random
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.core.test_doctor import HEALTHY, NOW, host, pool, vm
from trimtab_controller.core.doctor import examine
from trimtab_controller.core.doctor.model import (
    BackupFacts,
    FenceFacts,
    FleetFacts,
    NetworkFacts,
    RouterFacts,
    Severity,
    SnapshotFacts,
    VmFacts,
    some,
)

LAN = NetworkFacts(name="lan", mtu=1500, bridge="br0", mtus={"node1": 1500, "node2": 1500})
EDGE = RouterFacts(project="p1", name="edge", outer="lan")
DRAIN = "trimtab host drain node1 --plan"
ARM = "on node1: set lease_fencing = true in agent.toml, then systemctl restart trimtab-agent"
DEVICE = "trimtab fence config node1 --agent fence_redfish --address ADDRESS --secret-file FILE"
HA = (vm(is_kept=True),)
DEAD = FenceFacts(name="bmc", tested_at=NOW, test_power="on", test_message="it says off, but the host is heard from")


def snapshot(days: int, *, count: int = 1) -> SnapshotFacts:
    return SnapshotFacts(project="p1", vm="web1", name="before", created_at=NOW - timedelta(days=days), count=count)


def agentless(minutes: float, **changes: Any) -> VmFacts:
    """A running vm whose guest agent has been silent for so long."""
    return vm(**{"guest_agent": "silent", "guest_agent_since": NOW - timedelta(minutes=minutes), **changes})


def two(first: dict[str, Any] | None = None, second: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"hosts": (host("node1", **(first or {})), host("node2", **(second or {})))}


OLD_QEMU, NEW_QEMU = frozenset({"pc-q35-7.2"}), frozenset({"pc-q35-9.0"})
ON_Q35 = (vm(machine="pc-q35-7.2"),)
WITH_VMX = (vm(cpu_features=("vmx",)),)
VMX, NO_VMX = {"cpu_features": frozenset({"vmx", "aes"})}, {"cpu_features": frozenset({"aes"})}
# What is changed in a healthy fleet -> severity, kind, subject, part of the message, cure.
FIRES: list[tuple[dict[str, Any], Severity, str, str, str, str]] = [
    (two(second={"skew_ms": -900}), Severity.WARNING, "clock-skew", "host node2", "0.9 s behind",
     "on node2: timedatectl set-ntp true"),
    (two({"skew_ms": 2100}), Severity.CRITICAL, "clock-skew", "host node1", "2.1 s ahead of",
     "on node1: timedatectl set-ntp true"),
    ({"is_failover_paused": True}, Severity.CRITICAL, "failover-paused", "failover", "paused", "trimtab failover resume"),
    ({"database_behind": "it is older than the fleet"}, Severity.CRITICAL, "database-behind", "database", "older",
     "trimtab-controller recover"),
    ({"failover_frozen": "2 of 5 hosts are lost"}, Severity.CRITICAL, "failover-frozen", "failover", "2 of 5",
     "trimtab failover status"),
    (two({"memory_reserve_mib": 1024, "unmanaged_memory_mib": 1025}), Severity.NOTICE, "unmanaged-above-reserve", "host node1",
     "1025 MiB, more than the reserve of 1024 MiB", "trimtab host get node1"),
    ({"vms": ON_Q35, **two({"machines": NEW_QEMU}, {"machines": OLD_QEMU})}, Severity.CRITICAL, "host-lost-machine",
     "host node1", "no longer has machine type pc-q35-7.2, which 1 vms there run with: p1/web1", DRAIN),
    ({"vms": ON_Q35, **two({"machines": OLD_QEMU}, {"machines": NEW_QEMU})}, Severity.WARNING, "vms-bound-by-machine",
     "host node1", "no other host that takes vms has machine type pc-q35-7.2", DRAIN),
    ({"vms": WITH_VMX, **two(NO_VMX, VMX)}, Severity.CRITICAL, "host-lost-cpu-features", "host node1", "CPU features vmx", DRAIN),
    ({"vms": (vm(cpu_features=("vmx", "-svm", "?avx")),), **two(NO_VMX, VMX)}, Severity.CRITICAL, "host-lost-cpu-features",
     "host node1", "no longer has CPU features vmx, which", DRAIN),
    ({"vms": WITH_VMX, **two(VMX, NO_VMX)}, Severity.WARNING, "vms-bound-by-cpu-features", "host node1", "1 vms cannot move",
     DRAIN),
    ({"networks": (replace(LAN, mtus={"node1": 1500, "node2": 9000}),)}, Severity.WARNING, "mtu-mismatch", "network lan",
     "node1 1500, node2 9000", "on node1: ip link set dev br0 mtu 9000"),
    ({"networks": (replace(LAN, mtu=9000),)}, Severity.WARNING, "mtu-mismatch", "network lan", "its MTU is 9000",
     "on node1: ip link set dev br0 mtu 9000"),
    ({"networks": (replace(LAN, problems={"node2": "there is no bridge br0"}),)}, Severity.WARNING, "network-unusable",
     "network lan", "host node2 does not reach it: there is no bridge br0", "trimtab network get lan"),
    ({"overlay_problem": "no route"}, Severity.WARNING, "overlay-not-written", "overlay networks", "changes wait: no route",
     "on the machine of OVN's database: systemctl restart ovn-central; ovn-nbctl show"),
    ({"routers": (EDGE,)}, Severity.CRITICAL, "router-without-gateway", "router p1/edge", "have no way out",
     "trimtab network get lan"),
    ({"routers": (replace(EDGE, down=("node1", "node2")),)}, Severity.CRITICAL, "router-without-gateway", "router p1/edge",
     "which node1, node2 could be", "trimtab network get lan"),
    ({"routers": (replace(EDGE, up=("node1",)),)}, Severity.NOTICE, "router-gateway-single", "router p1/edge", "only host node1",
     "trimtab network get lan"),
    ({"pools": (pool(problem="it does not answer", is_unresponsive=True),)}, Severity.CRITICAL, "pool-unresponsive",
     "pool fast on node1", "it does not answer", "trimtab pool get fast"),
    ({"pools": (pool(available_bytes=10 << 30),)}, Severity.WARNING, "pool-filling", "pool fast on node1", "90 % of it is used",
     "trimtab pool get fast"),
    ({"vms": HA, **two({"fences": (), "is_warden_armed": True})}, Severity.NOTICE, "fence-missing", "host node1",
     "no power device", DEVICE),
    ({"vms": HA}, Severity.NOTICE, "warden-not-armed", "host node1", "1 vms wait", ARM),
    ({"vms": HA, **two({"fences": ()})}, Severity.CRITICAL, "host-unprotected", "host node1", "1 of its vms", DEVICE),
    ({"snapshots": (snapshot(7),)}, Severity.NOTICE, "snapshot-old", "vm p1/web1", "its snapshot before is 7 days old",
     "trimtab vm snapshot delete web1 before --project p1"),
    ({"snapshots": (snapshot(30, count=3),)}, Severity.WARNING, "snapshot-old", "vm p1/web1", "the oldest of 3, is 30 days old",
     "trimtab vm snapshot delete web1 before --project p1"),
    ({"vms": (vm(problem="no host fits", given_up_by="failover"),)}, Severity.CRITICAL, "vm-given-up", "vm p1/web1",
     "failover gave it up: no host fits", "trimtab vm start web1 --project p1"),
    ({"vms": (agentless(10),)}, Severity.WARNING, "guest-agent-stale", "vm p1/web1", "its guest agent answered before",
     "trimtab vm ssh web1 --project p1 -- sudo systemctl restart qemu-guest-agent"),
    ({"vms": (agentless(600, os_family="windows"),)}, Severity.WARNING, "guest-agent-stale", "vm p1/web1", "QEMU-GA",
     "trimtab vm console web1 --vnc --project p1"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "severity", "kind", "subject", "said", "cure"), FIRES, ids=[one[2] for one in FIRES])
def test_a_concern_is_told_once_with_its_subject_and_its_cure(
    changes: dict[str, Any], severity: Severity, kind: str, subject: str, said: str, cure: str
) -> None:
    (one,) = examine(replace(HEALTHY, **changes))
    assert (one.severity, one.kind, one.subject, one.cure) == (severity, kind, subject, cure)
    assert said in one.message


# Close to what fires, and in order.
SILENT: list[tuple[str, dict[str, Any]]] = [
    ("a clock within the bound", two({"skew_ms": -499})),
    ("what is not ours, within the reserve", two({"memory_reserve_mib": 1024, "unmanaged_memory_mib": 1024})),
    ("a machine type where another host has not told its own", {"vms": ON_Q35, **two({"machines": OLD_QEMU})}),
    ("a need of a guest that is off", {
        "vms": (vm(machine="pc-q35-7.2", desired_power="stopped", observed_state="stopped"),),
        **two({"machines": NEW_QEMU}, {"machines": NEW_QEMU})}),
    ("features that both hosts have", {"vms": WITH_VMX, **two(VMX, VMX)}),
    ("features that a guest is kept from", {"vms": (vm(cpu_features=("-vmx", "-svm", "aes")),), **two(VMX, NO_VMX)}),
    ("features that a guest has where its host has them", {"vms": (vm(cpu_features=("?svm", "?vmx")),), **two(VMX, NO_VMX)}),
    ("alone in the fleet nothing can move", {"vms": ON_Q35, "hosts": (host("node1", machines=OLD_QEMU),)}),
    ("bridges that carry more than the network asks, all the same", {"networks": (replace(LAN, mtu=1400),)}),
    ("a network whose bridges nobody told", {"networks": (replace(LAN, mtus={}),)}),
    ("neither warden nor device where nothing is restarted", two({"fences": ()})),
    ("both of them", {"vms": HA, **two({"is_warden_armed": True})}),
    ("a router that two hosts can carry", {"routers": (replace(EDGE, up=("node1", "node2")),)}),
    ("a young snapshot", {"snapshots": (snapshot(6),)}),
    ("a guest agent that is missed for less than ten minutes", {"vms": (agentless(9.9),)}),
    ("a guest that never had an agent", {"vms": (agentless(600, guest_agent=""),)}),
    ("a guest agent that answers", {"vms": (agentless(600, guest_agent="answers"),)}),
    ("the agent of a guest that is off", {"vms": (agentless(600, desired_power="stopped", observed_state="stopped"),)}),
    ("the agent of a guest that somebody works on", {"vms": (agentless(600, is_busy=True),)}),
    ("a vm that was given up and is being started", {"vms": (vm(given_up_by="failover", is_busy=True),)}),
]  # fmt: skip


@pytest.mark.parametrize("changes", [one[1] for one in SILENT], ids=[one[0] for one in SILENT])
def test_nothing_is_said_of(changes: dict[str, Any]) -> None:
    assert examine(replace(HEALTHY, **changes)) == ()


def test_the_agents_of_a_host_that_is_silent_are_not_blamed() -> None:
    fleet = replace(HEALTHY, vms=(agentless(600),), **two({"connectivity": "lost"}))
    assert [one.kind for one in examine(fleet)] == ["host-lost"]


def test_a_device_that_is_contradicted_protects_nobody() -> None:
    found = examine(replace(HEALTHY, vms=HA, **two({"fences": (DEAD,)})))
    assert [(one.severity, one.kind) for one in found] == [
        (Severity.CRITICAL, "fence-untested"),
        (Severity.CRITICAL, "host-unprotected"),
    ]


def test_vms_of_one_host_with_one_need_are_one_finding() -> None:
    vms = tuple(vm(name=f"web{i}", machine="pc-q35-7.2") for i in range(8))
    (one,) = examine(replace(HEALTHY, vms=vms, **two({"machines": OLD_QEMU}, {"machines": NEW_QEMU})))
    assert one.message.endswith("8 vms cannot move: p1/web0, p1/web1, p1/web2, p1/web3, p1/web4 and 3 more")
    assert some(["b", "a"]) == "a, b"


def test_since_is_told_where_it_is_known() -> None:
    (lost,) = examine(replace(HEALTHY, vms=(), **two({"connectivity": "lost"})))
    assert lost.since == NOW
    (paused,) = examine(replace(HEALTHY, is_failover_paused=True))
    assert paused.since is None


_HOSTS = st.builds(
    host,
    name=st.sampled_from(["node1", "node2", "node3", "node4"]),
    connectivity=st.sampled_from(["up", "lost", "suspect"]),
    is_cordoned=st.booleans(),
    skew_ms=st.sampled_from([0, 700, -3000]),
    is_warden_armed=st.booleans(),
    machines=st.sampled_from([OLD_QEMU, NEW_QEMU]),
    fences=st.sampled_from([(), (DEAD,)]),
)


def test_a_vm_without_the_backup_that_its_policy_promises_is_told_with_what_makes_one() -> None:
    late = BackupFacts(project="p1", vm="db", policy="nightly", problem="its last is 3 days old", is_lost=False, since=NOW)
    found = examine(FleetFacts(now=NOW, overdue_backups=(late, replace(late, vm="web", is_lost=True))))
    assert [(one.severity, one.kind, one.subject) for one in found] == [
        (Severity.CRITICAL, "backup-missing", "vm p1/web"),
        (Severity.WARNING, "backup-overdue", "vm p1/db"),
    ]
    assert found[1].cure == "trimtab backup run db --project p1"
    assert "nightly" in found[1].message


_VMS = st.builds(
    vm,
    name=st.sampled_from(["a", "b", "c"]),
    host_id=st.sampled_from(["host-node1", "host-node2"]),
    machine=st.sampled_from(["", "pc-q35-7.2"]),
    is_kept=st.booleans(),
    problem=st.sampled_from(["", "its disk is full"]),
)
_FLEETS = st.builds(
    FleetFacts,
    now=st.just(NOW),
    hosts=st.lists(_HOSTS, max_size=4, unique_by=lambda one: one.id).map(tuple),
    vms=st.lists(_VMS, max_size=6).map(tuple),
    snapshots=st.lists(st.integers(0, 40).map(snapshot), max_size=4).map(tuple),
    networks=st.lists(st.sampled_from([LAN, replace(LAN, mtu=9000)]), max_size=2).map(tuple),
)


@given(_FLEETS, st.randoms(use_true_random=False))
def test_equal_fleets_are_ranked_equally_in_whatever_order_their_rows_come(fleet: FleetFacts, rng: random.Random) -> None:
    mixed = {name: tuple(rng.sample(rows, len(rows))) for name in ("hosts", "vms", "snapshots", "networks")
             for rows in [getattr(fleet, name)]}  # fmt: skip
    found = examine(fleet)
    assert examine(replace(fleet, **mixed)) == found
    ranks = [list(Severity).index(one.severity) for one in found]
    assert ranks == sorted(ranks), "the worst first"
