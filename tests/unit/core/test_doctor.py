"""Each check of the doctor fires where it should and is silent where it should be; equal facts give the equal ranking."""

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab_controller.core.doctor import KINDS, Finding, FleetFacts, Severity, examine
from trimtab_controller.core.doctor.facts import CertificateFacts, ReachFacts, SnapshotFacts, UncoveredFacts, VmFacts, some
from trimtab_controller.core.doctor.finding import ranked
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.model import Host, HostClass, Network, Pool, PoolSpace
from trimtab_controller.core.model.failover import FailoverControl, FencePathRow
from trimtab_protos.messages import Bridge, Inventory, PoolKind

NOW = datetime(2026, 1, 8, 12, tzinfo=UTC)
GIB = 1 << 30
INVENTORY = Inventory(
    hostname="node1",
    arch="x86_64",
    machine_id="1",
    smbios_uuid="x",
    boot_id="b",
    kernel="6.1",
    agent_version="0.1",
    libvirt_version="9.0",
    qemu_version="7.2",
    accelerator="kvm",
    cpu_vendor="AMD",
    cpu_model="EPYC",
    cpu_features=("aes", "avx2"),
    usable_cpu_models=("EPYC", "qemu64"),
    cpus=4,
    memory_mib=8192,
    machines=("pc-q35-7.2",),
    bridges=(Bridge(name="br0", mtu=1500),),
)


def host(name: str = "node1", *, inventory: dict[str, Any] | None = None, **values: Any) -> Host:
    given: dict[str, Any] = {
        "id": f"host-{name}",
        "name": name,
        "host_class_id": "class-1",
        "labels": {},
        "is_cordoned": False,
        "agent_address": "",
        "migration_address": "",
        "machine_id": name,
        "smbios_uuid": name,
        "connectivity": HostConnectivity.UP,
        "connectivity_at": NOW - timedelta(minutes=5),
        "boot_id": "b",
        "incarnation": "i",
        "lease_number": 1,
        "inventory": replace(INVENTORY, **(inventory or {})),
        "inventory_at": NOW - timedelta(days=1),
        "generation": 1,
        "vcpus_limit": 16,
        "memory_limit_mib": 7168,
        "vcpus_claimed": 0,
        "memory_claimed_mib": 0,
        "unmanaged_vcpus": 0,
        "unmanaged_memory_mib": 0,
        "version": 1,
        "created_at": NOW,
    }
    return Host(**given | values)


def vm(name: str = "web1", **values: Any) -> VmFacts:
    given: dict[str, Any] = {
        "id": f"vm-{name}",
        "name": name,
        "project": "shop",
        "host_id": "host-node1",
        "ha": "none",
        "arch": "x86_64",
        "machine": "pc-q35-7.2",
        "cpu_model": "EPYC",
        "cpu_features": (),
        "desired_power": "running",
        "observed_state": "running",
        "problem": "",
        "attention": "",
    }
    return VmFacts(**given | values)


def pool(**values: Any) -> Pool:
    given: dict[str, Any] = {
        "id": "pool-1",
        "name": "fast",
        "kind": PoolKind.DIR,
        "path": "/p",
        "is_shared": False,
        "sharing_proven_at": None,
        "reserve_permille": 50,
        "version": 1,
        "created_at": NOW,
    }
    return Pool(**given | values)


def space(available: float, *, host_id: str = "host-node1", capacity: int = 100) -> PoolSpace:
    return PoolSpace(
        pool_id="pool-1",
        host_id=host_id,
        capacity_bytes=capacity * GIB,
        available_bytes=int(available * GIB),
        claimed_bytes=0,
        observed_at=NOW,
    )


def network(mtu: int = 1500) -> Network:
    return Network(
        id="net-1",
        project_id="",
        name="lan",
        kind="bridge",
        bridge="br0",
        vlan=0,
        mtu=mtu,
        subnet="",
        has_dhcp=False,
        version=1,
        created_at=NOW,
    )


def reach(name: str, *, subject_id: str = "net-1", state: str = "ready", **values: Any) -> ReachFacts:
    return ReachFacts(subject_id=subject_id, host_id=f"host-{name}", state=state, problem=values.pop("problem", ""), **values)


