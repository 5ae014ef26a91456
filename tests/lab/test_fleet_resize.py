"""A real fleet: vms and volumes are resized by the command line, and the guests say what they see."""

import pytest

from tests.lab.fleet_kit import Fleet, wait_until
from tests.lab.guest_view import available_mib, disk_mib, guest_says, has_card, memory_mib, online_cpus
from tests.lab.ticks import breaks

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

IOPS, READS = 20, 100
LEAST_S = 4.0
"""So long so many reads take at least at that limit; QEMU lets a tenth of a second's worth through at once."""
BY_HAND = "52:54:00:0f:0a:31"


@pytest.fixture(scope="module")
def growing(fleet: Fleet) -> dict[str, str]:
    """A vm with room to grow, whose guest answers."""
    fleet.ok(
        "vm", "create", "grow1", "--image", "micro", "--memory", "96MiB", "--memory-max", "224MiB", "--vcpus", "1",
        "--vcpus-max", "3", "--pool", "shared", "--network", "default", "--wait",
    )  # fmt: skip
    vm = fleet.vm("grow1")
    fleet.wait_for_ticks("grow1", 1)
    wait_until(lambda: online_cpus(fleet.lab, vm["host"], vm["id"]) == 1, "the guest's agent")
    return {"id": vm["id"], "host": vm["host"]}


def test_a_running_guest_sees_what_it_was_given_and_goes_on(fleet: Fleet, growing: dict[str, str]) -> None:
    vm_id, host = growing["id"], growing["host"]
    before_mib, (counted, uptime) = memory_mib(fleet.lab, host, vm_id), fleet.ticks("grow1")
    claimed_mib = fleet.host(host)["memory_mib"]["claimed"]
    said = fleet.ok("vm", "resize", "grow1", "--vcpus", "3", "--memory", "160MiB", "--live", "--wait").out
    assert "grow1 has 3 vcpus, 160 MiB" in said
    assert online_cpus(fleet.lab, host, vm_id) == 3
    assert memory_mib(fleet.lab, host, vm_id) - before_mib == 64
    for mib in (128, 160):
        fleet.ok("vm", "resize", "grow1", "--memory", f"{mib}MiB", "--live", "--wait")
        assert memory_mib(fleet.lab, host, vm_id) - before_mib == mib - 96
        assert fleet.host(host)["memory_mib"]["claimed"] - claimed_mib == mib - 96
    later_count, later_uptime = fleet.wait_for_ticks("grow1", counted + 2)
    assert (later_count > counted, later_uptime > uptime) == (True, True), "it was never restarted"


def test_what_was_given_moves_with_the_guest(fleet: Fleet, growing: dict[str, str]) -> None:
    fleet.ok("vm", "migrate", "grow1", "--wait")
    growing["host"] = fleet.vm("grow1")["host"]
    assert online_cpus(fleet.lab, growing["host"], growing["id"]) == 3
    host = fleet.ok("host", "get", growing["host"], "-o", "json").json()
    assert host["memory_mib"]["claimed"] >= 160, "its claim moved with it"


def reads_take_s(fleet: Fleet, growing: dict[str, str], serial: str) -> float:
    """Return how long the guest, by its own clock, waits for reads of 4 KiB that nothing but its disk can answer."""
    now = "cut -d' ' -f1 /proc/uptime"
    disk = f"/dev/$(basename $(dirname $(grep -lx {serial} /sys/block/*/serial)))"
    read = f"{now}; dd if={disk} of=/dev/null bs=4k count={READS} iflag=direct 2>/dev/null && {now}"
    began, ended = guest_says(fleet.lab, growing["host"], growing["id"], read).split()
    return float(ended) - float(began)


def test_a_limit_of_reads_a_second_holds_in_the_guest_and_is_lifted(fleet: Fleet, growing: dict[str, str]) -> None:
    root = fleet.vm("grow1")["volumes"][0]
    fleet.ok("volume", "limit", root["name"], "--iops", str(IOPS), "--wait")
    assert reads_take_s(fleet, growing, root["id"][-20:]) > LEAST_S
    fleet.ok("volume", "limit", root["name"], "--iops", "0", "--wait")
    wait_until(lambda: reads_take_s(fleet, growing, root["id"][-20:]) < LEAST_S, "the guest to read faster than that")


