"""Every hard constraint: who is refused, with which code, and what the reason tells its reader."""

from collections.abc import Callable

import pytest

from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.placement import (
    DiskNeed,
    FleetSnapshot,
    HostSnapshot,
    NetworkNeed,
    NetworkReach,
    PlacementKind,
    PlacementRequest,
    PoolPlace,
    PoolSnapshot,
    explain,
)
from trimtab_protos.messages import Firmware

GIB = 1 << 30
MakeHost = Callable[..., HostSnapshot]
MakeRequest = Callable[..., PlacementRequest]
MakePool = Callable[..., PoolSnapshot]


def reasons(host: HostSnapshot, request: PlacementRequest, *pools: PoolSnapshot) -> list[tuple[str, str]]:
    """Return (code, message) of everything that stands against the host."""
    decision = explain(FleetSnapshot.of([host], pools), request)
    (verdict,) = decision.verdicts
    assert (decision.chosen_host_id is None) == bool(verdict.refusals), "the mask and the reasons disagree"
    return [(refusal.code, refusal.message) for refusal in verdict.refusals]


def test_a_plain_request_fits_a_plain_host(make_host: MakeHost, make_request: MakeRequest) -> None:
    assert reasons(make_host(), make_request()) == []


# --- intent ------------------------------------------------------------------------------------------------------------------


def test_a_cordoned_host_is_refused_and_the_cure_is_named(make_host: MakeHost, make_request: MakeRequest) -> None:
    assert reasons(make_host("node2", is_cordoned=True), make_request()) == [
        ("host-cordoned", "it is cordoned; uncordon it with `trimtab host uncordon node2`")
    ]


@pytest.mark.parametrize("state", [each for each in HostConnectivity if each is not HostConnectivity.UP])
def test_only_hosts_that_are_up_are_placed_on(make_host: MakeHost, make_request: MakeRequest, state: HostConnectivity) -> None:
    assert reasons(make_host(connectivity=state), make_request()) == [
        ("host-not-up", f"it is {state.value}, not up; see `trimtab host get node1`")
    ]


def test_each_selector_label_that_is_missing_or_different_is_told(make_host: MakeHost, make_request: MakeRequest) -> None:
    request = make_request(host_selector={"zone": "b", "disk": "ssd", "rack": "r1"})
    assert reasons(make_host(labels={"zone": "a", "rack": "r1"}), request) == [
        ("label-mismatch", "its label zone is a; the vm asks for zone=b"),
        ("label-mismatch", "it has no label disk; the vm asks for disk=ssd"),
    ]


def test_a_selector_that_matches_refuses_nobody(make_host: MakeHost, make_request: MakeRequest) -> None:
    assert reasons(make_host(), make_request(host_selector={"zone": "a"})) == []


@pytest.mark.parametrize(
    ("own", "told"), [("default", "its host class is default"), ("", "its host class is none")], ids=["other", "none"]
)
def test_another_host_class_is_refused(make_host: MakeHost, make_request: MakeRequest, own: str, told: str) -> None:
    assert reasons(make_host(host_class=own, class_cpu_model=""), make_request(host_class="gold")) == [
        ("host-class-mismatch", f"{told}; the vm asks for gold")
    ]


def test_the_asked_class_fits(make_host: MakeHost, make_request: MakeRequest) -> None:
    assert reasons(make_host(), make_request(host_class="default")) == []