def device(name: str = "node1", **values: Any) -> FencePathRow:
    given: dict[str, Any] = {
        "host_id": f"host-{name}",
        "position": 0,
        "name": "bmc",
        "agent": "fence_redfish",
        "options": {},
        "secret_file": "",
        "secret": "",
        "test_wanted_at": None,
        "tested_at": NOW - timedelta(minutes=3),
        "test_power": "on",
        "test_message": "",
    }
    return FencePathRow(**given | values)


def certificate(left_h: float, *, purpose: str = "agent", life_h: float = 72) -> CertificateFacts:
    not_after = NOW + timedelta(hours=left_h)
    return CertificateFacts(
        host_id="host-node1", purpose=purpose, created_at=not_after - timedelta(hours=life_h), not_after=not_after
    )


CLASS = HostClass(
    id="class-1",
    name="default",
    cpu_model=None,
    machine=None,
    vcpu_ratio_permille=4000,
    memory_ratio_permille=1000,
    memory_reserve_mib=1024,
    policy="best-fit",
    version=1,
    created_at=NOW,
)


def fleet(**values: Any) -> FleetFacts:
    """Return a fleet of two hosts in which nothing is wrong, but for what is given."""
    given: dict[str, Any] = {
        "now": NOW,
        "hosts": (host("node1"), host("node2")),
        "classes": {"class-1": CLASS},
        "vms": (vm(),),
        "certificates": (certificate(60), certificate(60, purpose="libvirt")),
        "pools": {"pool-1": pool()},
        "spaces": (space(50),),
        "pool_reach": (reach("node1", subject_id="pool-1"),),
        "networks": (network(),),
        "network_reach": (reach("node1"), reach("node2")),
        "fence_paths": (device("node1"), device("node2")),
        "armed": frozenset({"host-node1", "host-node2"}),
        "skews_ms": {"host-node1": 40},
    }
    return FleetFacts(**given | values)


def control(**values: Any) -> FailoverControl:
    return FailoverControl(released={}, confirmed_off={}, **values)


