"""Where a guest is after a migration is decided by looking at both hosts, never by a return value."""

from dataclasses import replace

import pytest

from trimtab_controller.core import qemu_series
from trimtab_controller.core.migration import Outcome, outcome, refusals
from trimtab_protos.messages import (
    DomainObservation,
    DomainSpec,
    DomainState,
    Firmware,
    GuestQemu,
    Inventory,
    NetworkKind,
    NetworkSpec,
    StateReason,
)
from trimtab_protos.network_messages import Bridge


def seen(state: DomainState, *, is_migrating: bool = False, epoch: int = 1) -> DomainObservation:
    return DomainObservation(vm_id="vm-1", state=state, is_migrating=is_migrating, epoch=epoch)


RUNNING, PAUSED, ABSENT, STOPPED, INCOMING = (
    DomainState.RUNNING,
    DomainState.PAUSED,
    DomainState.ABSENT,
    DomainState.STOPPED,
    DomainState.INCOMING,
)


@pytest.mark.parametrize("other", [RUNNING, PAUSED, ABSENT, STOPPED])
@pytest.mark.parametrize("state", [RUNNING, PAUSED])
@pytest.mark.parametrize("is_migrating", [True, False])
def test_a_failed_postcopy_leaves_no_whole_guest_anywhere(state: DomainState, other: DomainState, is_migrating: bool) -> None:
    torn = replace(seen(state, is_migrating=is_migrating), reason=StateReason.POSTCOPY_FAILED)
    assert outcome(source=torn, target=seen(other)) is Outcome.TORN
    assert outcome(source=seen(other), target=torn) is Outcome.TORN


def test_a_source_whose_guest_left_has_sent_all_of_its_memory_whatever_the_target_makes_of_it() -> None:
    left = replace(seen(STOPPED), reason=StateReason.MIGRATED)
    there = replace(seen(RUNNING), reason=StateReason.POSTCOPY_FAILED)
    assert outcome(source=left, target=there) is Outcome.ON_TARGET
    assert outcome(source=left, target=replace(there, is_migrating=True)) is Outcome.UNSETTLED
    assert outcome(source=replace(left, reason=StateReason.DESTROYED), target=there) is Outcome.TORN


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (RUNNING, ABSENT, Outcome.ON_SOURCE),
        (RUNNING, STOPPED, Outcome.ON_SOURCE),
        (PAUSED, ABSENT, Outcome.ON_SOURCE),
        (ABSENT, RUNNING, Outcome.ON_TARGET),
        (STOPPED, RUNNING, Outcome.ON_TARGET),
        (STOPPED, PAUSED, Outcome.ON_TARGET),
        (ABSENT, ABSENT, Outcome.NOWHERE),
        (STOPPED, STOPPED, Outcome.NOWHERE),
        (RUNNING, INCOMING, Outcome.UNSETTLED),
        (PAUSED, RUNNING, Outcome.UNSETTLED),
        (RUNNING, RUNNING, Outcome.UNSETTLED),
        (PAUSED, PAUSED, Outcome.UNSETTLED),
        (ABSENT, INCOMING, Outcome.UNSETTLED),
    ],
)
def test_both_sides_decide_where_the_guest_is(source: DomainState, target: DomainState, expected: Outcome) -> None:
    assert outcome(source=seen(source), target=seen(target)) is expected


def test_a_migration_in_flight_on_either_side_settles_nothing() -> None:
    assert outcome(source=seen(RUNNING, is_migrating=True), target=seen(ABSENT)) is Outcome.UNSETTLED
    assert outcome(source=seen(STOPPED), target=seen(RUNNING, is_migrating=True)) is Outcome.UNSETTLED


DOMAIN = DomainSpec(
    vm_id="vm-1",
    uuid="u",
    name="web1",
    project="default",
    machine="pc-q35-7.2",
    cpu_model="qemu64",
    vcpus=1,
    vcpus_max=1,
    memory_mib=96,
    memory_max_mib=96,
    networks=(NetworkSpec(network_id="net-1", kind=NetworkKind.BRIDGE, name="lan", bridge="br0", mtu=1500),),
)
HOST = Inventory(
    hostname="node1",
    arch="x86_64",
    machine_id="m",
    smbios_uuid="s",
    boot_id="b",
    kernel="k",
    agent_version="1",
    libvirt_version="9",
    qemu_version="7.2",
    accelerator="kvm",
    cpu_vendor="AMD",
    cpu_model="EPYC",
    cpus=4,
    memory_mib=8192,
    usable_cpu_models=("qemu64",),
    machines=("pc-q35-7.2",),
    bridges=(Bridge(name="br0"),),
)


def why(domain: DomainSpec = DOMAIN, **target: object) -> tuple[str, ...]:
    return refusals(
        domain,
        source=HOST,
        target=replace(HOST, hostname="node2", **target),  # type: ignore[arg-type]
        source_seen=seen(RUNNING),
        target_seen=seen(ABSENT),
        guest_qemu=(7, 2),
    )