def test_a_required_host_refuses_every_other_one_by_name(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet = FleetSnapshot.of([make_host("node1"), make_host("node2")])
    decision = explain(fleet, make_request(required_host_id="host-node2"))
    assert decision.chosen_host_id == "host-node2"
    assert [refusal.message for refusal in decision.refused[0].refusals] == ["the request names host node2"]


def test_a_required_host_that_left_fits_nowhere(make_host: MakeHost, make_request: MakeRequest) -> None:
    assert reasons(make_host(), make_request(required_host_id="host-gone")) == [
        ("other-host-required", "the request names host host-gone, which is not in the fleet")
    ]


def test_a_required_host_still_obeys_the_cordon(make_host: MakeHost, make_request: MakeRequest) -> None:
    found = reasons(make_host(is_cordoned=True), make_request(required_host_id="host-node1"))
    assert [code for code, _ in found] == ["host-cordoned"]


def test_the_source_of_a_migration_is_excluded(make_host: MakeHost, make_request: MakeRequest) -> None:
    request = make_request(kind=PlacementKind.MIGRATE, excluded_host_ids=("host-node1",))
    assert [code for code, _ in reasons(make_host("node1"), request)] == ["host-excluded"]
    assert reasons(make_host("node2"), request) == []


# --- compatibility -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "host_is", "reason"),
    [
        (
            {"arch": "aarch64"},
            {},
            ("arch-mismatch", "its architecture is x86_64, the vm's is aarch64"),
        ),
        (
            {"arch": "x86_64"},
            {"arch": ""},
            ("arch-mismatch", "its architecture is not known, the vm's is x86_64"),
        ),
        (
            {"cpu_model": "Icelake-Server"},
            {},
            ("cpu-model-unusable", "it cannot run CPU model Icelake-Server"),
        ),
        (
            {},
            {"usable_cpu_models": frozenset({"qemu64"})},
            ("class-cpu-model-unusable", "it cannot run CPU model EPYC of its host class default"),
        ),
        (
            {"cpu_features": ("avx512f", "aes", "sha-ni")},
            {},
            ("cpu-features-missing", "it lacks CPU features avx512f, sha-ni"),
        ),
        (
            {"cpu_features": ("-vmx", "?svm", "sha-ni", "-aes", "?avx2")},
            {},
            ("cpu-features-missing", "it lacks CPU features sha-ni"),
        ),
        (
            {"machine": "pc-q35-9.0"},
            {},
            ("machine-missing", "its QEMU has no machine type pc-q35-9.0"),
        ),
        (
            {},
            {"machines": frozenset({"pc-q35-6.2"})},
            ("class-machine-missing", "its QEMU has no machine type pc-q35-7.2, which its host class default uses"),
        ),
        (
            {"firmware": Firmware.UEFI},
            {"has_uefi": False},
            ("uefi-missing", "it has no UEFI firmware; install the package ovmf there"),
        ),
        (
            {"capabilities": ("tpm",)},
            {"capabilities": frozenset({"cdrom"})},
            ("capability-missing", "it has no software TPM; install the package swtpm-tools there"),
        ),
        (
            {"capabilities": ("cdrom", "warp-drive")},
            {"capabilities": frozenset({"cdrom"})},
            ("capability-missing", "its agent cannot do warp-drive"),
        ),
        (
            {"accelerator": "tcg"},
            {},
            ("accelerator-mismatch", "it runs guests under kvm, the running guest needs tcg"),
        ),
        (
            {"accelerator": "kvm"},
            {"accelerator": ""},
            ("accelerator-mismatch", "it runs guests under an unknown accelerator, the running guest needs kvm"),
        ),
        (
            {"qemu_series": (8, 2)},
            {"qemu_series": (7, 2)},
            ("qemu-older", "its QEMU is 7.2, the guest runs on 8.2; an older one may not take its state"),
        ),
    ],
)
def test_a_host_that_cannot_run_such_a_guest_is_refused(
    make_host: MakeHost,
    make_request: MakeRequest,
    wanted: dict[str, object],
    host_is: dict[str, object],
    reason: tuple[str, str],
) -> None:
    assert reasons(make_host(**host_is), make_request(**wanted)) == [reason]


def test_a_host_that_has_all_that_the_guest_needs_fits(make_host: MakeHost, make_request: MakeRequest) -> None:
    request = make_request(
        arch="x86_64",
        cpu_model="qemu64",
        cpu_features=("aes", "-vmx", "-avx2", "?svm"),
        machine="pc-q35-7.1",
        firmware=Firmware.UEFI,
        accelerator="kvm",
    )
    assert reasons(make_host(), request) == []


def test_a_vm_with_its_own_model_and_machine_does_not_mind_the_class_baseline(
    make_host: MakeHost, make_request: MakeRequest
) -> None:
    host = make_host(class_cpu_model="Cascadelake-Server", class_machine="pc-q35-8.0")
    assert reasons(host, make_request(cpu_model="EPYC", machine="pc-q35-7.2")) == []


def test_a_class_without_a_baseline_refuses_nobody(make_host: MakeHost, make_request: MakeRequest) -> None:
    host = make_host(class_cpu_model="", class_machine="", usable_cpu_models=frozenset(), machines=frozenset())
    assert reasons(host, make_request()) == []


# --- reach -------------------------------------------------------------------------------------------------------------------


def disk(**changes: object) -> DiskNeed:
    return DiskNeed(**{"name": "web1-root", "pool_id": "pool-local", "size_bytes": 10 * GIB, **changes})  # type: ignore[arg-type]


def test_a_pool_must_exist_be_set_up_and_be_ready(
    make_host: MakeHost, make_request: MakeRequest, local_pool: MakePool, shared_pool: MakePool
) -> None:
    request = make_request(disks=(disk(), disk(name="old", pool_id="pool-gone"), disk(name="more", pool_id="pool-nfs")))
    host = make_host(pools={"pool-nfs": False})
    assert reasons(host, request, local_pool(node1=50), shared_pool()) == [
        ("pool-unknown", "pool pool-gone does not exist"),
        ("pool-not-on-host", "pool local is not set up on it"),
        ("pool-not-ready", "pool nfs is not ready on it; see `trimtab pool get nfs`"),
    ]