HA = (vm(ha="restart"),)
OLD = {"vm_id": "vm-web1", "name": "before", "count": 1}
# What is changed in a fleet in order -> kind, severity, subject, part of what is said, the cure.
FIRES: list[tuple[dict[str, Any], str, Severity, str, str, str]] = [
    ({"certificates": (certificate(-1),)}, "certificate-expired", Severity.SEVERE, "host node1", "is not let in",
     "trimtab host token create node1 --rejoin"),
    ({"certificates": (certificate(20, purpose="libvirt"),)}, "certificate-expiring", Severity.WARNING, "host node1",
     "its libvirt certificate expires in 20.0 h", "on node1: systemctl restart trimtab-agent; journalctl -u trimtab-agent"),
    ({"certificates": (certificate(5),)}, "certificate-expiring", Severity.SEVERE, "host node1", "expires in 5.0 h",
     "on node1: systemctl restart trimtab-agent; journalctl -u trimtab-agent"),
    ({"skews_ms": {"host-node2": -900}}, "clock-skew", Severity.WARNING, "host node2", "0.9 s behind",
     "on node2: timedatectl set-ntp true; timedatectl timesync-status"),
    ({"skews_ms": {"host-node2": 2100}}, "clock-skew", Severity.SEVERE, "host node2", "2.1 s ahead of",
     "on node2: timedatectl set-ntp true; timedatectl timesync-status"),
    ({"uncovered": (UncoveredFacts(kind="host", value="node1", vm_ids=("vm-web1",)),)}, "not-covered", Severity.SEVERE,
     "host node1", "1 vms cannot be restarted elsewhere: shop/web1", "trimtab failover check --by host"),
    ({"uncovered": (UncoveredFacts(kind="rack", value="r1", vm_ids=("vm-web1",)),)}, "not-covered", Severity.WARNING,
     "rack r1", "shop/web1", "trimtab failover check -l rack=r1"),
    ({"control": control(is_paused=True)}, "failover-paused", Severity.SEVERE, "failover", "paused", "trimtab failover resume"),
    ({"control": control(frozen="2 of 5 hosts are lost")}, "failover-frozen", Severity.SEVERE, "failover", "2 of 5",
     "trimtab failover status"),
    ({"hosts": (host(connectivity=HostConnectivity.LOST), host("node2"))}, "host-lost", Severity.SEVERE, "host node1", "lost",
     "trimtab failover get node1"),
    ({"hosts": (host(connectivity=HostConnectivity.FENCED), host("node2"))}, "host-fenced", Severity.WARNING, "host node1",
     "proven off", "trimtab failover get node1"),
    ({"hosts": (host(connectivity=HostConnectivity.SUSPECT), host("node2"))}, "host-suspect", Severity.WARNING, "host node1",
     "missed", "trimtab host get node1"),
    ({"hosts": (host(is_cordoned=True), host("node2"))}, "host-cordoned", Severity.NOTICE, "host node1", "takes no vms",
     "trimtab host uncordon node1"),
    ({"maintenance": {"host-node1": NOW}}, "host-cordoned", Severity.NOTICE, "host node1", "maintenance",
     "trimtab host maintenance end node1"),
    ({"hosts": (host(inventory={"usable_cpu_models": ("qemu64",)}), host("node2"))}, "host-lost-cpu", Severity.SEVERE,
     "host node1", "no longer has CPU model EPYC, which 1 vms there need: shop/web1", "trimtab plan create drain node1 --dry-run"),
    ({"vms": (vm(cpu_features=("aes", "vmx")),), "hosts": (host(), host("node2", inventory={"cpu_features": ("aes", "vmx")}))},
     "host-lost-cpu", Severity.SEVERE, "host node1", "no longer has CPU features vmx",
     "trimtab plan create drain node1 --dry-run"),
    ({"hosts": (host(), host("node2", inventory={"usable_cpu_models": ("qemu64",)}))}, "vm-bound-by-cpu", Severity.WARNING,
     "host node1", "no other host has CPU model EPYC", "trimtab plan create drain node1 --dry-run"),
    ({"hosts": (host(), host("node2", inventory={"machines": ("pc-q35-9.0",)}))}, "vm-bound-by-machine", Severity.WARNING,
     "host node1", "no other host has machine type pc-q35-7.2", "trimtab plan create drain node1 --dry-run"),
    ({"hosts": (host(inventory={"machines": ("pc-q35-9.0",)}), host("node2"))}, "host-lost-machine", Severity.SEVERE,
     "host node1", "no longer has machine type pc-q35-7.2", "trimtab plan create drain node1 --dry-run"),
    ({"hosts": (host(), host("node2", inventory={"bridges": (Bridge(name="br0", mtu=9000),)}))}, "mtu-mismatch", Severity.WARNING,
     "network lan", "node1 1500, node2 9000", "on node1: ip link set dev br0 mtu 9000"),
    ({"networks": (network(9000),)}, "mtu-mismatch", Severity.WARNING, "network lan", "its MTU is 9000",
     "on node1: ip link set dev br0 mtu 9000"),
    ({"network_reach": (reach("node2", state="failed", problem="there is no bridge br0"),)}, "network-failed", Severity.WARNING,
     "network lan", "host node2 does not reach it: there is no bridge br0", "trimtab network get lan"),
    ({"pool_reach": (reach("node1", subject_id="pool-1", state="failed"),)}, "pool-failed", Severity.SEVERE, "pool fast",
     "host node1 does not reach it", "trimtab pool get fast"),
    ({"spaces": (space(19),)}, "pool-filling", Severity.WARNING, "pool fast on node1", "81% full", "trimtab pool get fast"),
    ({"spaces": (space(9),)}, "pool-filling", Severity.SEVERE, "pool fast on node1", "9.0 GiB are left", "trimtab pool get fast"),
    ({"spaces": (space(5),)}, "pool-full", Severity.SEVERE, "pool fast on node1", "reserve of 5.0 GiB", "trimtab pool get fast"),
    ({"spaces": (space(5, host_id=""),)}, "pool-full", Severity.SEVERE, "pool fast", "95% full", "trimtab pool get fast"),
    ({"fence_paths": (device("node2"),)}, "fence-missing", Severity.NOTICE, "host node1", "no power device",
     "trimtab fence config node1 --agent fence_ipmilan --address BMC --user USER --secret-file FILE"),
    ({"fence_paths": (device(tested_at=None), device("node2"))}, "fence-untested", Severity.WARNING, "host node1", "bmc",
     "trimtab fence test node1"),
    ({"fence_paths": (device(test_message="it says off"), device("node2"))}, "fence-failed", Severity.WARNING, "host node1",
     "it says off", "trimtab fence test node1"),
    ({"vms": HA, "armed": frozenset()}, "warden-not-armed", Severity.WARNING, "host node1", "1 vms wait",
     "on node1: systemctl enable --now trimtab-warden"),
    ({"vms": HA, "armed": frozenset(), "fence_paths": (device(test_power="unknown"), device("node2"))}, "host-unprotected",
     Severity.SEVERE, "host node1", "1 vms stay down", "on node1: systemctl enable --now trimtab-warden"),
    ({"snapshots": (SnapshotFacts(created_at=NOW - timedelta(days=8), **OLD),)}, "snapshot-old", Severity.NOTICE, "vm shop/web1",
     "8 days old", "trimtab vm snapshot delete web1 before -p shop"),
    ({"snapshots": (SnapshotFacts(created_at=NOW - timedelta(days=31), **OLD | {"count": 3}),)}, "snapshot-old",
     Severity.WARNING, "vm shop/web1", "before, the oldest of 3", "trimtab vm snapshot delete web1 before -p shop"),
    ({"hosts": (host(unmanaged_memory_mib=2048), host("node2"))}, "unmanaged-memory", Severity.WARNING, "host node1",
     "2048 MiB, more than the reserve of 1024 MiB", "trimtab host get node1"),
    ({"hosts": (host(unmanaged_memory_mib=2048, memory_claimed_mib=7000), host("node2"))}, "memory-oversold", Severity.SEVERE,
     "host node1", "more than the 8192 MiB it has", "trimtab host drain node1 --plan"),
    ({"vms": (vm(problem="its domain is paused"),)}, "vm-problem", Severity.WARNING, "vm shop/web1", "its domain is paused",
     "trimtab vm get web1 -p shop"),
    ({"vms": (vm(problem="no host fits", attention="failover"),)}, "vm-given-up", Severity.SEVERE, "vm shop/web1",
     "failover gave it up: no host fits", "trimtab vm start web1 -p shop"),
]  # fmt: skip


