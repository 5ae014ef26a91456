"""A job's bandwidth: it holds back to it, and one without a bound waits for nothing; and how far it says that it is."""

import random
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.unit.agent.backup.kit import FLEET, KEY
from tests.unit.agent.manual_clock import ManualClock
from trimtab_agent.backup.access import Access, Repositories
from trimtab_agent.backup.holding import Holds
from trimtab_agent.backup.jobs import backup_runners, replication_request
from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.simulated_backups import SimulatedBackups, SimulatedDisk, SimulatedVm
from trimtab_agent.jobs import JobKind
from trimtab_protos.agent.v1 import backup_service_pb2 as pb
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import BackupSummary, JobProgress

SIZE = 6 << 20


class NobodyCancels(threading.Event):
    """Waiting for it takes the clock's time, not the test's."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self._clock.advance(timeout)
        return False


class Control:
    def __init__(self, clock: ManualClock) -> None:
        self.cancelled: threading.Event = NobodyCancels(clock)
        self.told: list[JobProgress] = []

    def report(self, progress: JobProgress) -> None:
        self.told.append(progress)


class Bed:
    """Two repositories in folders, a vm that is whole of data, and jobs whose waiting takes the clock's time."""

    def __init__(self, directory: Path, *, disks: int = 1, waits_s: float = 0.0) -> None:
        self.clock = ManualClock()
        self._repositories = Repositories(self.clock, holder="host1")
        for name in ("main", "second"):
            access = Access(url=f"file://{directory}/{name}", key=KEY.text, fleet_id=FLEET)
            self._repositories.grant(name, access, create=True)
        source = WaitsFirst(self.clock, waits_s)
        self.names = [f"vd{letter}" for letter in "abc"[:disks]]
        found = {}
        for number, name in enumerate(self.names):
            found[name] = SimulatedDisk(bytearray(SIZE))
            found[name].write(0, random.Random(number).randbytes(SIZE))
        source.vms["vm-1"] = SimulatedVm(found)
        self.runners: Any = backup_runners(self._repositories, source, self.clock, Holds(self.clock))

    def back_up(self, mib_s: int) -> tuple[Any, Control, float]:
        """Return what was made, what was told meanwhile, and how long it took."""
        disks = [pb.DiskToBackUp(name=name, volume_id=f"vol-{name}", generation=1) for name in self.names]
        asked = {"repository": "main", "backup_id": "bk-1", "vm_id": "vm-1", "vm_name": "web1", "project_id": "p"}
        request = pb.StartBackupRequest(**asked, disks=disks, bandwidth_mib_s=mib_s)
        return self._run(JobKind.BACKUP, request.SerializeToString())

    def replicate(self, mib_s: int) -> tuple[Any, Control, float]:
        request = pb.StartReplicationRequest(repository="main", to_repository="second", bandwidth_mib_s=mib_s)
        return self._run(JobKind.UPKEEP, replication_request(request))

    def _run(self, kind: JobKind, request: bytes) -> tuple[Any, Control, float]:
        control, began_s = Control(self.clock), self.clock.boottime_s()
        made = self.runners[kind](request, Stamp(epoch=1, turn=1), control)
        return made, control, self.clock.boottime_s() - began_s


class WaitsFirst(SimulatedBackups):
    """Its guests take their time to stand still."""

    def __init__(self, clock: ManualClock, waits_s: float) -> None:
        super().__init__(clock)
        self._waits = (clock, waits_s)

    def serve(self, *arguments: Any, **more: Any) -> Any:
        clock, seconds = self._waits
        clock.advance(seconds)
        return super().serve(*arguments, **more)


@pytest.mark.parametrize(("mib_s", "least_s", "most_s"), [(0, 0, 0), (1, 6, 6.5), (3, 2, 2.5)])
def test_a_backup_takes_as_long_as_its_bandwidth_makes_it(tmp_path: Path, mib_s: int, least_s: float, most_s: float) -> None:
    made, control, took_s = Bed(tmp_path).back_up(mib_s)
    assert isinstance(made, BackupSummary)
    assert made.disks[0].read_bytes == SIZE
    assert least_s <= took_s <= most_s
    assert all(one.rate_bytes_s <= 1.02 * (mib_s << 20) for one in control.told if mib_s), "told as it was held"


def test_the_disks_of_a_vm_share_its_bandwidth(tmp_path: Path) -> None:
    _made, _control, took_s = Bed(tmp_path, disks=3).back_up(2)
    assert 9 <= took_s <= 9.5


def test_the_time_in_which_a_guest_was_waited_for_is_not_made_up_for(tmp_path: Path) -> None:
    _made, _control, took_s = Bed(tmp_path, waits_s=60).back_up(1)
    assert 65.4 <= took_s <= 66.5


@pytest.mark.parametrize(("mib_s", "least_s", "most_s"), [(0, 0, 0), (1, 12, 12.5), (4, 3, 3.5)])
def test_a_replication_takes_as_long_as_its_bandwidth_makes_it(tmp_path: Path, mib_s: int, least_s: float, most_s: float) -> None:
    bed = Bed(tmp_path, disks=2)
    bed.back_up(0)
    made, control, took_s = bed.replicate(mib_s)
    assert made.written_bytes == 2 * SIZE
    assert least_s <= took_s <= most_s
    assert {one.phase for one in control.told} == {"replicating"}
    assert all(one.total_bytes == 2 * SIZE for one in control.told)


def test_how_far_a_backup_is_is_told_once_a_second_over_all_disks(tmp_path: Path) -> None:
    _made, control, _took_s = Bed(tmp_path, disks=2).back_up(1)
    told = [one for one in control.told if one.phase == "copying"]
    assert told == control.told
    done = [one.done_bytes for one in told]
    assert done == sorted(set(done))
    assert 11 <= len(done) <= 13, "twelve seconds"
    assert done[-1] > 11 << 20
    assert [one.total_bytes for one in told] == [SIZE if one.done_bytes <= SIZE else 2 * SIZE for one in told]
    mib = 1 << 20
    assert all(abs(one.rate_bytes_s - mib) < mib // 50 for one in told)
    assert all(abs(one.remaining_s - (one.total_bytes - one.done_bytes) / mib) <= 1 for one in told)


def test_a_backup_that_is_cancelled_while_it_holds_back_ends_then(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    waits = CancelledMeanwhile()
    control = Control(bed.clock)
    control.cancelled = waits
    request = pb.StartBackupRequest(
        repository="main", backup_id="bk-1", vm_id="vm-1", vm_name="web1", project_id="p", bandwidth_mib_s=1
    )
    request.disks.add(name="vda", volume_id="vol-vda", generation=1)
    with pytest.raises(Conflict, match="cancelled"):
        bed.runners[JobKind.BACKUP](request.SerializeToString(), Stamp(epoch=1, turn=1), control)
    assert waits.waited == 1


class CancelledMeanwhile(threading.Event):
    """Set while somebody waits for it."""

    waited = 0

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout
        self.waited += 1
        self.set()
        return True