def test_a_shared_pool_takes_no_new_disk_before_sharing_is_proven(
    make_host: MakeHost, make_request: MakeRequest, shared_pool: MakePool
) -> None:
    pool = shared_pool(is_sharing_proven=False)
    new = make_request(disks=(disk(pool_id="pool-nfs"),))
    assert [code for code, _ in reasons(make_host(), new, pool)] == ["pool-sharing-unproven"]
    kept = make_request(kind=PlacementKind.START, disks=(disk(pool_id="pool-nfs", is_claimed=True),))
    assert reasons(make_host(), kept, pool) == []


def test_a_vm_starts_only_where_its_local_disks_are(make_host: MakeHost, make_request: MakeRequest, local_pool: MakePool) -> None:
    fleet = FleetSnapshot.of([make_host("node1"), make_host("node2")], [local_pool(node1=0, node2=50)])
    bound = disk(host_id="host-node1", is_claimed=True)
    decision = explain(fleet, make_request(kind=PlacementKind.START, disks=(bound,)))
    assert decision.chosen_host_id == "host-node1"
    assert [refusal.message for refusal in decision.refused[0].refusals] == ["disk web1-root is on node1's local pool"]


def test_local_disks_on_two_hosts_fit_nowhere_and_each_is_named(
    make_host: MakeHost, make_request: MakeRequest, local_pool: MakePool
) -> None:
    disks = (disk(host_id="host-node1", is_claimed=True), disk(name="web1-log", host_id="host-gone", is_claimed=True))
    found = reasons(make_host(), make_request(kind=PlacementKind.START, disks=disks), local_pool(node1=50))
    assert found == [("disk-elsewhere", "disk web1-log is on absent host host-gone's local pool")]


def test_a_migration_may_leave_the_host_of_its_local_disks_when_the_target_has_space_for_copies(
    make_host: MakeHost, make_request: MakeRequest, local_pool: MakePool
) -> None:
    pool = local_pool(node1=0, node2=50, node3=5)
    fleet = FleetSnapshot.of([make_host(name) for name in ("node1", "node2", "node3")], [pool])
    request = make_request(
        kind=PlacementKind.MIGRATE,
        disks=(disk(host_id="host-node1", is_claimed=True),),
        excluded_host_ids=("host-node1",),
    )
    decision = explain(fleet, request)
    assert decision.chosen_host_id == "host-node2"
    refused = decision.verdict_of("node3")
    assert refused is not None
    assert [refusal.code for refusal in refused.refusals] == ["pool-space-short"]


@pytest.mark.parametrize(
    ("networks", "reason"),
    [
        ({}, ("network-not-on-host", "network default is not set up on it")),
        (
            {"net-1": NetworkReach(False, 9000)},
            ("network-not-ready", "network default is not ready on it; see `trimtab network get default`"),
        ),
        (
            {"net-1": NetworkReach(True, 1500)},
            ("network-mtu-too-small", "network default needs MTU 9000, its bridge has 1500"),
        ),
    ],
)
def test_a_network_must_be_set_up_ready_and_wide_enough(
    make_host: MakeHost, make_request: MakeRequest, networks: dict[str, NetworkReach], reason: tuple[str, str]
) -> None:
    request = make_request(networks=(NetworkNeed(network_id="net-1", name="default", mtu=9000),))
    assert reasons(make_host(networks=networks), request) == [reason]


def test_every_network_of_the_vm_must_be_reached(make_host: MakeHost, make_request: MakeRequest) -> None:
    request = make_request(
        networks=(
            NetworkNeed(network_id="net-1", name="default"),
            NetworkNeed(network_id="net-2", name="backup"),
            NetworkNeed(network_id="net-3", name="storage"),
        )
    )
    host = make_host(networks={"net-1": NetworkReach(True, 1500), "net-3": NetworkReach(True, 1500)})
    assert reasons(host, request) == [("network-not-on-host", "network backup is not set up on it")]


@pytest.mark.parametrize("mtu", [0, 9000, 9216])
def test_a_wider_or_unknown_mtu_does_not_refuse(make_host: MakeHost, make_request: MakeRequest, mtu: int) -> None:
    request = make_request(
        networks=(
            NetworkNeed(network_id="net-1", name="default", mtu=9000),
            NetworkNeed(network_id="net-2", name="backup"),
        )
    )
    host = make_host(networks={"net-1": NetworkReach(True, mtu), "net-2": NetworkReach(True, 1500)})
    assert reasons(host, request) == []


