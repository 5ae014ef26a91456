"""A real process is killed at every point of vm.create and vm.migrate, and another driver takes over what it left."""

import multiprocessing
import time
from multiprocessing.process import BaseProcess

import pytest

from tests.operations import crash_child
from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Operation
from trimtab_controller.operations.registry import saga_named

DIED_AT_THE_POINT = 9
DEATH_TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([crash_child.__name__])
    return context


def points(kind: str) -> list[str]:
    """Return every point at which a driver of this saga can be told to die, in order."""
    found = []
    for step in saga_named(kind).steps:
        found += [f"before:{step.name}"] + ([] if step.is_transaction else [f"after:{step.name}"]) + [f"recorded:{step.name}"]
    return found


@pytest.mark.parametrize("kind", ["vm.create", "vm.migrate"])
def test_whatever_a_killed_driver_left_is_finished_by_another(
    story: FleetStory, processes: multiprocessing.context.ForkServerContext, kind: str
) -> None:
    for number, point in enumerate(points(kind)):
        operation = accept(story, kind, f"web{number}")
        url = story.db.engine.url.render_as_string(hide_password=False)
        child = processes.Process(target=crash_child.drive_until_death, args=(url, story.clock.now(), point), daemon=True)
        child.start()
        lead_until_dead(story, child)
        assert child.exitcode == DIED_AT_THE_POINT, f"it never came to {point}: {story.journal(operation.id)}"
        story.lose_driver()
        story.settle()
        ended = story.operation(operation.id)
        assert ended.state is OperationState.DONE, (point, ended.error, story.journal(operation.id))
        assert audit_invariants(story) == [], point
    starts = [entry.vm_id for entry in story.fleet.oracle if entry.event == "start"]
    twice = 2 if kind == "vm.migrate" else 1
    assert len(starts) == twice * len(set(starts)), "each guest was started once on each host"


def accept(story: FleetStory, kind: str, name: str) -> Operation:
    if kind == "vm.create":
        return story.accept_create(name)[1]
    return story.accept_power(story.running_vm(name), "migrate")


def lead_until_dead(story: FleetStory, child: BaseProcess) -> None:
    """Be the leader for a driver in another process, until that is dead."""
    deadline = time.monotonic() + DEATH_TIMEOUT_S
    while child.is_alive():
        assert time.monotonic() < deadline, "the child neither dies nor gives up"
        story.placement.run(story.term)
        child.join(0.005)
    child.join()
