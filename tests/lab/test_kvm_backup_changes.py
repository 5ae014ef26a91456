"""One real guest whose disks change in every way that Trimtab knows; it is short of room and loses its agent, and is backed up throughout."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import pytest

from tests.contract.kvm_fixture import KvmHost, kvm_host
from tests.lab import kvm_backups
from tests.lab.guest_view import begins, disk_mib, guest_says
from tests.lab.kvm_backups import Told, told_by
from tests.lab.kvm_guests import (
    MIB,
    Control,
    bring_image,
    last_tick,
    spec_of,
    start,
    until,
    volume_of,
    wait_for_tick,
)
from tests.soak import backup_kills
from trimtab_agent.hypervisor.base import Stamp
from trimtab_lab.hosts import Lab
from trimtab_protos.messages import (
    DiskFormat,
    DiskSpec,
    DomainSpec,
    DomainState,
    LayerMerge,
    PoolSpec,
    PowerAction,
    VolumeSpec,
)

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

KILLS = 20
POOL = "/srv/small"
SEAT = f"{POOL}/volumes"


@dataclass(slots=True)
class Seat:
    """The guest, its pool of 400 MiB, and the lab of one host; the host's hypervisor is each test's own."""

    lab: Lab
    pool: PoolSpec
    spec: DomainSpec
    domain: str = field(init=False)

    def __post_init__(self) -> None:
        self.domain = f"trimtab-{self.spec.vm_id}"

    def sh(self, script: str) -> str:
        return self.lab.run("node1", ["sh", "-ec", script]).stdout.strip()

    def says(self, script: str) -> str:
        return guest_says(self.lab, "node1", self.spec.vm_id, script)

    def state(self) -> str:
        return self.sh(f"virsh domstate --reason {self.domain}")

    def counts_on(self, host: KvmHost) -> None:
        wait_for_tick(host, self.spec.vm_id, last_tick(host, self.spec.vm_id) + 2)


@pytest.fixture(scope="module")
def seat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seat]:
    lab, scratch = Lab.named(f"kvm-{os.getpid()}"), tmp_path_factory.mktemp("seat")
    try:
        lab.up(hosts=1)
        lab.run("node1", ["sh", "-ec", f"mkdir -p {POOL}; mount -t tmpfs -o size=400m,mode=755 small {POOL}"])
        with kvm_host(lab, "node1", scratch) as node1:
            pool = replace(node1.local_pool, pool_id="pool-small", path=POOL, name="small")
            bring_image(node1, pool)
            made = Seat(lab, pool, spec_of(node1, "still", pool))
            start(node1, made.spec)
            wait_for_tick(node1, made.spec.vm_id, 2)
            until(lambda: node1.hypervisor.observe_domain(made.spec.vm_id).has_guest_agent, what="the guest agent")
        yield made
    finally:
        lab.down()


def test_a_guest_whose_agent_died_between_freeze_and_thaw_counts_on_once_the_agent_is_back(seat: Seat, tmp_path: Path) -> None:
    lab, spec, repository = seat.lab, seat.spec, tmp_path / "repository"
    repository.mkdir()

    def frozen(vm_id: str) -> str:
        """Return what the guest's own agent says; no agent of ours is asked."""
        asked = ["virsh", "-q", "qemu-agent-command", f"trimtab-{vm_id}", '{"execute": "guest-fsfreeze-status"}']
        return str(json.loads(lab.run("node1", asked).stdout)["return"])

    def marks() -> list[str]:
        return lab.run("node1", ["find", "/var/lib/libvirt/qemu", "-name", "*.held"]).stdout.split()

    def job() -> str:
        return seat.sh(f"virsh domjobinfo {seat.domain} | head -n 1").split()[-1]

    # The host has no agent from here on, and the backup's process dies with the guest's file systems frozen.
    with kvm_host(lab, "node1", tmp_path) as node1:
        pass
    assert told_by(lab, node1, "die-frozen", "-", spec.vm_id, "bk-died").returncode == 9
    assert (frozen(spec.vm_id), len(marks()), job()) == ("frozen", 2, "Unbounded")

    with kvm_host(lab, "node1", tmp_path) as node1:
        until(lambda: frozen(spec.vm_id) == "thawed", what="the thaw", deadline_s=30)
        wait_for_tick(node1, spec.vm_id, last_tick(node1, spec.vm_id) + 2)
        until(lambda: not marks(), what="no mark to be left", deadline_s=30)
        # What the dead one began is ended, though no other backup was asked for: its scratch would grow until the guest has no room.
        assert job() == "None"
        assert "scratch" not in seat.sh(f"ls -A {SEAT}")
        assert node1.hypervisor.observe_domain(spec.vm_id).state is DomainState.RUNNING
        # The guest is frozen and thawed as ever.
        told = kvm_backups.run(lab, node1, "backup", str(repository), spec.vm_id, "bk-next")
        assert (told["consistency"], frozen(spec.vm_id), marks()) == ("filesystem", "thawed", []), told
        wait_for_tick(node1, spec.vm_id, last_tick(node1, spec.vm_id) + 2)