def test_what_somebody_changed_by_hand_is_put_back_under_the_running_guest(fleet: Fleet, growing: dict[str, str]) -> None:
    vm, host, domain = fleet.vm("grow1"), growing["host"], f"trimtab-{growing['id']}"
    serial, own = vm["volumes"][0]["id"][-20:], vm["nics"][0]["mac"]
    counted = fleet.ticks("grow1")[0]
    came = f"--type bridge --source br-guest --model virtio --mac {BY_HAND}"
    fleet.sh(
        host,
        f"virsh blkdeviotune {domain} vda --total-iops-sec {IOPS} --live --config\n"
        f"virsh attach-interface {domain} {came} --live --config\n"
        f"virsh detach-interface {domain} bridge --mac {own} --live --config",
    )
    wait_until(lambda: not has_card(fleet.lab, host, vm["id"], own), "the guest to have let go of its card")
    wait_until(lambda: has_card(fleet.lab, host, vm["id"], BY_HAND), "the guest to have another")
    assert reads_take_s(fleet, growing, serial) > LEAST_S
    seen = {(one["field"], one["live"]) for one in fleet.ok("vm", "diff", "grow1", "-o", "json").json()["differences"]}
    told = {(f"disk {vm['volumes'][0]['id']}.iops_limit", str(IOPS)), (f"nic {own}", ""), (f"nic {BY_HAND}", "attached")}
    assert told <= seen, seen

    fleet.ok("vm", "reconcile", "grow1", "--revert", "--wait")
    wait_until(lambda: has_card(fleet.lab, host, vm["id"], own), "the guest to have its own card again")
    wait_until(lambda: reads_take_s(fleet, growing, serial) < LEAST_S, "the guest to read as fast as before")
    # A device is not pulled from under a guest that may use it: it goes with the next stop.
    assert has_card(fleet.lab, host, vm["id"], BY_HAND)
    assert BY_HAND not in fleet.sh(host, f"virsh dumpxml --inactive {domain}")
    left = fleet.ok("vm", "diff", "grow1", "-o", "json").json()["differences"]
    assert {one["field"].partition(".")[0] for one in left} == {f"nic {BY_HAND}"}, left
    last = fleet.wait_for_ticks("grow1", fleet.ticks("grow1")[0] + 1)[0]
    assert breaks(fleet.ok("vm", "console", "grow1", "--log").out, first=counted, last=last) == [], "it was never restarted"


def test_what_somebody_gave_and_took_by_hand_is_taken_over_or_put_back(fleet: Fleet) -> None:
    """Vcpus are accepted; a disk that is no volume and a balloon are not, and go back."""
    fleet.ok(
        "vm", "create", "hand1", "--image", "micro", "--memory", "160MiB", "--vcpus", "1", "--vcpus-max", "3", "--pool", "shared",
        "--network", "default", "--wait",
    )  # fmt: skip
    vm = fleet.vm("hand1")
    host, vm_id, domain = vm["host"], vm["id"], f"trimtab-{vm['id']}"
    counted = fleet.wait_for_ticks("hand1", 1)[0]
    wait_until(lambda: online_cpus(fleet.lab, host, vm_id) == 1, "the guest's agent")

    fleet.sh(host, f"virsh setvcpus {domain} 2 --live --config")
    assert hand_changes(fleet, "hand1") == {"vcpus": ("1", "2", "2")}
    wait_until(lambda: "changed by hand: vcpus" in fleet.ok("vm", "list").out, "the list to say so")
    fleet.ok("vm", "reconcile", "hand1", "--accept", "--wait")
    assert (fleet.vm("hand1")["shape"]["vcpus"], online_cpus(fleet.lab, host, vm_id)) == (2, 2)
    assert hand_changes(fleet, "hand1") == {}

    free_mib = available_mib(fleet.lab, host, vm_id)
    attach = "virsh attach-disk {} /srv/trimtab-local/hand.raw vdh --driver qemu --subdriver raw --serial byhand --live --config"
    fleet.sh(
        host,
        f"truncate -s 8M /srv/trimtab-local/hand.raw; {attach.format(domain)}\n"
        f"virsh setmem {domain} 120M --live --config; virsh setvcpus {domain} 3 --live --config",
    )
    wait_until(lambda: available_mib(fleet.lab, host, vm_id) < free_mib - 30, "the guest to have less memory")
    wait_until(lambda: disk_mib(fleet.lab, host, vm_id, "byhand") == 8, "the guest to see the disk")
    disk = "disk vdh (/srv/trimtab-local/hand.raw)"
    told = {"balloon_mib": ("", "120", "120"), "vcpus": ("2", "3", "3"), disk: ("", "attached", "attached")}
    # QEMU tells libvirt of its balloon once a second.
    wait_until(lambda: hand_changes(fleet, "hand1") == told, f"what was done to be told: {told}", patience_s=30.0)
    refused = fleet.trimtab("vm", "reconcile", "hand1", "--accept", "--wait")
    assert (refused.code, f"nothing of Trimtab says balloon_mib, {disk};" in refused.err) == (5, True), refused.err
    assert fleet.vm("hand1")["shape"]["vcpus"] == 2, "nothing is taken over then"

    said = fleet.ok("vm", "reconcile", "hand1", "--revert", "--wait").out
    wait_until(lambda: available_mib(fleet.lab, host, vm_id) > free_mib - 10, "the guest to have its memory again")
    left = wait_until(
        lambda: seen if "balloon_mib" not in (seen := hand_changes(fleet, "hand1")) else None,
        "nothing to be told of it",
        patience_s=30.0,
    )
    # A disk is not pulled from under the guest, and a vcpu goes if the guest lets it: the answer says which.
    assert left == ({"vcpus": ("2", "3", "2")} if "vcpu" in said else {}) | {disk: ("", "attached", "")}, said
    last = fleet.wait_for_ticks("hand1", fleet.ticks("hand1")[0] + 1)[0]
    assert breaks(fleet.ok("vm", "console", "hand1", "--log").out, first=counted, last=last) == [], "it was never restarted"
    fleet.ok("vm", "stop", "hand1", "--wait")
    fleet.ok("vm", "start", "hand1", "--wait")
    host = fleet.vm("hand1")["host"]
    wait_until(lambda: online_cpus(fleet.lab, host, vm_id) == 2, "the guest's agent")
    assert disk_mib(fleet.lab, host, vm_id, "byhand") == 0
    assert hand_changes(fleet, "hand1") == {}
    fleet.delete("hand1")


