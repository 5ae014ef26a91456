"""Who drives: nudged threads of a worker that wake each other, and the leader for want of anybody else."""

import threading
from collections.abc import Callable

import pytest

from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.loops.redrive import PATIENCE_ROUNDS, Redrive
from trimtab_controller.nudge import Nudger
from trimtab_controller.operations.engine import DRIVER_LEASE_S
from trimtab_controller.store import operations
from trimtab_controller.tasks import Drivers
from trimtab_protos.errors import Unavailable

PATIENCE_S = 20.0
THREADS = 6


def test_one_nudge_meets_a_burst_with_every_driver() -> None:
    all_drive = threading.Barrier(THREADS + 1)

    def drive_due(on_more: Callable[[], None]) -> None:
        on_more()
        all_drive.wait(PATIENCE_S)

    drivers = Drivers(drive_due, threads=THREADS)
    drivers.wake()
    all_drive.wait(PATIENCE_S)
    drivers.close()


def test_a_driver_that_fails_drives_again_when_it_is_nudged() -> None:
    began: list[int] = []
    rounds = [threading.Event() for _ in range(3)]

    def drive_due(_on_more: Callable[[], None]) -> None:
        began.append(len(began))
        rounds[began[-1]].set()
        if began[-1] == 0:
            raise Unavailable("database-unavailable", "not now")
        if began[-1] == 1:
            raise RuntimeError("a defect")

    drivers = Drivers(drive_due, threads=1)
    for each in rounds:
        while not each.wait(0.01):
            drivers.wake()  # dropped while the one thread still ends its last drive
    drivers.close()
    drivers.wake()
    assert began == [0, 1, 2], "nothing begins after the close"


def test_the_leader_leaves_what_is_due_to_drivers_that_have_work_and_to_nobody_for_ever(story: FleetStory) -> None:
    vms = [story.running_vm(name) for name in ("web1", "web2")]
    first, second = (story.accept_power(vm, "reboot") for vm in vms)
    now = story.clock.now()
    (claimed,) = story.db.write(
        lambda session: operations.claim_due(session, driver="worker-1", now=now, lease_s=DRIVER_LEASE_S, limit=1)
    )
    redrive = Redrive(db=story.db, clock=story.clock, engine=story.engine, nudger=story.nudger)
    waiting = first if claimed.id == second.id else second
    for _ in range(2 * PATIENCE_ROUNDS):
        redrive.run(story.term)
    assert story.operation(waiting.id).state is OperationState.QUEUED
    story.lose_driver()
    for _ in range(PATIENCE_ROUNDS):
        redrive.run(story.term)
    assert {story.operation(each.id).state for each in (first, second)} == {OperationState.DONE}


def no_nudges() -> None:
    """Take a nudge and lose it, as a queue that was flushed."""


def broken_broker() -> None:
    raise ConnectionError("no broker")


@pytest.mark.parametrize("publish", [broken_broker, no_nudges])
def test_operations_end_without_any_queue(story: FleetStory, publish: Callable[[], None]) -> None:
    nudger = Nudger(publish)
    try:
        redrive = Redrive(db=story.db, clock=story.clock, engine=story.new_engine(), nudger=nudger)
        vm, operation = story.accept_create("web1")
        for _ in range(20 * PATIENCE_ROUNDS):
            story.placement.run(story.term)
            redrive.run(story.term)
            story.clock.advance(1.0)
            if story.operation(operation.id).state is OperationState.DONE:
                break
    finally:
        nudger.stop()
    assert story.operation(operation.id).state is OperationState.DONE
    assert audit_invariants(story) == []
    assert story.running_on(vm.id) == {story.vm(vm.id).host_id}
