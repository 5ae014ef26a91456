"""The engine on both databases: it drives, waits, turns round, gives up, and never lets two drivers act."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.operations.claim_view import claims_of
from tests.operations.endings import ended
from tests.operations.faults import INJECTED, Behaviour, DriverDied, Misbehaving, MortalDatabase, StepFault
from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from tests.operations.wire import How, WireFault
from trimtab_agent.hypervisor.simulation import Fault, FaultKind
from trimtab_controller.core.lifecycle import ObservedState, OperationState
from trimtab_controller.core.model import Operation
from trimtab_controller.operations.engine import ATTEMPTS_COMMITTED, ATTEMPTS_FORWARD
from trimtab_controller.store import operations
from trimtab_protos.errors import Conflict, ErrorKind
from trimtab_protos.messages import Direction

JOIN_TIMEOUT_S = 20.0


# --- the straight way ----------------------------------------------------------------------------------------------------------


def test_an_accepted_vm_ends_up_running_where_it_was_placed(story: FleetStory) -> None:
    vm, operation = story.accept_create("web1")
    story.settle()
    result = ended(story, operation, OperationState.DONE).result
    seen = story.vm(vm.id)
    assert result is not None
    assert (seen.observed_state, seen.host_id) == (ObservedState.RUNNING, result["host_id"])
    assert story.running_on(vm.id) == {seen.host_id}
    assert claims_of(story, vm.id) == {seen.host_id: "home"}


def test_a_vm_that_fits_nowhere_is_refused_with_each_hosts_reason_and_leaves_nothing(story: FleetStory) -> None:
    _vm, operation = story.accept_create("huge", vcpus=1000, vcpus_max=1000)
    story.settle()
    error = ended(story, operation, OperationState.FAILED).error
    assert error is not None
    assert (error.kind, error.code) == (ErrorKind.NO_CAPACITY, "no-host-fits")
    _again, second = story.accept_create("huge")
    story.settle()
    ended(story, second, OperationState.DONE)


@pytest.mark.parametrize("verb", ["stop", "reboot", "pause", "migrate"])
def test_what_is_asked_of_a_host_that_stays_down_fails_as_unavailable(story: FleetStory, verb: str) -> None:
    vm = story.running_vm("web1")
    story.agents.stop(vm.host_id)
    operation = story.accept_power(vm, verb)
    story.settle()
    error = ended(story, operation, OperationState.FAILED).error
    assert error is not None
    assert (error.kind, error.code) == (ErrorKind.UNAVAILABLE, "peer-unreachable")
    assert story.vm(vm.id).host_id == vm.host_id


def test_many_drivers_at_once_do_each_operation_once(story: FleetStory) -> None:
    accepted = [story.accept_create(f"web{number}")[1] for number in range(12)]
    for _ in range(200):
        story.placement.run(story.term)
        drivers = [threading.Thread(target=story.new_engine().drive_due) for _ in range(4)]
        for driver in drivers:
            driver.start()
        for driver in drivers:
            driver.join(JOIN_TIMEOUT_S)
            assert not driver.is_alive()
        if all(story.operation(one.id).state is OperationState.DONE for one in accepted):
            break
        story.clock.advance(1.0)
    for one in accepted:
        ended(story, one, OperationState.DONE)
    starts = [entry.vm_id for entry in story.fleet.oracle if entry.event == "start"]
    assert sorted(starts) == sorted(one.subject_id for one in accepted)


# --- two drivers of one vm ---------------------------------------------------------------------------------------------------------


@contextmanager
def paused_before(story: FleetStory, verb: str, operation: Operation) -> Iterator[WireFault]:
    """Let a first driver come up to sending `verb`, and hold that command on the wire until the block ends."""
    held = story.wire.plan(WireFault(How.HELD, verb=verb))
    first = story.new_engine()

    def drive() -> None:
        for _ in range(50):
            story.placement.run(story.term)
            if not first.drive_due() or held.released.is_set():
                return

    driver = threading.Thread(target=drive)
    driver.start()
    assert held.met.wait(JOIN_TIMEOUT_S), story.journal(operation.id)
    yield held
    held.released.set()
    driver.join(JOIN_TIMEOUT_S)
    assert not driver.is_alive()


@pytest.mark.parametrize("verb", ["EnsureVolume", "DefineDomain", "ChangePower"])
def test_the_late_command_of_a_driver_that_was_overtaken_is_refused_by_its_turn(story: FleetStory, verb: str) -> None:
    vm, operation = story.accept_create("web1")
    with paused_before(story, verb, operation):
        story.lose_driver()
        story.settle()
        journal = story.journal(operation.id)
        ended(story, operation, OperationState.DONE)
        assert story.wire.refusals == []
    assert story.wire.refusals == [(verb, "stale-turn")]
    assert story.journal(operation.id) == journal, "and the late driver recorded nothing"
    ended(story, operation, OperationState.DONE)
    assert story.running_on(vm.id) == {story.vm(vm.id).host_id}


def test_the_late_start_of_a_vm_that_was_deleted_meanwhile_is_refused(story: FleetStory) -> None:
    vm, operation = story.accept_create("web1")
    with paused_before(story, "ChangePower", operation):
        deletion = story.accept_power(vm, "delete")
        story.settle()
        ended(story, deletion, OperationState.DONE)
    assert story.wire.refusals == [("ChangePower", "stale-turn")]
    assert story.running_on(vm.id) == frozenset()
    superseded = ended(story, operation, OperationState.FAILED)
    assert superseded.error is not None
    assert superseded.error.code == "superseded"


def test_a_driver_that_was_overtaken_while_the_agent_worked_records_nothing(story: FleetStory) -> None:
    _vm, operation = story.accept_create("web1")
    fault = story.hold("define_domain", Fault(FaultKind.HANG))
    first = threading.Thread(target=story.settle, kwargs={"engine": story.new_engine(), "until": fault.met.is_set})
    first.start()
    assert fault.met.wait(JOIN_TIMEOUT_S)
    story.lose_driver()
    second = story.new_engine()
    joined = threading.Thread(target=second.drive_due)  # joins the command that is under way
    joined.start()
    fault.released.set()
    first.join(JOIN_TIMEOUT_S)
    joined.join(JOIN_TIMEOUT_S)
    story.settle()
    ended(story, operation, OperationState.DONE)
    assert story.journal(operation.id).count("do define") == 1


# --- cancel ----------------------------------------------------------------------------------------------------------------------


def test_a_migration_is_cancelled_while_it_copies_and_the_guest_stays(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    story.fleet.memory_rate_bytes_s = 1 << 20
    operation = story.accept_power(vm, "migrate")
    story.settle(until=lambda: story.operation(operation.id).progress is not None)
    story.cancel(operation.id)
    story.settle()
    ended(story, operation, OperationState.CANCELLED)
    assert story.running_on(vm.id) == {vm.host_id}
    assert story.vm(vm.id).host_id == vm.host_id


def test_a_cancel_that_comes_after_the_switch_is_too_late_and_says_so(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    switched = story.hold("migrate.switched", Fault(FaultKind.HANG))
    operation = story.accept_power(vm, "migrate")
    story.settle(until=switched.met.is_set)
    assert switched.met.wait(JOIN_TIMEOUT_S)
    story.cancel(operation.id)
    story.step()
    assert story.operation(operation.id).waiting_for == "the migration to be cancelled"
    switched.released.set()
    story.settle()
    result = ended(story, operation, OperationState.DONE).result
    assert result is not None
    assert result["cancel"] == "too late"
    assert story.running_on(vm.id) == {result["target_host_id"]}


def test_a_move_that_is_believed_failed_but_took_place_is_gone_forward_from(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    operation = story.accept_power(vm, "migrate")
    fault = StepFault("vm.migrate", "move", Behaviour.FAIL_AFTER)
    story.settle(story.new_engine(saga_of=Misbehaving(fault)))
    assert fault.met == 1
    ended(story, operation, OperationState.DONE)
    journal = story.journal(operation.id)
    assert journal[journal.index("failed move") :][:3] == ("failed move", "do move", "do switch")
    assert story.running_on(vm.id) == {story.vm(vm.id).host_id} != {vm.host_id}


def test_a_guest_that_ignores_the_request_is_not_cut_off_when_its_stop_is_cancelled(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    story.fleet.stubborn_vms.add(vm.id)
    operation = story.accept_power(vm, "stop", timeout_s=60)
    story.settle(until=lambda: "shut down" in story.operation(operation.id).waiting_for)
    story.cancel(operation.id)
    story.settle()
    ended(story, operation, OperationState.CANCELLED)
    assert story.running_on(vm.id) == {vm.host_id}


def test_a_guest_that_was_still_booting_is_asked_again_and_not_cut_off(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    before, boots = story.clock.now(), story.fleet.stubborn_vms
    boots.add(vm.id)
    operation = story.accept_power(vm, "stop", timeout_s=60)
    story.settle(until=lambda: "shut down" in story.operation(operation.id).waiting_for)
    boots.discard(vm.id)
    story.settle()
    assert not ended(story, operation, OperationState.DONE).result["was_forced"]
    assert (story.clock.now() - before).total_seconds() < 15
    assert story.vm(vm.id).observed_reason == "guest_shutdown"


def test_a_guest_that_ignores_the_request_is_cut_off_after_its_time(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    story.fleet.stubborn_vms.add(vm.id)
    before = story.clock.now()
    operation = story.accept_power(vm, "stop", timeout_s=60)
    story.settle()
    assert ended(story, operation, OperationState.DONE).result["was_forced"], "its user is told that the power was cut"
    assert 60 <= (story.clock.now() - before).total_seconds() < 70
    assert story.running_on(vm.id) == frozenset()
    again = story.accept_power(vm, "stop")
    story.settle()
    assert not ended(story, again, OperationState.DONE).result["was_forced"], "it was off already"


# --- giving up ----------------------------------------------------------------------------------------------------------------------


def test_an_operation_past_its_deadline_is_undone(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    story.wire.cut_hosts.add(vm.host_id)
    operation = story.accept(
        "vm.pause", vm.id, {"vm_id": vm.id}, project_id=vm.project_id, deadline=story.clock.now() + _seconds(5)
    )
    story.settle()
    story.wire.cut_hosts.clear()
    error = ended(story, operation, OperationState.FAILED).error
    assert error is not None
    assert error.code == "deadline-passed"


def test_a_step_that_never_gets_through_is_undone_after_some_tries(story: FleetStory) -> None:
    _vm, operation = story.accept_create("web1")
    fault = StepFault("vm.create", "define", Behaviour.UNAVAILABLE, times=None)
    story.settle(story.new_engine(saga_of=Misbehaving(fault)))
    assert fault.met == ATTEMPTS_FORWARD
    error = ended(story, operation, OperationState.FAILED).error
    assert error is not None
    assert error.code == INJECTED


def test_a_committed_step_that_never_gets_through_asks_for_an_operator_and_goes_on_when_told_to(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    operation = story.accept_power(vm, "delete")
    story.wire.cut_hosts.add(vm.host_id)
    story.settle()
    parked = story.operation(operation.id)
    assert (parked.state, parked.attempts) == (OperationState.NEEDS_ATTENTION, ATTEMPTS_COMMITTED - 1)
    assert story.vm(vm.id).deleted_at is None, "a vm is not shown as gone while its guest may run"
    with pytest.raises(Conflict, match="busy"):
        story.accept("vm.stop", vm.id, {"vm_id": vm.id})
    story.wire.cut_hosts.clear()
    retry(story, operation)
    again = story.operation(operation.id)
    assert (again.ended_at, again.error) == (None, None), "it goes on: it has not ended"
    story.settle()
    ended(story, operation, OperationState.DONE)


def test_waiting_resets_the_count_of_tries(story: FleetStory) -> None:
    """A migration that is polled for hours must not fail of a blip now and then."""
    vm = story.running_vm("web1")
    story.fleet.memory_rate_bytes_s = 512 << 20  # forty slices: as many polls
    operation = story.accept_power(vm, "migrate")
    blips = [WireFault(How.UNREACHABLE, verb="StartMigration", after_calls=1) for _ in range(ATTEMPTS_FORWARD + 2)]
    for blip in blips:
        planned = story.wire.plan(blip)
        story.settle(until=planned.met.is_set, waits_for_jobs=False)
        assert planned.met.is_set(), "it was still under way"
    story.settle()
    ended(story, operation, OperationState.DONE)


def test_an_error_that_passed_is_not_shown_while_its_step_waits(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    story.fleet.memory_rate_bytes_s = 512 << 20  # forty slices: as many polls
    operation = story.accept_power(vm, "migrate")
    blip = story.wire.plan(WireFault(How.UNREACHABLE, verb="StartMigration", after_calls=1))
    story.settle(until=blip.met.is_set, waits_for_jobs=False)
    assert story.operation(operation.id).error is not None
    story.settle(until=lambda: story.operation(operation.id).attempts == 0, waits_for_jobs=False)
    waiting = story.operation(operation.id)
    assert (waiting.state, waiting.error) == (OperationState.WAITING, None)
    story.settle()
    ended(story, operation, OperationState.DONE)


def test_a_retried_operation_that_had_gone_forward_again_goes_on_forward(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    operation = story.accept_power(vm, "migrate")
    believed_failed = StepFault("vm.migrate", "move", Behaviour.FAIL_AFTER, times=None)
    stuck = StepFault("vm.migrate", "settle", Behaviour.FAIL_BEFORE, times=None)
    story.settle(story.new_engine(saga_of=Misbehaving(believed_failed, stuck)))
    assert story.operation(operation.id).state is OperationState.NEEDS_ATTENTION
    retry(story, operation)
    story.settle()
    ended(story, operation, OperationState.DONE)


def test_only_one_that_needs_attention_is_retried(story: FleetStory) -> None:
    _vm, operation = story.accept_create("web1")
    with pytest.raises(Conflict, match="queued"):
        retry(story, operation)


def retry(story: FleetStory, operation: Operation) -> None:
    story.db.write(lambda session: operations.retry(session, operation.id, actor=story.actor.name, now=story.clock.now()))


def _seconds(number: float):  # type: ignore[no-untyped-def]
    from datetime import timedelta

    return timedelta(seconds=number)


# --- defects -------------------------------------------------------------------------------------------------------------------------


def test_a_defect_in_one_operation_stops_no_other(story: FleetStory) -> None:
    _broken, first = story.accept_create("web1")
    _sound, second = story.accept_create("web2")
    blown = StepFault("vm.create", "define", Behaviour.MEANWHILE, meanwhile=_divide_by_zero)
    story.settle(story.new_engine(saga_of=Misbehaving(blown)))
    assert blown.met == 1
    states = sorted(story.operation(one.id).state.value for one in (first, second))
    assert states == ["done", "failed"]
    assert audit_invariants(story) == []


def _divide_by_zero() -> None:
    _ = 1 // 0


# --- hosts that come and go ------------------------------------------------------------------------------------------------------------


def test_an_agent_that_is_restarted_answers_from_its_journal(story: FleetStory) -> None:
    vm, operation = story.accept_create("web1")
    lost = story.wire.plan(WireFault(How.REPLY_LOST, verb="DefineDomain"))
    story.settle(until=lost.met.is_set)
    for host_id in story.host_ids:
        story.agents.restart(host_id)
    story.client.reconnect_all()
    story.settle()
    ended(story, operation, OperationState.DONE)
    assert [entry.event for entry in story.fleet.oracle if entry.vm_id == vm.id] == ["start"]


def test_a_command_that_was_decided_before_the_hosts_new_session_is_decided_again(story: FleetStory) -> None:
    """Its lease number moved between reading the host's row and sending: nothing was done, nothing is undone."""
    _vm, operation = story.accept_create("web1")
    refused = WireFault(How.REFUSED, verb="DefineDomain", error=Conflict("no-lease", "another lease"))
    story.wire.plan(refused)
    story.settle()
    assert refused.met.is_set()
    ended(story, operation, OperationState.DONE)


