"""Vms of a start group start in order after a loss, whoever leads: the leader's loop on a real store over simulated hosts."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.operations.examples_changes import accept_ha
from tests.operations.failover_kit import ROUNDS, AtOnce, Story, story_of
from tests.operations.kit import FleetStory
from trimtab_controller.clock import mint
from trimtab_controller.core.lifecycle import HostConnectivity, OperationState
from trimtab_controller.core.model import Vm
from trimtab_controller.loops.failover import LEADERS_WINDOW_S, WHY_EVERY_S, FailoverLoop
from trimtab_controller.services import failover_view
from trimtab_controller.store import events, failover, schema

DELAY_S = 20
WAITS = "waits for db, which starts earlier in group shop"


@pytest.fixture
def story(new_story: Callable[..., FleetStory]) -> Iterator[Story]:
    yield from story_of(new_story(host_count=5))


@pytest.fixture
def small(new_story: Callable[..., FleetStory]) -> Iterator[Story]:
    yield from story_of(new_story(host_count=3))


def member(story: Story, name: str, order: int, host_id: str, **wishes: Any) -> Vm:
    return story.kept_vm(name, start_group="shop", start_order=order, to_host=host_id, **wishes)


def db_and_web(story: Story, db_host: str, web_host: str) -> tuple[Vm, Vm]:
    """Web would start first, were it not for its group."""
    db = member(story, "db", 1, db_host)
    return db, member(story, "web", 2, web_host, priority=10, start_delay_s=DELAY_S)


def mark(story: Story) -> int:
    return len(story.fleet.fleet.oracle)


def starts(story: Story, since: int) -> dict[str, float]:
    """Return when each guest was started, in that order, by what no control plane has a say in."""
    seen = [one for one in story.fleet.fleet.oracle[since:] if one.event == "start"]
    return {story.fleet.vm(one.vm_id).name: one.at_s for one in seen}


def runs(story: Story, vm: Vm) -> Callable[[], bool]:
    return lambda: bool(story.fleet.running_on(vm.id)) and story.fleet.vm(vm.id).observed_state.value == "running"


def set_vm(story: Story, vm: Vm, **values: Any) -> None:
    table = schema.vm
    story.fleet.db.write(lambda session: session.execute(table.update().where(table.c.id == vm.id).values(**values)))


def next_leader(story: Story) -> None:
    """The leader dies; another process takes over and knows what is in the store."""
    story.loop.close()
    fleet = story.fleet
    story.loop = FailoverLoop(
        engine=fleet.new_engine(), clock=fleet.clock, fencer=story.device, askers=AtOnce(), drivers=AtOnce()
    )


def lose_power(story: Story) -> None:
    for host_id in story.fleet.host_ids:
        story.power_cut(host_id)


def miss(story: Story, *host_ids: str) -> None:
    for connectivity in (HostConnectivity.SUSPECT, HostConnectivity.LOST):
        for host_id in host_ids:
            story.silence(host_id, connectivity)
        story.rounds(4)


def power_back(story: Story, host_id: str) -> None:
    story.fleet.hypervisor(host_id).boot()
    story.return_of(host_id)


def waiting(story: Story) -> dict[str, str]:
    return {one.vm: one.why for one in story.fleet.db.read(failover_view.status).waiting}


def test_after_the_loss_of_a_host_a_group_starts_in_order_each_after_its_delay(story: Story) -> None:
    home, beside = story.fleet.host_ids[:2]
    member(story, "app", 1, beside)
    db, web = db_and_web(story, home, home)
    story.arm(home)
    story.lose(home)
    before = mark(story)
    story.rounds(ROUNDS, until=lambda: bool(waiting(story)))
    assert waiting(story) == {"web": WAITS}
    assert story.fleet.vm(web.id).problem == WAITS
    story.rounds(ROUNDS, until=runs(story, db))
    story.rounds(int(WHY_EVERY_S) + 2)
    assert story.fleet.vm(web.id).problem == f"waits {DELAY_S} s after db in group shop"
    story.rounds(ROUNDS, until=runs(story, web))
    found = starts(story, before)
    assert list(found) == ["db", "web"], "app runs on and is waited for by nobody"
    assert DELAY_S <= found["web"] - found["db"] <= DELAY_S + 3
    story.rounds(3)
    assert (waiting(story), story.fleet.vm(web.id).problem) == ({}, "")


def test_a_group_of_the_same_name_in_another_project_is_another(story: Story) -> None:
    home, project_id = story.fleet.host_ids[0], mint("proj")
    theirs = member(story, "theirs", 0, home, pool=story.fleet.local)
    web = member(story, "web", 2, home)
    now = story.fleet.clock.now()
    row = schema.project.insert().values(id=project_id, name="other", created_at=now)
    story.fleet.db.write(lambda session: session.execute(row))
    set_vm(story, theirs, project_id=project_id)
    story.arm(home)
    story.lose(home)
    story.rounds(ROUNDS, until=lambda: story.is_home_again(web))
    assert story.is_home_again(web)


def test_two_hosts_that_are_lost_together_are_one_loss_to_a_group(story: Story) -> None:
    """Web's host is proven off first; what db's host ran may be gone as well, whatever the store says of it."""
    first, second = story.fleet.host_ids[:2]
    db, web = db_and_web(story, second, first)
    story.arm(first)
    story.rounds(int(LEADERS_WINDOW_S) + 4)
    before = mark(story)
    story.power_cut(second)
    miss(story, first, second)
    story.fleet.db.write(
        lambda session: failover.set_control(session, now=story.fleet.clock.now(), released={first: "rack", second: "rack"})
    )
    story.rounds(40)
    assert story.fleet.vm(web.id).problem == WAITS
    assert starts(story, before) == {}
    story.confirm_off(second)
    story.rounds(ROUNDS, until=runs(story, web))
    assert list(starts(story, before)) == ["db", "web"]
    assert story.is_home_again(db)


def test_after_the_loss_of_all_power_a_group_starts_in_order_whichever_host_is_back_first(small: Story) -> None:
    db_host, web_host = small.fleet.host_ids[:2]
    db, web = db_and_web(small, db_host, web_host)
    small.rounds(14)
    lose_power(small)
    miss(small, *small.fleet.host_ids)
    before = mark(small)
    for host_id in small.fleet.host_ids[1:]:
        power_back(small, host_id)
    small.rounds(30)
    assert starts(small, before) == {}
    assert small.fleet.vm(web.id).problem == WAITS
    power_back(small, db_host)
    small.rounds(ROUNDS, until=runs(small, web))
    found = starts(small, before)
    assert list(found) == ["db", "web"]
    assert DELAY_S <= found["web"] - found["db"] <= DELAY_S + 3
    small.rounds(3)
    assert (waiting(small), small.fleet.vm(web.id).problem) == ({}, "")
    assert small.fleet.running_on(db.id) == {db_host}


@pytest.mark.parametrize("leads", ["the same leader", "a new leader"])
def test_hosts_that_nobody_missed_while_they_had_no_power_have_their_groups_start_in_order(small: Story, leads: str) -> None:
    """The controllers were without power as well: the store calls all that ran running, and its hosts up."""
    db_host, web_host = small.fleet.host_ids[:2]
    _db, web = db_and_web(small, db_host, web_host)
    small.rounds(14)
    lose_power(small)
    before = mark(small)
    if leads == "a new leader":
        next_leader(small)
        power_back(small, web_host)
        small.rounds(int(LEADERS_WINDOW_S) - 2)
        assert starts(small, before) == {}, "db's host may be without power, for all that this leader knows"
        miss(small, db_host)
        small.rounds(10)
        assert starts(small, before) == {}
        assert small.fleet.vm(web.id).problem == WAITS
    for host_id in small.fleet.host_ids:
        if not small.fleet.hypervisor(host_id).is_up():
            power_back(small, host_id)
    small.rounds(ROUNDS, until=runs(small, web))
    found = starts(small, before)
    assert list(found) == ["db", "web"]
    assert found["web"] - found["db"] >= DELAY_S


@pytest.mark.parametrize("why", ["not kept", "stopped", "needs attention", "shut down from the inside"])
def test_an_earlier_vm_that_nothing_starts_holds_nobody_up(story: Story, why: str) -> None:
    home, beside = story.fleet.host_ids[:2]
    db, web = db_and_web(story, beside if "inside" in why else home, home)
    match why:
        case "not kept":
            set_vm(story, db, ha="none")
        case "stopped":
            story.fleet.accept_power(db, "stop")
            story.fleet.settle()
        case "needs attention":
            set_vm(story, db, attention="failover", observed_state="stopped")
        case _:
            set_vm(story, db, observed_state="stopped", observed_reason="guest_shutdown")
    story.arm(home)
    story.lose(home)
    before = mark(story)
    story.rounds(ROUNDS, until=lambda: "failover.fenced" in story.kinds())
    fenced_s = story.fleet.clock.boottime_s()
    story.rounds(ROUNDS, until=lambda: story.is_home_again(web))
    assert starts(story, before).keys() == {"web"}
    assert starts(story, before)["web"] - fenced_s < DELAY_S, "there is nobody after whom it would wait"


def test_a_vm_that_is_taken_out_of_its_group_waits_no_longer(story: Story) -> None:
    home = story.fleet.host_ids[0]
    db, web = member(story, "db", 1, home, pool=story.fleet.local), member(story, "web", 2, home)
    story.arm(home)
    story.lose(home)
    story.rounds(40)
    assert story.fleet.vm(web.id).problem == WAITS, "db comes back with its host alone"
    operation = accept_ha(story.fleet, web, None, start_group="")
    story.fleet.settle()
    story.rounds(ROUNDS, until=lambda: story.is_home_again(web))
    assert story.is_home_again(web)
    assert not story.fleet.running_on(db.id)
    assert story.fleet.operation(operation.id).state is OperationState.DONE


def test_being_taken_out_of_the_group_is_done_however_soon_the_recovery_supersedes_it(story: Story) -> None:
    home = story.fleet.host_ids[0]
    _db, web = member(story, "db", 1, home, pool=story.fleet.local), member(story, "web", 2, home)
    story.arm(home)
    story.lose(home)
    story.rounds(40)
    assert story.fleet.vm(web.id).problem == WAITS
    operation = accept_ha(story.fleet, web, None, start_group="")
    story.rounds(5, until=lambda: any(one.kind == "vm.recover" for one in story.operations(web.id)))
    assert [one.kind for one in story.operations(web.id)][-2:] == ["vm.set_ha", "vm.recover"], "no driver has looked at it yet"
    story.rounds(ROUNDS, until=lambda: story.is_home_again(web))
    ended = story.fleet.operation(operation.id)
    assert (ended.state, ended.error, ended.result) == (OperationState.DONE, None, {"is_host_told": True})
    told = [
        one
        for one in story.fleet.db.read(lambda session: events.page_after(session, 0, limit=1000))
        if one.kind == "vm.ha_changed"
    ]
    assert [one.operation_id for one in told] == [operation.id]


def test_who_waited_for_a_host_that_came_back_is_told_of_no_more_once_it_runs(story: Story) -> None:
    home = story.fleet.host_ids[0]
    db, web = member(story, "db", 1, home, pool=story.fleet.local), member(story, "web", 2, home)
    story.arm(home)
    story.lose(home)
    story.rounds(40)
    assert waiting(story).keys() == {"db", "web"}
    before = mark(story)
    power_back(story, home)
    story.rounds(ROUNDS, until=lambda: runs(story, db)() and runs(story, web)())
    story.rounds(3)
    assert list(starts(story, before)) == ["db", "web"]
    assert waiting(story) == {}


@pytest.mark.parametrize("dies", ["before db is started", "while db runs and web waits"])
def test_a_new_leader_neither_forgets_the_order_nor_begins_the_delay_anew(story: Story, dies: str) -> None:
    home = story.fleet.host_ids[0]
    db, web = db_and_web(story, home, home)
    story.arm(home)
    story.lose(home)
    before = mark(story)
    if dies == "before db is started":
        story.rounds(ROUNDS, until=lambda: "failover.fenced" in story.kinds())
    else:
        story.rounds(ROUNDS, until=runs(story, db))
        story.rounds(5)
    next_leader(story)
    story.rounds(ROUNDS, until=runs(story, web))
    found = starts(story, before)
    assert list(found) == ["db", "web"]
    assert DELAY_S <= found["web"] - found["db"] <= DELAY_S + 3


def test_a_new_leader_has_nobody_wait_for_one_that_runs_since_long(story: Story) -> None:
    home, beside = story.fleet.host_ids[:2]
    db, _web = db_and_web(story, beside, home)
    for verb in ("stop", "start"):
        story.fleet.accept_power(story.fleet.vm(db.id), verb)
        story.fleet.settle()
    assert story.fleet.running_on(db.id)
    story.fleet.clock.advance(60)
    story.arm(home)
    next_leader(story)
    story.lose(home)
    before = mark(story)
    story.rounds(ROUNDS, until=lambda: "failover.fenced" in story.kinds())
    fenced_s = story.fleet.clock.boottime_s()
    story.rounds(ROUNDS, until=lambda: bool(starts(story, before)))
    assert starts(story, before)["web"] - fenced_s < 5