def test_a_fleet_in_order_has_no_findings() -> None:
    assert examine(fleet()) == ()


@pytest.mark.parametrize(("changes", "kind", "severity", "subject", "said", "cure"), FIRES, ids=[one[1] for one in FIRES])
def test_a_check_fires_with_its_severity_its_subject_and_its_cure(
    changes: dict[str, Any], kind: str, severity: Severity, subject: str, said: str, cure: str
) -> None:
    (one,) = [finding for finding in examine(fleet(**changes)) if finding.kind == kind]
    assert (one.severity, one.subject, one.cure) == (severity, subject, cure)
    assert said in one.what


def test_every_kind_is_shown_to_fire_and_none_is_unknown() -> None:
    assert {kind for _, kind, *_ in FIRES} == set(KINDS)


# Close to what fires, and in order.
SILENT: list[tuple[str, dict[str, Any]]] = [
    ("a certificate at half of its life", {"certificates": (certificate(36),)}),
    ("a host that is gone has an expired one", {"certificates": (replace(certificate(-1), host_id="host-gone"),)}),
    ("a clock within the bound", {"skews_ms": {"host-node1": -499}}),
    ("uncovered vms that are deleted by now", {"uncovered": (UncoveredFacts(kind="host", value="node1", vm_ids=("vm-x",)),)}),
    ("a host that has not come up yet", {"hosts": (host(connectivity=HostConnectivity.NEW), host("node2"))}),
    ("alone in the fleet nothing can move", {"hosts": (host(),), "fence_paths": (device(),)}),
    ("a vm that was never placed", {"vms": (vm(host_id="", cpu_model="Icelake-Server"),)}),
    ("no concrete needs yet", {"vms": (vm(cpu_model="", machine=""),)}),
    ("a pool below 80 %", {"spaces": (space(21),)}),
    ("a space never observed", {"spaces": (space(0, capacity=0),)}),
    ("a warden off where no vm is restarted", {"armed": frozenset()}),
    ("a warden off where ha vms are stopped", {"armed": frozenset(), "vms": (vm(ha="restart", desired_power="stopped"),)}),
    ("a young snapshot", {"snapshots": (SnapshotFacts(created_at=NOW - timedelta(days=6), **OLD),)}),
    ("unmanaged memory within the reserve", {"hosts": (host(unmanaged_memory_mib=1024), host("node2"))}),
    ("another bridge's mtu", {"hosts": (host(), host("node2", inventory={
        "bridges": (Bridge(name="br0"), Bridge(name="br9", mtu=9000))}))}),
    ("a bridge that carries more than the network's mtu everywhere", {"networks": (network(1400),)}),
    ("a network that is gone", {"networks": ()}),
    ("a pool that is gone", {"pools": {}, "pool_reach": (reach("node1", subject_id="pool-1", state="failed"),)}),
]  # fmt: skip