# --- capacity ----------------------------------------------------------------------------------------------------------------


def test_a_host_without_room_tells_what_is_missing(make_host: MakeHost, make_request: MakeRequest) -> None:
    host = make_host(vcpus_claimed=14, memory_claimed_mib=14672)
    assert reasons(host, make_request(vcpus=4, memory_mib=4096)) == [
        ("vcpus-short", "needs 4 vcpus, 2 free of 16"),
        ("memory-short", "needs 4096 MiB, 1200 MiB free of 15872 (reserve 1024)"),
    ]


def test_unmanaged_domains_count_as_used_and_are_named(make_host: MakeHost, make_request: MakeRequest) -> None:
    host = make_host(unmanaged_vcpus=15, unmanaged_memory_mib=20000, memory_reserve_mib=0)
    assert reasons(host, make_request()) == [
        ("vcpus-short", "needs 2 vcpus, 1 free of 16 (15 used by unmanaged domains)"),
        ("memory-short", "needs 2048 MiB, 0 MiB free of 15872 (20000 used by unmanaged domains)"),
    ]


def test_a_vm_that_fills_a_host_exactly_fits(make_host: MakeHost, make_request: MakeRequest) -> None:
    assert reasons(make_host(), make_request(vcpus=16, memory_mib=15872)) == []
    assert [code for code, _ in reasons(make_host(), make_request(vcpus=17, memory_mib=15873))] == [
        "vcpus-short",
        "memory-short",
    ]


def test_the_figures_of_a_refusal_are_typed_for_those_who_search_a_way_out(
    make_host: MakeHost, make_request: MakeRequest
) -> None:
    decision = explain(FleetSnapshot.of([make_host()]), make_request(memory_mib=20000))
    assert decision.refused[0].refusals[0].context == {"needed": 20000, "free": 15872, "limit": 15872}


def test_new_disks_on_one_local_pool_need_their_sum(make_host: MakeHost, make_request: MakeRequest, local_pool: MakePool) -> None:
    request = make_request(disks=(disk(), disk(name="log", size_bytes=50 * GIB)))
    assert reasons(make_host(), request, local_pool(node1=60)) == []
    assert reasons(make_host(), request, local_pool(node1=59)) == [
        ("pool-space-short", "needs 60.0 GiB on pool local, 59.0 GiB free of 100.0 GiB")
    ]


def test_new_disks_on_two_local_pools_need_both(make_host: MakeHost, make_request: MakeRequest, local_pool: MakePool) -> None:
    other = PoolSnapshot(
        pool_id="pool-fast",
        name="fast",
        is_shared=False,
        places={"host-node1": PoolPlace(2 << 40, 2 << 40, (2 << 40) - 5 * (1 << 20))},
    )
    host = make_host(pools={"pool-local": True, "pool-fast": True})
    request = make_request(disks=(disk(), disk(name="log", pool_id="pool-fast")))
    assert reasons(host, request, local_pool(node1=60), other) == [
        ("pool-space-short", "needs 10.0 GiB on pool fast, 5.0 MiB free of 2.0 TiB")
    ]


def test_space_on_a_shared_pool_is_needed_once_for_the_whole_fleet(
    make_host: MakeHost, make_request: MakeRequest, shared_pool: MakePool
) -> None:
    request = make_request(disks=(disk(pool_id="pool-nfs"),))
    assert reasons(make_host(), request, shared_pool(free_gib=10)) == []
    assert reasons(make_host(), request, shared_pool(free_gib=9)) == [
        ("pool-space-short", "needs 10.0 GiB on pool nfs, 9.0 GiB free of 100.0 GiB")
    ]


def test_a_start_needs_no_space_that_is_claimed_already(
    make_host: MakeHost, make_request: MakeRequest, shared_pool: MakePool
) -> None:
    request = make_request(kind=PlacementKind.START, disks=(disk(pool_id="pool-nfs", is_claimed=True),))
    assert reasons(make_host(), request, shared_pool(free_gib=0)) == []


def test_a_pool_whose_space_nobody_reported_takes_nothing(
    make_host: MakeHost, make_request: MakeRequest, local_pool: MakePool, shared_pool: MakePool
) -> None:
    silent = shared_pool(places={"": PoolPlace(0, 0, 0)})
    request = make_request(disks=(disk(size_bytes=100), disk(name="log", pool_id="pool-nfs", size_bytes=100)))
    assert reasons(make_host(), request, local_pool(), silent) == [
        ("pool-space-unknown", "needs 100 bytes on pool nfs, whose space is not reported yet"),
        ("pool-space-unknown", "needs 100 bytes on pool local, whose space is not reported yet"),
    ]