# --- death, where the databases differ ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_commit", [False, True])
@pytest.mark.parametrize("kind", ["create", "migrate"])
def test_a_driver_that_dies_around_any_commit_is_taken_over(story: FleetStory, kind: str, after_commit: bool) -> None:
    for number in range(1, 200):
        if kind == "create":
            operation = story.accept_create(f"web{number}")[1]
        else:
            operation = story.accept_power(story.running_vm(f"web{number}"), "migrate")
        database = MortalDatabase(story.db, number, after_commit)
        try:
            story.settle(story.new_engine(db=database))
        except DriverDied:
            story.lose_driver()
            story.settle()
        ended(story, operation, OperationState.DONE)
        if not database.has_died:
            return
    raise AssertionError("it always died")


@pytest.mark.parametrize("direction", [Direction.DO, Direction.UNDO])
def test_a_driver_that_dies_in_the_middle_of_an_effect_is_taken_over(story: FleetStory, direction: Direction) -> None:
    _vm, operation = story.accept_create("web1")

    def die() -> None:
        raise DriverDied

    faults = [StepFault("vm.create", "define", Behaviour.MEANWHILE, direction=direction, meanwhile=die)]
    if direction is Direction.UNDO:
        faults.append(StepFault("vm.create", "finish", Behaviour.FAIL_BEFORE))
    with pytest.raises(DriverDied):
        story.settle(story.new_engine(saga_of=Misbehaving(*faults)))
    story.lose_driver()
    story.settle()
    ended(story, operation, OperationState.DONE if direction is Direction.DO else OperationState.FAILED)