def test_a_backup_whose_scratch_would_fill_its_pool_ends_and_the_guest_never_stands_still(seat: Seat, tmp_path: Path) -> None:
    lab, spec, repository = seat.lab, seat.spec, tmp_path / "repository"
    repository.mkdir()
    disk = f"/dev/$(basename $(dirname $(grep -lx {spec.disks[0].volume_id} /sys/block/*/serial)))"
    # Behind its partitions, so that there is something to keep aside; what follows is 24 MiB into 20 MiB that are free.
    seat.says(f"dd if=/dev/urandom of={disk} bs=1M seek=38 count=24 conv=fsync 2>/dev/null")
    seat.sh(f"free=$(df --output=avail -k {POOL} | tail -n 1); head -c $(((free - 20480) * 1024)) /dev/zero >{POOL}/filler")
    writes = (
        f"for i in $(seq 0 23); do dd if=/dev/urandom of={disk} bs=1M seek=$((38 + i)) count=1 conv=fsync 2>/dev/null; done; "
        "touch /run/written"
    )
    was = seat.state()
    with kvm_host(lab, "node1", tmp_path) as node1:
        slow = kvm_backups.command(lab, "node1", "slow", str(repository), spec.vm_id, "bk-full")
        with subprocess.Popen(
            slow, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=lab.environment("node1")
        ) as backup:
            assert backup.stdout is not None
            assert any(line == "begun\n" for line in backup.stdout), "it reads"
            # The reader stands still from here on, as one does whose repository is slow.
            until(lambda: begins(lab, "node1", spec.vm_id, writes), what="the guest to begin", deadline_s=60)
            asked = f"timeout 5 virsh domjobinfo {seat.domain} | head -n 1"
            until(lambda: seat.sh(asked).split()[-1:] == ["None"], what="the backup's end", deadline_s=60)
            answer = json.loads(backup.communicate("\n", timeout=60)[0].splitlines()[-1])
        assert answer["error"] == "scratch-full", answer
        assert "MiB" in answer["message"], answer
        assert "trimtab volume move" in answer["message"], answer
        until(lambda: seat.says("[ -e /run/written ] && echo all") == "all", what="the guest to have written all", deadline_s=60)
        assert seat.state() == was, "it was paused meanwhile"
        seat.counts_on(node1)
        assert "scratch" not in seat.sh(f"ls -A {SEAT}")
        # With room again the next one is whole.
        seat.sh(f"rm {POOL}/filler")
        told = kvm_backups.run(lab, node1, "backup", str(repository), spec.vm_id, "bk-room")
        restored = kvm_backups.run(lab, node1, "restore", str(repository), spec.vm_id, "bk-room", str(tmp_path / "room.qcow2"))
        assert restored["sha256"] == told["sha256"]


@dataclass(slots=True)
class History:
    """Backups of the guest, one after the other; each is restored and compared with what its disks held at the instant."""

    seat: Seat
    host: KvmHost
    folder: Path
    last: str = ""
    numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def back_up(self, *disks: str) -> dict[str, str]:
        """Write, back up, restore, compare; return why each disk was read in full, "" for an increment."""
        vm_id, backup_id = self.seat.spec.vm_id, f"bk-{next(self.numbers)}"
        self.seat.says("head -c 1048576 /dev/urandom >/data/churn; sync")
        told: Told = kvm_backups.run(
            self.seat.lab, self.host, "compared", str(self.folder / "repository"), vm_id, backup_id, *disks
        )
        assert told.get("base_id") == self.last, told
        assert told["restored"] == told["digests"], told
        self.last, reasons = backup_id, told["full_reasons"]
        assert isinstance(reasons, dict)
        return reasons


def on_layer(seat: Seat, layer_id: str, *, is_merging: bool = False) -> DomainSpec:
    merging = {"is_merging": True, "merge_layer_id": ""} if is_merging else {}
    return replace(seat.spec, disks=(replace(seat.spec.disks[0], layer_id=layer_id, **merging),))  # type: ignore[arg-type]


