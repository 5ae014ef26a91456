"""A full disk on the controller: hosts keep their leases, and so their guests."""

from pathlib import Path

import pytest

from tests.unit.controller_rpc.conftest import Fleet
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.store import events
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Unavailable


def fill_up(directory: Path) -> Path:
    """Take every byte that is left."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 512, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return filler


def chatter(fleet: Fleet, *, times: int) -> None:
    """Write what makes the database grow, as operations under way would."""

    def work(session: Session) -> None:
        for i in range(200):
            events.append(session, kind="vm.x", subject_id="vm-x", message=f"{i:0500}", now=fleet.clock.now())

    for _time in range(times):
        fleet.database.write(work)


@pytest.mark.parametrize("fleet", ["tiny"], indirect=True)
async def test_leases_are_granted_for_long_on_a_full_disk(fleet: Fleet, tiny_disk: Path) -> None:
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    fleet.database.reserve.fill(keep_free_bytes=1 << 20)
    filler = fill_up(tiny_disk)
    for _round in range(120):  # ten minutes of a lease's renewals
        fleet.clock.shift_s += 5
        assert await fleet.process.gateway.right.renew()
        assert (await stream.beat()).is_granted
    assert fleet.host(machine.host_id).connectivity is HostConnectivity.UP
    assert not (tiny_disk / "fleet.db.reserve").exists(), "it is what went on was written into"
    filler.unlink()
    fleet.database.reserve.fill(keep_free_bytes=1 << 20)
    assert (tiny_disk / "fleet.db.reserve").exists(), "there for the next time"


@pytest.mark.parametrize("fleet", ["tiny"], indirect=True)
async def test_without_what_was_kept_the_disk_is_really_full(fleet: Fleet, tiny_disk: Path) -> None:
    """So the test before shows something."""
    fill_up(tiny_disk)
    with pytest.raises(Unavailable, match="disk of the controller's database is full"):
        chatter(fleet, times=100)