@pytest.mark.parametrize("changes", [one[1] for one in SILENT], ids=[one[0] for one in SILENT])
def test_nothing_is_said_of(changes: dict[str, Any]) -> None:
    assert examine(fleet(**changes)) == ()


def test_a_hosts_own_bridge_counts_for_its_mtu() -> None:
    other = host("node2", inventory={"bridges": (Bridge(name="br7", mtu=1400),)})
    found = examine(fleet(hosts=(host(), other), network_reach=(reach("node1"), reach("node2", bridge="br7"))))
    assert [(one.kind, one.what) for one in found] == [
        ("mtu-mismatch", "its MTU is 1500, its bridges' differ from it or from each other: node2 1400, node1 1500")
    ]


def test_vms_of_one_need_are_one_finding_however_many() -> None:
    vms = tuple(vm(f"web{i}") for i in range(8))
    (one,) = examine(fleet(vms=vms, hosts=(host(), host("node2", inventory={"machines": ()}))))
    assert one.what.endswith("8 vms cannot move off: shop/web0, shop/web1, shop/web2, shop/web3, shop/web4 and 3 more")
    assert some(["b", "a"]) == "a, b"


_FINDINGS = st.builds(
    Finding,
    severity=st.sampled_from(Severity),
    kind=st.sampled_from(["a", "b"]),
    subject=st.sampled_from(["host x", "host y"]),
    what=st.sampled_from(["p", "q"]),
    cure=st.sampled_from(["c", "d"]),
    since=st.none() | st.integers(0, 3).map(lambda hours: NOW - timedelta(hours=hours)),
)


@given(st.lists(_FINDINGS, max_size=12), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_ranking_depends_on_what_was_found_alone(findings: list[Finding], rng: random.Random) -> None:
    shuffled = list(findings)
    rng.shuffle(shuffled)
    order = ranked(findings)
    assert ranked(shuffled) == order
    positions = [list(Severity).index(one.severity) for one in order]
    assert positions == sorted(positions), "worst first"
    for before, after in pairwise(order):
        if before.severity is after.severity and after.since is not None:
            assert before.since is not None, "what has an age goes before what has none"
            assert before.since <= after.since, "the oldest first"


@given(st.lists(st.sampled_from(FIRES), min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_equal_facts_give_the_equal_ranking_in_whatever_order_rows_come(chosen: list[Any], rng: random.Random) -> None:
    changes: dict[str, Any] = {}
    for one in chosen:
        changes |= one[0]
    facts = fleet(**changes)

    def shuffled(rows: Any) -> Any:
        if isinstance(rows, dict):
            return dict(shuffled(list(rows.items())))
        mixed = list(rows)
        rng.shuffle(mixed)
        return mixed

    names = ("hosts", "vms", "certificates", "spaces", "pool_reach", "networks", "network_reach", "fence_paths", "skews_ms")
    assert examine(replace(facts, **{name: shuffled(getattr(facts, name)) for name in names})) == examine(facts)