def hand_changes(fleet: Fleet, name: str) -> dict[str, tuple[str, str, str]]:
    """Return what `vm diff` says by field: as it shall be, as it runs, as it is stored."""
    found = fleet.ok("vm", "diff", name, "-o", "json").json()["differences"]
    return {one["field"]: (one["desired"], one["live"], one["stored"]) for one in found}


def test_more_than_it_can_take_is_refused_with_the_command_that_works(fleet: Fleet, growing: dict[str, str]) -> None:
    refused = fleet.trimtab("vm", "resize", "grow1", "--vcpus", "4")
    assert refused.code == 2
    assert "3 at most while it runs" in refused.err
    assert "--at next-stop" in refused.err
    seen_mib = memory_mib(fleet.lab, growing["host"], growing["id"])
    for wish in (("--vcpus", "4"), ("--memory", "64MiB")):
        refused = fleet.trimtab("vm", "resize", "grow1", *wish, "--live", "--wait")
        assert (refused.code != 0, "--at next-stop" in refused.err) == (True, True), refused.err
    shape = fleet.vm("grow1")["shape"]
    assert (shape["vcpus"], shape["memory_mib"], shape["next_vcpus"], shape["next_memory_mib"]) == (3, 160, 0, 0)
    assert memory_mib(fleet.lab, growing["host"], growing["id"]) == seen_mib
    waits = fleet.ok("vm", "resize", "grow1", "--vcpus", "4", "--at", "next-stop", "--wait").out
    assert "at its next stop: 4 vcpus" in waits


def test_what_a_guest_keeps_waits_for_its_stop_and_is_so_afterwards(fleet: Fleet, growing: dict[str, str]) -> None:
    said = fleet.ok("vm", "resize", "grow1", "--vcpus", "1", "--memory", "96MiB", "--wait").out
    shape = fleet.vm("grow1")["shape"]
    seen = online_cpus(fleet.lab, growing["host"], growing["id"])
    assert shape["vcpus"] == seen, "what is shown is what the guest has"
    assert (shape["next_vcpus"] == 1) == (seen != 1)
    assert ("at its next stop" in said) == bool(shape["next_vcpus"] or shape["next_memory_mib"])
    fleet.ok("vm", "stop", "grow1", "--wait")
    fleet.ok("vm", "start", "grow1", "--wait")
    shape = fleet.vm("grow1")["shape"]
    assert (shape["vcpus"], shape["memory_mib"], shape["next_vcpus"], shape["next_memory_mib"]) == (1, 96, 0, 0)
    growing["host"] = fleet.vm("grow1")["host"]
    wait_until(lambda: online_cpus(fleet.lab, growing["host"], growing["id"]) == 1, "the guest's agent")
    assert not has_card(fleet.lab, growing["host"], growing["id"], BY_HAND), "what somebody had attached is gone"
    assert fleet.ok("vm", "diff", "grow1", "-o", "json").json()["differences"] == []


def test_a_volume_grows_under_its_guest_and_never_shrinks(fleet: Fleet, growing: dict[str, str]) -> None:
    vm = fleet.vm("grow1")
    root = vm["volumes"][0]
    fleet.ok("volume", "resize", root["name"], "80MiB", "--wait")
    wait_until(lambda: disk_mib(fleet.lab, vm["host"], growing["id"], root["id"][-20:]) == 80, "the guest to see the grown disk")
    refused = fleet.trimtab("volume", "resize", root["name"], "64MiB")
    assert refused.code == 2
    assert "not shrink" in refused.err
