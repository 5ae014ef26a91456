"""Who waits for whom in a start group."""

from dataclasses import replace

import pytest

from trimtab_controller.core.failover import FailoverSettings, step, steps
from trimtab_controller.core.failover.drill import Assumptions, lose_host
from trimtab_controller.core.failover.effects import StartVm
from trimtab_controller.core.failover.events import LeaderStarted, Tick
from trimtab_controller.core.failover.records import Desired, Holder, HostRecord, Phase, Seen, State, VmRecord
from trimtab_controller.core.lifecycle import HostConnectivity

NOW_S = 10_000.0
WAITS = "waits for db, which starts earlier in group shop"


def host(name: str, standing: HostConnectivity = HostConnectivity.UP) -> HostRecord:
    return HostRecord(id=name, standing=standing, since_s=0.0, heard_s=NOW_S, handled_s=NOW_S, has_listed=True)


HELD = (Holder(host="h1", epoch=1),)
WEB = VmRecord(id="vm-2", name="web", project="p", group="shop", group_order=2, start_delay_s=20, phase=Phase.RECOVERING)
DB = VmRecord(
    id="vm-1",
    name="db",
    project="p",
    group="shop",
    group_order=1,
    host="h1",
    holders=HELD,
    phase=Phase.SETTLED,
    seen=Seen.RUNNING,
)


def asked(db: VmRecord, web: VmRecord = WEB, *, home: HostRecord | None = None, state: State | None = None) -> tuple[bool, str]:
    """Return whether web is started now, and why not."""
    before = state or State(settings=FailoverSettings(), ticked_s=NOW_S)
    hosts = {one.id: one for one in (home or host("h1"), host("h2"))}
    after, effects = step(replace(before, hosts=hosts, vms={db.id: db, web.id: web}), Tick(), NOW_S)
    return any(isinstance(one, StartVm) and one.vm == web.id for one in effects), after.vms[web.id].why


def test_a_vm_starts_beside_one_that_never_stopped_running_without_a_delay() -> None:
    assert asked(DB)[0]


def test_a_vm_waits_its_delay_after_one_that_was_just_started() -> None:
    assert asked(replace(DB, ran_s=NOW_S - 19)) == (False, "waits 20 s after db in group shop")
    assert asked(replace(DB, ran_s=NOW_S - 20))[0]


def test_a_vm_that_is_on_its_way_to_another_host_runs() -> None:
    both = (*HELD, Holder(host="h2", epoch=2))
    moving = replace(DB, phase=Phase.MOVING, holders=both, move_to="h2", since_s=NOW_S)
    assert asked(moving)[0]
    assert asked(replace(moving, is_end_unknown=True))[1] == WAITS


@pytest.mark.parametrize("standing", [HostConnectivity.SUSPECT, HostConnectivity.LOST, HostConnectivity.FENCED])
def test_what_a_silent_host_ran_is_not_taken_for_running(standing: HostConnectivity) -> None:
    """Two hosts go with one rack: the first that is proven off must not have its vms started before those of the second."""
    silent = replace(host("h1", standing), heard_s=NOW_S - 60, handled_s=NOW_S - 60)
    assert asked(DB, home=silent) == (False, WAITS)


@pytest.mark.parametrize(
    "other",
    [
        replace(DB, desired=Desired.IGNORED, seen=Seen.STOPPED),
        replace(DB, desired=Desired.DISABLED, seen=Seen.STOPPED),
        replace(DB, phase=Phase.NEEDS_ATTENTION, seen=Seen.STOPPED),
        replace(DB, project="q", seen=Seen.STOPPED),
        replace(DB, group="yard", seen=Seen.STOPPED),
        replace(DB, group_order=2, seen=Seen.STOPPED),
    ],
    ids=["not kept", "stopped", "needs attention", "another project's group", "another group", "same order"],
)
def test_nobody_is_held_up_by_one_that_nothing_starts_or_that_is_not_earlier(other: VmRecord) -> None:
    assert asked(other)[0]


def test_a_guest_that_ended_alone_waits_in_its_group_too() -> None:
    """Hosts whose power came back before anybody missed them have guests that ended, and no loss."""
    web = replace(WEB, phase=Phase.RESTARTING, host="h2")
    down = replace(DB, phase=Phase.RESTARTING, holders=(), seen=Seen.ABSENT, not_before_s=NOW_S + 5)
    assert asked(down, web) == (False, WAITS)
    assert asked(DB, web)[0]


def test_a_new_leader_believes_in_no_guest_whose_host_may_have_gone_before_it_came() -> None:
    began, _effects = steps(State(settings=FailoverSettings(), ticked_s=NOW_S), [LeaderStarted()], NOW_S)
    early = replace(began, judging_from_s=NOW_S + 10, started_s=NOW_S - 5)
    assert asked(DB, state=early) == (False, "waits until it is known that db, which starts earlier in group shop, runs")
    assert asked(replace(DB, ran_s=NOW_S - 4), replace(WEB, start_delay_s=0), state=early)[0], "it saw that one start itself"
    assert not asked(DB, state=replace(early, judging_from_s=NOW_S - 5))[0], "a host that is gone would be suspected by now + 1 s"
    assert asked(DB, state=replace(early, judging_from_s=NOW_S - 6))[0]


def test_a_drill_says_who_waits_for_one_that_no_host_could_take() -> None:
    hosts = {name: replace(host(name), power_paths=("bmc",)) for name in ("h1", "h2", "h3", "h4", "h5")}
    web = replace(WEB, host="h1", holders=HELD, phase=Phase.SETTLED, start_delay_s=0)
    last = replace(web, id="vm-3", name="last", group_order=3, start_delay_s=20)

    def drill(refusals: dict[str, str]) -> dict[str, tuple[float | None, str]]:
        vms = {one.id: one for one in (DB, web, last)}
        played = lose_host(
            hosts, vms, "h1", settings=FailoverSettings(), refusals=refusals, has_power=True, assumptions=Assumptions(boot_s=4)
        )
        return {vms[one.vm].name: (one.seconds, one.why) for one in played.outcomes}

    whole = drill({})
    (db_s, _), (web_s, _), (last_s, _) = whole["db"], whole["web"], whole["last"]
    assert db_s is not None
    assert web_s is not None
    assert last_s is not None
    assert web_s > db_s
    assert last_s >= web_s + 20
    refused = drill({"vm-1": "they are full"})
    assert refused["db"] == (None, "no host could take it: they are full")
    assert refused["web"] == refused["last"] == (None, WAITS)