def lay_over(seat: Seat, host: KvmHost, layer_id: str, *, size_mib: int) -> None:
    layer = replace(
        volume_of(seat.spec),
        size_bytes=size_mib * MIB,
        base_image_id="",
        layer_id=layer_id,
        base_volume_id=seat.spec.disks[0].volume_id,
    )
    host.hypervisor.ensure_volume(layer, seat.pool)
    host.hypervisor.switch_layers(on_layer(seat, layer_id), Stamp(epoch=1, turn=5), wants_freeze=True)


@pytest.mark.soak
def test_increments_of_a_running_guest_are_right_whatever_happened_to_its_disks(seat: Seat, tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    with kvm_host(seat.lab, "node1", tmp_path) as node1:
        history = History(seat, node1, tmp_path)
        assert history.back_up() == {"vda": "first backup"}
        assert history.back_up() == {"vda": ""}
        snapshots_merges_and_grows(history)
        gains_a_disk_whose_bitmap_breaks_and_loses_it(history)
        is_reverted(history)
        is_the_guests_own_disk(history)
        seat.counts_on(node1)


def snapshots_merges_and_grows(history: History) -> None:
    seat, host = history.seat, history.host
    lay_over(seat, host, "lay-one", size_mib=64)
    assert history.back_up() == {"vda": ""}, "a live snapshot"
    merge = LayerMerge(
        volume_id=seat.spec.disks[0].volume_id,
        pool_id=seat.pool.pool_id,
        top_layer_id="lay-one",
        base_layer_id="",
        children=(),
        vm_id=seat.spec.vm_id,
        keeps_running=True,
    )
    merged = on_layer(seat, "lay-one", is_merging=True)
    host.hypervisor.merge_layer(merge, seat.pool, merged, Stamp(epoch=1, turn=6), Control())
    host.hypervisor.define_domain(seat.spec, Stamp(epoch=1, turn=7))
    assert "lay-one" not in seat.sh(f"virsh domblklist {seat.domain}")
    assert history.back_up() == {"vda": ""}, "a merge under it"
    volume = replace(volume_of(seat.spec), size_bytes=80 * MIB)
    host.hypervisor.resize_volume(volume, seat.pool, seat.spec.vm_id)
    until(lambda: disk_mib(seat.lab, "node1", seat.spec.vm_id, volume.volume_id) == 80, what="the guest to see its disk grown")
    assert history.back_up() == {"vda": ""}, "grown, its new part untouched"
    disk = f"/dev/$(basename $(dirname $(grep -lx {volume.volume_id} /sys/block/*/serial)))"
    seat.says(f"dd if=/dev/urandom of={disk} bs=1M seek=78 count=2 conv=fsync 2>/dev/null")
    assert history.back_up() == {"vda": ""}, "and written to"


def gains_a_disk_whose_bitmap_breaks_and_loses_it(history: History) -> None:
    seat, host = history.seat, history.host
    more = VolumeSpec(volume_id="vol-more", pool_id=seat.pool.pool_id, format=DiskFormat.QCOW2, size_bytes=16 * MIB)
    host.hypervisor.ensure_volume(more, seat.pool)
    added = DiskSpec(volume_id="vol-more", pool_id=seat.pool.pool_id, format=DiskFormat.QCOW2, index=1)
    both = replace(seat.spec, disks=(*seat.spec.disks, added))
    assert host.hypervisor.apply_domain(both, Stamp(epoch=1, turn=8)).left == ()
    until(lambda: disk_mib(seat.lab, "node1", seat.spec.vm_id, "vol-more") == 16, what="the guest to see the disk")
    disk = "/dev/$(basename $(dirname $(grep -lx vol-more /sys/block/*/serial)))"

    def both_backed_up() -> tuple[str, str]:
        seat.says(f"dd if=/dev/urandom of={disk} bs=64k seek=8 count=16 conv=fsync 2>/dev/null")
        reasons = history.back_up("vda", "vdb")
        return reasons["vda"], reasons["vdb"]

    def break_bitmap() -> None:
        """Take the second disk's bitmap out of QEMU, as a torn file or a copy of it would have lost it."""
        blocks = json.loads(seat.sh(f'virsh qemu-monitor-command {seat.domain} \'{{"execute": "query-block"}}\''))["return"]
        [node] = [one["inserted"]["node-name"] for one in blocks if "ua-vol-more" in one.get("qdev", "")]
        removed = {
            "execute": "block-dirty-bitmap-remove",
            "arguments": {"node": node, "name": f"tt-{history.last}"},
        }
        assert "error" not in seat.sh(f"virsh qemu-monitor-command {seat.domain} '{json.dumps(removed)}'")

    first, last = both_backed_up(), history.last
    assert first == ("", "the disk was added after " + f"bk-{int(last.removeprefix('bk-')) - 1}")
    assert both_backed_up() == ("", "")
    break_bitmap()
    of_its_own = both_backed_up()
    assert of_its_own[0] == "", "a whole bitmap does not suffer from another disk's"
    assert "its checkpoint is broken" in of_its_own[1]
    assert "vdb" in of_its_own[1]
    assert both_backed_up() == ("", "")
    # On a host that libvirt has told nothing of its checkpoints, as after a move.
    seat.sh(f"virsh checkpoint-delete {seat.domain} tt-{history.last} --metadata")
    break_bitmap()
    known_again = both_backed_up()
    assert (known_again[0], "does not know the checkpoint" in known_again[1]) == ("", True), known_again
    assert both_backed_up() == ("", "")
    bitmaps = seat.sh(f'virsh qemu-monitor-command {seat.domain} \'{{"execute": "query-block"}}\'')
    left = {name for number in range(1, 40) if f'"tt-{(name := f"bk-{number}")}"' in bitmaps}
    assert left == {history.last}, "no bitmap of a former checkpoint stays in QEMU"
    assert host.hypervisor.apply_domain(seat.spec, Stamp(epoch=1, turn=9)).left == ()
    assert history.back_up() == {"vda": ""}, "the other disk is gone"
    assert history.back_up() == {"vda": ""}


def is_reverted(history: History) -> None:
    """A snapshot, more changes, and back to it: the vm is off meanwhile, and its disk a new layer over what it was."""
    seat, host = history.seat, history.host
    lay_over(seat, host, "lay-two", size_mib=80)
    assert history.back_up() == {"vda": ""}
    host.hypervisor.change_power(seat.spec.vm_id, PowerAction.FORCE_OFF, Stamp(epoch=1, turn=10))
    lay_over(seat, host, "lay-three", size_mib=80)
    host.hypervisor.change_power(seat.spec.vm_id, PowerAction.START, Stamp(epoch=1, turn=11))
    reasons = history.back_up("vda:2")
    assert "reverted" in reasons["vda"], "the control plane counts the content's generation on"
    assert history.back_up("vda:2") == {"vda": ""}


def is_the_guests_own_disk(history: History) -> None:
    """The file that the guest writes to, and no export of QEMU's, is what is restored."""
    seat = history.seat
    seat.sh(f"virsh suspend {seat.domain}")
    vm_id, backup_id = seat.spec.vm_id, f"bk-{next(history.numbers)}"
    kvm_backups.run(seat.lab, history.host, "backup", str(history.folder / "repository"), vm_id, backup_id, "vda:2")
    file = history.folder / "own.qcow2"
    kvm_backups.run(seat.lab, history.host, "restore", str(history.folder / "repository"), vm_id, backup_id, str(file))
    own = seat.sh(f"virsh domblklist {seat.domain} | awk '$1 == \"vda\" {{print $2}}'")
    assert "identical" in seat.sh(f"qemu-img compare -U -f qcow2 -F qcow2 {own} {file}")
    seat.sh(f"virsh resume {seat.domain}")


def test_whoever_is_killed_at_whatever_instant_what_is_listed_restores_byte_identical(seat: Seat) -> None:
    """The seeded part of `tests/soak/backup_kills.py`; the lab's other guest counts on beside it."""
    counted = last_line(seat)
    with tempfile.TemporaryDirectory(prefix="tt-backup-kills-") as name:
        folder = Path(name)
        folder.chmod(0o777)  # QEMU, which is another user, has its disks here
        played = backup_kills.campaign(seat.lab, folder, seed=5, count=KILLS, lanes=2, minutes=5)
    assert played["problem"] == ""
    assert set(played["killed"]) == set(backup_kills.WHOM), "the seed has each of them"
    assert sum(played["killed"].values()) == KILLS
    assert sum(played["killed_inside"].values()) >= KILLS // 4, "while a backup or prune was under way"
    assert played["restores_compared"] >= 2
    until(lambda: last_line(seat) > counted, what="the other guest to count on")


def last_line(seat: Seat) -> int:
    """Return the counter of the guest, asked of no agent of ours."""
    return int(seat.says("cat /run/tick") or 0)