def test_a_matching_target_is_not_refused() -> None:
    assert why() == ()


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ({"usable_cpu_models": ("Nehalem",)}, "CPU model qemu64"),
        ({"machines": ("pc-q35-6.0",)}, "machine type pc-q35-7.2"),
        ({"arch": "aarch64"}, "aarch64"),
        ({"accelerator": "tcg"}, "tcg"),
        ({"qemu_version": "6.2"}, "has QEMU 6.2, the guest runs on 7.2"),
        ({"bridges": ()}, "no bridge br0"),
        ({"bridges": (Bridge(name="br0", mtu=1400),)}, "MTU 1400"),
    ],
)
def test_each_mismatch_is_named_before_anything_moves(target: dict[str, object], names: str) -> None:
    (reason,) = why(**target)
    assert names in reason
    assert "node2" in reason


@pytest.mark.parametrize(
    ("own", "installed", "told", "is_refused"),
    [
        ("", "7.2.0", "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", False),
        ("7.2.22", "7.2.0", "7.2.17", False),
        ("8.2.1", "7.2.0", "7.2.0", True),
        ("", "8.2.1", "7.2.0", True),
        ("7.2.0", "8.2.1", "7.2.0", False),
        ("7.2.0", "10.0.0", "7.2.0", False),
        ("9.2.0", "9.2.0", "10.0.0", False),
        ("", "8.2.1", "", False),
    ],
    ids=[
        "installed alike",
        "an older update of its series",
        "its own is newer than what its host has now",
        "older than its host's",
        "its host was upgraded, it was not",
        "its host was upgraded far",
        "ten is more than nine",
        "not told",
    ],
)
def test_a_guest_goes_to_the_series_of_qemu_that_it_runs_on_or_a_newer_one(
    own: str, installed: str, told: str, is_refused: bool
) -> None:
    others = (GuestQemu(vm_id=DOMAIN.vm_id, build=own),) if own else ()
    source = replace(HOST, qemu_build=installed, guest_qemus=others)
    reasons = refusals(
        DOMAIN,
        source=source,
        target=replace(HOST, hostname="node2", qemu_version="", qemu_build=told),
        source_seen=seen(RUNNING),
        target_seen=seen(ABSENT),
        guest_qemu=qemu_series.running(source, DOMAIN.vm_id),
    )
    assert bool(reasons) == is_refused, reasons


def test_uefi_and_missing_features_are_refused_together() -> None:
    reasons = why(replace(DOMAIN, firmware=Firmware.UEFI, cpu_features=("avx512f",)))
    assert len(reasons) == 2


@pytest.mark.parametrize(
    ("features", "source", "target", "missing"),
    [
        (("aes",), ("aes",), ("aes",), ""),
        (("aes", "vmx"), ("aes", "vmx"), ("aes",), "vmx"),
        (("-vmx",), ("aes",), ("aes",), ""),
        (("-vmx",), ("aes", "vmx"), ("aes",), ""),
        (("-vmx", "aes"), ("aes",), (), "aes"),
        (("?vmx",), (), (), ""),
        (("?vmx",), (), ("vmx",), ""),
        (("?vmx",), ("vmx",), ("vmx",), ""),
        (("?vmx", "-aes"), ("vmx", "aes"), ("aes",), "vmx"),
    ],
)
def test_a_guest_finds_the_features_that_it_requires_or_was_given(
    features: tuple[str, ...], source: tuple[str, ...], target: tuple[str, ...], missing: str
) -> None:
    reasons = refusals(
        replace(DOMAIN, cpu_features=features),
        source=replace(HOST, cpu_features=source),
        target=replace(HOST, hostname="node2", cpu_features=target),
        source_seen=seen(RUNNING),
        target_seen=seen(ABSENT),
    )
    assert reasons == ((f"node2 lacks CPU features {missing}",) if missing else ())


def test_a_guest_that_does_not_run_is_refused_and_so_is_a_target_that_runs_it() -> None:
    both = refusals(DOMAIN, source=HOST, target=HOST, source_seen=seen(STOPPED), target_seen=seen(RUNNING, epoch=9))
    assert [reason for reason in both if "only a running one" in reason]
    assert [reason for reason in both if "already runs" in reason]
    assert [reason for reason in both if "newer domain" in reason]


def test_a_disk_that_lies_over_others_is_moved_only_by_an_agent_that_copies_it_whole() -> None:
    knows, older = replace(HOST, capabilities=("migrate", "migrate-flat")), replace(HOST, capabilities=("migrate",))
    for source, is_flattened, refused in ((knows, True, False), (older, True, True), (older, False, False)):
        found = refusals(
            DOMAIN,
            source=source,
            target=replace(HOST, hostname="node2"),
            source_seen=seen(RUNNING),
            target_seen=seen(ABSENT),
            is_flattened=is_flattened,
        )
        assert any("update it" in reason for reason in found) is refused
